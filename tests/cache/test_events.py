"""What a repo tells those who listen; and that they cannot hurt it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy.exc import ProgrammingError

from shardrepo import CheckoutTimeoutError, ConfigError, Repo, UnknownDatabaseError, event
from shardrepo.listeners import NAMES
from shardrepo.testing.servers import Server

from ..conftest import await_, await_connections, books_balance, run_sql
from ..models import Tag

pytestmark = pytest.mark.cache


class Diary:
    """Everything that a repo has told."""

    def __init__(self, repo: type[Repo], *names: event.EventName) -> None:
        self.told: list[event.Event] = []
        for name in names or NAMES:
            event.listen(repo, name, self.told.append)

    def names(self) -> list[str]:
        return [each.name for each in self.told]

    def of(self, name: str) -> list[event.Event]:
        return [each for each in self.told if each.name == name]


def test_one_call_after_the_other(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """A miss connects, a hit does not; each statement is told; durations are seconds."""
    repo = make_repo(database)
    diary = Diary(repo)
    repo.count(Tag)
    assert diary.names() == ["connect", "checkout", "query", "checkin"]
    diary.told.clear()
    repo.insert(Tag(label="a"))
    assert diary.names() == ["checkout", "query", "checkin"]
    checkout, query, checkin = diary.told
    assert {each.database for each in diary.told} == {repo.get_database()}
    assert query.statement is not None
    assert query.statement.startswith("INSERT INTO tags")
    assert 0 < query.duration < checkin.duration < 30
    assert 0 < checkout.duration < 30
    assert query.error is None


def test_errors_are_told(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """A connect and a statement that fail carry what they failed with."""
    repo = make_repo(database)
    diary = Diary(repo, "connect", "query")
    with pytest.raises(ProgrammingError):
        repo.execute("SELECT nothing")
    with repo.using("absent"), pytest.raises(UnknownDatabaseError) as caught:
        repo.count(Tag)
    assert diary.of("connect")[-1].error is caught.value
    assert diary.of("connect")[-1].database.name == "absent"
    assert "nothing" in str(next(each for each in diary.of("query") if each.error is not None).error)


def test_why_connections_are_closed(
    make_repo: Callable[..., type[Repo]], server: Server, make_databases: Callable[..., list[str]]
) -> None:
    """Each closing has its reason, and an eviction is told as such before."""
    names = make_databases(3)
    repo = make_repo(names[0], pool_size=1)
    diary = Diary(repo, "evict", "close")
    for name in names:
        with repo.using(name):
            repo.count(Tag)
    repo.ping()
    repo.disconnect_all()
    repo.disconnect(names[2])
    pid = repo.execute("SELECT pg_backend_pid()").scalar_one()
    run_sql(server, "postgres", "SELECT pg_terminate_backend(%s, 30000)", (pid,))
    with pytest.raises(Exception, match="terminat"):
        repo.count(Tag)
    told = [(each.name, each.database.name, each.reason) for each in diary.told]
    assert told == [
        ("evict", names[0], "target"),
        ("close", names[0], "target"),
        ("evict", names[1], "target"),
        ("close", names[1], "target"),
        ("close", names[0], "transient"),
        ("close", names[2], "disconnected"),
        ("close", names[0], "broken"),
    ]


def test_what_the_housekeeper_closes_is_told(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Not in the thread that looks after the cache, which a listener may not hold up."""
    repo = make_repo(database, idle_timeout=0.1, application_name="kept short")
    told: list[tuple[str, str | None]] = []
    event.listen(repo, "close", lambda each: told.append((threading.current_thread().name, each.reason)))
    repo.count(Tag)
    await_(lambda: told != [])
    assert told == [("shardrepo-teller", "idle_timeout")]


def test_a_timeout_is_told(make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]]) -> None:
    """With the bound, and for how long the caller waited."""
    names = make_databases(2)
    repo = make_repo(names[0], max_connections=1, checkout_timeout=0.2)
    diary = Diary(repo, "timeout")
    with ThreadPoolExecutor(1) as executor, repo.transaction():
        with pytest.raises(CheckoutTimeoutError):
            executor.submit(repo.count, Tag).result(30)
    (told,) = diary.told
    assert told.reason == "max_connections=1"
    assert told.duration >= 0.2


@pytest.mark.parametrize("name", NAMES)
def test_a_listener_that_raises(
    make_repo: Callable[..., type[Repo]],
    make_databases: Callable[..., list[str]],
    caplog: pytest.LogCaptureFixture,
    name: event.EventName,
) -> None:
    """It is logged with its database; the call, the connection and other listeners are as without it."""
    names = make_databases(2)
    repo = make_repo(names[0], pool_size=1, max_connections=1, checkout_timeout=0.1)
    after: list[event.Event] = []

    def fail(_: event.Event) -> None:
        raise ZeroDivisionError

    event.listen(repo, name, fail)
    event.listen(repo, name, after.append)
    for each in names:
        with repo.using(each):
            repo.insert(Tag(label="a"))
    with ThreadPoolExecutor(1) as executor, repo.transaction():
        with pytest.raises(CheckoutTimeoutError):
            executor.submit(repo.count, Tag).result(30)
    assert after
    (record,) = {record.getMessage(): record for record in caplog.records if record.name == "shardrepo.event"}.values()
    assert record.levelno == logging.ERROR
    assert record.database in names  # type: ignore[attr-defined]
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


@pytest.mark.parametrize("name", ["connect", "checkout", "checkin", "evict", "close", "query"])
def test_a_listener_that_blocks(
    make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]], name: event.EventName
) -> None:
    """It delays its own caller; others take, return, evict and connect meanwhile, on the same server too."""
    names = make_databases(4)
    repo = make_repo(names[0], pool_size=2)
    blocked, may_go, first = threading.Event(), threading.Event(), threading.Lock()

    def block(_: event.Event) -> None:
        if first.acquire(blocking=False):
            blocked.set()
            assert may_go.wait(60)

    def visit(name: str) -> int:
        with repo.using(name):
            return repo.count(Tag)

    for each in names[:2]:
        visit(each)
    event.listen(repo, name, block)
    with ThreadPoolExecutor(4) as executor:
        calls = [executor.submit(visit, names[2])]
        assert blocked.wait(30)
        for _ in range(3):
            for each in executor.map(visit, [names[0], names[1], names[3]]):
                assert each == 0
        assert not calls[0].done()
        may_go.set()
        assert calls[0].result(30) == 0
    assert books_balance(repo)


@pytest.mark.parametrize("name", ["checkout", "connect", "evict", "close"])
def test_a_listener_that_is_interrupted_loses_no_connection(
    make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]], name: event.EventName
) -> None:
    """A signal's exception ends the call; the connection is closed, as nobody has it."""
    one, other = make_databases(2)
    repo = make_repo(one, pool_size=1)
    repo.count(Tag)

    def interrupt(_: event.Event) -> None:
        raise KeyboardInterrupt

    event.listen(repo, name, interrupt)
    with repo.using(other), pytest.raises(KeyboardInterrupt):
        repo.count(Tag)
    event.remove(repo, name, interrupt)
    assert (repo.stats().in_use, repo.stats().closed) == (0, 2)
    assert repo.count(Tag) == 0
    assert books_balance(repo)


def test_what_a_listener_does_is_told_to_nobody(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """One that writes a journal through the repo does not write about its own writing."""
    repo = make_repo(database)
    event.listen(repo, "query", lambda each: repo.insert(Tag(label=each.statement[:6])))
    repo.execute("SELECT 1")
    labels = [tag.label for tag in repo.all(Tag)]
    assert labels.count("SELECT") >= 1
    assert "INSERT" not in labels


def test_who_hears_whom(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """A subclass without a config shares its parent's listeners; another repo has its own."""
    repo, other = make_repo(database), make_repo(database)
    child = type("Child", (repo,), {})
    told: list[event.Event] = []

    @event.listens_for(child, "checkin")
    def note(happened: event.Event) -> None:
        told.append(happened)

    other.count(Tag)
    assert told == []
    repo.count(Tag)
    assert len(told) == 1
    event.remove(repo, "checkin", note)
    repo.count(Tag)
    assert len(told) == 1


def test_names_that_are_no_events(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """The error says which was probably meant; what does not listen cannot be removed."""
    repo: Any = make_repo(database)
    with pytest.raises(ConfigError, match="unknown event 'chekout'; did you mean 'checkout'"):
        event.listen(repo, "chekout", print)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ConfigError, match="nothing to remove"):
        event.remove(repo, "checkout", print)


def test_what_is_closed_is_gone_from_the_server(
    make_repo: Callable[..., type[Repo]], server: Server, database: str
) -> None:
    """Whoever is told of a closing need not wait for it."""
    repo = make_repo(database, application_name="closing")
    diary = Diary(repo, "close")
    repo.count(Tag)
    repo.disconnect()
    assert len(diary.told) == 1
    await_connections(server, "closing", [])
