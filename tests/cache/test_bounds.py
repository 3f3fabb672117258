"""Hard bounds on real servers: who waits, for what, and for how long; nobody waits who need not."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from time import monotonic
from typing import Any

import pytest

from shardrepo import CheckoutTimeoutError, ConfigError, Repo
from shardrepo.demo.record import Recorder
from shardrepo.demo.sampler import Sampler
from shardrepo.testing.servers import Server, Servers

from ..conftest import TEMPLATE, await_, books_balance
from ..models import Tag

pytestmark = pytest.mark.cache

PER_SERVER = 32
BOUND = 24


@pytest.fixture(scope="module")
def many(servers: Servers) -> Iterator[list[tuple[Server, str]]]:
    """64 databases, on two servers in turn."""
    names = [f"bound{number:02}" for number in range(PER_SERVER)]
    for server in servers[:2]:
        server.create_databases(names, template=TEMPLATE)
    yield [(server, name) for name in names for server in servers[:2]]
    for server in servers[:2]:
        for name in names:
            server.drop_database(name, force=True)


@pytest.fixture
def executor() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(64) as executor:
        yield executor


def at(place: tuple[Server, str]) -> dict[str, Any]:
    server, name = place
    return {"host": server.host, "port": server.port, "database": name, "password": server.password}


class Borrower:
    """A thread that holds a connection, once this is made, until it is told to let go."""

    def __init__(self, executor: ThreadPoolExecutor, repo: type[Repo], place: tuple[Server, str]) -> None:
        self._has, self._may_go = threading.Event(), threading.Event()
        self._done = executor.submit(self._hold, repo, place)
        assert self._has.wait(30)

    def _hold(self, repo: type[Repo], place: tuple[Server, str]) -> int:
        with repo.using(at(place)), repo.transaction():
            pid: int = repo.execute("SELECT pg_backend_pid()").scalar_one()
            self._has.set()
            assert self._may_go.wait(60)
            return pid

    def let_go(self) -> int:
        self._may_go.set()
        return self._done.result(60)


def ask(repo: type[Repo], place: tuple[Server, str]) -> int:
    with repo.using(at(place)):
        pid: int = repo.execute("SELECT pg_backend_pid()").scalar_one()
        return pid


def test_many_databases_under_a_bound(
    make_repo: Callable[..., type[Repo]], servers: Servers, many: list[tuple[Server, str]], executor: ThreadPoolExecutor
) -> None:
    """64 threads over 64 databases at once: everybody is served, and the servers never see more than the bound."""
    repo = make_repo("postgres", application_name="bounded", max_connections=BOUND, pool_size=8)
    start = threading.Barrier(len(many))

    def work(place: tuple[Server, str]) -> None:
        start.wait(30)
        for _ in range(4):
            with repo.using(at(place)):
                assert repo.execute("SELECT current_database() || pg_sleep(0.002)").scalar_one() == place[1]

    ledger = repo._router.cache.ledger
    with Recorder(ledger) as recorder, Sampler([server.url() for server in servers[:2]], "bounded") as sampler:
        calls = [executor.submit(work, place) for place in many]
        while not all(call.done() for call in calls):
            sampler.drain(until=len(sampler.samples) + 1)
    for call in calls:
        call.result()
    open_ = [sample.total - len(recorder.record.lingering(sample)) for sample in sampler.samples]
    assert BOUND // 2 < max(open_) <= BOUND
    stats = repo.stats()
    assert (stats.in_use, stats.waiting, stats.closing) == (0, 0, 0)
    assert stats.idle <= 8
    assert books_balance(repo)


def test_what_is_returned_serves_who_waits_for_it(
    make_repo: Callable[..., type[Repo]], many: list[tuple[Server, str]], executor: ThreadPoolExecutor
) -> None:
    """Under `max_per_database` the next caller gets the very connection that was held."""
    repo = make_repo("postgres", max_per_database=1)
    borrower = Borrower(executor, repo, many[0])
    waiting = executor.submit(ask, repo, many[0])
    await_(lambda: repo.stats().waiting == 1)
    ask(repo, many[1])
    ask(repo, many[2])
    assert borrower.let_go() == waiting.result(30)
    assert repo.stats().attempts == 3


def test_a_full_server_holds_up_nobody_who_wants_another(
    make_repo: Callable[..., type[Repo]], many: list[tuple[Server, str]], executor: ThreadPoolExecutor
) -> None:
    """Under `max_per_server` callers wait for their own server only, and are served when it has room."""
    repo = make_repo("postgres", max_per_server=1)
    borrower = Borrower(executor, repo, many[0])
    waiting = executor.submit(ask, repo, many[2])
    await_(lambda: repo.stats().waiting == 1)
    for place in many[1:8:2]:
        ask(repo, place)
    assert not waiting.done()
    borrower.let_go()
    assert waiting.result(30)
    assert repo.stats().idle == 2


def test_an_idle_connection_gives_way(make_repo: Callable[..., type[Repo]], many: list[tuple[Server, str]]) -> None:
    """At a bound nobody waits while something idle can be closed for it: of the server that is full."""
    repo = make_repo("postgres", max_per_server=2)
    pids = [ask(repo, place) for place in many[:4]]
    ask(repo, many[4])
    assert [ask(repo, place) for place in many[1:4]] == pids[1:]
    assert repo.stats().evictions == 1


def test_a_question_to_the_server_gives_way_to_the_bound(
    make_repo: Callable[..., type[Repo]], many: list[tuple[Server, str]]
) -> None:
    """`ping` opens a connection of its own and counts: at the bound something idle is closed for it."""
    repo = make_repo("postgres", max_connections=1)
    ask(repo, many[0])
    with repo.using(at(many[0])):
        assert repo.ping() > 0
    stats = repo.stats()
    assert (stats.idle, stats.evictions) == (0, 1)


def test_a_wait_that_takes_too_long(
    make_repo: Callable[..., type[Repo]], many: list[tuple[Server, str]], executor: ThreadPoolExecutor
) -> None:
    """It ends after `checkout_timeout` with an error that names the database, the bound and the numbers."""
    repo = make_repo("postgres", max_connections=1, checkout_timeout=0.3)
    borrower = Borrower(executor, repo, many[0])
    begun = monotonic()
    with pytest.raises(CheckoutTimeoutError, match=r"max_connections=1 left no room; 1 in use, 0 connecting") as caught:
        ask(repo, many[1])
    assert monotonic() - begun >= 0.3
    with repo.using(at(many[1])):
        assert caught.value.database == repo.get_database()
    assert caught.value.bounds == {"max_connections": 1}
    borrower.let_go()
    assert ask(repo, many[1])
    assert books_balance(repo)


def test_waiting_for_what_one_holds_oneself(
    make_repo: Callable[..., type[Repo]], many: list[tuple[Server, str]]
) -> None:
    """A nested unit of work that the bound can never serve fails at once, and says what the caller holds."""
    repo = make_repo("postgres", max_connections=1, checkout_timeout=3600)
    with repo.using(at(many[0])), repo.transaction():
        repo.insert(Tag(label="outer"))
        home = repo.get_database().home
        with repo.using(at(many[1])), pytest.raises(CheckoutTimeoutError, match=f"this one holds {home}") as caught:
            repo.count(Tag)
        assert caught.value.held == (home,)
        assert repo.count(Tag) == 1
    assert ask(repo, many[1])
    assert books_balance(repo)


def test_two_who_wait_for_each_other(
    make_repo: Callable[..., type[Repo]], many: list[tuple[Server, str]], executor: ThreadPoolExecutor
) -> None:
    """The second of them gets its error at once; the first goes on when the second has let go."""
    repo = make_repo("postgres", max_connections=2, checkout_timeout=3600)
    both_hold = threading.Barrier(2)

    def work(own: int, other: int) -> int:
        with repo.using(at(many[own])), repo.transaction():
            repo.execute("SELECT 1")
            both_hold.wait(30)
            return ask(repo, many[other])

    calls: list[Future[int]] = [executor.submit(work, 0, 1), executor.submit(work, 1, 0)]
    # Each wants a second connection to a database of which the first is in the other's transaction.
    errors = [call.exception(60) for call in calls]
    assert sorted(error is None for error in errors) == [False, True]
    (error,) = [error for error in errors if error is not None]
    assert isinstance(error, CheckoutTimeoutError)
    assert len(error.held) == 1
    assert books_balance(repo)


@pytest.mark.parametrize("name", ["max_connections", "max_per_server", "max_per_database"])
@pytest.mark.parametrize("value", [0, -1, 1.5, "2", True])
def test_a_bound_that_lets_nobody_in_is_refused(name: str, value: object) -> None:
    """A bound is a positive integer or None."""
    with pytest.raises(ConfigError, match=name):
        type("BadRepo", (Repo,), {}, config={"url": "postgresql://app@db01/app", name: value}).get_database()


def test_nobody_is_overtaken_for_long(
    make_repo: Callable[..., type[Repo]], many: list[tuple[Server, str]], executor: ThreadPoolExecutor
) -> None:
    """Threads that pass one database's connection among themselves let one in who waits for another."""
    repo = make_repo("postgres", max_connections=1, max_overtake=0.05)
    over = threading.Event()

    def pass_on() -> None:
        while not over.is_set():
            ask(repo, many[0])

    with ExitStack() as stack:
        stack.callback(over.set)
        for _ in range(4):
            executor.submit(pass_on)
        await_(lambda: repo.stats().hits > 20)
        for _ in range(3):
            assert ask(repo, many[1])
