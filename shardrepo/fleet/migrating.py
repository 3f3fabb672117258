"""Migrating a fleet: what is planned, carried out, taken up again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from ..across import Outcome
from ..database import Database
from ..errors import ConfigError, ReadOnlyError
from ..scripts import Scripts, Source, location_of
from . import journal as journals
from .crew import Crew, Guests, Processes
from .journal import Account, Journal
from .members import ALL, Member, Selection, members, targets_of
from .outcomes import Failure, Migration
from .plan import Judge, Part, Share, Stage, Task, Work, in_rounds, staged
from .report import Report
from .runner import Control, Observer, Progress, Runner
from .sweep import PER_SERVER, sweep
from .worker import Manner, path_of

if TYPE_CHECKING:
    from ..repo import Repo

# Where the scripts are if nobody says so.
SCRIPTS: Final = "migrations"

# Parts that a plan shows.
_MAX_PARTS: Final = 20

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


DEFAULT: Final = Rollout()


@dataclass(slots=True)
class Plan:
    """What a migration will do.

    Attributes:
        parts: What is done one after the other.
        report: What is known already: how the databases stand, and which of them cannot be migrated.
        refused: Those that cannot, and why.
    """

    parts: list[Part]
    report: Report
    refused: list[Outcome[Migration]] = field(default_factory=list)

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
            names = ", ".join(task.name for task in part.tasks[:3])
            more = f" and {len(part.tasks) - 3} more" if len(part.tasks) > 3 else ""
            yield f"  {part.title}: {len(part.tasks)} ({names}{more}), {allowed}"
        if len(self.parts) > _MAX_PARTS:
            yield f"  and {len(self.parts) - _MAX_PARTS} more parts"
        yield from report.causes.lines()
        for server, error in report.unlisted.items():
            yield f"  the databases of {server} cannot be listed: {error}"


class Operation:
    """One migration of a fleet.

    Raises:
        ConfigError: The repo, its scripts or the target are not what can be migrated by. Nothing was connected to.
        ReadOnlyError: The repo only reads.
    """

    def __init__(
        self,
        repo: type[Repo],
        work: Work,
        target: str,
        where: Selection = ALL,
        how: Rollout = DEFAULT,
        source: Source | None = None,
        observe: Observer = lambda _: None,
    ) -> None:
        self._repo = repo
        self._databases = repo._router.databases
        _check_repo(repo, work)
        self._work: Work = work
        self._target = target
        self._where = where
        self._how = how
        self._source = source or source_of(repo)
        self._scripts = Scripts.of(self._source)
        self._judge = Judge(self._scripts, work, target, purges=how.purge)
        self._observe = observe
        self._addresses: dict[str, Database] = {}
        self._path = path_of(repo)

    def plan(self) -> Plan:
        """Ask every database where it is, and decide what is to be done."""
        report = Report(self._work, self._target)
        found = members(self._repo, self._where)
        report.unlisted = found.failures
        plan = Plan([], report)
        if self._where.is_all and self._work != "check":
            plan.parts += self._planned_templates(found.found)
        plan.parts += self._planned(found.found, plan)
        return plan

    def _planned(self, found: Sequence[Member], plan: Plan) -> list[Part]:
        """The parts in which *found* are to be migrated; what cannot be is noted in the plan."""
        self._addresses |= {member.name: member.database for member in found}
        known = {member.name: member for member in found}
        due = []
        swept = sweep(self._databases, targets_of(found), self._how.per_server)
        for number, outcome in enumerate(swept, 1):
            task = self._task(known[outcome.name])
            verdict = None if outcome.error is not None else self._judge.judge(outcome.result())
            if verdict is not None:
                plan.report.standings[verdict.standing] += 1
            if verdict is None or verdict.problem is not None:
                failure = Failure(verdict.problem or "", kind="revision") if verdict else Failure.of(_raised(outcome))
                plan.report.causes.add(task.name, task.server, failure)
                plan.refused.append(Outcome(task.name, task.home, outcome.seconds, None, failure))
            elif verdict.target is None:
                plan.report.unchanged += 1
            else:
                due.append((self._task(known[outcome.name], verdict.target), outcome.result()))
            self._observe(Progress("reading revisions", len(found), number, len(plan.refused), (), 0.0))
        due.sort(key=lambda each: each[0].name)
        if not self._how.breadth or self._work != "upgrade":
            return staged([task for task, _ in due], self._how.stages)
        return [
            Part(part.tasks, part.max_failures, part.pause, f"{revision}, {part.title}")
            for revision, tasks in in_rounds(self._scripts, due)
            for part in staged(tasks, self._how.stages)
        ]

    def _planned_templates(self, found: Sequence[Member]) -> list[Part]:
        """The part that migrates the template of each server that has one: none of them may fail."""
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
            if outcome.error is not None:
                # One that is missing is made with the first database that is made from it; what else is wrong with its
                # server is told of the databases that it has.
                continue
            target = self._judge.judge(outcome.result()).target
            if target is not None:
                member = stands[outcome.name]
                near = there[member.database.server].name
                tasks.append(self._task(member, target, template, near))
        return [Part(tasks, 0, 0.0, "templates")] if tasks else []

    def _task(self, member: Member, target: str = "", template: str | None = None, near: str | None = None) -> Task:
        database = member.database
        return Task(member.name, database.home, database.server, target, template, near, member.tags)

    def run(self, control: Control | None = None) -> Report:
        """Plan, and carry it out.

        Raises:
            FleetError: Not all databases are where they were to go; it has the report.
        """
        begun = monotonic()
        with ExitStack() as stack:
            journal = None
            if self._how.journal is not None:
                journal = stack.enter_context(Journal.begin(self._how.journal, self._work, self._head()))
            plan = self.plan()
            if journal is not None:
                journal.plan(plan.parts)
            return self._finish(plan, journal, control or Control(), begun, stack, known=set())

    def resume(self, account: Account, journal: Journal, control: Control | None = None) -> Report:
        """Carry out what a run has left, as its journal tells.

        Raises:
            FleetError: As `run`.
        """
        begun = monotonic()
        parts = account.left()
        plan = Plan(parts, Report(self._work, self._target))
        names = {task.near or task.name for part in parts for task in part.tasks}
        refused = [name for number, name in account.outcomes if number < 0]
        again = members(self._repo, Selection(names=(*sorted(names), *refused))).found if names or refused else []
        self._addresses |= {member.name: member.database for member in again}
        fresh = self._planned([member for member in again if member.name in refused], plan)
        journal.plan(fresh)
        plan.parts += fresh
        known = {name for _, name in account.outcomes} | names | {t.name for p in account.parts for t in p.tasks}
        with journal, ExitStack() as stack:
            return self._finish(plan, journal, control or Control(), begun, stack, known)

    def _finish(
        self, plan: Plan, journal: Journal | None, control: Control, begun: float, stack: ExitStack, known: set[str]
    ) -> Report:
        report = plan.report
        report.run = journal.run if journal is not None else None
        for outcome in plan.refused:
            if journal is not None:
                journal.ended(-1, outcome)
        if not plan.size and not self._may_grow:
            report.seconds = monotonic() - begun
            report.check()
            return report
        crew = self._crew(plan.size)
        stack.callback(crew.close)
        allowed = None
        if self._how.max_failures is not None:
            allowed = self._how.max_failures.out_of(plan.size)
        runner = Runner(
            crew,
            self._manner(report.run),
            per_server=self._how.per_server,
            allowed=allowed,
            control=control,
            journal=journal,
            observe=self._observe,
            settled=lambda task, outcome: self._settle(report, task, outcome),
        )
        runner.run(plan.parts)
        self._follow(plan, runner, journal, known)
        report.ending, report.problem = runner.ending, runner.problem
        report.left = runner.left
        report.seconds = monotonic() - begun
        report.check()
        return report

    @property
    def _may_grow(self) -> bool:
        """Whether databases that are made meanwhile are meant too."""
        return not self._where.names and self._work != "check"

    def _follow(self, plan: Plan, runner: Runner, journal: Journal | None, known: set[str]) -> None:
        """Migrate what has been made meanwhile, until there is nothing more."""
        known |= set(self._addresses)
        while self._may_grow and runner.ending == "complete":
            born = [member for member in members(self._repo, self._where).found if member.name not in known]
            if not born:
                return
            known |= {member.name for member in born}
            number = len(plan.parts)
            parts = [
                Part(part.tasks, part.max_failures, part.pause, "made meanwhile") for part in self._planned(born, plan)
            ]
            if journal is not None:
                journal.plan(parts)
            plan.parts += parts
            runner.run(parts, number)

    def _settle(self, report: Report, task: Task, outcome: Outcome[Migration]) -> None:
        report.add(task, outcome)
        database = self._addresses.get(task.name)
        if database is not None and outcome.ok:
            # What this process has prepared there is of the old schema.
            self._databases.cache.disconnect(database)

    def _crew(self, size: int) -> Crew:
        if self._how.executor is not None:
            return Guests(self._how.executor, self._how.jobs)
        return Processes(max(1, min(self._how.jobs, size)))

    def _manner(self, run: str | None) -> Manner:
        how = self._how
        return Manner(
            repo=self._path,
            source=self._source,
            work=self._work,
            session=f"shardrepo {run or self._work}",
            lock_timeout=how.lock_timeout,
            lock_retries=how.lock_retries,
            patience=how.patience,
            x=tuple(how.x),
            purge=how.purge,
        )

    def _head(self) -> dict[str, Any]:
        return {
            "repo": self._path,
            "work": self._work,
            "target": self._target,
            "where": self._where.as_dict(),
            "scripts": self._source.location,
            "breadth": self._how.breadth,
        }


def resume(
    repo: type[Repo],
    work: Work,
    run: str,
    how: Rollout,
    source: Source | None = None,
    *,
    control: Control | None = None,
    observe: Observer = lambda _: None,
) -> Report:
    """Take up a run where it was: what it has done stays done, and what it was at is finished.

    Raises:
        ConfigError: There is no such run, it was another's or of another kind, or it is still under way.
        FleetError: As `Operation.run`.
    """
    folder = how.journal
    if folder is None:
        raise ConfigError("a run is taken up from its journal: say in which folder that is")
    account = journals.read(folder, run)
    if (account.head["repo"], account.head["work"]) != (path_of(repo), work):
        raise ConfigError(
            f"run {run!r} was: {account.head['work']} of {account.head['repo']}; that is how it is taken up"
        )
    journal = Journal.go_on(folder, run)
    where = Selection.of(account.head["where"])
    operation = Operation(repo, work, account.head["target"], where, how, source, observe)
    return operation.resume(account, journal, control)


def source_of(repo: type[Repo]) -> Source:
    """The scripts of *repo*: those that its config names, else the folder ``migrations``."""
    return Source(location_of(repo._router.databases.config.script_location or SCRIPTS))


def _check_repo(repo: type[Repo], work: Work) -> None:
    config = repo._router.databases.config
    if config.read_only and work != "check":
        raise ReadOnlyError(f"{work} writes, and {repo.__name__}'s config says read_only=True: use another repo")
    if config.pgbouncer:
        raise ConfigError(
            f"{repo.__name__} goes through PgBouncer in transaction mode, where nobody can hold a migration's lock: "
            "migrate by a repo that goes to the servers themselves"
        )


def _raised(outcome: Outcome[Any]) -> Exception:
    assert outcome.error is not None
    return outcome.error
