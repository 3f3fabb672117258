"""What a test asserts of a repo: the databases that it touched, the statements that it sent, and that nothing leaks."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import ProgrammingError

from shardrepo import ConfigError, Repo
from shardrepo.testing.assertions import assert_databases_touched, assert_no_leaks
from shardrepo.testing.servers import Server, count_statements

from ..models import Tag

pytestmark = pytest.mark.testing

THIS_FILE = "test_assertions.py"


@pytest.fixture
def names(make_databases: Callable[..., list[str]]) -> list[str]:
    """Three databases."""
    return make_databases(3)


@pytest.fixture
def repo(make_repo: Callable[..., type[Repo]], names: list[str]) -> type[Repo]:
    """A repo whose default database is the first of them."""
    return make_repo(names[0])


def touch(repo: type[Repo], *names: str) -> None:
    for name in names:
        with repo.using(name):
            repo.count(Tag)


def listens(repo: type[Repo]) -> bool:
    return bool(repo._router.listeners.query)


def test_exactly_these_databases(repo: type[Repo], names: list[str], server: Server) -> None:
    """Nothing is said where the statements go to the databases that are expected, however they are named."""
    database = repo._router.databases.current
    for expected in (
        names[:2],
        [database, server.url(names[1])],
        [{"host": server.host, "port": server.port, "database": names[0]}, names[1]],
        [None, names[1], names[1]],
    ):
        with assert_databases_touched(repo, expected):
            touch(repo, *names[:2])
    with assert_databases_touched(repo, []):
        repo.get_database()
    assert not listens(repo)


def test_databases_that_were_missed(repo: type[Repo], names: list[str]) -> None:
    """Each that is expected and had no statement is named."""
    with pytest.raises(AssertionError) as raised, assert_databases_touched(repo, names, at_least=True):
        touch(repo, names[0])
    lines = str(raised.value).splitlines()
    assert lines == [
        "other databases were touched than expected:",
        *(f"  not touched: {repo._router.databases.current.server}/{name}" for name in sorted(names[1:])),
    ]
    assert not listens(repo)


def test_databases_that_were_not_expected(repo: type[Repo], names: list[str]) -> None:
    """Each is named with its first statement, and where that was sent from."""
    with pytest.raises(AssertionError) as raised, assert_databases_touched(repo, names[:1]):
        touch(repo, *names[:2])
        with repo.using(names[1]):
            repo.execute("SELECT 'second'")
    (line,) = str(raised.value).splitlines()[1:]
    assert line.startswith(f"  not expected: {repo._router.databases.current.server}/{names[1]}, by SELECT count(*)")
    assert f"{THIS_FILE}:" in line
    with assert_databases_touched(repo, names[:1], at_least=True):
        touch(repo, *names[:2])


def test_databases_touched_in_threads(repo: type[Repo], names: list[str]) -> None:
    """A statement counts in whatever thread it is sent."""
    with ThreadPoolExecutor(3) as executor, assert_databases_touched(repo, names):
        list(executor.map(lambda name: touch(repo, name), names))


def test_a_block_that_fails(repo: type[Repo], names: list[str]) -> None:
    """Its own error is what is raised, and nothing is left behind."""
    with pytest.raises(LookupError), assert_databases_touched(repo, names):
        raise LookupError
    with pytest.raises(LookupError), assert_no_leaks(repo), repo.session():
        raise LookupError
    assert not listens(repo)


def test_expected_databases_that_are_none(repo: type[Repo]) -> None:
    """What names no database is an error before the block runs, and so is one name in place of a list."""
    for expected, error in (("shard01", TypeError), ([""], ConfigError), ([{"databse": "x"}], ConfigError)):
        with pytest.raises(error), assert_databases_touched(repo, expected):  # type: ignore[arg-type]
            pytest.fail("the block ran")


def test_the_statements_of_a_repo(repo: type[Repo], names: list[str]) -> None:
    """They are those that its verbs send, in their order, by database; empty until the block ends."""
    touch(repo, *names)
    with count_statements(repo) as counted, count_statements(repo, database=names[1]) as second:
        repo.insert(Tag(label="one"))
        with repo.using(names[1]), repo.transaction():
            repo.all(Tag)
            repo.all(Tag)
        assert len(counted) == 0
    assert [statement.sql.split()[0] for statement in counted] == ["INSERT", "SELECT", "SELECT"]
    assert [statement.database for statement in counted] == [names[0], names[1], names[1]]
    assert counted.of(names[1]) == list(second) == counted.statements[1:]
    assert counted.of(names[2]) == []
    assert {(statement.pid, statement.application_name) for statement in counted} == {
        (None, repo._router.databases.config.application_name)
    }
    assert not listens(repo)


def test_the_statements_of_a_block_that_fails(repo: type[Repo]) -> None:
    """What the server refuses counts too, and so does what came before an error."""
    with pytest.raises(ProgrammingError), count_statements(repo) as counted:
        repo.execute("SELECT 1")
        repo.execute("SELECT nowhere")
    assert [statement.sql for statement in counted] == ["SELECT 1", "SELECT nowhere"]


def test_a_repo_and_its_server_count_the_same(repo: type[Repo], server: Server, names: list[str]) -> None:
    """For statements that commit themselves, the server's log has what the repo's events tell."""
    touch(repo, names[0])
    with count_statements(server, database=names[0]) as logged, count_statements(repo) as told:
        repo.insert(Tag(label="one"))
        repo.one(select(Tag.label))
    assert len(logged) == len(told) == 2
    assert logged.of(names[0]) == list(logged)
    assert all(statement.pid for statement in logged)


def test_nothing_leaks(repo: type[Repo]) -> None:
    """Nothing is said of what ends in the block, nor of what began before it."""
    with repo.connection(), assert_no_leaks(repo):
        with repo.detached(), repo.transaction():
            repo.count(Tag)
        thread = threading.Thread(target=repo.count, args=(Tag,))
        thread.start()
        thread.join()


def test_a_connection_that_leaks(make_repo: Callable[..., type[Repo]], names: list[str]) -> None:
    """It is named with what ends it; where it was taken is told if that is watched, else how to watch it."""
    for watch, told in ((None, "warn_after in the config"), (60.0, THIS_FILE)):
        repo = make_repo(names[0], warn_after=watch)
        repo.count(Tag)
        with pytest.raises(AssertionError) as raised, assert_no_leaks(repo):
            # Of a connection that was lent before.
            held = repo.connection()
            held.__enter__()
        held.__exit__(None, None, None)
        (line,) = str(raised.value).splitlines()[1:]
        assert f"a connection to {repo._router.databases.current.home}, held by" in line
        assert told in line
        assert "leave the block of its session" in line


def test_garbage_does_not_leak(repo: type[Repo]) -> None:
    """A connection whose holder is garbage is collected before anything is said."""
    with assert_no_leaks(repo):
        holder: list[Any] = [repo.session()]
        holder[0].execute(text("SELECT 1"))
        holder.append(holder)
        del holder
    assert repo.stats().in_use == 0


@pytest.fixture
def waiting() -> Iterator[Callable[[], None]]:
    """What a thread does until the test is over."""
    over = threading.Event()
    yield lambda: over.wait(60) and None
    over.set()


def test_a_thread_that_leaks(repo: type[Repo], waiting: Callable[[], None]) -> None:
    """A thread that still runs is named, also one that waits for an executor's next work; a daemon is not."""
    with pytest.raises(AssertionError) as raised, assert_no_leaks(repo):
        left = threading.Thread(target=waiting, name="left", daemon=False)
        left.start()
        executor = ThreadPoolExecutor(1, thread_name_prefix="idle")
        executor.submit(int).result()
        threading.Thread(target=waiting, name="daemon", daemon=True).start()
    executor.shutdown()
    assert str(raised.value).splitlines()[1:] == [
        "  the thread 'left': join it, or shut its executor down",
        "  the thread 'idle_0': join it, or shut its executor down",
    ]


def test_a_task_that_leaks(repo: type[Repo]) -> None:
    """A task that is pending is named with where it waits; the threads of the loop's own executor are no leak."""

    async def wait_for_ever() -> None:
        await asyncio.Event().wait()

    async def main() -> str:
        with pytest.raises(AssertionError) as raised, assert_no_leaks(repo):
            await asyncio.to_thread(repo.count, Tag)
            await asyncio.create_task(asyncio.sleep(0))
            left = asyncio.create_task(wait_for_ever(), name="left")
            await asyncio.sleep(0)
        left.cancel()
        return str(raised.value)

    (line,) = asyncio.run(main()).splitlines()[1:]
    assert line.startswith("  the task 'left', ")
    assert "wait_for_ever at " in line
    assert THIS_FILE in line
    assert line.endswith(": await or cancel it")
