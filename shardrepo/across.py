"""The same work in many databases: threads, bounded for each server and in all, and what comes of it as it comes.

Knows no repo: the work is given a database and does with it what it wants.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from time import perf_counter
from types import TracebackType
from typing import Final, Generic, Self, TypeVar, cast

from .config import checked_count
from .database import Database
from .errors import note_database

T = TypeVar("T")

checked_per_server: Final = checked_count(
    "per_server", "visits nothing: give at how many databases of a server to work at a time"
)

# Sixteen servers at four each. One process asks some 350 databases a second a short question, with three threads as
# with 64 (measured on two cores); more of them only wait for more that is slow at the same time.
MAX_THREADS: Final = 64


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What happened to one database.

    Attributes:
        name: The name by which it was chosen; its home where more than a name was given.
        home: What its objects remember; None where nobody knows where it is.
        seconds: How long it took, the connect included.
        value: What came of it; None if that is an error.
        error: What went wrong, with a note that names the database.
    """

    name: str
    home: str | None
    seconds: float
    value: T | None = None
    error: Exception | None = None

    @property
    def ok(self) -> bool:
        """Whether it went well."""
        return self.error is None

    def result(self) -> T:
        """The value; raises the error if there is one."""
        if self.error is not None:
            raise self.error
        return cast("T", self.value)


@dataclass(frozen=True, slots=True)
class Target:
    """A database to visit.

    Attributes:
        name: What its outcome is called.
        database: Where it is.
    """

    name: str
    database: Database


class Outcomes(Iterator[Outcome[T]]):
    """The outcomes of work in many databases, each as soon as it is there: an iterator, of use to one thread at a time.

    Nothing is done before the first is asked for. After that, so much is under way, or done and not yet asked for, as
    the bounds allow: who takes them slowly slows the work, and nothing piles up. To stop early, leave it as a context
    manager or `close` it; one that is merely dropped starts nothing more either.
    """

    def __init__(self, names: Sequence[str], steps: Generator[Outcome[T]], threads: ThreadPoolExecutor) -> None:
        self._names = names
        self._steps = steps
        self._threads = threads

    def __next__(self) -> Outcome[T]:
        return next(self._steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Start nothing more, and wait for what runs: when this returns, nothing does."""
        self._steps.close()
        self._threads.shutdown()

    def collect(self) -> dict[str, T]:
        """Wait for all; what came of each, by name, in the order in which the databases were named.

        Raises:
            ExceptionGroup: With every failure, when there is one. What was done elsewhere stays done.
        """
        with self:
            found = {outcome.name: outcome for outcome in self}
        outcomes = [found[name] for name in self._names if name in found]
        errors = [outcome.error for outcome in outcomes if outcome.error is not None]
        if errors:
            raise ExceptionGroup(f"{len(errors)} of {len(outcomes)} databases failed", errors)
        return {outcome.name: outcome.result() for outcome in outcomes}


def fan_out(targets: Sequence[Target | Outcome[T]], work: Callable[[Target], T], *, per_server: int) -> Outcomes[T]:
    """Do *work* with every target, in threads: *per_server* of them at a time for each server, `MAX_THREADS` in all.

    Servers have their turns: a slow one delays no other. What *work* raises, an `Exception`, is the outcome of its
    database alone; anything else ends the iteration. It runs in a copy of the context in which this was called.

    Args:
        targets: Databases, each name once, or the outcomes of those that cannot be visited, which come first.
        work: What to do with one.
        per_server: At how many databases of a server at a time.

    Raises:
        ConfigError: *per_server* is no number, or below 1.
    """
    checked_per_server(per_server)
    left = _Work([target for target in targets if isinstance(target, Target)], work, per_server)
    settled = [target for target in targets if isinstance(target, Outcome)]
    return Outcomes([target.name for target in targets], left.outcomes(settled), left.threads)


class _Work(Generic[T]):
    """What is still to be done, and the threads that do it. Nothing starts unless an outcome is asked for.

    A database keeps its place until its outcome is taken, so that no more outcomes wait than there are places.
    """

    def __init__(self, targets: Sequence[Target], work: Callable[[Target], T], per_server: int) -> None:
        self.threads = ThreadPoolExecutor(MAX_THREADS, "shardrepo-across")
        self._work = work
        self._per_server = per_server
        self._context = copy_context()
        # By server; the one that had its turn longest ago is first.
        self._waiting: dict[str, deque[Target]] = {}
        self._busy: Counter[str] = Counter()
        self._done: SimpleQueue[tuple[Target, Future[Outcome[T]]]] = SimpleQueue()
        for target in targets:
            self._waiting.setdefault(target.database.server, deque()).append(target)

    def outcomes(self, settled: Sequence[Outcome[T]]) -> Generator[Outcome[T]]:
        """Those that are *settled*, then the others as they come."""
        # No `finally`: the collector may close this in any thread, which must not wait for others. The threads end with
        # the last reference to their executor.
        yield from settled
        self._start()
        while self._busy.total():
            target, future = self._done.get()
            self._busy[target.database.server] -= 1
            # Before the consumer has it, who may take his time.
            self._start()
            yield future.result()
        self.threads.shutdown()

    def _start(self) -> None:
        while (target := self._next()) is not None:
            self._busy[target.database.server] += 1
            future = self.threads.submit(self._context.copy().run, _visit, self._work, target)
            # Knows the queue alone: what nobody takes out of it must not keep the threads alive.
            future.add_done_callback(partial(_hand_in, self._done, target))

    def _next(self) -> Target | None:
        """A database of the server where the fewest are busy; None while there is no place."""
        free = [server for server in self._waiting if self._busy[server] < self._per_server]
        if not free or self._busy.total() >= MAX_THREADS:
            return None
        server = min(free, key=self._busy.__getitem__)
        targets = self._waiting.pop(server)
        target = targets.popleft()
        if targets:
            self._waiting[server] = targets
        return target


def _hand_in(done: SimpleQueue[tuple[Target, Future[Outcome[T]]]], target: Target, future: Future[Outcome[T]]) -> None:
    done.put((target, future))


def _visit(work: Callable[[Target], T], target: Target) -> Outcome[T]:
    home = target.database.home
    begun = perf_counter()
    try:
        value = work(target)
    except Exception as error:
        note_database(error, home)
        return Outcome(target.name, home, perf_counter() - begun, error=error)
    return Outcome(target.name, home, perf_counter() - begun, value)
