"""What a cache says of itself unasked: who holds connections for too long, and that there are too many of them."""

from __future__ import annotations

import gc
import logging
import os
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from shardrepo import CheckoutTimeoutError, DatabaseFilter, Repo

from ..conftest import await_
from ..models import Tag

pytestmark = pytest.mark.cache


def warnings_in(caplog: pytest.LogCaptureFixture, text: str) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno == logging.WARNING and text in record.getMessage()]


def hold_it(repo: type[Repo], while_: Callable[[], bool]) -> None:
    with repo.transaction():
        await_(lambda: not while_())


def test_a_connection_that_is_held_for_long(
    make_repo: Callable[..., type[Repo]], database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once: database, seconds, thread, and the stack that took it, which ends in the user's code."""
    repo = make_repo(database, warn_after=0.1)
    hold_it(repo, lambda: not warnings_in(caplog, "has been held"))
    (record,) = warnings_in(caplog, "has been held")
    message = record.getMessage()
    assert message.startswith(f"a connection to {repo.get_database().home} has been held for 0.")
    assert threading.current_thread().name in message
    assert message.rstrip().endswith("in hold_it") or "in hold_it\n" in message
    assert "test_watch.py" in message.splitlines()[-2] + message.splitlines()[-1]
    assert (record.name, record.database) == ("shardrepo.pool", database)  # type: ignore[attr-defined]
    assert record.server == repo.get_database().server  # type: ignore[attr-defined]
    repo.count(Tag)
    hold_it(repo, lambda: len(warnings_in(caplog, "has been held")) < 2)


def test_nothing_is_noted_unless_asked_for(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Without `warn_after` no checkout looks at its stack."""
    repo = make_repo(database)
    with repo.transaction():
        ((entry, _),) = repo._router.cache.ledger.loans()
        assert entry.connection is not None
        assert entry.connection.taken is None


def test_a_timeout_names_the_longest_holders(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Thread and, if it is watched, line; with the numbers and the remedies."""
    repo = make_repo(database, max_connections=1, checkout_timeout=0.1, warn_after=60)
    with ThreadPoolExecutor(1) as executor, repo.transaction():
        with pytest.raises(CheckoutTimeoutError) as caught:
            executor.submit(repo.count, Tag).result(30)
    message = str(caught.value)
    assert "max_connections=1 left no room; 1 in use, 0 connecting" in message
    assert f"Held longest: {repo.get_database().home} for 0." in message
    assert f"by {threading.current_thread().name} ({__file__}:" in message
    assert "raise max_connections, or give a longer checkout_timeout" in message


def test_more_busy_than_the_target(
    make_repo: Callable[..., type[Repo]], database: str, caplog: pytest.LogCaptureFixture
) -> None:
    """After a second it is logged, once for as long as it lasts; `stats` has the seconds."""
    repo = make_repo(database, pool_size=1)
    with repo.transaction(), repo.detached(), repo.transaction():
        await_(lambda: bool(warnings_in(caplog, "above pool_size=1")))
        assert repo.stats().over_target >= 1
        await_(lambda: repo.stats().over_target >= 2.5)
        assert len(warnings_in(caplog, "above pool_size=1")) == 1
    assert repo.stats().over_target == 0


def housekeepers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "shardrepo-housekeeper"]


def test_one_thread_per_cache(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """From the first connection on, whatever else the cache does, until it is disposed or collected."""
    await_(lambda: housekeepers() == [])
    repo = make_repo(database, idle_timeout=0.2)
    assert housekeepers() == []
    for _ in range(3):
        repo.count(Tag)
        repo.disconnect()
    assert len(housekeepers()) == 1
    repo.dispose()
    await_(lambda: housekeepers() == [])
    other: Any = make_repo(database, idle_timeout=0.2)
    other.count(Tag)
    cache = weakref.ref(other._router.cache)
    for each in (other._router, other._router.databases):
        each.__dict__.pop("cache")
    gc.collect()
    assert cache() is None
    await_(lambda: housekeepers() == [])


def test_a_forked_child_has_one_of_its_own(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Threads do not survive a fork: it is started again with the child's first connection."""
    repo = make_repo(database)
    repo.count(Tag)
    child = os.fork()
    if child == 0:
        before = sum(thread.is_alive() for thread in housekeepers())
        repo.count(Tag)
        os._exit(10 * before + len(housekeepers()))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


def test_records_of_the_application(
    make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    """With the filter each names the database that is current where it is made; the library's own keep theirs."""
    one, other = make_databases(2)
    repo = make_repo(one)
    caplog.handler.addFilter(DatabaseFilter(repo))
    caplog.set_level(logging.DEBUG)
    log = logging.getLogger("application")
    log.info("first")
    with repo.using(other):
        log.info("second")
        repo.count(Tag)
    repo.disconnect_all()
    require = make_repo(one, require_database=True)
    caplog.handler.addFilter(DatabaseFilter(require))
    named = {record.getMessage(): record.database for record in caplog.records if record.name == "application"}  # type: ignore[attr-defined]
    assert named == {"first": one, "second": other}
    own = [record for record in caplog.records if record.name == "shardrepo.pool"]
    assert [record.database for record in own] == [other, other]  # type: ignore[attr-defined]
    assert [record.getMessage().split(" ")[0] for record in own] == ["connected", "closed"]
    assert {record.server for record in own} == {repo.get_database().server}  # type: ignore[attr-defined]


def test_where_nothing_is_chosen(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """A record is never lost for want of a database."""
    record = logging.makeLogRecord({"msg": "early"})
    assert DatabaseFilter(make_repo(database, require_database=True)).filter(record)
    assert (record.database, record.server) == ("-", "-")  # type: ignore[attr-defined]
