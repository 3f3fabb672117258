"""The benchmark `load`: what is compared does its job, and what is written is whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import NoReturn

import psutil  # type: ignore[import-untyped]  # has no stubs of its own
import pytest
from sqlalchemy.engine import URL

from benchmarks import __main__ as command
from benchmarks.load import Case, compare, sampled
from benchmarks.measure import Figure, Goal, MissingError, Picture, Result, Skipped, Spread, Table
from benchmarks.pictures import throughput
from benchmarks.report import Section, as_page, write
from benchmarks.rivals import FEW_ENGINES, KEPT, NULL_POOL, PER_OPERATION, REPO, RIVALS, TENANCY_ON_PSYCOPG, Rival
from shardrepo.demo.child import Child, _interrupts_blocked
from shardrepo.demo.load import Plan
from shardrepo.demo.picture import spread
from shardrepo.testing.servers import Servers

INSTALLED = [rival for rival in (*RIVALS, TENANCY_ON_PSYCOPG, FEW_ENGINES) if all(map(find_spec, rival.packages))]
ABSENT = Rival("nobody's", REPO.make, ("nobodys_package",))

# Two small cases, in a process whose load would go on for a minute.
LONG_RUN = """
from benchmarks import __main__, load
load.CASES = {load.Case(2): load.RIVALS}
load.SECONDS = 60.0
__main__.main()
"""


@pytest.fixture(scope="module")
def results() -> list[Result]:
    """A comparison that takes seconds, with one who is not installed."""
    return list(compare({Case(2): (REPO, KEPT, ABSENT), Case(2, think=0.0): (REPO, KEPT)}, rounds=1, seconds=0.3))


@pytest.mark.parametrize("rival", INSTALLED, ids=lambda rival: rival.name)
def test_a_rival_finds_its_own_rows(servers: Servers, urls: list[URL], rival: Rival) -> None:
    """Each rival does all its operations in the databases that are meant, and has its connections counted there."""
    plan = Plan(threads=4, think=0.005, seconds=None, operations=100, ramp=0.0)
    used = [urls[0], urls[-1]]
    load = sampled(rival.prepare("rival", 20), "rival", [server.url() for server in servers], used, plan)
    assert load is not None
    assert (load.load.operations, load.load.wrong, load.load.errors) == (100, 0, {})
    assert load.load.rows >= 100
    listed = {name for sample in load.samples for server in sample.connections for _, name in server}
    # While it is opened a connection may have its name already, and no database yet.
    assert listed - {None}
    assert listed <= {None, *(url.database for url in used)}
    assert (load.rest.total == 0) == (rival in (NULL_POOL, PER_OPERATION))


def test_a_rival_that_is_not_installed_says_so() -> None:
    """Whoever is missing names the package and how to get it."""
    with pytest.raises(MissingError, match=r"nobodys_package: pip install --group bench"):
        ABSENT.prepare("rival", 20)


def test_a_process_that_dies_takes_nothing_along(servers: Servers, urls: list[URL]) -> None:
    """A round whose process ends before its load does is None, and no error of the benchmark's."""
    plan = Plan(threads=1, think=0.0, seconds=1.0)
    assert sampled(die, "rival", [server.url() for server in servers], urls[:1], plan) is None


def die(_urls: Sequence[URL], _plan: Plan) -> NoReturn:
    """Be a rival that ends its process."""
    os._exit(1)


def test_who_is_missing_is_skipped_by_name(results: list[Result]) -> None:
    """A comparison goes on without those who are not installed, and says who they are."""
    assert [line.what for line in results if isinstance(line, Skipped)] == ["nobody's"]
    tables = [line for line in results if isinstance(line, Table)]
    assert [list(table.rows) for table in tables] == [["a Repo", "an engine per database, kept"]] * 2
    assert [line.what for line in results if isinstance(line, Figure) and line.reached is False] == []


def test_json_parses(
    results: list[Result], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json standard output is one object, whatever else is said meanwhile."""
    monkeypatch.setitem(command.BENCHMARKS, "load", ("", lambda _: iter(results)))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "load", "--json"])
    command.main()
    found = json.loads(capsys.readouterr().out)["benchmarks"]["load"]
    assert found["tables"][0]["rows"]["a Repo"]["at rest"]["median"] > 0
    assert found["skipped"] == [{"what": "nobody's", "lacks": "nobodys_package: pip install --group bench"}]


def test_no_servers_is_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Without a PostgreSQL each benchmark that was asked for says what it lacks."""
    monkeypatch.setenv("SHARDREPO_POSTGRES", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["benchmarks", "load", "--json"])
    command.main()
    (skipped,) = json.loads(capsys.readouterr().out)["benchmarks"]["load"]["skipped"]
    assert skipped["what"] == "load"
    assert str(tmp_path) in skipped["lacks"]


def test_the_page_has_its_pictures_beside_it(results: list[Result], tmp_path: Path) -> None:
    """The page refers to each picture, and the same results make the same files."""
    section = {"load": Section("", results)}
    page = tmp_path / "figures.md"
    write(as_page(section, {}), section, page)
    drawn = contents(tmp_path)
    assert set(drawn) == {
        "figures.md",
        *(f"figures/load-{name}.{kind}" for name in ("connections", "throughput") for kind in ("png", "svg")),
    }
    assert b"(figures/load-connections.svg)" in drawn["figures.md"]
    assert b"<text" not in drawn["figures/load-connections.svg"]
    write(as_page(section, {}), section, page)
    assert contents(tmp_path) == drawn


def test_what_is_aimed_at_stands_beside_the_run_before() -> None:
    """The page begins with it, out of all sections; a line that is new, or aims at nothing, has none."""

    def page(before: str, date: str, **times: float) -> str:
        lines = [Figure(what, Spread.exactly(time), "x", Goal("≤", 1)) for what, time in times.items()]
        return as_page({"some": Section("", [*lines, Figure("other", Spread.exactly(7), "x")])}, {"date": date}, before)

    second = page(page("", "2026-11-28", old=0.9), "2026-11-29", old=1.1, new=0.5)
    head, _, _ = second.partition("## some")
    assert head.endswith(
        """
| | to reach | measured | the run before, 2026-11-28 |
|---|---|---|---|
| [some](#some): old | ≤ 1, missed | 1.10 x [1.10, 1.10] | 0.90 x [0.90, 0.90] |
| [some](#some): new | ≤ 1 | 0.50 x [0.50, 0.50] |  |

"""
    )


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """If a picture cannot be drawn, everything stays as it was."""
    good = throughput(2, {"some": {REPO.name: (20, 500)}})
    write("before", {"load": Section("", [good])}, tmp_path / "figures.md")
    before = contents(tmp_path)
    bad = Picture("bad", "", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    changed = throughput(2, {"some": {REPO.name: (30, 500)}})
    with pytest.raises(ZeroDivisionError):
        write("after", {"load": Section("", [changed, bad])}, tmp_path / "figures.md")
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("heights", "apart", "moved"),
    [
        ([0.1, 0.5, 0.9], 0.2, [0.1, 0.5, 0.9]),
        ([0.5, 0.5], 0.2, [0.4, 0.6]),
        ([0.5, 0.5, 0.6], 0.2, [1 / 3, 8 / 15, 11 / 15]),
        ([0.0, 0.0, 0.9], 0.25, [0.0, 0.25, 0.9]),
        ([1.0, 1.0], 0.25, [0.75, 1.0]),
    ],
)
def test_names_that_meet_are_spread(heights: list[float], apart: float, moved: list[float]) -> None:
    """Names keep their order and their distance, those that meet around their middle, all of them inside."""
    assert spread(heights, apart) == pytest.approx(moved)


@pytest.fixture
def long_run() -> Iterator[subprocess.Popen[str]]:
    """A comparison that would go on for minutes, as a terminal's foreground job."""
    with subprocess.Popen(
        [sys.executable, "-c", LONG_RUN, "load", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as run:
        yield run
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)


def test_an_interrupted_run_leaves_nothing(long_run: subprocess.Popen[str]) -> None:
    """After Ctrl-C there is none of its processes, and none of its servers' files."""
    assert long_run.stderr is not None
    assert any("round 1" in line for line in long_run.stderr)
    processes = psutil.Process(long_run.pid).children(recursive=True)
    folders = set(data_directories(processes))
    os.killpg(long_run.pid, signal.SIGINT)
    said, complaint = long_run.communicate(timeout=100)
    assert (long_run.returncode, said) == (130, "")
    assert complaint.endswith("interrupted: nothing was written\n")
    assert len(folders) == 4
    psutil.wait_procs(processes, timeout=60)
    assert [process for process in processes if process.is_running()] == []
    assert [folder for folder in folders if folder.exists()] == []


def test_an_interrupt_while_a_process_starts_is_not_lost() -> None:
    """A Ctrl-C in the moment in which a process is started comes after it."""
    started = []
    with pytest.raises(KeyboardInterrupt):
        with _interrupts_blocked():
            signal.raise_signal(signal.SIGINT)
            started.append(True)
    assert started


def test_a_process_does_not_hear_of_interrupts() -> None:
    """Ctrl-C is for whoever started it."""
    child = Child(answer)
    assert child.pipe.recv() == "begun"
    os.kill(child.pid, signal.SIGINT)
    child.pipe.send("still there?")
    assert child.pipe.recv() == "still there?"
    child.end()


def test_a_process_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for ever for a process that hangs."""
    monkeypatch.setattr("shardrepo.demo.child.PATIENCE", 0.0)
    child = Child(hang)
    assert child.pipe.recv() == "begun"
    process = psutil.Process(child.pid)
    child.end()
    assert not process.is_running()


def hang(pipe: Pipe) -> None:
    """Be a process that does not care who is at the other end."""
    pipe.send("begun")
    threading.Event().wait()


def answer(pipe: Pipe) -> None:
    """Be a process that says what it is told."""
    pipe.send("begun")
    pipe.send(pipe.recv())


def data_directories(processes: list[psutil.Process]) -> Iterator[Path]:
    """Where the servers among them have their files."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # a server's own, one for each connection
            arguments = process.cmdline()
            if "-D" in arguments:
                yield Path(arguments[arguments.index("-D") + 1])
