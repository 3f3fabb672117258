"""Three real servers for the whole run, databases cloned from one template, and repos that are disposed."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from time import monotonic
from typing import Any, TypeAlias

import psycopg
import pytest
from sqlalchemy import Integer, String, create_engine
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from shardrepo import Repo
from shardrepo.testing.servers import Server, Servers, roomy_memory, start_servers

from .models import Base
from .proxy import Proxy

TEMPLATE = "template_app"

# Whether what takes minutes runs too, as in `make test-all`.
LONG = bool(os.environ.get("SHARDREPO_LONG"))

# Runs a statement, with its parameters, past the repo; returns the rows.
SQL: TypeAlias = Callable[..., list[tuple[Any, ...]]]

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Three servers that log every statement; each has the template database with the models' tables."""
    with start_servers(3, log_statements=True, directory=roomy_memory(250, servers=3)) as servers:
        for server in servers:
            server.create_database(TEMPLATE)
            engine = create_engine(server.url(TEMPLATE), poolclass=NullPool)
            Base.metadata.create_all(engine)
        yield servers


@pytest.fixture(scope="session")
def server(servers: Servers) -> Server:
    """The first of the servers."""
    return servers[0]


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """The network in front of the first server."""
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def make_databases(server: Server) -> Iterator[Callable[..., list[str]]]:
    """Clone databases from the template; they are dropped after the test."""
    made: list[tuple[Server, str]] = []

    def make(count: int = 1, on: Server = server) -> list[str]:
        names = [f"db{next(_numbers):04d}" for _ in range(count)]
        on.create_databases(names, template=TEMPLATE)
        made.extend((on, name) for name in names)
        return names

    yield make
    for on, name in made:
        on.drop_database(name, force=True)


@pytest.fixture
def database(make_databases: Callable[..., list[str]]) -> str:
    """The name of a fresh database on the first server."""
    return make_databases()[0]


@pytest.fixture(scope="session")
def _lasting_databases(server: Server) -> Iterator[list[str]]:
    names = [f"lasting{number}" for number in (1, 2)]
    server.create_databases(names, template=TEMPLATE)
    with ExitStack() as stack:
        for name in names:
            _kept_open[server, name] = stack.enter_context(server.connect(name))
        yield names
        _kept_open.clear()


@pytest.fixture
def two_databases(server: Server, _lasting_databases: list[str]) -> tuple[str, str]:
    """Two databases on the first server that all tests use, one after the other: emptied before each."""
    tables = [table.name for table in reversed(Base.metadata.sorted_tables)]
    restart = "SELECT setval(oid::regclass, 1, false) FROM pg_class WHERE relkind = 'S'"
    for name in _lasting_databases:
        run_sql(server, name, "; ".join([*(f"DELETE FROM {table}" for table in tables), restart]))
    one, other = _lasting_databases
    return one, other


@pytest.fixture
def make_repo(server: Server) -> Iterator[Callable[..., type[Repo]]]:
    """Define a repo on the first server; it is disposed after the test, and must leave no connection in use."""
    repos: list[type[Repo]] = []

    def make(database: str | None = None, on: Server | Proxy = server, **config: Any) -> type[Repo]:
        settings = {"url": url_of(on, database), "application_name": f"repo{next(_numbers)}", **config}
        repo = type("AppRepo", (Repo,), {}, config=settings)
        repos.append(repo)
        return repo

    yield make
    for repo in repos:
        if repo.stats().in_use:  # which an error's traceback may hold; to collect for every test takes half of the run
            gc.collect()
        in_use = repo.stats().in_use
        repo.dispose()
        assert in_use == 0


def url_of(server: Server | Proxy, database: str | None = None) -> URL:
    """The URL of *database* on *server*; without one, a URL that names no database."""
    return server.url(database or "postgres")._replace(database=database)


def connections_of(server: Server, application_name: str) -> list[tuple[int, str]]:
    """Ask the server which connections an application has: pid and database of each."""
    with server.connect() as connection:
        return connection.execute(
            "SELECT pid, datname FROM pg_stat_activity WHERE application_name = %s ORDER BY pid", (application_name,)
        ).fetchall()


def await_connections(server: Server, application_name: str, databases: Sequence[str]) -> list[int]:
    """Wait until an application has connections to exactly these databases; returns their pids.

    A server process is seen for a moment after its client has closed the connection.
    """
    deadline = monotonic() + 10
    while True:
        found = connections_of(server, application_name)
        if sorted(name for _, name in found) == sorted(databases):
            return [pid for pid, _ in found]
        assert monotonic() < deadline, f"expected connections to {databases}, found {found}"


_kept_open: dict[tuple[Server, str], psycopg.Connection[Any]] = {}


def run_sql(server: Server, database: str, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
    """Run a statement past every repo, on the fixtures' connection or one of its own; returns its rows."""
    kept = _kept_open.get((server, database))
    with nullcontext(kept) if kept is not None else server.connect(database) as connection:
        cursor = connection.execute(statement.encode(), parameters or None)
        return cursor.fetchall() if cursor.description else []


def plant_decoys(server: Server, database: str, count: int = 9) -> None:
    """Fill every table of *database* with rows whose keys are 1, 2, 3, … and whose texts say "decoy"."""
    inserts = []
    for table in Base.metadata.sorted_tables:
        columns = [column for column in table.columns if column.computed is None]
        values = ("'dog'" if column.name == "kind" else _DECOY[type(column.type)] for column in columns)
        names = ", ".join(f'"{column.name}"' for column in columns)
        rows = f"SELECT {', '.join(values)} FROM generate_series(1, {count}) n"
        inserts.append(f"INSERT INTO {table.name} ({names}) {rows}")
    run_sql(server, database, "; ".join(inserts))


_DECOY = {Integer: "n", String: "'decoy ' || n", ARRAY: "ARRAY['decoy']", JSONB: "to_jsonb(n)"}


def contents(server: Server, database: str) -> list[tuple[Any, ...]]:
    """Every row of every table of *database*."""
    tables = [table.name for table in Base.metadata.sorted_tables]
    return run_sql(
        server, database, " UNION ALL ".join(f"SELECT '{t}', {t}::text FROM {t}" for t in tables) + " ORDER BY 1, 2"
    )


def books_balance(repo: type[Repo]) -> bool:
    """Whether the books of a repo's cache add up."""
    stats = repo.stats()
    return stats.attempts - stats.failed - stats.closed == (
        stats.in_use + stats.idle + stats.connecting + stats.closing
    )


def await_(condition: Callable[[], bool]) -> None:
    """Wait until *condition* holds."""
    deadline = monotonic() + 30
    while not condition():
        assert monotonic() < deadline
