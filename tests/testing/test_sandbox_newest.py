"""What takes long, and what takes a libpq that asks a server to stop without waiting for its answer: not marked as what
other versions run, too."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
from sqlalchemy.exc import OperationalError

from shardrepo import Repo, SandboxError
from shardrepo.testing.servers import Server

from ..conftest import await_connections, books_balance, contents
from ..models import Tag
from ..proxy import Proxy
from .test_sandbox import name_of, states_of


def test_a_thousand_sandboxes_over_twenty_databases(
    make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]], server: Server
) -> None:
    """Twenty connections, the same ones all the time, and nothing else of them is left or grows."""
    twenty = make_databases(20)
    repo = make_repo(twenty[0], pool_size=20)

    def once() -> None:
        with repo.sandbox() as sandbox:
            for name in twenty:
                with repo.using(name):
                    repo.insert(Tag(label=name))
            assert len(sandbox.databases) == 20

    once()
    before = await_connections(server, name_of(repo), twenty)
    gc.collect()
    objects = len(gc.get_objects())
    for _ in range(1000):
        once()
    gc.collect()
    assert await_connections(server, name_of(repo), twenty) == before
    assert {state for _, state in states_of(server, repo)} == {"idle"}
    assert len(gc.get_objects()) - objects < 1000  # one per sandbox would be as many
    assert (repo.stats().attempts, repo.stats().in_use) == (20, 0)
    assert all(contents(server, name) == [] for name in twenty)


def test_a_server_that_says_nothing_any_more(make_repo: Callable[..., type[Repo]], database: str, proxy: Proxy) -> None:
    """A call ends when its time is over, or soon after, and so does the sandbox, whose connection is lost."""
    repo = make_repo(database, proxy, connect_timeout=0.5)
    with pytest.raises(SandboxError, match="its connection was lost"), repo.sandbox():
        repo.insert(Tag(label="gone"))
        proxy.deafen()
        with pytest.raises(OperationalError), repo.call_options(timeout=0.1):
            repo.count(Tag)
    proxy.restore()
    with repo.sandbox():
        repo.insert(Tag(label="gone"))
        proxy.deafen()
    proxy.restore()
    assert repo.count(Tag) == 0
    assert books_balance(repo)
