"""What a project's ``migrations/env.py`` calls, and nothing else:

    from app.models import Base
    from app.repo import MyRepo
    from shardrepo.fleet import env

    env.run(MyRepo, Base.metadata)

Run by Alembic itself, it migrates one database: the repo's default, or with ``-x database=shard02`` the one of that
name, wherever the directory says that is. A program that runs Alembic, as pytest-alembic does, may hand over an engine
of the repo's in ``config.attributes["connection"]``; then it is the database of that.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

from alembic import context
from alembic.util import CommandError
from sqlalchemy import MetaData
from sqlalchemy.engine import Connection, Engine

from ..errors import ConfigError, ShardRepoError
from ..pool import LedgerPool
from .lock import take
from .members import Selection, members

if TYPE_CHECKING:
    from ..database import Database
    from ..databases import Databases
    from ..repo import Repo

# Where Alembic's config carries what a worker hands over.
HANDED: Final = "shardrepo"

# Seconds, as `Rollout` has them, for which Alembic by itself waits for locks.
_LOCK_TIMEOUT: Final = 5.0
_PATIENCE: Final = 60.0


class Handed:
    """A connection on which the scripts are to be run, as a worker hands it over.

    Attributes:
        databases: Those of the repo that it belongs to.
        connection: To the database that is meant; in no transaction.
        was_run: Whether an env.py has done so.
    """

    def __init__(self, databases: Databases, connection: Connection) -> None:
        self.databases = databases
        self.connection = connection
        self.was_run = False


def run(repo: type[Repo], target_metadata: MetaData | list[MetaData] | None, **options: Any) -> None:
    """Run what Alembic was asked for, in a database of *repo*.

    Each revision is a transaction of its own, unless *options* say otherwise. Its version table is that of the repo's
    config.

    Args:
        repo: The repo whose databases are migrated.
        target_metadata: What `revision --autogenerate` and `check` compare with.
        **options: Further ones for Alembic's ``context.configure``, such as ``include_object``.

    Raises:
        ConfigError: An option is not for an env.py to give, or this env.py is of another repo than the one that the
            fleet is migrated by.
    """
    options = {**_checked(repo, options), "target_metadata": target_metadata}
    handed = context.config.attributes.get(HANDED)
    if context.is_offline_mode():
        context.configure(
            dialect_name="postgresql", literal_binds=True, dialect_opts={"paramstyle": "named"}, **options
        )
        _run_migrations()
    elif handed is None:
        _log()
        with _alone(repo) as connection:
            context.configure(connection=connection, **options)
            _run_migrations()
    else:
        if handed.databases is not repo._router.databases:
            raise ConfigError(
                f"this env.py runs {repo.__name__}, and the fleet to be migrated is of another repo: give env.run() "
                "that one, or name the scripts that are its own (script_location)"
            )
        context.configure(connection=handed.connection, **options)
        _run_migrations()
        handed.was_run = True


def _run_migrations() -> None:
    with context.begin_transaction():
        context.run_migrations()


def _checked(repo: type[Repo], options: dict[str, Any]) -> dict[str, Any]:
    for name in ("connection", "url", "version_table", "version_table_schema"):
        if name in options:
            raise ConfigError(f"env.run() takes no {name}: it is the repo's own, in its config")
    schema, _, table = repo._router.databases.config.version_table.rpartition(".")
    return {
        "transaction_per_migration": True,
        "version_table": table,
        "version_table_schema": schema or None,
        **options,
    }


@contextmanager
def _alone(repo: type[Repo]) -> Iterator[Connection]:
    """A connection to the database of an engine that was handed over, else to the one that ``-x database=`` names, else
    to the default one; with its lock.
    """
    with ExitStack() as stack:
        # As an error of its own, Alembic says it in a line, and shows no traceback.
        try:
            connection = stack.enter_context(repo._router.databases.cache.transient(_meant(repo)))
            if _changes_the_schema():
                take(connection, "alembic", _LOCK_TIMEOUT, _PATIENCE, lambda: None)
        except ShardRepoError as error:
            raise CommandError("; ".join([str(error), *getattr(error, "blockers", ())])) from error
        yield connection


def _meant(repo: type[Repo]) -> Database:
    name = context.get_x_argument(as_dictionary=True).get("database")
    engine = context.config.attributes.get("connection")
    if engine is not None:
        if name is not None:
            raise ConfigError(f"the database is named twice, by -x database={name} and by {engine!r}: leave one out")
        return _database_of(engine, repo)
    if name is None:
        return repo._router.databases.resolve(None)
    if not name:
        raise ConfigError("-x database= names no database: leave it out for the default one")
    (member,) = members(repo, Selection(names=(str(name),))).found
    return member.database


def _database_of(engine: object, repo: type[Repo]) -> Database:
    """The database of *engine*, which the repo has to have made: so it is known that these scripts are meant for it.

    It is not the engine's connections that are used. A migration holds a lock as long as its own is open, and commits
    revision by revision, which it could not do in a transaction of somebody else's.
    """
    pool = engine.pool if isinstance(engine, Engine) else None
    if not isinstance(pool, LedgerPool) or pool.ledger is not repo._router.cache.ledger:
        raise ConfigError(
            f'config.attributes["connection"] is {engine!r}, no engine of {repo.__name__}, and nothing was sent there: '
            f"hand over that of shardrepo.testing.migrations.Migrations({repo.__name__}), or {repo.__name__}.engine()"
        )
    return pool.database


def _changes_the_schema() -> bool:
    try:
        with suppress(CommandError):  # a relative one, which nobody can tell yet
            context.get_revision_argument()
    except KeyError:
        # Asked by `current`, `check` or `revision`, which have no revision to go to.
        return False
    return True


def _log() -> None:
    """Say what is run, as Alembic's own env.py does, unless the project has set up its logging."""
    if not logging.root.handlers:
        logging.basicConfig(format="%(levelname)-5.5s [%(name)s] %(message)s")
        logging.getLogger("alembic").setLevel(logging.INFO)
