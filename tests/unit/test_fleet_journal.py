"""The journal of a run: what is written is what is read, whatever becomes of the process that writes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardrepo.across import Outcome
from shardrepo.errors import ConfigError
from shardrepo.fleet import journal as journals
from shardrepo.fleet.journal import Journal, read, runs
from shardrepo.fleet.outcomes import Failure, Migration
from shardrepo.fleet.plan import Part, Task

HEAD = {"repo": "app.repo:MyRepo", "work": "upgrade", "target": "head"}


def task(name: str, target: str = "two", **facts: Any) -> Task:
    return Task(name, f"db01:5432/{name}", "db01:5432", target, **facts)


def done(name: str, after: str = "two") -> Outcome[Migration]:
    return Outcome(name, f"db01:5432/{name}", 0.5, Migration(("one",), (after,), 2, ("op.x()",)))


def failed(name: str) -> Outcome[Migration]:
    failure = Failure("no", kind="locked", sqlstate="55P03", revision="two", blockers=["somebody"])
    return Outcome(name, f"db01:5432/{name}", 0.5, None, failure)


def names(parts: Sequence[Part]) -> list[list[str]]:
    return [[each.name for each in part.tasks] for part in parts]


def full() -> IO[str]:
    """A file on a disk that has no room."""
    return Path("/dev/full").open("w")


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


def facts_of(outcome: Outcome[Migration]) -> tuple[Any, ...]:
    error = outcome.error
    return outcome.name, outcome.home, outcome.value, error and (str(error), vars(error))


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    """One of a run of two parts, of which nothing is done."""
    with Journal.begin(tmp_path, "upgrade", HEAD) as journal:
        journal.plan([Part([task("a")], 0, 1.5, "stage 1"), Part([task("b"), task("c")], None, 0.0, "stage 2")])
        yield journal


# Written and read


def test_what_was_planned(tmp_path: Path, journal: Journal) -> None:
    """The head, and the parts with all that they say."""
    account = read(tmp_path, journal.run)
    assert (account.head, account.is_planned) == (HEAD, True)
    assert account.parts == account.left()
    assert account.parts == [
        Part([task("a")], 0, 1.5, "stage 1"),
        Part([task("b"), task("c")], None, 0.0, "stage 2"),
    ]


def test_what_is_left(tmp_path: Path, journal: Journal) -> None:
    """What failed, what was begun and has no end, and what was not begun; parts keep their numbers."""
    journal.begun(0, task("a"))
    journal.ended(0, done("a"))
    journal.begun(1, task("b"))
    journal.ended(1, failed("b"))
    journal.begun(1, task("c"))
    account = read(tmp_path, journal.run)
    assert names(account.left()) == [[], ["b", "c"]]
    assert account.failed == ["b"]


def test_what_has_failed_and_succeeded_since(tmp_path: Path, journal: Journal) -> None:
    """The last outcome of a task counts."""
    for outcome in (failed("b"), done("c"), done("b"), failed("c")):
        journal.ended(1, outcome)
    account = read(tmp_path, journal.run)
    assert (names(account.left()), account.failed) == ([["a"], ["c"]], ["c"])


def test_a_database_that_fails_in_a_later_round(tmp_path: Path) -> None:
    """Its last round's outcome is the database's, also where an earlier one's was repeated in between."""
    with Journal.begin(tmp_path, "upgrade", HEAD) as journal:
        journal.plan([Part([task("a", "one")]), Part([task("a", "two")])])
        journal.ended(1, failed("a"))
        journal.ended(0, done("a"))
    account = read(tmp_path, journal.run)
    assert (names(account.left()), account.failed) == ([[], ["a"]], [])


def test_templates_are_no_members(tmp_path: Path) -> None:
    """A template that failed is left to be done, and cannot be named as a database."""
    template = task("t@db01:5432", template="t", near="shard01")
    with Journal.begin(tmp_path, "upgrade", HEAD) as journal:
        journal.plan([Part([template])])
        journal.ended(0, failed(template.name))
    account = read(tmp_path, journal.run)
    assert (account.failed, account.left()) == ([], [Part([template])])


def test_what_could_not_be_planned(tmp_path: Path, journal: Journal) -> None:
    """It has failed, until it is planned after all."""
    journal.ended(-1, failed("d"))
    assert read(tmp_path, journal.run).failed == ["d"]
    journal.plan([Part([task("d")])])
    account = read(tmp_path, journal.run)
    assert (account.failed, names(account.left()), account.outcomes) == ([], [["a"], ["b", "c"], ["d"]], {})


def test_an_error_of_another_kind(tmp_path: Path, journal: Journal) -> None:
    """What an executor of somebody else's brings is a failure, too."""
    journal.ended(0, Outcome("a", None, 0.0, None, ValueError("odd")))
    (outcome,) = read(tmp_path, journal.run).outcomes.values()
    assert isinstance(outcome.error, Failure)
    assert (outcome.error.kind, str(outcome.error)) == ("ValueError", "odd")


text = st.text(max_size=8)
words = st.lists(st.text(min_size=1, max_size=6), max_size=2).map(tuple)
a_failure = st.builds(
    Failure, text, kind=text, sqlstate=st.none() | st.just("42P01"), revision=st.none() | st.just("1"), blockers=words
)
ends = st.builds(Migration, words, words, st.integers(1, 4), words) | a_failure


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Part], list[tuple[int, Outcome[Migration]]]]:
    """Parts, and outcomes of some of their tasks, some of them several times."""
    members = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=8))
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        tasks = [task(name, draw(text)) for name in members if draw(st.booleans())]
        parts.append(Part(tasks, draw(st.none() | st.integers(0, 3)), draw(st.floats(0, 9)), draw(text)))
    outcomes = []
    for number, part in [*enumerate(parts)] * 2:
        for each in part.tasks:
            if draw(st.booleans()):
                end = draw(ends)
                failure = end if isinstance(end, Failure) else None
                value = None if isinstance(end, Failure) else end
                outcomes.append((number, Outcome(each.name, each.home, 0.25, value, failure)))
    return parts, outcomes


@given(histories(), st.integers(0, 40))
def test_an_account_is_what_was_written(
    history: tuple[list[Part], list[tuple[int, Outcome[Migration]]]], torn: int
) -> None:
    """All of it; and if the process was killed in the middle of a line, all before that, with or without a sequel."""
    parts, outcomes = history
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with Journal.begin(folder, "upgrade", HEAD) as journal:
            journal.plan(parts)
            for number, outcome in outcomes:
                journal.begun(number, task(outcome.name))
                journal.ended(number, outcome)
            journal.ended(-1, failed("refused"))
        path = folder / f"{journal.run}.jsonl"
        with path.open("a") as file:
            file.write('{"ended":"refused","part":-1,"home":"h","s'[:torn])
        expected = {(number, outcome.name): facts_of(outcome) for number, outcome in outcomes}
        expected[-1, "refused"] = facts_of(failed("refused"))
        for _ in range(2):
            account = read(folder, journal.run)
            assert account.parts == parts
            assert {key: facts_of(outcome) for key, outcome in account.outcomes.items()} == expected
            Journal.go_on(folder, "last").close()


# Killed


def test_a_line_without_an_end(tmp_path: Path, journal: Journal) -> None:
    """What is noted after it is not lost with it."""
    journal.close()
    path = tmp_path / f"{journal.run}.jsonl"
    with path.open("a") as file:
        file.write('{"begun":"a","par')
    with Journal.go_on(tmp_path, journal.run) as again:
        again.plan([Part([task("d")])])
        again.ended(0, done("a"))
    assert names(read(tmp_path, journal.run).left()) == [[], ["b", "c"], ["d"]]


def test_killed_while_planning(tmp_path: Path) -> None:
    """Half a plan is none: going on with it would leave the other databases out without a word."""
    with Journal.begin(tmp_path, "upgrade", HEAD) as journal:
        journal.plan([Part([task("a"), task("b")])])
    path = tmp_path / f"{journal.run}.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(keepends=True)[:3]))
    account = read(tmp_path, journal.run)
    assert (account.is_planned, account.parts, account.failed) == (False, [], [])
    assert "ended before it had a plan" in refused(account.left)


def test_killed_while_planning_more(tmp_path: Path, journal: Journal) -> None:
    """What was made meanwhile and half planned is planned anew by whoever goes on."""
    journal.close()
    path = tmp_path / f"{journal.run}.jsonl"
    with path.open("a") as file:
        file.write('{"part":{"max_failures":null,"pause":0.0,"title":"x"}}\n{"task":' + json.dumps(task("d").as_dict()))
    assert names(read(tmp_path, journal.run).parts) == [["a"], ["b", "c"]]
    with Journal.go_on(tmp_path, journal.run) as again:
        again.plan([Part([task("d"), task("e")])])
    assert names(read(tmp_path, journal.run).parts) == [["a"], ["b", "c"], ["d", "e"]]


def test_what_the_disk_has_made_of_it(tmp_path: Path, journal: Journal) -> None:
    """Lines that are no facts, as after a power cut, are passed over."""
    with (tmp_path / f"{journal.run}.jsonl").open("ab") as file:
        file.write(b"\0\0\xff\xfe\n\n[1]\n17\n")
    assert names(read(tmp_path, journal.run).left()) == [["a"], ["b", "c"]]


def test_nothing_was_planned_to_do(tmp_path: Path) -> None:
    """A run whose plan is empty had one."""
    with Journal.begin(tmp_path, "upgrade", HEAD) as journal:
        journal.plan([])
        journal.ended(-1, failed("a"))
    account = read(tmp_path, journal.run)
    assert (account.left(), account.failed) == ([], ["a"])


# One process at a time


def test_a_run_that_is_under_way(tmp_path: Path, journal: Journal) -> None:
    """Nobody else goes on with it while its process has it; anybody may read."""
    program = (
        "import sys, pathlib; from shardrepo.fleet.journal import Journal, read; "
        "folder = pathlib.Path(sys.argv[1]); read(folder, 'last'); Journal.go_on(folder, 'last')"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    refusal = subprocess.run(command, capture_output=True, text=True, check=False)
    assert f"run {journal.run} is under way in another process" in refusal.stderr
    journal.close()
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0


def test_the_lock_goes_with_its_process(tmp_path: Path) -> None:
    """A run whose process was killed can be gone on with at once."""
    program = (
        "import os, sys, pathlib; from shardrepo.fleet.journal import Journal; "
        "journal = Journal.begin(pathlib.Path(sys.argv[1]), 'upgrade', {}); journal.plan([]); "
        "journal._is_empty = False; os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -9
    with Journal.go_on(tmp_path, "last"):
        assert read(tmp_path, "last").is_planned


# Names


def test_the_newest_is_the_last(tmp_path: Path) -> None:
    """By when they were begun, also within a second, whatever they did."""
    begun = []
    for work in ("upgrade", "stamp", "downgrade", "upgrade"):
        with Journal.begin(tmp_path, work, {"work": work}) as journal:
            journal.ended(-1, failed("a"))
        begun.append(journal.run)
    assert runs(tmp_path) == begun
    assert read(tmp_path, "last").head == {"work": "upgrade"}
    assert re.fullmatch(r"\d{8}-\d{6}-\d{6}-upgrade-[0-9a-f]{4}", begun[0])


def test_a_run_that_does_not_exist(tmp_path: Path) -> None:
    """The message names the last one, if there is one."""
    assert refused(lambda: read(tmp_path, "x")) == f"no run 'x' in {tmp_path}: there are none"
    assert "there are none" in refused(lambda: read(tmp_path / "nowhere", "last"))
    with Journal.begin(tmp_path, "upgrade", HEAD) as journal:
        journal.plan([Part([task("a")])])
    assert refused(lambda: Journal.go_on(tmp_path, "x")) == f"no run 'x' in {tmp_path}; the last one is {journal.run}"


def test_a_run_is_no_path(tmp_path: Path) -> None:
    """It is looked for in the folder only."""
    (tmp_path / "outside.jsonl").write_text('{"head":{}}\n')
    (tmp_path / "folder").mkdir()
    assert "no run '../outside'" in refused(lambda: read(tmp_path / "folder", "../outside"))


@pytest.mark.parametrize("content", ["", "\n", "no JSON\n", "[]\n", '{"begun":"a"}\n'])
def test_a_file_that_is_no_journal(tmp_path: Path, content: str) -> None:
    """It is not taken for one that has nothing left."""
    (tmp_path / "x.jsonl").write_text(content)
    assert "is no journal of a run" in refused(lambda: read(tmp_path, "x"))


@pytest.mark.parametrize(
    "line", ['{"other":1}', '{"task":{"name":"a"}}', '{"part":{"x":1}}\n{"planned":1}', '{"ended":"a"}']
)
def test_a_journal_of_another_version(tmp_path: Path, line: str) -> None:
    """A fact that is not understood may matter: it is not passed over."""
    (tmp_path / "x.jsonl").write_text(f'{{"head":{{}}}}\n{line}\n')
    assert "has a line that is not understood" in refused(lambda: read(tmp_path, "x"))


def test_a_run_that_found_nothing_to_do(tmp_path: Path) -> None:
    """It leaves no journal behind."""
    with Journal.begin(tmp_path / "made", "upgrade", HEAD) as journal:
        journal.plan([])
    with suppress(ValueError), Journal.begin(tmp_path / "made", "upgrade", HEAD):
        raise ValueError
    assert runs(tmp_path / "made") == []


# Where nothing can be written


def test_a_file_in_the_folder_s_place(tmp_path: Path) -> None:
    """The message names the folder, and what to do; there are no runs in it."""
    folder = tmp_path / "taken"
    folder.touch()
    for each in (folder, folder / "below"):
        message = refused(lambda: Journal.begin(each, "upgrade", HEAD))  # noqa: B023  # called at once
        assert message.startswith(f"no journal can be written to {each}: ")
        assert message.endswith("nothing was done. Name another folder")
        assert runs(each) == []


def test_a_folder_in_the_journal_s_place(tmp_path: Path) -> None:
    """One that can be neither read nor written is said to be so."""
    (tmp_path / "x.jsonl").mkdir()
    assert "cannot be read: Is a directory" in refused(lambda: read(tmp_path, "x"))
    assert "cannot be written: Is a directory" in refused(lambda: Journal.go_on(tmp_path, "x"))


def test_a_full_disk_at_the_beginning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done, no file is left open, and none behind."""
    monkeypatch.setattr(journals, "_locked", lambda path: path.touch() or full())
    assert "No space left on device; nothing was done" in refused(lambda: Journal.begin(tmp_path, "upgrade", HEAD))
    assert runs(tmp_path) == []


def test_a_full_disk_when_it_is_taken_up(tmp_path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run stays as it was."""
    journal.close()
    monkeypatch.setattr(journals, "_locked", lambda path: full())
    assert "cannot be written: No space left" in refused(lambda: Journal.go_on(tmp_path, journal.run))
    assert names(read(tmp_path, journal.run).left()) == [["a"], ["b", "c"]]


def test_a_full_disk_in_between(tmp_path: Path) -> None:
    """Who notes something is told; closing the journal then does not hide what became of the run."""
    with Journal(tmp_path / "x.jsonl", full()) as journal, pytest.raises(OSError, match="No space left"):
        journal.begun(0, task("a"))


def test_a_closed_journal(tmp_path: Path, journal: Journal) -> None:
    """Nothing can be noted any more, and closing it again does nothing."""
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="closed file"):
        journal.begun(0, task("a"))
