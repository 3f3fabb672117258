"""Transactions inside one transaction: which savepoints stand for those that are open on a connection, and what is to
be sent when one begins or ends. Decides; sends nothing."""

from __future__ import annotations

from itertools import count


class Level:
    """One transaction that is open, or a savepoint in one: to the server a savepoint either way.

    Attributes:
        name: The server's name for it.
        unit: The transaction that it is part of: itself, unless it is a savepoint.
        is_gone: Whether the server has no such savepoint any more: what was done in it was undone with another's.
    """

    __slots__ = ("has_lost", "is_gone", "is_kept", "name", "others", "unit", "wrote")

    def __init__(self, name: str, unit: Level | None) -> None:
        self.name = name
        self.unit = unit or self
        self.is_gone = False
        # Whether a statement of its unit may have written in it.
        self.wrote = False
        # Committed while a newer one was open, with which it will be released.
        self.is_kept = False
        # Which other units have written in it: those that are open, and None for all that were committed.
        self.others: set[Level | None] = set()
        # Whether something that this unit has written was undone with another.
        self.has_lost = False


class Levels:
    """The transactions that are open on one connection, and the savepoints in them, the newest last.

    Real ones would know nothing of each other; savepoints lie in each other. Those that end in the order of a stack
    behave as real ones do, but that one sees what an older one has not committed yet. When one is rolled back, what
    others have written since it began is undone with it. If they have committed that, or do so later, nobody would
    expect it: `has_undone` then says so.
    """

    def __init__(self) -> None:
        self._open: list[Level] = []
        self._numbers = count(1)
        self.has_undone = False

    def __len__(self) -> int:
        return len(self._open)

    @property
    def units(self) -> int:
        """How many transactions are open, and not committed yet."""
        return sum(1 for level in self._open if level.unit is level and not level.is_kept)

    def begin(self, unit: Level | None = None) -> tuple[Level, str]:
        """A new transaction, or a savepoint in *unit*, and what begins it."""
        level = Level(f"shardrepo_{next(self._numbers)}", unit)
        self._open.append(level)
        return level, f"SAVEPOINT {level.name}"

    def write(self, level: Level) -> None:
        """Note that a statement in *level*, the innermost of its unit, may have written."""
        if not level.is_gone:
            level.wrote = True
            for newer in self._since(level)[1:]:
                newer.others.add(level.unit)

    def has_written(self, level: Level) -> bool:
        """Whether the unit of *level* may have written since that began."""
        return any(
            (each.wrote and each.unit is level.unit) or level.unit in each.others
            for each in (() if level.is_gone else self._since(level))
        )

    def keep(self, level: Level) -> str:
        """Commit *level*, with the savepoints in it: what to send, which is nothing as long as a newer one is open."""
        self.has_undone |= level.has_lost
        return self._keep(level)

    def undo(self, level: Level, *, failed: bool) -> str:
        """Roll *level* back, with all that was begun in it: what to send.

        One that wrote nothing, and has not *failed*, is kept if others have done something in it.
        """
        if level.is_gone:
            return ""
        if self._is_bystander(level, failed=failed):
            return self._keep(level)
        self._drop(self._since(level))
        level.is_gone = True
        return "; ".join(filter(None, (f"ROLLBACK TO {level.name}", f"RELEASE {level.name}", self._release())))

    def go_back(self, level: Level, *, failed: bool) -> str:
        """Undo what was done since *level*, a savepoint, which stays open: what to send."""
        self.has_undone |= level.is_gone
        if level.is_gone or self._is_bystander(level, failed=failed):
            return ""
        self._drop(self._since(level))
        self._open.append(level)
        level.wrote, level.others = False, set()
        return f"ROLLBACK TO {level.name}"

    def forget(self) -> None:
        """The transaction around all of them is over: none is there any more."""
        for level in self._open:
            level.is_gone = True
        self._open.clear()

    def _since(self, level: Level) -> list[Level]:
        """*level*, and all that were begun since."""
        return self._open[self._open.index(level) :]

    def _is_bystander(self, level: Level, *, failed: bool) -> bool:
        """Whether rolling *level* back would undo nothing but what others have done."""
        own = failed or self.has_written(level)
        return not own and any(each.others or each.unit is not level.unit for each in self._since(level))

    def _keep(self, level: Level) -> str:
        if not level.is_gone:
            for each in self._since(level):
                each.is_kept |= each.unit is level.unit
        return self._release()

    def _drop(self, undone: list[Level]) -> None:
        """Take *undone*, the newest, off, and note what of others goes with the first of them."""
        del self._open[-len(undone) :]
        unit = undone[0].unit
        for each in undone[1:]:
            each.is_gone = True
        lost = {other for each in undone for other in (*each.others, *([each.unit] if each.wrote else ()))}
        for other in lost - {unit}:
            if other is None or other.is_kept:
                self.has_undone = True
            else:
                other.has_lost = True

    def _release(self) -> str:
        """What releases those that were committed and have no newer one in them: the oldest takes the others along."""
        released: list[Level] = []
        while self._open and self._open[-1].is_kept:
            released.append(self._open.pop())
        if not released:
            return ""
        if self._open:
            self._hand_on(released, self._open[-1])
        return f"RELEASE {released[-1].name}"

    def _hand_on(self, released: list[Level], to: Level) -> None:
        """Have what was written in those that were *released* be written in the one around them."""
        for each in released:
            writers = each.others | ({each.unit} if each.wrote else set())
            to.wrote |= to.unit in writers
            to.others |= {None if writer is None or writer.is_kept else writer for writer in writers - {to.unit}}
