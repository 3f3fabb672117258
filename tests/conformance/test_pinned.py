"""`connection()`: one connection for a block, whose verbs, transactions and hand-written SQL meet on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError

from shardrepo import (
    CheckoutTimeoutError,
    ConstraintError,
    Repo,
    TransactionDoomedError,
    TransactionOwnerError,
    inserting,
)
from shardrepo.testing.servers import Server

from ..conftest import SQL, await_, books_balance, connections_of, run_sql
from ..models import Post, Tag, User

pytestmark = pytest.mark.verbs


def pid(repo: type[Repo]) -> int:
    """The server process that a verb runs in."""
    return int(repo.execute("SELECT pg_backend_pid()").scalar_one())


def test_everything_in_the_block_is_on_one_connection(repo: type[Repo]) -> None:
    """Verbs, transactions and SQL by hand; also of a block within."""
    with repo.connection() as connection:
        first = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        assert pid(repo) == first
        with repo.transaction():
            assert pid(repo) == first
        with repo.connection() as inner:
            assert inner is connection
            assert pid(repo) == first
        repo.insert(User(name="Ada", posts=[Post(title="p")]))
        assert repo.explain(User)
        assert pid(repo) == first
        assert repo.stats().in_use == 1
    assert repo.stats().in_use == 0


def test_what_a_session_keeps_is_there_until_the_end_of_the_block(repo: type[Repo]) -> None:
    """A temporary table, a setting, an advisory lock: for the block, and for nobody after it."""
    with repo.connection() as connection:
        connection.execute(text("CREATE TEMP TABLE kept (n int)"))
        connection.execute(text("SET statement_timeout TO '77s'"))
        connection.execute(text("SELECT pg_advisory_lock(77)"))
        repo.execute("INSERT INTO kept VALUES (1)")
        with repo.transaction():
            repo.execute("INSERT INTO kept VALUES (2)")
        assert repo.execute("SELECT count(*) FROM kept").scalar_one() == 2
        assert repo.execute("SHOW statement_timeout").scalar_one() == "77s"
        mine = pid(repo)
    with repo.transaction():
        assert pid(repo) == mine
        assert repo.execute("SHOW statement_timeout").scalar_one() == "0"
        assert repo.execute("SELECT to_regclass('kept')").scalar_one() is None
        assert repo.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").scalar_one() == 0


def test_each_statement_is_committed_by_itself(repo: type[Repo], sql: SQL) -> None:
    """What a block has done stays done when it is left by an error; a transaction in it is all or nothing."""
    with pytest.raises(ZeroDivisionError), repo.connection() as connection:
        repo.insert(Tag(label="verb"))
        connection.execute(text("INSERT INTO tags (label) VALUES ('hand')"))
        assert sql("SELECT label FROM tags ORDER BY 1") == [("hand",), ("verb",)]
        with pytest.raises(ValueError, match="undone"), repo.transaction():
            repo.insert(Tag(label="lost"))
            raise ValueError("undone")
        repo.insert(Tag(label="after"))
        _ = 1 / 0
    assert sql("SELECT label FROM tags ORDER BY 1") == [("after",), ("hand",), ("verb",)]


def test_how_a_transaction_runs_is_over_with_it(repo: type[Repo]) -> None:
    """The next statement on the connection is not serializable, nor read-only."""
    with repo.connection():
        with repo.transaction(isolation="serializable", read_only=True):
            assert repo.execute("SHOW transaction_isolation").scalar_one() == "serializable"
            assert repo.execute("SHOW transaction_read_only").scalar_one() == "on"
        assert repo.execute("SHOW transaction_isolation").scalar_one() == "read committed"
        with repo.transaction():
            repo.insert(Tag(label="written"))
            assert repo.execute("SHOW transaction_isolation").scalar_one() == "read committed"


def test_in_a_transaction_it_is_that_ones(repo: type[Repo], sql: SQL) -> None:
    """What is done by hand is part of the transaction, and ends with it."""
    with pytest.raises(ValueError, match="undone"), repo.transaction():
        with repo.connection() as connection:
            connection.execute(text("INSERT INTO tags (label) VALUES ('lost')"))
            assert repo.count(Tag) == 1
        raise ValueError("undone")
    assert sql("SELECT count(*) FROM tags") == [(0,)]


@pytest.mark.parametrize("then", ["verb", "end"])
def test_a_begin_by_hand_is_found_out(repo: type[Repo], sql: SQL, server: Server, then: str) -> None:
    """What it has left open is rolled back with an error, never lost in silence; the connection is not used again."""
    with pytest.raises(TransactionDoomedError, match="a BEGIN was sent by hand"), repo.connection() as connection:
        first = pid(repo)
        connection.exec_driver_sql("BEGIN")
        connection.execute(text("INSERT INTO tags (label) VALUES ('lost')"))
        if then == "verb":
            repo.count(Tag)
    assert sql("SELECT count(*) FROM tags") == [(0,)]
    await_(
        lambda: run_sql(server, "postgres", "SELECT count(*) FROM pg_stat_activity WHERE pid = %s", (first,)) == [(0,)]
    )
    assert pid(repo) != first
    assert books_balance(repo)


def test_a_begin_by_hand_that_was_ended_is_none_of_our_business(repo: type[Repo], sql: SQL) -> None:
    """At the next verb, and at the end, only what is still open counts."""
    with repo.connection() as connection:
        for statement in ("BEGIN", "INSERT INTO tags (label) VALUES ('kept')", "COMMIT"):
            connection.exec_driver_sql(statement)
        assert repo.count(Tag) == 1
    assert sql("SELECT label FROM tags") == [("kept",)]


def test_a_connection_that_is_lost_is_not_replaced_in_silence(repo: type[Repo], server: Server) -> None:
    """What was set in it is gone, so the block cannot go on."""
    with pytest.raises(TransactionDoomedError, match="the connection was lost"), repo.connection() as connection:
        connection.execute(text("SET statement_timeout TO '77s'"))
        run_sql(server, "postgres", "SELECT pg_terminate_backend(%s, 10000)", (pid(repo),))
        with pytest.raises(DBAPIError):
            repo.count(Tag)
        repo.count(Tag)
    assert repo.count(Tag) == 0
    assert books_balance(repo)


def test_a_verb_that_is_called_by_another_is_a_part_of_it(repo: type[Repo], sql: SQL) -> None:
    """What fails is undone as a whole, and what succeeds is stored as a whole, whatever a listener asks meanwhile."""

    def ask(*_: Any) -> None:
        repo.count(Tag)

    for model in (User, Post):
        event.listen(model, "before_insert", ask)
    try:
        with repo.connection():
            repo.insert(User(name="first", email="e", posts=[Post(title="p")]))
            with pytest.raises(ConstraintError):
                repo.insert(User(name="lost", posts=[Post(title="q", id=1)]))
            repo.insert(User(name="alone"))
            assert not repo.in_transaction()
    finally:
        for model in (User, Post):
            event.remove(model, "before_insert", ask)
    assert sql("SELECT name FROM users ORDER BY id") == [("first",), ("alone",)]
    assert sql("SELECT title FROM posts") == [("p",)]


def test_rows_that_ask_while_they_are_inserted(repo: type[Repo], monkeypatch: pytest.MonkeyPatch) -> None:
    """A generator may use the repo in the middle of what takes its rows."""
    monkeypatch.setattr(inserting, "CHUNK", 10)
    with repo.connection():
        rows = ({"label": f"{n}: {repo.count(Tag)}"} for n in range(45))
        assert repo.insert_all(Tag, rows).count == 45
        assert repo.count(Tag) == 45


@pytest.mark.parametrize("then", ["a block", "by hand"])
def test_a_connection_that_was_lost_is_never_taken_for_another(repo: type[Repo], server: Server, then: str) -> None:
    """Not even when SQLAlchemy has put another one in its place."""
    with pytest.raises(TransactionDoomedError, match="the connection was lost"), repo.connection() as connection:
        connection.execute(text("SET statement_timeout TO '77s'"))
        run_sql(server, "postgres", "SELECT pg_terminate_backend(%s, 10000)", (pid(repo),))
        with pytest.raises(DBAPIError):
            repo.count(Tag)
        if then == "a block":
            with repo.connection():
                repo.count(Tag)
        else:
            connection.rollback()
            connection.execute(text("SELECT 1"))
            repo.count(Tag)
    assert books_balance(repo)


def test_an_error_of_a_verb_ends_nothing(repo: type[Repo]) -> None:
    """The block goes on after it, on the same connection."""
    with repo.connection():
        first = pid(repo)
        with pytest.raises(DBAPIError):
            repo.execute("SELECT 1 / 0")
        with pytest.raises(DBAPIError), repo.transaction():
            repo.execute("SELECT 1 / 0")
        assert pid(repo) == first


def test_it_belongs_to_who_opened_it(repo: type[Repo]) -> None:
    """A task that inherits it, and a thread that it is carried into, may not use it; detached they are on their own."""
    with repo.connection():
        first = pid(repo)

        async def child() -> int:
            with pytest.raises(TransactionOwnerError, match="the connection on"):
                repo.count(Tag)
            with repo.detached():
                return pid(repo)

        assert asyncio.run(child()) != first

        def carried() -> None:
            with pytest.raises(TransactionOwnerError):
                repo.count(Tag)

        with ThreadPoolExecutor(1) as executor:
            executor.submit(repo.carry(carried)).result()
        with repo.detached():
            assert pid(repo) != first


def test_another_database_in_the_block_has_another_connection(repo: type[Repo], two_databases: tuple[str, str]) -> None:
    """It is held for one database; `using` and `set_database` go where they say."""
    name = repo.get_database().name
    (other,) = set(two_databases) - {name}
    with repo.connection():
        first = pid(repo)
        with repo.using(other):
            assert repo.execute("SELECT current_database()").scalar_one() == other
            assert pid(repo) != first
        before = repo.set_database(other)
        assert repo.execute("SELECT current_database()").scalar_one() == other
        repo.set_database(before)
        assert pid(repo) == first


def test_a_stream_has_a_connection_of_its_own(repo: type[Repo], sql: SQL) -> None:
    """Verbs in its block are still committed one by one."""
    repo.insert_all(Tag, [{"label": "a"}, {"label": "b"}])
    with repo.connection(), repo.stream(Tag) as tags:
        for tag in tags:
            repo.update(tag, label=tag.label * 2)
            assert sql("SELECT count(*) FROM tags WHERE label = %s", tag.label) == [(1,)]


def test_timeouts_are_of_each_call(repo: type[Repo]) -> None:
    """A call that takes too long ends the block's connection; the time before and after does not count."""
    with pytest.raises(TransactionDoomedError), repo.connection():
        with repo.call_options(timeout=0.2):
            assert repo.count(Tag) == 0
            with pytest.raises(DBAPIError, match="in time"):
                repo.execute("SELECT pg_sleep(5)")
        repo.count(Tag)


def test_a_bound_of_one_connection(make_repo: Callable[..., type[Repo]], database: str, server: Server) -> None:
    """A whole block needs one connection; what would need a second says so at once."""
    repo = make_repo(database, max_connections=1)
    with repo.connection():
        repo.insert(User(name="Ada", posts=[Post(title="p")]))
        with repo.transaction():
            repo.insert(Tag(label="x"))
        with repo.detached(), pytest.raises(CheckoutTimeoutError, match="ever"):
            repo.count(Tag)
    name = repo.execute("SHOW application_name").scalar_one()
    assert len(connections_of(server, str(name))) == 1
