"""How a transaction runs, and how it is ended from inside."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Any

import pytest
from psycopg.errors import ReadOnlySqlTransaction
from sqlalchemy.exc import DBAPIError, OperationalError

from shardrepo import (
    ConfigError,
    NotInTransactionError,
    Repo,
    TransactionDoomedError,
    TransactionOwnerError,
)

from ..conftest import SQL
from ..models import Tag

pytestmark = pytest.mark.verbs

SHOWN = (
    "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only'), "
    "current_setting('transaction_deferrable')"
)


def shown(repo: type[Repo]) -> tuple[str, ...]:
    """Isolation, read-only and deferrable, as the server has them."""
    return tuple(repo.execute(SHOWN).one())


PLAIN = ("read committed", "off", "off")

MODES: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "plain": ({}, PLAIN),
    "read uncommitted": ({"isolation": "read uncommitted"}, ("read uncommitted", "off", "off")),
    "read committed": ({"isolation": "read committed"}, PLAIN),
    "repeatable read": ({"isolation": "repeatable read"}, ("repeatable read", "off", "off")),
    "serializable": ({"isolation": "serializable"}, ("serializable", "off", "off")),
    "read only": ({"read_only": True}, ("read committed", "on", "off")),
    "deferrable": (
        {"isolation": "serializable", "read_only": True, "deferrable": True},
        ("serializable", "on", "on"),
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_transaction_runs_as_it_is_asked_to(repo: type[Repo], mode: str) -> None:
    """The server has it so; the next one on the same connection is plain again, however this one ended."""
    options, expected = MODES[mode]
    with repo.transaction(**options):
        assert shown(repo) == expected
        pid = repo.execute("SELECT pg_backend_pid()").scalar_one()
        with repo.transaction(), repo.savepoint(), repo.transaction(**options):
            assert shown(repo) == expected
    with repo.transaction():
        assert shown(repo) == PLAIN
        assert repo.execute("SELECT pg_backend_pid()").scalar_one() == pid
    with pytest.raises(KeyError), repo.transaction(**options):
        repo.count(Tag)
        raise KeyError
    with repo.transaction():
        assert shown(repo) == PLAIN
    assert repo.transact(lambda: shown(repo), **options) == expected
    assert shown(repo) == PLAIN
    repo.insert(Tag(label="written"))


def test_one_that_only_reads(repo: type[Repo]) -> None:
    """The server refuses to write in it, and nobody takes that for a server that has become a standby."""
    with pytest.raises(DBAPIError) as caught, repo.transaction(read_only=True):
        repo.insert(Tag(label="a"))
    assert isinstance(caught.value.orig, ReadOnlySqlTransaction)
    assert repo.stats().closed == 0
    repo.insert(Tag(label="a"))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown level": (
        {"isolation": "serialisable"},
        "unknown isolation 'serialisable'; did you mean 'serializable'",
    ),
    "deferrable alone": ({"deferrable": True}, "means nothing"),
    "no seconds": ({"timeout": 0}, "timeout=0 cannot be kept"),
    "a word": ({"timeout": "1"}, "number of seconds"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_cannot_be(repo: type[Repo], case: str) -> None:
    """They are refused before anything is opened."""
    options, message = BAD[case]
    for call in (repo.transaction, lambda **options: repo.transact(lambda: None, **options)):
        with pytest.raises(ConfigError, match=message):
            call(**options)
    assert repo.stats().attempts == 0


def test_a_part_cannot_run_otherwise(repo: type[Repo], sql: SQL) -> None:
    """Other options than those of the transaction around it are refused, and change nothing."""
    with repo.transaction(isolation="serializable"):
        repo.insert(Tag(label="a"))
        with pytest.raises(ConfigError, match="cannot go on as"), repo.transaction(read_only=True):
            pytest.fail("entered")
        with repo.detached(), repo.transaction(read_only=True):
            assert shown(repo)[1] == "on"
        repo.insert(Tag(label="b"))
    assert sql("SELECT count(*) FROM tags") == [(2,)]


# timeout=


def test_a_transaction_that_takes_too_long(repo: type[Repo], sql: SQL) -> None:
    """All of its verbs together have so many seconds; nothing of it is kept, and the next has its own."""
    begun = monotonic()
    with pytest.raises(TransactionDoomedError), repo.transaction(timeout=2):
        # Before version 17, libpq cannot ask the server to stop: it sleeps on, and keeps the label for so long.
        repo.insert(Tag(label=f"lost at {begun}"))
        repo.execute("SELECT pg_sleep(0.2)")
        with pytest.raises(OperationalError):
            repo.execute("SELECT pg_sleep(5)")
    assert 2 <= monotonic() - begun < 4
    assert sql("SELECT count(*) FROM tags") == [(0,)]
    repo.execute("SELECT pg_sleep(2.1)")


def test_a_commit_that_would_be_too_late_is_not_sent(repo: type[Repo], sql: SQL) -> None:
    """Time that passes between the verbs counts; what is late is not committed."""
    with pytest.raises(OperationalError), repo.transaction(timeout=0.3):
        repo.insert(Tag(label="lost"))
        sql("SELECT pg_sleep(0.5)")
    assert sql("SELECT count(*) FROM tags") == [(0,)]
    assert repo.stats().in_use == 0
    repo.insert(Tag(label="kept"))


def test_a_call_may_have_less(repo: type[Repo]) -> None:
    """The nearer of the two ends counts."""
    begun = monotonic()
    with pytest.raises(OperationalError), repo.transaction(timeout=30), repo.call_options(timeout=0.3):
        repo.execute("SELECT pg_sleep(30)")
    with pytest.raises(OperationalError), repo.transaction(timeout=0.3), repo.call_options(timeout=30):
        repo.execute("SELECT pg_sleep(30)")
    assert monotonic() - begun < 5


# transact and rollback


def test_transact(repo: type[Repo], sql: SQL) -> None:
    """The function's value comes back and what it wrote is kept; an error comes out and nothing is."""
    assert repo.transact(lambda: repo.insert(Tag(label="a")).label) == "a"

    def fails() -> None:
        repo.insert(Tag(label="b"))
        raise KeyError

    with pytest.raises(KeyError):
        repo.transact(fails)
    assert sql("SELECT label FROM tags") == [("a",)]


def test_rollback_ends_a_transact(repo: type[Repo], sql: SQL) -> None:
    """With its value, past everything in between, and nothing is kept."""

    def gives_up() -> str:
        with repo.savepoint():
            repo.insert(Tag(label="a"))
            try:
                repo.rollback("given up")
            except Exception:  # what catches every error does not catch this
                pytest.fail("caught")

    assert repo.transact(gives_up) == "given up"
    assert sql("SELECT count(*) FROM tags") == [(0,)]
    assert not repo.in_transaction()


def test_rollback_ends_a_block_quietly(repo: type[Repo], sql: SQL) -> None:
    """What follows in the block is not run; what follows the block is."""
    with repo.transaction():
        repo.insert(Tag(label="a"))
        repo.rollback()
        pytest.fail("went on")  # type: ignore[unreachable]
    repo.insert(Tag(label="b"))
    assert sql("SELECT label FROM tags") == [("b",)]
    assert repo.stats().in_use == 0


def test_rollback_of_a_part_dooms_the_whole(repo: type[Repo], sql: SQL) -> None:
    """The innermost block ends, and the one around it can be nothing but rolled back."""
    with pytest.raises(TransactionDoomedError, match=r"rollback\(\) was called"), repo.transaction():
        repo.insert(Tag(label="a"))
        assert repo.transact(lambda: repo.rollback("inner")) == "inner"
        with pytest.raises(TransactionDoomedError):
            repo.count(Tag)
    with repo.transaction():
        repo.insert(Tag(label="b"))
        with repo.transaction():
            repo.rollback()
        repo.rollback()
    assert sql("SELECT count(*) FROM tags") == [(0,)]


def test_rollback_of_one_that_is_doomed(repo: type[Repo], sql: SQL) -> None:
    """That is the quiet way out of it."""
    with repo.transaction():
        with pytest.raises(DBAPIError):
            repo.execute("SELECT 1 / 0")
        repo.rollback()
    repo.insert(Tag(label="b"))
    assert sql("SELECT label FROM tags") == [("b",)]


def test_rollback_on_one_of_two_databases(repo: type[Repo], two_databases: tuple[str, str], sql: SQL) -> None:
    """It ends the block on the database that is current, with all that was opened in it."""
    with repo.transaction():
        repo.insert(Tag(label="outer"))
        with repo.using(two_databases[1]):
            found = repo.transact(lambda: (repo.execute("SELECT 1"), repo.rollback("inner"))[1])
            assert found == "inner"
    assert sql("SELECT label FROM tags") == [("outer",)]

    def ends_the_outer() -> str:
        repo.insert(Tag(label="lost"))
        current = repo.get_database()
        with repo.using(two_databases[1]), repo.transaction(), repo.using(current):
            repo.rollback("outer")

    assert repo.transact(ends_the_outer) == "outer"
    assert sql("SELECT label FROM tags") == [("outer",)]


def test_rollback_needs_a_transaction(repo: type[Repo]) -> None:
    """Outside one there is nothing to end; a detached block is outside, another thread's is not one's own."""
    with pytest.raises(NotInTransactionError, match="no open transaction"):
        repo.rollback()
    with repo.transaction():
        with repo.detached(), pytest.raises(NotInTransactionError):
            repo.rollback()
        repo.insert(Tag(label="kept"))
    assert repo.count(Tag) == 1


def test_rollback_of_anothers_transaction(repo: type[Repo]) -> None:
    """Its owner alone ends it."""

    async def child() -> None:
        with pytest.raises(TransactionOwnerError):
            repo.rollback()

    async def main() -> None:
        with repo.transaction():
            repo.insert(Tag(label="kept"))
            await asyncio.create_task(child())

    asyncio.run(main())
    assert repo.count(Tag) == 1
