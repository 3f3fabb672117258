"""SQLAlchemy's pool over the ledger: it does what the ledger decides, outside the ledger's lock.

This is the one place that leans on SQLAlchemy's pool internals: a `Pool` subclass is asked for a
``_ConnectionRecord`` by ``_do_get`` and gets it back by ``_do_return_conn``, and a record knows by
the dead ``fairy_ref`` that it comes back from a finaliser. ``tests/test_private_api.py`` fails when that changes.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from time import monotonic
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.pool.base import _ConnectionRecord

from .database import Database
from .entries import NOTHING, Entry, Kind, State, Step, Wait
from .errors import CheckoutTimeoutError, RepoDisposedError
from .ledger import Ledger

if TYPE_CHECKING:
    from .driver import DriverConnection

Books: TypeAlias = "Ledger[object, CachedConnection]"

logger: Final = logging.getLogger("shardrepo")

# Seconds that a caller lets others connect first: some ten connects over a fast network (decision 9).
PATIENCE: Final = 0.1

# libpq's PGTransactionStatusType, by number so that importing this module loads no driver
# (https://www.postgresql.org/docs/current/libpq-status.html#LIBPQ-PQTRANSACTIONSTATUS).
_IDLE: Final = 0
_ABORTED: Final = 3
_IN_TRANSACTION: Final = (2, _ABORTED)


class CachedConnection(_ConnectionRecord):
    """One connection of the cache, as SQLAlchemy's pools see it."""

    __slots__ = ("entry", "ledger", "pool", "vouched")

    dbapi_connection: DriverConnection | None  # type: ignore[assignment]  # no other driver comes here

    def __init__(self, pool: LedgerPool, entry: Entry[object, CachedConnection]) -> None:
        self.entry = entry
        self.pool = pool
        self.ledger = pool.ledger
        self.vouched = False
        super().__init__(pool)

    def checkin(self, _fairy_was_created: bool = True) -> None:
        fairy = self.fairy_ref
        if fairy is not None and fairy() is None and _fairy_was_created:
            # A finaliser runs this, perhaps inside the ledger's locked section: do no I/O, take no lock.
            self.fairy_ref = None
            self.finalize_callback.clear()
            self.ledger.reclaimed(self.entry)
        elif fairy is None or self.finalize_callback or self.pool.dispatch.checkin:
            _ConnectionRecord.checkin(self, _fairy_was_created)
        else:
            # What SQLAlchemy's own comes down to when nobody listens, without its three calls.
            self.fairy_ref = None
            self.give_back()

    def give_back(self) -> None:
        """Return to the cache, or be closed if that cannot be."""
        connection = self.dbapi_connection
        reusable = False
        try:
            if connection is not None:
                at_rest = not connection.used and connection.pgconn.transaction_status == _IDLE
                reusable = at_rest or self._tidy(connection)
        finally:
            step = self.ledger.release(self.entry, reusable)
            if step is not NOTHING:
                perform(self.ledger, step)

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
            if not self.vouched:
                connection.reset()
            connection.rest()
            self.vouched = False
        except Exception:
            logger.debug("a connection could not be reset and is closed", exc_info=True)
            return False
        return bool(connection.pgconn.transaction_status == _IDLE)


class LedgerPool(Pool):
    """The pool of one database's engine. Holds no connection of its own: they are all in the ledger.

    Args:
        ledger: The books that decide.
        database: The database that this pool connects to.
        kind: What its connections are borrowed for.
        checkout_timeout: Seconds that a caller waits for a hard bound.
    """

    def __init__(
        self,
        creator: Any,
        ledger: Books,
        database: Database,
        kind: Kind = Kind.KEPT,
        checkout_timeout: float = 30.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(creator, reset_on_return=None, **kwargs)
        self.ledger = ledger
        self.database = database
        self._key = database.key
        self._server = database.server
        self.kind = kind
        self.checkout_timeout = checkout_timeout
        # Set by the cache: an engine lives as long as one of its connections does.
        self.engine: Engine | None = None

    def _do_get(self) -> ConnectionPoolEntry:
        grant = self.ledger.acquire(self._key, self.kind, self._server)
        if isinstance(grant, Wait):
            grant = self._await(grant) if not grant.held else self._refuse(grant)
        if grant.connection is not None and not grant.close:
            return grant.connection
        try:
            self._close(grant)
            return grant.connection or self._open(grant)
        except BaseException:
            self._end(grant)
            raise

    def _do_return_conn(self, record: CachedConnection) -> None:  # type: ignore[override]  # what _do_get gave
        record.give_back()

    def _open(self, entry: Entry[object, CachedConnection]) -> CachedConnection:
        if self.ledger.disposed:
            raise self._disposed()
        record = CachedConnection(self, entry)
        if record.dbapi_connection is not None:
            record.dbapi_connection.settle()
        perform(self.ledger, self.ledger.opened(entry, record))
        return record

    def _disposed(self) -> RepoDisposedError:
        return RepoDisposedError(f"cannot connect to {self.database.home}: this repo was disposed; define a new one")

    def _close(self, grant: Entry[object, CachedConnection]) -> None:
        doomed, grant.close = grant.close, ()
        close(self.ledger, doomed)

    def _end(self, entry: Entry[object, CachedConnection]) -> None:
        """Give a grant back that nobody will use, and close what it asked to have closed."""
        self._close(entry)
        if entry.state is State.CONNECTING:
            perform(self.ledger, self.ledger.failed(entry))
        elif entry.state is State.IN_USE:
            perform(self.ledger, self.ledger.release(entry, reusable=False))

    def _await(self, wait: Wait[object, CachedConnection]) -> Entry[object, CachedConnection]:
        begun = monotonic()
        try:
            close(self.ledger, wait.close)
            assert isinstance(wait.turn, threading.Event)
            patience = min(PATIENCE, self.checkout_timeout)
            if not wait.turn.wait(patience) and self.ledger.insist(wait) is None:
                wait.turn.wait(self.checkout_timeout - patience)
        except BaseException:
            if (granted := self.ledger.give_up(wait)) is not None:
                self._end(granted)
            raise
        if (granted := self.ledger.give_up(wait)) is not None:
            return granted
        stats = self.ledger.stats()
        raise CheckoutTimeoutError(
            f"no connection to {self.database.home} within {monotonic() - begun:.1f} s: {_listed(wait.bounds)} left no "
            f"room; {stats.in_use} in use, {stats.connecting} connecting, {stats.waiting} waiting. Hold connections "
            f"for less time, raise {' or '.join(wait.bounds)}, or give a longer checkout_timeout",
            database=self.database,
            bounds=wait.bounds,
        )

    def _refuse(self, wait: Wait[object, CachedConnection]) -> NoReturn:
        """Raise at once: the caller waits, directly or through others, for what it holds itself."""
        close(self.ledger, wait.close)
        held = [entry.connection.pool.database.home for entry in wait.held if entry.connection is not None]
        raise CheckoutTimeoutError(
            f"no connection to {self.database.home}, ever: {_listed(wait.bounds)} leaves no room, and all that could "
            f"make some is held by callers who wait for one themselves; this one holds {', '.join(held)}. End that "
            f"block first, or raise {' or '.join(wait.bounds)}",
            database=self.database,
            bounds=wait.bounds,
            held=held,
        )

    def recreate(self) -> LedgerPool:
        return LedgerPool(
            self._creator,
            self.ledger,
            self.database,
            self.kind,
            self.checkout_timeout,
            echo=self.echo,
            logging_name=self._orig_logging_name,
            dialect=self._dialect,
            _dispatch=self.dispatch,
        )

    def dispose(self) -> None:
        perform(self.ledger, self.ledger.discard(self.database.key))

    def status(self) -> str:
        return f"{self.database.home}: {self.ledger.stats()}"


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
    """Do what a step of the ledger leaves to do: wake who waits, close what has to go."""
    for wait in step.wake:
        wait.turn.set()
    if step.close:
        close(ledger, step.close)


def close(ledger: Books, entries: Sequence[Entry[object, CachedConnection]]) -> None:
    """Close *entries*, all of them even when one is interrupted, and book each as closed."""
    with ExitStack() as rest:
        for entry in entries:
            rest.callback(_close, ledger, entry)


def _close(ledger: Books, entry: Entry[object, CachedConnection]) -> None:
    try:
        if entry.connection is not None:
            entry.connection.close()
    finally:
        perform(ledger, ledger.closed(entry))
