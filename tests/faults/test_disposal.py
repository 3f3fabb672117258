"""Ends that come while there is work: of a repo, of a database, of another repo beside it; and a clock that is set."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import psycopg
import pytest
from sqlalchemy.exc import OperationalError

from shardrepo import CheckoutTimeoutError, Repo, RepoDisposedError, engines
from shardrepo.testing.servers import Server

from ..conftest import TEMPLATE, await_, await_connections, books_balance, connections_of, run_sql
from ..models import Tag

pytestmark = pytest.mark.cache

HOUR = 3600


@pytest.fixture(scope="module")
def many(server: Server) -> Iterator[list[str]]:
    """Databases that the tests of this module use one after the other."""
    names = [f"ending{number}" for number in range(5)]
    server.create_databases(names, template=TEMPLATE)
    yield names
    for name in names:
        server.drop_database(name)


@pytest.fixture
def role(server: Server) -> Iterator[str]:
    """Another user, whose password is its name."""
    run_sql(server, "postgres", "CREATE ROLE guest LOGIN PASSWORD 'guest' IN ROLE pg_read_all_data")
    yield "guest"
    run_sql(server, "postgres", "DROP ROLE guest")


def pid(repo: type[Repo], name: str) -> int:
    """The server's process that answers for database *name*."""
    with repo.using(name):
        found: int = repo.execute("SELECT pg_backend_pid()").scalar_one()
        return found


@contextmanager
def held_up(server: Server, name: str) -> Iterator[None]:
    """Hold everybody up, for the block, who asks database *name* for the advisory lock 1."""
    with server.connect(name) as connection:
        connection.execute("SELECT pg_advisory_lock(1)")
        yield


def waiting(server: Server, application_name: str) -> int:
    """How many connections of an application wait for a lock."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s AND wait_event_type = 'Lock'"
    return int(run_sql(server, "postgres", sql, (application_name,))[0][0])


# Dispose


def test_dispose_with_verbs_under_way(make_repo: Callable[..., type[Repo]], server: Server, many: list[str]) -> None:
    """Verbs that run when their repo is disposed end well and keep what they wrote; the next ones are refused."""
    repo = make_repo(application_name="disposed")
    for name in many:
        pid(repo, name)

    def write(name: str) -> str:
        with repo.using(name):
            label: str = repo.execute(
                "INSERT INTO tags (label) SELECT 'written ' || count(pg_advisory_xact_lock(1)) RETURNING label"
            ).scalar_one()
            return label

    with ThreadPoolExecutor(3) as pool:
        with held_up(server, many[0]), held_up(server, many[1]), held_up(server, many[2]):
            calls = [pool.submit(write, name) for name in many[:3]]
            await_(lambda: waiting(server, "disposed") == 3)
            repo.dispose()
            await_connections(server, "disposed", many[:3])
            for name in many:
                with pytest.raises(RepoDisposedError, match="this repo was disposed"):
                    pid(repo, name)
            assert not any(call.done() for call in calls)
        assert [call.result(30) for call in calls] == ["written 1"] * 3
    await_connections(server, "disposed", [])
    for name in many[:3]:
        assert run_sql(server, name, "DELETE FROM tags RETURNING label") == [("written 1",)]
    stats = repo.stats()
    assert (stats.idle, stats.in_use, books_balance(repo)) == (0, 0, True)


def test_dispose_inside_a_transaction(make_repo: Callable[..., type[Repo]], server: Server, many: list[str]) -> None:
    """A transaction goes on to its commit; beside it nothing is opened, and nothing of it is kept afterwards."""
    repo = make_repo(many[0], application_name="disposed")
    with repo.transaction():
        repo.insert(Tag(label="before"))
        repo.dispose()
        repo.insert(Tag(label="after"))
        with repo.savepoint():
            assert repo.count(Tag) == 2
        with repo.detached(), pytest.raises(RepoDisposedError):
            repo.count(Tag)
    await_connections(server, "disposed", [])
    assert run_sql(server, many[0], "DELETE FROM tags RETURNING label") == [("before",), ("after",)]
    with pytest.raises(RepoDisposedError):
        repo.ping()


def test_dispose_while_somebody_waits(make_repo: Callable[..., type[Repo]], server: Server, many: list[str]) -> None:
    """Whoever waits for a bound is refused as soon as there would be room, not at its deadline."""
    repo = make_repo(many[0], application_name="disposed", max_connections=1, checkout_timeout=HOUR)
    with ThreadPoolExecutor(2) as pool:
        with repo.transaction():
            repo.count(Tag)
            calls = [pool.submit(pid, repo, name) for name in many[:2]]
            await_(lambda: repo.stats().waiting == 2)
            repo.dispose()
        for call in calls:
            with pytest.raises(RepoDisposedError):
                call.result(30)
    assert (repo.stats().waiting, books_balance(repo)) == (0, True)
    await_connections(server, "disposed", [])


def test_dispose_while_somebody_connects(make_repo: Callable[..., type[Repo]], server: Server, many: list[str]) -> None:
    """A connection that is being opened meanwhile serves its caller, and is closed when it is returned."""
    asked, disposed = threading.Event(), threading.Event()

    def password() -> str:
        asked.set()
        assert disposed.wait(30)
        return server.password

    repo = make_repo(application_name="disposed")
    with ThreadPoolExecutor(1) as pool, repo.using(database=many[0], password=password):
        call = pool.submit(repo.carry(lambda: repo.count(Tag)))
        assert asked.wait(30)
        assert repo.stats().connecting == 1
        repo.dispose()
        disposed.set()
        assert call.result(30) == 0
        with pytest.raises(RepoDisposedError):
            repo.count(Tag)
    await_connections(server, "disposed", [])
    assert books_balance(repo)


def test_dispose_under_load(make_repo: Callable[..., type[Repo]], server: Server, many: list[str]) -> None:
    """Threads that never pause see their own database or that the repo is disposed, and no connection stays."""
    turns = threading.Semaphore(0)
    repo = make_repo(application_name="disposed", pool_size=3)

    def work(thread: int) -> int:
        for turn in range(10_000):
            name = many[(thread + turn) % len(many)]
            try:
                with repo.using(name), repo.transaction():
                    assert repo.execute("SELECT current_database()").scalar_one() == name
                turns.release()
            except RepoDisposedError:
                return turn
        raise AssertionError("never disposed")

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(work, thread) for thread in range(4)]
        for _ in range(50):
            assert turns.acquire(timeout=30)
        repo.dispose()
        assert sum(call.result(30) for call in calls) >= 50
    stats = repo.stats()
    assert (stats.idle, stats.in_use, stats.connecting, stats.closing) == (0, 0, 0, 0)
    assert books_balance(repo)
    await_connections(server, "disposed", [])


# Two repos


def test_two_repos_on_one_server(make_repo: Callable[..., type[Repo]], server: Server, many: list[str]) -> None:
    """Each has its own target and its own choice; what one lets go of, or bounds, is nothing to the other."""
    small = make_repo(many[0], pool_size=2, max_connections=2, checkout_timeout=0.05, application_name="small")
    large = make_repo(many[1], pool_size=4, application_name="large")
    for name in many:
        assert pid(small, name) != pid(large, name)
    await_connections(server, "small", many[-2:])
    kept = await_connections(server, "large", many[-4:])

    small.set_database(many[4])
    assert large.get_database().name == many[1]
    with large.using(many[2]), small.transaction():
        assert small.get_database().name == many[4]
        assert not large.in_transaction()
        with small.using(many[3]), small.transaction():
            small.count(Tag)
            assert pid(large, many[4]) in kept
            with small.using(many[0]), pytest.raises(CheckoutTimeoutError):
                small.count(Tag)
    small.set_database(None)

    small.disconnect_all()
    await_connections(server, "small", [])
    pid(small, many[4])
    small.disconnect(many[4])
    small.dispose()
    await_connections(server, "small", [])
    assert await_connections(server, "large", many[-4:]) == kept
    assert [pid(large, name) in kept for name in many[-4:]] == [True] * 4
    assert large.stats().evictions == 1


# Databases that are dropped


def test_only_the_cache_keeps_a_database(
    make_repo: Callable[..., type[Repo]], server: Server, make_databases: Callable[..., list[str]], many: list[str]
) -> None:
    """DROP DATABASE waits in vain for idle connections; after `disconnect`, which leaves all others, it succeeds."""
    (doomed,) = make_databases()
    repo = make_repo(application_name="dropping")
    others = [pid(repo, name) for name in many]
    with repo.using(doomed), repo.transaction():
        pids = {pid(repo, doomed)}
        with repo.detached():
            pids.add(pid(repo, doomed))
    assert len(pids) == 2
    with server.connect(options="-c statement_timeout=100") as connection:
        with pytest.raises((psycopg.errors.QueryCanceled, psycopg.errors.ObjectInUse)):
            connection.execute(f"DROP DATABASE {doomed}".encode())
    repo.disconnect(doomed)
    server.drop_database(doomed, force=False)
    assert [pid(repo, name) for name in many] == others
    with pytest.raises(OperationalError, match="does not exist"):
        pid(repo, doomed)
    server.create_database(doomed, template=TEMPLATE)
    assert pid(repo, doomed) not in pids
    assert books_balance(repo)


def test_disconnect_closes_the_connections_of_every_user(
    make_repo: Callable[..., type[Repo]], server: Server, many: list[str], role: str
) -> None:
    """Whoever disconnects a database, nobody's idle connections to it stay, nor those in use when they come back."""
    repo = make_repo(many[0], application_name="everybody")
    guest = {"database": many[0], "username": role, "password": role}
    for name in many[:2]:
        pid(repo, name)
    with repo.using(guest):
        repo.count(Tag)
        await_connections(server, "everybody", [many[0], many[0], many[1]])
        repo.disconnect()
        await_connections(server, "everybody", [many[1]])
        with repo.transaction():
            repo.count(Tag)
            repo.disconnect(many[0])
            await_connections(server, "everybody", [many[0], many[1]])
    await_connections(server, "everybody", [many[1]])
    assert books_balance(repo)


def test_disconnect_after_sqlalchemys_dispose(
    make_repo: Callable[..., type[Repo]], server: Server, many: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is opened after an engine was disposed is closed too, even when nobody holds that engine any more."""
    monkeypatch.setattr(engines, "MAX_ENGINES", 1)
    repo = make_repo(many[0], application_name="again")
    repo.engine().dispose()
    for name in (many[0], many[1]):
        pid(repo, name)
    gc.collect()
    repo.disconnect(many[0])
    await_connections(server, "again", [many[1]])


def test_a_database_in_use_can_be_dropped_when_it_is_returned(
    make_repo: Callable[..., type[Repo]], server: Server, make_databases: Callable[..., list[str]]
) -> None:
    """`disconnect` while a verb runs lets a DROP DATABASE that is already waiting through as soon as it has ended."""
    (doomed,) = make_databases()
    repo = make_repo(doomed, application_name="dropping")
    with ThreadPoolExecutor(2) as pool:
        with held_up(server, doomed):
            call: Future[object] = pool.submit(repo.execute, "SELECT pg_advisory_lock(1)")
            await_(lambda: waiting(server, "dropping") == 1)
            repo.disconnect()
        call.result(30)
        server.drop_database(doomed, force=False)
    assert connections_of(server, "dropping") == []
    server.create_database(doomed, template=TEMPLATE)


# Clocks


@pytest.mark.parametrize("change", [HOUR, -HOUR])
def test_a_clock_that_is_set(
    make_repo: Callable[..., type[Repo]],
    server: Server,
    many: list[str],
    monkeypatch: pytest.MonkeyPatch,
    change: float,
) -> None:
    """No connection is closed or opened because the wall clock was set, whether forward or back."""
    repo = make_repo(pool_size=4, application_name="clock")
    pids = [pid(repo, name) for name in many[:4]]
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() + change)
    assert [pid(repo, name) for name in many[:4] * 2] == pids * 2
    pids.append(pid(repo, many[4]))  # in the place of the first
    assert [pid(repo, name) for name in many[1:] * 2] == pids[1:] * 2
    monkeypatch.undo()
    assert [pid(repo, name) for name in many[1:] * 2] == pids[1:] * 2
    assert await_connections(server, "clock", many[1:]) == sorted(pids[1:])
    assert (repo.stats().attempts, repo.stats().evictions) == (5, 1)


def test_a_clock_that_is_set_after_a_connection_was_lost(
    make_repo: Callable[..., type[Repo]], many: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that was opened after another one broke is kept, although the clock says that it is older."""
    repo = make_repo(many[0])
    with pytest.raises(OperationalError):
        repo.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    true = time.time
    monkeypatch.setattr(time, "time", lambda: true() - HOUR)
    assert len({pid(repo, many[0]) for _ in range(3)}) == 1
    assert (repo.stats().idle, repo.stats().attempts) == (1, 2)


def test_what_was_idle_when_a_connection_was_lost(make_repo: Callable[..., type[Repo]], many: list[str]) -> None:
    """A connection that takes the place of one that is not trusted any more is like any other: counted, and reused."""
    repo = make_repo(many[0])
    with repo.transaction():
        repo.count(Tag)
        with repo.detached():
            pid(repo, many[0])
    with pytest.raises(OperationalError):
        repo.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert pid(repo, many[0]) == pid(repo, many[0])
    assert books_balance(repo)
