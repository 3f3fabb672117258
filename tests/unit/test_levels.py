"""Transactions that are savepoints: whatever order they end in, what is sent makes sense to a server."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shardrepo.levels import Level, Levels


class Server:
    """The savepoints of a real server, of which it says when there is no such one; and what is written in each."""

    def __init__(self) -> None:
        self.savepoints: list[tuple[str, list[int]]] = []
        self.written: list[int] = []

    def run(self, sql: str) -> None:
        for statement in filter(None, sql.split("; ")):
            *verb, name = statement.split()
            if verb == ["SAVEPOINT"]:
                self.savepoints.append((name, list(self.written)))
                continue
            place = [known for known, _ in self.savepoints].index(name)
            if verb == ["RELEASE"]:
                del self.savepoints[place:]
            else:
                assert verb == ["ROLLBACK", "TO"]
                del self.savepoints[place + 1 :]
                self.written = list(self.savepoints[place][1])


def begin(levels: Levels, server: Server, unit: Level | None = None) -> Level:
    level, sql = levels.begin(unit)
    server.run(sql)
    return level


def write(levels: Levels, level: Level, server: Server, what: int) -> None:
    levels.write(level)
    server.written.append(what)


def test_a_stack_of_transactions() -> None:
    """Those that end in the order of a stack leave what they would leave in a database."""
    levels, server = Levels(), Server()
    outer = begin(levels, server)
    write(levels, outer, server, 1)
    inner = begin(levels, server)
    write(levels, inner, server, 2)
    server.run(levels.undo(inner, failed=False))
    server.run(levels.keep(outer))
    assert (server.written, server.savepoints, len(levels), levels.has_undone) == ([1], [], 0, False)


def test_one_that_is_kept_before_a_newer_one() -> None:
    """It is released with that, and what both have written stays."""
    levels, server = Levels(), Server()
    older, newer = begin(levels, server), begin(levels, server)
    write(levels, older, server, 1)
    write(levels, newer, server, 2)
    assert levels.keep(older) == ""
    server.run(levels.keep(newer))
    assert (server.written, server.savepoints, levels.has_undone) == ([1, 2], [], False)


def test_what_another_has_kept_is_undone() -> None:
    """That is noted: a database would have kept it."""
    levels, server = Levels(), Server()
    outer = begin(levels, server)
    write(levels, outer, server, 1)
    inner = begin(levels, server)
    write(levels, inner, server, 2)
    server.run(levels.keep(inner))
    assert not levels.has_undone
    server.run(levels.undo(outer, failed=False))
    assert (server.written, levels.has_undone) == ([], True)


def test_one_that_wrote_nothing_takes_nothing_along() -> None:
    """Rolled back, it leaves what others have written in it."""
    levels, server = Levels(), Server()
    reading = begin(levels, server)
    writing = begin(levels, server)
    write(levels, writing, server, 1)
    server.run(levels.keep(writing))
    server.run(levels.undo(reading, failed=False))
    assert (server.written, server.savepoints, levels.has_undone) == ([1], [], False)


def test_one_that_failed_has_to_be_undone() -> None:
    """The server would release no savepoint then."""
    levels, server = Levels(), Server()
    reading = begin(levels, server)
    writing = begin(levels, server)
    write(levels, writing, server, 1)
    server.run(levels.keep(writing))
    assert levels.undo(reading, failed=True).startswith("ROLLBACK TO")
    assert levels.has_undone


def test_the_end_of_the_transaction_around_them() -> None:
    """Nothing is sent for those that were open then."""
    levels, server = Levels(), Server()
    level = begin(levels, server)
    levels.forget()
    assert (levels.keep(level), len(levels)) == ("", 0)
    assert levels.undo(begin(levels, server), failed=False) != ""


def test_what_an_older_one_writes_goes_with_a_newer_one() -> None:
    """That is noted if it is committed, and not if it is rolled back as well."""
    for keeps in (True, False):
        levels, server = Levels(), Server()
        older, newer = begin(levels, server), begin(levels, server)
        write(levels, newer, server, 1)
        write(levels, older, server, 2)
        server.run(levels.undo(newer, failed=False))
        assert (server.written, levels.has_undone) == ([], False)
        server.run(levels.keep(older) if keeps else levels.undo(older, failed=False))
        assert levels.has_undone == keeps


def test_a_savepoint_is_gone_back_to() -> None:
    """What was done since is undone, again and again, and what was done before it is not."""
    levels, server = Levels(), Server()
    unit = begin(levels, server)
    write(levels, unit, server, 1)
    savepoint = begin(levels, server, unit)
    for number in (2, 3):
        write(levels, savepoint, server, number)
        server.run(levels.go_back(savepoint, failed=False))
    server.run(levels.keep(unit))
    assert (server.written, server.savepoints, levels.has_undone) == ([1], [], False)


def test_what_another_has_kept_in_a_savepoint() -> None:
    """It is undone with that, which is noted, unless nothing else was done in it."""
    for wrote in (True, False):
        levels, server = Levels(), Server()
        unit = begin(levels, server)
        savepoint = begin(levels, server, unit)
        if wrote:
            write(levels, savepoint, server, 1)
        other = begin(levels, server)
        write(levels, other, server, 2)
        server.run(levels.keep(other))
        server.run(levels.go_back(savepoint, failed=False))
        server.run(levels.keep(unit))
        assert (server.written, levels.has_undone) == ([] if wrote else [2], wrote)


class Unit:
    """A transaction as a database of its own would have it: what it has written, and had when a savepoint began."""

    def __init__(self, level: Level) -> None:
        self.level = level
        self.savepoints: list[tuple[Level, list[int]]] = []
        self.written: list[int] = []

    @property
    def innermost(self) -> Level:
        return next((level for level, _ in reversed(self.savepoints) if not level.is_gone), self.level)


STEPS = ["begin", "write", "mark", "back", "release", "keep", "undo", "fail"]


@given(st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 5)), max_size=60))
def test_any_order(steps: list[tuple[str, int]]) -> None:
    """Nothing that is sent names a savepoint that is not there; at the end there is none; and what is there is what was
    kept, in units and savepoints of whatever order, but where it was noted that it is not."""
    levels, server = Levels(), Server()
    running: list[Unit] = []
    kept: list[int] = []
    for number, (step, which) in enumerate(steps):
        if step == "begin":
            running.append(Unit(begin(levels, server)))
            continue
        if not running:
            continue
        unit = running[which % len(running)]
        if step in ("keep", "undo", "fail"):
            running.remove(unit)
        if step == "keep":
            server.run(levels.keep(unit.level))
            kept += unit.written
        elif step in ("undo", "fail"):
            server.run(levels.undo(unit.level, failed=step == "fail"))
        elif unit.level.is_gone:
            continue
        elif step == "write":
            write(levels, unit.innermost, server, number)
            unit.written.append(number)
        elif step == "mark":
            unit.savepoints.append((begin(levels, server, unit.level), list(unit.written)))
        elif unit.savepoints:
            savepoint, before = unit.savepoints[-1]
            if step == "back":
                server.run(levels.go_back(savepoint, failed=False))
                unit.written = list(before)
            else:
                server.run(levels.keep(savepoint))
                unit.savepoints.pop()
    for unit in running:
        server.run(levels.undo(unit.level, failed=True))
    assert (server.savepoints, len(levels)) == ([], 0)
    assert levels.has_undone or sorted(kept) == sorted(server.written)
