"""What became of a run, and how that is said in few lines, however many databases there are."""

from __future__ import annotations

import heapq
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from ..across import Outcome
from ..errors import FleetError
from ..scripts import Standing, is_relative
from .lines import MAX_NAMES, line, some, unlisted
from .outcomes import Failure, Migration
from .plan import Task
from .runner import Ending

# What a report shows of each, so that no number of failures makes it longer than a screen or two.
_MAX_CAUSES: Final = 8
_MAX_BLOCKERS: Final = 2
_MAX_DRIFT: Final = 3
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
        if len(cause.names) < MAX_NAMES:
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
        for cause in causes[:_MAX_CAUSES]:
            failure = cause.failure
            where = f" in revision {failure.revision}" if failure.revision else ""
            code = f" ({failure.sqlstate})" if failure.sqlstate else ""
            yield f"  {cause.count} x {failure.kind}{code}{where}: {line(failure, 500)}"
            yield f"      {some(cause.names, cause.count)}"
            for blocker in failure.blockers[:_MAX_BLOCKERS]:
                yield f"      blocked by {line(blocker, 300)}"
        if len(causes) > _MAX_CAUSES:
            rest = sum(cause.count for cause in causes[_MAX_CAUSES:])
            yield f"  {rest} more, of {len(causes) - _MAX_CAUSES} other causes"

    def as_list(self) -> list[dict[str, Any]]:
        """As JSON has it: all of them, the most frequent first."""
        return [{**cause.failure.as_dict(), "count": cause.count, "databases": cause.names} for cause in self]


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
        left: How many were not begun, or not brought to an end.
        ending: Why it ended: "complete" also with failures, "budget" when more of them than may be, "interrupted",
            "journal" when that could not be written any more.
        seconds: How long it took.
        problem: Why the journal could not be written any more.
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
    _has_changed: dict[str, bool] = field(default_factory=dict)
    _failed_templates: int = 0
    _slowest: list[tuple[float, str]] = field(default_factory=list)

    @property
    def changed(self) -> int:
        """How many are further than they were, with none that failed; all of them at the target if none is left."""
        return sum(self._has_changed.values())

    def add(self, task: Task, outcome: Outcome[Migration]) -> None:
        """Count what became of a task. A database may have several, in rounds, and is counted once."""
        name = task.name
        had_changed = self._has_changed.pop(name, None)
        self.unchanged -= had_changed is False
        if outcome.error is not None:
            self._failed_templates += task.template is not None
            self.causes.add(name, task.server, outcome.error)
            return
        migration = outcome.result()
        if migration.drift:
            self.drifted[name] = migration.drift
        else:
            self._has_changed[name] = had_changed or migration.before != migration.after
            self.unchanged += not self._has_changed[name]
        heapq.heappush(self._slowest, (outcome.seconds, name))
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
        yield f"{self.work} {self.target}: {self._counted() or 'nothing to do'}, in {self.seconds:.1f} s"
        yield from self.causes.lines()
        for name, drift in islice(self.drifted.items(), MAX_NAMES):
            yield f"  {line(name)} differs from the models: {line('; '.join(drift[:_MAX_DRIFT]), 500)}"
        if len(self.drifted) > MAX_NAMES:
            yield f"  {len(self.drifted) - MAX_NAMES} more differ"
        yield from unlisted(self.unlisted)
        if self.ending != "complete":
            yield self._why_it_ended()
        if self.changed:
            slowest = (f"{line(name)} {seconds:.2f} s" for seconds, name in sorted(self._slowest, reverse=True))
            yield f"slowest: {', '.join(slowest)}"
        yield from self._what_next()

    def _counted(self) -> str:
        numbers = {
            "changed": self.changed,
            "unchanged": self.unchanged,
            "drifted": len(self.drifted),
            "failed": self.causes.count,
            "not begun": self.left,
            "servers not listed": len(self.unlisted),
        }
        return ", ".join(f"{number} {name}" for name, number in numbers.items() if number)

    def _why_it_ended(self) -> str:
        if self.ending == "budget":
            return "ended early: more failed than --max-failures or the stage allows; what was under way was finished"
        if self.ending == "interrupted":
            return "interrupted: what was under way has been finished, or rolled back to its last revision"
        return f"ended early: the journal cannot be written: {line(self.problem)}; what was under way was finished"

    def _what_next(self) -> Iterator[str]:
        if self.run is None or self.work == "check":
            return
        failed = self.causes.count - self._failed_templates
        if self.left or self._failed_templates or (failed and is_relative(self.target)):
            # It does again what has failed, too, and goes where that was to go: a relative target, asked for anew, is
            # reckoned from where a database was left.
            yield f"go on:  {self._command('--resume')}"
        if failed and not is_relative(self.target):
            yield f"retry:  {self._command('--failed')}"

    def _command(self, option: str) -> str:
        """What to type, with *option* and this run; a target like -1 would be taken for an option."""
        words = ["shardrepo", self.work, self.target, option, str(self.run)]
        if self.target.startswith("-"):
            words = ["shardrepo", self.work, option, str(self.run), "--", self.target]
        return shlex.join(words)

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
            "failed": self.causes.as_list(),
            "unlisted": {server: str(error) for server, error in self.unlisted.items()},
            "left": self.left,
            "ending": self.ending,
            "problem": self.problem,
            "seconds": round(self.seconds, 3),
            "exit_code": self.exit_code,
        }
