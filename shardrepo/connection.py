"""An open connection of psycopg's that knows whose it is, whether it was used, and how long it may wait.

Leans on what psycopg does not document, each tested in ``tests/test_private_api.py``: a
`psycopg.Connection` can be made from a `psycopg.pq.PGconn`; it takes its adapters from ``_adapters``, and whether
to begin a transaction from ``_autocommit``; every exchange with the server goes through its method ``wait``, as a
generator that yields what to wait for and is sent what came; and ``_prepared`` has what is prepared, and forgets it.
"""

from __future__ import annotations

import os
import selectors
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, Final, Literal

import psycopg
from psycopg import IsolationLevel, pq
from psycopg.abc import AdaptContext
from psycopg.adapt import AdaptersMap
from psycopg.errors import FeatureNotSupported, ReadOnlySqlTransaction

from .database import Database

# DISCARD ALL without its DEALLOCATE ALL and DISCARD PLANS, so that prepared statements stay, in one round
# trip (https://www.postgresql.org/docs/current/sql-discard.html).
RESET: Final = (
    "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; "
    "SELECT pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES"
)

# What a borrower may set on a connection beside what SQL sets in its session.
_SETTINGS: Final = ("row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold", "prepared_max")

# What a statement may fail with because its connection is of an earlier time, see `is_outdated_by`.
OUTDATED: Final = (FeatureNotSupported, ReadOnlySqlTransaction)

# The server's own function that refuses a plan of an earlier time, before anything of it has run; no message tells,
# as those are translated. And what a server reports that is read-only whatever a transaction asks for
# (https://www.postgresql.org/docs/current/libpq-status.html#LIBPQ-PQPARAMETERSTATUS); a pooler may keep it to itself.
_REVALIDATES: Final = "RevalidateCachedQuery"
_READ_ONLY: Final = (b"default_transaction_read_only", b"in_hot_standby")

# Stands for the owner of a connection whose borrower was lost; no process has this number.
_LOST: Final = -1

# Whether libpq can ask a server to stop without waiting for its answer for ever; and the seconds that it gets.
_CAN_CANCEL: Final = pq.version() >= 170000
_CANCEL: Final = 0.1

# Seconds that a server process gets to end.
_DEPARTURE: Final = 0.25


class DriverConnection(psycopg.Connection[Any]):
    """A psycopg connection that knows whether it was used, and whose it is.

    In a forked child, whose copy shares the parent's socket, nothing is sent and nothing is closed.

    Attributes:
        database: Where it leads.
        used: Whether anything was sent, or a setting changed, since `settle` or `rest`.
        pooled: Whether each transaction may run in another session of the server, as a pooler has it.
        reads_only: Whether the server was told to refuse what writes.
        leaves_traces: Whether a statement has called what changes its session, since it was reset.
    """

    database: Database
    used: bool
    pooled: bool = False
    reads_only: bool = False
    leaves_traces: bool = False

    def __init__(self, pgconn: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(pgconn, *args, **kwargs)
        self._pid = os.getpid()
        self._deadline: float | None = None

    def adapt_as(self, context: AdaptContext) -> None:
        """Turn values into those of the server, and back, as *context* does."""
        self._adapters = AdaptersMap(context.adapters)

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, "used", True)
        object.__setattr__(self, name, value)

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        if self._pid != os.getpid():
            owner = "the cache, which closes it" if self._pid == _LOST else "the parent process, which opened it"
            raise psycopg.OperationalError(f"this connection belongs to {owner}")
        object.__setattr__(self, "used", True)
        if self._deadline is None:
            return super().wait(gen, *args, **kwargs)
        try:
            return until(self._deadline, gen, self.pgconn.socket)
        except (NoAnswer, KeyboardInterrupt):
            self._give_up(gen)
            raise

    def add_notice_handler(self, callback: Any) -> None:
        super().add_notice_handler(callback)
        object.__setattr__(self, "used", True)

    def add_notify_handler(self, callback: Any) -> None:
        super().add_notify_handler(callback)
        object.__setattr__(self, "used", True)

    def settle(self) -> None:
        """Take the settings that it has now for those that `reset` restores: everybody has prepared it."""
        self._settings = {name: getattr(self, name) for name in _SETTINGS}
        self._handlers = (tuple(self._notice_handlers), tuple(self._notify_handlers))
        self._own_adapters = AdaptersMap(self.adapters)
        self.rest()

    def begin_as(self, isolation: str | None, *, read_only: bool, deferrable: bool) -> None:
        """Say how its transactions begin, until it rests."""
        self.isolation_level = None if isolation is None else IsolationLevel[isolation.upper().replace(" ", "_")]
        self.read_only = read_only or None
        self.deferrable = deferrable or None

    def rest(self) -> None:
        """Wait for the next borrower: not in autocommit mode, and unused."""
        if self.isolation_level or self.read_only or self.deferrable:
            self.begin_as(None, read_only=False, deferrable=False)
        self.set_autocommit_mode(False)
        self.limit(None)
        object.__setattr__(self, "used", False)

    def set_autocommit_mode(self, mode: bool) -> None:
        """Set `autocommit` outside a transaction, in one step where psycopg takes a lock and runs a generator."""
        object.__setattr__(self, "_autocommit", mode)

    def restore(self) -> None:
        """Give it the settings again that `settle` found."""
        for name, value in self._settings.items():
            setattr(self, name, value)

    def reset(self) -> None:
        """Undo whatever SQL, or a setting of this object, may have left in the session. One round trip.

        None if pooled: the session that SQL has changed belongs to somebody else by now.
        """
        self.restore()
        self._notice_handlers[:], self._notify_handlers[:] = self._handlers
        self._adapters = AdaptersMap(self._own_adapters)
        self.begin_as(None, read_only=False, deferrable=False)
        self.autocommit = True
        if not self.pooled:
            self.execute(RESET, prepare=False)
        self.leaves_traces = False

    def test(self, seconds: float) -> None:
        """Ask the server for a sign of life. Raises `NoAnswer` when there is none in time, else what psycopg raises."""
        self.set_autocommit_mode(True)
        self.limit(monotonic() + seconds)
        self.execute("", prepare=False)
        self.rest()

    def limit(self, deadline: float | None) -> float | None:
        """Wait for no answer beyond *deadline*, on the clock of `time.monotonic`: then close, and raise `NoAnswer`.

        Returns the deadline that it had before.
        """
        before = self._deadline
        object.__setattr__(self, "_deadline", deadline)
        return before

    def _give_up(self, _exchange: Any) -> None:
        """Close, after asking the server to stop, which may go unheard."""
        if _CAN_CANCEL:
            with suppress(psycopg.Error):
                self.cancel_safe(timeout=_CANCEL)
        self.close()

    def lose(self) -> None:
        """Nobody may use it any more: its borrower is gone, and another thread will close it."""
        object.__setattr__(self, "_pid", _LOST)

    @property
    def is_at_rest(self) -> bool:
        """Whether it is in no transaction."""
        return self.pgconn.transaction_status == pq.TransactionStatus.IDLE

    def is_outdated_by(self, error: psycopg.Error) -> Literal["statements", "connection"] | None:
        """What of it *error* shows to be of an earlier time; None if it is the caller's own mistake.

        Its prepared statements, when the type of a column has changed since; all of it, when its server has become
        read-only, as one does that another has taken over from.
        """
        if isinstance(error, ReadOnlySqlTransaction):
            own = (
                self.read_only
                or self.reads_only
                or all(self.pgconn.parameter_status(name) == b"off" for name in _READ_ONLY)
            )
            return None if own else "connection"
        return "statements" if error.diag.source_function == _REVALIDATES and self._prepared._names else None

    def forget_statements(self) -> None:
        """Drop what the server has prepared for this connection, before its next statement."""
        self._prepared.clear()

    @contextmanager
    def departure(self) -> Iterator[None]:
        """Wait, once the block has closed this connection, until the server has let go of it too; not for long."""
        socket = os.dup(self.fileno())
        try:
            yield
            ready(socket, selectors.EVENT_READ, monotonic() + _DEPARTURE)
        finally:
            os.close(socket)

    def rollback(self) -> None:
        if self._pid == os.getpid():
            super().rollback()

    def close(self) -> None:
        if self._pid in (os.getpid(), _LOST):
            super().close()


class NoAnswer(psycopg.OperationalError):
    """The server did not answer in time."""


def until(deadline: float, exchange: Any, socket: int) -> Any:
    """Go through an exchange with the server as psycopg's own `waiting.wait` does, but not beyond *deadline*."""
    try:
        if deadline <= monotonic():
            raise NoAnswer("its time was over before anything was sent")
        awaited = next(exchange)
        with selectors.DefaultSelector() as selector:
            selector.register(socket, awaited)
            # Also when something comes all the time: a result without end is no answer either.
            while (left := deadline - monotonic()) > 0:
                found = selector.select(left)
                if found:
                    awaited = exchange.send(found[0][1])
                    selector.modify(socket, awaited)
        raise NoAnswer("the server did not answer in time")
    except StopIteration as ended:
        return ended.value


def ready(socket: int, event: int, deadline: float) -> bool:
    """Wait for the socket; False when the deadline comes first."""
    with selectors.DefaultSelector() as selector:
        selector.register(socket, event)
        while (left := deadline - monotonic()) > 0:
            if selector.select(left):
                return True
    return False
