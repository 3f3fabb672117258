"""Choices in blocks, generators, threads and tasks: whose they are, and that they never bleed. Opens no connection."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from typing import Any, TypeVar

import pytest

from shardrepo import DEFAULT, ConfigError, Database, NoDatabaseError, Repo

T = TypeVar("T")


@pytest.fixture
def repo() -> type[Repo]:
    """A repo whose server is never connected to."""

    class App(Repo, config={"url": "postgresql://db01/app"}):
        pass

    return App


def name(repo: type[Repo]) -> str:
    return repo.get_database().name


def in_thread(function: Callable[[], T]) -> T:
    """Run *function* in a thread of its own."""
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(function).result()


# Choosing


def test_nothing_chosen_is_the_default(repo: type[Repo]) -> None:
    """A repo starts with the database of its config."""
    assert repo.get_database() == Database("db01", 5432, "app")


def test_a_choice_stays_until_the_next(repo: type[Repo]) -> None:
    """set_database is for all that follows, None takes it back."""
    repo.set_database("shard02")
    assert name(repo) == "shard02"
    repo.set_database("shard03")
    assert name(repo) == "shard03"
    repo.set_database(None)
    assert name(repo) == "app"


@pytest.mark.parametrize("before", [None, "shard02", DEFAULT, Database("db02", 1, "x"), {"host": "db03", "port": 7}])
def test_what_set_database_returns_restores_exactly_that(repo: type[Repo], before: Any) -> None:
    """Passing back what was chosen before chooses it again, nothing if it was nothing."""
    assert repo.set_database(before) is None
    chosen = repo.get_database()
    returned = repo.set_database("other")
    assert (returned is None) == (before is None)
    again = repo.set_database(returned)
    assert repo.get_database() == chosen
    assert repo.set_database(again) == returned


def test_nothing_restored_is_nothing_chosen() -> None:
    """With a database required, going back to nothing is not going back to the default."""

    class App(Repo, config={"url": "postgresql://db01/app", "require_database": True}):
        pass

    before = App.set_database("shard02")
    assert name(App) == "shard02"
    App.set_database(before)
    with pytest.raises(NoDatabaseError):
        App.get_database()
    with App.using(DEFAULT):
        assert name(App) == "app"
        with App.using(None), pytest.raises(NoDatabaseError):
            App.get_database()


@pytest.mark.parametrize("wrong", ["", "a\0b", 7, {}, {"databse": "x"}])
def test_a_wrong_choice_leaves_the_choice_as_it_was(repo: type[Repo], wrong: Any) -> None:
    """Neither set_database nor using changes anything when they raise."""
    repo.set_database("shard02")
    with pytest.raises(ConfigError):
        repo.set_database(wrong)
    with pytest.raises(ConfigError):
        repo.using(wrong)
    assert name(repo) == "shard02"


def test_no_argument_is_no_choice(repo: type[Repo]) -> None:
    """Calling without one is a mistake, not the default."""
    repo.set_database("shard02")
    with pytest.raises(ConfigError, match="no database given"):
        repo.set_database()
    with pytest.raises(ConfigError, match="no database given"):
        repo.using()
    assert name(repo) == "shard02"


def test_choosing_does_no_io(repo: type[Repo], monkeypatch: pytest.MonkeyPatch) -> None:
    """No socket, no look-up of a name, no connection in the books."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("I/O")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    repo.set_database(host="db02", database="shard201")
    with repo.using("shard202"):
        assert repo.get_database().home == "db01:5432/shard202"
    assert repo.get_database().home == "db02:5432/shard201"
    assert repo.stats().attempts == 0


# Blocks


class Stop(Exception):
    """Raised by a test."""


@pytest.mark.parametrize("outer", [None, "shard02"])
def test_a_block_restores_what_was_before_it(repo: type[Repo], outer: str | None) -> None:
    """Blocks nest, and each end is the state before its beginning."""
    repo.set_database(outer)
    before = name(repo)
    with repo.using("one"):
        with repo.using("two"):
            assert name(repo) == "two"
        assert name(repo) == "one"
        with repo.using(DEFAULT):
            assert name(repo) == "app"
        assert name(repo) == "one"
    assert name(repo) == before


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_block_restores_on_every_way_out(repo: type[Repo], error: type[BaseException]) -> None:
    """Exceptions pass through unchanged, and each level is restored on the way."""
    seen = []
    thrown = error()

    def work() -> None:
        with repo.using("one"):
            try:
                with repo.using("two"):
                    raise thrown
            finally:
                seen.append(name(repo))

    with pytest.raises(error) as caught:
        work()
    assert caught.value is thrown
    assert seen == ["one"]
    assert name(repo) == "app"


def test_a_block_is_left_by_return_break_and_continue(repo: type[Repo]) -> None:
    """These are ways out like others."""

    def leave() -> str:
        with repo.using("one"):
            return name(repo)

    assert leave() == "one"
    for _ in range(2):
        with repo.using("two"):
            continue
    for _ in range(2):
        with repo.using("three"):
            break
    assert name(repo) == "app"


def test_a_choice_inside_a_block_ends_with_the_block(repo: type[Repo]) -> None:
    """set_database within `using` is for the rest of that block."""
    repo.set_database("before")
    with repo.using("one"):
        repo.set_database("changed")
        assert name(repo) == "changed"
        with repo.using("two"):
            repo.set_database(None)
            assert name(repo) == "app"
        assert name(repo) == "changed"
    assert name(repo) == "before"


def test_a_block_chooses_when_it_is_entered(repo: type[Repo]) -> None:
    """Making one is not choosing, and what is restored is what was chosen when it was entered."""
    block = repo.using("one")
    assert name(repo) == "app"
    repo.set_database("later")
    with block:
        assert name(repo) == "one"
    assert name(repo) == "later"


def test_using_decorates_a_function(repo: type[Repo]) -> None:
    """As a decorator it is a block around each call."""

    @repo.using("one")  # type: ignore[operator,untyped-decorator,unused-ignore]  # contextlib's are decorators too
    def work() -> str:
        return name(repo)

    assert [work(), work()] == ["one", "one"]
    assert name(repo) == "app"


def test_blocks_of_an_exit_stack(repo: type[Repo]) -> None:
    """However many blocks are left at once, what was before the first is restored."""
    with ExitStack() as stack:
        for number in range(50):
            stack.enter_context(repo.using(f"shard{number}"))
        assert name(repo) == "shard49"
    assert name(repo) == "app"


# Blocks that are left elsewhere


def test_a_block_left_in_another_context_logs_and_changes_nothing(
    repo: type[Repo], caplog: pytest.LogCaptureFixture
) -> None:
    """As a framework does it that runs both halves of a dependency in copies of the request's context."""
    repo.set_database("mine")
    block = repo.using("theirs")
    copy_context().run(block.__enter__)
    assert name(repo) == "mine"
    other = copy_context()
    other.run(block.__exit__, None, None, None)
    assert other.run(name, repo) == "mine"
    assert name(repo) == "mine"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("shardrepo.context", logging.ERROR)
    assert "theirs" in record.getMessage()
    assert "middleware" in record.getMessage()


def test_a_block_left_in_another_context_passes_the_error_on(
    repo: type[Repo], caplog: pytest.LogCaptureFixture
) -> None:
    """The handler's own error is the one that is seen."""
    block = repo.using("theirs")
    copy_context().run(block.__enter__)
    error = Stop()
    assert not copy_context().run(block.__exit__, Stop, error, None)
    assert len(caplog.records) == 1


def test_a_block_left_in_a_thread_changes_neither(repo: type[Repo], caplog: pytest.LogCaptureFixture) -> None:
    """Entered here and left there: there is nothing to restore there, and here the choice stays to be seen."""
    repo.set_database("mine")
    block = repo.using("theirs")
    block.__enter__()
    in_thread(lambda: block.__exit__(None, None, None))
    assert in_thread(lambda: name(repo)) == "app"
    assert name(repo) == "theirs"
    assert len(caplog.records) == 1


def test_a_block_left_elsewhere_does_not_undo_a_choice_made_there(
    repo: type[Repo], caplog: pytest.LogCaptureFixture
) -> None:
    """What another context chose, in a block of its own or without, is not taken from it."""
    block = repo.using("theirs")
    copy_context().run(block.__enter__)
    with repo.using("mine"):
        block.__exit__(None, None, None)
        assert name(repo) == "mine"
    repo.set_database("mine too")
    assert name(repo) == "mine too"
    assert len(caplog.records) == 1


def test_a_block_entered_and_left_in_its_own_context_logs_nothing(
    repo: type[Repo], caplog: pytest.LogCaptureFixture
) -> None:
    """Copying a context inside a block and leaving the block in both is not an error of the first."""
    with repo.using("one"):
        copied = copy_context()
        assert copied.run(name, repo) == "one"
        copied.run(repo.set_database, "two")
        assert name(repo) == "one"
    assert name(repo) == "app"
    assert copied.run(name, repo) == "two"
    assert caplog.records == []


# Generators


def held(repo: type[Repo], database: str) -> Generator[str]:
    """Hold a block open over its yields."""
    with repo.using(database):
        while True:
            yield name(repo)


def test_generators_that_end_in_order_leave_nothing(repo: type[Repo]) -> None:
    """The block of a generator is its caller's until the generator ends."""
    one = held(repo, "one")
    assert next(one) == "one"
    two = held(repo, "two")
    assert next(two) == "two"
    two.close()
    assert name(repo) == "one"
    assert next(one) == "one"
    one.close()
    assert name(repo) == "app"


def test_a_block_held_by_a_generator_ends_inside_the_callers_block(
    repo: type[Repo], caplog: pytest.LogCaptureFixture
) -> None:
    """A caller's own block, entered later and left earlier, is restored to what it found."""
    one = held(repo, "one")
    next(one)
    with repo.using("mine"):
        assert name(repo) == "mine"
    assert name(repo) == "one"
    one.close()
    assert name(repo) == "app"
    assert caplog.records == []


def test_a_generator_ended_after_the_block_it_started_in_cannot_undo_the_callers_choice(
    repo: type[Repo], caplog: pytest.LogCaptureFixture
) -> None:
    """Its block is no part of what is chosen then: nothing is restored, and it is logged."""
    with repo.using("mine"):
        one = held(repo, "one")
        next(one)
    assert name(repo) == "app"
    repo.set_database("later")
    one.close()
    assert name(repo) == "later"
    assert len(caplog.records) == 1


def test_generators_that_end_out_of_order_do_not_resurrect_a_choice(
    repo: type[Repo], caplog: pytest.LogCaptureFixture
) -> None:
    """When the first ends before the second, the second's end does not bring the first's choice back."""
    one, two = held(repo, "one"), held(repo, "two")
    next(one)
    next(two)
    one.close()
    assert name(repo) == "app"
    two.close()
    assert name(repo) == "app"
    assert len(caplog.records) == 1


def test_a_generator_in_a_context_of_its_own_is_apart(repo: type[Repo], caplog: pytest.LogCaptureFixture) -> None:
    """Generators driven in contexts of their own interleave without a trace."""
    contexts = {database: copy_context() for database in ("one", "two", "three")}
    generators = {database: held(repo, database) for database in contexts}
    for _ in range(3):
        for database, context in contexts.items():
            assert context.run(next, generators[database]) == database
            assert name(repo) == "app"
    for database, context in contexts.items():
        context.run(generators[database].close)
        assert context.run(name, repo) == "app"
    assert caplog.records == []


# Threads


def test_a_thread_starts_with_the_default(repo: type[Repo]) -> None:
    """A choice is not seen by other threads, however it was made."""
    repo.set_database("mine")
    assert in_thread(lambda: name(repo)) == "app"
    with repo.using("mine too"):
        assert in_thread(lambda: name(repo)) == "app"


def test_a_thread_cannot_change_anothers_choice(repo: type[Repo]) -> None:
    """What a thread chooses is its own, and gone when it ends."""
    repo.set_database("mine")
    with ThreadPoolExecutor(1) as executor:
        executor.submit(repo.set_database, "theirs").result()
        assert executor.submit(name, repo).result() == "theirs"
        assert name(repo) == "mine"


def test_carry_takes_the_choice_into_another_thread(repo: type[Repo]) -> None:
    """It is the choice of when carry was called, and the thread has its own again afterwards."""

    def work(number: int, *, plus: int = 0) -> tuple[str, int]:
        return name(repo), number + plus

    repo.set_database("mine")
    carried = repo.carry(work)
    repo.set_database("later")
    with ThreadPoolExecutor(1) as executor:
        executor.submit(repo.set_database, "theirs").result()
        assert executor.submit(carried, 1, plus=2).result() == ("mine", 3)
        assert executor.submit(name, repo).result() == "theirs"
    assert carried.__name__ == "work"


def test_carry_restores_the_threads_choice_after_an_error(repo: type[Repo]) -> None:
    """Also what the function chose itself does not stay in the executor's thread."""

    def work() -> None:
        repo.set_database("worse")
        raise Stop

    with repo.using("mine"):
        carried = repo.carry(work)
    with ThreadPoolExecutor(1) as executor:
        with pytest.raises(Stop):
            executor.submit(carried).result()
        assert executor.submit(name, repo).result() == "app"


def test_a_carried_function_runs_in_many_threads_at_once(repo: type[Repo]) -> None:
    """One carried function may be mapped over an executor: all of its threads see the choice at the same time."""
    together = threading.Barrier(4, timeout=10)

    def work(number: int) -> str:
        before = name(repo)
        together.wait()
        repo.set_database(f"own{number}")
        together.wait()
        return f"{before} {name(repo)}"

    with repo.using("mine"), ThreadPoolExecutor(4) as executor:
        seen = list(executor.map(repo.carry(work), range(8)))
        assert name(repo) == "mine"
    assert seen == [f"mine own{number}" for number in range(8)]


def test_carry_without_a_choice_carries_the_default(repo: type[Repo]) -> None:
    """Nothing chosen here is nothing chosen there."""
    carried = repo.carry(lambda: name(repo))
    with ThreadPoolExecutor(1) as executor:
        executor.submit(repo.set_database, "theirs").result()
        assert executor.submit(carried).result() == "app"


async def _coroutine() -> None: ...


async def _async_generator() -> AsyncIterator[None]:
    yield


def _generator() -> Iterator[None]:
    yield


@pytest.mark.parametrize("function", [_coroutine, _async_generator, _generator])
def test_carry_refuses_what_runs_after_it_has_returned(repo: type[Repo], function: Any) -> None:
    """A coroutine or generator function would run its body without the choice."""
    with pytest.raises(TypeError, match="plain function"):
        repo.carry(function)


def test_carry_refuses_a_callable_object_that_is_a_coroutine_function(repo: type[Repo]) -> None:
    """An object with an async __call__ is one too."""

    class Work:
        async def __call__(self) -> None: ...

    with pytest.raises(TypeError, match="plain function"):
        repo.carry(Work())


# Tasks


def test_a_task_inherits_the_choice_and_cannot_change_its_parents(repo: type[Repo]) -> None:
    """A task sees what was chosen when it was made, and what it chooses is its own."""

    async def child() -> tuple[str, str]:
        before = name(repo)
        repo.set_database("childs")
        await asyncio.sleep(0)
        return before, name(repo)

    async def parent() -> None:
        repo.set_database("parents")
        task = asyncio.create_task(child())
        repo.set_database("later")
        assert await task == ("parents", "childs")
        assert name(repo) == "later"
        await child()
        assert name(repo) == "childs"  # awaited without a task it is the parent's own code

    asyncio.run(parent())
    assert name(repo) == "app"


def test_to_thread_inherits_the_choice_and_cannot_change_it(repo: type[Repo]) -> None:
    """asyncio.to_thread takes the context along."""

    def work() -> str:
        before = name(repo)
        repo.set_database("threads")
        return before

    async def parent() -> None:
        with repo.using("parents"):
            assert await asyncio.to_thread(work) == "parents"
            assert name(repo) == "parents"

    asyncio.run(parent())


def test_a_task_that_starts_in_a_block_keeps_the_choice_after_the_block(
    repo: type[Repo], caplog: pytest.LogCaptureFixture
) -> None:
    """The block's end is not seen by a task that was started in it, nor the task's blocks by its parent."""

    async def child(go: asyncio.Event) -> list[str]:
        await go.wait()
        seen = [name(repo)]
        with repo.using("childs"):
            seen.append(name(repo))
        return [*seen, name(repo)]

    async def parent() -> list[str]:
        go = asyncio.Event()
        with repo.using("block"):
            task = asyncio.create_task(child(go))
        assert name(repo) == "app"
        go.set()
        return await task

    assert asyncio.run(parent()) == ["block", "childs", "block"]
    assert caplog.records == []


def test_a_cancelled_task_restores_nothing_elsewhere(repo: type[Repo], caplog: pytest.LogCaptureFixture) -> None:
    """Cancellation leaves the block in the task's own context."""

    async def child() -> None:
        with repo.using("childs"):
            await asyncio.Event().wait()

    async def parent() -> None:
        repo.set_database("parents")
        task = asyncio.create_task(child())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert name(repo) == "parents"

    asyncio.run(parent())
    assert caplog.records == []


# Several repos


def test_two_repos_choose_independently(repo: type[Repo]) -> None:
    """A choice belongs to one repo class."""

    class Other(Repo, config={"url": "postgresql://db09/other"}):
        pass

    repo.set_database("shard02")
    assert Other.get_database().home == "db09:5432/other"
    with Other.using("shard07"):
        assert (repo.get_database().home, Other.get_database().home) == ("db01:5432/shard02", "db09:5432/shard07")
    repo.set_database(None)
    assert Other.get_database().home == "db09:5432/other"


def test_a_subclass_without_config_shares_and_one_with_config_does_not(repo: type[Repo]) -> None:
    """Choice and cache are those of the class that the config stands on."""

    class Shared(repo):  # type: ignore[valid-type,misc]  # a fixture's class
        pass

    class Own(repo, config={"url": "postgresql://db09/own"}):  # type: ignore[valid-type,misc,call-arg]  # a fixture's class
        pass

    class OwnShared(Own):
        pass

    Shared.set_database("shared")
    Own.set_database("apart")
    assert (name(repo), name(Shared), name(Own), name(OwnShared)) == ("shared", "shared", "apart", "apart")
    with repo.using("block"), OwnShared.using("block too"):
        assert (name(Shared), name(Own)) == ("block", "block too")
    assert Own.get_database().host == "db09"
    assert repo._router.databases is Shared._router.databases
    assert Shared._router.databases is not Own._router.databases
    assert Own._router.databases is OwnShared._router.databases


def test_two_repos_of_one_name_are_apart() -> None:
    """Classes made by one function, as fixtures do, do not meet."""

    def make() -> type[Repo]:
        return type("App", (Repo,), {}, config="postgresql://db01/app")

    one, two = make(), make()
    one.set_database("shard02")
    assert name(two) == "app"


# Bleeding


SWITCHES = 1000


def switch(repos: list[type[Repo]], chance: random.Random, own: str) -> None:
    """Choose at random, in a block or without, and check that each repo sees what was chosen for it last."""
    repo = chance.choice(repos)
    before = [name(each) for each in repos]
    chosen = f"{own}-{chance.randrange(10**6)}"
    expected = [chosen if each is repo else was for each, was in zip(repos, before, strict=True)]
    if chance.random() < 0.5:
        with repo.using(chosen):
            assert [name(each) for each in repos] == expected
        assert [name(each) for each in repos] == before
    else:
        repo.set_database(chosen)
        assert [name(each) for each in repos] == expected
    assert all(name(each) == "app" or name(each).startswith(own) for each in repos)


@pytest.fixture
def repos(repo: type[Repo]) -> list[type[Repo]]:
    """Two repos that are switched at once."""
    return [repo, type("Other", (Repo,), {}, config="postgresql://db09/app")]


def test_switches_in_threads_do_not_bleed(repos: list[type[Repo]]) -> None:
    """1,000 switches over 4 threads, each of which sees only its own."""

    def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(SWITCHES // 4):
            switch(repos, chance, f"thread{number}")
        for repo in repos:
            repo.set_database(None)

    with ThreadPoolExecutor(4) as executor:
        list(executor.map(work, range(4)))
    assert [name(repo) for repo in repos] == ["app", "app"]


def test_switches_in_tasks_do_not_bleed(repos: list[type[Repo]]) -> None:
    """1,000 switches over 10 tasks that give way to each other between any two."""

    async def work(number: int) -> None:
        chance = random.Random(number)
        for _ in range(SWITCHES // 10):
            seen = [name(repo) for repo in repos]
            with repos[0].using(f"task{number}-block"):
                await asyncio.sleep(0)
                assert name(repos[0]) == f"task{number}-block"
            assert [name(repo) for repo in repos] == seen
            switch(repos, chance, f"task{number}")
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(*(work(number) for number in range(10)))
        assert [name(repo) for repo in repos] == ["app", "app"]

    asyncio.run(main())
