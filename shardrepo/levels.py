"""Transactions inside one transaction: which savepoints stand for those that are open on a connection, and what is to
be sent when one begins or ends. Decides; sends nothing."""

from __future__ import annotations

from itertools import count


class Level:
    """One transaction that is open: a savepoint.

    Attributes:
        name: The savepoint's.
        wrote: Whether a statement in it may have written.
        is_gone: Whether the server has no such savepoint any more: what was done in it was undone with another's.
    """

    __slots__ = ("has_kept", "is_gone", "is_kept", "name", "wrote")

    def __init__(self, name: str) -> None:
        self.name = name
        self.wrote = self.is_gone = False
        # Committed while a newer one was open, with which it will be released.
        self.is_kept = False
        # Whether one that wrote was begun in it, by somebody else, and committed.
        self.has_kept = False


class Levels:
    """The transactions that are open on one connection, the newest last.

    Real ones would know nothing of each other; savepoints lie in each other. Those that end in the order of a stack
    behave as real ones do, but that one sees what an older one has not committed yet. When an older one is rolled back,
    what a newer one has committed meanwhile is undone with it, and nobody would expect that: `has_undone` then says so.
    """

    def __init__(self) -> None:
        self._open: list[Level] = []
        self._numbers = count(1)
        self.has_undone = False

    def __len__(self) -> int:
        return len(self._open)

    def begin(self) -> tuple[Level, str]:
        """A new level, and what begins it."""
        level = Level(f"shardrepo_{next(self._numbers)}")
        self._open.append(level)
        return level, f"SAVEPOINT {level.name}"

    def keep(self, level: Level) -> str:
        """Commit *level*: what to send, which is nothing as long as a newer one is open, or if it is gone."""
        level.is_kept = True
        return self._release()

    def undo(self, level: Level, *, failed: bool) -> str:
        """Roll *level* back, and all that was begun in it: what to send.

        One that wrote nothing, and has not *failed*, is kept if others have done something in it.
        """
        if level.is_gone:
            return ""
        place = self._open.index(level)
        newer = self._open[place + 1 :]
        if not (level.wrote or failed) and (level.has_kept or newer):
            return self.keep(level)
        del self._open[place:]
        for each in (level, *newer):
            each.is_gone = True
        kept = (each for each in self._open if each.is_kept)
        self.has_undone |= level.has_kept or any(each.wrote for each in (*newer, *kept))
        return "; ".join(filter(None, (f"ROLLBACK TO {level.name}", f"RELEASE {level.name}", self._release())))

    def forget(self) -> None:
        """The transaction around all of them is over: none is there any more."""
        for level in self._open:
            level.is_gone = True
        self._open.clear()

    def _release(self) -> str:
        """What releases those that were committed and have no newer one in them: the oldest takes the others along."""
        released: list[Level] = []
        while self._open and self._open[-1].is_kept:
            released.append(self._open.pop())
        if not released:
            return ""
        if self._open:
            self._open[-1].has_kept |= any(each.wrote or each.has_kept for each in released)
        return f"RELEASE {released[-1].name}"
