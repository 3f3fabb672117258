"""One database in a sandbox: its only connection, in a transaction that is never committed, and whose turn it is.

Whoever takes a connection there gets a `BoxedConnection`, which sends what it is told on that one: what would begin a
transaction begins a savepoint, and so does each statement that would be committed by itself, so that one that fails
spoils nothing. One thread at a time has it, from its first checkout to its last return.

Leans on what psycopg does not document, beside what `connection` does, tested in ``tests/test_private_api.py``: a
connection begins its transactions in ``_start_query``, sends its own commands, savepoints among them, by
``_exec_command``, keeps how many of its own blocks are open in ``_num_transactions``, and changes a setting by
generators that another connection's ``wait`` may run.
"""

from __future__ import annotations

import re
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator
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

# Begins its transaction, with a savepoint that is there until that ends, by whomever.
_BEGIN: Final = "BEGIN; SAVEPOINT shardrepo_begun"
_END: Final = "ROLLBACK TO shardrepo_begun; ROLLBACK"

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


class Box:
    """The connection of one database in a sandbox. Opened when it is first wanted.

    Args:
        borrower: Whose it is, in the books of the cache.
        check_usable: Raises once the sandbox is over.
        check_deferred: Whether deferred constraints are checked where a transaction would be committed.

    Attributes:
        database: Where it leads, once it was opened; None before.
        levels: The transactions that are open in it. Its holder's to change.
        is_begun: Whether its own transaction was begun, which is put off at first.
        busy: Who is in the middle of an exchange with the server, if anybody is.
    """

    def __init__(self, borrower: object, check_usable: Callable[[], object], check_deferred: bool) -> None:
        self.database: Database | None = None
        self.levels = Levels()
        self.is_begun = False
        self.busy: BoxedConnection | None = None
        self._check_usable = check_usable
        self._check_deferred = check_deferred
        self._borrower = borrower
        self._record: CachedConnection | None = None
        self._handlers: tuple[Any, Any] = None, None
        self._patience = 0.0
        # Keys of the cache whose users and passwords the server has accepted.
        self._accepted: set[object] = set()
        # Guards what follows: no I/O happens under it.
        self._changed = threading.Condition()
        # How many times each thread has it, or is about to.
        self._turns: Counter[threading.Thread] = Counter()
        self._lent: set[Lent] = set()
        self._is_over = False
        # What follows is the holder's. Whether SQL of the users' own has run since it was tidied.
        self._is_untidy = False
        # What is to be sent before anything else, with which it goes in one message.
        self._due = ""
        self._ended_by_hand: list[str] = []
        self._undone_at = ""

    def lend(self, pool: LedgerPool) -> Lent:
        """A connection for the caller, once it is this thread's turn.

        Raises:
            CheckoutTimeoutError: Another thread has it, and did not return it in time; or a bound left no room for it.
            SandboxError: It was lost, and with it what the sandbox had written.
        """
        thread, site = threading.current_thread(), CallSite()
        self._take_turn(thread, pool, site)
        try:
            real = self._opened(pool)
            with self._changed:
                if self._is_over:
                    self._check_usable()
                lent = Lent(pool, self, real, thread, site)
                self._lent.add(lent)
        except BaseException:
            self._end_turn(thread)
            raise
        return lent

    def take_back(self, lent: Lent) -> None:
        """Roll back what its borrower left open, and undo what SQL has set; then it is the next one's turn."""
        if lent not in self._lent:
            return
        try:
            self._leave(lent)
            if self._is_untidy and len(self._lent) == 1 and not self._is_gone:
                self.send(RESET)
                self._connection.restore()
                self._is_untidy = False
        finally:
            # Who has it still, detached or the driver's own, would be on a connection that is somebody else's by then.
            lent.boxed.abandon()
            self._end_turn(lent.thread, lent)

    def send(self, sql: str = "") -> None:
        """Send what was put off, and *sql*, on the connection, whatever time its borrower has left."""
        if self._due or sql:
            self.check_free()
            # As long as a server may take to show that it is there.
            self._connection.limit(monotonic() + self._patience)
            self._connection.wait(self.exchange(sql))

    def exchange(self, sql: str) -> Generator[Any, Any, None]:
        """Send what was put off, and *sql*, as one message, and hear what became of it.

        Raises:
            SandboxError: Somebody has ended the transaction, and begun another one, since.
        """
        try:
            yield from exchange(self._connection.pgconn, self.with_due(sql))
        except psycopg.errors.InvalidSavepointSpecification as error:
            self.was_ended()
            self._due = f"ROLLBACK; {_BEGIN}"
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
        pgconn = self._connection.pgconn
        is_busy = pgconn.transaction_status == _STATUS.ACTIVE or pgconn.pipeline_status
        if is_busy and (connection is None or self.busy is not connection):
            raise SandboxError(
                f"a COPY, a pipeline or a stream of the driver's is under way on {self._home}, of which a sandbox has "
                "one connection: end that first, or collect before it what is needed in it"
            )

    def end_level(self, level: Level, *, keep: bool) -> None:
        """Commit a transaction in it, or roll it back; one that has failed is rolled back."""
        with self._noting():
            self._end_level(level, keep=keep)

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

    def _end_level(self, level: Level, *, keep: bool) -> None:
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

    def end(self) -> list[str]:
        """Roll back, and return the connection to the cache; what was not as it should be."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
            record, is_held = self._record, bool(self._holders())
        if record is None:
            return []
        try:
            if not is_held:
                with suppress(psycopg.Error, SandboxError):  # as below
                    self._take_back_lost()
            problems = self._problems()
            connection = record.dbapi_connection
            for lent in self._lent:
                lent.boxed.abandon()
            if connection is not None and not is_held and not self._lent:
                problems += self._roll_back()
                connection.pgconn.notice_handler, connection.pgconn.notify_handler = self._handlers
                # All that was set in it was set in the transaction, or reset when it was returned.
                record.vouched = not self._is_untidy
            else:
                # Whoever has it may be using it at this moment: nobody else may get it.
                record.invalidate()
        finally:
            record.give_back()
        return [f"{self._home}: {problem}" for problem in problems]

    def _roll_back(self) -> list[str]:
        """End the transaction; what shows only then."""
        known = len(self._ended_by_hand)
        if self.is_begun:
            self._due = ""
            try:
                self.send(_END)
            except psycopg.errors.NoActiveSqlTransaction:
                self.was_ended("past the driver")
            except (psycopg.Error, SandboxError):
                pass  # a server that is gone has rolled back, and so does who closes the connection
        return self._ended_by_hand[known:]

    def _problems(self) -> list[str]:
        problems = [
            f"a connection is still in use; {lent.taken.thread} took it at {lent.taken.line}: leave its block, or "
            "close its session, before the sandbox ends"
            for lent in self._lent
            if lent.taken is not None
        ]
        if self._is_gone:
            problems.append(f"its connection was lost: {_LOST}")
        problems += self._ended_by_hand
        if self.levels.has_undone:
            problems.append(
                "what one unit of work had committed was undone when another one, begun before that was written, was "
                f"rolled back, as was seen at {self._undone_at}: they share one connection here. Let them end in the "
                "order of a stack, or use sandbox.unboxed(...)"
            )
        return problems

    # Whose turn it is

    def _take_turn(self, caller: threading.Thread, pool: LedgerPool, site: CallSite) -> None:
        begun = monotonic()
        latest = begun + pool.settings.checkout_timeout
        latest = min(latest, deadline.get() or latest)
        with self._changed:
            while others := self._holders() - {caller}:
                self._check_usable()
                left = latest - monotonic()
                if left <= 0:
                    raise self._timed_out(pool, min(others, key=str), site, monotonic() - begun)
                self._changed.wait(min(left, _LOOK))
            self._turns[caller] += 1

    def _holders(self) -> set[threading.Thread]:
        """The threads whose turn it is: not those that have ended, nor of those whose connections were collected."""
        turns = self._turns.copy()
        turns.subtract(lent.thread for lent in self._lent if lent.is_lost)
        return {thread for thread, count in turns.items() if count > 0 and thread.is_alive()}

    def _end_turn(self, thread: threading.Thread, lent: Lent | None = None) -> None:
        with self._changed:
            self._turns[thread] -= 1
            self._lent.discard(lent)
            self._changed.notify_all()

    def _timed_out(
        self, pool: LedgerPool, holder: threading.Thread, site: CallSite, seconds: float
    ) -> CheckoutTimeoutError:
        taken = next((str(lent.taken) for lent in self._lent if lent.thread is holder), "nobody knows where")
        frame = sys._current_frames().get(holder.ident or 0)
        now = "".join(traceback.format_stack(frame)) if frame is not None else "nobody knows where\n"
        return CheckoutTimeoutError(
            f"no connection to {pool.database.home} within {seconds:.1f} s: a sandbox has one of each database, and "
            f"{holder.name} has this one. Return it there first, by leaving the block or closing the session that has "
            f"it.\n\nTaken at:\n{taken}\n\nIts thread is at:\n{now}\nWanted at:\n{site}",
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
    def _home(self) -> str:
        return "" if self.database is None else self.database.home

    @property
    def has_failed(self) -> bool:
        """Whether a statement has failed in it, so that the server refuses all others."""
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
        self._take_back_lost()
        return self._connection

    def _take_back_lost(self) -> None:
        for lent in [lent for lent in self._lent if lent.is_lost]:
            self.take_back(lent)

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
        with self._changed:
            if not self._is_over:
                self._record, self.database, self._due = record, pool.database, _BEGIN
        if self._record is None:
            # It was ended meanwhile, and nobody will do so again.
            record.give_back()
            self._check_usable()
        pgconn = self._connection.pgconn
        self._patience = pool.settings.connect_timeout
        self._handlers = pgconn.notice_handler, pgconn.notify_handler

    def _leave(self, lent: Lent) -> None:
        """End the transaction of one who returns it, or is gone."""
        connection = lent.boxed
        self._is_untidy |= (connection.used and not lent.vouched) or connection.leaves_traces
        if not self._is_gone:
            connection.leave()


class Lent(CachedConnection):
    """A connection that a box has lent, as SQLAlchemy's pools see it."""

    __slots__ = ("box", "boxed", "is_lost", "thread")

    def __init__(
        self, pool: LedgerPool, box: Box, real: DriverConnection, thread: threading.Thread, site: CallSite
    ) -> None:
        record = box._record
        assert record is not None
        super().__init__(pool, record.entry, connect=False)
        self.box = box
        self.thread = thread
        # Whether its borrower was collected. Finalisers set it, and take no lock.
        self.is_lost = False
        self.taken = site
        self.dbapi_connection = self.boxed = BoxedConnection.of(real, box, pool.database)

    def get_connection(self) -> Any:
        # Never connects anew: that would lead out of the box.
        return self.boxed

    def give_back(self) -> None:
        self.box.take_back(self)
        self.pool.listeners.tell("checkin", self.pool.database, monotonic() - self.opened_at)

    def reclaimed(self) -> None:
        self.is_lost = True


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
    # Its own savepoints that are open, by the names that it knows.
    _savepoints: list[tuple[str, Level]]
    # What hears the server's notices for it.
    _handlers_of_its_own: tuple[Any, Any]

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
        connection.level, connection.does, connection._savepoints = None, "reading", []
        connection._box, connection._is_closed = box, False
        connection._handlers_of_its_own = real.pgconn.notice_handler, real.pgconn.notify_handler
        connection.rest()
        return connection

    def __del__(self, *_: Any) -> None:
        pass  # psycopg's own warns of one that is still open: this one is not its to close

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        self._check_open()
        self._box.check_free(self)
        self._settle()
        if not self._is_busy:
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
        self._box.check_free(self)
        self._check_time()
        sql = self._begun()
        self._send(f"{sql}; SET TRANSACTION READ ONLY" if self._read_only else sql)

    def _begun(self) -> str:
        """What begins a transaction; one that is gone with another's goes on as it."""
        lost = self.level is not None and self.level.has_lost
        self.level, sql = self._box.levels.begin()
        self.level.has_lost = lost
        return sql

    def _send(self, sql: str = "") -> None:
        """Send what was put off, and *sql*, in the time that is left."""
        if self._box.has_due or sql:
            self._box.check_free(self)
            self._check_time()
            super().wait(self._box.exchange(sql))

    @property
    def _is_busy(self) -> bool:
        """Whether it is in the middle of an exchange: of a COPY, a pipeline, or rows that come one by one."""
        return self.pgconn.transaction_status == _STATUS.ACTIVE or bool(self.pgconn.pipeline_status)

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
        if not self._is_busy:
            self._box.busy = None
        elif self._box.busy is None:
            self._box.busy = self
        if self.does == "writing" and (innermost := self._innermost) is not None:
            self._box.levels.write(innermost)
        if self.closed or self._is_busy:
            return
        if self.pgconn.transaction_status == _STATUS.IDLE and self._box.is_begun:
            self.level = None
            self._savepoints.clear()
            self._box.was_ended()
        elif self._stands_by_itself and not self._num_transactions:
            self._end(keep=True)

    def _start_query(self) -> Generator[Any, Any, None]:
        if not (self._stands_by_itself or self._is_open):
            yield from self._run(self._begun())

    def _run(self, sql: str) -> Generator[Any, Any, None]:
        """Send what was put off, and *sql*, in whatever mode the connection is in."""
        if self._pipeline is None:
            yield from self._box.exchange(sql)
        else:
            for statement in self._box.with_due(sql).split("; "):
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
        if self._is_busy or not _MARKS.fullmatch(query):
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
        if not places or (verb == "RELEASE" and self._box.has_failed):
            return None  # the server says why not
        level = self._savepoints[places[-1]][1]
        if verb == "ROLLBACK":
            del self._savepoints[places[-1] + 1 :]
            return self._box.go_back(level)
        del self._savepoints[places[-1] :]
        self._box.put_off(self._box.levels.keep(level))
        return ""

    def _mark(self, name: str) -> str:
        begun = "" if self._is_open else f"{self._begun()}; "
        level, sql = self._box.levels.begin(self.level)
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
            if keep and self._box.checks_now and self._box.levels.has_written(level):
                self._send(_CHECK)
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


# What can be done in no transaction: VACUUM, and a COMMIT in a procedure.
_NEEDS_A_COMMIT: Final = (psycopg.errors.ActiveSqlTransaction, psycopg.errors.InvalidTransactionTermination)

_LOST: Final = "what this test had written there is gone. Do what ends connections in sandbox.unboxed(...)"


def exchange(pgconn: Any, sql: str) -> Generator[Any, Any, None]:
    """Send several statements as one message, and hear what became of them."""
    pgconn.send_query(sql.encode())
    for result in (yield from generators.execute(pgconn)):
        if result.status == pq.ExecStatus.FATAL_ERROR:
            raise error_from_result(result)
