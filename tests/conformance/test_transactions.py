"""Transactions and savepoints: what is kept, what is undone, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import inspect
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError

from shardrepo import (
    NotInTransactionError,
    Repo,
    StaleError,
    TransactionDoomedError,
    TransactionOwnerError,
    WrongDatabaseError,
)

from ..conftest import SQL
from ..models import Account, Post, Tag, User

pytestmark = pytest.mark.verbs


class Stop(BaseException):
    """As KeyboardInterrupt and task cancellation are: no `Exception`."""


def fail(repo: type[Repo]) -> None:
    """Have the server refuse a statement."""
    with pytest.raises(DataError):
        repo.execute("SELECT 1 / 0")


def test_a_transaction_commits_at_its_end(repo: type[Repo], sql: SQL) -> None:
    """What is written in a transaction is seen by others when its block ends, and not before."""
    with repo.transaction():
        repo.insert(Tag(label="a"))
        repo.insert_all(Tag, [{"label": "b"}])
        repo.execute("INSERT INTO tags (label) VALUES ('c')")
        assert sql("SELECT count(*) FROM tags") == [(0,)]
    assert sql("SELECT label FROM tags ORDER BY 1") == [("a",), ("b",), ("c",)]
    assert repo.stats().in_use == 0


def test_a_transaction_uses_one_connection(repo: type[Repo]) -> None:
    """Every verb of a transaction runs on its one connection."""
    with repo.transaction():
        pids = {repo.execute("SELECT pg_backend_pid()").scalar_one() for _ in range(3)}
        repo.insert(Tag(label="a"))
        assert repo.stats().in_use == 1
    assert len(pids) == 1


@pytest.mark.parametrize("error", [ValueError, Stop, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_transaction_is_rolled_back_by_any_error(repo: type[Repo], sql: SQL, error: type[BaseException]) -> None:
    """An error that leaves the block undoes it, whatever its kind, and is raised as it was."""
    with pytest.raises(error), repo.transaction():
        repo.insert(Tag(label="a"))
        raise error
    assert sql("SELECT count(*) FROM tags") == [(0,)]
    assert not repo.in_transaction()
    assert repo.stats().in_use == 0
    repo.insert(Tag(label="b"))


def test_a_transaction_in_a_transaction_joins_it(repo: type[Repo], sql: SQL) -> None:
    """A nested block is part of the outer one: the same transaction, committed once, at the outer end."""
    with repo.transaction():
        outer = repo.execute("SELECT pg_current_xact_id()::text").scalar_one()
        with repo.transaction():
            repo.insert(Tag(label="a"))
            assert repo.execute("SELECT pg_current_xact_id()::text").scalar_one() == outer
        assert sql("SELECT count(*) FROM tags") == [(0,)]
        assert repo.in_transaction()
    assert sql("SELECT count(*) FROM tags") == [(1,)]


def test_an_error_in_a_nested_block_dooms_the_outer_one(repo: type[Repo], sql: SQL) -> None:
    """What a nested block raised cannot be caught and forgotten: half of the work would be kept."""
    with pytest.raises(TransactionDoomedError) as caught, repo.transaction():
        repo.insert(Tag(label="a"))
        with pytest.raises(ZeroDivisionError), repo.transaction():
            repo.insert(Tag(label="b"))
            raise ZeroDivisionError("by me")
    assert isinstance(caught.value.cause, ZeroDivisionError)
    assert "by me" in str(caught.value)
    assert sql("SELECT count(*) FROM tags") == [(0,)]


def test_a_database_error_dooms_the_transaction(repo: type[Repo], sql: SQL) -> None:
    """After a statement failed, every verb raises the first cause, before any statement, and so does the end."""
    cause: BaseException | None = None
    with pytest.raises(TransactionDoomedError) as at_end, repo.transaction():
        repo.insert(Tag(label="a"))
        tag = Tag(label="a")
        with pytest.raises(IntegrityError) as first:
            repo.insert(tag)
        cause = first.value
        verbs: list[Callable[[], Any]] = [
            lambda: repo.get(Tag, 1),
            lambda: repo.get_by(Tag, label="a"),
            lambda: repo.all(Tag),
            lambda: repo.count(Tag),
            lambda: repo.insert(Tag(label="b")),
            lambda: repo.insert_all(Tag, [{"label": "b"}]),
            lambda: repo.execute("SELECT 1"),
            lambda: repo.session(),
            lambda: repo.savepoint().__enter__(),
            lambda: repo.transaction().__enter__(),
        ]
        for verb in verbs:
            with pytest.raises(TransactionDoomedError) as caught:
                verb()
            assert caught.value.cause is cause
            assert caught.value.home == repo.get_database().home
    assert at_end.value.cause is cause
    assert sql("SELECT count(*) FROM tags") == [(0,)]
    assert repo.count(Tag) == 0


def test_an_error_after_the_doom_is_raised_as_it_is(repo: type[Repo], sql: SQL) -> None:
    """A doomed block that is left by an error is left by that error."""
    with pytest.raises(ZeroDivisionError), repo.transaction():
        repo.insert(Tag(label="a"))
        fail(repo)
        raise ZeroDivisionError
    assert sql("SELECT count(*) FROM tags") == [(0,)]


@pytest.mark.parametrize("write", ["update", "delete"])
def test_what_the_server_did_not_refuse_dooms_too(repo: type[Repo], sql: SQL, write: str) -> None:
    """A stale write in a transaction is no error of the server, and yet its flush failed: nothing is kept."""
    account = repo.insert(Account(balance=1))
    sql("DELETE FROM accounts")
    with pytest.raises(TransactionDoomedError), repo.transaction():
        repo.insert(Tag(label="a"))
        with pytest.raises(StaleError):
            repo.delete(account) if write == "delete" else repo.update(account, balance=2)
        repo.count(Tag)
    assert sql("SELECT count(*) FROM tags") == [(0,)]


def test_what_was_refused_before_the_server_dooms_nothing(repo: type[Repo], sql: SQL) -> None:
    """A wrong argument sent nothing and broke nothing: the transaction goes on."""
    with repo.transaction():
        tag = repo.insert(Tag(label="a"))
        for wrong in (
            lambda: repo.get(Tag, None),
            lambda: repo.get_by(Tag, lable="a"),
            lambda: repo.insert(tag),
            lambda: repo.update(tag, lable="b"),
            lambda: repo.delete(Tag(label="x")),
            lambda: repo.insert_all(Tag, [{"lable": "a"}]),
        ):
            with pytest.raises(ValueError):
                wrong()
        repo.update(tag, label="b")
    assert sql("SELECT label FROM tags") == [("b",)]


def test_a_savepoint_keeps_what_succeeds(repo: type[Repo], sql: SQL) -> None:
    """What a savepoint's block wrote is part of the transaction."""
    with repo.transaction():
        repo.insert(Tag(label="a"))
        with repo.savepoint():
            repo.insert(Tag(label="b"))
        repo.insert(Tag(label="c"))
    assert sql("SELECT label FROM tags ORDER BY 1") == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize("how", ["verb", "execute", "own error", "stop", "stale"])
def test_a_failed_savepoint_is_undone_alone(repo: type[Repo], sql: SQL, how: str) -> None:
    """The failure of a savepoint's block undoes the block, and the transaction goes on, whatever failed."""
    sql("INSERT INTO tags (label) VALUES ('taken')")
    account = repo.insert(Account(balance=1))
    sql("DELETE FROM accounts")
    with repo.transaction():
        repo.insert(Tag(label="a"))
        with pytest.raises((IntegrityError, ProgrammingError, ZeroDivisionError, Stop, StaleError)), repo.savepoint():
            repo.insert(Tag(label="b"))
            if how == "verb":
                repo.insert(Tag(label="taken"))
            elif how == "execute":
                repo.execute("SELECT * FROM nothing")
            elif how == "stale":
                repo.update(account, balance=5)
            else:
                raise Stop if how == "stop" else ZeroDivisionError
        assert repo.count(Tag) == 2
        repo.insert(Tag(label="c"))
    assert sql("SELECT label FROM tags ORDER BY 1") == [("a",), ("c",), ("taken",)]


def test_an_error_caught_inside_a_savepoint_dooms_it(repo: type[Repo], sql: SQL) -> None:
    """Inside a savepoint an error dooms the savepoint: its end raises, and only it is undone."""
    with repo.transaction():
        repo.insert(Tag(label="a"))
        with pytest.raises(TransactionDoomedError), repo.savepoint():
            repo.insert(Tag(label="b"))
            fail(repo)
            with pytest.raises(TransactionDoomedError):
                repo.count(Tag)
        repo.insert(Tag(label="c"))
    assert sql("SELECT label FROM tags ORDER BY 1") == [("a",), ("c",)]


def test_savepoints_nest(repo: type[Repo], sql: SQL) -> None:
    """The failure of an inner savepoint leaves the outer one whole, that of the outer one undoes both."""
    with repo.transaction():
        with repo.savepoint():
            repo.insert(Tag(label="a"))
            with pytest.raises(ZeroDivisionError), repo.savepoint():
                repo.insert(Tag(label="b"))
                raise ZeroDivisionError
            repo.insert(Tag(label="c"))
        with pytest.raises(ZeroDivisionError), repo.savepoint():
            with repo.savepoint():
                repo.insert(Tag(label="d"))
            raise ZeroDivisionError
    assert sql("SELECT label FROM tags ORDER BY 1") == [("a",), ("c",)]


def test_a_transaction_joined_inside_a_savepoint_dooms_the_savepoint(repo: type[Repo], sql: SQL) -> None:
    """A nested block in a savepoint that fails is undone with the savepoint, and the transaction goes on."""
    with repo.transaction():
        repo.insert(Tag(label="a"))
        with pytest.raises(TransactionDoomedError), repo.savepoint():
            with pytest.raises(ZeroDivisionError), repo.transaction():
                repo.insert(Tag(label="b"))
                raise ZeroDivisionError
        repo.insert(Tag(label="c"))
    assert sql("SELECT label FROM tags ORDER BY 1") == [("a",), ("c",)]


def test_a_savepoint_needs_a_transaction(repo: type[Repo]) -> None:
    """A savepoint outside a transaction is an error that says what is missing."""
    with pytest.raises(NotInTransactionError, match="transaction"), repo.savepoint():
        pytest.fail("the block must not run")


def test_a_session_that_rolls_back_dooms_the_transaction(repo: type[Repo], sql: SQL) -> None:
    """A joined session that rolled back took the transaction with it: its end raises instead of committing nothing."""
    with pytest.raises(TransactionDoomedError), repo.transaction():
        repo.insert(Tag(label="a"))
        with repo.session() as session:
            session.add(Tag(label="b"))
            session.flush()
            session.rollback()
        with pytest.raises(TransactionDoomedError):
            repo.insert(Tag(label="c"))
    assert sql("SELECT count(*) FROM tags") == [(0,)]


def test_a_session_in_a_savepoint_that_fails(repo: type[Repo], sql: SQL) -> None:
    """A session joins the savepoint that is open, and its failure undoes that alone."""
    with repo.transaction():
        repo.insert(Tag(label="a"))
        with pytest.raises(IntegrityError), repo.savepoint(), repo.session() as session:
            session.add(Tag(label="a"))
            session.flush()
        repo.insert(Tag(label="c"))
    assert sql("SELECT label FROM tags ORDER BY 1") == [("a",), ("c",)]


def test_in_transaction(repo: type[Repo], two_databases: tuple[str, str]) -> None:
    """`in_transaction` speaks of the current database, and of the caller."""
    assert not repo.in_transaction()
    with repo.transaction():
        assert repo.in_transaction()
        with repo.using(two_databases[1]):
            assert not repo.in_transaction()
        with repo.detached():
            assert not repo.in_transaction()
        seen: list[bool] = []

        def look() -> None:
            seen.append(repo.in_transaction())

        thread = threading.Thread(target=repo.carry(look))
        thread.start()
        thread.join()
        assert seen == [False]
        assert repo.in_transaction()
    assert not repo.in_transaction()


def test_detached_is_a_unit_of_work_of_its_own(repo: type[Repo], sql: SQL) -> None:
    """What runs in `detached` is committed by itself and survives the transaction around it."""
    with pytest.raises(ZeroDivisionError), repo.transaction():
        repo.insert(Tag(label="a"))
        with repo.detached():
            repo.insert(Tag(label="b"))
            with repo.transaction():
                repo.insert(Tag(label="c"))
        raise ZeroDivisionError
    assert sql("SELECT label FROM tags ORDER BY 1") == [("b",), ("c",)]


def test_set_database_inside_a_transaction_is_refused(repo: type[Repo], two_databases: tuple[str, str]) -> None:
    """To switch inside a transaction would leave it: it is refused, and the choice and the transaction stay."""
    used, other = two_databases
    with repo.transaction():
        with pytest.raises(WrongDatabaseError) as caught:
            repo.set_database(other)
        assert caught.value.expected == repo.get_database().home
        assert repo.get_database().name == used
        repo.set_database(used)
        repo.insert(Tag(label="a"))
        assert repo.in_transaction()


def test_a_transaction_of_another_thread_is_refused(repo: type[Repo], sql: SQL) -> None:
    """A thread that was given a transaction may not use it, and the transaction is none the worse."""
    errors: list[BaseException] = []

    def use(verb: Callable[[], Any]) -> None:
        try:
            verb()
        except TransactionOwnerError as error:
            errors.append(error)

    with repo.transaction():
        tag = repo.insert(Tag(label="a"))
        verbs: list[Callable[[], Any]] = [
            lambda: repo.get(Tag, tag.id),
            lambda: repo.update(tag, label="b"),
            lambda: repo.session(),
            lambda: repo.execute("DELETE FROM tags"),
            lambda: repo.transaction().__enter__(),
            lambda: repo.savepoint().__enter__(),
        ]
        for verb in verbs:
            thread = threading.Thread(target=repo.carry(use), args=(verb,))
            thread.start()
            thread.join()
        assert len(errors) == len(verbs)
        repo.insert(Tag(label="c"))
    assert sql("SELECT label FROM tags ORDER BY 1") == [("a",), ("c",)]


def test_objects_written_in_a_transaction_outlive_it(repo: type[Repo]) -> None:
    """An object inserted in a transaction is detached and complete at once, and can be written afterwards."""
    with repo.transaction():
        user = repo.insert(User(name="Ada"))
        assert inspect(user).detached
        post = repo.insert(Post(title="x", author=user))
    repo.update(user, name="Bob")
    assert (repo.get_one(User, user.id).name, repo.get_one(Post, post.id).author_id) == ("Bob", user.id)
