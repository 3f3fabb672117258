"""What a repo tells those who listen; and that they cannot hurt it."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any, Self

import psycopg
import pytest
from psycopg import pq
from sqlalchemy.exc import OperationalError, ProgrammingError

from shardrepo import CheckoutTimeoutError, ConfigError, Repo, UnknownDatabaseError, event, housekeeper
from shardrepo.listeners import NAMES
from shardrepo.testing.servers import Server, start_servers

from ..conftest import await_, await_connections, books_balance, run_sql
from ..models import Tag

pytestmark = pytest.mark.cache


TERMINATE = "SELECT count(pg_terminate_backend(pid, 30000)) FROM pg_stat_activity WHERE application_name = %s"


class Calls:
    """Counts the calls of a method for a block, and keeps what they were called on."""

    def __init__(self, owner: type, name: str) -> None:
        self.arguments: list[Any] = []
        self._owner, self._name = owner, name

    @property
    def counted(self) -> int:
        return len(self.arguments)

    def __enter__(self) -> Self:
        self._method = method = getattr(self._owner, self._name)

        def called(this: Any, *args: Any, **kwargs: Any) -> Any:
            self.arguments.append(this)
            return method(this, *args, **kwargs)

        setattr(self._owner, self._name, called)
        return self

    def __exit__(self, *exc_info: object) -> None:
        setattr(self._owner, self._name, self._method)


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


def test_evicted_for_a_connect_that_fails(
    make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]]
) -> None:
    """What was closed to make room is told, whatever became of the room."""
    (name,) = make_databases(1)
    repo = make_repo(name, pool_size=1)
    repo.count(Tag)
    diary = Diary(repo)
    with repo.using("absent"), pytest.raises(UnknownDatabaseError):
        repo.count(Tag)
    assert [(each.name, each.database.name) for each in diary.told] == [
        ("connect", "absent"),
        ("evict", name),
        ("close", name),
    ]


def test_evicted_for_a_bound(make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]]) -> None:
    """The reason is the bound, and the seconds are those that it was idle and open."""
    names = make_databases(2)
    repo = make_repo(names[0], max_connections=1)
    diary = Diary(repo, "evict", "close")
    for name in names:
        with repo.using(name):
            repo.count(Tag)
    evicted, closed = diary.told
    assert [(each.name, each.database.name, each.reason) for each in diary.told] == [
        ("evict", names[0], "bound"),
        ("close", names[0], "bound"),
    ]
    assert 0 < evicted.duration < closed.duration < 30


def test_a_server_that_is_full(make_repo: Callable[..., type[Repo]]) -> None:
    """One that makes room for a connect that the server refused is told when that connect is over."""
    with start_servers(1, max_connections=8) as (small,), ExitStack() as holders:
        repo = make_repo("postgres", on=small)
        repo.execute("SELECT 1")
        with suppress(psycopg.OperationalError):
            while True:
                holders.enter_context(small.connect())
        connecting: list[int] = []
        event.listen(repo, "evict", lambda _: connecting.append(repo.stats().connecting))
        diary = Diary(repo)
        with repo.using("template1"):
            assert repo.execute("SELECT 1").scalar_one() == 1
    assert [(each.name, each.database.name, each.reason) for each in diary.told[:3]] == [
        ("connect", "template1", None),
        ("evict", "postgres", "server full"),
        ("close", "postgres", "server full"),
    ]
    assert connecting == [0]


def test_one_dead_closes_its_siblings(make_repo: Callable[..., type[Repo]], server: Server, database: str) -> None:
    """They are told as such, before the one that turned out to be dead."""
    repo = make_repo(database, application_name="siblings")
    with repo.transaction(), repo.detached(), repo.transaction():
        repo.count(Tag)
    diary = Diary(repo, "close")
    run_sql(server, "postgres", TERMINATE, ("siblings",))
    with pytest.raises(OperationalError):
        repo.count(Tag)
    assert [each.reason for each in diary.told] == ["sibling", "broken"]


def test_a_lost_one_is_told_as_reclaimed(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """By whoever finds it next, the housekeeper or a verb, never by the finaliser."""
    repo = make_repo(database)
    told: list[tuple[str | None, threading.Thread]] = []
    event.listen(repo, "close", lambda happened: told.append((happened.reason, threading.current_thread())))
    lost = repo.engine().connect()
    del lost
    gc.collect()
    assert threading.current_thread() not in [thread for _, thread in told]
    repo.count(Tag)
    await_(lambda: [reason for reason, _ in told] == ["reclaimed"])


def test_one_that_is_too_old_is_told(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """On its return, when it grew too old in use; it was open for as long as that."""
    repo = make_repo(database, max_lifetime=0.1)
    diary = Diary(repo, "close")
    repo.execute("SELECT pg_sleep(0.2)")
    (told,) = diary.told
    assert (told.reason, told.duration >= 0.1) == ("max_lifetime", True)


def test_every_way_to_execute_is_told(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """A statement that many rows go into is one event, and so is one that the driver gets without parameters."""
    repo = make_repo(database)
    diary = Diary(repo, "query")
    repo.insert_all(Tag, [{"label": "a"}, {"label": "b"}])
    with repo.engine().connect() as connection:
        connection.execution_options(no_parameters=True).exec_driver_sql("SELECT 1")
    told = [str(each.statement).partition(" ")[0] for each in diary.told]
    assert told == ["INSERT", "SELECT"]


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


def idle(repo: type[Repo]) -> int:
    """How many are idle, by the books alone: asking the repo for its stats would close what is too old itself."""
    return repo._router.cache.ledger.stats().idle


def test_the_housekeeper_waits_for_no_listener(
    make_repo: Callable[..., type[Repo]],
    make_databases: Callable[..., list[str]],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It goes on closing; that is told later, and what is too much to remember is counted in the log."""
    monkeypatch.setattr(housekeeper, "MAX_UNTOLD", 2)
    names = make_databases(4)
    repo = make_repo(names[0], idle_timeout=0.1, warn_after=0.2)
    blocked, may_go = threading.Event(), threading.Event()
    told: list[str] = []

    def block(happened: event.Event) -> None:
        told.append(happened.database.name)
        blocked.set()
        assert may_go.wait(60)

    def visit(name: str) -> None:
        with repo.using(name):
            repo.count(Tag)

    event.listen(repo, "close", block)
    visit(names[0])
    assert blocked.wait(30)
    for name in names[1:]:
        visit(name)
        await_(lambda: idle(repo) == 0)
    with repo.transaction():
        await_(lambda: any("has been held" in record.getMessage() for record in caplog.records))
    assert any("nobody is told that 1 connections were closed" in record.getMessage() for record in caplog.records)
    assert told == names[:1]
    tellers = [thread for thread in threading.enumerate() if thread.name == "shardrepo-teller"]
    assert len(tellers) == 1
    may_go.set()
    await_(lambda: told[1:3] == names[2:])
    visit(names[0])
    await_(lambda: names[0] in told[3:])


def test_a_timeouts_listener_that_blocks(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Whoever waited in vain has left the queue: what comes back goes to the next."""
    repo = make_repo(database, max_connections=1, checkout_timeout=0.2)
    told, may_go = threading.Event(), threading.Event()

    def block(_: event.Event) -> None:
        told.set()
        assert may_go.wait(60)

    event.listen(repo, "timeout", block)
    with ThreadPoolExecutor(1) as executor:
        with repo.transaction():
            late = executor.submit(repo.count, Tag)
            assert told.wait(30)
        assert repo.count(Tag) == 0
        assert repo.stats().waiting == 0
        may_go.set()
        with pytest.raises(CheckoutTimeoutError):
            late.result(30)


def test_no_thread_tells_nobody(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Without a listener what the housekeeper closes is told by nobody: no thread is started, no event made."""
    repo = make_repo(database, idle_timeout=0.05)
    event.listen(repo, "query", print)
    event.remove(repo, "query", print)
    with Calls(event.Event, "__init__") as made, Calls(threading.Thread, "start") as started:
        for _ in range(3):
            repo.insert(Tag(label=f"{_}"))
            await_(lambda: idle(repo) == 0)
    assert made.counted == 0
    assert [thread.name for thread in started.arguments] == ["shardrepo-housekeeper"]


def test_listeners_come_and_go_while_threads_work(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """One that is there all the time misses nothing, however many others come and go."""
    repo = make_repo(database)
    told: list[event.Event] = []
    event.listen(repo, "checkin", told.append)

    def work(number: int) -> None:
        if number % 2:
            repo.count(Tag)
            return
        seen: list[event.Event] = []
        for _ in range(50):
            event.listen(repo, "checkin", seen.append)
            event.remove(repo, "checkin", seen.append)

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(work, range(40)))
    assert len(told) == 20
    assert repo._router.listeners.checkin == (told.append,)


@pytest.mark.parametrize("name", ["checkout", "connect", "evict", "close"])
def test_a_listener_that_is_interrupted_loses_no_connection(
    make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]], name: event.EventName
) -> None:
    """A signal's exception ends the call; a connection that was taken goes back, one that was not yet is closed."""
    one, other = make_databases(2)
    repo = make_repo(one, pool_size=1)
    repo.count(Tag)

    def interrupt(_: event.Event) -> None:
        raise KeyboardInterrupt

    event.listen(repo, name, interrupt)
    with repo.using(other), pytest.raises(KeyboardInterrupt):
        repo.count(Tag)
    event.remove(repo, name, interrupt)
    assert (repo.stats().in_use, repo.stats().closed) == (0, 1 if name == "checkout" else 2)
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


# Before version 18, libpq does not tell that a server is full: a plain ConnectError, for which nothing is evicted.
if pq.version() < 180000:
    del test_a_server_that_is_full
