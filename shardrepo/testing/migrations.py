"""Tests of an application's migrations, each in databases that are made for it, and dropped again.

    migrations = Migrations(MyRepo)

    def test_migrations():
        migrations.one_head()
        migrations.up_and_down()
        migrations.check()

    def test_names_are_split():
        with migrations.before("a1b2c3", templates=["shard01"]) as sample:
            (copy,) = sample.databases
            with MyRepo.using(copy):
                MyRepo.execute("INSERT INTO users (name) VALUES ('Ada Lovelace')")
                sample.upgrade()
                assert MyRepo.exists(select(User).where(User.surname == "Lovelace"))
                sample.downgrade()

Scripts run as in a worker of the fleet's: through the project's own env.py, under the database's lock, each revision
in a transaction of its own. They run in this process, so that a debugger stops in them, and what one raises is what the
test gets. Alembic keeps what it works on in globals: of several threads one at a time migrates, and the others wait.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Final, TypeAlias

from sqlalchemy.engine import Connection, Engine

from ..across import Outcome, Target
from ..database import Database
from ..errors import ConfigError, ShardRepoError
from ..fleet.making import scratch as make_scratch
from ..fleet.members import Selection, members
from ..fleet.outcomes import Migration
from ..fleet.plan import Judge, Task, Work
from ..fleet.planning import check_repo, source_of
from ..fleet.sweep import sweep
from ..fleet.worker import Manner, Run
from ..scripts import AlembicConfig, Revisions, Scripts, Source, is_relative
from .schema import Schema, differences, read_schema

if TYPE_CHECKING:
    from ..repo import Repo

# Makes an empty database, and drops it when the block is left.
Scratch: TypeAlias = Callable[[], AbstractContextManager[Database]]

# What the sessions are called, in pg_stat_activity.
_SESSION: Final = "shardrepo test"


class MigrationError(ShardRepoError, AssertionError):
    """What a test of migrations has found.

    Attributes:
        problems: Each by itself.
    """

    def __init__(self, message: str, problems: Sequence[str]) -> None:
        super().__init__("\n  ".join([message, *problems]))
        self.problems = tuple(problems)


def migrate(repo: type[Repo], database: Database, revision: str = "head", *, source: Source | None = None) -> None:
    """Bring one database to *revision*: up where it lacks something of that, else down, if it has more.

    Connections of the repo's to it are replaced afterwards: what they have prepared is of the old schema.

    Args:
        repo: The repo that env.py runs.
        database: Any that the repo can connect to; the directory need not know it.
        revision: As Alembic has it: ``head``, ``base``, a revision, or relative to where the database is, like ``+1``.
        source: The scripts; those that the repo's config names if not given.

    Raises:
        ConfigError: There are no such scripts or no such revision, no way leads there, or env.py is not this repo's.
        Failure: Somebody else migrates the database all the time.
    """
    Migrator(repo, source).migrate(database, revision)


class Migrator:
    """Runs Alembic in one database after the other, in this thread.

    Raises:
        ConfigError: The repo is none that can be migrated by, or has no scripts.
    """

    def __init__(self, repo: type[Repo], source: Source | None) -> None:
        check_repo(repo, "upgrade")
        self.repo = repo
        self.databases = repo._router.databases
        self.scripts = Scripts.of(source or source_of(repo))

    def migrate(self, database: Database, target: str) -> None:
        """Bring *database* to *target*, up or down."""
        found = self.revisions(database)
        for move in _moves_to(target):
            verdict = Judge(self.scripts, move, target).judge(found)
            if verdict.problem is not None:
                raise ConfigError(f"{database.home} cannot be brought to {target!r}: {verdict.problem}")
            if verdict.target is not None:
                self.run(move, database, verdict.target)
                return

    def run(self, work: Work, database: Database, target: str) -> Migration:
        """Do it, or raise what a script has raised, with a note that says which."""
        return self.outcome(work, database, target).result()

    def outcome(self, work: Work, database: Database, target: str) -> Outcome[Migration]:
        """What became of it. An error in it is a script's; any other is raised."""
        manner = Manner("", self.scripts.source, work, session=_SESSION)
        run = Run(self.databases, database, manner, Task(database.name, database.home, database.server, target))
        begun, value, error = monotonic(), None, None
        try:
            value = run.migrate(1)
        except Exception as raised:
            if run.revision is None:
                raise
            blocked = "".join(f", blocked by {blocker}" for blocker in run.blockers)
            raised.add_note(f"{work} of {self.named(run.revision)}, in {database.home}{blocked}")
            error = raised
        finally:
            self.repo._router.cache.disconnect(database)
        return Outcome(database.name, database.home, monotonic() - begun, value, error)

    def revisions(self, database: Database) -> Revisions:
        """Those that *database* is at."""
        (outcome,) = sweep(self.databases, [Target(database.name, database)])
        return outcome.result()

    def has(self, database: Database, revision: str) -> bool:
        """Whether *revision* has been run in *database*."""
        standing = self.scripts.standing(self.revisions(database), (revision,))
        if standing == "unknown":
            raise ConfigError(f"{database.home} is at a revision of which these migrations have no script")
        return standing in ("at", "ahead")

    def schema(self, database: Database) -> Schema:
        """What is in *database*, but for Alembic's own table."""
        with self.databases.cache.transient(database) as connection:
            return read_schema(connection, self.databases.config.version_table)

    def revision(self, name: str) -> str:
        """The one revision that *name* is, by its first characters or as ``head``."""
        found = self.scripts.resolve(name)
        if len(found) != 1:
            raise ConfigError(f"{name!r} is {len(found) or 'no'} revisions, and one is meant: name that")
        return found[0]

    def named(self, revision: str) -> str:
        """*revision* and its file, as messages say it."""
        return f"revision {revision} ({self.scripts.path(revision)})"


class Migrations:
    """What tests ask of the migrations of a repo.

    Args:
        repo: The repo that env.py runs.
        scratch: Makes an empty database for a block. Without it they are made on the server of the repo's default
            database, or the first of its directory, by the repo's user, who has to be one that may.
        source: The scripts; those that the repo's config names if not given.

    Raises:
        ConfigError: The repo is none that can be migrated by, or has no scripts.
    """

    def __init__(self, repo: type[Repo], *, scratch: Scratch | None = None, source: Source | None = None) -> None:
        self._migrator = Migrator(repo, source)
        self._scratch = scratch or partial(make_scratch, repo)

    def one_head(self) -> str:
        """Make sure that the revisions end in one; returns it. Connects to nothing.

        Raises:
            MigrationError: They end in several, or there are none.
        """
        scripts = self._migrator.scripts
        if len(scripts.heads) == 1:
            return scripts.heads[0]
        if not scripts.heads:
            raise self._nothing()
        raise MigrationError(
            f"the revisions end in {len(scripts.heads)} heads: write one that follows all of them (`alembic merge "
            "heads`), or let one follow the other",
            [self._migrator.named(head) for head in scripts.heads],
        )

    def up_and_down(self, *, irreversible: Collection[str] = ()) -> None:
        """Run each revision, take it back and run it again, all of them in their order, on all branches.

        Taken back, the schema has to be what it was before, to the last definition: `shardrepo.testing.schema` says of
        what. Any longer way back is made of such steps. Rows are not compared.

        Args:
            irreversible: Revisions that are not taken back.

        Raises:
            MigrationError: Some cannot be run or taken back, or leave something: of each its file, and what differs. A
                downgrade that raises NotImplementedError is told as irreversible.
            ConfigError: One that is named irreversible does not exist.
        """
        trips = _RoundTrips(self._migrator, irreversible)
        if trips.are_over:
            raise self._nothing()
        while not trips.are_over:
            with self._empty() as database:
                trips.go_on(database)
        if trips.problems:
            raise MigrationError("the migrations do not go up and down:", trips.problems)

    def check(self) -> None:
        """Compare what the revisions make with the models, as `shardrepo check` compares a database.

        Raises:
            MigrationError: They differ; it has what autogenerate would write.
            ConfigError: env.py has no models to compare with.
        """
        with self._empty() as database:
            self._migrator.run("upgrade", database, "heads")
            drift = self._migrator.run("check", database, "heads").drift
        if drift:
            raise MigrationError(
                "the revisions make another schema than the models have: write the missing one (`shardrepo revision "
                "--autogenerate`), or see that env.run() is given the metadata of these models. It would be:",
                drift,
            )

    @contextmanager
    def before(self, revision: str, count: int | None = None, *, templates: Iterable[str] = ()) -> Iterator[Sample]:
        """Databases at the revision before *revision*, which is to be tested with the rows that the block puts there.

        Args:
            revision: Which; ``head`` for the last.
            count: How many empty ones; one if neither this nor *templates* is given.
            templates: Databases that copies are made of, by the names that they are chosen by; the copies are taken to
                where the empty ones are. Nobody may be connected to the originals meanwhile.

        Raises:
            ConfigError: There is no such revision, no database in the sample, or no script for where a copy is.
            UnknownDatabaseError: A template is none that the directory knows.
        """
        revision, originals = self._migrator.revision(revision), self._originals(templates)
        if count is None:
            count = 0 if originals else 1
        if count < 0 or not (count or originals):
            raise ConfigError(f"a sample of {count} databases shows nothing: give it one, or a template")
        with ExitStack() as stack:
            databases = [stack.enter_context(self._empty()) for _ in range(count)]
            databases += [stack.enter_context(make_scratch(self._migrator.repo, each)) for each in originals]
            sample = Sample(self._migrator, revision, databases)
            sample._go_before()
            yield sample

    def _originals(self, templates: Iterable[str]) -> Sequence[Database]:
        if isinstance(templates, str):
            raise ConfigError(f"templates are databases by their names, as in [{templates!r}]")
        names = tuple(templates)
        return [each.database for each in members(self._migrator.repo, Selection(names=names)).found] if names else ()

    @contextmanager
    def engine(self) -> Iterator[Engine]:
        """An engine to an empty database, for pytest-alembic's fixture ``alembic_engine``."""
        with self._empty() as database:
            # Not that of the repo's own verbs, which require_head keeps out of a database that is behind.
            with self._migrator.databases.cache.transient(database) as connection:
                engine = connection.engine
            yield engine

    @property
    def config(self) -> AlembicConfig:
        """A new configuration of Alembic's, for pytest-alembic's fixture ``alembic_config``."""
        return self._migrator.scripts.source.config()

    @contextmanager
    def _empty(self) -> Iterator[Database]:
        with self._scratch() as database:
            if found := self._migrator.revisions(database):
                raise ConfigError(
                    f"scratch has made {database.home}, which is at {' '.join(found)}: tests of migrations begin in an "
                    "empty database, not in a copy of one that is migrated"
                )
            yield database

    def _nothing(self) -> MigrationError:
        location = self._migrator.scripts.source.location
        return MigrationError(f"there are no revisions in {location!r}: write one with `shardrepo revision`", ())


class Sample:
    """Databases in which a revision is tried; made by `Migrations.before`.

    Attributes:
        revision: Which.
        databases: The empty ones, then the copies, in the order of their templates.
    """

    def __init__(self, migrator: Migrator, revision: str, databases: Sequence[Database]) -> None:
        self._migrator = migrator
        self.revision = revision
        self.databases = tuple(databases)

    def upgrade(self) -> None:
        """Run the revision in each of them; what it raises is raised, with a note that says where that was."""
        for database in self.databases:
            self._migrator.run("upgrade", database, self.revision)

    def downgrade(self) -> None:
        """Take the revision back in each of them, where it was run; what it raises is raised."""
        for database in self.databases:
            if self._migrator.has(database, self.revision):
                self._migrator.run("downgrade", database, self._migrator.scripts.way_back(self.revision))

    @contextmanager
    def connect(self, database: Database) -> Iterator[Connection]:
        """A connection for plain SQL, committed at the end of the block; also where the repo's ``require_head`` lets
        nobody in.
        """
        with self._migrator.databases.cache.transient(database) as connection, connection.begin():
            yield connection

    def _go_before(self) -> None:
        """Take all of them to the revision before, from wherever they are."""
        self.downgrade()
        if before := " ".join(self._migrator.scripts.before(self.revision)):
            for database in self.databases:
                self._migrator.run("upgrade", database, before)


class _RoundTrips:
    """Takes revisions there, back and there again, one after the other.

    Attributes:
        problems: What was wrong so far.
    """

    def __init__(self, migrator: Migrator, irreversible: Collection[str]) -> None:
        if isinstance(irreversible, str):
            raise ConfigError(f"irreversible is a set of revisions, as in {{{irreversible!r}}}")
        self._migrator = migrator
        self._irreversible = {migrator.revision(name) for name in irreversible}
        self._left = deque(migrator.scripts.order)
        self._reached: Revisions = ()
        self.problems: list[str] = []

    @property
    def are_over(self) -> bool:
        """Whether none is left."""
        return not self._left

    def go_on(self, database: Database) -> None:
        """Go on in *database*, which is empty, until none is left, or one has left it as the next cannot use it."""
        if self._reached and not self._catches_up(database):
            return
        schema: Schema | None = self._migrator.schema(database)
        while self._left and schema is not None:
            schema = self._trip(database, self._left.popleft(), schema)

    def _trip(self, database: Database, revision: str, before: Schema) -> Schema | None:
        """Try one; returns the schema that it makes, None if that is not what is in the database now."""
        if error := self._error("upgrade", database, revision):
            self._note(revision, f"its upgrade fails, so that nothing after it was tried: {_told(error)}")
            self._left.clear()
            return None
        self._reached = self._migrator.revisions(database)
        made = self._migrator.schema(database)
        if revision in self._irreversible:
            return made
        if error := self._error("downgrade", database, revision):
            return self._not_undone(revision, error, made)
        if not self._is_same(revision, "its downgrade does not undo it", before, database):
            return None
        if error := self._error("upgrade", database, revision):
            self._note(revision, f"its upgrade fails after its downgrade: {_told(error)}")
            return None
        again = "after its downgrade, its upgrade makes something else than before"
        return made if self._is_same(revision, again, made, database) else None

    def _catches_up(self, database: Database) -> bool:
        """Take a further database to where the last one was; False if it cannot be, as when they have made roles."""
        error = self._migrator.outcome("upgrade", database, " ".join(self._reached)).error
        if error is not None:
            self.problems.append(
                f"{len(self._left)} more were not tried: in a second database, those before them fail: {_told(error)}; "
                f"{error.__notes__[-1]}"
            )
            self._left.clear()
        return error is None

    def _error(self, move: Work, database: Database, revision: str) -> Exception | None:
        target = revision if move == "upgrade" else self._migrator.scripts.way_back(revision)
        return self._migrator.outcome(move, database, target).error

    def _not_undone(self, revision: str, error: Exception, made: Schema) -> Schema | None:
        if not isinstance(error, NotImplementedError):
            self._note(revision, f"its downgrade fails: {_told(error)}")
            return None
        self._note(
            revision,
            "it is irreversible, its downgrade raises NotImplementedError: write that, or say that this is meant, by "
            f"up_and_down(irreversible={{{revision!r}}})",
        )
        return made

    def _is_same(self, revision: str, otherwise: str, expected: Schema, database: Database) -> bool:
        differing = list(differences(expected, self._migrator.schema(database)))
        if differing:
            self._note(revision, "\n    ".join([f"{otherwise}:", *differing]))
        return not differing

    def _note(self, revision: str, problem: str) -> None:
        self.problems.append(f"{self._migrator.named(revision)}: {problem}")


def _moves_to(target: str) -> Sequence[Work]:
    """What may lead to *target*: a relative one says so itself."""
    if not is_relative(target):
        return "upgrade", "downgrade"
    return ("downgrade",) if re.search(r"-\d+$", target) else ("upgrade",)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
