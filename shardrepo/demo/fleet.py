"""The demo's databases: made from a template on each server, and looked over after each load."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Final, Literal, TypeAlias

from sqlalchemy import create_engine, text
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from ..testing.servers import Server
from .load import SEEDED
from .models import Base

TEMPLATE: Final = "template_demo"

# Where a checkout has its migrations; an installed wheel has none.
MIGRATIONS: Final = Path(__file__).parents[2] / "migrations"
_ALEMBIC_INI: Final = MIGRATIONS / "alembic.ini"

# After cloning: the rows must name the clone, not the template.
_SEED: Final = (
    "INSERT INTO customers (name, email, city, visits) "
    "SELECT 'customer ' || n, n || '@example.com', 'London', 0 FROM generate_series(1, :rows) n"
)
_STRAYS: Final = "SELECT count(*) FROM customers WHERE database <> current_database()"
_ADDED: Final = "DELETE FROM customers WHERE id > :rows"

Stage: TypeAlias = Literal["created", "filled"]
Progress: TypeAlias = Callable[[Stage], None]


def names_of(servers: int, databases: int) -> list[list[str]]:
    """Deal shard001, shard002, … out to the servers in blocks, as evenly as can be."""
    names = [f"shard{number:03d}" for number in range(1, databases + 1)]
    ends = [databases * server // servers for server in range(servers + 1)]
    return [names[start:end] for start, end in pairwise(ends)]


def create(servers: Sequence[Server], databases: int, progress: Progress) -> list[URL]:
    """Create the databases, all servers at once, with their schema and rows; *progress* hears of each step."""
    cancelled = threading.Event()

    def on(stage: Stage) -> None:
        if cancelled.is_set():
            raise CancelledError
        progress(stage)

    def build(server: Server, names: Sequence[str]) -> None:
        migrate(server)
        server.create_databases(names, template=TEMPLATE, progress=lambda _: on("created"))
        for name in names:
            run(server.url(name), _SEED)
            on("filled")

    dealt = names_of(len(servers), databases)
    with ThreadPoolExecutor(len(servers)) as executor:
        try:
            list(executor.map(build, servers, dealt))
        except BaseException:
            # Leaving the block waits for the threads, which would go on to their ends otherwise.
            cancelled.set()
            raise
    return [server.url(name) for server, names in zip(servers, dealt, strict=True) for name in names]


def migrate(server: Server) -> None:
    """Create the template: by the migrations where there are some, else straight from the models."""
    server.create_database(TEMPLATE)
    url = server.url(TEMPLATE)
    if not _ALEMBIC_INI.exists():
        engine = create_engine(url, poolclass=NullPool)
        Base.metadata.create_all(engine)
        return
    command = [sys.executable, "-m", "alembic", "-c", str(_ALEMBIC_INI), "upgrade", "head"]
    environ = {**os.environ, "DATABASE_URL": url.render_as_string(hide_password=False)}
    done = subprocess.run(command, cwd=MIGRATIONS.parent, env=environ, capture_output=True, text=True, check=False)  # noqa: S603  # our own
    if done.returncode:
        raise RuntimeError(f"the migrations in {MIGRATIONS} failed on {server!r}:\n{done.stderr[-2000:]}")


def audit(urls: Sequence[URL]) -> Iterator[tuple[str, int, int]]:
    """Look through every database, past all that is tested, and take out what the load has added.

    Yields for each its name, the rows in it that were meant for another one, and those that were added.
    """
    with ThreadPoolExecutor(4) as executor:
        yield from executor.map(_audit, urls)


def _audit(url: URL) -> tuple[str, int, int]:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        strays = int(connection.execute(text(_STRAYS)).scalar_one())
        added = connection.execute(text(_ADDED), {"rows": SEEDED}).rowcount
    return str(url.database), strays, added


def run(url: URL, statement: str) -> None:
    """Run one statement on a connection of its own."""
    with create_engine(url, poolclass=NullPool).begin() as connection:
        connection.execute(text(statement), {"rows": SEEDED})
