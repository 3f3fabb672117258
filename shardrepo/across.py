"""The same work in many databases: threads, bounded for each server and in all, and what comes of it as it comes.

Knows no repo: the work is given a database and does with it what it wants.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, copy_context
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from time import perf_counter
from types import TracebackType
from typing import Final, Generic, Self, TypeAlias, TypeVar, cast

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
    threads = ThreadPoolExecutor(MAX_THREADS, "shardrepo-across")
    settled = [target for target in targets if isinstance(target, Outcome)]
    schedule = _Schedule([target for target in targets if isinstance(target, Target)], per_server)
    steps = _steps(settled, schedule, partial(_visit, work), threads, copy_context())
    return Outcomes([target.name for target in targets], steps, threads)


class _Schedule:
    """Which database is next.

    A database keeps its place until its outcome is taken, so that no more outcomes wait than there are places.
    """

    def __init__(self, targets: Sequence[Target], per_server: int) -> None:
        self._per_server = per_server
        # By server; the one that had its turn longest ago is first.
        self._waiting: dict[str, deque[Target]] = {}
        self.busy: Counter[str] = Counter()
        for target in targets:
            self._waiting.setdefault(target.database.server, deque()).append(target)

    def begin(self) -> Target | None:
        """The next database, of the server where the fewest are busy; None while there is no place."""
        free = [server for server in self._waiting if self.busy[server] < self._per_server]
        if not free or self.busy.total() >= MAX_THREADS:
            return None
        server = min(free, key=self.busy.__getitem__)
        targets = self._waiting.pop(server)
        target = targets.popleft()
        if targets:
            self._waiting[server] = targets
        self.busy[server] += 1
        return target

    def end(self, target: Target) -> None:
        """Its outcome was taken."""
        self.busy[target.database.server] -= 1


_Done: TypeAlias = "SimpleQueue[tuple[Target, Future[Outcome[T]]]]"


def _steps(
    settled: Sequence[Outcome[T]],
    schedule: _Schedule,
    visit: Callable[[Target], Outcome[T]],
    threads: ThreadPoolExecutor,
    context: Context,
) -> Generator[Outcome[T]]:
    # No `finally`: the collector may close this in any thread, which must not wait for others. Nothing starts unless
    # somebody asks for more, and the threads end with the last reference to their executor.
    yield from settled
    done: _Done[T] = SimpleQueue()
    _start(schedule, visit, threads, context, done)
    while schedule.busy.total():
        target, future = done.get()
        schedule.end(target)
        # Before the consumer has it, who may take his time.
        _start(schedule, visit, threads, context, done)
        yield future.result()
    threads.shutdown()


def _start(
    schedule: _Schedule,
    visit: Callable[[Target], Outcome[T]],
    threads: ThreadPoolExecutor,
    context: Context,
    done: _Done[T],
) -> None:
    while (target := schedule.begin()) is not None:
        future = threads.submit(context.copy().run, visit, target)
        future.add_done_callback(partial(_put, done, target))


def _put(done: _Done[T], target: Target, future: Future[Outcome[T]]) -> None:
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
