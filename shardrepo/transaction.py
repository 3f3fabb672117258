"""What a block holds: a connection and its owner, and if it is a transaction how it runs, what has broken it, and who
may end it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, Literal, NoReturn, TypeAlias, get_args

from sqlalchemy.engine import Connection
from sqlalchemy.engine import Transaction as SQLTransaction
from sqlalchemy.exc import DBAPIError, PendingRollbackError

from .database import Database
from .errors import ConfigError, TransactionDoomedError, TransactionOwnerError, unknown

Isolation: TypeAlias = Literal["read uncommitted", "read committed", "repeatable read", "serializable"]


@dataclass(frozen=True, slots=True)
class Mode:
    """How a transaction runs.

    Attributes:
        isolation: Its level; None for the database's own.
        read_only: Whether the server refuses to write in it.
        deferrable: Whether the server may let it wait for a moment from which on it cannot fail.
        timeout: Seconds for all of its statements, the COMMIT included; None for no limit.

    Raises:
        ConfigError: The level is unknown, or *deferrable* stands without what it takes.
    """

    isolation: Isolation | None = None
    read_only: bool = False
    deferrable: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if self.isolation is not None and self.isolation not in get_args(Isolation):
            raise ConfigError(unknown("isolation", str(self.isolation), get_args(Isolation)))
        if self.deferrable and not (self.read_only and self.isolation == "serializable"):
            raise ConfigError(
                f"deferrable=True means nothing with isolation={self.isolation!r} and read_only={self.read_only}: "
                "the server defers serializable transactions that only read"
            )


PLAIN: Final = Mode()


class Ending:
    """One block of a transaction, and what it was ended with."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: Any = None

    def takes(self, error: BaseException) -> bool:
        """Whether *error* is what ends this block, and no other."""
        if not isinstance(error, RolledBack) or error.ending is not self:
            return False
        self.value = error.value
        return True


class RolledBack(BaseException):
    """On its way from `rollback` to the block that it ends. Not an `Exception`, which the application may catch."""

    def __init__(self, ending: Ending, value: Any) -> None:
        super().__init__("rollback() was called in a block that had joined it")
        self.ending = ending
        self.value = value


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


class Held:
    """A connection that a block holds for all that is called in it.

    Attributes:
        database: Where it leads.
        connection: It.
        owner: Who opened the block, and alone may use it.
        outer: What the block around it holds, on whatever database.
        is_over: Whether the block was left.
        until: When it has to be over, on the clock of `time.monotonic`; None for never.
    """

    __slots__ = ("connection", "database", "is_over", "outer", "owner", "until")

    def __init__(self, database: Database, connection: Connection) -> None:
        self.database = database
        self.connection = connection
        self.outer: Held | None = None
        self.owner = Owner()
        self.is_over = False
        self.until: float | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} on {self.database.home}>"

    def check_usable(self) -> None:
        """Raise unless the caller owns this."""
        if not self.owner.is_current:
            what = "transaction" if isinstance(self, Transaction) else "connection"
            raise TransactionOwnerError(
                f"the {what} on {self.database.home} belongs to the thread, task or process that opened "
                "it, and this is another one: use `with repo.detached():` here for an independent unit of work",
                home=self.database.home,
            )

    def watch(self) -> AbstractContextManager[None]:
        """Run a verb on the connection."""
        raise NotImplementedError


class Transaction(Held):
    """An open transaction, and the first error that doomed it, if any.

    Attributes:
        mode: How it runs.
    """

    __slots__ = ("_endings", "_levels", "mode")

    def __init__(self, database: Database, connection: Connection, mode: Mode = PLAIN) -> None:
        super().__init__(database, connection)
        self.mode = mode
        if mode.timeout is not None:
            self.until = monotonic() + mode.timeout
        self._endings: list[Ending] = []
        self._levels = [Level(connection.begin())]

    def check_usable(self) -> None:
        """Raise unless the caller owns this transaction and nothing has failed in it."""
        super().check_usable()
        for level in self._levels:
            if level.cause is None and not level.handle.is_active:
                level.cause = PendingRollbackError("a session or connection that had joined it has ended it")
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
    def block(self) -> Iterator[Ending]:
        """Have what is called in a block end it, with `rollback`, and no other."""
        ending = Ending()
        self._endings.append(ending)
        try:
            yield ending
        finally:
            self._endings.remove(ending)

    def rollback_with(self, value: Any) -> NoReturn:
        """End the innermost block, with *value*."""
        if not self.owner.is_current:
            self.check_usable()
        raise RolledBack(self._endings[-1], value)

    @contextmanager
    def joined(self, mode: Mode) -> Iterator[Ending]:
        """Run a nested block as part of this transaction: whatever it raises dooms it all."""
        self.check_usable()
        if mode not in (PLAIN, self.mode):
            raise ConfigError(
                f"a transaction is open on {self.database.home} as {self.mode}, and cannot go on as {mode}: "
                "open it with these options, or use `with repo.detached():` for one of its own"
            )
        with self.block() as ending:
            try:
                with self._dooming():
                    yield ending
            except RolledBack as error:
                if not ending.takes(error):
                    raise
                return
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
        why = str(cause).partition("\n")[0]
        if not isinstance(cause, RolledBack):
            why = f"an earlier statement failed with {type(cause).__name__}: {why}"
        error = TransactionDoomedError(
            f"the transaction on {self.database.home} is doomed: {why}. Nothing of it can be kept: leave the block, "
            "or put what may fail into `with repo.savepoint():`",
            home=self.database.home,
            cause=cause,
        )
        error.__cause__ = cause
        return error


def _roll_back(handle: SQLTransaction) -> None:
    # A session that failed in it may have ended it already, which SQLAlchemy warns about.
    if handle.is_active:
        handle.rollback()


def _current_task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None
