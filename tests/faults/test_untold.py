"""Where libpq cannot show why a server refused, as everywhere but on Linux: the server is asked elsewhere."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from typing import Any

import pytest

from shardrepo import ConnectError, Repo, UnknownDatabaseError
from shardrepo.testing.servers import Server

from ..conftest import books_balance, run_sql
from ..models import Tag
from ..proxy import Proxy

pytestmark = pytest.mark.cache

_numbers = count()


@pytest.fixture(autouse=True)
def _no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """What libpq writes a trace into is Linux's own."""
    monkeypatch.delattr(os, "memfd_create", raising=False)


@pytest.fixture
def repo(make_repo: Callable[..., type[Repo]], database: str, proxy: Proxy) -> type[Repo]:
    return make_repo(database, on=proxy, application_name="untold")


def absent() -> str:
    """A name that no database has, nor was asked for before."""
    return f"absent_{next(_numbers)}"


def test_a_database_that_does_not_exist(repo: type[Repo], proxy: Proxy) -> None:
    """The server says so in its maintenance database, and is not asked again for some seconds."""
    assert repo.count(Tag) == 0
    with repo.using(absent()):
        for sockets in (3, 1):
            accepted = proxy.accepted
            with pytest.raises(UnknownDatabaseError) as caught:
                repo.count(Tag)
            assert caught.value.sqlstate == "3D000"
            assert proxy.accepted <= accepted + sockets
    assert repo.count(Tag) == 0
    assert books_balance(repo)


def test_a_database_that_takes_nobody(repo: type[Repo], server: Server, database: str) -> None:
    """It is there, so that is not why: the driver's own text, and no guess."""
    run_sql(server, "postgres", f"ALTER DATABASE {database} ALLOW_CONNECTIONS false")
    try:
        with pytest.raises(ConnectError, match="not currently accepting connections") as caught:
            repo.count(Tag)
        assert type(caught.value) is ConnectError
    finally:
        run_sql(server, "postgres", f"ALTER DATABASE {database} ALLOW_CONNECTIONS true")


def test_a_password_that_is_refused(repo: type[Repo]) -> None:
    """Neither database lets it in, which leaves open why."""
    with repo.using(password="wrong"), pytest.raises(ConnectError, match="password") as caught:
        repo.count(Tag)
    assert type(caught.value) is ConnectError


def test_without_a_maintenance_database(make_repo: Callable[..., type[Repo]]) -> None:
    """Where there is none of that name, the cause stays open."""
    repo = make_repo(absent(), maintenance_database="nowhere")
    with pytest.raises(ConnectError, match="does not exist") as caught:
        repo.count(Tag)
    assert type(caught.value) is ConnectError
    repo = make_repo("nowhere", maintenance_database="nowhere")
    with pytest.raises(ConnectError) as caught:
        repo.count(Tag)
    assert type(caught.value) is ConnectError


def test_a_question_that_is_not_answered(repo: type[Repo], proxy: Proxy, server: Server) -> None:
    """It takes no longer than the connect might have taken."""
    assert repo.count(Tag) == 0
    proxy.slow(connect=0.3)
    with repo.using(absent()), repo.call_options(timeout=0.5), pytest.raises(ConnectError):
        repo.count(Tag)
    assert repo.stats().connecting == 0


def test_one_question_at_a_time(repo: type[Repo], server: Server, proxy: Proxy) -> None:
    """Six callers with six names: each hears of its own, one at a time is in the maintenance database."""
    seen: list[int] = []
    asking = "SELECT count(*) FROM pg_stat_activity WHERE datname = 'postgres' AND application_name = 'untold'"

    def ask(name: str) -> str:
        with repo.using(name), pytest.raises(UnknownDatabaseError) as caught:
            repo.count(Tag)
        return str(caught.value)

    names = [absent() for _ in range(6)]
    proxy.slow(chunk=0.02)
    with ThreadPoolExecutor(len(names)) as executor, server.connect() as beside:
        calls: list[Any] = [executor.submit(ask, name) for name in names]
        while not all(call.done() for call in calls):
            found = beside.execute(asking.encode()).fetchone()
            seen.append(int(found[0]) if found else 0)
    for name, call in zip(names, calls, strict=True):
        assert name in call.result()
    assert max(seen) == 1
