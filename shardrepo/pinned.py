"""A connection that a block holds for several calls, each of whose statements is committed by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.engine import Connection
from sqlalchemy.exc import PendingRollbackError

from .database import Database
from .errors import TransactionDoomedError
from .pool import driver_of, set_autocommit
from .transaction import Held


class Pinned(Held):
    """A connection for a block. What its SQL sets in the session lasts until the end of the block."""

    __slots__ = ("_depth", "_taken")

    def __init__(self, database: Database, connection: Connection) -> None:
        super().__init__(database, connection)
        self._taken = driver_of(connection)
        self._depth = 0
        set_autocommit(connection, True)

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Run a verb, or a transaction, of which nothing stays open; one that it calls itself is a part of it."""
        self.check_usable()
        self.check_ended()
        if self._depth == 0:
            set_autocommit(self.connection, False)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0 and not self._is_lost:
                set_autocommit(self.connection, True)

    @property
    def _is_lost(self) -> bool:
        # SQLAlchemy takes another one in its place, without a word.
        return self.connection.invalidated or driver_of(self.connection) is not self._taken

    def check_ended(self) -> None:
        """Raise unless the connection is as it was taken: alive, and in no transaction. Else it is closed."""
        connection, lost = self.connection, self._is_lost
        if not lost and self._depth > 0:
            return
        if not lost and self._taken.is_at_rest:
            # What SQLAlchemy takes for a transaction, around statements that were committed one by one.
            connection.commit()
            return
        if not connection.invalidated:
            connection.invalidate()
        cause = PendingRollbackError("the connection was lost" if lost else "a BEGIN was sent by hand, and never ended")
        raise TransactionDoomedError(
            f"the connection() block on {self.database.home} cannot go on, nor end well: {cause}. What it left open "
            "was rolled back; use `with repo.transaction():` for what belongs together",
            home=self.database.home,
            cause=cause,
        )
