"""What belongs to the running thread or task: its choice of a database, its timeout and its open transactions.

They live in `ContextVar`s, of each repo with a config of its own. A choice is inherited by tasks; a
transaction is seen by them too, but only its owner may use it, so that a child's statement ends in an
error instead of in somebody else's transaction, or outside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Final, Generic, ParamSpec, TypeVar

from sqlalchemy.engine import Connection

from .database import Choice, Database
from .transaction import Mode, Transaction

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
    def entered(self, database: Database, connection: Connection, mode: Mode) -> Iterator[Transaction]:
        """Make a transaction on *connection* the current one for the block."""
        outer = self._transaction.get()
        transaction = Transaction(database, connection, outer, mode)
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
