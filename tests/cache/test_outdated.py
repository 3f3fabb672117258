"""Statements that were prepared before a column got another type, and errors that only look like it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from psycopg.errors import FeatureNotSupported, ReadOnlySqlTransaction
from sqlalchemy.exc import InternalError, NotSupportedError

from shardrepo import Repo
from shardrepo.testing.servers import Server, count_statements

from ..conftest import books_balance, run_sql
from ..models import Tag

pytestmark = pytest.mark.cache

# One that psycopg has the server prepare at the sixth time.
TIMES = 6


@pytest.fixture
def repo(make_repo: Callable[..., type[Repo]], database: str) -> type[Repo]:
    return make_repo(database)


def state(repo: type[Repo]) -> tuple[int, int]:
    """The process of the connection that is next, and how many statements it has prepared."""
    row = repo.execute("SELECT pg_backend_pid(), (SELECT count(*) FROM pg_prepared_statements)").one()
    return row[0], row[1]


def widen(server: Server, database: str) -> None:
    """Give a column another type that holds the same values."""
    run_sql(server, database, "ALTER TABLE tags ALTER id TYPE bigint")


def numbered(server: Server, database: str) -> list[tuple[Any, ...]]:
    return run_sql(server, database, "SELECT id, label FROM tags ORDER BY id")


@pytest.fixture
def at_once(repo: type[Repo]) -> Iterator[Callable[[Callable[[int], Any]], list[Any]]]:
    """Run something in four threads, each on a cached connection of its own."""
    barrier = threading.Barrier(4, timeout=30)

    def hold(work: Callable[[int], Any], number: int) -> Any:
        # Holds one connection until everybody does, so that four are idle afterwards.
        with repo.transaction():
            repo.count(Tag)
            barrier.wait()
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(4) as executor:
        yield lambda work: list(executor.map(lambda number: hold(work, number), range(4)))


def test_a_row_is_written_once(repo: type[Repo], server: Server, database: str) -> None:
    """An INSERT that returns a column of another type by now is repeated before anything of it was done."""
    for number in range(TIMES):
        repo.insert(Tag(label=f"{number}"))
    assert state(repo)[1] >= 1
    widen(server, database)
    assert repo.insert(Tag(label="after")).id == TIMES + 1
    assert numbered(server, database)[TIMES - 1 :] == [(TIMES, f"{TIMES - 1}"), (TIMES + 1, "after")]


def test_many_connections_of_many_threads(
    repo: type[Repo], server: Server, database: str, at_once: Callable[[Callable[[int], Any]], list[Any]]
) -> None:
    """Whoever has one of the others that were prepared before notices nothing either, while reading and writing."""

    def read(_: int) -> list[int]:
        return [repo.count(Tag) for _ in range(TIMES) if repo.all(Tag)]

    def write(number: int) -> list[int]:
        return [repo.insert(Tag(label=f"{number} {each}")).id for each in range(TIMES)]

    with ExitStack() as held:
        for number in range(4, 8):
            held.enter_context(repo.detached())
            held.enter_context(repo.transaction())
            write(number)
            read(number)
    assert repo.stats().idle == 4
    widen(server, database)
    assert at_once(read) == [[4 * TIMES] * TIMES] * 4
    written = [key for keys in at_once(write) for key in keys]
    assert len(set(written)) == 4 * TIMES
    assert len(numbered(server, database)) == 8 * TIMES
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


def test_other_databases_lose_nothing(
    repo: type[Repo], make_databases: Callable[..., list[str]], server: Server, database: str
) -> None:
    """Their connections stay open, and what is prepared on them stays prepared."""
    (other,) = make_databases(1)
    for _ in range(TIMES):
        repo.all(Tag)
    with repo.using(other):
        for _ in range(TIMES):
            repo.all(Tag)
        before = state(repo)
        assert before[1] >= 1
    widen(server, database)
    assert repo.all(Tag) == []
    with repo.using(other):
        assert state(repo) == before


def test_in_a_transaction_it_fails_once(repo: type[Repo], server: Server, database: str) -> None:
    """Also on the second connection that was prepared before; nothing of the failed one is kept."""
    with repo.transaction():
        for _ in range(TIMES):
            repo.all(Tag)
        with repo.detached(), repo.transaction():
            for _ in range(TIMES):
                repo.all(Tag)
    assert repo.stats().idle == 2
    widen(server, database)
    with pytest.raises(NotSupportedError) as caught, repo.transaction():
        repo.insert(Tag(label="lost"))
        repo.all(Tag)
    assert isinstance(caught.value.orig, FeatureNotSupported)
    with repo.transaction(), repo.detached(), repo.transaction():
        assert repo.all(Tag) == []
    assert repo.all(Tag) == []


UNSUPPORTED = "SELECT DISTINCT label FROM tags FOR UPDATE"


def test_what_is_not_supported_costs_nothing(repo: type[Repo], server: Server) -> None:
    """The same SQLSTATE of the caller's own making: asked once, and the connection stays as it is, prepared or not."""
    for _ in range(TIMES):
        repo.all(Tag)
    before = state(repo)
    assert before[1] >= 1
    with count_statements(server) as counted, pytest.raises(NotSupportedError):
        repo.execute(UNSUPPORTED)
    assert len([each for each in counted.statements if "DISTINCT" in each.sql]) == 1
    assert state(repo) == before


def test_what_has_committed_is_not_repeated(repo: type[Repo], server: Server, database: str) -> None:
    """A procedure may commit and then fail with that SQLSTATE: its caller is told, and it has run once."""
    run_sql(
        server,
        database,
        "CREATE PROCEDURE work() LANGUAGE plpgsql AS $$ BEGIN INSERT INTO tags (label) VALUES "
        "(gen_random_uuid()::text); COMMIT; RAISE feature_not_supported; END $$",
    )
    for _ in range(TIMES):
        repo.all(Tag)
    with pytest.raises(NotSupportedError):
        repo.execute("CALL work()")
    assert len(numbered(server, database)) == 1


@pytest.mark.parametrize("how", ["SQL", "option"])
def test_a_transaction_that_its_owner_made_read_only(repo: type[Repo], how: str) -> None:
    """Its write fails, and that says nothing of the server: no connection is closed for it."""
    with repo.transaction():
        other = state(repo)[0]
        with pytest.raises(InternalError) as caught, repo.detached(), repo.session() as session:
            if how == "SQL":
                session.connection().exec_driver_sql("SET TRANSACTION READ ONLY")
            else:
                session.connection(execution_options={"postgresql_readonly": True})
            session.add(Tag(label="refused"))
            session.commit()
    assert isinstance(caught.value.orig, ReadOnlySqlTransaction)
    assert state(repo)[0] == other
    assert (repo.stats().idle, repo.stats().closed) == (2, 0)
    assert repo.insert(Tag(label="written")).id is not None
