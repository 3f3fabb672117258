"""All databases of a repo together: their schemas are migrated, looked at, made.

    >>> from shardrepo import fleet
    >>> fleet.status(MyRepo).lines()                                            # doctest: +SKIP
    >>> stages = [fleet.canary(1), fleet.Stage.of("10%")]
    >>> fleet.upgrade(MyRepo, how=fleet.Rollout(stages=stages))                 # doctest: +SKIP

Plain functions of a repo's class, which print nothing. A fleet is what the repo's directory lists; a `Selection` says
which of them are meant. Alembic's scripts are those that the repo's config names, as ``script_location``, else the
folder ``migrations``. Migrations run in worker processes, which import the repo: a program that calls `upgrade` and the
like is one that can be imported, its own start being behind ``if __name__ == "__main__":``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .journal import runs
from .looking import Rows, Status, behind, current, execute, ping, status
from .making import Made, create, drop
from .members import ALL, Member, Members, Selection, members
from .migrating import Operation, resume
from .outcomes import Failure, Migration
from .plan import Part, Share, Stage, Task, Work, canary
from .planning import DEFAULT, Plan, Rollout
from .report import Causes, Report
from .revising import Revision, heads, history, revision, sql
from .runner import Control, Observer, Progress

if TYPE_CHECKING:
    from ..repo import Repo
    from ..scripts import Source

__all__ = [
    "ALL",
    "Causes",
    "Control",
    "Failure",
    "Made",
    "Member",
    "Members",
    "Migration",
    "Operation",
    "Part",
    "Plan",
    "Progress",
    "Report",
    "Revision",
    "Rollout",
    "Rows",
    "Selection",
    "Share",
    "Stage",
    "Status",
    "Task",
    "Work",
    "behind",
    "canary",
    "check",
    "create",
    "current",
    "downgrade",
    "drop",
    "execute",
    "heads",
    "history",
    "members",
    "ping",
    "resume",
    "revision",
    "runs",
    "sql",
    "stamp",
    "status",
    "upgrade",
]


def upgrade(
    repo: type[Repo],
    revision: str = "head",
    *,
    where: Selection = ALL,
    how: Rollout = DEFAULT,
    source: Source | None = None,
    control: Control | None = None,
    observe: Observer = lambda _: None,
) -> Report:
    """Bring databases to *revision*; those that are there cost one small question each.

    First the template of each server, where the repo has one, none of which may fail; then stage by stage; at last
    those that were made meanwhile. Each is migrated under a lock of its own, which other runs and Alembic by itself
    wait for, and each revision is committed by itself. When a database has been migrated, this process's cached
    connections to it are replaced.

    Args:
        repo: The repo, which worker processes can import.
        revision: As Alembic has it: ``head``, ``heads``, a revision, or relative to where a database is, like ``+1``.
        where: Which databases.
        how: How many at a time, in which stages, and how many may fail.
        source: The scripts; those that the repo's config names if not given.
        control: Ends it early, from elsewhere.
        observe: Told of each outcome, and several times a second how far it is; in this thread.

    Raises:
        ConfigError: The repo, the revision or the selection is none, or the journal cannot be written: nothing is done.
        FleetError: Not all databases are at the revision; it has the report.
    """
    return Operation(repo, "upgrade", revision, where, how, source, observe, control).run()


def downgrade(
    repo: type[Repo],
    revision: str,
    *,
    where: Selection = ALL,
    how: Rollout = DEFAULT,
    source: Source | None = None,
    control: Control | None = None,
    observe: Observer = lambda _: None,
) -> Report:
    """Take databases back to *revision*, ``base`` for none; otherwise as `upgrade`.

    A relative one, like ``-1``, is reckoned from where each database is when it is planned, and not again when the
    run is taken up; what is made meanwhile takes no step then, as it may be a copy of one that has.
    """
    return Operation(repo, "downgrade", revision, where, how, source, observe, control).run()


def stamp(
    repo: type[Repo],
    revision: str,
    *,
    where: Selection = ALL,
    how: Rollout = DEFAULT,
    source: Source | None = None,
    control: Control | None = None,
    observe: Observer = lambda _: None,
) -> Report:
    """Note in databases that they are at *revision*, and run nothing; otherwise as `upgrade`.

    Of a database that is made meanwhile nothing is noted: nobody has seen what is in it.
    """
    return Operation(repo, "stamp", revision, where, how, source, observe, control).run()


def check(
    repo: type[Repo],
    *,
    where: Selection = ALL,
    how: Rollout = DEFAULT,
    source: Source | None = None,
    control: Control | None = None,
    observe: Observer = lambda _: None,
) -> Report:
    """Compare each database, which has to be at head, with the models; changes nothing.

    Raises:
        ConfigError: As `upgrade`.
        FleetError: One differs, is not at head or cannot be asked; the report has what differs.
    """
    return Operation(repo, "check", "heads", where, how, source, observe, control).run()
