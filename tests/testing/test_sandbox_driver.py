"""What a sandbox makes of those who use the driver's own connection: nothing that they do there gets out of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import OperationalError

from shardrepo import Repo
from shardrepo.testing.servers import Server

from ..conftest import contents
from ..models import Tag

pytestmark = pytest.mark.testing

Make = Callable[..., type[Repo]]


@pytest.fixture
def repo(make_repo: Make, two_databases: tuple[str, str]) -> type[Repo]:
    return make_repo(two_databases[0])


def driver_of(connection: Connection) -> Any:
    """psycopg's connection behind one of SQLAlchemy's."""
    return connection.connection.driver_connection


# What is kept too long


def test_a_connection_that_was_returned(repo: type[Repo], server: Server, two_databases: tuple[str, str]) -> None:
    """It is closed for whoever still has it: the real one may be in another's transaction by then."""
    with repo.sandbox():
        with repo.engine().connect() as connection:
            kept = driver_of(connection)
        with pytest.raises(psycopg.OperationalError, match="closed or returned"):
            kept.execute("INSERT INTO tags (label) VALUES ('early')")
    with repo.transaction():
        repo.count(Tag)
        with pytest.raises(psycopg.OperationalError, match="closed or returned"):
            kept.execute("INSERT INTO tags (label) VALUES ('late')")
    assert contents(server, two_databases[0]) == []


def test_a_connection_that_is_detached(repo: type[Repo], server: Server, two_databases: tuple[str, str]) -> None:
    """It cannot leave the sandbox: it is rolled back, and closed."""
    with repo.sandbox():
        detached = repo.engine().connect()
        detached.execute(text("INSERT INTO tags (label) VALUES ('lost')"))
        detached.detach()
        with pytest.raises(OperationalError, match="closed or returned"):
            detached.execute(text("SELECT 1"))
        assert repo.count(Tag) == 0
    detached.close()
    assert contents(server, two_databases[0]) == []
