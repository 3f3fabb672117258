"""Who inherits a choice and who does not, and who may use a transaction."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import select

from shardrepo import DEFAULT, ConfigError, NoDatabaseError, Repo, TransactionOwnerError, WrongDatabaseError
from shardrepo.testing.servers import Server

from ..conftest import await_connections, books_balance
from ..models import Tag
from .conftest import Pair

pytestmark = pytest.mark.routing


def here(repo: type[Repo]) -> str:
    """Which database a verb reaches, as the server says."""
    name: str = repo.execute("SELECT current_database()").scalar_one()
    return name


# Threads


def test_a_thread_starts_with_the_default(repo: type[Repo], pair: Pair) -> None:
    """A thread does not inherit a choice, and its own choice stays in it."""
    repo.set_database(pair.b)
    seen: list[str] = []

    def work() -> None:
        seen.append(here(repo))
        repo.set_database(pair.b)
        seen.append(here(repo))
        repo.set_database(None)

    thread = threading.Thread(target=contextvars.Context().run, args=(work,))
    thread.start()
    thread.join()
    assert seen == [pair.a, pair.b]
    assert here(repo) == pair.b


def test_an_executor_starts_with_the_default(repo: type[Repo], pair: Pair) -> None:
    """An executor's threads do not inherit a choice; a carried function brings it, and takes it away again."""
    repo.set_database(pair.b)
    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(here, repo).result() == pair.a
        assert executor.submit(repo.carry(here), repo).result() == pair.b
        assert executor.submit(here, repo).result() == pair.a

        def fail() -> None:
            assert here(repo) == pair.b
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            executor.submit(repo.carry(fail)).result()
        assert executor.submit(here, repo).result() == pair.a


def test_carry_takes_the_choice_of_the_place_where_it_was_called(repo: type[Repo], pair: Pair) -> None:
    """What is carried is the choice at the time of `carry`, and what the function chooses stays inside."""

    def work(name: str) -> tuple[str, str]:
        """Work."""
        before = here(repo)
        repo.set_database(name)
        return before, here(repo)

    with repo.using(pair.b):
        carried = repo.carry(work)
    assert carried.__doc__ == "Work."
    assert carried(pair.a) == (pair.b, pair.a)
    assert here(repo) == pair.a
    with repo.using(pair.b):
        assert repo.carry(work)(pair.a) == (pair.b, pair.a)
        assert here(repo) == pair.b


def test_carry_refuses_what_runs_later(repo: type[Repo]) -> None:
    """A coroutine function or a generator runs after the wrapper has returned: `TypeError`, at once."""

    async def coroutine() -> None: ...

    def generator() -> Iterator[int]:
        yield 1

    async def both() -> Any:
        yield 1

    for function in (coroutine, generator, both):
        with pytest.raises(TypeError, match="using"):
            repo.carry(function)


def test_threads_switch_without_meeting(repo: type[Repo], pair: Pair) -> None:
    """Many threads that switch all the time each reach what they chose, every time."""
    start = threading.Barrier(8)

    def work(number: int) -> list[tuple[str, str]]:
        start.wait(30)
        seen = []
        for step in range(40):
            name = (pair.a, pair.b)[(step + number) % 2]
            if step % 3:
                repo.set_database(name)
                seen.append((name, here(repo)))
                repo.set_database(None)
            else:
                with repo.using(name):
                    seen.append((name, here(repo)))
        return seen

    with ThreadPoolExecutor(8) as executor:
        seen = [one for some in executor.map(work, range(8)) for one in some]
    assert len(seen) == 320
    assert all(chosen == reached for chosen, reached in seen)
    assert books_balance(repo)


# Tasks


def test_a_task_inherits_and_keeps_its_choice_to_itself(repo: type[Repo], pair: Pair) -> None:
    """A task starts with its parent's choice and cannot change it, and neither can the parent change the task's."""

    async def child(go: asyncio.Event) -> list[str]:
        seen = [here(repo)]
        await go.wait()
        seen.append(here(repo))
        repo.set_database(pair.a)
        seen.append(here(repo))
        return seen

    async def parent() -> None:
        repo.set_database(pair.b)
        go = asyncio.Event()
        task = asyncio.create_task(child(go))
        await asyncio.sleep(0)
        repo.set_database(pair.a)
        go.set()
        assert await task == [pair.b, pair.b, pair.a]
        assert here(repo) == pair.a
        repo.set_database(pair.b)

    asyncio.run(parent())
    assert here(repo) == pair.a


def test_tasks_that_interleave(repo: type[Repo], pair: Pair) -> None:
    """Tasks that give way inside their `using` blocks do not see each other's choice."""

    async def work(name: str) -> set[str]:
        seen = set()
        with repo.using(name):
            for _ in range(10):
                await asyncio.sleep(0)
                seen.add(here(repo))
        return seen

    async def main() -> list[set[str]]:
        return await asyncio.gather(*(work(name) for name in (pair.a, pair.b) * 3))

    assert asyncio.run(main()) == [{pair.a}, {pair.b}] * 3


def test_to_thread_inherits(repo: type[Repo], pair: Pair) -> None:
    """`asyncio.to_thread` runs with its caller's choice and cannot change it."""

    def work() -> str:
        reached = here(repo)
        repo.set_database(pair.a)
        return reached

    async def main() -> None:
        repo.set_database(pair.b)
        assert await asyncio.to_thread(work) == pair.b
        assert here(repo) == pair.b

    asyncio.run(main())


def test_run_in_executor_starts_with_the_default(repo: type[Repo], pair: Pair) -> None:
    """`run_in_executor` copies no context: its function starts with the default, unless it is carried."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        with repo.using(pair.b), ThreadPoolExecutor(1) as executor:
            assert await loop.run_in_executor(executor, here, repo) == pair.a
            assert await loop.run_in_executor(executor, repo.carry(here), repo) == pair.b

    asyncio.run(main())


# Blocks


def test_using_restores_on_every_way_out(repo: type[Repo], pair: Pair) -> None:
    """A block restores what was chosen before it, also after an error and after choices made inside it."""
    assert repo.set_database(pair.b) is None
    with repo.using(pair.a):
        with pytest.raises(ZeroDivisionError), repo.using(pair.b):
            raise ZeroDivisionError
        assert repo.get_database().name == pair.a
        repo.set_database("elsewhere")
    assert repo.get_database().name == pair.b
    with repo.using(None):
        assert repo.get_database().name == pair.a
    with repo.using(DEFAULT):
        assert repo.get_database().name == pair.a
    assert repo.get_database().name == pair.b


def test_set_database_returns_what_restores(repo: type[Repo], pair: Pair) -> None:
    """What `set_database` returns, passed back, restores exactly what was chosen."""
    for choice in (pair.b, {"database": pair.b}, pair.server.url(pair.b), DEFAULT):
        repo.set_database(choice)
        expected = repo.get_database()
        before = repo.set_database("elsewhere")
        assert repo.set_database(before) is not None
        assert repo.get_database() == expected
        assert repo.set_database(None) == before


def test_choices_do_not_add_up(repo: type[Repo], pair: Pair) -> None:
    """Options merge into the default, never into what was chosen before."""
    repo.set_database(host="127.0.0.1", port=1, database="elsewhere", username="somebody")
    repo.set_database(pair.b)
    database = repo.get_database()
    assert (database.port, database.name, database.username) == (pair.server.port, pair.b, pair.server.username)


def test_a_wrong_choice_changes_nothing(repo: type[Repo], pair: Pair) -> None:
    """A misspelt or empty choice is an error with a suggestion, and the choice stays what it was."""
    repo.set_database(pair.b)
    wrong: list[Callable[[], Any]] = [
        lambda: repo.set_database(databse="x"),  # type: ignore[call-arg]  # the point
        lambda: repo.set_database(""),
        lambda: repo.set_database({}),
        lambda: repo.set_database(5),  # type: ignore[arg-type]  # the point
        lambda: repo.set_database(),
        lambda: repo.set_database("x", port=1),
        lambda: repo.set_database(port=0),
        lambda: repo.set_database(port="5432"),  # type: ignore[arg-type]  # the point
        lambda: repo.using().__enter__(),
        lambda: repo.using(databse="x").__enter__(),  # type: ignore[call-arg]  # the point
    ]
    for choose in wrong:
        with pytest.raises(ConfigError):
            choose()
        assert here(repo) == pair.b
    with pytest.raises(ConfigError, match="did you mean 'database'"):
        wrong[0]()


def test_a_generator_sees_the_choice_of_whoever_runs_it(repo: type[Repo], pair: Pair) -> None:
    """A generator has no context of its own: a block inside it is seen outside while it is suspended.

    That is Python's; what is ours is that the choice is right again when it has ended.
    """

    def generator() -> Generator[str]:
        with repo.using(pair.b):
            yield here(repo)

    running = generator()
    assert next(running) == pair.b
    assert here(repo) == pair.b
    running.close()
    assert here(repo) == pair.a
    assert list(generator()) == [pair.b]
    assert here(repo) == pair.a


@contextmanager
def dependency(repo: type[Repo], name: str) -> Iterator[None]:
    """As a web framework has it: a function that yields once, around the handler."""
    with repo.using(name):
        yield


def test_a_framework_that_runs_both_halves_in_copies(
    repo: type[Repo], pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """A block whose halves run in copies of the context raises nothing and leaks nothing, and is logged as an error."""
    block = dependency(repo, pair.b)
    with caplog.at_level(logging.ERROR, "shardrepo"):
        contextvars.copy_context().run(block.__enter__)
        assert here(repo) == pair.a
        contextvars.copy_context().run(block.__exit__, None, None, None)
    assert here(repo) == pair.a
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "middleware" in caplog.text


def test_a_framework_that_runs_both_halves_in_threads(
    repo: type[Repo], pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """The same in worker threads, as frameworks run synchronous dependencies: their next work is on the default."""
    block = dependency(repo, pair.b)
    with ThreadPoolExecutor(1) as executor, caplog.at_level(logging.ERROR, "shardrepo"):
        executor.submit(contextvars.copy_context().run, block.__enter__).result()
        executor.submit(contextvars.copy_context().run, block.__exit__, None, None, None).result()
        assert executor.submit(here, repo).result() == pair.a
    assert "another context" in caplog.text


def test_a_block_left_in_the_context_that_it_was_entered_in_is_not_logged(
    repo: type[Repo], pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """A middleware's block, around everything, restores in silence, whatever was chosen inside."""
    with caplog.at_level(logging.DEBUG, "shardrepo"):
        context = contextvars.copy_context()
        block = dependency(repo, pair.b)
        context.run(block.__enter__)
        context.run(repo.set_database, "elsewhere")
        context.run(block.__exit__, None, None, None)
        assert context.run(here, repo) == pair.a
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_transaction_whose_halves_run_in_copies(repo: type[Repo], pair: Pair) -> None:
    """A transaction entered in a copy of the context is nobody else's, and gives its connection back at its end."""
    block = repo.transaction()
    contextvars.copy_context().run(block.__enter__)
    assert not repo.in_transaction()
    contextvars.copy_context().run(block.__exit__, None, None, None)
    assert repo.stats().in_use == 0
    assert not repo.in_transaction()


# Several repos


def test_two_repos_have_a_choice_and_a_cache_each(
    repo: type[Repo], pair: Pair, make_repo: Callable[..., type[Repo]], server: Server
) -> None:
    """Two repos do not share choice, transaction or connections."""
    other = make_repo(pair.a)
    repo.set_database(pair.b)
    assert (here(repo), here(other)) == (pair.b, pair.a)
    with repo.transaction():
        repo.insert(Tag(label="in a transaction"))
        assert not other.in_transaction()
        other.set_database(pair.b)
        assert not other.exists(select(Tag).where(Tag.label == "in a transaction"))
    other.dispose()
    assert here(repo) == pair.b


def test_a_subclass_without_a_config_shares(repo: type[Repo], pair: Pair) -> None:
    """A subclass without a config of its own has its parent's choice, transaction and connections."""
    child: type[Repo] = type("Child", (repo,), {})
    child.set_database(pair.b)
    assert here(repo) == pair.b
    with repo.transaction():
        assert child.in_transaction()
        child.insert(Tag(label="x"))
    assert child.stats() == repo.stats()
    assert repo.stats().attempts == 1


def test_a_subclass_with_a_config_has_its_own(repo: type[Repo], pair: Pair, server: Server) -> None:
    """A subclass with a config has its own choice, transaction and cache."""
    child: type[Repo] = type("Child", (repo,), {}, config={"url": server.url(pair.b)})
    assert (here(repo), here(child)) == (pair.a, pair.b)
    child.set_database(pair.a)
    repo.set_database(pair.b)
    assert (here(repo), here(child)) == (pair.b, pair.a)
    with repo.transaction():
        assert not child.in_transaction()
    child.dispose()
    assert here(repo) == pair.b


def test_an_object_fits_every_repo_on_its_database(
    repo: type[Repo], pair: Pair, make_repo: Callable[..., type[Repo]]
) -> None:
    """A home is an address: what one repo loaded, another one on the same database can write."""
    other = make_repo(pair.b)
    tag = repo.get_one(Tag, 1)
    with pytest.raises(WrongDatabaseError):
        other.update(tag, label="x")
    other.set_database(pair.a)
    other.update(tag, label="x")
    assert repo.get_one(Tag, 1).label == "x"


def test_require_database(pair: Pair, make_repo: Callable[..., type[Repo]]) -> None:
    """With `require_database` nothing falls back: what chose nothing is refused, what says DEFAULT is not."""
    repo = make_repo(pair.a, require_database=True)
    for verb in (lambda: repo.get(Tag, 1), repo.session, repo.transaction().__enter__, repo.get_database, repo.ping):
        with pytest.raises(NoDatabaseError, match="require_database"):
            verb()
    with repo.using(pair.b):
        assert here(repo) == pair.b
        with ThreadPoolExecutor(1) as executor, pytest.raises(NoDatabaseError):
            executor.submit(here, repo).result()
        with repo.using(None), pytest.raises(NoDatabaseError):
            repo.count(Tag)
    with repo.using(DEFAULT):
        assert here(repo) == pair.a


def test_a_config_that_names_no_database(pair: Pair, make_repo: Callable[..., type[Repo]]) -> None:
    """A config without a database has no default: something has to be chosen, and a name is enough."""
    repo = make_repo(None)
    with pytest.raises(NoDatabaseError):
        repo.count(Tag)
    repo.set_database(pair.b)
    assert here(repo) == pair.b


def test_a_config_callable_is_called_once_at_the_first_use(pair: Pair) -> None:
    """A config given as a callable is called when a database is first needed, and once, by however many threads."""
    called: list[int] = []

    def config() -> dict[str, Any]:
        called.append(1)
        return {"url": pair.server.url(pair.a)}

    repo: type[Repo] = type("Late", (Repo,), {}, config=config)
    repo.set_database(pair.b)
    assert len(called) == 0
    with ThreadPoolExecutor(4) as executor:
        assert list(executor.map(repo.carry(here), [repo] * 8)) == [pair.b] * 8
    assert len(called) == 1
    repo.dispose()


# Whose transaction it is


def test_a_child_task_inside_a_transaction(repo: type[Repo], pair: Pair) -> None:
    """A task started inside a transaction may not use it: it gets an error, and the transaction commits."""

    async def child() -> None:
        verbs: list[Callable[[], Any]] = [
            lambda: repo.get(Tag, 1),
            lambda: repo.insert(Tag(label="child")),
            lambda: repo.execute("DELETE FROM tags"),
            lambda: repo.session(),
            lambda: repo.transaction().__enter__(),
        ]
        for verb in verbs:
            with pytest.raises(TransactionOwnerError) as caught:
                verb()
            assert caught.value.home == pair.home(pair.a)
        with repo.detached():
            repo.insert(Tag(label="detached"))
            assert not repo.exists(select(Tag).where(Tag.label == "parent"))
        with repo.using(pair.b):
            repo.insert(Tag(label="elsewhere"))

    async def parent() -> None:
        with repo.transaction():
            repo.insert(Tag(label="parent"))
            await asyncio.create_task(child())
            assert repo.in_transaction()
            repo.insert(Tag(label="parent, later"))

    asyncio.run(parent())
    labels = [("detached",), ("parent",), ("parent, later",), ("t of A",)]
    assert pair.sql(pair.a, "SELECT label FROM tags ORDER BY 1") == labels
    assert pair.sql(pair.b, "SELECT count(*) FROM tags WHERE label = 'elsewhere'") == [(1,)]
    assert repo.stats().in_use == 0


def test_to_thread_inside_a_transaction(repo: type[Repo], pair: Pair) -> None:
    """`asyncio.to_thread` inherits the context, and yet is another thread: it may not use the transaction."""

    async def main() -> None:
        with repo.transaction():
            repo.insert(Tag(label="main"))
            with pytest.raises(TransactionOwnerError):
                await asyncio.to_thread(repo.get, Tag, 1)

    asyncio.run(main())
    assert pair.sql(pair.a, "SELECT count(*) FROM tags WHERE label = 'main'") == [(1,)]


def test_a_child_task_may_not_switch_its_parents_transaction(repo: type[Repo], pair: Pair) -> None:
    """A child task may choose another database: the transaction is not its own."""

    async def child() -> str:
        repo.set_database(pair.b)
        return here(repo)

    async def parent() -> None:
        with repo.transaction():
            assert await asyncio.create_task(child()) == pair.b
            assert here(repo) == pair.a

    asyncio.run(parent())


def test_a_cancelled_task_rolls_back(repo: type[Repo], pair: Pair) -> None:
    """A task that is cancelled in its transaction leaves nothing of it, and no connection in use."""

    async def child(inside: asyncio.Event) -> None:
        with repo.transaction():
            repo.insert(Tag(label="cancelled"))
            inside.set()
            await asyncio.Event().wait()

    async def main() -> None:
        inside = asyncio.Event()
        task = asyncio.create_task(child(inside))
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert pair.sql(pair.a, "SELECT count(*) FROM tags WHERE label = 'cancelled'") == [(0,)]
    assert repo.stats().in_use == 0


def test_a_thread_that_is_told_nothing_is_independent(repo: type[Repo], pair: Pair) -> None:
    """A plain thread inherits neither choice nor transaction: its work is its own."""
    with pytest.raises(ZeroDivisionError), repo.transaction():
        repo.insert(Tag(label="outer"))
        thread = threading.Thread(target=contextvars.Context().run, args=(repo.insert, Tag(label="thread")))
        thread.start()
        thread.join()
        raise ZeroDivisionError
    assert pair.sql(pair.a, "SELECT label FROM tags ORDER BY 1") == [("t of A",), ("thread",)]


FORK = """
    import gc, os, sys, traceback
    from sqlalchemy import text
    from shardrepo import Repo, TransactionOwnerError
    from tests.models import Tag

    class MyRepo(Repo, config={"url": sys.argv[1], "application_name": "forking"}):
        pass

    def backend():
        return MyRepo.execute("SELECT pg_backend_pid()").scalar_one()

    def in_child(work):
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                work()
                answer = "ok"
            except BaseException:
                answer = traceback.format_exc()
            os.write(write, answer.encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        assert answer == "ok", answer
"""

FORKED = {
    "a child inside a transaction gets an error for every verb, and the parent commits": """
        def work():
            for verb in (
                lambda: MyRepo.get(Tag, 1),
                lambda: MyRepo.insert(Tag(label="child")),
                lambda: MyRepo.execute("DELETE FROM tags"),
                lambda: MyRepo.session(),
                lambda: MyRepo.transaction().__enter__(),
                lambda: session.execute(text("DELETE FROM tags")),
            ):
                try:
                    verb()
                except TransactionOwnerError:
                    pass
                except Exception as error:
                    assert "parent process" in str(error), error
                else:
                    raise AssertionError("not refused")
            with MyRepo.detached():
                assert backend() != parents

        with MyRepo.transaction():
            MyRepo.insert(Tag(label="before"))
            parents = backend()
            session = MyRepo.session()
            in_child(work)
            MyRepo.insert(Tag(label="after"))
            assert backend() == parents
        assert sorted(MyRepo.all(Tag), key=lambda tag: tag.id)[-1].label == "after"
    """,
    "a child that leaves its parent's block by an error rolls nothing back": """
        class Left(Exception):
            pass

        pid = os.getpid()
        try:
            with MyRepo.transaction():
                MyRepo.insert(Tag(label="before"))
                if not (child := os.fork()):
                    raise Left
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
                MyRepo.insert(Tag(label="after"))
        except Left:
            assert os.getpid() != pid
            gc.collect()
            assert not MyRepo.in_transaction()
            assert backend()
            os._exit(7)
        assert {tag.label for tag in MyRepo.all(Tag)} >= {"before", "after"}
    """,
    "a child uses connections of its own, and its parent's stay usable": """
        parents = backend()

        def work():
            assert MyRepo.stats().attempts == 0
            assert backend() != parents
            assert backend() != parents
            MyRepo.insert(Tag(label="child"))
            MyRepo.disconnect_all()
            MyRepo.dispose()
            gc.collect()

        for _ in range(2):
            in_child(work) if _ == 0 else in_child(lambda: (MyRepo.disconnect_all(), MyRepo.dispose()))
            assert backend() == parents
        assert MyRepo.stats().attempts == 1
        assert MyRepo.count(Tag) == 2
    """,
    "a child that exits normally closes nothing of its parent's": """
        parents = backend()
        session = MyRepo.session()
        session.execute(text("SELECT 1"))
        if not (child := os.fork()):
            sys.exit(0)
        os.waitpid(child, 0)
        assert session.execute(text("SELECT 1")).scalar_one() == 1
        session.close()
        assert backend() == parents
    """,
    "a child that drops what its parent had borrowed closes nothing": """
        session = MyRepo.session()
        pid = session.execute(text("SELECT pg_backend_pid()")).scalar_one()

        def work():
            global session
            session = None
            gc.collect()
            assert backend() != pid
            stats = MyRepo.stats()
            assert stats.attempts - stats.failed - stats.closed == stats.in_use + stats.idle == 1, stats

        in_child(work)
        assert session.execute(text("SELECT pg_backend_pid()")).scalar_one() == pid
        session.close()
    """,
    "a child forked while threads hold the cache's locks works": """
        import threading
        stop = threading.Event()
        MyRepo.count(Tag)  # which imports the driver: Python itself cannot be forked while another thread imports

        def churn():
            while not stop.is_set():
                MyRepo.stats()
                MyRepo.count(Tag)

        threads = [threading.Thread(target=churn) for _ in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            in_child(lambda: MyRepo.count(Tag))
        stop.set()
        for thread in threads:
            thread.join()
    """,
}


@pytest.mark.parametrize("case", FORKED)
def test_a_forked_child(server: Server, pair: Pair, case: str) -> None:
    """What a forked child may do with its parent's repo."""
    url = server.url(pair.a).render_as_string(hide_password=False)
    script = textwrap.dedent(FORK) + textwrap.dedent(FORKED[case]) + "\nMyRepo.dispose()\n"
    options = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, *options, "-c", script, url], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    gc.collect()


def test_forks_leave_no_connection(server: Server, pair: Pair) -> None:
    """When parent and child have ended, the server has none of their connections."""
    test_a_forked_child(server, pair, "a child uses connections of its own, and its parent's stay usable")
    await_connections(server, "forking", [])
