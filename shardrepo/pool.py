"""SQLAlchemy's pool over the ledger: it does what the ledger decides, outside the ledger's lock.

This is the one place that leans on SQLAlchemy's pool internals: a `Pool` subclass is asked for a
``_ConnectionRecord`` by ``_do_get`` and gets it back by ``_do_return_conn``, a record knows by
the dead ``fairy_ref`` that it comes back from a finaliser, and a connection keeps its execution options in one
attribute. ``tests/test_private_api.py`` fails when that changes.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import Pool
from sqlalchemy.pool.base import _ConnectionRecord

from .breaker import Outage, Verdict
from .calls import deadline
from .callsite import CallSite
from .config import Config
from .database import Database
from .entries import EVICTIONS, NOTHING, Entry, Kind, State, Step, Wait
from .errors import (
    CheckoutTimeoutError,
    ConnectError,
    DatabaseBehindError,
    RepoDisposedError,
    ServerFullError,
    ServerUnavailableError,
    Unavailable,
    WrongDatabaseError,
)
from .ledger import Ledger
from .listeners import Listeners
from .transaction import Mode

if TYPE_CHECKING:
    from .connection import DriverConnection

Books: TypeAlias = "Ledger[object, CachedConnection]"

logger: Final = logging.getLogger("shardrepo.pool")

# Seconds that a caller lets others connect first: some ten connects over a fast network (decision 9).
PATIENCE: Final = 0.1

# libpq's PGTransactionStatusType, by number so that importing this module loads no driver
# (https://www.postgresql.org/docs/current/libpq-status.html#LIBPQ-PQTRANSACTIONSTATUS).
_IDLE: Final = 0
_ABORTED: Final = 3
_IN_TRANSACTION: Final = (2, _ABORTED)


# What a failed connect says about the server, by the reason of its error.
_VERDICTS: Final[Mapping[Unavailable, Verdict]] = {
    "refused": Verdict.REFUSED,
    "starting": Verdict.REFUSED,
    "timeout": Verdict.TIMED_OUT,
    "deadline": Verdict.UNKNOWN,
    "replaced": Verdict.ANSWERED,
    "down": Verdict.UNKNOWN,
}

# How many of those who hold a connection longest a timeout names.
_NAMED: Final = 3

# Whom a connection is taken for, where that is not the running thread.
on_behalf_of: Final[ContextVar[object | None]] = ContextVar("on behalf of", default=None)


class CachedConnection(_ConnectionRecord):
    """One connection of the cache, as SQLAlchemy's pools see it.

    Attributes:
        opened_at: When it was opened, on the clock of `time.monotonic`.
        taken: Where its borrower took it, if that is watched.
        warned: Whether that borrower was warned of.
    """

    __slots__ = ("entry", "ledger", "opened_at", "pool", "taken", "vouched", "warned")

    dbapi_connection: DriverConnection | None  # type: ignore[assignment]  # no other driver comes here

    def __init__(self, pool: LedgerPool, entry: Entry[object, CachedConnection], *, connect: bool = True) -> None:
        self.entry = entry
        self.pool = pool
        self.ledger = pool.ledger
        self.vouched = self.warned = False
        self.taken: CallSite | None = None
        self.opened_at = monotonic()
        super().__init__(pool, connect)

    def get_connection(self) -> Any:
        # SQLAlchemy's own also compares times of the wall clock, and connects anew past the ledger.
        return self.dbapi_connection or super().get_connection()

    def checkin(self, _fairy_was_created: bool = True) -> None:
        fairy = self.fairy_ref
        if fairy is not None and fairy() is None and _fairy_was_created:
            # A finaliser runs this, perhaps inside the ledger's locked section: do no I/O, take no lock.
            self.fairy_ref = None
            self.finalize_callback.clear()
            if self.dbapi_connection is not None:
                # What holds it may still be finalised, and would use it while another thread closes it.
                self.dbapi_connection.lose()
            self.reclaimed()
        elif fairy is None or self.finalize_callback or self.pool.dispatch.checkin:
            _ConnectionRecord.checkin(self, _fairy_was_created)
        else:
            # What SQLAlchemy's own comes down to when nobody listens, without its three calls.
            self.fairy_ref = None
            self.give_back()

    def reclaimed(self) -> None:
        """Say that its borrower is gone; for a finaliser."""
        self.ledger.reclaimed(self.entry)

    def give_back(self) -> None:
        """Return to the cache, or be closed if that cannot be."""
        connection = self.dbapi_connection
        reusable = False
        self.taken = None
        try:
            if connection is not None:
                at_rest = not connection.used and connection.pgconn.transaction_status == _IDLE
                # What is closed anyway needs no tidying.
                reusable = at_rest or self.entry.kind is Kind.TRANSIENT or self._tidy(connection)
        finally:
            held = monotonic() - self.entry.since if self.pool.listeners.checkin else None
            step = self.ledger.release(self.entry, reusable)
            if step is not NOTHING:
                perform(self.ledger, step)
            if held is not None:
                self.pool.listeners.tell("checkin", self.pool.database, held)

    def _tidy(self, connection: DriverConnection) -> bool:
        """End what the borrower left behind; False if the connection cannot be used again.

        A connection at rest is in no transaction, not in autocommit mode, unused and unvouched for.
        """
        try:
            status = connection.pgconn.transaction_status
            if status in _IN_TRANSACTION:
                connection.rollback()
            elif status != _IDLE:
                return False
            if not self.vouched or connection.leaves_traces:
                connection.reset()
            connection.rest()
            self.vouched = False
        except Exception:
            logger.debug(
                "a connection could not be reset and is closed",
                exc_info=True,
                extra=self.pool.listeners.labels(self.pool.database),
            )
            if connection.broken:
                perform(self.ledger, self.ledger.found_dead(self.entry))
            return False
        return bool(connection.pgconn.transaction_status == _IDLE)


class Lending:
    """What lends connections in place of a cache's books: nothing, but in the tests of an application.

    Attributes:
        instead: Called with the pool that is asked; None where it leaves the connection to the books.
    """

    __slots__ = ("instead",)

    def __init__(self) -> None:
        self.instead: Callable[[LedgerPool], CachedConnection | None] | None = None


def borrower() -> object:
    """Who is asking for a connection: whom it is taken for, else the running thread."""
    return on_behalf_of.get() or threading.current_thread()


class LedgerPool(Pool):
    """The pool of one database's engine. Holds no connection of its own: they are all in the ledger.

    Args:
        ledger: The books that decide.
        database: The database that this pool connects to.
        settings: The repo's; those about time are used here.
        attend: Called when a connection was opened.
        listeners: Who is told what happens.
        lending: What may lend them in place of the ledger.
        kind: What its connections are borrowed for.
    """

    def __init__(
        self,
        creator: Any,
        ledger: Books,
        database: Database,
        settings: Config,
        attend: Callable[[], None],
        listeners: Listeners,
        lending: Lending,
        kind: Kind = Kind.KEPT,
        **kwargs: Any,
    ) -> None:
        super().__init__(creator, reset_on_return=None, **kwargs)
        self.ledger = ledger
        self.database = database
        self._key = database.key
        self._server = database.server
        self.settings = settings
        self._attend = attend
        self.listeners = listeners
        self.kind = kind
        self._lending = lending
        self._watches = settings.warn_after is not None
        # Set by the cache: an engine lives as long as one of its connections does.
        self.engine: Engine | None = None

    def _do_get(self, aside: Kind | None = None) -> CachedConnection:
        begun = monotonic() if self.listeners.checkout else None
        if self._lending.instead is not None and aside is None and (lent := self._lending.instead(self)) is not None:
            return self._told(lent, begun)
        grant = self.ledger.acquire(self._key, aside or self.kind, self._server)
        if isinstance(grant, Wait):
            grant = self._await(grant)
        record = grant.connection
        if record is None or grant.close or grant.suspect:
            record = self._prepare(grant)
        if self._watches:
            record.taken, record.warned = CallSite(), False
        return record if begun is None else self._told(record, begun)

    def _told(self, record: CachedConnection, begun: float | None) -> CachedConnection:
        """*record*, once those who listen were told that it was taken."""
        try:
            if begun is not None:
                self.listeners.tell("checkout", self.database, monotonic() - begun)
        except BaseException:  # a signal's, say: nobody has the connection yet
            record.give_back()
            raise
        return record

    def _prepare(self, grant: Entry[object, CachedConnection]) -> CachedConnection:
        """Do what a grant asks for: close what has to go first, then connect, or test what may be dead."""
        while True:
            closed: list[CachedConnection] = []
            try:
                closed += self._close(grant)
                record = self._opened(grant, closed)
                # Not before: others may wait until this one has connected, or failed to.
                told, closed = closed, []
                tell_closed(told)
                if record is not None:
                    return record
            except BaseException as error:
                self._end(grant, error)
                tell_closed(closed)
                raise
            perform(self.ledger, self.ledger.found_dead(grant))
            self._end(grant)
            again = self.ledger.acquire(self._key, grant.kind, self._server)
            grant = self._await(again) if isinstance(again, Wait) else again

    def _do_return_conn(self, record: CachedConnection) -> None:  # type: ignore[override]  # what _do_get gave
        record.give_back()

    def _opened(
        self, grant: Entry[object, CachedConnection], closed: list[CachedConnection]
    ) -> CachedConnection | None:
        """The connection of a grant, new or known to be alive; None if it is dead. Adds to what was *closed* for it."""
        if grant.connection is None:
            return self._open(grant, closed)
        return grant.connection if not grant.suspect or self._is_alive(grant) else None

    def _open(self, entry: Entry[object, CachedConnection], closed: list[CachedConnection]) -> CachedConnection:
        if self.ledger.disposed:
            raise self._disposed()
        begun = monotonic()
        try:
            record = self._connect(entry, closed)
        except BaseException as error:
            self._end(entry, error)
            self.listeners.tell("connect", self.database, monotonic() - begun, error=error)
            raise
        seconds = monotonic() - begun
        if record.dbapi_connection is not None:
            record.dbapi_connection.settle()
        perform(self.ledger, self.ledger.opened(entry, record))
        self._attend()
        logger.debug(
            "connected to %s in %.4f s", self.database.home, seconds, extra=self.listeners.labels(self.database)
        )
        self.listeners.tell("connect", self.database, seconds)
        return record

    def _connect(self, entry: Entry[object, CachedConnection], closed: list[CachedConnection]) -> CachedConnection:
        try:
            return CachedConnection(self, entry)
        except ServerFullError:
            room = self._make_room()
            if not room:
                raise
            closed += room
            return CachedConnection(self, entry)

    def _make_room(self) -> Sequence[CachedConnection]:
        """Close one idle connection to a server that is full; nothing if there is none."""
        step = self.ledger.evict(self._server)
        with ExitStack() as stack:
            for record in (entry.connection for entry in step.close if entry.reason == "server full"):
                if record is not None and record.dbapi_connection is not None:
                    stack.enter_context(record.dbapi_connection.departure())
            return carry_out(self.ledger, step)

    def _is_alive(self, entry: Entry[object, CachedConnection]) -> bool:
        """Test a connection. Raises when its server leaves the question open for as long as a connect may take."""
        from .connection import NoAnswer

        connection = entry.connection.dbapi_connection if entry.connection is not None else None
        seconds = min(self.settings.connect_timeout, (deadline.get() or math.inf) - monotonic())
        try:
            if connection is None:
                return False
            connection.test(seconds)
        except NoAnswer as error:
            self.ledger.doubt(self._server)
            raise ServerUnavailableError(
                f"no sign of life on a connection to {self.database.home} within {seconds:.2f} s "
                f"(connect_timeout={self.settings.connect_timeout}); it was closed: check that the server runs",
                reason="timeout" if seconds == self.settings.connect_timeout else "deadline",
                database=self.database,
                orig=error,
            ) from error
        except Exception:
            logger.debug("a connection was found dead", exc_info=True, extra=self.listeners.labels(self.database))
            return False
        entry.suspect = False
        return True

    def _disposed(self) -> RepoDisposedError:
        return RepoDisposedError(f"cannot connect to {self.database.home}: this repo was disposed; define a new one")

    def _close(self, grant: Entry[object, CachedConnection]) -> Sequence[CachedConnection]:
        doomed, grant.close = grant.close, ()
        return close(self.ledger, doomed)

    def _end(self, entry: Entry[object, CachedConnection], error: BaseException | None = None) -> None:
        """Give a grant back that nobody will use, and close what it asked to have closed."""
        tell_closed(self._close(entry))
        if entry.state is State.CONNECTING:
            perform(self.ledger, self.ledger.failed(entry, _verdict(error), str(error)))
        elif entry.state is State.IN_USE:
            perform(self.ledger, self.ledger.release(entry, reusable=False))

    def _await(self, wait: Wait[object, CachedConnection]) -> Entry[object, CachedConnection]:
        """Wait for what could not be granted at once, or raise why it never will be."""
        begun = monotonic()
        try:
            tell_closed(close(self.ledger, wait.close))
            if wait.outage is not None:
                raise self._down(wait.outage)
            if wait.held:
                raise self._hopeless(wait)
            assert isinstance(wait.turn, threading.Event)
            timeout = min(self.settings.checkout_timeout, (deadline.get() or math.inf) - begun)
            patience = max(0.0, min(PATIENCE, timeout))
            if not wait.turn.wait(patience) and self.ledger.insist(wait) is None and not wait.is_over:
                wait.turn.wait(max(0.0, timeout - patience))
        except BaseException:
            if not wait.held and (granted := self.ledger.give_up(wait)) is not None:
                self._end(granted)
            raise
        if (granted := self.ledger.give_up(wait)) is not None:
            return granted
        if wait.outage is not None:
            raise self._down(wait.outage)
        seconds = monotonic() - begun
        self.listeners.tell("timeout", self.database, seconds, reason=_listed(wait.bounds))
        raise self._timed_out(wait, seconds)

    def _timed_out(self, wait: Wait[object, CachedConnection], seconds: float) -> CheckoutTimeoutError:
        stats = self.ledger.stats()
        loans = [
            f"{entry.connection.pool.database.home} for {held:.1f} s by {holder(entry)}"
            for entry, held in self.ledger.loans()[:_NAMED]
            if entry.connection is not None
        ]
        held_longest = f" Held longest: {'; '.join(loans)}." if loans else ""
        return CheckoutTimeoutError(
            f"no connection to {self.database.home} within {seconds:.1f} s: {_listed(wait.bounds)} left no "
            f"room; {stats.in_use} in use, {stats.connecting} connecting, {stats.waiting} waiting.{held_longest} Hold "
            f"connections for less time, raise {' or '.join(wait.bounds)}, or give a longer checkout_timeout",
            database=self.database,
            bounds=wait.bounds,
        )

    def _hopeless(self, wait: Wait[object, CachedConnection]) -> CheckoutTimeoutError:
        """The caller waits, directly or through others, for what it holds itself."""
        held = [entry.connection.pool.database.home for entry in wait.held if entry.connection is not None]
        return CheckoutTimeoutError(
            f"no connection to {self.database.home}, ever: {_listed(wait.bounds)} leaves no room, and all that could "
            f"make some is held by callers who wait for one themselves; this one holds {', '.join(held)}. End that "
            f"block first, or raise {' or '.join(wait.bounds)}",
            database=self.database,
            bounds=wait.bounds,
            held=held,
        )

    def _down(self, outage: Outage) -> ServerUnavailableError:
        left = max(0.0, outage.retry_at - monotonic())
        return ServerUnavailableError(
            f"cannot connect to {self.database.home}: {self._server} is down, and nobody but a probe tries it again "
            f"within {left:.1f} s; the last one got: {outage.cause}",
            reason="down",
            retry_after=left,
            database=self.database,
        )

    def take_aside(self, kind: Kind) -> CachedConnection:
        """Take a connection from the books for something else than this pool's are for, whatever lends instead."""
        return self._do_get(kind)

    def recreate(self) -> LedgerPool:
        return LedgerPool(
            self._creator,
            self.ledger,
            self.database,
            self.settings,
            self._attend,
            self.listeners,
            self._lending,
            self.kind,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            dialect=self._dialect,
            _dispatch=self.dispatch,
        )

    def _invalidate(self, connection: Any, exception: BaseException | None = None, _checkin: bool = True) -> None:
        # SQLAlchemy's own would mark every older connection of this database, by the wall clock.
        from .connection import NoAnswer

        record = connection._connection_record
        if isinstance(exception, NoAnswer):
            self.ledger.doubt(self._server)
            self.listeners.tell("timeout", self.database, monotonic() - record.entry.since, reason="no answer")
        elif isinstance(record, CachedConnection):
            perform(self.ledger, self.ledger.found_dead(record.entry))
        connection.invalidate(exception)

    def dispose(self) -> None:
        perform(self.ledger, self.ledger.discard(self.database.key))

    def status(self) -> str:
        return f"{self.database.home}: {self.ledger.stats()}"


def holder(entry: Entry[object, CachedConnection]) -> str:
    """Say who holds a connection, and where it was taken if that is known."""
    taken = entry.connection.taken if entry.connection is not None else None
    if taken is not None:
        return f"{taken.thread} ({taken.line})"
    return entry.borrower.name if isinstance(entry.borrower, threading.Thread) else str(entry.borrower or "a thread")


def _verdict(error: BaseException | None) -> Verdict:
    """What a failed connect says about the server."""
    if isinstance(error, ServerUnavailableError):
        return _VERDICTS[error.reason]
    if isinstance(error, ConnectError) and type(error) is not ConnectError:
        return Verdict.ANSWERED
    if isinstance(error, DatabaseBehindError | WrongDatabaseError):
        return Verdict.ANSWERED
    return Verdict.UNKNOWN


def _listed(bounds: Mapping[str, int]) -> str:
    return " and ".join(f"{name}={limit}" for name, limit in bounds.items())


def vouch(connection: Connection) -> None:
    """Say that only the library's own statements will run on *connection*: they leave nothing behind to reset."""
    record_of(connection).vouched = True


def autocommit(connection: Connection) -> None:
    """Let each statement be committed by itself, without a BEGIN; nothing changes inside a transaction."""
    if not connection.in_transaction():
        dbapi_connection = record_of(connection).dbapi_connection
        assert dbapi_connection is not None
        dbapi_connection.set_autocommit_mode(True)


def set_autocommit(connection: Connection, mode: bool) -> None:
    """Have each statement on a connection that a block holds be committed by itself, or none; as a transaction left
    it, whose mode is over."""
    dbapi_connection = driver_of(connection)
    if dbapi_connection.is_at_rest:
        dbapi_connection.begin_as(None, read_only=False, deferrable=False)
    dbapi_connection.set_autocommit_mode(mode)


def driver_of(connection: Connection) -> DriverConnection:
    """The driver's own connection behind *connection*, which was not lost."""
    return connection_of(record_of(connection))


def connection_of(record: CachedConnection) -> DriverConnection:
    """The driver's own connection of *record*, which was not lost."""
    assert record.dbapi_connection is not None
    return record.dbapi_connection


def begin_as(connection: Connection, mode: Mode) -> None:
    """Have the next transaction on *connection* run in *mode*."""
    if mode.isolation or mode.read_only:
        driver_of(connection).begin_as(mode.isolation, read_only=mode.read_only, deferrable=mode.deferrable)


@contextmanager
def optioned(connection: Connection, options: Mapping[str, Any]) -> Iterator[None]:
    """Give what the block executes on *connection* SQLAlchemy's execution *options*."""
    if not options:
        yield
        return
    before = connection.get_execution_options()
    connection.execution_options(**options)
    try:
        yield
    finally:
        # They can be added to by public means, and not taken away; the connection may be a transaction's.
        connection._execution_options = before


@contextmanager
def limited(connection: Connection, until: float | None) -> Iterator[None]:
    """Wait for no answer on *connection* beyond *until*, on the clock of `time.monotonic`: then it is closed."""
    dbapi_connection = None if until is None or connection.invalidated else record_of(connection).dbapi_connection
    if dbapi_connection is None:
        yield
        return
    # A verb may be called in another one of the same transaction, by a listener, and has no more time than that.
    before = dbapi_connection.limit(until)
    if before is not None and until is not None:
        dbapi_connection.limit(min(before, until))
    try:
        yield
    finally:
        dbapi_connection.limit(before)


def disown(connection: Connection) -> None:
    """Take back what `vouch` said: the user's own SQL is about to run."""
    record_of(connection).vouched = False


def is_aborted(connection: Connection) -> bool:
    """Whether a statement has failed in the transaction of *connection*, so that the server refuses all others."""
    if connection.invalidated:
        return True
    dbapi_connection = record_of(connection).dbapi_connection
    return dbapi_connection is not None and dbapi_connection.pgconn.transaction_status == _ABORTED


def record_of(connection: Connection) -> CachedConnection:
    """Find the cache's record behind a connection that was taken out of one of its pools."""
    record = getattr(connection.connection, "_connection_record", None)
    assert isinstance(record, CachedConnection)
    return record


def perform(ledger: Books, step: Step[object, CachedConnection]) -> None:
    """Do what a step of the ledger leaves to do: wake who waits, close what has to go, and tell of it."""
    tell_closed(carry_out(ledger, step))


def carry_out(ledger: Books, step: Step[object, CachedConnection]) -> Sequence[CachedConnection]:
    """`perform`, without telling anybody; returns what was closed."""
    for wait in step.wake:
        wait.turn.set()
    return close(ledger, step.close)


def close(ledger: Books, entries: Sequence[Entry[object, CachedConnection]]) -> Sequence[CachedConnection]:
    """Close *entries*, all of them even when one is interrupted, and book each as closed; returns what was closed."""
    if not entries:
        return ()
    closed = [entry.connection for entry in entries if entry.connection is not None]
    with ExitStack() as rest:
        for entry in entries:
            rest.callback(_close, ledger, entry, closed)
    return closed


def tell_closed(closed: Sequence[CachedConnection]) -> None:
    """Tell the listeners what was closed, and why."""
    for record in closed:
        entry, database, listeners = record.entry, record.pool.database, record.pool.listeners
        logger.debug("closed a connection to %s: %s", database.home, entry.reason, extra=listeners.labels(database))
        now = monotonic()
        if entry.reason in EVICTIONS:
            listeners.tell("evict", database, now - entry.since, reason=entry.reason)
        listeners.tell("close", database, now - record.opened_at, reason=entry.reason)


def _close(ledger: Books, entry: Entry[object, CachedConnection], closed: list[CachedConnection]) -> None:
    try:
        if entry.connection is not None:
            entry.connection.close()
    finally:
        closed += carry_out(ledger, ledger.closed(entry))
