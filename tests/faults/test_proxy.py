"""The proxy that the tests of faults put between a client and a server does what it says, and nothing else."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic
from typing import Any

import psycopg
import pytest

from shardrepo.testing.servers import Server

from ..conftest import await_, connections_of
from ..proxy import Proxy

pytestmark = pytest.mark.cache

NAME = "proxied"


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    """One of whose connections none is left."""
    with Proxy(server) as proxy:
        yield proxy
    await_(lambda: connections_of(server, NAME) == [])


def connect(server: Server, proxy: Proxy, **options: Any) -> psycopg.Connection[Any]:
    return server.connect(**{"host": proxy.host, "port": proxy.port, "application_name": NAME, **options})


def hears_nothing(client: socket.socket) -> bool:
    """Whether *client*, a socket, is still open and has nothing to read."""
    client.setblocking(False)
    try:
        client.recv(1)
    except BlockingIOError:
        return True
    return False


def test_it_passes_everything(server: Server, proxy: Proxy) -> None:
    """Statements and rows pass unchanged, many and large ones too, and what one side closes the other sees closed."""
    with connect(server, proxy) as one, connect(server, proxy) as other:
        for size in (1, 1 << 12, 1 << 22):
            text = "x" * size
            assert one.execute("SELECT %s", (text,)).fetchone() == (text,)
        assert len(connections_of(server, NAME)) == 2
        one.close()
        await_(lambda: len(connections_of(server, NAME)) == 1)
        with pytest.raises(psycopg.OperationalError, match="administrator command"):
            other.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    assert proxy.accepted == 2


def test_it_counts_who_has_just_connected(proxy: Proxy) -> None:
    """Every socket counts as soon as its connect has returned."""
    for count in range(1, 30):
        with socket.create_connection((proxy.host, proxy.port)):
            assert proxy.accepted == count


def test_a_cut_resets_and_refuses(server: Server, proxy: Proxy) -> None:
    """Live connections are reset, on both sides; new ones are refused; after that the same port answers again."""
    with connect(server, proxy) as connection, socket.create_connection((proxy.host, proxy.port)) as client:
        proxy.cut()
        with pytest.raises(psycopg.OperationalError, match=r"reset|closed"):
            connection.execute("SELECT 1")
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    await_(lambda: connections_of(server, NAME) == [])
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((proxy.host, proxy.port))
    assert proxy.accepted == 2
    proxy.restore()
    with connect(server, proxy) as connection:
        assert connection.execute("SELECT 1").fetchone() == (1,)
    assert proxy.accepted == 3


def test_a_cut_ends_a_statement_that_runs(server: Server, proxy: Proxy) -> None:
    """Whoever waits for an answer gets an error at once, and the server may have done it."""
    with connect(server, proxy) as connection, ThreadPoolExecutor(1) as pool:
        call = pool.submit(connection.execute, "SELECT pg_sleep(60)")
        await_(lambda: "PgSleep" in waits(server))
        proxy.cut()
        with pytest.raises(psycopg.OperationalError):
            call.result(30)
    server_side = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
    with server.connect() as connection:  # which notices that its client is gone only when it has an answer for it
        connection.execute(server_side, (NAME,))


def waits(server: Server) -> list[str]:
    """For what the connections through the proxy are waiting."""
    with server.connect() as connection:
        rows = connection.execute("SELECT wait_event FROM pg_stat_activity WHERE application_name = %s", (NAME,))
        return [event for (event,) in rows]


def test_new_connections_can_be_accepted_and_reset(server: Server, proxy: Proxy) -> None:
    """With `refuse=False` a connect succeeds and the connection is reset; live ones may be spared."""
    with connect(server, proxy) as connection:
        proxy.cut(live=False, refuse=False)
        with pytest.raises(psycopg.OperationalError, match=r"reset|closed"):
            connect(server, proxy)
        accepted = proxy.accepted
        assert accepted >= 2
        proxy.cut(live=False)
        with pytest.raises(psycopg.OperationalError, match="refused"):
            connect(server, proxy)
        assert proxy.accepted == accepted
        proxy.cut(live=False, refuse=False)
        with pytest.raises(ConnectionResetError), socket.create_connection((proxy.host, proxy.port)) as client:
            client.recv(1)
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_live_connections_alone_can_be_cut(server: Server, proxy: Proxy) -> None:
    """With `new=False` the live connections are reset, and the next one gets through."""
    with connect(server, proxy) as connection:
        proxy.cut(new=False)
        with connect(server, proxy) as another:
            assert another.execute("SELECT 1").fetchone() == (1,)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


def test_the_deaf_keep_everything_open(server: Server, proxy: Proxy) -> None:
    """Nothing passes, in either direction, not even an end; what was sent meanwhile arrives when it hears again."""
    with connect(server, proxy) as gone, connect(server, proxy) as kept, ThreadPoolExecutor(1) as pool:
        pid = kept.info.backend_pid
        proxy.deafen()
        gone.close()
        answer = pool.submit(kept.execute, "SELECT 1")
        with socket.create_connection((proxy.host, proxy.port)) as client:
            client.sendall(b"anybody there?")
            with server.connect() as beside:
                beside.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
            assert hears_nothing(client)
        assert not answer.done()
        assert len(connections_of(server, NAME)) == 1  # the one that has been closed, which the server cannot know
        assert proxy.accepted == 3
        proxy.restore()
        with pytest.raises(psycopg.OperationalError, match="administrator command"):
            answer.result(30)
        await_(lambda: connections_of(server, NAME) == [])


def test_new_connections_alone_can_be_deaf(server: Server, proxy: Proxy) -> None:
    """With `live=False` old connections work while new ones wait; a client that waits no longer goes elsewhere."""
    with connect(server, proxy) as connection:
        proxy.deafen(live=False)
        hosts, ports = f"{proxy.host},{server.host}", f"{proxy.port},{server.port}"
        with connect(server, proxy, host=hosts, port=ports, connect_timeout=2) as another:  # seconds, the least
            assert another.info.port == server.port
        assert proxy.accepted == 2
        assert connection.execute("SELECT 1").fetchone() == (1,)
        proxy.deafen(new=False)
        proxy.cut(new=False)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")


def test_it_can_be_slow(server: Server, proxy: Proxy) -> None:
    """A connect, or every piece of data, takes at least as long as was asked for."""
    proxy.slow(connect=0.2)
    begun = monotonic()
    with connect(server, proxy) as connection:
        assert monotonic() - begun >= 0.2
        proxy.slow(chunk=0.1)
        begun = monotonic()
        assert connection.execute("SELECT 1").fetchone() == (1,)
        assert monotonic() - begun >= 0.2  # there and back
        proxy.restore()


def test_a_server_that_is_not_there(servers: Any) -> None:
    """While its server is stopped, the proxy accepts and resets."""
    server = servers[2]
    with Proxy(server) as proxy:
        server.stop()
        try:
            with pytest.raises(psycopg.OperationalError, match=r"reset|closed"):
                connect(server, proxy)
        finally:
            server.start()
        with connect(server, proxy) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)


def is_here(address: str) -> bool:
    """Whether this machine has a loopback *address*: Linux has all of 127.0.0.0/8, and may be without IPv6."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
        return True


@pytest.mark.parametrize("second", [address for address in ("127.0.0.2", "::1") if is_here(address)])
def test_one_port_at_two_addresses(server: Server, proxy: Proxy, second: str) -> None:
    """Each address has a fate of its own: libpq goes on to the second when the first is dead."""
    with Proxy(server, second, proxy.port) as other:
        both = f"{proxy.host},{other.host}"
        proxy.cut()
        with connect(server, other, host=both) as connection:
            assert connection.info.host == second
        proxy.restore()
        other.deafen()
        with connect(server, proxy, host=both) as connection:
            assert connection.info.host == proxy.host
        assert (proxy.accepted, other.accepted) == (1, 1)


def test_it_ends_with_its_block(server: Server) -> None:
    """Every connection is closed, the port is free again, and no thread is left."""
    threads = threading.active_count()
    with ExitStack() as stack:
        with Proxy(server) as proxy:
            connection = stack.enter_context(connect(server, proxy))
            proxy.deafen()
            client = stack.enter_context(socket.create_connection((proxy.host, proxy.port)))
        assert threading.active_count() == threads
        assert client.recv(1) == b""
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((proxy.host, proxy.port))
        with Proxy(server, port=proxy.port) as successor, connect(server, successor) as again:
            assert again.execute("SELECT 1").fetchone() == (1,)
