"""A call's own deadline: for everything that it does, and whatever the network does."""

from __future__ import annotations

import asyncio
import contextvars
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any

import pytest
from psycopg import pq
from sqlalchemy.exc import OperationalError

from shardrepo import CheckoutTimeoutError, ConfigError, Repo, ServerUnavailableError, TransactionDoomedError, event
from shardrepo.testing.servers import Server

from ..conftest import await_connections, books_balance
from ..models import Dog, Tag
from ..proxy import Proxy

pytestmark = pytest.mark.cache

# What a call may take beyond its timeout, and what a busy machine may add to that.
SLACK = 0.25 + 0.75


@pytest.fixture
def repo(make_repo: Callable[..., type[Repo]], database: str, proxy: Proxy) -> type[Repo]:
    return make_repo(database, on=proxy, application_name="timed")


def timed(call: Callable[[], Any], kind: type[Exception], seconds: float) -> Any:
    """Check that a call fails as it should, and when; returns its error."""
    begun = monotonic()
    with pytest.raises(kind) as caught:
        call()
    assert seconds <= monotonic() - begun < seconds + SLACK
    return caught.value


def test_a_statement_that_takes_too_long(repo: type[Repo], server: Server, database: str) -> None:
    """It is given up, the server stops it, its connection is closed, and others are served."""
    told: list[event.Event] = []
    event.listen(repo, "timeout", told.append)
    with repo.call_options(timeout=0.3):
        error = timed(lambda: repo.execute("SELECT pg_sleep(30)"), OperationalError, 0.3)
    assert f"database: {repo.get_database().home}" in error.__notes__
    if pq.version() >= 170000:
        await_connections(server, "timed", [])
    assert [each.reason for each in told] == ["no answer"]
    assert repo.count(Tag) == 0
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


def test_a_network_that_falls_silent(repo: type[Repo], proxy: Proxy) -> None:
    """Traffic stops on a live connection: its caller is freed in time, and service is back with the network."""
    repo.count(Tag)
    proxy.deafen()
    with repo.call_options(timeout=0.3):
        timed(lambda: repo.count(Tag), OperationalError, 0.3)
    proxy.restore()
    assert repo.count(Tag) == 0


def test_a_connect_that_takes_too_long(repo: type[Repo], proxy: Proxy) -> None:
    """The call's own deadline says nothing of the server: nobody else fails for it."""
    proxy.deafen()
    for _ in range(4):
        with repo.call_options(timeout=0.1):
            error = timed(lambda: repo.count(Tag), ServerUnavailableError, 0.1)
        assert error.reason == "deadline"
        assert "within the call's own timeout" in str(error)
    proxy.restore()
    assert repo.count(Tag) == 0


def test_a_wait_that_takes_too_long(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """A bound is waited for no longer than the call may take."""
    repo = make_repo(database, max_connections=1)

    def wait() -> None:
        with repo.call_options(timeout=0.3):
            timed(lambda: repo.count(Tag), CheckoutTimeoutError, 0.3)

    with ThreadPoolExecutor(1) as executor, repo.transaction():
        executor.submit(wait).result(30)


def test_in_a_transaction(repo: type[Repo]) -> None:
    """Nothing of it is kept, and its thread can go on afterwards."""
    with pytest.raises(OperationalError), repo.transaction():
        repo.insert(Tag(label="lost"))
        with repo.call_options(timeout=0.2):
            repo.execute("SELECT pg_sleep(30)")
    assert repo.all(Tag) == []
    assert not repo.in_transaction()


def test_a_result_without_end(repo: type[Repo]) -> None:
    """Rows that come all the time are no answer yet: the call is over in time all the same."""
    with repo.call_options(timeout=0.5):
        timed(lambda: repo.execute("SELECT generate_series(1, 1000000000)"), OperationalError, 0.5)
    assert repo.count(Tag) == 0


def test_in_a_transaction_over_a_silent_network(repo: type[Repo], proxy: Proxy) -> None:
    """What follows in it is told so at once, and nothing is sent for its end; its thread goes on afterwards."""
    with pytest.raises(TransactionDoomedError, match="did not answer in time"), repo.transaction():
        repo.insert(Tag(label="lost"))
        proxy.deafen()
        with repo.call_options(timeout=0.2):
            timed(lambda: repo.count(Tag), OperationalError, 0.2)
        timed(lambda: repo.count(Tag), TransactionDoomedError, 0)
        timed(lambda: repo.insert(Tag(label="late")), TransactionDoomedError, 0)
        with pytest.raises(TransactionDoomedError), repo.savepoint():
            raise AssertionError
        proxy.restore()
        with repo.detached():
            assert repo.count(Tag) == 0
    assert not repo.in_transaction()
    assert repo.insert(Tag(label="kept")).id is not None
    assert [tag.label for tag in repo.all(Tag)] == ["kept"]
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


def test_the_ends_of_a_transaction(repo: type[Repo], proxy: Proxy) -> None:
    """To enter it, and to leave it either way, are calls of their own, each with its deadline."""

    def enter() -> None:
        with repo.transaction():
            raise AssertionError

    def leave(label: str, error: type[Exception] | None = None) -> None:
        proxy.restore()
        with repo.transaction():
            repo.insert(Tag(label=label))
            proxy.deafen()
            if error is not None:
                raise error

    proxy.deafen()
    with repo.call_options(timeout=0.3):
        timed(enter, ServerUnavailableError, 0.3)
        timed(lambda: leave("kept or lost"), OperationalError, 0.3)
        with pytest.raises((OperationalError, KeyError)):
            leave("lost", KeyError)
    assert not repo.in_transaction()
    proxy.restore()
    assert {tag.label for tag in repo.all(Tag)} <= {"kept or lost"}
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


def test_the_ends_of_a_savepoint(repo: type[Repo], proxy: Proxy) -> None:
    """The same, and the transaction around it is doomed."""

    def enter() -> None:
        with repo.savepoint():
            raise AssertionError

    def leave() -> None:
        with repo.savepoint():
            repo.insert(Tag(label="lost"))
            proxy.deafen()

    for call in (enter, leave):
        proxy.restore()
        with pytest.raises(TransactionDoomedError), repo.transaction(), repo.call_options(timeout=0.3):
            repo.count(Tag)
            if call is enter:
                proxy.deafen()
            timed(call, OperationalError, 0.3)
    proxy.restore()
    assert repo.all(Tag) == []


def test_a_ping(repo: type[Repo], proxy: Proxy) -> None:
    """It has its deadline for its connect, and for its question."""
    proxy.deafen()
    with repo.call_options(timeout=0.3):
        timed(repo.ping, ServerUnavailableError, 0.3)
        proxy.restore()
        assert 0 < repo.ping() < 0.3


def test_a_block_that_a_generator_leaves_open(repo: type[Repo], caplog: pytest.LogCaptureFixture) -> None:
    """Left in another context, it takes nobody's timeout away, and gives nobody one; that is logged."""

    def rows() -> Iterator[int]:
        with repo.call_options(timeout=0.2):
            yield repo.count(Tag)

    def begin() -> Iterator[int]:
        generator = rows()
        next(generator)
        return generator

    elsewhere = contextvars.copy_context().run(begin)
    with repo.call_options(timeout=30):
        elsewhere.close()  # type: ignore[attr-defined]  # a generator's
        repo.execute("SELECT pg_sleep(0.5)")
    assert "call_options(timeout=0.2) block was left in another context" in caplog.text
    repo.execute("SELECT pg_sleep(0.5)")


def test_a_connection_that_was_given_up_is_never_lent_again(repo: type[Repo], proxy: Proxy) -> None:
    """Each call gets another one, and the late answer of one is never taken for that to another."""
    seen: list[int] = []
    for number in range(5):
        seen.append(repo.execute("SELECT pg_backend_pid()").scalar_one())
        assert repo.execute(f"SELECT {number}").scalar_one() == number
        proxy.deafen()
        with repo.call_options(timeout=0.1), pytest.raises(OperationalError):
            repo.execute(f"SELECT 100 + {number}")
        proxy.restore()
    assert len(set(seen)) == 5
    assert books_balance(repo)


def test_others_on_the_server_go_on(repo: type[Repo], proxy: Proxy) -> None:
    """A statement that takes too long closes its own connection; one in use and one idle stay what they are."""
    mine = "SELECT pg_backend_pid()"
    with repo.transaction():
        in_use = repo.execute(mine).scalar_one()
        with repo.detached(), repo.transaction():
            idle = repo.execute(mine).scalar_one()
            with repo.detached(), repo.call_options(timeout=0.2), pytest.raises(OperationalError):
                repo.execute("SELECT pg_sleep(30)")
        assert repo.execute(mine).scalar_one() == in_use
        with repo.detached():
            assert repo.execute(mine).scalar_one() == idle


def test_a_verb_in_a_verb_takes_no_deadline_away(repo: type[Repo], server: Server, database: str) -> None:
    """A listener's verb in the same transaction has its own; the rest of the other one still has its."""
    event.listen(repo, "query", lambda _: repo.count(Tag))
    with server.connect(database) as other:
        other.autocommit = False
        other.execute("LOCK TABLE dogs")
        with pytest.raises(TransactionDoomedError), repo.transaction(), repo.call_options(timeout=0.3):
            timed(lambda: repo.insert(Dog(breed="terrier")), OperationalError, 0.3)
        other.rollback()


def test_the_next_has_no_deadline(repo: type[Repo]) -> None:
    """Neither the next call on the same connection, nor the rest of a transaction."""
    with repo.call_options(timeout=0.2):
        pid = repo.execute("SELECT pg_backend_pid()").scalar_one()
    assert repo.execute("SELECT pg_backend_pid() FROM pg_sleep(0.5)").scalar_one() == pid
    with repo.transaction():
        with repo.call_options(timeout=0.2):
            repo.count(Tag)
        repo.execute("SELECT pg_sleep(0.5)")
        repo.insert(Tag(label="kept"))
    assert repo.count(Tag) == 1


def test_what_is_in_time_is_as_without(repo: type[Repo]) -> None:
    """Every way to end a unit of work, those in which nothing is sent included."""
    with repo.call_options(timeout=30):
        tag = repo.insert(Tag(label="a"))
        repo.update(tag, label="b")
        repo.update(tag, label="b")
        repo.insert_all(Tag, [{"label": "c"}, {"label": "d"}])
        with repo.transaction(), repo.savepoint():
            repo.delete(tag)
        with repo.session() as session:
            session.add(Tag(label="e"))
            session.commit()
    assert sorted(tag.label for tag in repo.all(Tag)) == ["c", "d", "e"]


def test_blocks_nest(repo: type[Repo]) -> None:
    """The innermost counts; each is restored, on errors too."""
    with repo.call_options(timeout=0.1):
        with pytest.raises(ZeroDivisionError), repo.call_options(timeout=30):
            repo.execute("SELECT pg_sleep(0.4)")
            raise ZeroDivisionError
        with pytest.raises(OperationalError):
            repo.execute("SELECT pg_sleep(30)")
    repo.execute("SELECT pg_sleep(0.2)")


def test_tasks_inherit_and_other_repos_do_not(
    repo: type[Repo], make_repo: Callable[..., type[Repo]], database: str
) -> None:
    """As with the choice of a database; it is one repo's."""
    other = make_repo(database)

    async def work() -> None:
        with pytest.raises(OperationalError):
            await asyncio.to_thread(repo.execute, "SELECT pg_sleep(30)")
        await asyncio.to_thread(other.execute, "SELECT pg_sleep(0.3)")

    with repo.call_options(timeout=0.1):
        asyncio.run(work())


@pytest.mark.parametrize("timeout", [0, -1, math.nan, math.inf, True, "2", None])
def test_what_is_no_timeout(repo: type[Repo], timeout: Any) -> None:
    """It is refused before anything changes."""
    with pytest.raises(ConfigError, match="timeout"):
        repo.call_options(timeout=timeout)


def test_a_silent_connection_is_found_by_the_system_too(repo: type[Repo]) -> None:
    """Without a deadline of the call's, keepalives end it: they are asked for."""
    repo.count(Tag)
    (entry,) = repo._router.cache.ledger._idle
    assert entry.connection is not None
    parameters = entry.connection.dbapi_connection.info.get_parameters()
    assert (parameters["keepalives_idle"], parameters["tcp_user_timeout"]) == ("30", "60000")
