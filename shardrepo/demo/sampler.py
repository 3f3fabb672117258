"""The sampler: a process of its own that asks every server, time and again, which connections an application has.

What a cache says of itself proves nothing; what the servers list does. A process, because a thread of a
busy application would be late exactly when there is something to see.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection as Pipe
from statistics import median
from time import monotonic
from types import TracebackType
from typing import Final, Self

from sqlalchemy import create_engine
from sqlalchemy.engine import URL, Connection
from sqlalchemy.pool import NullPool

from .child import Child

# Seconds from the start of one sample to that of the next, if the servers answer in time.
INTERVAL: Final = 0.02

_QUESTION: Final = (
    "SELECT pid, datname FROM pg_stat_activity WHERE application_name = %s AND backend_type = 'client backend'"
)


@dataclass(frozen=True, slots=True)
class Sample:
    """What the servers listed between two moments.

    Attributes:
        start: When the first server was asked, by the system's monotonic clock, the same in every process.
        end: When the last one had answered.
        connections: For each server, the process and the database of every connection.
    """

    start: float
    end: float
    connections: tuple[tuple[tuple[int, str], ...], ...]

    @property
    def per_server(self) -> tuple[int, ...]:
        """How many connections each server listed."""
        return tuple(map(len, self.connections))

    @property
    def total(self) -> int:
        """How many connections all servers listed."""
        return sum(self.per_server)


@dataclass(frozen=True, slots=True)
class Interval:
    """The time from one sample to the next, as it really was: seconds."""

    median: float
    longest: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Interval:
        """Measure it over *samples*; zeros for fewer than two."""
        gaps = [later.start - earlier.start for earlier, later in pairwise(samples)] or [0.0]
        return cls(median(gaps), max(gaps))


class Sampler:
    """Samples from the time it is entered until it is left; `drain` takes over what has come.

    Args:
        urls: A database of each server, with a user who may see all of pg_stat_activity.
        application_name: Whose connections to list.
    """

    def __init__(self, urls: Sequence[URL], application_name: str) -> None:
        self.samples: list[Sample] = []
        self._urls = urls
        self._application_name = application_name

    def __enter__(self) -> Self:
        self._child = Child(_sample, self._urls, self._application_name)
        self.pipe = self._child.pipe
        try:
            self.drain(until=1)
        except BaseException:
            self._child.end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.end()

    def drain(self, until: int = 0) -> None:
        """Take over what has been sampled, and wait for more until there are *until* samples.

        To be called several times a second: what is not taken over stops the sampler when the pipe is full.

        Raises:
            EOFError: The sampler has died.
        """
        while self.pipe.poll(None if len(self.samples) < until else 0):
            self.samples.append(self.pipe.recv())

    def drain_after(self, moment: float) -> None:
        """Take over samples until one was begun after *moment*."""
        while not self.samples or self.samples[-1].start < moment:
            self.drain(until=len(self.samples) + 1)


def _sample(pipe: Pipe, urls: Sequence[URL], application_name: str) -> None:
    """Be the sampler, until the other end of *pipe* is closed."""
    with ExitStack() as stack:
        servers = [stack.enter_context(_connect(url)) for url in urls]
        begun = monotonic()
        try:
            while not pipe.poll(max(0.0, begun + INTERVAL - monotonic())):
                begun = monotonic()
                connections = tuple(_ask(server, application_name) for server in servers)
                pipe.send(Sample(begun, monotonic(), connections))
        except (BrokenPipeError, ConnectionResetError):
            return


def _connect(url: URL) -> Connection:
    engine = create_engine(
        url,
        poolclass=NullPool,
        isolation_level="AUTOCOMMIT",
        connect_args={"application_name": "shardrepo-sampler"},
    )
    return engine.connect()


def _ask(server: Connection, application_name: str) -> tuple[tuple[int, str], ...]:
    return tuple((pid, name) for pid, name in server.exec_driver_sql(_QUESTION, (application_name,)))
