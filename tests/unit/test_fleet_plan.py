"""What is to be done in a fleet in which order: decided without a server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardrepo.errors import ConfigError
from shardrepo.fleet.plan import Judge, Queue, Share, Stage, Task, Work, by_turns, canary, in_rounds, staged
from shardrepo.scripts import Revisions, Scripts, Source
from tests.migrations import write_line, write_script


def task(name: str, server: str = "db01:5432", target: str = "head", *tags: str) -> Task:
    return Task(name, f"{server}/{name}", server, target, tags=frozenset(tags))


def names(tasks: Any) -> list[str]:
    return [each.name for each in tasks]


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    return str(caught.value)


# Shares


@pytest.mark.parametrize(
    ("given", "total", "expected"),
    [
        ("5", 100, 5),
        (5, 3, 5),
        (" 2% ", 100, 2),
        ("2%", 49, 0),
        ("100%", 7, 7),
        ("0", 9, 0),
        ("0%", 9, 0),
        ("0.57%", 10_000, 57),
        ("2.5%", 40, 1),
    ],
)
def test_a_share(given: object, total: int, expected: int) -> None:
    """A number of databases, or a part of them, which is rounded down."""
    assert Share.of("max_failures", given).out_of(total) == expected


@pytest.mark.parametrize("given", ["", "%", "-1", "-1%", "101%", "1.5", "nan", "inf", "inf%", "half", None, True, [1]])
def test_what_is_no_share(given: object) -> None:
    """The message says what it is for, and what was given."""
    message = refused(lambda: Share.of("max_failures", given))
    assert message.startswith("max_failures must be a number of databases, like 5")
    assert repr(given) in message


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_percentage_is_exact(hundredths: int, total: int) -> None:
    """No database is lost to binary fractions."""
    share = Share.of("size", f"{hundredths / 100}%")
    assert share.out_of(total) == Fraction(hundredths, 10_000) * total // 1


def test_a_share_in_words() -> None:
    """As it was given."""
    assert [str(Share.of("size", given)) for given in ("5", "2%", "2.5%")] == ["5", "2%", "2.5%"]


# Stages


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (1, Stage(Share(1))),
        ("10%", Stage(Share(10, is_percent=True))),
        ("rest", Stage()),
        ({}, Stage()),
        ({"size": "rest", "max_failures": 0}, Stage(None, Share(0))),
        ({"match": "a*", "tag": "eu", "pause": 2}, Stage(match="a*", tag="eu", pause=2.0)),
    ],
)
def test_a_stage(given: object, expected: Stage) -> None:
    """A size, or a table as it stands in pyproject.toml."""
    assert Stage.of(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sise": 1}, "unknown attribute of a stage 'sise'; did you mean 'size'?"),
        ({1: 2}, "unknown attribute of a stage '1'"),
        ("many", "the size of a stage must be a number of databases"),
        (0, "a stage of 0 has no database"),
        ("0%", "a stage of '0%' has no database"),
        ({"pause": -1}, "a stage's pause is a number of seconds, not -1"),
        ({"pause": True}, "a stage's pause is a number of seconds, not True"),
        ({"pause": float("inf")}, "a stage's pause is a number of seconds, not inf"),
        ({"pause": float("nan")}, "a stage's pause is a number of seconds, not nan"),
        ({"match": 5}, "a stage's match is a text, not 5"),
        ({"tag": ["eu"]}, "a stage's tag is a text, not ['eu']"),
        ({"tag": ""}, "a stage's tag is a text, not ''"),
        ({"max_failures": "none"}, "max_failures must be a number"),
    ],
)
def test_what_is_no_stage(given: object, message: str) -> None:
    """The message says which attribute is wrong, before anything is done."""
    assert message in refused(lambda: Stage.of(given))


def test_a_canary() -> None:
    """None of it may fail."""
    assert canary("2%") == Stage(Share(2, is_percent=True), Share(0))
    assert "has no database" in refused(lambda: canary(0))


# Dealing out


def test_all_at_once() -> None:
    """Without stages there is one part, and any number of it may fail."""
    (part,) = staged([task("a"), task("b")], [])
    assert (names(part.tasks), part.max_failures, part.title) == (["a", "b"], None, "stage 1")


def test_nothing_to_do() -> None:
    """No tasks are no parts, whatever the stages."""
    assert staged([], [canary(1), Stage()]) == []


def test_stages_in_order() -> None:
    """A canary, a part by pattern, a part by tag, then the rest; a stage that nothing is left for is no part."""
    tasks = [task("a1"), task("a2"), task("b1", "db01:5432", "head", "eu"), task("c1"), task("c2")]
    stages = [canary(1), Stage(match="a*"), Stage(match="x*"), Stage(tag="eu", pause=3.0)]
    parts = staged(tasks, stages)
    assert [(part.title, names(part.tasks), part.max_failures, part.pause) for part in parts] == [
        ("stage 1", ["a1"], 0, 0.0),
        ("stage 2", ["a2"], None, 0.0),
        ("stage 4", ["b1"], None, 3.0),
        ("stage 5", ["c1", "c2"], None, 0.0),
    ]


def test_a_percentage_is_of_all() -> None:
    """Not of what earlier stages have left; at least one."""
    tasks = [task(f"t{number:02d}") for number in range(20)]
    parts = staged(tasks, [Stage.of("1%"), Stage.of("50%"), Stage.of("50%")])
    assert [len(part.tasks) for part in parts] == [1, 10, 9]


def test_failures_of_a_stage_are_of_its_size() -> None:
    """A percentage that may fail is one of the stage's databases."""
    tasks = [task(f"t{number}") for number in range(20)]
    parts = staged(tasks, [Stage.of({"size": 10, "max_failures": "10%"})])
    assert [part.max_failures for part in parts] == [1, None]


def test_servers_take_turns() -> None:
    """One of each server after the other, each server's in their order."""
    tasks = [task("a1", "a:1"), task("a2", "a:1"), task("a3", "a:1"), task("b1", "b:1"), task("c1", "c:1")]
    assert names(by_turns(tasks)) == ["a1", "b1", "c1", "a2", "a3"]


a_stage = st.builds(
    Stage,
    size=st.none()
    | st.builds(Share, st.integers(1, 9))
    | st.builds(Share, st.integers(0, 100), is_percent=st.just(True)),
    max_failures=st.none() | st.builds(Share, st.integers(0, 3)),
    match=st.none() | st.sampled_from(["t1*", "*5", "nothing"]),
    tag=st.none() | st.sampled_from(["eu", "us"]),
)
servers = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["eu", "us", "-"])), max_size=30)


@given(servers, st.lists(a_stage, max_size=4))
def test_dealing_out_loses_and_doubles_none(where: list[tuple[str, str]], stages: list[Stage]) -> None:
    """Whatever the stages: every task is in one part, and each server's turn comes in each."""
    tasks = [task(f"t{number}", server, "head", tag) for number, (server, tag) in enumerate(where)]
    parts = staged(tasks, stages)
    dealt = [each for part in parts for each in part.tasks]
    assert Counter(dealt) == Counter(tasks)
    assert all(part.tasks and part.tasks == by_turns(part.tasks) for part in parts)
    assert [part.title for part in parts] == sorted({part.title for part in parts})


# Turns


def test_the_queue_passes_a_full_server_over() -> None:
    """The first in order whose server has a place; a place that is given back is the first one's."""
    queue = Queue([task("a1", "a:1"), task("a2", "a:1"), task("b1", "b:1"), task("a3", "a:1")], 1)
    first, second = queue.take(), queue.take()
    assert first is not None
    assert second is not None
    assert (names([first, second]), queue.take()) == (["a1", "b1"], None)
    queue.leave(second)
    assert queue.take() is None
    queue.leave(first)
    assert [each.name for each in (queue.take(), queue.take()) if each] == ["a2"]
    assert queue


@given(servers, st.integers(1, 3))
def test_the_queue_gives_each_once(where: list[tuple[str, str]], per_server: int) -> None:
    """In their order if places are given back at once, and never more than so many of a server at a time."""
    tasks = [task(f"t{number}", server) for number, (server, _) in enumerate(where)]
    queue = Queue(tasks, per_server)
    together = []
    while (each := queue.take()) is not None:
        together.append(each)
    assert Counter(each.server for each in together) == {
        server: min(per_server, count) for server, count in Counter(each.server for each in tasks).items()
    }
    again = Queue(tasks, per_server)
    order = []
    while (each := again.take()) is not None:
        order.append(each)
        again.leave(each)
    assert (order, bool(again)) == (tasks, False)


# Judging


@pytest.fixture
def line(tmp_path: Path) -> Scripts:
    """Four revisions, one after the other."""
    return Scripts(Source(write_line(tmp_path / "line", "one", "two", "three", "four")))


@pytest.fixture
def branched(tmp_path: Path) -> Scripts:
    """A base, and two branches after it."""
    folder = tmp_path / "branched"
    write_script(folder, "base1")
    write_script(folder, "x", "base1")
    write_script(folder, "y", "base1")
    return Scripts(Source(str(folder)))


@pytest.mark.parametrize(
    ("move", "target", "found", "expected"),
    [
        ("upgrade", "head", (), ("behind", "four")),
        ("upgrade", "head", ("four",), ("at", None)),
        ("upgrade", "two", ("three",), ("ahead", None)),
        ("upgrade", "+1", ("one",), ("behind", "two")),
        ("upgrade", "+2", (), ("behind", "two")),
        ("downgrade", "two", ("four",), ("ahead", "two")),
        ("downgrade", "two", ("one",), ("behind", None)),
        ("downgrade", "base", ("one",), ("ahead", "base")),
        ("downgrade", "-1", ("three",), ("behind", "two")),
        ("downgrade", "-1", ("one",), ("behind", "base")),
        ("stamp", "two", ("four",), ("ahead", "two")),
        ("stamp", "two", (), ("behind", "two")),
        ("stamp", "two", ("two",), ("at", None)),
        ("check", "heads", ("four",), ("at", "heads")),
    ],
)
def test_what_is_to_be_done(
    line: Scripts, move: Work, target: str, found: Revisions, expected: tuple[str, str | None]
) -> None:
    """By how a database stands to the target; one that is relative is given as the revision that it comes to there."""
    verdict = Judge(line, move, target).judge(found)
    assert (verdict.standing, verdict.target, verdict.problem) == (*expected, None)


@pytest.mark.parametrize(
    ("move", "target", "found", "problem"),
    [
        ("upgrade", "head", ("gone",), "it is at revision gone, of which these migrations have no script"),
        ("stamp", "head", ("gone",), "it is at revision gone"),
        ("check", "heads", ("three",), "it is not at head"),
        ("upgrade", "+1", ("four",), "leads nowhere from four"),
        ("downgrade", "-2", ("one",), "leads nowhere from one"),
    ],
)
def test_what_cannot_be_done(line: Scripts, move: Work, target: str, found: Revisions, problem: str) -> None:
    """The verdict says why, and has no target."""
    verdict = Judge(line, move, target).judge(found)
    assert verdict.target is None
    assert verdict.problem is not None
    assert problem in verdict.problem


def test_a_stamp_that_purges(line: Scripts) -> None:
    """It does not matter where a database is."""
    assert Judge(line, "stamp", "two", purges=True).judge(("gone",)).target == "two"


def test_a_target_is_named_by_its_revisions(branched: Scripts) -> None:
    """What is a head here is none by that name elsewhere; on the way back it is given as it was asked for."""
    assert Judge(branched, "upgrade", "heads").judge(()).target == "x y"
    assert Judge(branched, "stamp", "heads").judge(("base1",)).target == "x y"
    assert Judge(branched, "downgrade", "base").judge(("x",)).target == "base"
    steps = branched.steps("upgrade", "x y", ("x",))
    assert [step.revision.revision for step in steps] == ["y"]


def test_only_a_stamp_purges(line: Scripts) -> None:
    """An upgrade that is told to is not taken for done in a database that nobody knows the revision of."""
    assert Judge(line, "upgrade", "head", purges=True).judge(("gone",)).problem is not None


def test_no_way_back_to_another_branch(branched: Scripts) -> None:
    """A database that is on one branch is no success of a downgrade to the other."""
    judge = Judge(branched, "downgrade", "y")
    problem = judge.judge(("x",)).problem
    assert problem == "it is at x, from where no way back leads to y"
    assert judge.judge(("base1",)).problem is None


def test_a_target_that_does_not_exist(line: Scripts) -> None:
    """It is refused before any database is asked."""
    assert "names no revision" in refused(lambda: Judge(line, "upgrade", "five"))


def test_the_graph_is_asked_once_for_each_place(line: Scripts) -> None:
    """Databases at the same revisions share a verdict."""
    judge = Judge(line, "upgrade", "head")
    assert judge.judge(("one",)) is judge.judge(("one",))


# Rounds


def test_a_round_for_each_revision(line: Scripts) -> None:
    """Each round has those that lack its revision, and takes them no further."""
    found: list[tuple[Task, Revisions]] = [(task("a"), ()), (task("b"), ("two",)), (task("c"), ("three",))]
    rounds = in_rounds(line, found)
    assert [(revision, names(tasks)) for revision, tasks in rounds] == [
        ("one", ["a"]),
        ("two", ["a"]),
        ("three", ["a", "b"]),
        ("four", ["a", "b", "c"]),
    ]
    assert all(each.target == revision for revision, tasks in rounds for each in tasks)


def test_rounds_of_relative_targets(line: Scripts) -> None:
    """Each database goes as far as its own target."""
    found: list[tuple[Task, Revisions]] = [(task("a", target="one"), ()), (task("b", target="three"), ("two",))]
    assert [(revision, names(tasks)) for revision, tasks in in_rounds(line, found)] == [
        ("one", ["a"]),
        ("three", ["b"]),
    ]


def test_rounds_of_branches(branched: Scripts) -> None:
    """A revision comes after what it stands on, on all branches that are meant."""
    found: list[tuple[Task, Revisions]] = [(task("a", target="heads"), ()), (task("b", target="heads"), ("x",))]
    rounds = dict(in_rounds(branched, found))
    assert next(iter(rounds)) == "base1"
    assert {revision: names(tasks) for revision, tasks in rounds.items()} == {
        "base1": ["a"],
        "x": ["a"],
        "y": ["a", "b"],
    }


def test_a_task_on_paper() -> None:
    """All that is known, and no tags, which have been used by then."""
    written = Task("t@db01:5432", "home", "db01:5432", "head", "t", "shard01", frozenset({"eu"})).as_dict()
    assert written == {
        "name": "t@db01:5432",
        "home": "home",
        "server": "db01:5432",
        "target": "head",
        "template": "t",
        "near": "shard01",
    }
    assert "template" not in task("a").as_dict()
