"""A host with several addresses: each is tried, in order, and all of them have one timeout together."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest

from shardrepo import AuthenticationError, Repo, ServerUnavailableError
from shardrepo.testing.servers import Server

from ..conftest import books_balance
from ..models import Tag
from ..proxy import Proxy

pytestmark = pytest.mark.cache

HOST = "two.test"
SLACK = 1.0


@pytest.fixture
def one(server: Server) -> Iterator[Proxy]:
    with Proxy(server) as proxy:
        yield proxy


@pytest.fixture
def two(server: Server, one: Proxy) -> Iterator[Proxy]:
    """The same port at another address."""
    with Proxy(server, "127.0.0.2", one.port) as proxy:
        yield proxy


@pytest.fixture
def repo(
    make_repo: Callable[..., type[Repo]], server: Server, database: str, one: Proxy, monkeypatch: pytest.MonkeyPatch
) -> type[Repo]:
    """A repo whose host has both; no machine's own names are changed for it."""
    system = socket.getaddrinfo

    def look_up(host: Any, port: Any, *args: Any, **kwargs: Any) -> Any:
        hosts = ("127.0.0.1", "127.0.0.2") if host == HOST else (host,)
        return [found for each in hosts for found in system(each, port, *args, **kwargs)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return make_repo(url=server.url(database).set(host=HOST, port=one.port), connect_timeout=0.8)


def test_the_first_that_answers(repo: type[Repo], one: Proxy, two: Proxy) -> None:
    """The second is left alone, and the database is called by the host's name."""
    assert repo.count(Tag) == 0
    assert (one.accepted, two.accepted) == (1, 0)
    assert repo.get_database().host == HOST


@pytest.mark.parametrize("refuse", [True, False])
def test_the_first_is_down(repo: type[Repo], one: Proxy, two: Proxy, refuse: bool) -> None:
    """One that refuses costs no time, one that hangs its half of it."""
    one.cut() if refuse else one.deafen()
    begun = monotonic()
    assert repo.count(Tag) == 0
    least, most = (0, 0.4) if refuse else (0.4, 0.8)
    assert least <= monotonic() - begun < most
    assert two.accepted == 1
    assert repo.stats().failed == 0


def test_both_hang(repo: type[Repo], one: Proxy, two: Proxy) -> None:
    """The caller waits for `connect_timeout`, once, however many there are."""
    one.deafen()
    two.deafen()
    begun = monotonic()
    with pytest.raises(ServerUnavailableError, match=r"0\.8 s; before that: 127\.0\.0\.1: no answer") as caught:
        repo.count(Tag)
    assert 0.8 <= monotonic() - begun < 0.8 + SLACK
    assert caught.value.reason == "timeout"
    assert (one.accepted, two.accepted) == (1, 1)
    assert books_balance(repo)


def test_both_hang_longer_than_the_call_may_take(repo: type[Repo], one: Proxy, two: Proxy) -> None:
    """Its own time is divided likewise, and says nothing of the server."""
    one.deafen()
    two.deafen()
    begun = monotonic()
    with repo.call_options(timeout=0.3), pytest.raises(ServerUnavailableError) as caught:
        repo.count(Tag)
    assert 0.3 <= monotonic() - begun < 0.3 + SLACK
    assert caught.value.reason == "deadline"
    assert (one.accepted, two.accepted) == (1, 1)


def test_both_refuse(repo: type[Repo], one: Proxy, two: Proxy) -> None:
    """The error names both, and nobody tries either again for now."""
    one.cut()
    two.cut()
    with pytest.raises(ServerUnavailableError, match=r"(?s)127\.0\.0\.2.*127\.0\.0\.1") as caught:
        repo.count(Tag)
    assert caught.value.reason == "refused"
    with pytest.raises(ServerUnavailableError, match="is down"):
        repo.count(Tag)


def test_what_a_server_has_refused_is_refused(repo: type[Repo], one: Proxy, two: Proxy) -> None:
    """A wrong password is not tried at the next address too."""
    with repo.using(password="wrong"), pytest.raises(AuthenticationError):
        repo.count(Tag)
    assert one.accepted > 0
    assert two.accepted == 0


@pytest.mark.parametrize("host", ["no-such-host.invalid", f"{'x' * 64}.invalid"])
def test_a_host_without_an_address(make_repo: Callable[..., type[Repo]], database: str, host: str) -> None:
    """It is said, and nobody looks it up again for now: a name server that does not answer takes its time."""
    repo = make_repo(database)
    for reason in ("refused", "down"):
        with repo.using(host=host, password="x"), pytest.raises(ServerUnavailableError, match="no address") as caught:
            repo.count(Tag)
        assert caught.value.reason == reason
        assert host in str(caught.value)
    assert repo.count(Tag) == 0
