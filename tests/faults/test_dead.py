"""Connections that die or grow old: who notices, and who does not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from shardrepo import Repo, ServerUnavailableError
from shardrepo.testing.servers import Server, Servers

from ..conftest import await_, await_connections, books_balance, connections_of, run_sql
from ..models import Tag
from ..proxy import Proxy

pytestmark = pytest.mark.cache


def at(server: Server | Proxy, name: str, password: str | None = None) -> dict[str, Any]:
    return {"host": server.host, "port": server.port, "database": name, "password": password or server.password}


def pid(repo: type[Repo]) -> int:
    found: int = repo.execute("SELECT pg_backend_pid()").scalar_one()
    return found


# How many of the statements that sleep for a minute are at it.
IN_FLIGHT = "SELECT count(*) FROM pg_stat_activity WHERE state = 'active' AND query LIKE '%pg_sleep(60)'"


def kill(server: Server, pids: Sequence[int]) -> None:
    """End server processes, and wait until they are gone."""
    gone = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
    run_sql(server, "postgres", "SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) pid", (list(pids),))
    await_(lambda: run_sql(server, "postgres", gone, (list(pids),)) == [(0,)])


def await_suspect(repo: type[Repo]) -> None:
    """Wait until what is idle has been so for longer than `check_after`."""
    (entry,) = repo._router.cache.ledger._idle
    await_(lambda: monotonic() - entry.since > 0.001)


def open_connections(repo: type[Repo], count: int) -> list[int]:
    """Open so many connections to the current database at once, and return them."""
    ready = threading.Barrier(count)

    def hold() -> int:
        with repo.transaction():
            ready.wait(30)
            return pid(repo)

    with ThreadPoolExecutor(count) as executor:
        return [call.result() for call in [executor.submit(repo.carry(hold)) for _ in range(count)]]


def test_killed_while_idle(
    make_repo: Callable[..., type[Repo]], servers: Servers, make_databases: Callable[..., list[str]]
) -> None:
    """One call fails. Its siblings are closed, the others of the server tested first; other servers have no part."""
    server, other_server = servers[:2]
    names, (far,) = make_databases(3), make_databases(1, on=other_server)
    repo = make_repo(names[0], application_name="killed")
    open_connections(repo, 3)
    kept = {}
    for name in names[1:]:
        with repo.using(name):
            kept[name] = pid(repo)
    with repo.using(at(other_server, far)):
        far_pid = pid(repo)
    # All to the first database, and one of the others, which will be found when it is tested.
    killed = [found for found, name in connections_of(server, "killed") if name in names[:2]]
    kill(server, killed)
    with pytest.raises(OperationalError) as caught:
        repo.count(Tag)
    assert f"database: {repo.get_database().home}" in caught.value.__notes__
    assert connections_of(server, "killed") == [(kept[names[2]], names[2])]
    assert repo.count(Tag) == 0
    with repo.using(names[1]):
        assert pid(repo) not in killed
    with repo.using(names[2]):
        assert pid(repo) == kept[names[2]]
    with repo.using(at(other_server, far)):
        assert pid(repo) == far_pid
    assert books_balance(repo)


def test_a_suspect_is_tested_once(
    make_repo: Callable[..., type[Repo]], server: Server, make_databases: Callable[..., list[str]]
) -> None:
    """What has proved to be alive is not asked again."""
    names = make_databases(2)
    repo = make_repo(names[0])
    with repo.using(names[1]):
        pid(repo)
    kill(server, [pid(repo)])
    with pytest.raises(OperationalError):
        pid(repo)
    with repo.using(names[1]):
        (entry,) = [entry for entry in repo._router.cache.ledger._idle if entry.suspect]
        pid(repo)
    assert not entry.suspect


@pytest.mark.parametrize("statement", ["SELECT pg_sleep(30)", "INSERT INTO tags (label) SELECT 'x' FROM pg_sleep(30)"])
def test_killed_while_in_use(
    make_repo: Callable[..., type[Repo]], server: Server, database: str, statement: str
) -> None:
    """The call that it was busy with fails, nothing of it is kept, and the next one is served."""
    repo = make_repo(database, application_name="busy")
    busy = "SELECT pid FROM pg_stat_activity WHERE application_name = 'busy' AND state = 'active'"
    with ThreadPoolExecutor(1) as executor:
        call = executor.submit(repo.execute, statement)
        await_(lambda: run_sql(server, "postgres", busy) != [])
        kill(server, [found for (found,) in run_sql(server, "postgres", busy)])
        with pytest.raises(OperationalError):
            call.result(30)
    assert repo.count(Tag) == 0
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


def test_killed_in_a_transaction(make_repo: Callable[..., type[Repo]], server: Server, database: str) -> None:
    """Nothing of it is kept; it cannot go on by mistake on another connection; the next one is served."""
    repo = make_repo(database)
    with pytest.raises(OperationalError):
        with repo.transaction():
            repo.insert(Tag(label="lost"))
            kill(server, [pid(repo)])
            repo.insert(Tag(label="never sent"))
    with repo.transaction():
        repo.insert(Tag(label="kept"))
    assert [tag.label for tag in repo.all(Tag)] == ["kept"]


def test_all_of_a_server_killed_at_once(
    make_repo: Callable[..., type[Repo]], servers: Servers, make_databases: Callable[..., list[str]]
) -> None:
    """On one of two servers each request in flight fails, once; who is between two requests may fail once; on the
    other server nobody notices."""
    places = [(server, name) for server in servers[:2] for name in make_databases(4, on=server)]
    repo = make_repo("postgres", application_name="massacre", pool_size=16)
    rounds, failed, killed, done = [0] * 8, [0] * 8, threading.Event(), threading.Event()

    def work(number: int) -> None:
        server, name = places[number]
        with repo.using(at(server, name)):
            while not done.is_set():
                seconds = 60 if number < 2 and not killed.is_set() else 0.002
                try:
                    assert repo.execute(f"SELECT current_database() || pg_sleep({seconds})").scalar_one() == name
                except OperationalError:
                    failed[number] += 1
                rounds[number] += 1

    with ThreadPoolExecutor(8) as executor:
        calls = [executor.submit(work, number) for number in range(8)]
        try:
            await_(lambda: len(connections_of(servers[0], "massacre")) == 4 and all(rounds[2:]))
            await_(lambda: run_sql(servers[0], "postgres", IN_FLIGHT) == [(2,)])
            killed.set()
            kill(servers[0], [found for found, _ in connections_of(servers[0], "massacre")])
            before = list(rounds)
            await_(lambda: all(now >= then + 5 for now, then in zip(rounds, before, strict=True)))
        finally:
            killed.set()
            done.set()
        for call in calls:
            call.result(60)
    assert failed[:2] == [1, 1]
    assert max(failed[2:4]) <= 1
    assert failed[4:] == [0] * 4
    assert books_balance(repo)


def test_what_was_idle_for_long_is_tested_before_use(
    make_repo: Callable[..., type[Repo]], server: Server, database: str
) -> None:
    """A connection that died unnoticed is replaced, and nobody sees an error."""
    repo = make_repo(database, check_after=0.001)
    before = pid(repo)
    kill(server, [before])
    await_suspect(repo)
    assert pid(repo) != before


def test_a_test_is_one_round_trip(make_repo: Callable[..., type[Repo]], server: Server, database: str) -> None:
    """A connection that is alive is used, after an empty question."""
    repo = make_repo(database, check_after=0.001)
    with Proxy(server) as proxy, repo.using(at(proxy, database, server.password)):
        before = pid(repo)
        await_suspect(repo)
        assert pid(repo) == before
        assert proxy.accepted == 1


def test_a_test_that_is_not_answered(make_repo: Callable[..., type[Repo]], server: Server, database: str) -> None:
    """Its caller is told after `connect_timeout`; the connection is closed, and service is back with the network."""
    repo = make_repo(database, check_after=0.001, connect_timeout=0.3)
    with Proxy(server) as proxy, repo.using(at(proxy, database, server.password)):
        before = pid(repo)
        await_suspect(repo)
        proxy.deafen()
        with pytest.raises(ServerUnavailableError, match="no sign of life") as caught:
            pid(repo)
        assert caught.value.reason == "timeout"
        assert (repo.stats().in_use, repo.stats().idle) == (0, 0)
        proxy.restore()
        assert pid(repo) != before


def test_what_nobody_uses_is_closed(make_repo: Callable[..., type[Repo]], server: Server, database: str) -> None:
    """After `idle_timeout`, on the server too; what is in use stays."""
    repo = make_repo(database, application_name="unused", idle_timeout=0.2)
    with repo.transaction():
        held = pid(repo)
        with repo.detached():
            pid(repo)
        assert await_connections(server, "unused", [database]) == [held]
    await_connections(server, "unused", [])


def test_what_is_old_is_closed(make_repo: Callable[..., type[Repo]], server: Server, database: str) -> None:
    """After `max_lifetime`: an idle one by itself, one in use when it is returned."""
    repo = make_repo(database, application_name="old", max_lifetime=0.3)
    with repo.transaction():
        held = pid(repo)
        with repo.detached():
            pid(repo)
        assert await_connections(server, "old", [database]) == [held]
        await_(lambda: repo._router.cache.ledger.loans()[0][1] > 0.3)
    await_connections(server, "old", [])
    assert repo.stats().closed == 2


def test_many_databases_keep_their_ages(
    make_repo: Callable[..., type[Repo]], server: Server, make_databases: Callable[..., list[str]]
) -> None:
    """Connections that were opened together do not all end together."""
    names = make_databases(8)
    repo = make_repo(names[0], max_lifetime=100)
    for name in names:
        with repo.using(name):
            pid(repo)
    ends = [entry.expires - entry.connection.opened_at for entry in repo._router.cache.ledger._idle]
    assert 90 <= min(ends) < max(ends) <= 100.1
    assert len(set(ends)) == 8
