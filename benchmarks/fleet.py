"""Migrating 20 to 3,000 databases on three servers, against a loop of `alembic upgrade head`, a process for each.

A project as its user makes it, with `shardrepo init`, and whole commands, their start included: `shardrepo upgrade` of
a fleet that lacks one revision, which adds a column, and again when there is nothing to do; three times at each size.
In turn with it, at 600, the loop, over 20 other databases on the same servers, with an env.py that connects to what it
is told and nothing else. The line is the straight one through the sizes up to 600, by least squares, one for each
round: what a command costs, and what each database adds. What is said of more databases than were migrated is that
line drawn on, no measurement. 3,000 databases take 25 GB and ten minutes: with SHARDREPO_LONG=1, as in `make bench`.
Last, 100 databases made by `shardrepo create` from a template at head, against as many `CREATE DATABASE … TEMPLATE` on
one connection. The servers run on the same machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression
from time import perf_counter
from typing import Final

from psycopg.sql import SQL, Identifier

from shardrepo.testing.servers import Server, start_servers

from .ground import Ground, room_for
from .measure import Figure, Goal, MissingError, Skipped, Spread

# The goals are for the last of the sizes, with which the loop takes turns.
_SIZES: Final = (20, 100, 300, 600)
_LARGE: Final = 3_000
_FAR: Final = 10_000
_LONG: Final = bool(os.environ.get("SHARDREPO_LONG"))
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


def run(_: Ground) -> Iterator[Figure | Skipped]:
    largest = _LARGE if _LONG else _SIZES[-1]
    with start_servers(3, directory=room_for(largest + _LOOP + _MADE)) as servers:
        # Beside the servers' files, which are removed even when this process is killed.
        project = _Project(servers.directory / "project", servers)
        fleet = {size: project.measured(size) for size in _SIZES[:-1]}
        size = _SIZES[-1]
        project.make_databases(size)
        pairs = [(project.upgraded(), project.looped()) for _ in range(_ROUNDS)]
        fleet[size] = [upgraded for upgraded, _ in pairs]
        yield from _figures(fleet)
        yield from _against_the_loop(size, pairs)
        yield from _drawn_on(fleet, project.measured(_LARGE) if _LONG else None)
        yield from _making(project)


@dataclass(frozen=True)
class _Round:
    """Seconds, with one revision and with nothing to do."""

    revision: float
    nothing: float


_DONE: Final = {"nothing": "nothing to do", "revision": "one revision"}
_GOALS: Final = {"nothing": Goal("≤", 5), "revision": Goal("≤", 15)}


def _figures(fleet: Mapping[int, Sequence[_Round]]) -> Iterator[Figure]:
    for what, done in _DONE.items():
        for size, rounds in fleet.items():
            goal = _GOALS[what] if size == _SIZES[-1] else None
            yield Figure(f"{size} databases, {done}", Spread.of([getattr(each, what) for each in rounds]), "s", goal)


def _against_the_loop(size: int, pairs: Sequence[tuple[_Round, _Round]]) -> Iterator[Figure]:
    for what, done in _DONE.items():
        fleet, loop = ([getattr(each, what) for each in side] for side in zip(*pairs, strict=True))
        ratios = [alone / _LOOP / (together / size) for together, alone in zip(fleet, loop, strict=True)]
        yield Figure(f"the loop, {done}, a database", Spread.of(loop) * (1e3 / _LOOP), "ms")
        yield Figure(f"the loop over the fleet, {done}, a database", Spread.of(ratios), "x", Goal("≥", 30))


def _drawn_on(fleet: Mapping[int, Sequence[_Round]], large: Sequence[_Round] | None) -> Iterator[Figure | Skipped]:
    """The line through the sizes, and where it leads to."""
    sizes = list(fleet)
    for what, done in _DONE.items():
        rounds = zip(*([getattr(each, what) for each in fleet[size]] for size in sizes), strict=True)
        lines = [linear_regression(sizes, seconds) for seconds in rounds]
        at_large = [line.intercept + line.slope * _LARGE for line in lines]
        at_far = [line.intercept + line.slope * _FAR for line in lines]
        yield Figure(f"the line, {done}: a command", Spread.of([line.intercept for line in lines]), "s")
        yield Figure(f"the line, {done}: each database", Spread.of([line.slope for line in lines]) * 1e3, "ms")
        yield Figure(f"{_LARGE:,} databases, {done}, extrapolated along the line", Spread.of(at_large), "s")
        if large is None:
            yield Skipped(f"{_LARGE:,} databases, {done}", "SHARDREPO_LONG=1 in the environment: 25 GB and ten minutes")
        else:
            yield Figure(f"{_LARGE:,} databases, {done}", Spread.of([getattr(each, what) for each in large]), "s")
        yield Figure(f"{_FAR:,} databases, {done}, extrapolated along the line", Spread.of(at_far), "s")


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
        root.mkdir()
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
        self._revisions = 0
        self._size = 0
        self._revise(TABLE)
        servers[0].create_databases(f"loop{number:04}" for number in range(_LOOP))

    def make_databases(self, size: int) -> None:
        """Have so many, all of them and the loop's at the last revision."""
        for number, server in enumerate(self._servers):
            new = range(self._size, size)
            server.create_databases(f"fleet{n:04}" for n in new if n % len(self._servers) == number)
        self._size = size
        self._command("upgrade")
        self._loop()

    def measured(self, size: int) -> list[_Round]:
        """The rounds of a fleet of so many databases, which has to grow to it."""
        self.make_databases(size)
        return [self.upgraded() for _ in range(_ROUNDS)]

    def upgraded(self) -> _Round:
        """One more revision for the fleet, which then has nothing to do."""
        self._revise(f'op.add_column("users", sa.Column("age{self._revisions}", sa.Integer()))')
        return _Round(self._command("upgrade"), self._command("upgrade"))

    def looped(self) -> _Round:
        """The same revision for all databases of the loop."""
        return _Round(self._loop(), self._loop())

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

    def _revise(self, upgrade: str) -> None:
        number = self._revisions
        text = REVISION.format(number=number, down=f"{number - 1:04}" if number else None, upgrade=upgrade)
        (self._root / "migrations" / "versions" / f"{number:04}.py").write_text(text)
        self._revisions += 1

    def _command(self, *arguments: str) -> float:
        return self._timed([sys.executable, "-m", "shardrepo", *arguments])

    def _loop(self) -> float:
        urls = [self._servers[0].url(f"loop{n:04}").render_as_string(hide_password=False) for n in range(_LOOP)]
        command = [sys.executable, "-m", "alembic", "-c", "plain.ini"]
        return sum(self._timed([*command, "-x", f"url={url}", "upgrade", "head"]) for url in urls)

    def _timed(self, command: Sequence[str]) -> float:
        begun = perf_counter()
        done = subprocess.run(command, cwd=self._root, env=os.environ, capture_output=True, text=True, check=False)
        seconds = perf_counter() - begun
        if done.returncode:
            raise MissingError(
                f"a command that succeeds: {' '.join(command[2:4])}: {(done.stderr or done.stdout)[-500:]}"
            )
        return seconds
