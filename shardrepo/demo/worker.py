"""A load in a process of its own, so that the memory it takes is its own."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection as Pipe
from time import monotonic
from types import TracebackType
from typing import Final, Self, TypeAlias

from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from ..stats import Stats
from .child import Child
from .drivers import RepoDriver, Way, make_driver
from .load import Load, Plan, Users, percentile
from .record import Record, Recorder

# Seconds between two reports of a running load.
_REPORT: Final = 0.1


@dataclass(frozen=True, slots=True)
class Running:
    """How far a load is."""

    at: float
    operations: int
    errors: int
    wrong: int
    stats: Stats | None


@dataclass(frozen=True, slots=True)
class Rested:
    """A load that has ended; its connections are as it left them, until its process is let go."""

    started: float
    ended: float
    operations: int
    rows: int
    wrong: int
    errors: dict[str, int]
    inserted: dict[str, int]
    p50: float
    p99: float
    memory_before: int
    memory_after: int
    stats: Stats | None
    record: Record | None = field(repr=False)


Message: TypeAlias = "Running | Rested"

# Makes the load, in the process that runs it.
Preparation: TypeAlias = Callable[[Sequence[URL], Plan], Users]


class Worker:
    """Runs a load in a new process; `pipe` yields `Running` reports, then one `Rested`.

    Leaving the block lets the process dispose of what it holds, and end.

    Args:
        prepare: To be found by its name: a function of a module, or a `partial` of one.
    """

    def __init__(self, prepare: Preparation, urls: Sequence[URL], plan: Plan) -> None:
        self._arguments = (prepare, urls, plan)

    def __enter__(self) -> Self:
        self._child = Child(_work, *self._arguments)
        self.pipe = self._child.pipe
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.end()


def prepare(way: Way, application_name: str, pool_size: int, urls: Sequence[URL], plan: Plan) -> Load:
    """Make the load of *way*, which opens nothing yet."""
    return Load(make_driver(way, application_name, pool_size), urls, plan)


def _work(pipe: Pipe, prepare: Preparation, urls: Sequence[URL], plan: Plan) -> None:
    """Be the worker, until the other end of *pipe* is closed."""
    load = prepare(urls, plan)
    driver = load.driver
    with ExitStack() as stack:
        stack.enter_context(suppress(BrokenPipeError, ConnectionResetError))
        stack.callback(driver.dispose)
        recorder = stack.enter_context(Recorder(driver.ledger)) if isinstance(driver, RepoDriver) else None
        stack.callback(load.stop)
        # What both ways load at their first connect is not what they cost.
        create_engine(urls[0], poolclass=NullPool)
        before = memory()
        load.start()
        while not load.wait(_REPORT):
            if pipe.poll():
                return
            pipe.send(_running(load, driver.stats()))
        pipe.send(_rested(load, before, driver.stats(), recorder))
        pipe.poll(None)


def _running(load: Users, stats: Stats | None) -> Running:
    wrong = sum(tally.wrong for tally in load.tallies)
    return Running(monotonic(), load.operations, load.errors().total(), wrong, stats)


def _rested(load: Users, before: int, stats: Stats | None, recorder: Recorder | None) -> Rested:
    after = memory()
    latencies = sorted(latency for tally in load.tallies for latency in tally.latencies)
    return Rested(
        started=load.started,
        ended=load.ended,
        operations=load.operations,
        rows=sum(tally.rows for tally in load.tallies),
        wrong=sum(tally.wrong for tally in load.tallies),
        errors=dict(load.errors()),
        inserted=dict(load.inserted()),
        p50=percentile(latencies, 0.5),
        p99=percentile(latencies, 0.99),
        memory_before=before,
        memory_after=after,
        stats=stats,
        record=recorder.record if recorder else None,
    )


def memory() -> int:
    """The bytes that this process occupies; without psutil the most that it ever did."""
    try:
        import psutil  # type: ignore[import-untyped]  # it may be absent; its stubs are
    except ModuleNotFoundError:
        # Linux counts in KiB, macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return int(psutil.Process().memory_info().rss)
