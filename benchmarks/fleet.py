"""Migrating 600 databases on three servers, against a loop of `alembic upgrade head`, a process for each database.

A project as its user makes it, with `shardrepo init`, and whole commands, their start included: `shardrepo upgrade` of
600 databases that lack one revision, which adds a column, and again when there is nothing to do; then the loop, over 20
other databases on the same servers, with an env.py that connects to what it is told and nothing else. Three rounds.
Last, 100 databases made by `shardrepo create` from a template at head, against as many `CREATE DATABASE … TEMPLATE` on
one connection. The servers run on the same machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Final

from psycopg.sql import SQL, Identifier

from shardrepo.testing.servers import Server, start_servers

from .ground import Ground, roomy_memory
from .measure import Figure, Goal, MissingError, Spread

_DATABASES: Final = 600
_LOOP: Final = 20
_MADE: Final = 100
_ROUNDS: Final = 3

_APP: Final = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardrepo import Repo
from shardrepo.directory import Servers


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


SERVERS = {servers!r}


CONFIG = {{"url": {url!r}, "directory": Servers(SERVERS, like="fleet%"), "template_database": "fleet_template"}}


class FleetRepo(Repo, config=CONFIG):
    pass
"""

PLAIN_ENV: Final = """
from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

url = context.get_x_argument(as_dictionary=True)["url"]
with create_engine(url, poolclass=NullPool).connect() as connection:
    context.configure(connection=connection, transaction_per_migration=True)
    with context.begin_transaction():
        context.run_migrations()
"""

REVISION: Final = """
import sqlalchemy as sa
from alembic import op

revision = "{number:04}"
down_revision = {down!r}


def upgrade():
    {upgrade}
"""

TABLE: Final = (
    'op.create_table("users", sa.Column("id", sa.Integer(), primary_key=True), sa.Column("name", sa.String()))'
)


def run(_: Ground) -> Iterator[Figure]:
    with (
        TemporaryDirectory() as folder,
        start_servers(3, directory=roomy_memory(_DATABASES + _LOOP + _MADE)) as servers,
    ):
        project = _Project(Path(folder), servers)
        project.make_databases()
        rounds = [project.round(number) for number in range(1, _ROUNDS + 1)]
        yield from _figures(rounds)
        yield from _making(project)


@dataclass(frozen=True)
class _Round:
    """Seconds: of the fleet's command with a revision and with nothing to do; of the loop, for each database."""

    revision: float
    nothing: float
    loop_revision: float
    loop_nothing: float


def _figures(rounds: Sequence[_Round]) -> Iterator[Figure]:
    def spread(of: str, scale: float = 1.0) -> Spread:
        return Spread.of([getattr(each, of) * scale for each in rounds])

    def ratio(over: str, under: str) -> Spread:
        return Spread.of([getattr(each, over) * _DATABASES / getattr(each, under) for each in rounds])

    yield Figure(f"{_DATABASES} databases, nothing to do", spread("nothing"), "s", Goal("≤", 5))
    yield Figure(f"{_DATABASES} databases, one revision", spread("revision"), "s", Goal("≤", 15))
    yield Figure("the loop, nothing to do, a database", spread("loop_nothing", 1e3), "ms")
    yield Figure("the loop, one revision, a database", spread("loop_revision", 1e3), "ms")
    yield Figure(
        "the loop over the fleet, nothing to do, a database", ratio("loop_nothing", "nothing"), "x", Goal("≥", 30)
    )
    yield Figure(
        "the loop over the fleet, one revision, a database", ratio("loop_revision", "revision"), "x", Goal("≥", 30)
    )


def _making(project: _Project) -> Iterator[Figure]:
    pairs = [(project.create(number), project.create_by_hand(number)) for number in range(_ROUNDS)]
    yield Figure(f"create of {_MADE} databases", Spread.of([made for made, _ in pairs]), "s")
    yield Figure(f"{_MADE} CREATE DATABASE … TEMPLATE", Spread.of([alone for _, alone in pairs]), "s")
    yield Figure(
        "create over CREATE DATABASE alone", Spread.of([made / alone for made, alone in pairs]), "x", Goal("≤", 2)
    )


class _Project:
    """A user's project, its databases, and those of the loop."""

    def __init__(self, root: Path, servers: Sequence[Server]) -> None:
        self._root = root
        self._servers = servers
        addresses = [{"host": server.host, "port": server.port} for server in servers]
        url = servers[0].url().render_as_string(hide_password=False)
        (root / "app.py").write_text(_APP.format(servers=addresses, url=url))
        self._command("init", "app:FleetRepo", "app:Base")
        # The loop's own: the same revisions, another env.py.
        (root / "plain").mkdir()
        (root / "plain" / "env.py").write_text(PLAIN_ENV)
        (root / "plain" / "versions").symlink_to(root / "migrations" / "versions")
        (root / "plain.ini").write_text("[alembic]\nscript_location = plain\npath_separator = os\n")
        self._revise(0, TABLE)

    def make_databases(self) -> None:
        """Make them, with the first revision."""
        for number, server in enumerate(self._servers):
            server.create_databases(f"fleet{n:04}" for n in range(_DATABASES) if n % len(self._servers) == number)
        self._servers[0].create_databases(f"loop{number:04}" for number in range(_LOOP))
        self._command("upgrade")
        self._loop()

    def round(self, number: int) -> _Round:
        """One more revision, for the fleet and for the loop, each of which then has nothing to do."""
        self._revise(number, f'op.add_column("users", sa.Column("age{number}", sa.Integer()))')
        return _Round(self._command("upgrade"), self._command("upgrade"), self._loop(), self._loop())

    def create(self, number: int) -> float:
        """Seconds to make databases from the template; they are dropped again."""
        server = self._servers[0]
        names = [f"made{number}x{each:03}" for each in range(_MADE)]
        seconds = self._command("create", "--server", f"{server.host}:{server.port}", *names)
        for name in names:
            server.drop_database(name)
        return seconds

    def create_by_hand(self, number: int) -> float:
        """The same, on one connection."""
        server = self._servers[0]
        names = [f"hand{number}x{each:03}" for each in range(_MADE)]
        begun = perf_counter()
        with server.connect() as connection:
            for name in names:
                statement = SQL("CREATE DATABASE {} TEMPLATE fleet_template").format(Identifier(name))
                connection.execute(statement)
        seconds = perf_counter() - begun
        for name in names:
            server.drop_database(name)
        return seconds

    def _revise(self, number: int, upgrade: str) -> None:
        text = REVISION.format(number=number, down=f"{number - 1:04}" if number else None, upgrade=upgrade)
        (self._root / "migrations" / "versions" / f"{number:04}.py").write_text(text)

    def _command(self, *arguments: str) -> float:
        return self._timed([sys.executable, "-m", "shardrepo", *arguments])

    def _loop(self) -> float:
        """Seconds for each database."""
        urls = [self._servers[0].url(f"loop{n:04}").render_as_string(hide_password=False) for n in range(_LOOP)]
        command = [sys.executable, "-m", "alembic", "-c", "plain.ini"]
        return sum(self._timed([*command, "-x", f"url={url}", "upgrade", "head"]) for url in urls) / _LOOP

    def _timed(self, command: Sequence[str]) -> float:
        begun = perf_counter()
        done = subprocess.run(command, cwd=self._root, env=os.environ, capture_output=True, text=True, check=False)
        seconds = perf_counter() - begun
        if done.returncode:
            raise MissingError(
                f"a command that succeeds: {' '.join(command[2:4])}: {(done.stderr or done.stdout)[-500:]}"
            )
        return seconds
