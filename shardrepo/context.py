"""What belongs to the running thread or task: its choice of a database, its call options and what it holds open.

They live in `ContextVar`s, of each repo with a config of its own. A choice is inherited by tasks; a
transaction is seen by them too, but only its owner may use it, so that a child's statement ends in an
error instead of in somebody else's transaction, or outside it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import wraps
from inspect import isasyncgenfunction, iscoroutinefunction, isgeneratorfunction
from typing import Any, Final, Generic, ParamSpec, TypeVar

from .calls import CallOptions
from .database import Choice, Database
from .transaction import Held, Transaction

P = ParamSpec("P")
T = TypeVar("T")
H = TypeVar("H", bound=Held)

logger: Final = logging.getLogger("shardrepo.context")


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
    """The choice, the call options and the transactions of whoever is running, for one repo."""

    def __init__(self, name: str) -> None:
        self._choice: ContextVar[Selection[Choice]] = ContextVar(f"{name} choice", default=Selection())  # noqa: B039  # frozen
        self._options: ContextVar[Selection[CallOptions]] = ContextVar(f"{name} options", default=Selection())  # noqa: B039
        self._held: ContextVar[Held | None] = ContextVar(f"{name} held", default=None)
        # Of which sandbox whoever runs is a member.
        self.membership: ContextVar[Any] = ContextVar(f"{name} membership", default=None)

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
    def options(self) -> CallOptions | None:
        """How calls are run here; None when nothing was said."""
        return self._options.get().value

    @property
    def tags(self) -> Mapping[str, Any]:
        """What is said about the calls here."""
        options = self.options
        return options.tags if options is not None else {}

    @contextmanager
    def calling(self, options: CallOptions, *, by_default: bool = False) -> Iterator[None]:
        """Run each call in the block with *options*, and with those of the blocks around it that they leave open, or
        *by_default* the other way round; left in another context, it is as `using` is."""
        around = self.options
        merged = around.over(options) if by_default and around is not None else options.over(around)
        with _scoped(self._options, merged, str(options)):
            yield

    @property
    def is_holding(self) -> bool:
        """Whether any connection is held here, to whatever database, whoever owns it."""
        return self._held.get() is not None

    def held(self, database: Database) -> Held | None:
        """What the innermost block on *database* that holds a connection holds, whoever owns it.

        One that is over may still be here: another thread has collected the generator that had opened it.
        """
        held = self._held.get()
        while held is not None and (held.is_over or held.database.key != database.key):
            held = held.outer
        return held

    def transaction(self, database: Database) -> Transaction | None:
        """The open transaction on *database*, whoever owns it."""
        held = self.held(database)
        return held if isinstance(held, Transaction) else None

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Leave the open transactions alone for the block: what runs in it is on its own.

        A database that is chosen in the block is chosen for the block.
        """
        held = self._held.get()
        self._held.set(None)
        try:
            with self.using(self.choice):
                yield
        finally:
            if self._held.get() is None:
                self._held.set(held)

    @contextmanager
    def holding(self, held: H) -> Iterator[H]:
        """Make *held* what the block holds."""
        held.outer = self._held.get()
        self._held.set(held)
        try:
            yield held
        finally:
            held.is_over = True
            if self._held.get() is held:
                self._held.set(held.outer)

    def carry(self, function: Callable[P, T]) -> Callable[P, T]:
        """Wrap *function* so that it runs with this context's choice in whatever thread calls it."""
        check_plain(function, "carry()", "use `with repo.using(...)` inside it")
        variables: list[ContextVar[Any]] = [self._choice, self._held, self.membership]
        values = [variable.get() for variable in variables]

        @wraps(function)
        def carried(*args: P.args, **kwargs: P.kwargs) -> T:
            before = [variable.get() for variable in variables]
            for variable, value in zip(variables, values, strict=True):
                variable.set(value)
            try:
                return function(*args, **kwargs)
            finally:
                for variable, value in zip(variables, before, strict=True):
                    variable.set(value)

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


def check_plain(function: object, what: str, remedy: str) -> None:
    """Raise `TypeError` if *function* does its work after it has returned, outside whatever *what* puts around it."""
    if _runs_later(function) or _runs_later(getattr(type(function), "__call__", None)):  # noqa: B004  # an async one
        raise TypeError(f"{what} takes a plain function, and {function!r} runs after it has returned: {remedy}")


def _runs_later(function: object) -> bool:
    return iscoroutinefunction(function) or isgeneratorfunction(function) or isasyncgenfunction(function)
