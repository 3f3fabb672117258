"""What became of a run, and how that is said in few lines, however many databases there are."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..across import Outcome
from ..errors import FleetError
from ..scripts import Standing
from .outcomes import Failure, Migration
from .plan import Task
from .runner import Ending

# What a report shows of each, so that no number of failures makes it longer than a screen or two.
MAX_CAUSES: Final = 8
_MAX_NAMES: Final = 5
_SLOWEST: Final = 5

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
OVER_BUDGET: Final = 3
INTERRUPTED: Final = 130


@dataclass(slots=True)
class Cause:
    """Failures that have the same cause.

    Attributes:
        failure: The first of them.
        count: How many there are.
        names: The first few databases.
    """

    failure: Failure
    count: int = 0
    names: list[str] = field(default_factory=list)


class Causes:
    """Failures by cause: those of a server that is not reached are one, however many databases it has."""

    def __init__(self) -> None:
        self._causes: dict[tuple[str, ...], Cause] = {}

    def add(self, name: str, server: str, error: Exception) -> None:
        """Count a failure."""
        failure = Failure.of(error)
        apart = (server,) if failure.kind in _OF_A_SERVER else ()
        cause = self._causes.setdefault((*apart, *failure.cause), Cause(failure))
        cause.count += 1
        if len(cause.names) < _MAX_NAMES:
            cause.names.append(name)

    @property
    def count(self) -> int:
        """How many failures there are."""
        return sum(cause.count for cause in self._causes.values())

    def __iter__(self) -> Iterator[Cause]:
        return iter(sorted(self._causes.values(), key=lambda cause: -cause.count))

    def lines(self) -> Iterator[str]:
        """A few lines for each of the most frequent ones."""
        causes = list(self)
        for cause in causes[:MAX_CAUSES]:
            failure = cause.failure
            where = f" in revision {failure.revision}" if failure.revision else ""
            code = f" ({failure.sqlstate})" if failure.sqlstate else ""
            more = f" and {cause.count - len(cause.names)} more" if cause.count > len(cause.names) else ""
            yield f"  {cause.count} x {failure.kind}{code}{where}: {failure}"
            yield f"      {', '.join(cause.names)}{more}"
            for blocker in failure.blockers[:2]:
                yield f"      blocked by {blocker}"
        if len(causes) > MAX_CAUSES:
            rest = sum(cause.count for cause in causes[MAX_CAUSES:])
            yield f"  {rest} more, of {len(causes) - MAX_CAUSES} other causes: see the journal"


# Errors that say something of a server, and nothing of a database.
_OF_A_SERVER: Final = frozenset({"ServerUnavailableError", "ServerFullError", "ConnectError"})


@dataclass(slots=True)
class Report:
    """What became of each database of a run, in numbers.

    Attributes:
        work: What was done: "upgrade", "downgrade", "stamp" or "check".
        target: To which revision.
        run: What its journal is called; None without one.
        standings: How the databases stood to the target before, by how many.
        unchanged: How many were there before, or were brought there by somebody else meanwhile.
        drifted: What differs from the models, by database; for a check.
        causes: Why the others failed.
        unlisted: Why the databases of a server could not be listed, by server.
        left: How many were not begun.
        ending: Why it ended: "complete" also with failures, "budget" when more of them than may be, "interrupted",
            "journal" when that could not be written any more.
        seconds: How long it took.
    """

    work: str
    target: str
    run: str | None = None
    standings: Counter[Standing] = field(default_factory=Counter)
    unchanged: int = 0
    drifted: dict[str, Sequence[str]] = field(default_factory=dict)
    causes: Causes = field(default_factory=Causes)
    unlisted: Mapping[str, Exception] = field(default_factory=dict)
    left: int = 0
    ending: Ending = "complete"
    seconds: float = 0.0
    problem: str | None = None
    _changed: set[str] = field(default_factory=set)
    _slowest: list[tuple[float, str]] = field(default_factory=list)

    @property
    def changed(self) -> int:
        """How many are at the target now that were not."""
        return len(self._changed)

    def add(self, task: Task, outcome: Outcome[Migration]) -> None:
        """Count what became of a task."""
        if outcome.error is not None:
            self._changed.discard(outcome.name)
            self.causes.add(outcome.name, task.server, outcome.error)
            return
        assert outcome.value is not None
        if outcome.value.drift:
            self.drifted[outcome.name] = outcome.value.drift
        elif outcome.value.before != outcome.value.after:
            self._changed.add(outcome.name)
        else:
            self.unchanged += 1
        heapq.heappush(self._slowest, (outcome.seconds, outcome.name))
        if len(self._slowest) > _SLOWEST:
            heapq.heappop(self._slowest)

    @property
    def failed(self) -> int:
        """How many databases are not where they were to go, as far as is known."""
        return self.causes.count + len(self.unlisted)

    @property
    def exit_code(self) -> int:
        """0 when all are where they were to go; 1 when some failed, 3 when more than may, 130 when interrupted."""
        if self.ending == "interrupted":
            return INTERRUPTED
        if self.ending == "budget":
            return OVER_BUDGET
        return FAILED if self.failed or self.left or self.drifted or self.ending == "journal" else OK

    def check(self) -> None:
        """Raise `FleetError` unless all are where they were to go."""
        if self.exit_code != OK:
            raise FleetError("\n".join(self.lines()), report=self)

    def lines(self) -> Iterator[str]:
        """The report: at most 60 lines."""
        numbers = {
            "changed": self.changed,
            "unchanged": self.unchanged,
            "drifted": len(self.drifted),
            "failed": self.causes.count,
            "not begun": self.left,
        }
        counted = ", ".join(f"{number} {name}" for name, number in numbers.items() if number) or "nothing to do"
        yield f"{self.work} {self.target}: {counted}, in {self.seconds:.1f} s"
        yield from self.causes.lines()
        for name, drift in list(self.drifted.items())[:_MAX_NAMES]:
            yield f"  {name} differs from the models: {'; '.join(drift[:3])}"
        for server, error in list(self.unlisted.items())[:MAX_CAUSES]:
            yield f"  the databases of {server} could not be listed, and were left alone: {error}"
        if self.ending == "budget":
            yield "ended early: more failed than --max-failures or the stage allows; what was under way was finished"
        if self.ending == "interrupted":
            yield "interrupted: what was under way has been finished, or rolled back to its last revision"
        if self.ending == "journal":
            yield f"ended early: the journal cannot be written: {self.problem}"
        if self.changed and self._slowest:
            shown = ", ".join(f"{name} {seconds:.2f} s" for seconds, name in sorted(self._slowest, reverse=True))
            yield f"slowest: {shown}"
        yield from self._what_next()

    def _what_next(self) -> Iterator[str]:
        if self.run is None or self.work == "check":
            return
        if self.left:
            yield f"go on:  shardrepo {self.work} --resume {self.run}"
        if self.causes.count:
            yield f"retry:  shardrepo {self.work} {self.target} --failed {self.run}"

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "work": self.work,
            "target": self.target,
            "run": self.run,
            "standings": dict(self.standings),
            "changed": self.changed,
            "unchanged": self.unchanged,
            "drifted": {name: list(drift) for name, drift in self.drifted.items()},
            "failed": [
                {**cause.failure.as_dict(), "count": cause.count, "databases": cause.names} for cause in self.causes
            ],
            "unlisted": {server: str(error) for server, error in self.unlisted.items()},
            "left": self.left,
            "ending": self.ending,
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code,
        }
