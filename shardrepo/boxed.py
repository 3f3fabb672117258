"""One database in a sandbox: its only connection, in a transaction that is never committed, and whose turn it is.

Whoever takes a connection there gets a `BoxedConnection`, which sends what it is told on that one: what would begin a
transaction begins a savepoint, and so does each statement that would be committed by itself, so that one that fails
spoils nothing. One thread at a time has it, from its first checkout to its last return.

Leans on what psycopg does not document, beside what `connection` does, tested in ``tests/test_private_api.py``: a
connection begins its transactions in ``_start_query``, keeps how many of its own blocks are open in
``_num_transactions``, and changes a setting by generators that another connection's ``wait`` may run.
"""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, Final, Literal, TypeAlias

import psycopg
from psycopg import generators, pq
from psycopg.errors import error_from_result

from .calls import deadline
from .callsite import CallSite
from .connection import RESET, DriverConnection, NoAnswer, until
from .database import Database
from .entries import Kind
from .errors import CheckoutTimeoutError, RepoDisposedError, SandboxError
from .levels import Level, Levels
from .pool import CachedConnection, LedgerPool, on_behalf_of

_STATUS: Final = pq.TransactionStatus

# Seconds between two looks for a connection whose holder is gone, which nobody tells of.
_LOOK: Final = 0.05

# Seconds in which a statement has to end once the server was asked to stop it.
_ENDING: Final = 5.0

_BEGIN: Final = "BEGIN"

# Fires what deferred constraints have to say, and has them wait as before.
_CHECK: Final = (
    "SAVEPOINT shardrepo_check; SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK TO shardrepo_check; RELEASE shardrepo_check"
)

# What a statement does: read, write, or mark where a savepoint is.
Doing: TypeAlias = Literal["reading", "writing", "marking"]
_DOES: Final[tuple[tuple[Doing, re.Pattern[str]], ...]] = (
    ("reading", re.compile(r"\s*(SELECT|SHOW|FETCH|EXPLAIN|SET|RESET)\b", re.IGNORECASE)),
    ("marking", re.compile(r"\s*(SAVEPOINT|RELEASE|ROLLBACK\s+TO)\b", re.IGNORECASE)),
)


class Box:
    """The connection of one database in a sandbox. Opened when it is first wanted.

    Args:
        borrower: Whose it is, in the books of the cache.
        check_deferred: Whether deferred constraints are checked where a transaction would be committed.

    Attributes:
        database: Where it leads, once it was opened; None before.
        levels: The transactions that are open in it. Its holder's to change.
    """

    def __init__(self, borrower: object, check_deferred: bool) -> None:
        self.database: Database | None = None
        self.levels = Levels()
        self._check_deferred = check_deferred
        self._borrower = borrower
        self._record: CachedConnection | None = None
        self._handlers: tuple[Any, Any] = None, None
        # Keys of the cache whose users and passwords the server has accepted.
        self._accepted: set[object] = set()
        # Guards what follows: no I/O happens under it.
        self._changed = threading.Condition()
        self._holder: threading.Thread | None = None
        self._held = 0
        self._lent: set[Lent] = set()
        # Those whose holders were collected; finalisers append, and take no lock.
        self._lost: deque[Lent] = deque()
        self._is_untidy = False
        # What is to be sent before anything else, with which it goes in one message.
        self._due = ""
        self._ended_by_hand: list[str] = []

    def lend(self, pool: LedgerPool) -> Lent:
        """A connection for the caller, once it is this thread's turn.

        Raises:
            CheckoutTimeoutError: Another thread has it, and did not return it in time; or a bound left no room for it.
            SandboxError: It was lost, and with it what the sandbox had written.
        """
        site = CallSite()
        self._take_turn(pool, site)
        try:
            lent = Lent(pool, self, self._opened(pool), site)
        except BaseException:
            self._end_turn()
            raise
        self._lent.add(lent)
        return lent

    def take_back(self, lent: Lent) -> None:
        """Roll back what its borrower left open, and undo what SQL has set; then it is the next one's turn."""
        if lent not in self._lent:
            return
        try:
            self._leave(lent)
            if self._is_untidy and len(self._lent) == 1 and not self._is_gone:
                self.send(RESET)
                self._is_untidy = False
        finally:
            # Who has it still, detached or the driver's own, would be on a connection that is somebody else's by then.
            lent.boxed.abandon()
            self._lent.discard(lent)
            self._end_turn()

    def reclaimed(self, lent: Lent) -> None:
        """Its borrower is gone. Takes no lock: finalisers call this."""
        self._lost.append(lent)

    def send(self, sql: str = "") -> None:
        """Send what was put off, and *sql*, on the connection, whatever time its borrower has left."""
        connection = self._connection
        if sql := self.with_due(sql):
            connection.wait(exchange(connection.pgconn, sql))

    def with_due(self, sql: str) -> str:
        """*sql*, after what was put off, which the caller sends with it."""
        due, self._due = self._due, ""
        return f"{due}; {sql}" if due and sql else due or sql

    @property
    def is_begun(self) -> bool:
        """Whether its transaction was begun."""
        return self._due != _BEGIN

    def end_level(self, level: Level, *, keep: bool) -> None:
        """Commit a transaction in it, or roll it back; one that has failed is rolled back."""
        failed = self._has_failed
        sql = self.levels.keep(level) if keep and not failed else self.levels.undo(level, failed=failed)
        if keep and not failed:
            self._due = self.with_due(sql)
        elif sql:
            self.send(sql)

    def check(self) -> None:
        """Have deferred constraints say what they would say to a COMMIT, if they are to and this is one."""
        if self._check_deferred and len(self.levels) == 1 and not self._has_failed:
            self.send(_CHECK)

    def was_ended(self) -> None:
        """Begin again: somebody has ended the transaction by hand."""
        self._ended_by_hand.append(CallSite().line)
        self.levels.forget()
        self._due = _BEGIN

    def end(self) -> list[str]:
        """Roll back, and return the connection to the cache; what was not as it should be."""
        while self._lost:
            self._leave(self._lost[0])
            self._lent.discard(self._lost.popleft())
        record, where = self._record, self.database
        if record is None or where is None:
            return []
        problems = [f"{where.home}: {problem}" for problem in self._problems()]
        connection = record.dbapi_connection
        for lent in self._lent:
            lent.boxed.abandon()
        if connection is not None and not self._lent:
            if self.is_begun:
                self._due = ""
                with suppress(psycopg.Error):  # a server that is gone has rolled back
                    self.send("ROLLBACK")
            connection.pgconn.notice_handler, connection.pgconn.notify_handler = self._handlers
            # All that was set in it was set in the transaction, or reset when it was returned.
            record.vouched = True
        else:
            # Whoever has it may be using it at this moment: nobody else may get it.
            record.invalidate()
        record.give_back()
        return problems

    def _problems(self) -> list[str]:
        problems = [
            f"a connection is still in use; {lent.taken.thread} took it at {lent.taken.line}: leave its block, or "
            "close its session, before the sandbox ends"
            for lent in self._lent
            if lent.taken is not None
        ]
        if self._is_gone:
            problems.append(f"its connection was lost: {_LOST}")
        problems += [
            f"the transaction was ended by hand at {line}: what had been written until then may be there for good; let "
            "`with repo.transaction():` do it, or use sandbox.unboxed(...)"
            for line in self._ended_by_hand
        ]
        if self.levels.has_undone:
            problems.append(
                "what one unit of work had committed was undone when another one, begun before it, was rolled back: "
                "they share one connection here. Let them end in the order of a stack, or use sandbox.unboxed(...)"
            )
        return problems

    # Whose turn it is

    def _take_turn(self, pool: LedgerPool, site: CallSite) -> None:
        caller, begun = threading.current_thread(), monotonic()
        latest = begun + pool.settings.checkout_timeout
        latest = min(latest, deadline.get() or latest)
        with self._changed:
            while not self._is_free_for(caller):
                left = latest - monotonic()
                if left <= 0:
                    raise self._timed_out(pool, site, monotonic() - begun)
                self._changed.wait(min(left, _LOOK))
            self._holder = caller
            self._held += 1

    def _is_free_for(self, caller: threading.Thread) -> bool:
        active = self._held - len(self._lost)
        return active == 0 or self._holder is caller or self._holder is None or not self._holder.is_alive()

    def _end_turn(self) -> None:
        with self._changed:
            self._held -= 1
            if self._held == 0:
                self._holder = None
            self._changed.notify_all()

    def _timed_out(self, pool: LedgerPool, site: CallSite, seconds: float) -> CheckoutTimeoutError:
        holder = self._holder
        taken = next((str(lent.taken) for lent in list(self._lent)), "nobody knows where")
        frame = None if holder is None else sys._current_frames().get(holder.ident or 0)
        now = "".join(traceback.format_stack(frame)) if frame is not None else "nobody knows where\n"
        return CheckoutTimeoutError(
            f"no connection to {pool.database.home} within {seconds:.1f} s: a sandbox has one of each database, and "
            f"{holder.name if holder is not None else 'a thread'} has this one. Return it there first, by leaving the "
            f"block or closing the session that has it.\n\nTaken at:\n{taken}\n\nIts thread is at:\n{now}\n"
            f"Wanted at:\n{site}",
            database=pool.database,
            bounds={},
        )

    # The connection; whoever has the turn calls these

    @property
    def _connection(self) -> DriverConnection:
        connection = None if self._record is None else self._record.dbapi_connection
        assert connection is not None
        return connection

    @property
    def _has_failed(self) -> bool:
        return self._connection.pgconn.transaction_status == _STATUS.INERROR

    @property
    def _is_gone(self) -> bool:
        connection = None if self._record is None else self._record.dbapi_connection
        return self._record is not None and (connection is None or connection.closed)

    def _opened(self, pool: LedgerPool) -> DriverConnection:
        if pool.ledger.disposed:
            raise RepoDisposedError(f"{pool.database.home} is a disposed repo's: define a new one")
        if self._record is None:
            self._open(pool)
        elif self._is_gone:
            raise SandboxError(f"the sandbox's connection to {pool.database.home} was lost: {_LOST}")
        elif pool.database.key not in self._accepted:
            # Another user, password or option. It gets this connection only if the server would have it.
            pool.take_aside(Kind.TRANSIENT).give_back()
        self._accepted.add(pool.database.key)
        while self._lost:
            self.take_back(self._lost.popleft())
        return self._connection

    def _open(self, pool: LedgerPool) -> None:
        token = on_behalf_of.set(self._borrower)
        try:
            record = pool.take_aside(Kind.PINNED)
        except CheckoutTimeoutError as error:
            if not error.held:
                raise
            raise SandboxError(
                f"the sandbox has a connection to each of {', '.join(error.held)}, and there may be no other one, to "
                f"{pool.database.home}: raise {' or '.join(error.bounds)} for tests, or use fewer databases in this one"
            ) from error
        finally:
            on_behalf_of.reset(token)
        record.taken = None  # held for long by design, which is no leak
        self._record, self.database = record, pool.database
        pgconn = self._connection.pgconn
        self._handlers = pgconn.notice_handler, pgconn.notify_handler
        self._due = _BEGIN

    def _leave(self, lent: Lent) -> None:
        """End the transaction of one who returns it, or is gone."""
        connection = lent.boxed
        self._is_untidy |= (connection.used and not lent.vouched) or connection.leaves_traces
        if not self._is_gone:
            connection.leave()


class Lent(CachedConnection):
    """A connection that a box has lent, as SQLAlchemy's pools see it."""

    __slots__ = ("box", "boxed")

    def __init__(self, pool: LedgerPool, box: Box, real: DriverConnection, site: CallSite) -> None:
        record = box._record
        assert record is not None
        super().__init__(pool, record.entry, connect=False)
        self.box = box
        self.taken = site
        self.dbapi_connection = self.boxed = BoxedConnection.of(real, box, pool.database)

    def get_connection(self) -> Any:
        # Never connects anew: that would lead out of the box.
        return self.boxed

    def give_back(self) -> None:
        self.box.take_back(self)
        self.pool.listeners.tell("checkin", self.pool.database, monotonic() - self.opened_at)

    def reclaimed(self) -> None:
        self.box.reclaimed(self)


class BoxedConnection(DriverConnection):
    """A connection whose transactions are savepoints, on a connection that is others' too.

    Attributes:
        level: Its transaction, if one is open.
        does: What is being executed.
    """

    level: Level | None
    does: Doing
    _box: Box
    _is_closed: bool

    @classmethod
    def of(cls, real: DriverConnection, box: Box, database: Database) -> BoxedConnection:
        """A connection on *real*, the one of *box*."""
        connection = cls(real.pgconn)
        connection.adapt_as(real)
        connection.row_factory = real.row_factory
        connection.cursor_factory = BoxedCursor
        connection.server_cursor_factory = real.server_cursor_factory
        # What is prepared is so for whoever is on it.
        connection._prepared = real._prepared
        connection.database = database
        connection.pooled, connection.reads_only = real.pooled, real.reads_only
        connection.level, connection.does = None, "reading"
        connection._box, connection._is_closed = box, False
        connection.rest()
        return connection

    def __del__(self, *_: Any) -> None:
        pass  # psycopg's own warns of one that is still open: this one is not its to close

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_open()
        self._settle()
        if self.pgconn.transaction_status != _STATUS.ACTIVE and not self.pgconn.pipeline_status:
            if self._stands_by_itself and self.level is None and self.does != "marking":
                self._begin()
            elif self._stands_by_itself or self.level is not None:
                self._box.send()
        try:
            return super().wait(gen, *args, **kwargs)
        except psycopg.errors.ActiveSqlTransaction as error:
            error.add_note(f"{self.database.home} is in a sandbox, which is a transaction: use sandbox.unboxed(...)")
            raise
        finally:
            self._settle()

    @contextmanager
    def transaction(self, *args: Any, **kwargs: Any) -> Iterator[psycopg.Transaction]:
        """psycopg's own; where none is open it begins one, which is more than the savepoint that it takes here."""
        begins = self.level is None
        if begins:
            self._begin()
        try:
            with super().transaction(*args, **kwargs) as transaction:
                yield transaction
        finally:
            if begins:
                self._end(keep=True)

    def _begin(self) -> None:
        self.level, sql = self._box.levels.begin()
        self._box.send(f"{sql}; SET TRANSACTION READ ONLY" if self._read_only else sql)

    @property
    def _stands_by_itself(self) -> bool:
        """Whether a statement is a transaction: in autocommit mode, and where nothing is written anyway, so that what
        others write meanwhile is not undone with it, nor refused."""
        return self._autocommit or bool(self._read_only)

    def _settle(self) -> None:
        """See what an exchange with the server has come to; a statement that stands by itself is over then."""
        # psycopg leaves its pipelines without asking for anything, so that one may be over since.
        status = self.pgconn.transaction_status
        if self.level is not None:
            self.level.wrote |= self.does == "writing"
        if self.closed or self.pgconn.pipeline_status or status == _STATUS.ACTIVE:
            return
        if status == _STATUS.IDLE and self._box.is_begun:
            self.level = None
            self._box.was_ended()
        elif self._stands_by_itself and not self._num_transactions:
            self._end(keep=True)

    def _start_query(self) -> Generator[Any, Any, None]:
        if self._stands_by_itself or self.level is not None:
            return
        self.level, sql = self._box.levels.begin()
        sql = self._box.with_due(sql)
        if self._pipeline is None:
            yield from exchange(self.pgconn, sql)
        else:
            for statement in sql.split("; "):
                yield from self._exec_command(statement.encode())

    def leave(self) -> None:
        """End what its borrower has left open."""
        if self._stands_by_itself:
            self._settle()
        self._end(keep=False)

    def abandon(self) -> None:
        """Be of no use any more: it was returned, or the sandbox is over."""
        self._is_closed, self.level = True, None

    def _check_open(self) -> None:
        if self._is_closed:
            raise psycopg.OperationalError("this connection was closed or returned, or its sandbox is over")

    def commit(self) -> None:
        self._check_open()
        if self._deadline is not None and self._deadline <= monotonic():
            raise NoAnswer("its time was over before anything was sent")
        self._end(keep=True)

    def rollback(self) -> None:
        self._end(keep=False)

    def _end(self, *, keep: bool) -> None:
        level, self.level = self.level, None
        if level is None:
            return
        try:
            if keep and level.wrote:
                self._box.check()
        except psycopg.Error:
            self._box.end_level(level, keep=False)
            raise
        self._box.end_level(level, keep=keep)

    @property
    def is_at_rest(self) -> bool:
        self._settle()
        return self.level is None

    @property
    def closed(self) -> bool:
        return self._is_closed or super().closed

    def close(self) -> None:
        """Roll back, and send nothing any more; the connection is not this one's to close."""
        if not self.closed:
            self._is_closed = True
            self._end(keep=False)

    def reset(self) -> None:
        raise NotImplementedError("the box does, when nobody has it")

    def set_autocommit(self, value: bool) -> None:
        self._set("autocommit", self._set_autocommit_gen(value))

    def set_isolation_level(self, value: Any) -> None:
        self._set("isolation_level", self._set_isolation_level_gen(value))

    def set_read_only(self, value: bool | None) -> None:
        self._set("read_only", self._set_read_only_gen(value))

    def set_deferrable(self, value: bool | None) -> None:
        self._set("deferrable", self._set_deferrable_gen(value))

    def _set(self, name: str, change: Any) -> None:
        if self.level is not None:
            raise psycopg.ProgrammingError(f"can't change {name!r} now: a transaction is open")
        super().wait(change)

    def _check_intrans_gen(self, attribute: str) -> Generator[Any, Any, None]:  # noqa: ARG002  # psycopg's
        yield from ()

    def _give_up(self, exchange: Any) -> None:
        """Close, as any other would, after the server has stopped what it does: the sandbox's own stays open."""
        if self.pgconn.transaction_status == _STATUS.ACTIVE:
            try:
                self.cancel_safe(timeout=_ENDING)
                until(monotonic() + _ENDING, exchange, self.pgconn.socket)
            except NoAnswer:
                self.pgconn.finish()
            except psycopg.Error:
                pass  # as it was asked to
        self.close()


class BoxedCursor(psycopg.Cursor[Any]):
    """A cursor that tells its connection what it does."""

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        with _doing(self, _what(query)):
            return super().execute(query, *args, **kwargs)

    def executemany(self, *args: Any, **kwargs: Any) -> None:
        with _doing(self, "writing"):
            super().executemany(*args, **kwargs)

    @contextmanager
    def copy(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with _doing(self, "writing"), super().copy(*args, **kwargs) as copy:
            yield copy


def _what(query: Any) -> Doing:
    if isinstance(query, str):
        for does, pattern in _DOES:
            if pattern.match(query):
                return does
    return "writing"


@contextmanager
def _doing(cursor: psycopg.Cursor[Any], does: Doing) -> Iterator[None]:
    connection = cursor.connection
    assert isinstance(connection, BoxedConnection)
    connection.does = does
    try:
        yield
    finally:
        connection.does = "reading"


_LOST: Final = "what this test had written there is gone. Do what ends connections in sandbox.unboxed(...)"


def exchange(pgconn: Any, sql: str) -> Generator[Any, Any, None]:
    """Send several statements as one message, and hear what became of them."""
    pgconn.send_query(sql.encode())
    for result in (yield from generators.execute(pgconn)):
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise error_from_result(result)
