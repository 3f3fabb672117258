"""Asking a fleet: where its schemas are, what its databases say, how long they take to answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import text

from ..across import Outcomes, Target, fan_out
from ..scripts import Revisions, Scripts, Source, Standing
from .lines import line, some, unlisted
from .members import ALL, Members, Selection, members, targets_of
from .planning import source_of
from .report import Causes
from .sweep import PER_SERVER, sweep

if TYPE_CHECKING:
    from ..repo import Repo

# What a status shows, so that no number of databases makes it longer than a screen.
_MAX_REVISIONS: Final = 12

_STANDINGS: Final[tuple[Standing, ...]] = ("at", "behind", "ahead", "unknown")

_QUESTION: Final = text("SELECT 1")


@dataclass(slots=True)
class Status:
    """Where a fleet's schemas are.

    Attributes:
        target: The revisions that they are compared with.
        revisions: How many databases are at which revisions.
        standings: The databases that are at the target, behind it, ahead of it, or at a revision without a script.
        causes: Why others could not be asked.
        unlisted: Why the databases of a server could not be listed, by server.
    """

    target: Revisions
    revisions: Counter[Revisions] = field(default_factory=Counter)
    standings: dict[Standing, list[str]] = field(default_factory=lambda: {s: [] for s in _STANDINGS})
    causes: Causes = field(default_factory=Causes)
    unlisted: Mapping[str, Exception] = field(default_factory=dict)

    @property
    def is_level(self) -> bool:
        """Whether every database is at the target."""
        others = sum(len(names) for standing, names in self.standings.items() if standing != "at")
        return not others and not self.causes.count and not self.unlisted

    def lines(self) -> Iterator[str]:
        """A screen's worth of it, however many databases there are."""
        total = sum(self.revisions.values()) + self.causes.count
        counted = [f"{len(names)} {standing}" for standing, names in self.standings.items() if names]
        if self.causes.count:
            counted.append(f"{self.causes.count} unreachable")
        yield f"{total} databases, {', '.join(counted) or 'none of them asked'}; {line(said(self.target))} is meant"
        for revisions, count in self.revisions.most_common(_MAX_REVISIONS):
            yield f"  {count:>6}  {line(said(revisions))}"
        if len(self.revisions) > _MAX_REVISIONS:
            yield f"  and {len(self.revisions) - _MAX_REVISIONS} more revisions"
        for standing, names in self.standings.items():
            if standing != "at" and names:
                yield f"{standing}: {some(sorted(names))}"
        if self.causes.count:
            yield "unreachable:"
            yield from self.causes.lines()
        yield from unlisted(self.unlisted)

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "target": list(self.target),
            "revisions": {said(revisions): count for revisions, count in self.revisions.items()},
            **{standing: sorted(names) for standing, names in self.standings.items()},
            "unreachable": self.causes.as_list(),
            "unlisted": {server: str(error) for server, error in self.unlisted.items()},
        }


def said(revisions: Revisions) -> str:
    """*revisions* in words."""
    return " ".join(revisions) or "base"


def status(
    repo: type[Repo],
    revision: str = "heads",
    *,
    where: Selection = ALL,
    per_server: int = PER_SERVER,
    source: Source | None = None,
) -> Status:
    """How the schemas of the fleet stand to *revision*: one small question to each database.

    Raises:
        ConfigError: There is no such revision, or nothing is selected.
    """
    scripts = Scripts.of(source or source_of(repo))
    target = scripts.resolve(revision)
    found = members(repo, where)
    result = Status(target, unlisted=found.failures)
    servers = {member.name: member.database.server for member in found.found}
    for outcome in sweep(repo._router.databases, targets_of(found.found), per_server):
        if outcome.error is not None:
            result.causes.add(outcome.name, servers[outcome.name], outcome.error)
        else:
            at = outcome.result()
            result.revisions[at] += 1
            result.standings[scripts.standing(at, target)].append(outcome.name)
    return result


def behind(repo: type[Repo], found: Members, source: Source | None = None) -> Members:
    """Those of *found* that lack revisions; and those that cannot be asked, which nobody knows to be anywhere else."""
    scripts = Scripts.of(source or source_of(repo))
    lacking = {
        outcome.name
        for outcome in sweep(repo._router.databases, targets_of(found.found))
        if outcome.error is not None or scripts.standing(outcome.result(), scripts.heads) == "behind"
    }
    return Members([member for member in found.found if member.name in lacking], found.failures)


def current(repo: type[Repo], *, where: Selection = ALL, per_server: int = PER_SERVER) -> Outcomes[Revisions]:
    """The revisions that each database is at, as the answers come."""
    found = members(repo, where)
    return sweep(repo._router.databases, found.targets(), per_server)


def ping(
    repo: type[Repo], *, where: Selection = ALL, per_server: int = PER_SERVER, timeout: float | None = None
) -> Outcomes[float]:
    """The seconds that it takes to connect to each database, ask it a question and close, as the answers come."""

    def ask(target: Target) -> float:
        begun = perf_counter()
        with repo._router.visit(target.database, timeout):
            repo.execute(_QUESTION)
        return perf_counter() - begun

    return fan_out(members(repo, where).targets(), ask, per_server=per_server)


@dataclass(frozen=True, slots=True)
class Rows:
    """What a statement gave.

    Attributes:
        columns: Their names; () for a statement that gives no rows.
        rows: All of them.
        count: How many rows it gave or changed.
    """

    columns: tuple[str, ...]
    rows: Sequence[tuple[Any, ...]]
    count: int


def execute(
    repo: type[Repo],
    sql: str,
    *,
    write: bool = False,
    where: Selection = ALL,
    per_server: int = PER_SERVER,
    timeout: float | None = None,
) -> Outcomes[Rows]:
    """Run SQL in each database, in a transaction that only reads unless it may *write*; what comes of it, as it comes.

    With *write* it is committed by itself, so that it may be what runs in no transaction, such as VACUUM.
    """
    statement = text(sql.replace(":", "\\:"))

    def run() -> Rows:
        result: Any = repo.execute(statement)
        if not getattr(result, "returns_rows", True):
            return Rows((), (), max(0, result.rowcount))
        rows = [tuple(row) for row in result]
        return Rows(tuple(result.keys()), rows, len(rows))

    def visit(target: Target) -> Rows:
        with repo._router.visit(target.database, timeout), nullcontext() if write else repo.transaction(read_only=True):
            return run()

    return fan_out(members(repo, where).targets(), visit, per_server=per_server)
