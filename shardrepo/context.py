"""What belongs to the running thread or task: the choice of a database and the open transactions.

Both live in `ContextVar`s, one pair per repo with a config of its own. A choice is inherited by tasks; a
transaction is seen by them too, but only its owner may use it, so that a child's statement ends in an
error instead of in somebody else's transaction, or outside it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any, Final, Generic, ParamSpec, TypeVar

from sqlalchemy.engine import Connection
from sqlalchemy.engine import Transaction as SQLTransaction
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from .database import Choice, Database
from .errors import TransactionDoomedError, TransactionOwnerError

P = ParamSpec("P")
T = TypeVar("T")

logger: Final = logging.getLogger("shardrepo.context")

# When the call that runs here has to be over, on the clock of `time.monotonic`; None for never.
deadline: Final[ContextVar[float | None]] = ContextVar("shardrepo deadline", default=None)


@dataclass(frozen=True, slots=True, eq=False)
class Selection(Generic[T]):
    """What a context has chosen, and the block that it stands in."""

    value: T | None = None
    block: Block[T] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Block(Generic[T]):
    """One `using` or `call_options` block: what was selected where it was entered."""

    outer: Selection[T]

    def encloses(self, selection: Selection[T]) -> bool:
        """Whether *selection* was made inside this block, however deep."""
        block = selection.block
        while block is not None and block is not self:
            block = block.outer.block
        return block is self


class Owner:
    """The thread or task, and the process, that something belongs to."""

    __slots__ = ("pid", "task", "thread")

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.thread = threading.current_thread()
        self.task = _current_task()

    @property
    def is_this_process(self) -> bool:
        return self.pid == os.getpid()

    @property
    def is_current(self) -> bool:
        return self.is_this_process and self.thread is threading.current_thread() and self.task is _current_task()


class Level:
    """A transaction, or a savepoint in it: SQLAlchemy's handle, and the first error that broke it."""

    __slots__ = ("cause", "handle")

    def __init__(self, handle: SQLTransaction) -> None:
        self.handle = handle
        self.cause: BaseException | None = None


class Transaction:
    """An open transaction: its connection, its owner, and the first error that doomed it, if any.

    Attributes:
        database: The database that the transaction runs on.
        connection: The connection that it holds.
        owner: Who opened it, and alone may use it.
        outer: The transaction, on another database, that this one was opened in.
        is_over: Whether its block was left.
    """

    __slots__ = ("_levels", "connection", "database", "is_over", "outer", "owner")

    def __init__(self, database: Database, connection: Connection, outer: Transaction | None) -> None:
        self.database = database
        self.connection = connection
        self.outer = outer
        self.owner = Owner()
        self.is_over = False
        self._levels = [Level(connection.begin())]

    def __repr__(self) -> str:
        return f"<Transaction on {self.database.home}>"

    def check_usable(self) -> None:
        """Raise unless the caller owns this transaction and nothing has failed in it."""
        if not self.owner.is_current:
            raise TransactionOwnerError(
                f"the transaction on {self.database.home} belongs to the thread, task or process that opened "
                "it, and this is another one: use `with repo.detached():` here for an independent unit of work",
                home=self.database.home,
            )
        for level in self._levels:
            if level.cause is None and not level.handle.is_active:
                level.cause = PendingRollbackError("a session that had joined the transaction rolled it back")
            if level.cause is not None:
                raise self._doomed(level.cause)

    def doom(self, cause: BaseException) -> None:
        """Remember that *cause* broke the innermost level; the first one stays."""
        level = self._levels[-1]
        level.cause = level.cause or cause

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Run a verb: a database error in it dooms the innermost level, and so does a flush that failed."""
        self.check_usable()
        try:
            yield
        except BaseException as error:
            if isinstance(error, DBAPIError) or not self._levels[-1].handle.is_active:
                self.doom(error)
            raise

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Run a nested block as part of this transaction: whatever it raises dooms it all."""
        self.check_usable()
        with self._dooming():
            yield
        self.check_usable()

    @contextmanager
    def savepoint(self, limited: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
        """Run a block whose failure undoes the block alone; its own statements each in a *limited* block."""
        self.check_usable()
        with self.watch(), limited():
            level = Level(self.connection.begin_nested())
        self._levels.append(level)
        try:
            yield
            self.check_usable()
        except BaseException:
            self._levels.pop()
            with self._dooming(), limited():
                _roll_back(level.handle)
            raise
        self._levels.pop()
        with self._dooming(), limited():
            level.handle.commit()

    def commit(self) -> None:
        """Commit, unless something failed: then `TransactionDoomedError`, and nothing is kept."""
        self.check_usable()
        self._levels[0].handle.commit()

    def rollback(self) -> None:
        """Roll back. In a forked child nothing is sent: the transaction is its parent's."""
        _roll_back(self._levels[0].handle)

    @contextmanager
    def _dooming(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.doom(error)
            raise

    def _doomed(self, cause: BaseException) -> TransactionDoomedError:
        first_line = str(cause).partition("\n")[0]
        error = TransactionDoomedError(
            f"the transaction on {self.database.home} is doomed: an earlier statement failed with "
            f"{type(cause).__name__}: {first_line}. Nothing of it can be kept: leave the block, or put what may fail "
            "into `with repo.savepoint():`",
            home=self.database.home,
            cause=cause,
        )
        error.__cause__ = cause
        return error


def _roll_back(handle: SQLTransaction) -> None:
    # A session that failed in it may have ended it already, which SQLAlchemy warns about.
    if handle.is_active:
        handle.rollback()


class Context:
    """The choice and the transactions of whoever is running, for one repo."""

    def __init__(self, name: str) -> None:
        self._choice: ContextVar[Selection[Choice]] = ContextVar(f"{name} choice", default=Selection())  # noqa: B039  # frozen
        self._timeout: ContextVar[Selection[float]] = ContextVar(f"{name} timeout", default=Selection())  # noqa: B039
        self._transaction: ContextVar[Transaction | None] = ContextVar(f"{name} transaction", default=None)

    @property
    def choice(self) -> Choice | None:
        """What is chosen; None when nothing is."""
        return self._choice.get().value

    def choose(self, choice: Choice | None) -> Choice | None:
        """Choose for what this thread or task does from now on; returns what was chosen before."""
        before = self._choice.get()
        self._choice.set(replace(before, value=choice))
        return before.value

    def using(self, choice: Choice | None) -> AbstractContextManager[None]:
        """Choose for the block. On every way out, what was chosen before it is chosen again, by value.

        Never raises when it is left in another context than it was entered in, as happens when a web
        framework runs both halves of a dependency in copies of a context: there is nothing to restore
        there, and the choice never reached the code in between, which is logged as an error.
        """
        return _scoped(self._choice, choice, f"using({choice!r})")

    @property
    def timeout(self) -> float | None:
        """Seconds that a call may take here; None for no limit."""
        return self._timeout.get().value

    def limited(self, timeout: float | None) -> AbstractContextManager[None]:
        """Let each call in the block take *timeout* seconds; left in another context, it is as `using` is."""
        return _scoped(self._timeout, timeout, f"call_options(timeout={timeout})")

    @property
    def has_transactions(self) -> bool:
        """Whether any transaction is open here, on whatever database, whoever owns it."""
        return self._transaction.get() is not None

    def transaction(self, database: Database) -> Transaction | None:
        """The innermost open transaction on *database*, whoever owns it.

        One that is over may still be here: another thread has collected the generator that had opened it.
        """
        transaction = self._transaction.get()
        while transaction is not None and (transaction.is_over or transaction.database.key != database.key):
            transaction = transaction.outer
        return transaction

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Leave the open transactions alone for the block: what runs in it is on its own.

        A database that is chosen in the block is chosen for the block.
        """
        transaction = self._transaction.get()
        self._transaction.set(None)
        try:
            with self.using(self.choice):
                yield
        finally:
            if self._transaction.get() is None:
                self._transaction.set(transaction)

    @contextmanager
    def entered(self, database: Database, connection: Connection) -> Iterator[Transaction]:
        """Make a transaction on *connection* the current one for the block."""
        outer = self._transaction.get()
        transaction = Transaction(database, connection, outer)
        self._transaction.set(transaction)
        try:
            yield transaction
        finally:
            transaction.is_over = True
            if self._transaction.get() is transaction:
                self._transaction.set(outer)

    def carry(self, function: Callable[P, T]) -> Callable[P, T]:
        """Wrap *function* so that it runs with this context's choice in whatever thread calls it."""
        if _runs_later(function) or _runs_later(getattr(type(function), "__call__", None)):  # noqa: B004  # an async one
            raise TypeError(
                f"carry() takes a plain function, and {function!r} runs after it has returned: "
                "use `with repo.using(...)` inside it"
            )
        choice, transaction = self._choice.get(), self._transaction.get()

        @wraps(function)
        def carried(*args: P.args, **kwargs: P.kwargs) -> T:
            before, outer = self._choice.get(), self._transaction.get()
            self._choice.set(choice)
            self._transaction.set(transaction)
            try:
                return function(*args, **kwargs)
            finally:
                self._choice.set(before)
                self._transaction.set(outer)

        return carried


@contextmanager
def _scoped(variable: ContextVar[Selection[T]], value: T | None, shown: str) -> Iterator[None]:
    """Select *value* for the block, and what was selected before it at its end."""
    before = variable.get()
    block = Block(before)
    variable.set(Selection(value, block))
    try:
        yield
    finally:
        if block.encloses(variable.get()):
            variable.set(before)
        else:
            logger.error(
                "a %s block was left in another context than it was entered in: what ran in between may not have "
                "seen it. Enter it in a middleware around the handler instead",
                shown,
            )


def _runs_later(function: object) -> bool:
    return iscoroutinefunction(function) or isgeneratorfunction(function) or isasyncgenfunction(function)


def _current_task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None
