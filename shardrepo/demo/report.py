"""What the demo measured, and how it is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .drivers import Way
from .record import samples_over
from .sampler import Interval, Sample
from .worker import Rested


@dataclass(frozen=True, slots=True)
class Settings:
    """What the demo was asked to do: the options of its command."""

    servers: int = 3
    databases: int = 60
    threads: int = 32
    think_ms: float = 50
    seconds: float = 10
    pool_size: int = 20
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Audit:
    """What the databases held after a load.

    Attributes:
        strays: Rows in a database that they were not meant for.
        lost: Rows that were inserted, as far as the load was told, and are not there.
    """

    strays: int
    lost: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A load, as its process and the servers saw it."""

    load: Rested
    samples: Sequence[Sample] = field(repr=False)

    @property
    def peak(self) -> Sample:
        """The sample with the most connections."""
        return max(self.samples, key=lambda sample: sample.total)

    @property
    def rest(self) -> Sample:
        """The last sample: the load has ended, nothing is disposed of."""
        return self.samples[-1]

    @property
    def over(self) -> int | None:
        """How many samples show more than the books allow; None where there are no books."""
        record = self.load.record
        return None if record is None else len(samples_over(record, self.samples))

    @property
    def seconds(self) -> float:
        return self.load.ended - self.load.started

    @property
    def throughput(self) -> float:
        """Operations per second."""
        return self.load.operations / self.seconds

    @property
    def growth(self) -> int:
        """Bytes that the load's process grew by."""
        return self.load.memory_after - self.load.memory_before

    @property
    def errors(self) -> int:
        return sum(self.load.errors.values())

    @property
    def mean_busy(self) -> float | None:
        """Connections in use or connecting, on average over the load."""
        record = self.load.record
        return None if record is None else record.mean_busy(self.load.started, self.load.ended)


@dataclass(frozen=True, slots=True)
class Outcome(Measured):
    """One way's load, and what it left in the databases."""

    way: Way
    audit: Audit

    @property
    def wrong(self) -> int:
        """Rows that the load met in the wrong database, and those that the audit found there, or nowhere."""
        return self.load.wrong + self.audit.strays + self.audit.lost


@dataclass(frozen=True, slots=True)
class Report:
    """Both ways, side by side."""

    settings: Settings
    outcomes: Mapping[Way, Outcome]
    picture: Path

    @property
    def passed(self) -> bool:
        """Whether no row was wrong, and the Repo failed nothing and kept its bound in every sample."""
        repo = self.outcomes["repo"]
        return not any(outcome.wrong for outcome in self.outcomes.values()) and not repo.over and not repo.errors

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        ways = {outcome.way.replace(" ", "_"): _as_dict(outcome) for outcome in self.outcomes.values()}
        return {"settings": asdict(self.settings), **ways, "picture": str(self.picture), "passed": self.passed}


def _as_dict(outcome: Outcome) -> dict[str, Any]:
    interval = Interval.of(outcome.samples)
    stats = outcome.load.stats
    return {
        "connections": {
            "peak": outcome.peak.total,
            "peak_per_server": outcome.peak.per_server,
            "rest": outcome.rest.total,
            "rest_per_server": outcome.rest.per_server,
        },
        "samples": {
            "count": len(outcome.samples),
            "over": outcome.over,
            "interval_ms_median": round(interval.median * 1000, 1),
            "interval_ms_longest": round(interval.longest * 1000, 1),
        },
        "operations": outcome.load.operations,
        "seconds": round(outcome.seconds, 2),
        "operations_per_second": round(outcome.throughput, 1),
        "p50_ms": round(outcome.load.p50 * 1000, 2),
        "p99_ms": round(outcome.load.p99 * 1000, 2),
        "memory_growth_bytes": outcome.growth,
        "errors": outcome.load.errors,
        "rows_checked": outcome.load.rows,
        "wrong_rows": outcome.wrong,
        "mean_busy": None if outcome.mean_busy is None else round(outcome.mean_busy, 2),
        "hit_rate": None if stats is None else round(stats.hit_rate, 4),
        "stats": None if stats is None else asdict(stats),
    }
