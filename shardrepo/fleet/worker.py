"""What a worker process does: run Alembic in one database, under that database's lock.

In a process, and never in a thread: Alembic keeps what it works on in globals of its modules, so that in threads the
statements of one database's migration run in another's (decision 17 has the measurement). Callers in several threads
wait for each other.
"""

from __future__ import annotations

import importlib
import random
import threading
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, Final

from alembic.autogenerate import produce_migrations, render_python_code
from alembic.runtime.environment import EnvironmentContext
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from ..across import Outcome
from ..errors import ConfigError, WrongDatabaseError, sqlstate_of
from ..pool import set_autocommit
from ..scripts import Revisions, Scripts, Source, several
from .env import HANDED, Handed
from .lock import Lookout, take
from .members import Selection, learn_places, members
from .outcomes import Failure, Migration
from .plan import Task, Work
from .sweep import read_revisions

if TYPE_CHECKING:
    from ..database import Database
    from ..databases import Databases
    from ..repo import Repo

# https://www.postgresql.org/docs/current/errcodes-appendix.html: lock_not_available.
_LOCKED: Final = "55P03"

# Seconds before a second try, doubled for each further one up to the second number, half of it more or less.
_BACKOFF: Final = (0.5, 8.0)

# Held while Alembic works in this process.
alembic_in_use: Final = threading.Lock()

# Says whether this process is to stop, between two statements; a worker's is its parent's.
is_stopped: Callable[[], bool] = lambda: False  # noqa: E731  # replaced by a worker's initialiser


@dataclass(frozen=True, slots=True)
class Manner:
    """How databases are migrated: the same for all of an operation.

    Attributes:
        repo: The repo, as ``module:Class``; a worker imports it, and has the credentials that its config has there.
        source: Its scripts.
        work: What is to be done.
        session: What the sessions are called, in pg_stat_activity.
        lock_timeout: Seconds that a statement waits for a lock of the server's.
        lock_retries: How often a migration that such a wait has ended is tried again.
        patience: Seconds to wait for another migration of the same database.
        x: Alembic's ``-x`` arguments.
        purge: Whether a stamp empties the version table first.
    """

    repo: str
    source: Source
    work: Work
    session: str = "shardrepo"
    lock_timeout: float = 5.0
    lock_retries: int = 3
    patience: float = 60.0
    x: tuple[str, ...] = ()
    purge: bool = False


def carry_out(manner: Manner, task: Task) -> Outcome[Migration]:
    """Do in one database what is to be done; whatever fails is a `Failure` in the outcome. Runs in any process."""
    begun = monotonic()
    value = error = None
    try:
        repo = repo_of(manner.repo)
        value = migrate(repo, located(repo, task), manner, task)
    except Exception as raised:
        error = Failure.of(raised)
    return Outcome(task.name, task.home, monotonic() - begun, value, error)


def repo_of(path: str) -> type[Repo]:
    """The repo that ``module:Class`` names.

    Raises:
        ConfigError: There is none.
    """
    from ..repo import Repo

    found = object_of(path, "a repo", "app.repo:MyRepo")
    if not (isinstance(found, type) and issubclass(found, Repo) and found is not Repo):
        raise ConfigError(f"{path!r} is {found!r}, not a repo: name a subclass of Repo that has a config")
    return found


def object_of(path: str, kind: str, example: str) -> Any:
    """What ``module:name`` names.

    Raises:
        ConfigError: There is nothing of that name.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ConfigError(f"{kind} is named as module:name, like {example}, not {path!r}")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind} {path!r} cannot be imported: {error}") from error
    return found


def path_of(repo: type[Repo]) -> str:
    """How other processes find *repo*.

    Raises:
        ConfigError: They cannot import it.
    """
    if repo.__module__ == "__main__" or "<locals>" in repo.__qualname__:
        raise ConfigError(
            f"{repo.__name__} cannot be imported by worker processes: define it at the top of a module of its own"
        )
    return f"{repo.__module__}:{repo.__qualname__}"


def located(repo: type[Repo], task: Task) -> Database:
    """The database of *task*, as this process finds it.

    Raises:
        WrongDatabaseError: It is somewhere else here.
    """
    databases = repo._router.databases
    _list(databases, int(monotonic() // databases.config.directory_ttl))
    (member,) = members(repo, Selection(names=(task.near or task.name,))).found
    database = member.database if task.template is None else member.database.neighbour(task.template)
    # Not by its home alone: an id is the same wherever it is.
    if (database.home, database.address) != (task.home, task.place):
        raise WrongDatabaseError(
            f"{task.name} was to be migrated in {task.place}, and is {database.address} for this process: nothing was "
            "sent. See that both have the same directory; if it has moved, begin a new run",
            expected=task.place,
            found=database.address,
        )
    return database


@lru_cache(maxsize=8)
def _list(databases: Databases, _: int) -> None:
    """Learn where all databases are, once for as long as that is believed."""
    learn_places(databases)


def migrate(repo: type[Repo], database: Database, manner: Manner, task: Task) -> Migration:
    """Do in *database* what is to be done, in this process; again where a wait for somebody else's lock has ended it.

    Raises:
        Failure: It could not be done. What was begun is rolled back to the last revision, but for what a script has
            committed itself, as by an ``autocommit_block``: such a one is not tried again.
    """
    run, pause = Run(repo._router.databases, database, manner, task), _BACKOFF[0]
    for attempt in count(1):
        try:
            return run.migrate(attempt)
        except DBAPIError as error:
            failure = Failure.of(error, revision=run.revision, blockers=run.blockers)
            if sqlstate_of(error) != _LOCKED or run.is_torn or attempt > manner.lock_retries:
                raise failure from error
        except Failure:
            raise
        except (Exception, SystemExit) as error:  # of a script that ends the process, which would be begun anew
            raise Failure.of(error, revision=run.revision) from error
        sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311  # so that tries do not meet again
        pause = min(pause * 2, _BACKOFF[1])
    raise AssertionError


class Run:
    """The migration of one database, which may be tried several times.

    Attributes:
        revision: The revision that runs, or was the last to; None before any has.
        is_torn: Whether something of it is committed.
        blockers: Who stood in the way.
    """

    def __init__(self, databases: Databases, database: Database, manner: Manner, task: Task) -> None:
        self._databases = databases
        self._database = database
        self._manner = manner
        self._task = task
        self._scripts = Scripts.of(manner.source)
        self._before: Revisions | None = None
        self._drift: tuple[str, ...] = ()
        self.revision: str | None = None
        self.is_torn = False
        self.blockers: tuple[str, ...] = ()

    def migrate(self, attempt: int) -> Migration:
        """Take the lock, run what is to be run, and read where the database is then."""
        config, manner = self._databases.config, self._manner
        self.revision, self.blockers = None, ()
        with self._databases.cache.transient(self._database) as connection:
            take(connection, manner.session, manner.lock_timeout, manner.patience, _stop_if_told)
            event.listen(connection, "before_cursor_execute", _stop_if_told)
            event.listen(connection, "commit", self._note_commit)
            lookout = Lookout(self._databases, self._database, connection, manner.lock_timeout)
            try:
                with lookout:
                    self._run(connection)
            finally:
                self.blockers = lookout.seen
            self.revision = None
            set_autocommit(connection, True)
            after = read_revisions(connection, config.version_table)
            self._check_arrival(after)
            return Migration(self._before or (), after, attempt, self._drift)

    def _run(self, connection: Connection) -> None:
        task, manner, config = self._task, self._manner, self._scripts.config
        work = self._check if manner.work == "check" else self._steps
        given = {"destination_rev": several(task.target), "purge": manner.purge} if manner.work != "check" else {}
        handed = Handed(self._databases, connection)
        with alembic_in_use:
            config.cmd_opts = Namespace(x=list(manner.x))
            config.attributes[HANDED] = handed
            with EnvironmentContext(config, self._scripts.directory, fn=_only_on(connection, work), **given):
                self._scripts.directory.run_env()
        if not handed.was_run:
            raise ConfigError(f"{self._scripts.directory.env_py_location} does not run this fleet: {_REMEDY}")

    def _steps(self, heads: Revisions, _: MigrationContext) -> Iterator[Any]:
        """Alembic's steps, each noted when it is its turn."""
        self._note_start(heads)
        for step in self._scripts.steps(self._manner.work, self._task.target, heads):  # type: ignore[arg-type]  # no check
            self.revision = getattr(step, "revision", None) and step.revision.revision
            self.is_torn = False
            yield step

    def _note_start(self, heads: Revisions) -> None:
        # Where it was before the first try: another one begins where that has come to.
        self._before = heads if self._before is None else self._before

    def _note_commit(self, _: Connection) -> None:
        self.is_torn = True

    def _check_arrival(self, after: Revisions) -> None:
        """Make sure that nothing is left to do; for the way back, Alembic cannot be asked a second time."""
        work, target = self._manner.work, self._task.target
        # Where one branch depends on another, a stamp of several heads may take away what it has just noted.
        if work in ("upgrade", "stamp") and self._scripts.steps(work, target, after):
            raise Failure(
                f"it is at {' '.join(after) or 'base'} after all was done that leads to {target}", kind="revision"
            )

    def _check(self, heads: Revisions, context: MigrationContext) -> Sequence[Any]:
        """Compare the database with the models."""
        self._note_start(heads)
        if set(heads) != set(self._scripts.heads):
            raise Failure("it is not at head, where alone it can be compared with the models", kind="behind")
        metadata = context.opts["target_metadata"]
        if metadata is None:
            raise ConfigError("there is nothing to compare with: give env.run() the metadata of the models")
        operations = produce_migrations(context, metadata).upgrade_ops
        if operations is not None and operations.ops:
            code = render_python_code(operations)
            self._drift = tuple(line.strip() for line in code.splitlines() if line.strip().startswith("op."))
        return ()


_REMEDY: Final = "it is to call shardrepo.fleet.env.run(MyRepo, metadata), and make no engine of its own"


def _only_on(connection: Connection, work: Callable[..., Any]) -> Callable[..., Any]:
    """*work*, which an env.py of somebody else's, with a connection of its own, is not to do."""

    def checked(heads: Revisions, context: MigrationContext) -> Any:
        if context.connection is not connection:
            raise ConfigError(f"env.py migrates a database of its own choosing, and nothing was done: {_REMEDY}")
        return work(heads, context)

    return checked


def _stop_if_told(*_: Any) -> None:
    """Raise if this process is to stop; between two statements, as an event's listener."""
    if is_stopped():
        raise Failure("stopped between two statements, and rolled back to the last revision", kind="interrupted")
