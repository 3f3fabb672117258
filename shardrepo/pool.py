"""SQLAlchemy's pool over the ledger: it does what the ledger decides, outside the ledger's lock.

This is the one place that leans on SQLAlchemy's pool internals: a `Pool` subclass is asked for a
``_ConnectionRecord`` by ``_do_get`` and gets it back by ``_do_return_conn``, and a record knows by
the dead ``fairy_ref`` that it comes back from a finaliser. ``tests/test_private_api.py`` fails when that changes.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from time import monotonic
from typing import Any, Final, TypeAlias

from psycopg.pq import TransactionStatus
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import ConnectionPoolEntry, Pool
from sqlalchemy.pool.base import _ConnectionRecord

from .database import Database
from .driver import DriverConnection
from .errors import CheckoutTimeoutError, RepoDisposedError
from .ledger import NOTHING, Entry, Kind, Ledger, State, Step, Wait

Books: TypeAlias = "Ledger[object, CachedConnection]"

logger: Final = logging.getLogger("shardrepo")

_IDLE: Final = int(TransactionStatus.IDLE)
_IN_TRANSACTION: Final = (int(TransactionStatus.INTRANS), int(TransactionStatus.INERROR))

# DISCARD ALL without its DEALLOCATE ALL and DISCARD PLANS, so that prepared statements stay, in one round
# trip (https://www.postgresql.org/docs/current/sql-discard.html).
RESET: Final = (
    "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; "
    "SELECT pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES"
)


class CachedConnection(_ConnectionRecord):
    """One connection of the cache, as SQLAlchemy's pools see it."""

    __slots__ = ("entry", "ledger", "owner_pid", "vouched")

    dbapi_connection: DriverConnection | None  # type: ignore[assignment]  # no other driver comes here

    def __init__(self, pool: LedgerPool, entry: Entry[object, CachedConnection]) -> None:
        self.entry = entry
        self.ledger = pool.ledger
        self.owner_pid = os.getpid()
        self.vouched = False
        super().__init__(pool)

    def lend(self) -> None:
        """Prepare for a new borrower, whose SQL is the user's own until somebody vouches for it."""
        connection = self.dbapi_connection
        if connection is not None:
            if connection.autocommit:
                connection.autocommit = False
            connection.used = False
        self.vouched = False

    def checkin(self, _fairy_was_created: bool = True) -> None:
        if not (_fairy_was_created and self.fairy_ref is not None and self.fairy_ref() is None):
            _ConnectionRecord.checkin(self, _fairy_was_created)
            return
        # A finaliser runs this, perhaps inside the ledger's locked section: do no I/O, take no lock.
        self.fairy_ref = None
        self.finalize_callback.clear()
        if self.owner_pid == os.getpid():
            self.ledger.reclaimed(self.entry)

    def tidy(self) -> bool:
        """End what the borrower left behind; False if the connection cannot be used again."""
        connection = self.dbapi_connection
        if connection is None:
            return False
        try:
            status = connection.pgconn.transaction_status
            if status == _IDLE and (self.vouched or not connection.used):
                return True
            if status != _IDLE:
                if status not in _IN_TRANSACTION:
                    return False
                connection.rollback()
            if not self.vouched:
                _reset(connection)
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
        self.kind = kind
        self.checkout_timeout = checkout_timeout
        # Set by the cache: an engine lives as long as one of its connections does.
        self.engine: Engine | None = None

    def _do_get(self) -> ConnectionPoolEntry:
        ledger = self.ledger
        if ledger.disposed:
            raise RepoDisposedError(f"cannot connect to {self.database.home}: this repo was disposed; define a new one")
        grant = ledger.acquire(self.database.key, self.kind)
        if isinstance(grant, Wait):
            grant = self._await(grant)
        try:
            if grant.close:
                close(ledger, grant.close)
            record = grant.connection or self._open(grant)
            record.lend()
        except BaseException:
            self._end(grant)
            raise
        return record

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        assert type(record) is CachedConnection
        if record.owner_pid != os.getpid():
            return  # the parent's: its socket is not ours to touch
        reusable = False
        try:
            reusable = record.tidy()
        finally:
            step = self.ledger.release(record.entry, reusable)
            if step is not NOTHING:
                perform(self.ledger, step)

    def _open(self, entry: Entry[object, CachedConnection]) -> CachedConnection:
        record = CachedConnection(self, entry)
        perform(self.ledger, self.ledger.opened(entry, record))
        return record

    def _end(self, entry: Entry[object, CachedConnection]) -> None:
        """Give a grant back that nobody will use."""
        if entry.state is State.CONNECTING:
            perform(self.ledger, self.ledger.failed(entry))
        elif entry.state is State.IN_USE:
            perform(self.ledger, self.ledger.release(entry, reusable=False))

    def _await(self, wait: Wait[object, CachedConnection]) -> Entry[object, CachedConnection]:
        begun = monotonic()
        close(self.ledger, wait.close)
        assert isinstance(wait.turn, threading.Event)
        if not wait.turn.wait(self.checkout_timeout) and self.ledger.give_up(wait) is None:
            stats = self.ledger.stats()
            raise CheckoutTimeoutError(
                f"no connection to {self.database.home} within {monotonic() - begun:.1f} s: {stats.in_use} in use, "
                f"{stats.connecting} connecting, max_connections={self.ledger.max_connections}, {stats.waiting} "
                "waiting. Hold connections for less time, or raise max_connections",
                database=self.database,
            )
        assert wait.grant is not None
        return wait.grant

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


def vouch(connection: Connection, *, autocommit: bool) -> None:
    """Say that only the library's own statements will run on *connection*, which leave nothing behind to reset.

    With *autocommit*, each is committed by itself and no BEGIN is sent.
    """
    record = record_of(connection)
    record.vouched = True
    if autocommit and record.dbapi_connection is not None:
        record.dbapi_connection.autocommit = True


def disown(connection: Connection) -> None:
    """Take back what `vouch` said: the user's own SQL is about to run."""
    record_of(connection).vouched = False


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


def _reset(connection: DriverConnection) -> None:
    if connection.isolation_level is not None:
        connection.isolation_level = None
    if connection.read_only is not None:
        connection.read_only = None
    if connection.deferrable is not None:
        connection.deferrable = None
    connection.autocommit = True
    connection.execute(RESET, prepare=False)
