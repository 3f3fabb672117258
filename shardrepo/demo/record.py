"""A record of the cache's books: every state that they were in, and when each connection began to close.

The servers' own counts are held against it. A sample takes time, and a connection that the client has closed
is listed by its server for some milliseconds more, so that a sample is compared with all states within it.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from time import monotonic
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import event

from ..ledger import Ledger
from ..pool import LedgerPool
from .sampler import Sample

# A closed connection that a server still lists after this long counts as open: it may be a leak.
MAX_LINGER: Final = 1.0


class Recorder:
    """Records every step of a ledger while it is entered. To be entered before the ledger is used.

    It stands in for the ledger's lock: every step ends by leaving that, with the books in their new state.
    """

    def __init__(self, ledger: Ledger[Any, Any]) -> None:
        self._ledger = ledger
        self._lock = ledger._lock
        self.record = Record(ledger.pool_size)
        # Guards the two columns about closing, which belong together and are in the order of time.
        self._closings = threading.Lock()

    def __enter__(self) -> Self:
        event.listen(LedgerPool, "close", self._closing)
        self._ledger._lock = _Noted(self)  # type: ignore[assignment]  # enough of a lock for a ledger
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ledger._lock = self._lock
        event.remove(LedgerPool, "close", self._closing)

    def _closing(self, connection: Any, _record: object) -> None:
        with self._closings:
            self.record.pids.append(connection.info.backend_pid)
            self.record.closed_at.append(monotonic())

    def note(self) -> None:
        """Add the present state. Called with the ledger's lock held."""
        ledger, record = self._ledger, self.record
        being_closed = len(record.closed_at) - ledger._closed
        record.busy.append(len(ledger._in_use()) + len(ledger._connecting))
        record.idle.append(len(ledger._idle))
        record.doomed.append(max(0, ledger._closing - being_closed))
        record.at.append(monotonic())


class _Noted:
    """The ledger's lock, with a note at the end of each step."""

    def __init__(self, recorder: Recorder) -> None:
        self._acquire = recorder._lock.acquire
        self._release = recorder._lock.release
        self._note = recorder.note

    def acquire(self) -> bool:
        return self._acquire()

    def release(self) -> None:
        # Before the release: the states are in the order in which they were.
        self._note()
        self._release()

    __enter__ = acquire

    def __exit__(self, *exc_info: object) -> None:
        self.release()


def _longs() -> array[int]:
    return array("l")


def _doubles() -> array[float]:
    return array("d")


@dataclass(slots=True)
class Record:
    """The states of a ledger, as columns: little memory, so that the record does not show in what is measured.

    Attributes:
        pool_size: The target.
        at: When each state began.
        busy: Connections in use or connecting, in each.
        idle: Idle ones.
        doomed: Those taken out of the cache whose closing has not begun.
        pids: The backends whose connections were closed.
        closed_at: When the closing of each began.
    """

    pool_size: int
    at: array[float] = field(default_factory=_doubles)
    busy: array[int] = field(default_factory=_longs)
    idle: array[int] = field(default_factory=_longs)
    doomed: array[int] = field(default_factory=_longs)
    pids: array[int] = field(default_factory=_longs)
    closed_at: array[float] = field(default_factory=_doubles)

    def bound(self, start: float, end: float) -> int:
        """The most connections that the servers may have seen open at a moment of [start, end].

        That is ``max(pool_size, in use + connecting)`` and what is taken out and not yet being closed.
        """
        first = max(0, bisect_right(self.at, start) - 1)
        states = range(first, bisect_right(self.at, end))
        return max((max(self.pool_size, self.busy[n]) + self.doomed[n] for n in states), default=self.pool_size)

    def lingering(self, sample: Sample) -> set[int]:
        """The sampled backends whose connections the client had begun to close, not long before."""
        first = bisect_left(self.closed_at, sample.start - MAX_LINGER)
        closed = set(self.pids[first : bisect_right(self.closed_at, sample.end)])
        return closed & {pid for server in sample.connections for pid, _ in server}

    def excess(self, sample: Sample) -> int:
        """How many open connections a sample shows above the bound; 0 or less where it holds."""
        return sample.total - len(self.lingering(sample)) - self.bound(sample.start, sample.end)

    def mean_busy(self, start: float, end: float) -> float:
        """The connections in use or connecting, on average over [start, end]."""
        times = [start, *(at for at in self.at if start < at < end), end]
        first = bisect_right(self.at, start) - 1
        area = sum(
            (until - since) * (self.busy[first + n] if first + n >= 0 else 0)
            for n, (since, until) in enumerate(pairwise(times))
        )
        return area / (end - start)


def samples_over(record: Record, samples: Sequence[Sample]) -> list[Sample]:
    """The samples that show more open connections than the books allow."""
    return [sample for sample in samples if record.excess(sample) > 0]
