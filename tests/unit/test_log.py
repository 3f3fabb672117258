"""Which database a log record is about. Opens no connection."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shardrepo import DEFAULT, DatabaseFilter, Repo


@pytest.fixture
def repo() -> type[Repo]:
    """A repo whose server is never connected to."""

    class App(Repo, config={"url": "postgresql://db01/app"}):
        pass

    return App


@pytest.fixture
def written(repo: type[Repo]) -> Iterator[io.StringIO]:
    """What a handler with the filter writes of the records of a logger, "app"."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(DatabaseFilter(repo))
    handler.setFormatter(logging.Formatter("%(server)s %(database)s %(message)s"))
    logger = logging.getLogger("app")
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


def log(message: str) -> None:
    logging.getLogger("app").warning(message)


def test_a_record_follows_the_choice(repo: type[Repo], written: io.StringIO) -> None:
    """It names the database, and the server, that the repo would use where it is made."""
    log("default")
    with repo.using("shard02"):
        log("inside")
        with repo.using(host="db02", port=5433, database="shard03"):
            log("deeper")
        with repo.using(DEFAULT):
            log("by name")
    log("after")
    assert written.getvalue().splitlines() == [
        "db01:5432 app default",
        "db01:5432 shard02 inside",
        "db02:5433 shard03 deeper",
        "db01:5432 app by name",
        "db01:5432 app after",
    ]


def test_a_record_is_its_threads_and_its_tasks(repo: type[Repo], written: io.StringIO) -> None:
    """A thread starts with the default, what is carried and what a task inherits is chosen there too."""

    def in_thread(message: str, *, carried: bool = False) -> None:
        thread = threading.Thread(target=repo.carry(log) if carried else log, args=(message,))
        thread.start()
        thread.join()

    async def work() -> None:
        await asyncio.create_task(asyncio.to_thread(log, "task"))

    with repo.using("shard02"):
        in_thread("thread")
        in_thread("carried", carried=True)
        asyncio.run(work())
    assert written.getvalue().splitlines() == [
        "db01:5432 app thread",
        "db01:5432 shard02 carried",
        "db01:5432 shard02 task",
    ]


@pytest.mark.parametrize("config", [{"host": "db01"}, {"url": "postgresql://db01/app", "require_database": True}])
def test_a_record_without_a_choice_has_dashes(config: dict[str, object]) -> None:
    """Where a verb would raise, logging does not."""
    repo: Any = type("App", (Repo,), {}, config=config)
    record = logging.makeLogRecord({"msg": "early"})
    assert DatabaseFilter(repo).filter(record)
    assert (record.database, record.server) == ("-", "-")  # type: ignore[attr-defined]
    with repo.using("shard02"):
        record = logging.makeLogRecord({"msg": "late"})
        assert DatabaseFilter(repo).filter(record)
    assert (record.database, record.server) == ("shard02", "db01:5432")  # type: ignore[attr-defined]


def test_a_record_that_names_a_database_keeps_it(repo: type[Repo]) -> None:
    """The library's own are about another one than the current, at times; two filters do not fight either."""
    record = logging.makeLogRecord({"msg": "closed", "database": "shard07", "server": "db07:5432"})
    assert DatabaseFilter(repo).filter(record)
    assert (record.database, record.server) == ("shard07", "db07:5432")  # type: ignore[attr-defined]
    other = type("Other", (Repo,), {}, config={"url": "postgresql://db09/other"})
    record = logging.makeLogRecord({"msg": "twice"})
    assert DatabaseFilter(repo).filter(record)
    assert DatabaseFilter(other).filter(record)
    assert (record.database, record.server) == ("app", "db01:5432")  # type: ignore[attr-defined]


def test_no_record_is_dropped_and_no_secret_written() -> None:
    """The fields are names: who connects, and with what password, is in neither of them."""
    repo = type("App", (Repo,), {}, config={"url": "postgresql://ada:hidden@db01/app"})
    record = logging.makeLogRecord({"msg": "hello"})
    assert DatabaseFilter(repo).filter(record) is True
    assert not {"ada", "hidden"} & {part for value in vars(record).values() for part in str(value).split("@")}
    assert (record.database, record.server) == ("app", "db01:5432")  # type: ignore[attr-defined]
