"""What an error says of the constraint that refused a row, wherever the statement came from."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import IntegrityError

from shardrepo import ConfigError, ConstraintError, Repo, TransactionDoomedError

from ..conftest import SQL
from ..models import Note, Place, Post, Tag, User

pytestmark = pytest.mark.verbs

SANDBOXED = True


@pytest.fixture(autouse=True)
def ada(sql: SQL) -> None:
    sql("INSERT INTO users (name, email, age) VALUES ('Ada', 'ada@x', 36)")
    sql("INSERT INTO posts (title, author_id) VALUES ('p', 1)")
    sql("INSERT INTO places (row, seat, label) VALUES (1, 2, 'x')")
    sql("""INSERT INTO notes ("Title %%", kind, token) VALUES ('h', 'one', 't')""".replace("%%", "%"))


REFUSED: dict[str, tuple[Callable[[type[Repo]], Any], tuple[str, str | None, str, tuple[str, ...]]]] = {
    "unique": (
        lambda repo: repo.insert(User(name="B", email="ada@x")), ("unique", "users_email_key", "users", ("email",))
    ),
    "a primary key": (
        lambda repo: repo.insert(Place(row=1, seat=2)), ("unique", "places_pkey", "places", ("row", "seat"))
    ),
    "a partial index": (
        lambda repo: repo.insert(Note(heading="h", kind="one")), ("unique", "notes_of_a_kind", "notes", ("Title %",))
    ),
    "a foreign key": (
        lambda repo: repo.insert(Post(title="q", author_id=77)),
        ("foreign_key", "posts_author_id_fkey", "posts", ("author_id",)),
    ),
    "a row that others refer to": (
        lambda repo: repo.delete_all(User), ("foreign_key", "posts_author_id_fkey", "posts", ("author_id",))
    ),
    "rows": (
        lambda repo: repo.insert_all(Tag, [{"label": "a"}, {"label": "a"}]),
        ("unique", "tags_label_key", "tags", ("label",)),
    ),
    "an update": (
        lambda repo: repo.update_all(Post, {"author_id": 77}),
        ("foreign_key", "posts_author_id_fkey", "posts", ("author_id",)),
    ),
    "text, of which no mapping knows": (
        lambda repo: repo.execute("INSERT INTO tags (id, label) VALUES (1, 'a'), (2, 'a')"),
        ("unique", "tags_label_key", "tags", ()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_which_constraint_it_was(repo: type[Repo], case: str) -> None:
    """Kind, name and table from the server, columns from the mapping, in the error that SQLAlchemy's users catch."""
    verb, expected = REFUSED[case]
    with pytest.raises(IntegrityError) as caught:
        verb(repo)
    error = caught.value
    assert isinstance(error, ConstraintError)
    assert (error.kind, error.constraint, error.table, error.columns) == expected
    assert error.statement
    assert any(repo.get_database().home in note for note in error.__notes__)


def test_a_column_that_is_null(repo: type[Repo]) -> None:
    """The server says which; the constraint has a name from PostgreSQL 18 on."""
    with pytest.raises(ConstraintError) as caught:
        repo.insert(User(name=None))  # type: ignore[arg-type]
    assert (caught.value.kind, caught.value.table, caught.value.columns) == ("not_null", "users", ("name",))


def test_check_and_exclusion(repo: type[Repo]) -> None:
    """Of these the server tells the name; it does not tell columns, and no text is read for them."""
    with repo.connection() as connection:
        connection.execute(
            text("CREATE TEMP TABLE cells (n int CHECK (n > 0), r int4range, EXCLUDE USING gist (r WITH &&))")
        )
        connection.execute(text("INSERT INTO cells VALUES (1, '[1,5)')"))
        for values, kind, name in (
            ("(0, NULL)", "check", "cells_n_check"),
            ("(1, '[2,3)')", "exclusion", "cells_r_excl"),
        ):
            with pytest.raises(ConstraintError) as caught:
                repo.execute(f"INSERT INTO cells VALUES {values}")
            assert (caught.value.kind, caught.value.constraint, caught.value.columns) == (kind, name, ())


def test_in_a_session_and_on_an_engine_too(repo: type[Repo]) -> None:
    """Whoever sends the statement gets the same error."""
    with repo.session() as session, pytest.raises(ConstraintError, match="users_email_key"):
        session.add(User(name="B", email="ada@x"))
        session.flush()
    with repo.engine().connect() as connection, pytest.raises(ConstraintError) as caught:
        connection.execute(insert(User).values(name="B", email="ada@x"))
    assert caught.value.columns == ("email",)


def test_a_deferred_constraint_fails_at_commit(repo: type[Repo], sql: SQL) -> None:
    """With the same error, by name; and its replacement."""
    sql("ALTER TABLE posts ADD CONSTRAINT late UNIQUE (title) DEFERRABLE INITIALLY DEFERRED")
    try:
        with pytest.raises(ConstraintError) as caught:
            with repo.transaction():
                repo.insert(Post(title="p"))
                assert repo.count(Post) == 2
        assert (caught.value.kind, caught.value.constraint, caught.value.table) == ("unique", "late", "posts")
        with pytest.raises(KeyError), repo.call_options(constraint_errors={"late": KeyError}):
            with repo.transaction():
                repo.insert(Post(title="p"))
    finally:
        sql("ALTER TABLE posts DROP CONSTRAINT late")


def test_it_survives_pickling(repo: type[Repo]) -> None:
    """A worker process can report it."""
    with pytest.raises(ConstraintError) as caught:
        repo.insert(User(name="B", email="ada@x"))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.kind, copy.constraint, copy.table, copy.columns) == ("unique", "users_email_key", "users", ("email",))
    assert str(copy) == str(caught.value)


# constraint_errors


class EmailTaken(Exception):
    """What an application says."""


def test_an_error_of_the_application(repo: type[Repo]) -> None:
    """It is made of the constraint's error, which stays its cause; other constraints are not affected."""
    with repo.call_options(constraint_errors={"users_email_key": EmailTaken}):
        with pytest.raises(EmailTaken) as caught:
            repo.insert(User(name="B", email="ada@x"))
        cause = caught.value.__cause__
        assert isinstance(cause, ConstraintError)
        assert caught.value.args == (cause,)
        with pytest.raises(ConstraintError, match="places_label_key"):
            repo.insert(Place(row=5, seat=5, label="x"))
    with pytest.raises(ConstraintError):
        repo.insert(User(name="B", email="ada@x"))


def test_blocks_nest(repo: type[Repo]) -> None:
    """Of one name the innermost counts; others stay."""
    outer = {"users_email_key": EmailTaken, "places_label_key": KeyError}
    with repo.call_options(constraint_errors=outer), repo.call_options(constraint_errors={"users_email_key": OSError}):
        with pytest.raises(OSError):
            repo.insert(User(name="B", email="ada@x"))
        with pytest.raises(KeyError):
            repo.insert(Place(row=5, seat=5, label="x"))


def test_in_a_transaction_it_dooms_as_any_error_does(repo: type[Repo], sql: SQL) -> None:
    """The server has aborted it, whatever the error is called; a savepoint keeps the rest."""
    with repo.call_options(constraint_errors={"users_email_key": EmailTaken}):
        with pytest.raises(TransactionDoomedError, match="users_email_key"), repo.transaction():
            with pytest.raises(EmailTaken):
                repo.insert(User(name="B", email="ada@x"))
        with repo.transaction():
            repo.insert(Tag(label="kept"))
            with pytest.raises(EmailTaken), repo.savepoint():
                repo.insert(User(name="B", email="ada@x"))
    assert sql("SELECT label FROM tags") == [("kept",)]


def test_bad_names_for_errors(repo: type[Repo]) -> None:
    """Refused where they are given."""
    with pytest.raises(ConfigError, match="must be a mapping"):
        repo.call_options(constraint_errors=[EmailTaken])  # type: ignore[typeddict-item]
    with pytest.raises(ConfigError, match="must be an exception class"):
        repo.call_options(constraint_errors={"users_email_key": "taken"})  # type: ignore[dict-item]
