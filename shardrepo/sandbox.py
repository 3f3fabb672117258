"""Tests in which every database is as it was afterwards: who belongs to which sandbox, and what it keeps of each."""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from .context import Context
from .database import Choice, Chosen, Database, Options, choose
from .entries import Entry, Kind
from .errors import ConfigError, SandboxError
from .pool import Books, CachedConnection, LedgerPool, Lending, holder, perform

if TYPE_CHECKING:
    from .box import Box

_REMEDIES: Final = (
    "call sandbox.allow(thread or executor) before it begins, start it with `repo.carry(function)`, or open the "
    "sandbox with shared=True for all threads; what cannot be undone goes into sandbox.unboxed(...)"
)


class Sandboxes:
    """The sandboxes of one repo's databases.

    Args:
        context: Where it stands which one the running thread or task belongs to.
        lending: What asks for a connection in place of the cache's books, from the first sandbox on.
        ledger: The cache's books.
        forget: Called when one is over, in which a directory may have read what is gone then.
    """

    def __init__(self, context: Context, lending: Lending, ledger: Books, forget: Callable[[], object]) -> None:
        self.context = context
        self._lending = lending
        self._ledger = ledger
        self._forget = forget
        self._open: tuple[Sandbox, ...] = ()
        # Those that have entered one, or were allowed in it, which they are for good: what they do later is refused.
        self._threads: weakref.WeakKeyDictionary[threading.Thread, Sandbox] = weakref.WeakKeyDictionary()
        # Guards the above.
        self._lock = threading.Lock()

    def join(self, thread: threading.Thread, sandbox: Sandbox) -> None:
        """Have *thread* belong to *sandbox*, and to no other one."""
        with self._lock:
            self._threads[thread] = sandbox

    def leave(self, thread: threading.Thread, sandbox: Sandbox) -> None:
        """Have *thread* belong to none any more, if it does to *sandbox*."""
        with self._lock:
            if self._threads.get(thread) is sandbox:
                del self._threads[thread]

    def check_apart(self, sandbox: Sandbox) -> None:
        """Raise `ConfigError` if who would belong to *sandbox* has a connection already: it leads to the database."""
        if not self._outside(sandbox):
            return
        gc.collect()
        if held := self._outside(sandbox):
            homes = {entry.connection.pool.database.home for entry in held if entry.connection is not None}
            raise ConfigError(
                f"a sandbox cannot begin while {holder(held[0])} has a connection to {', '.join(sorted(homes))}: what "
                "is written on it would stay. Leave its block, or close its session, first"
            )

    def _outside(self, sandbox: Sandbox) -> list[Entry[object, CachedConnection]]:
        perform(self._ledger, self._ledger.sweep())
        thread = threading.current_thread()
        return [
            entry
            for entry, _ in self._ledger.loans()
            # The books know who has it only where there are bounds; if not, it may be anybody.
            if entry.kind is not Kind.PINNED and (sandbox.shared or entry.borrower in (None, thread))
        ]

    def add(self, sandbox: Sandbox) -> None:
        """Have those who belong to *sandbox* use it."""
        with self._lock:
            if sandbox.shared and self._open:
                raise ConfigError(
                    "a sandbox is open already, and shared=True is for the only one: leave that one first"
                )
            if any(other.shared for other in self._open):
                raise ConfigError(
                    "a sandbox with shared=True is open, to which everybody belongs: leave that one first"
                )
            self._open = (*self._open, sandbox)
            # For good: what was begun in a sandbox and outlives it must not write to the database itself.
            self._lending.instead = self.lend

    def remove(self, sandbox: Sandbox) -> None:
        """Have nobody use *sandbox* any more."""
        with self._lock:
            self._open = tuple(other for other in self._open if other is not sandbox)
        self._forget()

    def current(self) -> Sandbox | None:
        """The one that the caller belongs to; None where there is none at all.

        Raises:
            SandboxError: It belongs to none, and there is one; or to one that is over, or its parent process's.
        """
        member: Member | None = self.context.membership.get()
        thread = threading.current_thread()
        sandbox = (self._shared or self._threads.get(thread)) if member is None else member.sandbox
        if sandbox is not None:
            sandbox.check_usable()
        elif self._open:
            raise SandboxError(f"{thread.name} belongs to no sandbox, and this repo is in one: {_REMEDIES}")
        return sandbox

    @property
    def _shared(self) -> Sandbox | None:
        return next((sandbox for sandbox in self._open if sandbox.shared), None)

    def lend(self, pool: LedgerPool) -> CachedConnection | None:
        """A connection of the caller's sandbox; None where the cache's own is meant."""
        sandbox = self.current()
        return None if sandbox is None else sandbox.lend(pool)

    def admit(self, database: Database) -> None:
        """Have a visit of *database* be in the caller's sandbox, where what asks a server something need not be.

        Raises:
            SandboxError: That is over other databases, or the caller belongs to none that is open.
        """
        sandbox = self.current()
        if sandbox is not None:
            sandbox.admit(database)

    def check_undoable(self, operation: str) -> None:
        """Raise `SandboxError` if the caller's sandbox could not undo *operation*."""
        sandbox = self.current() if self._open else None
        if sandbox is not None and not sandbox.is_left:
            raise SandboxError(
                f"{operation}() cannot be undone, and this is a sandbox: use `with sandbox.unboxed(...)` around it, "
                "and clean up"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """What belongs to a sandbox: a thread or task for as long as this stands in its context.

    Attributes:
        sandbox: Which.
        unboxed: The addresses that are left alone where it runs.
    """

    sandbox: Sandbox
    unboxed: frozenset[str] = frozenset()


class Sandbox:
    """What `Repo.sandbox` returns. Each database gets one connection, when it is first used, and a transaction on it.

    Attributes:
        shared: Whether every thread of the process belongs to it, as long as it is open.
        is_over: Whether it was left.
    """

    def __init__(
        self,
        sandboxes: Sandboxes,
        resolve: Callable[[Choice | None], Database],
        maintenance_database: str,
        *,
        addresses: frozenset[str] | None,
        shared: bool,
        check_deferred: bool,
    ) -> None:
        self.shared = shared
        self._sandboxes = sandboxes
        self._resolve = resolve
        self._maintenance_database = maintenance_database
        # Addresses, here and below: what a directory gives one home may be in two places, one after the other.
        self._addresses = addresses
        self._check_deferred = check_deferred
        self._pid = os.getpid()
        self.is_over = False
        self._boxes: dict[str, Box] = {}
        # Guards the above.
        self._lock = threading.Lock()
        # Which thread has entered it, and what is to be undone of `allow`.
        self._entered_by = threading.current_thread()
        self._allowed = ExitStack()

    def __repr__(self) -> str:
        return f"<Sandbox over {', '.join(database.home for database in self.databases) or 'nothing yet'}>"

    def __enter__(self) -> Self:
        context = self._sandboxes.context
        if context.is_holding:
            raise ConfigError("a sandbox cannot begin inside a transaction() or connection() block: leave that first")
        around: Member | None = context.membership.get()
        if around is not None and not around.sandbox.is_over:
            raise ConfigError("this thread or task is in a sandbox already: use that one")
        self._sandboxes.check_apart(self)
        self._sandboxes.add(self)
        self._entered_by = threading.current_thread()
        self._sandboxes.join(self._entered_by, self)
        context.membership.set(Member(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Roll everything back.

        Raises:
            SandboxError: Something was left that could not be undone, or is in use; a note if *error* is raised anyway.
        """
        self.is_over = True
        self._sandboxes.remove(self)
        self._sandboxes.leave(self._entered_by, self)
        if self._joined is not None:
            self._sandboxes.context.membership.set(None)
        self._allowed.close()
        problems = self._roll_back()
        if not problems:
            return
        message = "\n".join(["the sandbox was left, and", *(f"- {problem}" for problem in problems)])
        if error is None:
            raise SandboxError(message)
        error.add_note(message)

    @property
    def databases(self) -> list[Database]:
        """Those that were used in it so far, in that order."""
        return [box.database for box in list(self._boxes.values()) if box.database is not None]

    def allow(self, other: threading.Thread | Executor) -> None:
        """Have a thread belong to this sandbox, or what is submitted to an executor from now on until it ends.

        The thread does so for good: what it does when the sandbox is over is refused, until another one allows it.

        Raises:
            ConfigError: It is neither, or an executor of processes: those are in no sandbox. Or an executor that
                another sandbox has allowed.
        """
        from concurrent.futures import ProcessPoolExecutor  # here, as it loads all of multiprocessing

        self.check_usable()
        if isinstance(other, threading.Thread):
            self._sandboxes.join(other, self)
        elif isinstance(other, Executor) and not isinstance(other, ProcessPoolExecutor):
            self._allow_executor(other)
        else:
            raise ConfigError(
                f"allow() takes a thread or an executor of threads, not {other!r}: another process connects by itself, "
                "and what it commits is there for good"
            )

    def _allow_executor(self, executor: Executor) -> None:
        submit = executor.submit
        if isinstance(submit, _Submit):
            if submit.sandbox is not self:
                raise ConfigError(f"{executor!r} is allowed in another sandbox: use one executor for each")
            return
        executor.submit = _Submit(self, submit)  # type: ignore[method-assign]  # whatever submits to it, asyncio too
        self._allowed.callback(vars(executor).pop, "submit")

    def member(self) -> Member:
        """What the caller has of it: what is left alone where he is stays so in what he submits."""
        return self._joined or Member(self)

    def run_as(self, member: Member, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Call *function* as what *member* is."""
        variable = self._sandboxes.context.membership
        before = variable.get()
        variable.set(member)
        try:
            return function(*args, **kwargs)
        finally:
            variable.set(before)

    @contextmanager
    def unboxed(self, choice: Chosen = None, /, **options: Unpack[Options]) -> Iterator[None]:
        """Choose a database for the block, and use it as if there were no sandbox: what is written there stays.

            >>> with sandbox.unboxed("shard02"):                                    # doctest: +SKIP
            ...     MyRepo.execute("VACUUM users")

        For what cannot be done in a transaction, and for making and dropping databases. It sees nothing of what the
        sandbox has written, and waits for ever for what that has locked: do it first. Takes what `Repo.using` takes;
        without, it is the current database.
        """
        self.check_usable()
        context = self._sandboxes.context
        chosen = choose(choice, options) if choice is not None or options else context.choice
        database = self._resolve(chosen)
        addresses = {database.address, database.neighbour(self._maintenance_database).address}
        before = context.membership.get()
        with context.detached(), context.using(chosen):
            context.membership.set(Member(self, self.member().unboxed | addresses))
            try:
                yield
            finally:
                context.membership.set(before)

    # What follows is for the library.

    @property
    def _joined(self) -> Member | None:
        member: Member | None = self._sandboxes.context.membership.get()
        return member if member is not None and member.sandbox is self else None

    @property
    def is_left(self) -> bool:
        """Whether the caller is in an `unboxed` block."""
        return bool(self.member().unboxed)

    def check_usable(self) -> None:
        """Raise unless it is open, in this process."""
        if self._pid != os.getpid():
            raise SandboxError(
                "this process was forked off one that is in a sandbox, which is not its own: " + _REMEDIES
            )
        if self.is_over:
            raise SandboxError(
                f"{threading.current_thread().name} was begun in a sandbox that is over: wait for what a test starts, "
                "or cancel it, before the test ends"
            )

    def lend(self, pool: LedgerPool) -> CachedConnection | None:
        """A connection of the box that *pool* leads to."""
        database = pool.database
        if self._leaves(database):
            return None
        if pool.kind is not Kind.TRANSIENT:
            self.admit(database)
        elif database.name == self._maintenance_database and database.address not in self._boxes:
            # A question to a server, as of a directory. What would change anything there is refused before.
            return None
        return self._box(database.address).lend(pool)

    def admit(self, database: Database) -> None:
        """Have *database* be one of its, unless it is left alone here; `SandboxError` if it is over others."""
        if self._leaves(database):
            return
        if self._addresses is not None and database.address not in self._addresses:
            raise SandboxError(
                f"{database.address} is none of the databases of this sandbox, {', '.join(sorted(self._addresses))}: "
                "name it among them, or choose another one"
            )
        self._box(database.address)

    def _leaves(self, database: Database) -> bool:
        return database.address in self.member().unboxed

    def _box(self, address: str) -> Box:
        from .box import Box  # here, so that `import shardrepo` loads no driver

        with self._lock:
            box = self._boxes.get(address)
            if box is None:
                box = self._boxes[address] = Box(self, self.check_usable, self._check_deferred)
            return box

    def _roll_back(self) -> list[str]:
        with self._lock:
            boxes = list(self._boxes.values())
        # All are asked before the first is waited for, so that they take as long as the slowest of them.
        for box in boxes:
            box.start_ending()
        return [problem for box in boxes for problem in box.end()]


class _Submit:
    """An executor's ``submit``, of what belongs to a sandbox."""

    def __init__(self, sandbox: Sandbox, submit: Callable[..., Any]) -> None:
        self.sandbox = sandbox
        self._submit = submit

    def __call__(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return self._submit(self.sandbox.run_as, self.sandbox.member(), function, *args, **kwargs)
