"""Migrating a fleet: a plan is carried out, what was made meanwhile follows, and a run that was ended is taken up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from ..across import Outcome
from ..errors import ConfigError, UnknownDatabaseError
from ..scripts import Source
from .crew import Crew, Guests, Processes
from .journal import Account, Journal, read
from .members import ALL, Member, Selection
from .outcomes import Failure, Migration
from .plan import Part, Task, Work
from .planning import DEFAULT, Plan, Planner, Rollout
from .report import Report
from .runner import Control, Observer, Runner
from .worker import Manner, path_of

if TYPE_CHECKING:
    from ..repo import Repo


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
        control: Control | None = None,
    ) -> None:
        self._repo = repo
        self._path = path_of(repo)
        self._work: Work = work
        self._target = target
        self._where = where
        self._how = how
        self._observe = observe
        self._control = control or Control()
        self._planner = Planner(repo, work, target, where, how, source, observe, self._control)
        self._begun = monotonic()

    def plan(self) -> Plan:
        """Ask every database where it is, and decide what is to be done."""
        return self._planner.plan()

    def run(self) -> Report:
        """Plan, and carry it out.

        Raises:
            ConfigError: The journal cannot be written, and nothing was done.
            FleetError: Not all databases are where they were to go; it has the report.
            SandboxError: The caller is in a sandbox, of which worker processes know nothing.
        """
        self._repo._router.databases.check_undoable(f"fleet.{self._work}")
        with ExitStack() as stack:
            journal = None
            if self._how.journal is not None:
                journal = stack.enter_context(Journal.begin(self._how.journal, self._work, self._head()))
            plan = self.plan()
            return self._carry_out(plan, plan.parts, journal, stack)

    def resume(self, account: Account, journal: Journal) -> Report:
        """Carry out what a run has left, as its journal tells.

        Raises:
            ConfigError: The journal cannot be written, and nothing was done.
            FleetError: As `run`.
        """
        plan = Plan(Report(self._work, self._target), account.left())
        found = dict(self._planner.locate(account.names))
        again = [member for name in account.refused if isinstance(member := found[name], Member)]
        for name in account.refused:
            if isinstance(error := found[name], Exception) and not isinstance(error, UnknownDatabaseError):
                plan.refuse(name, None, "", Failure.of(error))
        fresh = self._planner.parts(again, plan)
        plan.parts += fresh
        with ExitStack() as stack:
            return self._carry_out(plan, fresh, journal, stack)

    def _carry_out(self, plan: Plan, new: list[Part], journal: Journal | None, stack: ExitStack) -> Report:
        """Carry out a plan, whose *new* parts are to be noted first."""
        report = plan.report
        # A plan that is not whole is none: taken up, it would end well without what it lacks.
        if report.ending == "complete":
            if journal is not None:
                _note_plan(journal, new, plan.refused)
            crew = self._crew(plan.size)
            stack.callback(crew.close)
            try:
                self._run(plan, self._runner(crew, plan, journal))
            except BaseException:  # of the observer's, or Ctrl-C: nobody would note what becomes of what is under way
                crew.stop()
                raise
        report.run = None if journal is None or journal.is_empty else journal.run
        report.seconds = monotonic() - self._begun
        report.check()
        return report

    def _run(self, plan: Plan, runner: Runner) -> None:
        report = plan.report
        runner.run(plan.parts)
        while runner.ending == "complete" and (born := self._newcomers(report)):
            number, refused = len(plan.parts), len(plan.refused)
            parts = [replace(part, title="made meanwhile") for part in self._planner.parts(born, plan)]
            if not runner.note(partial(_write_plan, parts=parts, refused=plan.refused[refused:])):
                break
            plan.parts += parts
            runner.run(parts, number)
        if report.ending == "complete":
            report.ending, report.problem, report.left = runner.ending, runner.problem, runner.left

    def _newcomers(self, report: Report) -> Sequence[Member]:
        """Members that have been made meanwhile; if nobody can say, the report does, and keeps what was done."""
        if not self._planner.takes_newcomers:
            return ()
        try:
            found = self._planner.newcomers()
        except Exception as error:
            report.unlisted = {**report.unlisted, "the directory": error}
            return ()
        report.unlisted = found.failures
        return found.found

    def _runner(self, crew: Crew, plan: Plan, journal: Journal | None) -> Runner:
        allowed = self._how.max_failures
        return Runner(
            crew,
            self._manner(journal.run if journal is not None else self._work),
            per_server=self._how.per_server,
            allowed=None if allowed is None else allowed.out_of(plan.size),
            control=self._control,
            journal=journal,
            observe=self._observe,
            settled=lambda task, outcome: self._settle(plan.report, task, outcome),
        )

    def _settle(self, report: Report, task: Task, outcome: Outcome[Migration]) -> None:
        report.add(task, outcome)
        database = self._planner.addresses.get(task.name)
        if database is not None:
            # What this process has prepared there is of the old schema, also where only a part was done.
            self._repo._router.cache.disconnect(database)

    def _crew(self, size: int) -> Crew:
        if self._how.executor is not None:
            return Guests(self._how.executor, self._how.jobs)
        return Processes(max(1, min(self._how.jobs, size)))

    def _manner(self, run: str) -> Manner:
        how = self._how
        return Manner(
            repo=self._path,
            source=self._planner.scripts.source,
            work=self._work,
            session=f"shardrepo {run}",
            lock_timeout=how.lock_timeout,
            lock_retries=how.lock_retries,
            patience=how.patience,
            x=tuple(how.x),
            purge=how.purge,
        )

    def check_same(self, head: Mapping[str, Any]) -> None:
        """Make sure that the target is what it was for the run with this *head*.

        Raises:
            ConfigError: The scripts have changed: what that run has done would not be all that there is to do now.
        """
        before, now = head["revisions"], self._planner.revisions
        if before is not None and now is not None and set(before) != set(now):
            raise ConfigError(
                f"{head['target']!r} was {' '.join(before) or 'base'} for that run, and is {' '.join(now) or 'base'} "
                "for the scripts that there are now: begin a new run, which does what is left of it too"
            )

    def _head(self) -> dict[str, Any]:
        """What the journal has to know for the run to be taken up."""
        return {
            "repo": self._path,
            "work": self._work,
            "target": self._target,
            "where": self._where.as_dict(),
            "scripts": self._planner.scripts.source.location,
            "revisions": self._planner.revisions,
            "breadth": self._how.breadth,
            "purge": self._how.purge,
            "x": list(self._how.x),
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
        ConfigError: There is no such run, it was another repo's or of another kind, it is still under way, or the
            scripts have another head than they had.
        FleetError: As `Operation.run`.
        SandboxError: As `Operation.run`.
    """
    repo._router.databases.check_undoable(f"fleet.{work}")
    if how.journal is None:
        raise ConfigError("a run is taken up from its journal: say in which folder that is")
    with Journal.go_on(how.journal, run) as journal:
        account = read(how.journal, journal.run)
        head = account.head
        if (head["repo"], head["work"]) != (path_of(repo), work):
            raise ConfigError(
                f"run {journal.run!r} was: {head['work']} of {head['repo']}; that is how it is taken up, not as {work} "
                f"of {path_of(repo)}"
            )
        how = replace(how, breadth=head["breadth"], purge=head["purge"], x=how.x or tuple(head["x"]))
        where = Selection.of(head["where"])
        operation = Operation(repo, work, head["target"], where, how, source, observe, control)
        operation.check_same(head)
        return operation.resume(account, journal)


def _note_plan(journal: Journal, parts: list[Part], refused: list[Outcome[Migration]]) -> None:
    try:
        _write_plan(journal, parts, refused)
    except OSError as error:
        raise ConfigError(f"the plan cannot be written to the journal, and nothing was done: {error}") from error


def _write_plan(journal: Journal, parts: list[Part], refused: list[Outcome[Migration]]) -> None:
    journal.plan(parts)
    for outcome in refused:
        journal.refused(outcome)
