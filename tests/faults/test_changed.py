"""Databases that are dropped, made again and renamed; passwords that change; servers that are full or read-only."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from psycopg import pq
from psycopg.errors import ReadOnlySqlTransaction
from sqlalchemy.exc import DBAPIError, NotSupportedError, OperationalError

from shardrepo import AuthenticationError, Repo, ServerFullError, UnknownDatabaseError
from shardrepo.testing.servers import Server, Servers, count_statements, start_servers

from ..conftest import TEMPLATE, await_, await_connections, books_balance, connections_of, run_sql
from ..models import Tag

pytestmark = pytest.mark.cache


@pytest.fixture
def name(server: Server) -> Iterator[str]:
    """A database that a test may drop."""
    server.create_database("changing", template=TEMPLATE)
    yield "changing"
    for left in {"changing", "changed"} & set(server.databases()):
        server.drop_database(left)


@pytest.fixture
def role(server: Server) -> Iterator[str]:
    """A role whose password a test may change."""
    run_sql(server, "postgres", "CREATE ROLE guest LOGIN PASSWORD 'old'")
    yield "guest"
    run_sql(server, "postgres", "DROP ROLE guest")


def pid(repo: type[Repo]) -> int:
    found: int = repo.execute("SELECT pg_backend_pid()").scalar_one()
    return found


def failures(repo: type[Repo], until: type[Exception] | None = None) -> int:
    """How often a call fails before it works, or fails as it has to."""
    for failed in range(10):
        try:
            repo.count(Tag)
            assert until is None
            return failed
        except OperationalError as error:
            if until is not None and isinstance(error, until):
                return failed
    raise AssertionError


def test_a_database_that_is_dropped(make_repo: Callable[..., type[Repo]], server: Server, name: str) -> None:
    """One call fails at most, then it is unknown; nothing else is lost."""
    repo = make_repo("postgres", application_name="dropping")
    kept = pid(repo)
    with repo.using(name):
        pid(repo)
        run_sql(server, "postgres", f"DROP DATABASE {name} WITH (FORCE)")
        assert failures(repo, UnknownDatabaseError) <= 1
    assert pid(repo) == kept
    assert connections_of(server, "dropping") == [(kept, "postgres")]


def test_a_database_that_is_made_again(make_repo: Callable[..., type[Repo]], server: Server, name: str) -> None:
    """One call fails at most, then the new one answers: no row of the old one is seen."""
    repo = make_repo(name)
    repo.insert(Tag(label="old"))
    run_sql(server, "postgres", f"DROP DATABASE {name} WITH (FORCE)")
    server.create_database(name, template=TEMPLATE)
    assert failures(repo) <= 1
    assert repo.all(Tag) == []
    repo.insert(Tag(label="new"))
    assert [tag.label for tag in repo.all(Tag)] == ["new"]


def test_a_database_that_is_renamed(make_repo: Callable[..., type[Repo]], server: Server, name: str) -> None:
    """Once it is disconnected it can be; then the old name is unknown, and the new one has the rows."""
    repo = make_repo("postgres")
    with repo.using(name):
        repo.insert(Tag(label="moved"))
        repo.disconnect()
        await_connections(server, repo._router.databases.config.application_name, [])
        run_sql(server, "postgres", f"ALTER DATABASE {name} RENAME TO changed")
        with pytest.raises(UnknownDatabaseError):
            repo.count(Tag)
    with repo.using("changed"):
        assert [tag.label for tag in repo.all(Tag)] == ["moved"]


def test_a_password_that_is_asked_for(make_repo: Callable[..., type[Repo]], server: Server, role: str) -> None:
    """A callable is asked at each connect: what was open goes on, what is opened has the new one."""
    current = ["old"]
    repo = make_repo("postgres")
    with repo.using(username=role, password=lambda: current[0]):
        before = pid(repo)
        run_sql(server, "postgres", "ALTER ROLE guest PASSWORD 'new'")
        assert pid(repo) == before
        repo.disconnect()
        with pytest.raises(AuthenticationError):
            pid(repo)
        current[0] = "new"
        assert pid(repo) != before


def test_a_password_that_is_given(make_repo: Callable[..., type[Repo]], server: Server, role: str) -> None:
    """What was open goes on; a new connection needs the new password, and whoever has it gets one of its own."""
    repo = make_repo("postgres")
    with repo.using(username=role, password="old"):
        before = pid(repo)
        run_sql(server, "postgres", "ALTER ROLE guest PASSWORD 'new'")
        assert pid(repo) == before
    with repo.using(username=role, password="new"):
        assert pid(repo) != before
    with repo.using(username=role, password="old"):
        assert pid(repo) == before
        repo.disconnect()
        with pytest.raises(AuthenticationError):
            pid(repo)
    with repo.using(username=role, password="new"):
        pid(repo)


def test_a_full_server_costs_one_idle_connection(make_repo: Callable[..., type[Repo]], servers: Servers) -> None:
    """The connection that was used longest ago gives its place; other servers' are left alone."""
    with start_servers(1, max_connections=8) as mine:
        (small,) = mine
        names = [f"small{number}" for number in range(8)]
        small.create_databases(names)
        repo = make_repo("postgres", on=small, application_name="full")
        far = {"host": servers[0].host, "port": servers[0].port, "password": servers[0].password}
        with repo.using(far):
            far_pid = pid(repo)
        # Three places are kept for superusers, which this repo's role is: it takes them too.
        pids = {}
        for name in names:
            with repo.using(name):
                pids[name] = pid(repo)
        assert repo.stats().evictions == 0
        with repo.using("template1"):
            pid(repo)
        assert repo.stats().evictions == 1
        for name in names[1:]:
            with repo.using(name):
                assert pid(repo) == pids[name]
        with repo.using(far):
            assert pid(repo) == far_pid
        repo.disconnect_all()
        assert books_balance(repo)


def test_a_full_server_with_nothing_to_give(make_repo: Callable[..., type[Repo]]) -> None:
    """It is said; what is in use goes on, and nobody holds it against the server."""
    with start_servers(1, max_connections=8) as mine:
        (small,) = mine
        holders = []
        repo = make_repo("postgres", on=small)
        with repo.transaction():
            mine_pid = pid(repo)
            while True:
                try:
                    holders.append(small.connect())
                except Exception:
                    break
            with pytest.raises(ServerFullError) as caught, repo.using("template1"):
                pid(repo)
            assert caught.value.sqlstate == "53300"
            assert pid(repo) == mine_pid
            for holder in holders:
                holder.close()

            def is_served() -> bool:
                with repo.using("template1"):
                    try:
                        return bool(pid(repo))
                    except ServerFullError:
                        return False

            await_(is_served)


def test_a_server_that_turns_read_only(make_repo: Callable[..., type[Repo]], servers: Servers) -> None:
    """Writes fail and say where; reads go on; and when it can be written to again, it is."""
    with start_servers(1) as mine:
        (server,) = mine
        server.create_database("written")
        run_sql(server, "written", "CREATE TABLE tags (id serial PRIMARY KEY, label text)")
        repo = make_repo("written", on=server)
        repo.insert(Tag(label="before"))
        server.configure(default_transaction_read_only="on")
        before = pid(repo)
        with pytest.raises(DBAPIError) as caught:
            repo.insert(Tag(label="refused"))
        assert isinstance(caught.value.orig, ReadOnlySqlTransaction)
        assert f"database: {repo.get_database().home}" in caught.value.__notes__
        assert [tag.label for tag in repo.all(Tag)] == ["before"]
        # Whoever has taken over from the server is found by a new connection only.
        assert pid(repo) != before
        server.configure(default_transaction_read_only="off")
        await_(lambda: repo.execute("SHOW default_transaction_read_only").scalar_one() == "off")
        repo.insert(Tag(label="after"))
        assert repo.count(Tag) == 2


def prepared(repo: type[Repo], query: str) -> int:
    """Run a query until the server has prepared it; the connection's process."""
    for _ in range(8):
        repo.execute(query)
    assert repo.execute("SELECT count(*) FROM pg_prepared_statements").scalar_one() >= 1
    return pid(repo)


QUERIES = ["SELECT label FROM tags WHERE id = 1", "UPDATE tags SET id = id WHERE id = 1 RETURNING label"]


@pytest.mark.parametrize("query", QUERIES)
def test_a_column_whose_type_changes(
    make_repo: Callable[..., type[Repo]], server: Server, name: str, query: str
) -> None:
    """Outside a transaction nobody notices, on whichever connection."""
    repo = make_repo("postgres")
    elsewhere = prepared(repo, "SELECT 1 WHERE true")
    with repo.using(name):
        repo.insert(Tag(label="7"))
        with repo.transaction():
            pid(repo)
            with repo.detached():
                second = prepared(repo, query)
        assert prepared(repo, query) != second
        run_sql(server, name, "ALTER TABLE tags ALTER label TYPE int USING label::int")
        for _ in range(9):
            assert repo.execute(query).scalar_one() == 7
    assert pid(repo) == elsewhere


def test_a_column_whose_type_changes_for_a_transaction(
    make_repo: Callable[..., type[Repo]], server: Server, name: str
) -> None:
    """It fails once, as nothing in it can be repeated; the next one is served."""
    repo = make_repo(name)
    repo.insert(Tag(label="7"))
    prepared(repo, QUERIES[0])
    run_sql(server, name, "ALTER TABLE tags ALTER label TYPE int USING label::int")
    with pytest.raises(NotSupportedError), repo.transaction():
        repo.execute(QUERIES[0])
    with repo.transaction():
        assert repo.execute(QUERIES[0]).scalar_one() == 7


def test_what_is_not_supported_is_not_repeated(make_repo: Callable[..., type[Repo]], server: Server, name: str) -> None:
    """The same SQLSTATE of the caller's own making, on a connection on which nothing is prepared: asked once."""
    repo = make_repo(name)
    with count_statements(server) as counted, pytest.raises(NotSupportedError):
        repo.execute("SELECT DISTINCT label FROM tags FOR UPDATE")
    assert len([each for each in counted.statements if "DISTINCT" in each.sql]) == 1


# Before version 18, libpq does not tell that a server is full: a plain ConnectError, for which nothing is evicted.
if pq.version() < 180000:
    del test_a_full_server_costs_one_idle_connection, test_a_full_server_with_nothing_to_give
