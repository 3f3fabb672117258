"""What all benchmarks stand on: one server of their own, and databases cloned from one template."""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import create_engine, insert
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

from shardrepo import Repo
from shardrepo.testing.servers import Server, ServerStartError, roomy_memory, start_servers

from .measure import MissingError

TEMPLATE = "template_bench"
ROWS = 100

# A clone of the template takes 8 MB of disk with PostgreSQL 18; twice that leaves room for the rest.
_DATABASE_BYTES = 16 << 20


class Base(DeclarativeBase):
    """Root of the benchmarks' models."""


class User(Base):
    """Six columns and an integer key."""

    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]
    age: Mapped[int]
    city: Mapped[str]
    note: Mapped[str | None]


class Ground:
    """A server on the loopback, asking for passwords (SCRAM), with a filled template."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.server = server
        self._directory = directory
        self._numbers = itertools.count(1)
        self.repos: list[type[Repo]] = []

    @contextmanager
    def databases(self, count: int) -> Iterator[list[str]]:
        """Clone databases, under names that were never used before; dropped at the end of the block.

        Raises:
            MissingError: The disk has no room for them.
        """
        check_room(count, self._directory)
        names = [f"bench{next(self._numbers):05d}" for _ in range(count)]
        self.server.create_databases(names, template=TEMPLATE)
        try:
            yield names
        finally:
            for repo in self.repos:
                repo.disconnect_all()
            for name in names:
                self.server.drop_database(name, force=True)

    def repo(self, database: str, pool_size: int, **config: Any) -> type[Repo]:
        """Define a repo; it is disposed with the server."""
        repo = type(
            "BenchRepo", (Repo,), {}, config={"url": self.server.url(database), "pool_size": pool_size, **config}
        )
        self.repos.append(repo)
        return repo

    @contextmanager
    def engines(self, database: str) -> Iterator[tuple[Engine, Engine]]:
        """SQLAlchemy's own to compare with: one as it comes, and one that is AUTOCOMMIT and sends no ROLLBACK."""
        url = self.url(database)
        default = create_engine(url)
        autocommit = create_engine(url, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True)
        yield default, autocommit
        default.dispose()
        autocommit.dispose()

    def url(self, database: str) -> URL:
        return self.server.url(database)


def room_for(databases: int) -> Path | None:
    """Where many databases are made fastest: the file system in memory, if it has room for them; None for a disk.

    Raises:
        MissingError: Neither has.
    """
    memory = roomy_memory(databases, servers=3)
    if memory is None:
        check_room(databases, Path(tempfile.gettempdir()))
    return memory


def check_room(databases: int, directory: Path) -> None:
    """Raise `MissingError` if so many databases have no room in *directory*."""
    needed, free = databases * _DATABASE_BYTES, shutil.disk_usage(directory).free
    if free < needed:
        raise MissingError(f"disk: {databases} databases may take {needed >> 20} MB, {free >> 20} MB are free")


@contextmanager
def ground(*, log_statements: bool = False, directory: Path | None = None) -> Iterator[Ground]:
    """Start the server and fill the template.

    Raises:
        MissingError: There is no PostgreSQL, or it does not start.
    """
    try:
        servers = start_servers(1, log_statements=log_statements, directory=directory)
    except ServerStartError as error:
        raise MissingError(f"servers: {error}") from error
    with servers:
        (server,) = servers
        server.create_database(TEMPLATE)
        engine = create_engine(server.url(TEMPLATE), poolclass=NullPool)
        Base.metadata.create_all(engine)
        with engine.begin() as connection:
            rows = [{"name": f"user {n}", "email": f"{n}@example.com", "age": n, "city": "London"} for n in range(ROWS)]
            connection.execute(insert(User), rows)
        made = Ground(server, servers.directory)
        yield made
        for repo in made.repos:
            repo.dispose()
