"""What a test asserts of a repo: which databases it touched, and that it left nothing open. Needs no pytest."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from textwrap import shorten
from typing import Any

from .. import event
from ..callsite import CallSite
from ..database import Chosen, choose
from ..entries import Kind
from ..pool import holder
from ..repo import Repo


@contextmanager
def assert_databases_touched(repo: type[Repo], expected: Iterable[Chosen], *, at_least: bool = False) -> Iterator[None]:
    """Assert that the statements that *repo* sends in the block go to exactly the *expected* databases.

    Whoever sends them, in whatever thread. An error of the block's own passes through, and nothing is asserted then.

        >>> with assert_databases_touched(MyRepo, ["shard01", "shard02"]):          # doctest: +SKIP
        ...     transfer(1, 2)

    Args:
        expected: Names, or anything else that `using` takes.
        at_least: Allow others too.

    Raises:
        AssertionError: Says which were missed, and of each that was not expected the first statement, and whence.
        ConfigError: One of *expected* names no database.
    """
    if isinstance(expected, str):
        raise TypeError(f"expected is a list of databases, not the text {expected!r}: write [{expected!r}]")
    choices = [choose(each, {}) for each in expected]
    first: dict[str, str] = {}

    def note(happened: event.Event) -> None:
        if (home := happened.database.home) not in first:
            first[home] = f"{shorten(happened.statement or '', 100)} ({CallSite().line})"

    event.listen(repo, "query", note)
    try:
        yield
    finally:
        event.remove(repo, "query", note)
    # Not before: a directory may know a database only since the block made it.
    homes = {repo._router.databases.resolve(choice).home for choice in choices}
    wrong = [f"not touched: {home}" for home in sorted(homes - first.keys())]
    if not at_least:
        wrong += [f"not expected: {home}, by {first[home]}" for home in sorted(first.keys() - homes)]
    if wrong:
        raise AssertionError(_listing("other databases were touched than expected", wrong))


@contextmanager
def assert_no_leaks(repo: type[Repo]) -> Iterator[None]:
    """Assert that nothing that was begun in the block goes on after it.

    That is: no connection of *repo* is in use that was not before, no thread runs that was started in the block, but
    for daemons, and no asyncio task is pending, where a loop runs. Garbage is collected before anything is said to
    leak. An error of the block's own passes through, and nothing is asserted then. What is still in use in a sandbox,
    that says itself when it ends.

    Raises:
        AssertionError: Says what goes on, since where if that is known, and what ends it.
    """
    before = _going_on(repo)
    yield
    if _going_on(repo).keys() - before.keys():
        gc.collect()
    after = _going_on(repo)
    if leaks := [said for key, said in after.items() if key not in before]:
        raise AssertionError(_listing("the block has ended, and this goes on", leaks))


def _going_on(repo: type[Repo]) -> dict[object, str]:
    """What goes on at this moment, and what to say of each."""
    # The objects themselves, not their ids, which others may have later.
    return {**_connections(repo), **_threads(), **_tasks()}


def _connections(repo: type[Repo]) -> dict[object, str]:
    repo.stats()  # takes over what finalisers have reclaimed
    watches = repo._router.databases.config.warn_after is not None
    return {
        # An entry is lent more than once: when, tells one loan from another.
        (entry, entry.since): f"a connection to {entry.connection.pool.database.home}, held by {holder(entry)}"
        f"{'' if watches else ' (warn_after in the config tells where it was taken)'}: leave the block of its session, "
        "transaction, stream or connection"
        for entry, _ in repo._router.cache.ledger.loans()
        # Those of sandboxes are pinned, and last as long as these do.
        if entry.connection is not None and entry.kind is not Kind.PINNED
    }


def _threads() -> dict[object, str]:
    loops = _running_loop() is not None
    return {
        thread: f"the thread {thread.name!r}: join it, or shut its executor down"
        for thread in threading.enumerate()
        # The threads of a loop's own executor, by the name that asyncio gives them, end with the loop.
        if not thread.daemon and not (loops and thread.name.startswith("asyncio_"))
    }


def _tasks() -> dict[object, str]:
    loop = _running_loop()
    return {task: _shown(task) for task in (asyncio.all_tasks(loop) if loop is not None else ())}


def _running_loop() -> asyncio.AbstractEventLoop | None:
    with suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


def _shown(task: asyncio.Task[Any]) -> str:
    stack = task.get_stack(limit=1)
    where = f" at {stack[0].f_code.co_filename}:{stack[0].f_lineno}" if stack else ""
    return f"the task {task.get_name()!r}, {getattr(task.get_coro(), '__qualname__', '?')}{where}: await or cancel it"


def _listing(headline: str, lines: Iterable[str]) -> str:
    return "\n  ".join([f"{headline}:", *lines])
