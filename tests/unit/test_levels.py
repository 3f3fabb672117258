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


def begin(levels: Levels, server: Server) -> Level:
    level, sql = levels.begin()
    server.run(sql)
    return level


def write(level: Level, server: Server, what: int) -> None:
    level.wrote = True
    server.written.append(what)


def test_a_stack_of_transactions() -> None:
    """Those that end in the order of a stack leave what they would leave in a database."""
    levels, server = Levels(), Server()
    outer = begin(levels, server)
    write(outer, server, 1)
    inner = begin(levels, server)
    write(inner, server, 2)
    server.run(levels.undo(inner, failed=False))
    server.run(levels.keep(outer))
    assert (server.written, server.savepoints, len(levels), levels.has_undone) == ([1], [], 0, False)


def test_one_that_is_kept_before_a_newer_one() -> None:
    """It is released with that, and what both have written stays."""
    levels, server = Levels(), Server()
    older, newer = begin(levels, server), begin(levels, server)
    write(older, server, 1)
    write(newer, server, 2)
    assert levels.keep(older) == ""
    server.run(levels.keep(newer))
    assert (server.written, server.savepoints, levels.has_undone) == ([1, 2], [], False)


def test_what_another_has_kept_is_undone() -> None:
    """That is noted: a database would have kept it."""
    levels, server = Levels(), Server()
    outer = begin(levels, server)
    write(outer, server, 1)
    inner = begin(levels, server)
    write(inner, server, 2)
    server.run(levels.keep(inner))
    assert not levels.has_undone
    server.run(levels.undo(outer, failed=False))
    assert (server.written, levels.has_undone) == ([], True)


def test_one_that_wrote_nothing_takes_nothing_along() -> None:
    """Rolled back, it leaves what others have written in it."""
    levels, server = Levels(), Server()
    reading = begin(levels, server)
    writing = begin(levels, server)
    write(writing, server, 1)
    server.run(levels.keep(writing))
    server.run(levels.undo(reading, failed=False))
    assert (server.written, server.savepoints, levels.has_undone) == ([1], [], False)


def test_one_that_failed_has_to_be_undone() -> None:
    """The server would release no savepoint then."""
    levels, server = Levels(), Server()
    reading = begin(levels, server)
    writing = begin(levels, server)
    write(writing, server, 1)
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


@given(st.lists(st.tuples(st.sampled_from(["begin", "write", "keep", "undo", "fail"]), st.integers(0, 5)), max_size=40))
def test_any_order(steps: list[tuple[str, int]]) -> None:
    """Nothing that is sent names a savepoint that is not there; at the end there is none; and what was written and kept
    is missing only where that was noted."""
    levels, server = Levels(), Server()
    running: list[tuple[Level, list[int]]] = []
    kept: list[int] = []
    for number, (step, which) in enumerate(steps):
        if step == "begin":
            running.append((begin(levels, server), []))
            continue
        if not running:
            continue
        level, written = running[which % len(running)]
        if step == "write":
            if not level.is_gone:
                write(level, server, number)
                written.append(number)
            continue
        running.remove((level, written))
        if step == "keep":
            server.run(levels.keep(level))
            kept += [] if level.is_gone and levels.has_undone else written
        else:
            server.run(levels.undo(level, failed=step == "fail"))
    for level, _ in running:
        server.run(levels.undo(level, failed=True))
    assert (server.savepoints, len(levels)) == ([], 0)
    assert levels.has_undone or set(kept) <= set(server.written)
