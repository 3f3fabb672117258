"""The driver's side of a sandbox: a transaction that is never committed, and connections whose own ones lie in it.

Whoever takes a connection in a sandbox gets a `BoxedConnection`, which sends what it is told on the sandbox's only one
of that database: what would begin a transaction begins a savepoint, and so does each statement that would be committed
by itself, so that one that fails spoils nothing. `box` sees to it that one thread at a time does so.

Leans on what psycopg does not document, beside what `connection` does, tested in ``tests/test_private_api.py``: a
connection begins its transactions in ``_start_query``, sends commands of its own by ``_exec_command``, keeps how many
of its own blocks are open in ``_num_transactions``, and changes a setting by generators that another connection's
``wait`` may run.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from time import monotonic
from typing import Any, Final, Literal, TypeAlias

import psycopg
from psycopg import generators, pq
from psycopg.errors import error_from_result

from .callsite import CallSite
from .connection import RESET, DriverConnection, NoAnswer, until
from .database import Database
from .errors import SandboxError
from .levels import Level, Levels

_STATUS: Final = pq.TransactionStatus

# Seconds in which a statement has to end once the server was asked to stop it.
_ENDING: Final = 5.0

# Begins its transaction, with a savepoint that is there until that ends, by whomever.
_BEGIN: Final = "BEGIN; SAVEPOINT shardrepo_begun"
_END: Final = "ROLLBACK TO shardrepo_begun; ROLLBACK"

# What of `RESET` a rollback does not do.
_OUTLIVES: Final = "SELECT pg_advisory_unlock_all(); DISCARD SEQUENCES"

# Fires what deferred constraints have to say, and has them wait as before.
_CHECK: Final = (
    "SAVEPOINT shardrepo_check; SET CONSTRAINTS ALL IMMEDIATE; ROLLBACK TO shardrepo_check; RELEASE shardrepo_check"
)

# What a statement does: read, write, or mark where a savepoint is.
Doing: TypeAlias = Literal["reading", "writing", "marking"]

# What may stand before a statement's first word.
_LEAD: Final = r"(?:\s|\(|--[^\n]*\n|/\*.*?\*/)*"
_READS: Final = re.compile(
    rf"{_LEAD}(?:SELECT|TABLE|VALUES|SHOW|FETCH|EXPLAIN|SET|RESET|WITH(?!.*\b(?:INSERT|UPDATE|DELETE|MERGE)\b))\b",
    re.IGNORECASE | re.DOTALL,
)
_MARKS: Final = re.compile(
    r"\s*(SAVEPOINT|RELEASE(?:\s+SAVEPOINT)?|ROLLBACK(?:\s+(?:WORK|TRANSACTION))?\s+TO(?:\s+SAVEPOINT)?)"
    r"\s+(\"(?:[^\"]|\"\")+\"|\w+)\s*;?\s*",
    re.IGNORECASE,
)

# What can be done in no transaction: VACUUM, and a COMMIT in a procedure.
_NEEDS_A_COMMIT: Final = (psycopg.errors.ActiveSqlTransaction, psycopg.errors.InvalidTransactionTermination)

# What becomes of a sandbox whose connection is closed.
LOST: Final = "what this test had written there is gone. Do what ends connections in sandbox.unboxed(...)"


class Outer:
    """The transaction of a sandbox in one database, on its real connection. All others lie in it.

    Whoever's turn it is calls these.

    Args:
        real: The connection, in no transaction.
        check_deferred: Whether deferred constraints are checked where a transaction would be committed.
        patience: Seconds that the server has to answer what is not the borrower's own.

    Attributes:
        levels: The transactions that are open in it.
        is_begun: Whether it was begun itself, which is put off at first.
        busy: Who is in the middle of an exchange with the server, if anybody is.
    """

    def __init__(self, real: DriverConnection, *, check_deferred: bool, patience: float) -> None:
        self.real = real
        self.levels = Levels()
        self.is_begun = False
        self.busy: BoxedConnection | None = None
        self._check_deferred = check_deferred
        self._patience = patience
        # What is to be sent before anything else, with which it goes in one message.
        self._due = _BEGIN
        self._ended_by_hand: list[str] = []
        self._undone_at = ""
        # Those of the real one, in whose place the connections on it put theirs.
        self._handlers = real.pgconn.notice_handler, real.pgconn.notify_handler

    @property
    def is_lost(self) -> bool:
        """Whether the connection is closed, and all that was written with it gone."""
        return self.real.closed

    @property
    def has_failed(self) -> bool:
        """Whether a statement has failed in it, so that the server refuses all others."""
        return self.real.pgconn.transaction_status == _STATUS.INERROR

    @property
    def is_busy(self) -> bool:
        """Whether an exchange with the server is under way: a COPY, a pipeline, or rows that come one by one."""
        pgconn = self.real.pgconn
        return pgconn.transaction_status == _STATUS.ACTIVE or bool(pgconn.pipeline_status)

    def send(self, sql: str) -> None:
        """Send what was put off, and *sql*, on the connection, whatever time its borrower has left."""
        self.check_free()
        # As long as a server may take to show that it is there.
        self.real.limit(monotonic() + self._patience)
        self.real.wait(self.exchange(sql))

    def exchange(self, sql: str) -> Generator[Any, Any, None]:
        """Send what was put off, and *sql*, as one message, and hear what became of it.

        Raises:
            SandboxError: Somebody has ended the transaction, and begun another one, since.
        """
        self.real.pgconn.send_query(self.with_due(sql).encode())
        try:
            yield from _answer(self.real.pgconn)
        except psycopg.errors.InvalidSavepointSpecification as error:
            self.was_ended()
            # What was put off has not come to pass, and what undoes a borrower's settings may be of it.
            self._due = f"ROLLBACK; {RESET}; {_BEGIN}"
            raise SandboxError(self._ended_by_hand[-1]) from error

    @property
    def has_due(self) -> bool:
        """Whether something was put off."""
        return bool(self._due)

    def with_due(self, sql: str) -> str:
        """*sql*, after what was put off, which the caller sends with it."""
        due, self._due, self.is_begun = self._due, "", True
        return f"{due}; {sql}" if due and sql else due or sql

    def put_off(self, sql: str) -> None:
        """Send *sql* before whatever is sent next, in one message with it; or never."""
        self._due = "; ".join(filter(None, (self._due, sql)))

    def check_free(self, connection: BoxedConnection | None = None) -> None:
        """Raise `SandboxError` if anybody but *connection* is in the middle of an exchange with the server."""
        if self.is_busy and (connection is None or self.busy is not connection):
            raise SandboxError(
                f"a COPY, a pipeline or a stream of the driver's is under way on {self.real.database.home}, of which a "
                "sandbox has one connection: end that first, or collect before it what is needed in it"
            )

    def end(self, level: Level, *, keep: bool) -> None:
        """Commit a transaction in it, or roll it back; one that has failed is rolled back."""
        with self._noting():
            self._end(level, keep=keep)

    def go_back(self, level: Level) -> str:
        """What undoes all since *level*, a savepoint."""
        with self._noting():
            return self.levels.go_back(level, failed=self.has_failed)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Note where something was undone, or committed, so that it is not as it would be without a sandbox."""
        before = self.levels.has_undone
        yield
        if self.levels.has_undone and not before:
            self._undone_at = CallSite().line

    def _end(self, level: Level, *, keep: bool) -> None:
        if keep and not self.has_failed:
            self.put_off(self.levels.keep(level))
        elif sql := self.levels.undo(level, failed=self.has_failed):
            if self.busy is None:
                self.send(sql)
            else:
                self.put_off(sql)

    @property
    def checks_now(self) -> bool:
        """Whether deferred constraints are to be checked where the transaction that is open is committed."""
        return self._check_deferred and self.levels.units == 1 and not self.has_failed

    def was_ended(self, where: str | None = None) -> None:
        """Begin again: somebody has ended the transaction by hand."""
        where = where or f"at {CallSite().line}"
        self._ended_by_hand.append(
            f"the transaction was ended by hand {where}: what had been written until then may be there for good; let "
            "`with repo.transaction():` do it, or use sandbox.unboxed(...)"
        )
        self.levels.forget()
        self._due, self.is_begun = _BEGIN, False

    def tidy(self) -> None:
        """Undo what a borrower has set in the session, before the next one's first statement."""
        self.put_off(RESET)
        self.real.restore()

    def start_rollback(self, *, tidy: bool) -> None:
        """Send what undoes all of it. Others may be sent theirs before the answer is waited for.

        Args:
            tidy: Whether a borrower may have left what outlives a transaction, such as a lock of the session.
        """
        if tidy:
            self.tidy()
        if self.is_begun:
            sql = f"{_END}; {_OUTLIVES}" if RESET in self._due else _END
            self._due = ""
            with suppress(psycopg.Error):  # a server that is gone has rolled back
                self.real.pgconn.send_query(sql.encode())

    def finish_rollback(self) -> Sequence[str]:
        """Wait until all of it is undone, and let go of the connection; returns the problems that show only then."""
        known = len(self._ended_by_hand)
        self.real.limit(monotonic() + self._patience)
        try:
            self.real.wait(_answer(self.real.pgconn))
        except (psycopg.errors.NoActiveSqlTransaction, psycopg.errors.InvalidSavepointSpecification):
            self.was_ended("past the driver")
        except psycopg.Error:
            self.real.close()  # which rolls back too
        self.real.limit(None)
        self.real.pgconn.notice_handler, self.real.pgconn.notify_handler = self._handlers
        return self._ended_by_hand[known:]

    def problems(self) -> Iterator[str]:
        """What cannot have been undone, or was and should not."""
        if self.is_lost:
            yield f"its connection was lost: {LOST}"
        yield from self._ended_by_hand
        if self.levels.has_undone:
            yield (
                "what one unit of work had committed was undone when another one, begun before that was written, was "
                f"rolled back, as was seen at {self._undone_at}: they share one connection here. Let them end in the "
                "order of a stack, or use sandbox.unboxed(...)"
            )


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
    # Its own savepoints that are open, by the names that it knows.
    _savepoints: list[tuple[str, Level]]
    # What hears the server's notices for it.
    _handlers_of_its_own: tuple[Any, Any]

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
        connection.level, connection.does, connection._savepoints = None, "reading", []
        connection.outer, connection._is_closed = outer, False
        connection._handlers_of_its_own = real.pgconn.notice_handler, real.pgconn.notify_handler
        connection.rest()
        return connection

    def __del__(self, *_: Any) -> None:
        pass  # psycopg's own warns of one that is still open: this one is not its to close

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_open()
        self.outer.check_free(self)
        self._settle()
        if not self.outer.is_busy:
            if self._stands_by_itself and not self._is_open and self.does != "marking":
                self._begin()
            elif self._stands_by_itself or self._is_open:
                self._send()
        # There are others, of those who have had it since.
        self.pgconn.notice_handler, self.pgconn.notify_handler = self._handlers_of_its_own
        try:
            return super().wait(gen, *args, **kwargs)
        except _NEEDS_A_COMMIT as error:
            error.add_note(f"{self.database.home} is in a sandbox, which is a transaction: use sandbox.unboxed(...)")
            raise
        finally:
            self._settle()

    @contextmanager
    def transaction(self, *args: Any, **kwargs: Any) -> Iterator[psycopg.Transaction]:
        """psycopg's own; where none is open it begins one, which is more than the savepoint that it takes here."""
        begins = not self._is_open
        if begins:
            self._begin()
        try:
            with super().transaction(*args, **kwargs) as transaction:
                yield transaction
        finally:
            if begins:
                self._end(keep=True)

    def _begin(self) -> None:
        self._check_open()
        self.outer.check_free(self)
        self._check_time()
        sql = self._begun()
        self._send(f"{sql}; SET TRANSACTION READ ONLY" if self._read_only else sql)

    def _begun(self) -> str:
        """What begins a transaction; one that is gone with another's goes on as it."""
        lost = self.level is not None and self.level.has_lost
        self.level, sql = self.outer.levels.begin()
        self.level.has_lost = lost
        return sql

    def _send(self, sql: str = "") -> None:
        """Send what was put off, and *sql*, in the time that is left."""
        if self.outer.has_due or sql:
            self.outer.check_free(self)
            self._check_time()
            super().wait(self.outer.exchange(sql))

    @property
    def _is_open(self) -> bool:
        """Whether a transaction is open, and there."""
        return self.level is not None and not self.level.is_gone

    @property
    def _innermost(self) -> Level | None:
        return next((level for _, level in reversed(self._savepoints) if not level.is_gone), self.level)

    @property
    def _stands_by_itself(self) -> bool:
        """Whether a statement is a transaction: in autocommit mode, and where nothing is written anyway, so that what
        others write meanwhile is not undone with it, nor refused."""
        return self._autocommit or bool(self._read_only)

    def _settle(self) -> None:
        """See what an exchange with the server has come to; a statement that stands by itself is over then."""
        # psycopg leaves its pipelines without asking for anything, so that one may be over since.
        if not self.outer.is_busy:
            self.outer.busy = None
        elif self.outer.busy is None:
            self.outer.busy = self
        if self.does == "writing" and (innermost := self._innermost) is not None:
            self.outer.levels.write(innermost)
        if self.closed or self.outer.is_busy:
            return
        if self.pgconn.transaction_status == _STATUS.IDLE and self.outer.is_begun:
            self.level = None
            self._savepoints.clear()
            self.outer.was_ended()
        elif self._stands_by_itself and not self._num_transactions:
            self._end(keep=True)

    def _start_query(self) -> Generator[Any, Any, None]:
        if not (self._stands_by_itself or self._is_open):
            yield from self._run(self._begun())

    def _run(self, sql: str) -> Generator[Any, Any, None]:
        """Send what was put off, and *sql*, in whatever mode the connection is in."""
        if self._pipeline is None:
            yield from self.outer.exchange(sql)
        else:
            for statement in self.outer.with_due(sql).split("; "):
                yield from super()._exec_command(statement.encode())

    def _exec_command(self, command: Any, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        sql = self.marked(_text(command))
        if sql is None:
            return (yield from super()._exec_command(command, *args, **kwargs))
        if sql:
            yield from self._run(sql)
        return None

    def mark(self, query: str) -> bool:
        """Do what *query* says of a savepoint of its own; False if it says nothing of one."""
        if self.outer.is_busy or not _MARKS.fullmatch(query):
            return False
        self._check_open()
        self._check_time()
        if sql := self.marked(query):
            self._send(sql)
        return sql is not None

    def marked(self, query: str) -> str | None:
        """What stands for *query*, which begins, releases or goes back to a savepoint; None for any other.

        Those of several borrowers may have the same name, and end in any order.
        """
        found = _MARKS.fullmatch(query)
        if found is None or (self._autocommit and not self._is_open):
            return None
        if self._read_only:
            return ""  # each statement has one of its own, and writes nothing
        verb, name = found[1].split()[0].upper(), found[2].strip('"') if found[2][0] == '"' else found[2].lower()
        if verb == "SAVEPOINT":
            return self._mark(name)
        places = [place for place, (known, _) in enumerate(self._savepoints) if known == name]
        if not places or (verb == "RELEASE" and self.outer.has_failed):
            return None  # the server says why not
        level = self._savepoints[places[-1]][1]
        if verb == "ROLLBACK":
            del self._savepoints[places[-1] + 1 :]
            return self.outer.go_back(level)
        del self._savepoints[places[-1] :]
        self.outer.put_off(self.outer.levels.keep(level))
        return ""

    def _mark(self, name: str) -> str:
        begun = "" if self._is_open else f"{self._begun()}; "
        level, sql = self.outer.levels.begin(self.level)
        self._savepoints.append((name, level))
        return begun + sql

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

    def _check_time(self) -> None:
        if self._deadline is not None and self._deadline <= monotonic():
            raise NoAnswer("its time was over before anything was sent")

    def commit(self) -> None:
        self._check_open()
        self._check_time()
        self._check_no_block("commit")
        self._end(keep=True)

    def rollback(self) -> None:
        self._check_no_block("rollback")
        self._end(keep=False)

    def _check_no_block(self, what: str) -> None:
        if self._num_transactions:
            raise psycopg.ProgrammingError(f"{what}() cannot be called in a block of transaction(), which does it")

    def _end(self, *, keep: bool) -> None:
        level, self.level = self.level, None
        self._savepoints.clear()
        if level is None:
            return
        try:
            if keep and self.outer.checks_now and self.outer.levels.has_written(level):
                self._send(_CHECK)
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
                # Before libpq 17 this waits for the server however long that says nothing, and holds the interpreter.
                self.cancel_safe(timeout=_ENDING)
                until(monotonic() + _ENDING, exchange, self.pgconn.socket)
            except NoAnswer:
                self.pgconn.finish()
            except psycopg.Error:
                if self.pgconn.transaction_status == _STATUS.ACTIVE:  # it was not heard
                    self.pgconn.finish()
        self.close()


class BoxedCursor(psycopg.Cursor[Any]):
    """A cursor that tells its connection what it does."""

    def execute(self, query: Any, *args: Any, **kwargs: Any) -> Any:
        text, connection = _text(query), self.connection
        if isinstance(connection, BoxedConnection) and connection.mark(text):
            return self
        with _doing(self, _what(text)):
            return super().execute(query, *args, **kwargs)

    def executemany(self, *args: Any, **kwargs: Any) -> None:
        with _doing(self, "writing"):
            super().executemany(*args, **kwargs)

    @contextmanager
    def copy(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        with _doing(self, "writing"), super().copy(*args, **kwargs) as copy:
            yield copy


def _text(query: Any) -> str:
    """A statement as a text; nothing for one that is composed otherwise."""
    return query if isinstance(query, str) else query.decode(errors="replace") if isinstance(query, bytes) else ""


def _what(query: str) -> Doing:
    if _MARKS.fullmatch(query):
        return "marking"
    return "reading" if _READS.match(query) else "writing"


@contextmanager
def _doing(cursor: psycopg.Cursor[Any], does: Doing) -> Iterator[None]:
    connection = cursor.connection
    assert isinstance(connection, BoxedConnection)
    connection.does = does
    try:
        yield
    finally:
        connection.does = "reading"


def _answer(pgconn: Any) -> Generator[Any, Any, None]:
    """Hear what became of the statements of one message."""
    for result in (yield from generators.execute(pgconn)):
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise error_from_result(result)
