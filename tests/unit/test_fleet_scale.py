"""Planning, journal and report of thousands of databases: what they hold grows with the databases, and slowly."""

from __future__ import annotations

import gc
import tracemalloc
from concurrent.futures import Future
from pathlib import Path

from shardrepo.across import Outcome
from shardrepo.fleet.journal import Account, Journal, read
from shardrepo.fleet.outcomes import Failure, Migration
from shardrepo.fleet.plan import Judge, Part, Stage, Task, canary, staged
from shardrepo.fleet.report import Report
from shardrepo.fleet.runner import Control, Runner
from shardrepo.fleet.worker import Manner
from shardrepo.scripts import Scripts, Source
from tests.migrations import write_line

FEW, MANY = 2_000, 10_000

# Bytes of a database, of its task and outcome on both sides of the journal: 1,350 measured.
PER_DATABASE = 2_500


class Crew:
    """A crew that is done with every task at once: every second one fails, for one of ten causes."""

    width = 8

    def submit(self, manner: Manner, task: Task) -> Future[Outcome[Migration]]:
        future: Future[Outcome[Migration]] = Future()
        number = int(task.name[2:])
        failure = Failure(f"why {number}\n" * 9, kind=f"Kind{number % 20}", blockers=[f"who {number}"] * 3)
        fails = number % 2 and number > 500
        value = None if fails else Migration((), ("two",))
        future.set_result(Outcome(task.name, task.home, number / 1000, value, failure if fails else None))
        return future

    def free(self, future: Future[Outcome[Migration]]) -> None: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


def planned(count: int, scripts: Scripts) -> list[Part]:
    """Databases on three servers, in four stages."""
    judge = Judge(scripts, "upgrade", "head")
    tasks = []
    for number in range(count):
        server = f"db{number % 3}:5432"
        name = f"db{number:05}"
        tasks.append(Task(name, f"{server}/{name}", server, judge.judge(()).target or ""))
    return staged(tasks, [canary(3), Stage.of("1%"), Stage.of({"size": "50%", "max_failures": "60%"})])


def run(count: int, folder: Path, scripts: Scripts) -> tuple[Report, Account]:
    """A run over so many databases, and what its journal tells of it."""
    parts = planned(count, scripts)
    with Journal.begin(folder, "upgrade", {}) as journal:
        journal.plan(parts)
        report = Report("upgrade", "head", journal.run)
        runner = Runner(
            Crew(),
            Manner("app:MyRepo", scripts.source, "upgrade"),
            per_server=4,
            allowed=None,
            control=Control(),
            journal=journal,
            observe=lambda _: None,
            settled=report.add,
        )
        runner.run(parts)
        report.ending, report.left = runner.ending, runner.left
    return report, read(folder, journal.run)


def measured(count: int, folder: Path, scripts: Scripts) -> int:
    """The most that was held at a time in such a run."""
    gc.collect()
    tracemalloc.start()
    try:
        report, account = run(count, folder, scripts)
        assert report.changed + report.failed == len(account.outcomes) == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_ten_thousand_databases(tmp_path: Path) -> None:
    """Thousands of failures are told in at most 60 lines, and the journal has every one of them."""
    report, account = run(MANY, tmp_path, Scripts(Source(write_line(tmp_path / "scripts", "one", "two"))))
    failures = len(range(501, MANY, 2))
    assert (report.changed, report.causes.count, report.left, report.exit_code) == (MANY - failures, failures, 0, 1)
    lines = "\n".join(report.lines()).splitlines()
    assert len(lines) <= 60
    assert "  950 more, of 2 other causes" in lines
    assert (len(account.failed), sum(len(part.tasks) for part in account.left())) == (failures, failures)
    assert sum(len(part.tasks) for part in account.parts) == MANY


def test_what_a_database_takes(tmp_path: Path) -> None:
    """Each further one takes as much as its task and its outcome: nothing is held twice, or for each pair."""
    scripts = Scripts(Source(write_line(tmp_path / "scripts", "one", "two")))
    measured(100, tmp_path, scripts)
    few, many = (measured(count, tmp_path, scripts) for count in (FEW, MANY))
    assert many - few < PER_DATABASE * (MANY - FEW)
