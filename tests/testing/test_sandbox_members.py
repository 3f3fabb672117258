"""Who belongs to a sandbox: what it starts, what it allows, and nobody else; and how they share its connections."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import select, text

from shardrepo import CheckoutTimeoutError, ConfigError, Repo, SandboxError
from shardrepo.testing.servers import Server

from ..conftest import await_, books_balance, contents
from ..models import Tag
from ..proxy import Proxy

pytestmark = pytest.mark.testing

Make = Callable[..., type[Repo]]


@pytest.fixture
def repo(make_repo: Make, two_databases: tuple[str, str]) -> type[Repo]:
    return make_repo(two_databases[0])


def count(repo: type[Repo]) -> int:
    return repo.count(Tag)


def in_thread(function: Callable[[], Any], allow: Callable[[threading.Thread], object] = lambda _: None) -> Any:
    """What *function* returns or raises in a thread of its own, which is allowed first."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, name="a stranger")
    allow(thread)
    thread.start()
    thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


# Members


def test_tasks_and_to_thread_belong_to_it(repo: type[Repo]) -> None:
    """Without a word, whether they are started in it or it is entered in a loop that runs."""

    async def work() -> list[int]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(asyncio.to_thread(repo.insert, Tag(label=str(number)))) for number in range(5)]
        assert len(tasks) == 5
        return [count(repo), await asyncio.to_thread(count, repo)]

    async def enter() -> list[int]:
        with repo.sandbox():
            return await work()

    with repo.sandbox():
        assert asyncio.run(work()) == [5, 5]
    assert asyncio.run(enter()) == [5, 5]
    assert count(repo) == 0


def test_what_is_carried_belongs_to_it(repo: type[Repo]) -> None:
    """`carry` takes it along with the choice, and the thread is as it was afterwards."""
    with repo.sandbox(), ThreadPoolExecutor(1) as executor:
        repo.insert(Tag(label="seen"))
        assert executor.submit(repo.carry(count), repo).result() == 1
        with pytest.raises(SandboxError):
            executor.submit(count, repo).result()


def test_a_thread_that_nobody_allowed(repo: type[Repo], server: Server, two_databases: tuple[str, str]) -> None:
    """It is refused before anything is sent, and told what to do."""
    with repo.sandbox():
        repo.insert(Tag(label="seen"))
        for work in (count, lambda repo: repo.insert(Tag(label="real")), lambda repo: repo.session().connection()):
            with pytest.raises(SandboxError, match=r"a stranger belongs to no sandbox.*allow.*carry.*shared=True"):
                in_thread(lambda work=work: work(repo))  # type: ignore[misc]
    assert contents(server, two_databases[0]) == []
    assert in_thread(lambda: count(repo)) == 0


def test_a_thread_that_is_allowed(repo: type[Repo]) -> None:
    """It sees what the test has written, and what it writes is undone."""
    with repo.sandbox() as sandbox:
        repo.insert(Tag(label="seen"))
        assert in_thread(lambda: count(repo), sandbox.allow) == 1
        in_thread(lambda: repo.insert(Tag(label="by the thread")), sandbox.allow)
        assert count(repo) == 2
    assert count(repo) == 0


def test_an_executor_that_is_allowed(repo: type[Repo]) -> None:
    """What is submitted to it belongs to the sandbox until that ends, also by asyncio and `map`."""
    with ThreadPoolExecutor(2) as executor:
        with repo.sandbox() as sandbox:
            sandbox.allow(executor)
            repo.insert(Tag(label="seen"))

            async def ask() -> int:
                return await asyncio.get_running_loop().run_in_executor(executor, count, repo)

            assert asyncio.run(ask()) == 1
            assert list(executor.map(count, [repo, repo])) == [1, 1]
        assert executor.submit(count, repo).result() == 0
        with repo.sandbox(), pytest.raises(SandboxError):
            executor.submit(count, repo).result()


def test_an_executor_that_is_allowed_twice(repo: type[Repo]) -> None:
    """By one sandbox is as once; by two it is refused: what is submitted could not belong to both."""
    with ThreadPoolExecutor(1) as executor, repo.sandbox() as sandbox:
        sandbox.allow(executor)
        sandbox.allow(executor)
        repo.insert(Tag(label="seen"))
        assert executor.submit(count, repo).result() == 1

        def allow_in_another() -> None:
            with repo.sandbox() as other:
                other.allow(executor)

        with pytest.raises(ConfigError, match="allowed in another sandbox"):
            in_thread(allow_in_another)
    assert count(repo) == 0


@pytest.mark.parametrize("way", ["carry", "allow", "to_thread"])
def test_what_is_left_alone_where_a_thread_is_started(repo: type[Repo], server: Server, way: str) -> None:
    """In an unboxed block is so in the thread too, by whatever way that belongs to the sandbox."""

    def insert() -> None:
        repo.insert(Tag(label="stays"))

    with ThreadPoolExecutor(1) as executor, repo.sandbox() as sandbox:
        sandbox.allow(executor)
        with sandbox.unboxed():
            if way == "to_thread":
                asyncio.run(asyncio.to_thread(insert))
            else:
                executor.submit(repo.carry(insert) if way == "carry" else insert).result()
            assert repo.delete_all(Tag).count == 1
        executor.submit(insert).result()
        assert count(repo) == 1
    assert count(repo) == 0


def test_everybody_belongs_to_a_shared_one(repo: type[Repo]) -> None:
    """Any thread; so there can be no other sandbox beside it."""
    with repo.sandbox(shared=True):
        repo.insert(Tag(label="seen"))
        assert in_thread(lambda: count(repo)) == 1
        with pytest.raises(ConfigError, match="shared=True is open"):
            in_thread(lambda: repo.sandbox().__enter__())
    with repo.sandbox(), pytest.raises(ConfigError, match="open already"):
        in_thread(lambda: repo.sandbox(shared=True).__enter__())


def test_two_at_a_time(repo: type[Repo]) -> None:
    """Each thread has its own, and sees nothing of the other's."""
    turn = threading.Barrier(2)

    def test(label: str) -> list[str]:
        with repo.sandbox():
            repo.insert(Tag(label=label))
            turn.wait()
            found = [tag.label for tag in repo.all(Tag)]
            turn.wait()
            return found

    with ThreadPoolExecutor(2) as executor:
        assert list(executor.map(test, ["one", "other"])) == [["one"], ["other"]]
    assert count(repo) == 0


@pytest.mark.parametrize("what", ["main", 7, None, ProcessPoolExecutor])
def test_what_cannot_be_allowed(repo: type[Repo], what: Any) -> None:
    """Only threads, and executors that run them here."""
    with repo.sandbox() as sandbox:
        other = what() if isinstance(what, type) else what
        with pytest.raises(ConfigError, match=r"allow\(\) takes a thread or an executor of threads"):
            sandbox.allow(other)
        if isinstance(other, Executor):
            other.shutdown()


def test_a_child_process_is_no_member(repo: type[Repo]) -> None:
    """A forked one is refused: what the sandbox has is its parent's."""
    with repo.sandbox():
        repo.insert(Tag(label="seen"))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                count(repo)
                os.write(writing, b"it could")
            except SandboxError as error:
                os.write(writing, str(error).encode())
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        os.close(writing)
        with open(reading) as said:
            assert "this process was forked" in said.read()
        assert count(repo) == 1


# What outlives it


def test_a_thread_that_outlives_it(repo: type[Repo]) -> None:
    """It is refused from then on, whether there is another sandbox or none: it would write to the database itself."""
    begun, over = threading.Event(), threading.Event()

    def work() -> list[str]:
        begun.set()
        over.wait()
        said = []
        for _ in range(2):
            with pytest.raises(SandboxError, match="in a sandbox that is over") as caught:
                repo.insert(Tag(label="late"))
            said.append(str(caught.value))
            turn.wait()
            turn.wait()
        return said

    turn = threading.Barrier(2)
    with ThreadPoolExecutor(1) as executor:
        with repo.sandbox():
            late = executor.submit(repo.carry(work))
            begun.wait()
        over.set()
        turn.wait()
        with repo.sandbox():
            turn.wait()
            turn.wait()
        turn.wait()
        assert len(late.result()) == 2
    assert count(repo) == 0


def test_a_thread_that_was_allowed_and_outlives_it(repo: type[Repo]) -> None:
    """It is refused as well, until another sandbox allows it."""
    turn = threading.Barrier(2)
    said: list[str] = []

    def work() -> None:
        turn.wait()
        with pytest.raises(SandboxError, match="in a sandbox that is over"):
            repo.insert(Tag(label="late"))
        turn.wait()
        turn.wait()
        repo.insert(Tag(label="allowed again"))
        said.extend(repo.all(select(Tag.label)))

    thread = threading.Thread(target=work)
    with repo.sandbox() as sandbox:
        sandbox.allow(thread)
        thread.start()
    turn.wait()
    turn.wait()
    with repo.sandbox() as sandbox:
        sandbox.allow(thread)
        turn.wait()
        thread.join()
    assert said == ["allowed again"]
    assert count(repo) == 0


def test_a_task_that_outlives_it(repo: type[Repo]) -> None:
    """It is refused as well, and the test's own task is not."""

    async def main() -> None:
        over = asyncio.Event()

        async def work() -> None:
            await over.wait()
            repo.insert(Tag(label="late"))

        with repo.sandbox():
            late = asyncio.create_task(work())
            await asyncio.sleep(0)
        over.set()
        with pytest.raises(SandboxError, match="cancel it, before the test ends"):
            await late
        assert count(repo) == 0

    asyncio.run(main())


def test_a_sandbox_that_is_over_allows_nobody(repo: type[Repo]) -> None:
    """Neither does it leave anything alone."""
    with repo.sandbox() as sandbox:
        pass
    with pytest.raises(SandboxError, match="is over"):
        sandbox.allow(threading.Thread())
    with pytest.raises(SandboxError, match="is over"), sandbox.unboxed():
        raise AssertionError


# One at a time


def test_one_thread_at_a_time_has_a_connection(repo: type[Repo]) -> None:
    """A transaction of one is whole before another's begins, and all of them are kept."""
    with repo.sandbox(shared=True), ThreadPoolExecutor(8) as executor:

        def work(number: int) -> None:
            with repo.transaction():
                before = count(repo)
                repo.insert(Tag(label=f"one of {number}"))
                repo.insert(Tag(label=f"two of {number}"))
                assert count(repo) == before + 2

        list(executor.map(work, range(40)))
        assert count(repo) == 80


def test_a_wait_that_is_too_long_shows_both_stacks(make_repo: Make, two_databases: tuple[str, str]) -> None:
    """Where the connection was taken, where its thread is now, and who wanted it."""
    repo = make_repo(two_databases[0], checkout_timeout=0.1)
    taken, over = threading.Event(), threading.Event()

    def holds_it() -> None:
        with repo.transaction():
            repo.count(Tag)
            taken.set()
            over.wait()

    with repo.sandbox(shared=True):
        holder = threading.Thread(target=holds_it, name="the holder")
        holder.start()
        taken.wait()
        with pytest.raises(CheckoutTimeoutError, match="the holder has this one") as caught:
            count(repo)
        over.set()
        holder.join()
        said = str(caught.value)
        taken_at, _, rest = said.partition("Its thread is at:")
        is_at, _, wanted_at = rest.partition("Wanted at:")
        assert "in holds_it" in taken_at.replace("holds_it\n", "in holds_it\n")
        assert "over.wait()" in is_at
        assert "count(repo)" in wanted_at
        assert count(repo) == 0


def test_one_thread_may_have_several_of_it(repo: type[Repo]) -> None:
    """Its sessions and blocks are on the one connection, and end in whatever order."""
    with repo.sandbox():
        one, other = repo.session(), repo.session()
        one.add(Tag(label="one"))
        one.flush()
        other.add(Tag(label="other"))
        other.flush()
        one.commit()
        other.commit()
        one.close()
        other.close()
        with repo.engine().connect() as connection, repo.connection() as held:
            assert connection.execute(text("SELECT count(*) FROM tags")).scalar_one() == 2
            assert held.execute(text("SELECT count(*) FROM tags")).scalar_one() == 2
        assert count(repo) == 2


def test_a_thread_that_ends_without_returning_it(repo: type[Repo]) -> None:
    """It blocks nobody: nobody is left who could use it; the sandbox says so at its end."""
    sessions = []

    def leave_open() -> None:
        session = repo.session()
        session.add(Tag(label="never committed"))
        session.flush()
        sessions.append(session)

    with pytest.raises(SandboxError, match="a stranger took it at"), repo.sandbox() as sandbox:
        in_thread(leave_open, sandbox.allow)
        repo.insert(Tag(label="meanwhile"))
    sessions[0].close()
    assert count(repo) == 0


def test_a_session_that_is_collected_lets_the_next_one_have_it(repo: type[Repo]) -> None:
    """Also where another thread waits for it."""
    taken, over = threading.Event(), threading.Event()

    def forget() -> None:
        session = repo.session()
        session.add(Tag(label="never committed"))
        session.flush()
        taken.set()
        over.wait()
        del session
        gc.collect()
        done.wait()

    done = threading.Event()
    with repo.sandbox() as sandbox:
        forgetful = threading.Thread(target=forget)
        sandbox.allow(forgetful)
        forgetful.start()
        taken.wait()
        over.set()
        assert count(repo) == 0
        done.set()
        forgetful.join()


def test_threads_that_end_without_returning_it_block_nobody(repo: type[Repo]) -> None:
    """Others have it by turns from then on."""
    sessions = []

    def leave_open() -> None:
        session = repo.session()
        session.execute(text("SELECT 1"))
        sessions.append(session)

    with pytest.raises(SandboxError, match="still in use"), repo.sandbox() as sandbox:
        in_thread(leave_open, sandbox.allow)
        for number in range(3):
            assert count(repo) == number
            in_thread(lambda: repo.insert(Tag(label=str(count(repo)))), sandbox.allow)
    sessions[0].close()


def test_a_thread_that_waits_for_it_at_the_end(repo: type[Repo]) -> None:
    """It is told that the sandbox is over, at once."""
    waits = threading.Event()
    said: list[str] = []

    def wait() -> None:
        waits.set()
        with pytest.raises(SandboxError, match="in a sandbox that is over") as caught:
            count(repo)
        said.append(str(caught.value))

    waiting = threading.Thread(target=wait)
    with pytest.raises(SandboxError, match="still in use"), repo.sandbox() as sandbox:
        session = repo.session()
        session.execute(text("SELECT 1"))
        sandbox.allow(waiting)
        waiting.start()
        waits.wait()
    waiting.join()
    session.close()
    assert len(said) == 1


def test_a_thread_that_connects_at_the_end(
    make_repo: Make, two_databases: tuple[str, str], server: Server, proxy: Proxy
) -> None:
    """What it opens goes to the cache, and nothing is written on it."""
    repo = make_repo(two_databases[0], proxy)
    said: list[str] = []

    def connect() -> None:
        with pytest.raises(SandboxError, match="in a sandbox that is over") as caught:
            repo.insert(Tag(label="late"))
        said.append(str(caught.value))

    connecting = threading.Thread(target=connect)
    proxy.deafen(live=False)
    with repo.sandbox() as sandbox:
        sandbox.allow(connecting)
        connecting.start()
        await_(lambda: repo.stats().connecting == 1)
    proxy.restore()
    connecting.join()
    assert len(said) == 1
    assert (repo.stats().in_use, contents(server, two_databases[0])) == (0, [])
    assert books_balance(repo)
