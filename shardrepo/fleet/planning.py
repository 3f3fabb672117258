"""From a selection to a plan: where each database is, and what is to be done about it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..across import Outcome
from ..database import Database
from ..errors import ConfigError, ConnectError, ReadOnlyError
from ..scripts import Revisions, Scripts, Source, location_of
from .lines import line, some, unlisted
from .members import Member, Members, Selection, learn_places, members, targets_of
from .outcomes import Failure, Migration
from .plan import Judge, Part, Share, Stage, Task, Work, in_rounds, staged
from .report import Report
from .runner import Control, Observer, Progress
from .sweep import PER_SERVER, sweep

if TYPE_CHECKING:
    from ..repo import Repo

# Where the scripts are if nobody says so.
SCRIPTS: Final = "migrations"

# Parts that a plan shows.
_MAX_PARTS: Final = 12

_JOBS: Final = max(4, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """How a fleet is migrated.

    Attributes:
        jobs: Databases at a time, each in a worker process of its own.
        per_server: Databases of one server at a time.
        stages: Parts that are done one after the other; all at once if there are none.
        max_failures: How many databases may fail in all before nothing more is begun; None for any number.
        breadth: Whether one revision is run everywhere before the next one is; for upgrades.
        lock_timeout: Seconds that a statement waits for a lock of the server's.
        lock_retries: How often a migration that such a wait has ended is tried again.
        patience: Seconds to wait for another migration of the same database.
        x: Alembic's ``-x`` arguments, which env.py and the scripts may ask for.
        purge: Whether a stamp empties the version table first.
        journal: The folder in which the run's journal is kept; None for no journal.
        executor: Who carries it out, in place of worker processes of its own: any executor whose workers are processes
            that can import the repo.

    Raises:
        ConfigError: One of them is not what it can be.
    """

    jobs: int = _JOBS
    per_server: int = PER_SERVER
    stages: Sequence[Stage] = ()
    max_failures: Share | None = None
    breadth: bool = False
    lock_timeout: float = 5.0
    lock_retries: int = 3
    patience: float = 60.0
    x: Sequence[str] = ()
    purge: bool = False
    journal: Path | None = None
    executor: Executor | None = None

    def __post_init__(self) -> None:
        for name, least in (("jobs", 1), ("per_server", 1), ("lock_retries", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, not {value!r}")
        for name in ("lock_timeout", "patience"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
                raise ConfigError(f"{name} must be a positive number of seconds, not {value!r}")
        if not isinstance(self.max_failures, Share | None):
            raise ConfigError(f'max_failures must be a Share, as of Share.of("2%"), not {self.max_failures!r}')
        if not all(isinstance(stage, Stage) for stage in self.stages):
            raise ConfigError(f'stages must be of Stages, as of Stage.of("10%"), not {self.stages!r}')


DEFAULT: Final = Rollout()


@dataclass(slots=True)
class Plan:
    """What a migration will do.

    Attributes:
        report: What is known already: how the databases stand, and which of them cannot be migrated.
        parts: What is done one after the other.
        refused: Those that cannot be migrated, and why.
    """

    report: Report
    parts: list[Part] = field(default_factory=list)
    refused: list[Outcome[Migration]] = field(default_factory=list)

    def refuse(self, name: str, home: str | None, server: str, failure: Failure) -> None:
        """Note that a database cannot be migrated."""
        self.report.causes.add(name, server, failure)
        self.refused.append(Outcome(name, home, 0.0, error=failure))

    @property
    def size(self) -> int:
        """How many databases it changes."""
        return len({task.name for part in self.parts for task in part.tasks})

    def lines(self) -> Iterator[str]:
        """What it comes to, in a screen at most."""
        report = self.report
        stand = ", ".join(f"{count} {standing}" for standing, count in report.standings.items())
        yield f"{report.work} {report.target}: {self.size} databases to do; they are {stand or 'none'}"
        for part in self.parts[:_MAX_PARTS]:
            allowed = "any number may fail" if part.max_failures is None else f"{part.max_failures} may fail"
            names = some([task.name for task in part.tasks])
            yield f"  {line(part.title)}: {len(part.tasks)} ({names}), {allowed}"
        if len(self.parts) > _MAX_PARTS:
            yield f"  and {len(self.parts) - _MAX_PARTS} more parts"
        yield from report.causes.lines()
        yield from unlisted(report.unlisted)


class Planner:
    """Asks databases where they are, and plans what is to be done about it. Changes nothing.

    Raises:
        ConfigError: The repo, its scripts or the target are not what can be migrated by. Nothing was connected to.
        ReadOnlyError: The repo only reads.

    Attributes:
        scripts: The revision graph.
        addresses: The members that it has planned for, by name.
    """

    def __init__(
        self,
        repo: type[Repo],
        work: Work,
        target: str,
        where: Selection,
        how: Rollout,
        source: Source | None,
        observe: Observer,
        control: Control,
    ) -> None:
        check_repo(repo, work)
        self._repo = repo
        self._databases = repo._router.databases
        self._work: Work = work
        self._target = target
        self._where = where
        self._how = how
        self.scripts = Scripts.of(source or source_of(repo))
        self._judge = Judge(self.scripts, work, target, purges=how.purge)
        self._observe = observe
        self._control = control
        self.addresses: dict[str, Database] = {}

    def plan(self) -> Plan:
        """What is to be done everywhere."""
        found = members(self._repo, self._where)
        plan = Plan(Report(self._work, self._target, unlisted=found.failures))
        if self._where.is_all and self._work != "check":
            plan.parts += self._templates(found.found)
        plan.parts += self.parts(found.found, plan)
        return plan

    @property
    def revisions(self) -> Revisions | None:
        """What the target is by these scripts; None for a relative one."""
        return self._judge.target

    @property
    def takes_newcomers(self) -> bool:
        """Whether members that are made meanwhile are to follow: not where it is named what is meant, nor where
        nobody knows what would be true of one: that it is at a revision, or one step away from where it was."""
        return not self._where.names and self._work in ("upgrade", "downgrade") and self.revisions is not None

    def newcomers(self) -> Members:
        """Members that it has not planned for, as the directory lists them now."""
        found = members(self._repo, self._where)
        return Members([member for member in found.found if member.name not in self.addresses], found.failures)

    def locate(self, names: Iterable[str]) -> Iterator[tuple[str, Member | Exception]]:
        """Where *names* are now, or why nobody knows."""
        learn_places(self._databases)
        for name in names:
            try:
                (member,) = members(self._repo, Selection(names=(name,))).found
            except Exception as error:
                yield name, error
            else:
                self.addresses[name] = member.database
                yield name, member

    def parts(self, found: Sequence[Member], plan: Plan) -> list[Part]:
        """The parts in which *found* are to be migrated; which of them cannot be, or need not, is noted in *plan*."""
        self.addresses |= {member.name: member.database for member in found}
        known = {member.name: member for member in found}
        due: list[tuple[Task, Revisions]] = []
        with sweep(self._databases, targets_of(found), self._how.per_server) as swept:
            for number, outcome in enumerate(swept, 1):
                if self._control.is_draining:
                    plan.report.ending = "interrupted"
                    plan.report.left = len(found) - number + 1
                    return []
                self._decide(known[outcome.name], outcome, plan, due)
                self._observe(Progress("reading revisions", len(found), number, len(plan.refused), (), 0.0))
        due.sort(key=lambda each: each[0].name)
        if not self._how.breadth or self._work != "upgrade":
            return staged([task for task, _ in due], self._how.stages)
        return [
            Part(part.tasks, part.max_failures, part.pause, f"{revision}, {part.title}")
            for revision, tasks in in_rounds(self.scripts, due)
            for part in staged(tasks, self._how.stages)
        ]

    def _decide(
        self, member: Member, outcome: Outcome[Revisions], plan: Plan, due: list[tuple[Task, Revisions]]
    ) -> None:
        """Add a member that has something to be done to *due*, or note in the plan why it has not."""
        if outcome.error is not None:
            self._refuse(member, Failure.of(outcome.error), plan)
            return
        verdict = self._judge.judge(outcome.result())
        plan.report.standings[verdict.standing] += 1
        if verdict.problem is not None:
            self._refuse(member, Failure(verdict.problem, kind="revision"), plan)
        elif verdict.target is None:
            plan.report.unchanged += 1
        else:
            due.append((_task(member, verdict.target), outcome.result()))

    def _refuse(self, member: Member, failure: Failure, plan: Plan) -> None:
        plan.refuse(member.name, member.database.home, member.database.server, failure)

    def _templates(self, found: Sequence[Member]) -> list[Part]:
        """The part that migrates the template of each server that has one: none of them may fail.

        Raises:
            ConfigError: One of them is there and cannot be migrated.
        """
        template = self._databases.config.template_database
        if template is None:
            return []
        there: dict[str, Member] = {}
        for member in found:
            there.setdefault(member.database.server, member)
        stands = {
            f"{template}@{server}": Member(f"{template}@{server}", member.database.neighbour(template))
            for server, member in there.items()
        }
        tasks = []
        for outcome in sweep(self._databases, targets_of(stands.values()), self._how.per_server):
            target = self._target_of_template(outcome)
            if target is not None:
                member = stands[outcome.name]
                tasks.append(_task(member, target, template, there[member.database.server].name))
        return [Part(tasks, 0, 0.0, "templates")] if tasks else []

    def _target_of_template(self, outcome: Outcome[Revisions]) -> str | None:
        if isinstance(outcome.error, ConnectError):
            # One that is missing is made with the first database that is made from it; what else is wrong with its
            # server is told of the databases that it has.
            return None
        if outcome.error is not None:
            problem: str | None = str(Failure.of(outcome.error))
        else:
            verdict = self._judge.judge(outcome.result())
            if verdict.problem is None or verdict.standing != "unknown":
                return verdict.target
            problem = verdict.problem
        raise ConfigError(f"nothing was done, as the template {outcome.home} cannot be migrated: {problem}")


def _task(member: Member, target: str, template: str | None = None, near: str | None = None) -> Task:
    database = member.database
    address = None if database.id is None else database.address
    return Task(member.name, database.home, database.server, target, template, near, member.tags, address)


def source_of(repo: type[Repo]) -> Source:
    """The scripts of *repo*: those that its config names, else the folder ``migrations``."""
    return Source(location_of(repo._router.databases.config.script_location or SCRIPTS))


def check_repo(repo: type[Repo], work: str) -> None:
    """Make sure that the databases of *repo* can be migrated by it.

    Raises:
        ConfigError: It goes through a pooler.
        ReadOnlyError: It only reads.
    """
    config = repo._router.databases.config
    if config.read_only and work != "check":
        raise ReadOnlyError(f"{work} writes, and {repo.__name__}'s config says read_only=True: use another repo")
    if config.pgbouncer:
        raise ConfigError(
            f"{repo.__name__} goes through PgBouncer in transaction mode, where nobody can hold a migration's lock: "
            "migrate by a repo that goes to the servers themselves"
        )
