"""The repo of the conformance cases: on its default database, and on a chosen one beside decoys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shardrepo import Repo
from shardrepo.testing.servers import Server

from ..conftest import SQL, contents, plant_decoys, run_sql


@pytest.fixture(params=["default", "chosen"])
def repo(
    request: pytest.FixtureRequest,
    server: Server,
    two_databases: tuple[str, str],
    make_repo: Callable[..., type[Repo]],
) -> Iterator[type[Repo]]:
    """A repo on an empty database.

    Once that is its default; once it is chosen, while the default holds rows with the same primary keys,
    none of which may change. Every case that takes it proves routing, too.
    """
    used, other = two_databases
    if request.param == "default":
        yield make_repo(used)
        assert contents(server, other) == []
        return
    plant_decoys(server, other)
    before = contents(server, other)
    repo = make_repo(other)
    repo.set_database(used)
    yield repo
    assert contents(server, other) == before


@pytest.fixture
def sql(server: Server, two_databases: tuple[str, str]) -> SQL:
    """Run SQL on the database that the repo is to use, past the repo; returns the rows."""
    used, _ = two_databases

    def run(statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return run_sql(server, used, statement, parameters)

    return run
