"""The revisions themselves: what there are, and writing a new one."""

from __future__ import annotations

import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alembic import command
from alembic.runtime.environment import EnvironmentContext
from alembic.script import Script
from alembic.util import CommandError
from sqlalchemy.engine import Connection

from ..database import Database
from ..errors import ConfigError
from ..scripts import Revisions, Scripts, Source, forget
from .env import HANDED, Handed
from .making import scratch
from .members import Selection, members
from .plan import Task
from .planning import source_of
from .worker import Manner, alembic_in_use, migrate

if TYPE_CHECKING:
    from ..repo import Repo


@dataclass(frozen=True, slots=True)
class Revision:
    """One revision of the schema.

    Attributes:
        id: What it is called.
        down: Those that it follows; () for a first one.
        message: What it says that it does.
        path: Where its script is.
        is_head: Whether nothing follows it.
        labels: The branches that it is on by name.
    """

    id: str
    down: Revisions
    message: str
    path: Path
    is_head: bool
    labels: tuple[str, ...] = ()

    @classmethod
    def of(cls, script: Script) -> Revision:
        """Read Alembic's."""
        down = script.down_revision or ()
        return cls(
            script.revision,
            (down,) if isinstance(down, str) else tuple(down),
            script.doc,
            Path(script.path),
            script.is_head,
            tuple(sorted(script.branch_labels)),
        )


def history(repo: type[Repo], *, source: Source | None = None) -> list[Revision]:
    """All revisions, the newest first. Connects to nothing."""
    return [Revision.of(script) for script in Scripts.of(source or source_of(repo)).directory.walk_revisions()]


def heads(repo: type[Repo], *, source: Source | None = None) -> list[Revision]:
    """The revisions that nothing follows. Connects to nothing."""
    return [revision for revision in history(repo, source=source) if revision.is_head]


def revision(
    repo: type[Repo],
    message: str,
    *,
    autogenerate: bool = False,
    database: str | None = None,
    source: Source | None = None,
    x: Sequence[str] = (),
    **options: Any,
) -> list[Path]:
    """Write a new revision's script; returns where: one, unless env.py's ``process_revision_directives`` leaves none,
    or several. Where ruff is installed, it lays the script out, by the project's settings.

    With *autogenerate* it has what the models have and the database has not. That is a database of its own, made for
    this, brought to head and dropped again: so it is the revisions so far that the models are compared with, and no
    change that somebody has made in one database by hand. It is another one if that is named.

    Args:
        repo: The repo whose schema it is.
        message: What it does.
        autogenerate: Whether to compare with the models.
        database: The member to compare with instead.
        source: The scripts; those that the repo's config names if not given.
        x: Alembic's ``-x`` arguments.
        **options: Further ones of Alembic's ``command.revision``: ``head splice branch_label version_path rev_id
            depends_on``.

    Raises:
        ConfigError: Alembic refuses, because there are several heads, say.
    """
    source = source or source_of(repo)
    Scripts.of(source)  # whose errors say more than Alembic's
    config = source.config()
    config.stdout = StringIO()
    config.cmd_opts = Namespace(quiet=True, x=list(x))
    try:
        if not autogenerate:
            found = command.revision(config, message, **options)
        else:
            with _compared(repo, source, database, x) as connection, alembic_in_use:
                config.attributes[HANDED] = Handed(repo._router.databases, connection)
                found = command.revision(config, message, autogenerate=True, **options)
    except CommandError as error:
        raise ConfigError(f"no revision was written: {error}") from error
    finally:
        forget()
    scripts = found if isinstance(found, list) else [found]
    paths = [Path(script.path) for script in scripts if script is not None]
    for path in paths:
        _lay_out(path)
    return paths


def _lay_out(path: Path) -> None:
    if find_spec("ruff") is not None:
        command = [sys.executable, "-m", "ruff", "format", "--quiet", str(path)]
        subprocess.run(command, check=False)  # noqa: S603  # our own


@contextmanager
def _compared(repo: type[Repo], source: Source, name: str | None, x: Sequence[str]) -> Iterator[Connection]:
    """A connection to what the models are compared with."""
    databases = repo._router.databases
    if name is not None:
        (member,) = members(repo, Selection(names=(name,))).found
        with databases.cache.transient(member.database) as connection:
            yield connection
        return
    with _at_head(repo, source, x) as database, databases.cache.transient(database) as connection:
        yield connection


@contextmanager
def _at_head(repo: type[Repo], source: Source, x: Sequence[str]) -> Iterator[Database]:
    """A database at head that is there for the block."""
    with scratch(repo) as database:
        manner = Manner("", source, "upgrade", session="shardrepo revision", x=tuple(x))
        migrate(repo, database, manner, Task(database.name, database.home, database.server, "heads"))
        yield database


def sql(
    repo: type[Repo],
    work: str,
    target: str,
    *,
    found: Revisions = (),
    source: Source | None = None,
    x: Sequence[str] = (),
) -> str:
    """The SQL that takes a database from *found* to *target*, as Alembic's ``--sql`` writes it. Connects to nothing.

    Raises:
        ConfigError: No way leads there.
    """
    scripts = Scripts.of(source or source_of(repo))
    config, written = scripts.source.config(), StringIO()
    config.output_buffer = written
    config.cmd_opts = Namespace(x=list(x))

    def steps(heads: Any, _: Any) -> Any:
        return scripts.steps(work, target, heads)  # type: ignore[arg-type]  # a move

    options = {"as_sql": True, "starting_rev": found or None, "destination_rev": target}
    try:
        with alembic_in_use, EnvironmentContext(config, scripts.directory, fn=steps, **options):
            scripts.directory.run_env()
    except CommandError as error:
        raise ConfigError(f"no SQL leads from {' '.join(found) or 'base'} to {target}: {error}") from error
    return written.getvalue()
