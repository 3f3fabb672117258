"""The repo of the conformance cases: on its default database, on a chosen one beside decoys, and in a sandbox."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from shardrepo import Repo
from shardrepo.pool import driver_of
from shardrepo.testing.servers import Server

from ..conftest import SQL, contents, plant_decoys, run_sql


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Have a module's cases run in a sandbox too, where its ``SANDBOXED`` says that nothing in them could tell."""
    if "repo" in metafunc.fixturenames:
        sandboxed = ["sandboxed"] if getattr(metafunc.module, "SANDBOXED", False) else []
        metafunc.parametrize("repo", ["default", "chosen", *sandboxed], indirect=True)


@pytest.fixture
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
    if request.param == "sandboxed":
        repo = make_repo(used)
        with repo.sandbox(check_deferred=True):
            yield repo
        assert contents(server, used) == contents(server, other) == []
        return
    plant_decoys(server, other)
    before = contents(server, other)
    repo = make_repo(other)
    repo.set_database(used)
    yield repo
    assert contents(server, other) == before


@pytest.fixture
def sql(request: pytest.FixtureRequest, server: Server, two_databases: tuple[str, str]) -> SQL:
    """Run SQL on the database that the repo is to use, past the repo; returns the rows."""
    used, _ = two_databases

    def run(statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return run_sql(server, used, statement, parameters)

    def run_boxed(statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        repo: type[Repo] = request.getfixturevalue("repo")
        with repo.detached(), repo.using(used), repo.connection() as connection:
            cursor = driver_of(connection).execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []

    callspec = getattr(request.node, "callspec", None)
    return run_boxed if callspec is not None and callspec.params.get("repo") == "sandboxed" else run
