"""Servers that refuse, hang, are slow, stopped or silent: who waits, for how long, and who does not notice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import pytest
from psycopg import pq
from sqlalchemy.exc import OperationalError

from shardrepo import Repo, ServerUnavailableError
from shardrepo.testing.servers import Server, Servers, start_servers

from ..conftest import await_, await_connections, books_balance, connections_of
from ..proxy import Proxy

pytestmark = pytest.mark.cache

# What a busy machine may add to a wait; never a bound on speed.
SLACK = 1.0


def at(server: Server | Proxy, name: str, password: str) -> dict[str, Any]:
    return {"host": server.host, "port": server.port, "database": name, "password": password}


def ask(repo: type[Repo], place: dict[str, Any]) -> int:
    with repo.using(place):
        pid: int = repo.execute("SELECT pg_backend_pid()").scalar_one()
        return pid


def is_back(repo: type[Repo], place: dict[str, Any]) -> bool:
    try:
        return bool(ask(repo, place))
    except ServerUnavailableError:
        return False


def test_a_server_that_refuses(
    make_repo: Callable[..., type[Repo]], servers: Servers, make_databases: Callable[..., list[str]], proxy: Proxy
) -> None:
    """One caller is refused; the next fail without a socket, at no other's cost; then it is back by itself."""
    server, other = servers[:2]
    down, warm = (at(proxy, name, server.password) for name in make_databases(2))
    far = at(other, make_databases(1, on=other)[0], other.password)
    repo = make_repo("postgres", pool_size=3)
    warm_pid, far_pid = ask(repo, warm), ask(repo, far)
    accepted = proxy.accepted
    proxy.cut(live=False)
    with pytest.raises(ServerUnavailableError) as caught:
        ask(repo, down)
    assert caught.value.reason == "refused"
    attempts = repo.stats().attempts
    for _ in range(5):
        with pytest.raises(ServerUnavailableError, match="is down, and nobody but a probe tries it") as caught:
            ask(repo, down)
        assert caught.value.reason == "down"
    assert 0 <= caught.value.retry_after <= 0.1
    assert "refused" in str(caught.value)
    assert repo.stats().attempts == attempts
    # Neither the other server's connection nor the one that this server still has was closed for them.
    assert (ask(repo, warm), ask(repo, far)) == (warm_pid, far_pid)
    proxy.restore()
    await_(lambda: is_back(repo, down))
    assert proxy.accepted == accepted + 1
    assert books_balance(repo)


def test_probes_are_few(make_repo: Callable[..., type[Repo]], proxy: Proxy, database: str, server: Server) -> None:
    """Eight threads that ask without a pause for a second: one connect at a time, ever more rarely."""
    repo = make_repo("postgres")
    place = at(proxy, database, server.password)
    reasons: list[str] = []

    def hammer() -> None:
        until = monotonic() + 1
        while monotonic() < until:
            with pytest.raises(ServerUnavailableError) as caught:
                ask(repo, place)
            reasons.append(caught.value.reason)

    proxy.cut()
    with ThreadPoolExecutor(8) as executor:
        for call in [executor.submit(hammer) for _ in range(8)]:
            call.result()
    # At 0, and after 0.1, 0.2 and 0.4 s more; a refused connect is fast, so that none of the eight began beside it.
    assert reasons.count("refused") <= 8
    assert reasons.count("down") > 100
    assert set(reasons) == {"refused", "down"}


@pytest.mark.parametrize("seconds", [0.3, 1, 2.9])
def test_a_connect_that_hangs(
    make_repo: Callable[..., type[Repo]],
    servers: Servers,
    make_databases: Callable[..., list[str]],
    proxy: Proxy,
    seconds: float,
) -> None:
    """Its caller waits for exactly `connect_timeout`; others, on that server too, do not wait for it."""
    server, other = servers[:2]
    hanging, warm = (at(proxy, name, server.password) for name in make_databases(2))
    cold = [at(other, name, other.password) for name in make_databases(3, on=other)]
    repo = make_repo("postgres", connect_timeout=seconds)
    ask(repo, warm)
    proxy.deafen(live=False)
    with ThreadPoolExecutor(1) as executor:
        begun = monotonic()
        call = executor.submit(ask, repo, hanging)
        await_(lambda: repo.stats().connecting == 1)
        for place in (warm, *cold):
            ask(repo, place)
        assert not call.done()
        with pytest.raises(ServerUnavailableError, match=f"no answer within connect_timeout={seconds}") as caught:
            call.result(30)
        assert seconds <= monotonic() - begun < seconds + SLACK
    assert caught.value.reason == "timeout"
    assert (repo.stats().connecting, repo.stats().failed) == (0, 1)


def test_three_that_time_out_are_enough(
    make_repo: Callable[..., type[Repo]], proxy: Proxy, database: str, server: Server
) -> None:
    """From then on callers fail at once, until a probe is answered."""
    repo = make_repo("postgres", connect_timeout=0.1)
    place = at(proxy, database, server.password)
    proxy.deafen()
    reasons = []
    for _ in range(4):
        with pytest.raises(ServerUnavailableError) as caught:
            ask(repo, place)
        reasons.append(caught.value.reason)
    assert reasons == ["timeout", "timeout", "timeout", "down"]
    proxy.restore()
    await_(lambda: is_back(repo, place))


def test_a_slow_server_holds_up_nobody_elsewhere(
    make_repo: Callable[..., type[Repo]], servers: Servers, make_databases: Callable[..., list[str]], proxy: Proxy
) -> None:
    """While callers wait for a server that takes two seconds to connect, cold databases of others are served."""
    server, other = servers[:2]
    slow = [at(proxy, name, server.password) for name in make_databases(3)]
    cold = [at(other, name, other.password) for name in make_databases(6, on=other)]
    repo = make_repo("postgres", pool_size=4, max_connections=8)
    proxy.slow(connect=2)
    begun = monotonic()
    with ThreadPoolExecutor(3) as executor:
        calls = [executor.submit(ask, repo, place) for place in slow]
        await_(lambda: repo.stats().connecting == 3)
        for place in cold:
            ask(repo, place)
        assert not any(call.done() for call in calls)
        assert monotonic() - begun < 2
        for call in calls:
            call.result(30)
    assert repo.stats().failed == 0


def test_a_server_that_is_stopped_and_started(
    make_repo: Callable[..., type[Repo]], servers: Servers, make_databases: Callable[..., list[str]]
) -> None:
    """Its callers fail, those of other servers do not, and it is back with no restart of anything."""
    with start_servers(1) as mine:
        (server,) = mine
        server.create_database("mine")
        other = servers[1]
        far = at(other, make_databases(1, on=other)[0], other.password)
        here = at(server, "mine", server.password)
        repo = make_repo("postgres", application_name="stopped")
        ask(repo, here)
        far_pid = ask(repo, far)
        working, errors, stop = threading.Event(), [], threading.Event()

        def work() -> None:
            while not stop.is_set():
                try:
                    assert ask(repo, far) == far_pid
                except Exception as error:
                    errors.append(error)
                working.set()

        with ThreadPoolExecutor(1) as executor:
            call = executor.submit(work)
            assert working.wait(30)
            server.stop()
            with pytest.raises(OperationalError):
                ask(repo, here)
            with pytest.raises(ServerUnavailableError):
                ask(repo, here)
            with pytest.raises(ServerUnavailableError) as caught:
                ask(repo, here)
            assert caught.value.reason in ("down", "refused")
            server.start()
            await_(lambda: is_back(repo, here))
            stop.set()
            call.result(30)
        assert errors == []
        assert len(connections_of(server, "stopped")) == 1
        repo.disconnect_all()
        await_connections(server, "stopped", [])


def test_a_server_that_lets_nobody_in_yet(make_repo: Callable[..., type[Repo]]) -> None:
    """One that starts up or shuts down says so: it counts as down from the first time, what is open goes on."""
    with start_servers(1) as (server,):
        repo = make_repo("postgres", on=server)
        with repo.transaction():
            pid = repo.execute("SELECT pg_backend_pid()").scalar_one()
            assert server.process_id is not None
            os.kill(server.process_id, signal.SIGTERM)  # it ends when its last client has gone
            await_(lambda: "stopping" in (server.data_directory / "postmaster.pid").read_text())
            with repo.using("template1"):
                for reason in ("starting", "down"):
                    with pytest.raises(ServerUnavailableError, match="shutting down") as caught:
                        repo.execute("SELECT 1")
                    assert caught.value.reason == reason
            assert repo.execute("SELECT pg_backend_pid()").scalar_one() == pid
        repo.disconnect_all()
        await_(lambda: not server.running)
        server.start()
        await_(lambda: is_back(repo, at(server, "postgres", server.password)))


# Before version 18, libpq does not tell that a server lets nobody in yet: a plain ConnectError.
if pq.version() < 180000:
    del test_a_server_that_lets_nobody_in_yet
