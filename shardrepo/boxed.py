"""The driver's side of a sandbox: a transaction that is never committed, and connections whose own ones lie in it.

Whoever takes a connection in a sandbox gets a `BoxedConnection`, which sends what it is told on the sandbox's only one
of that database: what would begin a transaction begins a savepoint, and so does each statement that would be committed
by itself, so that one that fails spoils nothing. `box` sees to it that one thread at a time does so.

Leans on what psycopg does not document, beside what `connection` does, tested in ``tests/test_private_api.py``: a
connection begins its transactions in ``_start_query``, keeps how many of its own blocks are open in
``_num_transactions``, and changes a setting by generators that another connection's ``wait`` may run.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, Final, Literal, TypeAlias

import psycopg
from psycopg import generators, pq
from psycopg.errors import error_from_result

from .callsite import CallSite
from .connection import RESET, DriverConnection, NoAnswer, until
from .database import Database
from .levels import Level, Levels

_STATUS: Final = pq.TransactionStatus

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


class Outer:
    """The transaction of a sandbox in one database, on its real connection. All others lie in it.

    Whoever's turn it is calls these.

    Args:
        real: The connection, in no transaction.
        check_deferred: Whether deferred constraints are checked where a transaction would be committed.

    Attributes:
        levels: The transactions that are open in it.
        ended_by_hand: Where somebody has ended it, which is not for anybody to do.
    """

    def __init__(self, real: DriverConnection, *, check_deferred: bool) -> None:
        self.real = real
        self.levels = Levels()
        self.ended_by_hand: list[str] = []
        self._check_deferred = check_deferred
        # What is to be sent before anything else, with which it goes in one message.
        self._due = _BEGIN
        # Those of the real one, which the connections on it put theirs in the place of.
        self._handlers = real.pgconn.notice_handler, real.pgconn.notify_handler

    @property
    def is_begun(self) -> bool:
        """Whether it was begun; the first to send something does that."""
        return self._due != _BEGIN

    @property
    def is_lost(self) -> bool:
        """Whether the connection is closed, and it is gone with that."""
        return self.real.closed

    @property
    def _has_failed(self) -> bool:
        return self.real.pgconn.transaction_status == _STATUS.INERROR

    def send(self, sql: str = "") -> None:
        """Send what was put off, and *sql*, whatever time its borrower has left."""
        if sql := self.with_due(sql):
            self.real.wait(_exchange(self.real.pgconn, sql))

    def with_due(self, sql: str) -> str:
        """*sql*, after what was put off, which the caller sends with it."""
        due, self._due = self._due, ""
        return f"{due}; {sql}" if due and sql else due or sql

    def end(self, level: Level, *, keep: bool) -> None:
        """Commit a transaction in it, or roll it back; one that has failed is rolled back."""
        failed = self._has_failed
        if keep and not failed:
            self._due = self.with_due(self.levels.keep(level))
        elif sql := self.levels.undo(level, failed=failed):
            self.send(sql)

    def check(self) -> None:
        """Have deferred constraints say what they would say to a COMMIT, if they are to and this is one."""
        if self._check_deferred and len(self.levels) == 1 and not self._has_failed:
            self.send(_CHECK)

    def tidy(self) -> None:
        """Undo what SQL may have set in the session, as nobody has it."""
        self.send(RESET)

    def was_ended(self) -> None:
        """Begin again: somebody has ended it by hand."""
        self.ended_by_hand.append(CallSite().line)
        self.levels.forget()
        self._due = _BEGIN

    def start_rollback(self) -> None:
        """Send what undoes all of it. Others may be sent theirs before the answer is waited for."""
        if self.is_begun:
            self._due = ""
            with suppress(psycopg.Error):  # a server that is gone has rolled back
                self.real.pgconn.send_query(b"ROLLBACK")

    def finish_rollback(self) -> None:
        """Wait until all of it is undone, and let go of the connection."""
        with suppress(psycopg.Error):
            self.real.wait(_answer(self.real.pgconn))
        self.real.pgconn.notice_handler, self.real.pgconn.notify_handler = self._handlers


class BoxedConnection(DriverConnection):
    """A connection whose transactions are savepoints, on a connection that is others' too.

    Attributes:
        outer: What its own transactions lie in.
        level: The one that is open, if one is.
        does: What is being executed.
    """

    level: Level | None
    does: Doing
    outer: Outer
    _is_closed: bool

    @classmethod
    def of(cls, outer: Outer, database: Database) -> BoxedConnection:
        """A connection on *outer*'s real one, for who has chosen *database*, which that leads to."""
        real = outer.real
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
        connection.outer, connection._is_closed = outer, False
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
                self.outer.send()
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
        self.level, sql = self.outer.levels.begin()
        self.outer.send(f"{sql}; SET TRANSACTION READ ONLY" if self._read_only else sql)

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
        if status == _STATUS.IDLE and self.outer.is_begun:
            self.level = None
            self.outer.was_ended()
        elif self._stands_by_itself and not self._num_transactions:
            self._end(keep=True)

    def _start_query(self) -> Generator[Any, Any, None]:
        if self._stands_by_itself or self.level is not None:
            return
        self.level, sql = self.outer.levels.begin()
        sql = self.outer.with_due(sql)
        if self._pipeline is None:
            yield from _exchange(self.pgconn, sql)
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
                self.outer.check()
        except psycopg.Error:
            self.outer.end(level, keep=False)
            raise
        self.outer.end(level, keep=keep)

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


def _exchange(pgconn: Any, sql: str) -> Generator[Any, Any, None]:
    """Send several statements as one message, and hear what became of them."""
    pgconn.send_query(sql.encode())
    yield from _answer(pgconn)


def _answer(pgconn: Any) -> Generator[Any, Any, None]:
    for result in (yield from generators.execute(pgconn)):
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise error_from_result(result)
