"""What a sandbox makes of those who use the driver's own connection: nothing that they do there gets out of it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest
from sqlalchemy import select, text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError, OperationalError

from shardrepo import Repo, SandboxError
from shardrepo.testing.servers import Server
from shardrepo.testing.statements import count_statements

from ..conftest import contents, run_sql
from ..models import Tag

pytestmark = pytest.mark.testing

Make = Callable[..., type[Repo]]


@pytest.fixture
def repo(make_repo: Make, two_databases: tuple[str, str]) -> type[Repo]:
    return make_repo(two_databases[0])


def driver_of(connection: Connection) -> Any:
    """psycopg's connection behind one of SQLAlchemy's."""
    return connection.connection.driver_connection


# What ends the transaction


@pytest.mark.parametrize("after", [True, False])
@pytest.mark.parametrize(
    ("ending", "left"),
    [("COMMIT AND CHAIN", ["before"]), ("COMMIT; BEGIN", ["before"]), ("ROLLBACK; BEGIN", [])],
)
def test_a_transaction_that_is_ended_and_begun_again(
    repo: type[Repo], ending: str, left: list[str], after: bool
) -> None:
    """It is reported with the line, and what follows it is undone, though a transaction is open all the time."""
    with pytest.raises(SandboxError, match="was left") as caught, repo.sandbox(), repo.engine().connect() as connection:
        connection.execute(text("INSERT INTO tags (label) VALUES ('before')"))
        driver_of(connection).execute(ending)
        if after:
            with pytest.raises(SandboxError, match="ended by hand"):
                repo.count(Tag)
            repo.insert(Tag(label="after"))
    assert "ended by hand" in str(caught.value)
    assert repo.all(select(Tag.label)) == left


def test_a_transaction_that_is_ended_past_the_driver(repo: type[Repo]) -> None:
    """By libpq's own functions: that is seen at the end."""
    with pytest.raises(SandboxError, match="ended by hand past the driver"), repo.sandbox():
        repo.insert(Tag(label="committed"))
        with repo.engine().connect() as connection:
            driver_of(connection).pgconn.exec_(b"COMMIT")
    assert repo.all(select(Tag.label)) == ["committed"]


def test_a_procedure_that_commits(repo: type[Repo]) -> None:
    """The server refuses it, and the error says what to do."""
    with repo.sandbox():
        repo.execute("CREATE PROCEDURE commits() LANGUAGE plpgsql AS 'BEGIN COMMIT; END'")
        with pytest.raises(DBAPIError, match="invalid transaction termination") as caught:
            repo.execute("CALL commits()")
        assert "unboxed" in caught.value.orig.__notes__[0]  # type: ignore[union-attr]
        assert repo.count(Tag) == 0


def test_a_commit_in_a_block_of_the_drivers(repo: type[Repo]) -> None:
    """It is refused, as it is without a sandbox."""
    with repo.sandbox(), repo.engine().connect() as connection:
        driver = driver_of(connection)
        with driver.transaction():
            driver.execute("INSERT INTO tags (label) VALUES ('kept')")
            for end in (driver.commit, driver.rollback):
                with pytest.raises(psycopg.ProgrammingError, match="cannot be called in a block"):
                    end()
        assert repo.count(Tag) == 1


# What is under way


@pytest.mark.parametrize("way", ["copy", "stream", "pipeline"])
def test_others_in_the_middle_of_an_exchange(repo: type[Repo], way: str) -> None:
    """They are told that there is one connection, and do no harm: what is under way ends well."""
    with repo.sandbox(), repo.engine().connect() as connection, repo.session() as session:
        session.execute(text("SELECT 1"))
        driver = driver_of(connection)
        driver.execute("INSERT INTO tags (label) VALUES ('kept')")
        with ExitStack() as stack:
            if way == "copy":
                copy = stack.enter_context(driver.cursor().copy("COPY tags (label) FROM STDIN"))
            elif way == "stream":
                rows = driver.cursor().stream("SELECT generate_series(1, 3)")
                next(rows)
            else:
                stack.enter_context(driver.pipeline())
                driver.execute("INSERT INTO tags (label) VALUES ('in it')")
            for other in (repo.count, session.scalars):
                with pytest.raises(SandboxError, match="is under way"):
                    other(select(Tag))
            session.close()
            if way == "copy":
                copy.write_row(["in it"])
            elif way == "stream":
                assert len(list(rows)) == 2
        driver.commit()
        assert repo.count(Tag) == (1 if way == "stream" else 2)


def test_notices_are_heard_by_those_whose_they_are(repo: type[Repo]) -> None:
    """Also after another one has had the connection."""
    heard: list[str] = []
    with repo.sandbox(), repo.engine().connect() as connection:
        driver = driver_of(connection)
        driver.add_notice_handler(lambda notice: heard.append(notice.message_primary))
        repo.execute("DO $$BEGIN RAISE NOTICE 'of another'; END$$")
        driver.execute("DO $$BEGIN RAISE NOTICE 'its own'; END$$")
    assert heard == ["its own"]


# What is left behind


def test_a_lock_of_a_session_that_was_forgotten(repo: type[Repo], server: Server) -> None:
    """It is gone with the sandbox, however that ends: the cached connection has none."""
    with repo.sandbox():
        session = repo.session()
        session.execute(text("SELECT pg_advisory_lock(7)"))
        del session
        gc.collect()
    locks = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
    assert run_sql(server, "postgres", locks) == [(0,)]


def test_what_a_borrower_left_goes_with_what_is_sent_next(repo: type[Repo], server: Server, database: str) -> None:
    """It takes no message of its own: a test's two statements are two, with one before, one between and one after."""
    with repo.using(database):
        repo.execute("SELECT 0")  # what SQLAlchemy asks a server first
        with count_statements(server, database=database) as counted, repo.sandbox():
            repo.execute("SELECT 1")
            repo.execute("SELECT 2")
    messages = [one.sql for one in counted]
    assert messages[1::2] == ["SELECT 1", "SELECT 2"]
    assert ["RESET ALL" in message for message in messages[::2]] == [False, True, False]


@pytest.mark.parametrize("next_one", ["nobody", "who sends nothing", "who sends something"])
def test_a_lock_of_a_session_is_gone_with_the_sandbox(repo: type[Repo], server: Server, next_one: str) -> None:
    with repo.sandbox():
        repo.execute("SELECT pg_advisory_lock(7)")
        if next_one != "nobody":
            with repo.connection() as connection:
                if next_one == "who sends something":
                    connection.execute(text("SELECT pg_advisory_lock(8)"))
    assert run_sql(server, "postgres", "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]


def test_a_setting_is_gone_though_the_transaction_was_ended(repo: type[Repo]) -> None:
    """By hand, after it was set: neither who is next in the sandbox has it, nor who is next on the connection."""
    with pytest.raises(SandboxError, match="was left"), repo.sandbox():
        with repo.engine().connect() as connection:
            connection.execute(text("SET statement_timeout = 77000"))
            driver_of(connection).execute("COMMIT; BEGIN")
        with pytest.raises(SandboxError, match="ended by hand"):
            repo.count(Tag)
        assert repo.execute("SHOW statement_timeout").scalar_one() == "0"
    assert repo.execute("SHOW statement_timeout").scalar_one() == "0"
    assert repo.stats().misses == 1


def test_settings_of_the_driver(repo: type[Repo]) -> None:
    """They end with the borrower."""
    with repo.sandbox():
        with repo.engine().connect() as connection:
            before, driver_of(connection).prepare_threshold = driver_of(connection).prepare_threshold, None
        with repo.engine().connect() as connection:
            assert driver_of(connection).prepare_threshold == before
    with repo.engine().connect() as connection:
        assert driver_of(connection).prepare_threshold == before


# What is kept too long


def test_a_connection_that_was_returned(repo: type[Repo], server: Server, two_databases: tuple[str, str]) -> None:
    """It is closed for whoever still has it: the real one may be in another's transaction by then."""
    with repo.sandbox():
        with repo.engine().connect() as connection:
            kept = driver_of(connection)
        with pytest.raises(psycopg.OperationalError, match="closed or returned"):
            kept.execute("INSERT INTO tags (label) VALUES ('early')")
    with repo.transaction():
        repo.count(Tag)
        with pytest.raises(psycopg.OperationalError, match="closed or returned"):
            kept.execute("INSERT INTO tags (label) VALUES ('late')")
    assert contents(server, two_databases[0]) == []


def test_a_connection_that_is_detached(repo: type[Repo], server: Server, two_databases: tuple[str, str]) -> None:
    """It cannot leave the sandbox: it is rolled back, and closed."""
    with repo.sandbox():
        detached = repo.engine().connect()
        detached.execute(text("INSERT INTO tags (label) VALUES ('lost')"))
        detached.detach()
        with pytest.raises(OperationalError, match="closed or returned"):
            detached.execute(text("SELECT 1"))
        assert repo.count(Tag) == 0
    detached.close()
    assert contents(server, two_databases[0]) == []
