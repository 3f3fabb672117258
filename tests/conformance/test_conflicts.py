"""What becomes of a row that is there already, of the object that was to be inserted, and of bad instructions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import UniqueConstraint, inspect
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.mutable import MutableDict
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardrepo import BulkResult, ConstraintError, Repo, WrongDatabaseError
from shardrepo.conflicts import Conflict
from shardrepo.destination import Destination

from ..conftest import SQL
from ..models import Account, Dog, Note, Place, Post, Tag, User
from .test_writing import picture

pytestmark = pytest.mark.verbs

SANDBOXED = True


class Changing(DeclarativeBase):
    """Root of a class whose values notice when they are changed in place."""


class ChangingNote(Changing):
    __tablename__ = "notes"

    id: Mapped[int] = mapped_column(primary_key=True)
    heading: Mapped[str] = mapped_column("Title %")
    token: Mapped[str] = mapped_column(default="t")
    data: Mapped[dict[str, Any]] = mapped_column(MutableDict.as_mutable(JSONB))


@pytest.fixture
def ada(sql: SQL) -> None:
    sql("INSERT INTO users (name, email, age, city) VALUES ('Ada', 'ada@x', 36, 'London')")


def test_a_value_that_changes_in_place_is_written_afterwards(repo: type[Repo], sql: SQL) -> None:
    """What the server gave back is what the mapping makes of it, which notices its changes."""
    note = ChangingNote(heading="h", data={"x": 1})
    repo.insert(note, on_conflict="nothing")
    note.data["y"] = 2
    repo.update(note)
    assert sql("SELECT data FROM notes") == [({"x": 1, "y": 2},)]


def test_without_a_conflict_it_is_an_insert(repo: type[Repo], sql: SQL) -> None:
    """The object is returned as `insert` returns it: whole, with key, defaults and home, detached."""
    user = User(name="Ada", email="ada@x")
    assert repo.insert(user, on_conflict="nothing") is user
    assert (user.id, user.age, user.city, user.name_length) == (1, 0, "nowhere", 3)
    assert repo.home(user) == repo.get_database().home
    assert inspect(user).detached
    assert not inspect(user).modified
    assert repo.update(user, name="Augusta").name_length == 7
    assert sql("SELECT name FROM users") == [("Augusta",)]


def test_a_conflict_is_raised(repo: type[Repo], ada: None) -> None:
    """By default, and when it is asked for."""
    for options in ({}, {"on_conflict": "raise"}):
        with pytest.raises(ConstraintError, match="users_email_key"):
            repo.insert(User(name="B", email="ada@x"), **options)


def test_nothing_is_none_and_leaves_the_object_alone(repo: type[Repo], sql: SQL, ada: None) -> None:
    """A skipped conflict is never a half-filled object."""
    user = User(name="B", email="ada@x")
    before = picture(user)
    assert repo.insert(user, on_conflict="nothing") is None
    assert picture(user) == before
    assert repo.insert(user, on_conflict="nothing", conflict_target=User.email) is None
    assert sql("SELECT name FROM users") == [("Ada",)]
    user.email = "b@x"
    inserted = repo.insert(user, on_conflict="nothing")
    assert inserted is user
    assert repo.get_one(User, user.id).name == "B"


def test_nothing_leaves_a_reference_to_a_parent_alone(repo: type[Repo], ada: None) -> None:
    """Also the key that would have been written for it."""
    user = repo.get_one(User, 1)
    repo.insert(Post(id=1, title="there"))
    post = Post(id=1, title="x", author=user)
    before = picture(post)
    assert repo.insert(post, on_conflict="nothing") is None
    assert picture(post) == before
    assert post.author is user
    assert post.author_id is None


def test_nothing_about_one_target_raises_about_another(repo: type[Repo], ada: None) -> None:
    """Only the conflict that is named is passed over."""
    with pytest.raises(ConstraintError, match="users_email_key"):
        repo.insert(User(id=5, name="B", email="ada@x"), on_conflict="nothing", conflict_target=User.id)


def test_replace_is_all_that_an_insert_would_have_written(repo: type[Repo], sql: SQL, ada: None) -> None:
    """All columns but the key and the target; what was not given has its default. The object is the row."""
    user = repo.insert(User(id=77, name="Augusta", email="ada@x"), on_conflict="replace", conflict_target="email")
    assert user is not None
    assert (user.id, user.name, user.age, user.city, user.name_length) == (1, "Augusta", 0, "nowhere", 7)
    assert inspect(user).identity == (1,)
    assert sql("SELECT id, name, age, city FROM users") == [(1, "Augusta", 0, "nowhere")]


ACTIONS: dict[str, tuple[Any, tuple[str, int, str]]] = {
    "a column": ([User.age], ("Ada", 9, "London")),
    "names": (["age", "name"], ("New", 9, "London")),
    "a column alone": (User.age, ("Ada", 9, "London")),
    "a mapping": ({"age": 1, User.city: "Bern"}, ("Ada", 1, "Bern")),
    "a mapping of SQL": ({User.age: User.age + 1}, ("Ada", 37, "London")),
    "a callable": (lambda excluded: {"age": User.age + excluded.age}, ("Ada", 45, "London")),
}


@pytest.mark.parametrize("action", ACTIONS)
def test_what_is_written_over_a_row(repo: type[Repo], sql: SQL, ada: None, action: str) -> None:
    """Exactly the columns that are said, and the object has what is stored of all others."""
    on_conflict, expected = ACTIONS[action]
    user = repo.insert(User(name="New", email="ada@x", age=9), on_conflict=on_conflict, conflict_target=User.email)
    assert user is not None
    assert (user.name, user.age, user.city) == expected
    assert sql("SELECT name, age, city FROM users") == [expected]


def test_where_says_which_rows_are_written_over(repo: type[Repo], sql: SQL, ada: None) -> None:
    """Another row is left as it is, and so is the object: None."""
    options: dict[str, Any] = {"on_conflict": "replace", "conflict_target": User.email}
    assert repo.insert(User(name="B", email="ada@x", age=5), where=User.age < 30, **options) is None
    newer = repo.insert(
        User(name="C", email="ada@x", age=50), where=lambda excluded: User.age < excluded.age, **options
    )
    assert newer is not None
    assert sql("SELECT name, age FROM users") == [("C", 50)]


(PLACES_LABEL,) = (each for each in Place.__table__.constraints if isinstance(each, UniqueConstraint))  # type: ignore[attr-defined]


@pytest.mark.parametrize("target", ["places_label_key", PLACES_LABEL, Place.label, ["label"]], ids=str)
def test_ways_to_name_a_target(repo: type[Repo], sql: SQL, target: Any) -> None:
    """A constraint by its name, a constraint, a column, columns."""
    sql("INSERT INTO places (row, seat, label) VALUES (1, 2, 'x')")
    place = repo.insert(Place(row=8, seat=9, label="x"), on_conflict={"changed": "now"}, conflict_target=target)
    assert place is not None
    assert (place.row, place.seat, place.changed) == (1, 2, "now")


def test_a_composite_target(repo: type[Repo], sql: SQL) -> None:
    """All columns of a key together."""
    sql("INSERT INTO places (row, seat, label) VALUES (1, 2, 'x')")
    place = repo.insert(Place(row=1, seat=2, label="y"), on_conflict="replace", conflict_target=[Place.row, "seat"])
    assert place is not None
    assert sql("SELECT row, seat, label FROM places") == [(1, 2, "y")]


@pytest.mark.parametrize("by", ["name", "index"])
def test_a_partial_index(repo: type[Repo], sql: SQL, by: str) -> None:
    """Its rows are in conflict, others are not; attributes may be called otherwise than columns."""
    (index,) = (each for each in Note.__table__.indexes)  # type: ignore[attr-defined]
    options: dict[str, Any] = {"on_conflict": ["data"], "conflict_target": index if by == "index" else index.name}
    first = repo.insert(Note(heading="h", kind="one", data=1), **options)
    second = repo.insert(Note(heading="h", kind="one", data=2), **options)
    other = repo.insert(Note(heading="h", kind="two", data=3), **options)
    assert (first.id, second.id, second.token) == (1, 1, first.token)
    assert other.id != 1
    assert sql("SELECT kind, data FROM notes ORDER BY id") == [("one", 2), ("two", 3)]


def test_a_version_is_counted(repo: type[Repo], sql: SQL) -> None:
    """Who has loaded the row before cannot write over what the conflict wrote."""
    old = repo.insert(Account(balance=1))
    account = repo.insert(Account(id=old.id, balance=5), on_conflict="replace", conflict_target="id")
    assert account is not None
    assert (account.balance, account.version) == (5, 2)
    with pytest.raises(Exception, match=r"not in .* any more"):
        repo.update(old, balance=7)
    again = repo.insert(Account(id=old.id, balance=6), on_conflict=["balance"], conflict_target="id")
    assert again is not None
    assert again.version == 3
    assert repo.update(again, balance=8).version == 4


def test_a_stored_parent_is_written_by_its_key(repo: type[Repo], sql: SQL) -> None:
    """And stays where it was referred to."""
    user = repo.insert(User(name="Ada"))
    post = Post(id=1, title="x", author=user)
    assert repo.insert(post, on_conflict="replace", conflict_target="id") is post
    assert post.author is user
    assert post.author_id == user.id
    assert sql("SELECT author_id FROM posts") == [(user.id,)]


def test_many_at_once_insert_one_row(repo: type[Repo], sql: SQL) -> None:
    """Threads that count up one row lose no count."""
    start = threading.Barrier(8)

    def work(_: int) -> None:
        start.wait(30)
        for _ in range(10):
            repo.insert(
                User(name="n", email="e", age=1),
                on_conflict=lambda excluded: {"age": User.age + excluded.age},
                conflict_target=User.email,
            )

    with ThreadPoolExecutor(8) as executor:
        list(executor.map(repo.carry(work), range(8)))
    assert sql("SELECT age FROM users") == [(80,)]


def test_rows_over_conflicts(repo: type[Repo], sql: SQL) -> None:
    """`insert_all` counts and returns what was written, however rows are sent."""
    sql("INSERT INTO tags (label) VALUES ('b')")
    rows = [{"label": label} for label in "abc"]
    assert repo.insert_all(Tag, rows, on_conflict="nothing", returning=Tag.label).rows == ["a", "c"]
    assert repo.insert_all(Tag, rows, on_conflict="nothing") == BulkResult(0, None)
    assert repo.insert_all(Tag, rows, on_conflict=["label"], conflict_target="label").count == 3
    notes = [{"heading": "h", "kind": "one", "words": ["x"]}, {"heading": "i", "kind": "one", "words": ["y"]}]
    options: dict[str, Any] = {"on_conflict": ["words"], "conflict_target": "notes_of_a_kind"}
    assert repo.insert_all(Note, notes, **options).count == 2
    assert repo.insert_all(Note, notes, returning=Note.words, **options).rows == [["x"], ["y"]]
    assert sql("SELECT count(*) FROM notes") == [(2,)]


def test_of_rows_for_one_row_the_last_one_counts(repo: type[Repo], sql: SQL) -> None:
    """In the order in which they are given, whatever keys they have; and what is returned is what is stored."""
    options: dict[str, Any] = {"on_conflict": "replace", "conflict_target": "email"}
    rows = [{"name": "a", "email": "1"}, {"name": "b", "email": "2", "age": 3}, {"name": "c", "email": "2"}]
    found = repo.insert_all(User, rows, returning=True, **options).rows
    assert sql("SELECT email, name, age FROM users ORDER BY email") == [("1", "a", 0), ("2", "c", 0)]
    assert [(user.email, user.name) for user in found or ()][-1] == ("2", "c")
    assert repo.insert_all(User, [{"name": "x", "email": "3"}, {"name": "y", "email": "3", "age": 1}],
                           on_conflict="nothing").count == 1  # fmt: skip
    assert sql("SELECT name FROM users WHERE email = '3'") == [("x",)]
    twice = repo.insert_all(User, [{"name": "p", "email": "4"}, {"name": "q", "email": "4", "age": 9}],
                            returning=True, **options).rows  # fmt: skip
    assert {(user.name, user.age) for user in twice or ()} == {("q", 9)}


def test_a_failure_leaves_the_object_as_it_was(repo: type[Repo], sql: SQL, ada: None) -> None:
    """Values, state, identity and home."""
    user = User(name="B", email="ada@x")
    before = picture(user)
    with pytest.raises(ConstraintError):
        repo.insert(user, on_conflict="replace", conflict_target="id")
    assert picture(user) == before


def test_an_object_of_another_database_is_refused(repo: type[Repo], two_databases: tuple[str, str], sql: SQL) -> None:
    """Also as a parent, before anything is sent."""
    name = repo.get_database().name
    (other,) = set(two_databases) - {name}
    with repo.using(other):
        copy = repo.rehome(User(name="x"))
        parent = repo.load(User, {"id": 1})
    with pytest.raises(WrongDatabaseError):
        repo.insert(copy, on_conflict="nothing")
    with pytest.raises(WrongDatabaseError):
        repo.insert(Post(title="x", author=parent), on_conflict="nothing")
    assert sql("SELECT count(*) FROM users") == sql("SELECT count(*) FROM posts") == [(0,)]


BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "an unknown word": (lambda: User(name="x"), {"on_conflict": "replce"}, "did you mean 'replace'"),
    "a target without an action": (lambda: User(name="x"), {"conflict_target": "id"}, "means nothing"),
    "no target": (lambda: User(name="x"), {"on_conflict": "replace"}, "conflict_target= is missing"),
    "no columns": (lambda: User(name="x"), {"on_conflict": [], "conflict_target": "id"}, "names no column"),
    "no target columns": (lambda: User(name="x"), {"on_conflict": "nothing", "conflict_target": []}, "names no column"),
    "an unknown column": (
        lambda: User(name="x"), {"on_conflict": ["nmae"], "conflict_target": "id"}, "did you mean 'name'"
    ),
    "an unknown target": (
        lambda: User(name="x"), {"on_conflict": "nothing", "conflict_target": ["emial"]}, "did you mean 'email'"
    ),
    "a criterion for nothing": (
        lambda: User(name="x"), {"on_conflict": "nothing", "where": User.age > 1}, "writes none"
    ),
    "children": (lambda: User(name="x", posts=[Post(title="p")]), {"on_conflict": "nothing"}, "insert them after it"),
    "a new parent": (
        lambda: Post(title="p", author=User(name="x")), {"on_conflict": "nothing"}, "insert them after it"
    ),
    "several tables": (lambda: Dog(breed="pug"), {"on_conflict": "nothing"}, "several tables"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_instructions_are_refused(repo: type[Repo], sql: SQL, case: str) -> None:
    """Before anything is sent, with the remedy; the object is as it was."""
    make, options, message = BAD[case]
    obj = make()
    before = picture(obj)
    with pytest.raises(ValueError, match=message):
        repo.insert(obj, **options)
    assert picture(obj) == before
    assert sql("SELECT count(*) FROM users") == [(0,)]


def test_a_stored_object_is_refused(repo: type[Repo]) -> None:
    """An upsert inserts; what is stored is updated."""
    user = repo.insert(User(name="x"))
    with pytest.raises(ValueError, match="is stored already"):
        repo.insert(user, on_conflict="nothing")


def test_versions_that_cannot_be_counted_have_to_be_said() -> None:
    """A version that is no number is never left at its first."""

    class Base(DeclarativeBase):
        pass

    class Sheet(Base):
        __tablename__ = "sheets"
        id: Mapped[int] = mapped_column(primary_key=True)
        version: Mapped[str] = mapped_column()
        __mapper_args__: Any = {"version_id_col": version, "version_id_generator": lambda _: "v"}

    destination = Destination.of(Sheet)
    conflict = Conflict.of(destination, "replace", "id", None)
    assert conflict is not None
    with pytest.raises(ValueError, match="say what it becomes"):
        conflict.apply(insert(destination.table))
    said = Conflict.of(destination, {"version": "w"}, "id", None)
    assert said is not None
    said.apply(insert(destination.table))


def test_insert_or_update_goes_by_the_object(repo: type[Repo], sql: SQL) -> None:
    """What was never stored is inserted, what was is updated, what was deleted is refused."""
    user = User(name="Ada")
    assert repo.insert_or_update(user) is user
    user.name = "Augusta"
    assert repo.insert_or_update(user) is user
    assert sql("SELECT id, name FROM users") == [(1, "Augusta")]
    repo.delete(user)
    with pytest.raises(ValueError, match="was deleted"):
        repo.insert_or_update(user)
