"""Three real servers for the whole run, databases cloned from one template, and repos that are disposed."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from shardrepo import Repo
from shardrepo.testing.servers import Server, Servers, start_servers

from .models import Base

TEMPLATE = "template_app"

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """Three servers that log every statement; each has the template database with the models' tables."""
    with start_servers(3, log_statements=True) as servers:
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


@pytest.fixture
def make_repo(server: Server) -> Iterator[Callable[..., type[Repo]]]:
    """Define a repo on the first server; it is disposed after the test, and must leave no connection in use."""
    repos: list[type[Repo]] = []

    def make(database: str | None = None, on: Server = server, **config: Any) -> type[Repo]:
        settings = {"url": url_of(on, database), "application_name": f"repo{next(_numbers)}", **config}
        repo = type("AppRepo", (Repo,), {}, config=settings)
        repos.append(repo)
        return repo

    yield make
    gc.collect()
    for repo in repos:
        in_use = repo.stats().in_use
        repo.dispose()
        assert in_use == 0


def url_of(server: Server, database: str | None = None) -> URL:
    """The URL of *database* on *server*; without one, a URL that names no database."""
    return server.url(database or "postgres")._replace(database=database)


def connections_of(server: Server, application_name: str) -> list[tuple[int, str]]:
    """Ask the server which connections an application has: pid and database of each."""
    with server.connect() as connection:
        return connection.execute(
            "SELECT pid, datname FROM pg_stat_activity WHERE application_name = %s ORDER BY pid", (application_name,)
        ).fetchall()
