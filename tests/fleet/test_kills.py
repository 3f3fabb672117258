"""Runs that are killed, interrupted, doubled: nothing is done twice, and what is taken up again ends well."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from shardrepo import FleetError, fleet
from shardrepo.fleet import Rollout
from shardrepo.fleet.journal import read

from ..conftest import await_
from .conftest import USERS, Project
from .workers import has_ended, workers

NOTES = 'op.create_table("noted", sa.Column("revision", sa.Text()), sa.Column("database", sa.Text()))'
NOTED = """op.execute("INSERT INTO noted (revision, database) VALUES ('0002', current_database())")"""

# Waits for whoever holds the gate, between two statements that are seen if they are committed.
GATED = f'{NOTED}\nop.execute("SELECT count(*) FROM gate")\nop.add_column("users", sa.Column("age", sa.Integer()))'


@pytest.fixture
def gated(make_project: Callable[..., Project]) -> Project:
    """Six databases at 0001, whose next revision waits for their gates."""
    project = make_project(6)
    project.revise("0001", None, f'{USERS}\n{NOTES}\nop.create_table("gate", sa.Column("id", sa.Integer()))')
    fleet.upgrade(project.repo, source=project.source)
    project.revise("0002", "0001", GATED)
    return project


@contextmanager
def closed(project: Project, name: str) -> Iterator[Callable[[], bool]]:
    """Close a database's gate for the block; yields whether a migration waits there."""
    with project.where[name].connect(name, autocommit=False) as holder, project.where[name].connect() as seer:
        holder.execute("LOCK TABLE gate")

        def is_waiting() -> bool:
            query = "SELECT 1 FROM pg_stat_activity WHERE datname = %s AND wait_event_type = 'Lock'"
            return seer.execute(query, (name,)).fetchone() is not None

        yield is_waiting


def sessions(project: Project, name: str) -> int:
    """How many sessions a database has that are not the tests' own."""
    with project.where[name].connect() as connection:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = %s AND application_name <> 'shardrepo-servers'"
        row = connection.execute(query, (name,)).fetchone()
    assert row is not None
    return int(row[0])


def check_done(project: Project) -> None:
    """Every database is at 0002, which was run once in each, whole."""
    assert project.revisions() == project.all_at("0002")
    for name in project.names:
        assert project.sql(name, "SELECT * FROM noted") == [("0002", name)]
        assert project.sql(name, "SELECT count(age) FROM users") == [(0,)]


class Command:
    """`shardrepo upgrade` in a process group of its own, as a terminal has it."""

    def __init__(self, project: Project, *arguments: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shardrepo", "upgrade", *arguments],
            cwd=project.root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self._process.pid

    def interrupt(self) -> None:
        """Press Ctrl-C: everybody in the group gets it; returns when the command says that it has understood."""
        os.killpg(self.pid, signal.SIGINT)
        assert self._process.stderr is not None
        line = self._process.stderr.readline()
        assert line.startswith("shardrepo: "), line

    def kill(self) -> None:
        """Kill it, and it alone: its workers have its output open until they end."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdout, self._process.stderr):
            assert stream is not None
            stream.close()

    def wait(self) -> tuple[int, str]:
        """Its exit code and its standard output."""
        out, err = self._process.communicate(timeout=60)
        assert "Traceback" not in err, err
        return self._process.returncode, out


@contextmanager
def upgrading(project: Project, how: Rollout) -> Iterator[list[Any]]:
    """Run an upgrade in a thread of this process for the block; yields where its report will be."""
    ended: list[Any] = []

    def run() -> None:
        try:
            ended.append(fleet.upgrade(project.repo, how=how, source=project.source))
        except FleetError as error:
            ended.append(error.report)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ended
    finally:
        thread.join()


def test_a_worker_that_is_killed_once(gated: Project) -> None:
    """What it had begun is rolled back and done by another one; what the others are doing goes on."""
    one, other = gated.names[:2]
    with (
        upgrading(gated, Rollout(jobs=2, lock_timeout=30)) as ended,
        closed(gated, one) as one_waits,
        closed(gated, other) as other_waits,
    ):
        await_(lambda: one_waits() and other_waits())
        before = workers()
        assert len(before) == 2
        before[0].kill()
        await_(lambda: len(set(workers()) - set(before)) == 1 and one_waits() and other_waits())
        assert before[1].is_running()
    (report,) = ended
    assert (report.changed, report.exit_code) == (6, 0)
    check_done(gated)


def test_a_database_whose_worker_dies_every_time(gated: Project, tmp_path: Any) -> None:
    """It is given up as lost after the second time, the others are done, and a later run finishes it."""
    name = gated.names[0]
    with upgrading(gated, Rollout(jobs=1, lock_timeout=30, journal=tmp_path)) as ended, closed(gated, name) as waits:
        for _ in range(2):
            await_(waits)
            (worker,) = workers()
            worker.kill()
            await_(lambda: worker not in workers())  # noqa: B023
            await_(lambda: sessions(gated, name) == 0 or workers() != [])
    (report,) = ended
    (cause,) = report.causes
    assert (report.changed, cause.failure.kind, cause.names) == (5, "lost", [name])
    assert read(tmp_path, "last").failed == [name]
    assert fleet.upgrade(gated.repo, source=gated.source).changed == 1
    check_done(gated)


def test_a_runner_that_is_killed(gated: Project) -> None:
    """Its workers end by themselves between two statements; `--resume` does the rest, and nothing twice."""
    gated.configure(jobs=2, lock_timeout=30)
    name = gated.names[3]
    with closed(gated, name) as waits:
        command = Command(gated)
        await_(waits)
        orphans = workers(command.pid)
        command.kill()
        assert orphans
    await_(lambda: all(map(has_ended, orphans)))
    await_(lambda: sessions(gated, name) == 0)
    assert gated.revision(name) == ["0001"]
    done = gated.run("upgrade", "--resume", "last")
    assert (done.returncode, done.stderr) == (0, "")
    check_done(gated)
    again = gated.run("upgrade", "--resume", "last")
    assert (again.returncode, again.stderr) == (0, "")


def test_two_runners_at_once(gated: Project) -> None:
    """Two processes migrate the same fleet at the same time: both end well, and each database is migrated once."""
    gated.configure(jobs=3)
    with ThreadPoolExecutor(2) as threads:
        runs = list(threads.map(lambda _: gated.run("upgrade"), range(2)))
    assert [(run.returncode, run.stderr) for run in runs] == [(0, "")] * 2
    check_done(gated)


def test_ctrl_c_once(gated: Project) -> None:
    """What is under way is finished, nothing more is begun, and `--resume` goes on where it was."""
    gated.configure(jobs=1, lock_timeout=30)
    first = min(gated.names)
    with closed(gated, first) as waits:
        command = Command(gated)
        await_(waits)
        command.interrupt()
    code, out = command.wait()
    assert code == 130
    assert "interrupted" in out
    assert gated.revisions() == {**gated.all_at("0001"), first: ["0002"]}
    (run,) = fleet.runs(gated.root / ".shardrepo")
    assert f"go on:  shardrepo upgrade head --resume {run}" in out
    assert gated.run("upgrade", "--resume", run).returncode == 0
    check_done(gated)


def test_ctrl_c_twice(gated: Project) -> None:
    """What is under way ends before its next statement and is rolled back."""
    gated.configure(jobs=1, lock_timeout=30)
    first = min(gated.names)
    with closed(gated, first) as waits:
        command = Command(gated)
        await_(waits)
        command.interrupt()
        command.interrupt()
    code, _ = command.wait()
    assert code == 130
    assert gated.revisions() == gated.all_at("0001")
    assert gated.sql(first, "SELECT * FROM noted") == []
    assert gated.run("upgrade", "--resume", "last").returncode == 0
    check_done(gated)


def test_ctrl_c_in_a_program_of_its_own(gated: Project) -> None:
    """What is under way ends before its next statement, nothing is left running, and the program has its exception."""
    first = min(gated.names)

    def observe(_: fleet.Progress) -> None:
        if waits():
            raise KeyboardInterrupt

    def run() -> None:
        with pytest.raises(KeyboardInterrupt):
            fleet.upgrade(gated.repo, how=Rollout(jobs=1, lock_timeout=30), source=gated.source, observe=observe)

    def is_closing() -> bool:
        stack = traceback.walk_stack(sys._current_frames()[thread.ident or 0])
        return any(frame.f_code.co_qualname == "Processes.close" for frame, _ in stack)

    with closed(gated, first) as waits:
        thread = threading.Thread(target=run)
        thread.start()
        await_(is_closing)
    thread.join()
    assert gated.revisions() == gated.all_at("0001")
    assert workers() == []


def test_a_run_is_not_taken_up_while_it_goes_on(gated: Project) -> None:
    """Its journal is its own until it ends."""
    gated.configure(jobs=1, lock_timeout=30)
    with closed(gated, min(gated.names)) as waits:
        command = Command(gated)
        await_(waits)
        refused = gated.run("upgrade", "--resume", "last")
        assert refused.returncode == 2
        assert "under way in another process" in refused.stderr
    assert command.wait()[0] == 0
    check_done(gated)


def test_a_relative_run_is_not_reckoned_again(gated: Project) -> None:
    """What `+1` meant at first is what it means when the run is taken up, in what was done and in what was not."""
    gated.configure(jobs=1, lock_timeout=30)
    gated.revise("0003", "0002", "pass")
    first = min(gated.names)
    with closed(gated, first) as waits:
        command = Command(gated, "+1")
        await_(waits)
        command.kill()
    await_(lambda: sessions(gated, first) == 0)
    assert gated.run("upgrade", "--resume", "last").returncode == 0
    check_done(gated)


def test_a_journal_that_cannot_be_written_any_more(gated: Project, tmp_path: Path) -> None:
    """Nothing is begun that is not in it; what was under way is finished, and in the report."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def observe(progress: fleet.Progress) -> None:
        if progress.outcome is not None:
            (journal,) = tmp_path.iterdir()
            resource.setrlimit(resource.RLIMIT_FSIZE, (journal.stat().st_size + 20, limits[1]))

    try:
        with pytest.raises(FleetError) as caught:
            how = Rollout(jobs=1, journal=tmp_path)
            fleet.upgrade(gated.repo, how=how, source=gated.source, observe=observe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    report: fleet.Report = caught.value.report
    assert (report.changed, report.left, report.ending, report.exit_code) == (1, 5, "journal", 1)
    assert "the journal cannot be written: [Errno 27] File too large" in "\n".join(report.lines())
    assert sorted(gated.revisions().values()) == [["0001"]] * 5 + [["0002"]]
