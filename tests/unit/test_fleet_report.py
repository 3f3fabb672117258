"""What is said of a run, and of where a fleet's schemas are, in few lines."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from typing import Any

import pytest

from shardrepo.across import Outcome
from shardrepo.errors import FleetError, ServerUnavailableError
from shardrepo.fleet.lines import line, some
from shardrepo.fleet.looking import Status
from shardrepo.fleet.outcomes import Failure, Migration
from shardrepo.fleet.plan import Task
from shardrepo.fleet.report import Causes, Report
from shardrepo.fleet.runner import Ending
from shardrepo.scripts import Standing

RUN = "20260101-120000-000000-upgrade-ab12"


def task(name: str, template: str | None = None) -> Task:
    return Task(name, f"db01:5432/{name}", "db01:5432", "head", template)


def reported(target: str = "head", work: str = "upgrade", run: str | None = RUN, **facts: Any) -> Report:
    return Report(work, target, run, **facts)


def end(report: Report, name: str, after: str = "two", seconds: float = 1.0, drift: tuple[str, ...] = ()) -> None:
    report.add(task(name), Outcome(name, None, seconds, Migration(("one",), (after,), 1, drift)))


def fail(report: Report, name: str, kind: str = "X", template: str | None = None) -> None:
    report.add(task(name, template), Outcome(name, None, 1.0, None, Failure("no", kind=kind)))


def next_lines(report: Report) -> dict[str, str]:
    """What is to be typed, by what it is for."""
    return {
        each.partition(":")[0]: each.partition(":")[2].strip()
        for each in report.lines()
        if each.startswith(("go on:", "retry:"))
    }


# Lines


def test_a_line() -> None:
    """One line, cut where it is too long."""
    assert (line("a\n\tb  c"), line("abcdef", 5), line("abcde", 5)) == ("a b c", "ab...", "abcde")


def test_some_names() -> None:
    """The first five, and how many more there are."""
    assert (some([]), some(["a"]), some(list("abcdef")), some(["a"], 3)) == (
        "",
        "a",
        "a, b, c, d, e and 1 more",
        "a and 2 more",
    )


# Causes


def test_failures_of_one_cause() -> None:
    """They are told once: how many, what the first one says, who stood in the way, and the first few databases."""
    causes = Causes()
    for number in range(7):
        causes.add(
            f"shard{number}",
            "db01:5432",
            Failure(f"no {number}", kind="locked", sqlstate="55P03", revision="2", blockers=["a", "b", "c"]),
        )
    assert (causes.count, list(causes.lines())) == (
        7,
        [
            "  7 x locked (55P03) in revision 2: no 0",
            "      shard0, shard1, shard2, shard3, shard4 and 2 more",
            "      blocked by a",
            "      blocked by b",
        ],
    )


def test_causes_are_told_apart() -> None:
    """By kind, code and revision, the most frequent first; by server only where the server is what failed."""
    causes = Causes()
    for server in ("db01:5432", "db02:5432"):
        causes.add(f"{server}a", server, Failure("same", kind="DuplicateTable", sqlstate="42P07"))
        causes.add(f"{server}b", server, ServerUnavailableError("down", database=None))
    assert [(cause.failure.kind, cause.count) for cause in causes] == [
        ("DuplicateTable", 2),
        ("ServerUnavailableError", 1),
        ("ServerUnavailableError", 1),
    ]
    assert json.loads(json.dumps(causes.as_list()))[0] == {
        "message": "same",
        "kind": "DuplicateTable",
        "sqlstate": "42P07",
        "count": 2,
        "databases": ["db01:5432a", "db02:5432a"],
    }


def test_other_causes_are_counted() -> None:
    """No failure is left out of the numbers."""
    causes = Causes()
    for number in range(12):
        causes.add("a", "db01:5432", Failure("no", kind=f"Kind{number}"))
        causes.add("b", "db01:5432", Failure("no", kind=f"Kind{number}"))
    assert list(causes.lines())[-1] == "  8 more, of 4 other causes"


# Counting


def test_what_is_counted() -> None:
    """Each database once, and nothing that is zero."""
    report = reported(unchanged=3, seconds=1.25)
    end(report, "a")
    end(report, "b", after="one")
    fail(report, "c")
    report.left = 2
    assert (report.changed, report.unchanged, report.failed) == (1, 4, 1)
    assert next(report.lines()) == "upgrade head: 1 changed, 4 unchanged, 1 failed, 2 not begun, in 1.2 s"


def test_rounds_are_of_one_database() -> None:
    """Changed in one round and not in another it has changed; failed in the last one it has failed."""
    report = reported()
    for after in ("two", "one", "two"):
        end(report, "a", after)
    for after in ("one", "one", "two"):
        end(report, "b", after)
    end(report, "c", "one")
    end(report, "d")
    fail(report, "d")
    end(report, "e", "one")
    fail(report, "e")
    assert (report.changed, report.unchanged, report.failed) == (2, 1, 2)


def test_nothing_to_do() -> None:
    """It says so."""
    assert list(reported().lines()) == ["upgrade head: nothing to do, in 0.0 s"]


def test_the_slowest() -> None:
    """The five that took longest, the longest first; not of a run that changed nothing."""
    report = reported()
    for number in range(9):
        end(report, f"s{number}", seconds=number)
    assert list(report.lines())[-1] == "slowest: s8 8.00 s, s7 7.00 s, s6 6.00 s, s5 5.00 s, s4 4.00 s"
    idle = reported()
    end(idle, "a", after="one")
    assert not any(each.startswith("slowest") for each in idle.lines())


def test_what_differs() -> None:
    """The first few databases of a check, each with the first differences."""
    report = reported("heads", "check")
    for number in range(7):
        end(report, f"a{number}", "one", drift=("op.a()", "op.b()", "op.c()", "op.d()"))
    lines = list(report.lines())
    assert lines[0] == "check heads: 7 drifted, in 0.0 s"
    assert lines[1] == "  a0 differs from the models: op.a(); op.b(); op.c()"
    assert (lines[-1], len(lines), report.exit_code) == ("  2 more differ", 7, 1)


# What it comes to


@pytest.mark.parametrize(
    ("ending", "failures", "left", "code", "said"),
    [
        ("complete", 0, 0, 0, None),
        ("complete", 1, 0, 1, None),
        ("budget", 2, 5, 3, "ended early: more failed than --max-failures or the stage allows"),
        ("interrupted", 0, 5, 130, "interrupted: what was under way has been finished"),
        ("interrupted", 2, 5, 130, "interrupted: what was under way has been finished"),
        ("journal", 0, 5, 1, "ended early: the journal cannot be written: no space left"),
        ("journal", 0, 0, 1, "ended early: the journal cannot be written: no space left"),
    ],
)
def test_exit_codes(ending: Ending, failures: int, left: int, code: int, said: str | None) -> None:
    """0 when all are where they were to go, 1 when some are not, 3 when too many, 130 when interrupted; and why."""
    report = reported(ending=ending, left=left, problem="no\nspace left" if ending == "journal" else None)
    for number in range(failures):
        fail(report, f"a{number}")
    lines = list(report.lines())
    assert (report.exit_code, report.as_dict()["exit_code"]) == (code, code)
    assert said is None or any(each.startswith(said) for each in lines)
    if code == 0:
        report.check()
    else:
        with pytest.raises(FleetError) as caught:
            report.check()
        assert (caught.value.report, str(caught.value)) == (report, "\n".join(lines))


def test_a_server_that_was_not_listed() -> None:
    """Its databases are nobody knows where: the run has not reached its goal."""
    report = reported(unlisted={"db09:5432": ServerUnavailableError("down\nfor now", database=None)})
    assert report.exit_code == 1
    assert list(report.lines()) == [
        "upgrade head: 1 servers not listed, in 0.0 s",
        "the databases of db09:5432 could not be listed, and are left out: down for now",
    ]


# What to do


def test_how_to_go_on() -> None:
    """What was not begun is gone on with, what failed is retried: as it is typed."""
    report = reported(left=2)
    assert next_lines(report) == {"go on": f"shardrepo upgrade head --resume {RUN}"}
    fail(report, "a")
    report.left = 0
    assert next_lines(report) == {"retry": f"shardrepo upgrade head --failed {RUN}"}


@pytest.mark.parametrize(
    ("work", "target", "command"),
    [
        ("downgrade", "-2", f"shardrepo downgrade --resume {RUN} -- -2"),
        ("upgrade", "+1", f"shardrepo upgrade +1 --resume {RUN}"),
        ("upgrade", "head-1", f"shardrepo upgrade head-1 --resume {RUN}"),
    ],
)
def test_a_relative_target_is_not_asked_for_again(work: str, target: str, command: str) -> None:
    """A database that failed half-way would go further than it was to: it is resumed, to where it was to go."""
    report = reported(target, work)
    fail(report, "a")
    assert next_lines(report) == {"go on": command}


def test_a_template_that_failed() -> None:
    """It cannot be named as a database, so that it is resumed."""
    report = reported()
    fail(report, "t@db01:5432", template="t")
    assert next_lines(report) == {"go on": f"shardrepo upgrade head --resume {RUN}"}


def test_a_target_that_a_shell_would_take_apart() -> None:
    """It is quoted."""
    report = reported("eu west@head", left=1)
    command = next_lines(report)["go on"]
    assert shlex.split(command) == ["shardrepo", "upgrade", "eu west@head", "--resume", RUN]


@pytest.mark.parametrize(("work", "run"), [("upgrade", None), ("check", RUN)])
def test_what_cannot_be_gone_on_with(work: str, run: str | None) -> None:
    """A run without a journal, and one that changes nothing, are begun anew."""
    report = reported("head", work, run, left=2)
    fail(report, "a")
    assert next_lines(report) == {}


# Never more than a screen or two


def worst(count: int) -> Causes:
    """Failures of many causes, in databases of many names, all of them as long as can be."""
    causes = Causes()
    for number in range(count):
        failure = Failure("why\n" * 1000, kind="K", revision=f"r{number}", blockers=["who\n" * 1000] * 9)
        for each in range(9):
            causes.add(f"{each}\n" + "n" * 500, f"db{number}:5432", failure)
    return causes


def unlisted(count: int) -> dict[str, Exception]:
    return {f"db{number}:5432": OSError("why\n" * 1000) for number in range(count)}


@pytest.mark.parametrize("ending", ["complete", "budget", "interrupted", "journal"])
@pytest.mark.parametrize("count", [1, 8, 9, 500])
def test_a_report_of_anything(ending: Ending, count: int) -> None:
    """At most 60 lines, none of them as long as a page, whatever has become of however many databases."""
    report = reported(
        causes=worst(count), unlisted=unlisted(count), ending=ending, left=9, problem="why\n" * 1000, seconds=1e9
    )
    for number in range(count):
        end(report, f"{number}\n" + "n" * 500, drift=("op.x(\n" * 1000,) * 9)
        end(report, f"{number}\n" + "m" * 500)
    text = "\n".join(report.lines())
    assert len(text.splitlines()) <= 60
    assert max(len(each) for each in text.splitlines()) <= 1200


@pytest.mark.parametrize("count", [1, 12, 13, 500])
def test_a_status_of_anything(count: int) -> None:
    """At most 60 lines, too."""
    standings: list[Standing] = ["at", "behind", "ahead", "unknown"]
    names = [f"{number}\n" + "n" * 500 for number in range(count)]
    status = Status(
        ("r" * 32,) * 50,
        Counter({("r" * 32, str(number)) * 50: number for number in range(count)}),
        dict.fromkeys(standings, names),
        worst(count),
        unlisted(count),
    )
    text = "\n".join(status.lines())
    assert len(text.splitlines()) <= 60
    assert max(len(each) for each in text.splitlines()) <= 1200


# JSON


def test_a_report_for_machines() -> None:
    """All of it, as JSON has it."""
    report = reported(
        unlisted={"db09:5432": ValueError("no")}, standings=Counter(at=1), ending="journal", problem="full"
    )
    end(report, "a", drift=("op.x()",))
    fail(report, "b", "locked")
    facts = json.loads(json.dumps(report.as_dict()))
    assert facts == {
        "work": "upgrade",
        "target": "head",
        "run": RUN,
        "standings": {"at": 1},
        "changed": 0,
        "unchanged": 0,
        "drifted": {"a": ["op.x()"]},
        "failed": [{"message": "no", "kind": "locked", "count": 1, "databases": ["b"]}],
        "unlisted": {"db09:5432": "no"},
        "left": 0,
        "ending": "journal",
        "problem": "full",
        "seconds": 0.0,
        "exit_code": 1,
    }


# Status


def test_a_status() -> None:
    """How many are at which revisions, the most frequent first, and who is not at the target."""
    status = Status(("two",), Counter({("two",): 3, ("one",): 1, (): 2}))
    status.standings["at"] += ["a", "b", "c"]
    status.standings["behind"] += ["f", "d", "e"]
    status.causes.add("g", "db01:5432", Failure("no", kind="X"))
    assert list(status.lines()) == [
        "7 databases, 3 at, 3 behind, 1 unreachable; two is meant",
        "       3  two",
        "       2  base",
        "       1  one",
        "behind: d, e, f",
        "unreachable:",
        "  1 x X: no",
        "      g",
    ]
    facts = json.loads(json.dumps(status.as_dict()))
    assert facts["revisions"] == {"two": 3, "one": 1, "base": 2}
    assert (facts["behind"], facts["unknown"], facts["unlisted"]) == (["d", "e", "f"], [], {})
    assert facts["unreachable"] == [{"message": "no", "kind": "X", "count": 1, "databases": ["g"]}]


def test_a_fleet_is_level() -> None:
    """Only if every database is known to be at the target."""
    assert Status(("two",)).is_level
    assert list(Status(()).lines()) == ["0 databases, none of them asked; base is meant"]
    others: list[Standing] = ["behind", "ahead", "unknown"]
    for standing in others:
        status = Status(("two",))
        status.standings[standing].append("a")
        assert not status.is_level
    unreached = Status(("two",))
    unreached.causes.add("a", "db01:5432", Failure("no", kind="X"))
    assert not unreached.is_level
    assert not Status(("two",), unlisted={"db01:5432": OSError()}).is_level
