"""What the verbs that read return, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete, func, insert, inspect, select, text, update
from sqlalchemy.exc import MultipleResultsFound, NoResultFound
from sqlalchemy.orm import joinedload, selectinload
from sqlalchemy.orm.exc import DetachedInstanceError

from shardrepo import Repo

from ..conftest import SQL
from ..models import Animal, Book, Chapter, Dog, Place, Post, Shelf, Tag, User

pytestmark = pytest.mark.verbs


@pytest.fixture
def three_users(sql: SQL) -> None:
    sql("INSERT INTO users (name, email, age) VALUES ('Ada', 'ada@x', 36), ('Bob', 'bob@x', 40), ('Cy', NULL, 40)")


@pytest.fixture
def shelves(sql: SQL) -> None:
    sql("INSERT INTO shelves (label) VALUES ('tall'), ('bare')")
    sql("INSERT INTO books (title, text, shelf_id) VALUES ('One', 'one ...', 1), ('Two', 'two ...', 1)")
    sql("INSERT INTO chapters (book_id, title) VALUES (1, 'a'), (1, 'b'), (2, 'c')")


def test_get_returns_a_detached_object_with_every_column(repo: type[Repo], three_users: None) -> None:
    """`get` loads the row whole, the server's columns too, and lets go of the object."""
    user = repo.get(User, 1)
    assert user is not None
    assert (user.id, user.name, user.email, user.age, user.city, user.name_length) == (
        1, "Ada", "ada@x", 36, "nowhere", 3,
    )  # fmt: skip
    assert inspect(user).detached
    assert not inspect(user).modified


def test_get_of_a_missing_row_is_none(repo: type[Repo], three_users: None) -> None:
    """`get` returns None for a key that no row has."""
    assert repo.get(User, 4) is None


def test_two_gets_are_two_objects(repo: type[Repo], three_users: None) -> None:
    """A verb has no identity map: the same row loaded twice is two objects, in a transaction too."""
    assert repo.get(User, 1) is not repo.get(User, 1)
    with repo.transaction():
        assert repo.get(User, 1) is not repo.get(User, 1)


def test_get_one_raises_for_a_missing_row(repo: type[Repo], three_users: None) -> None:
    """`get_one` returns the object or raises SQLAlchemy's error, which names model, key and database."""
    assert repo.get_one(User, 2).name == "Bob"
    with pytest.raises(NoResultFound, match=r"User.*4") as caught:
        repo.get_one(User, 4)
    assert repo.get_database().home in str(caught.value)


@pytest.mark.parametrize("key", [(1, 2), {"row": 1, "seat": 2}, {"seat": 2, "row": 1}])
def test_get_by_a_composite_key(repo: type[Repo], sql: SQL, key: Any) -> None:
    """A key of two columns is a tuple in the mapping's order, or a mapping in any."""
    sql("INSERT INTO places (row, seat, label) VALUES (1, 2, 'right'), (2, 1, 'wrong')")
    assert repo.get_one(Place, key).label == "right"


@pytest.mark.parametrize("key", [1, (1,), (1, 2, 3), {"row": 1}, {"row": 1, "seat": 2, "label": "x"}])
def test_get_refuses_a_key_that_does_not_fit(repo: type[Repo], key: Any) -> None:
    """A key with too few or too many columns is a `ValueError` that names the model."""
    with pytest.raises(ValueError, match="Place"):
        repo.get(Place, key)


@pytest.mark.parametrize(("model", "key"), [(User, None), (User, (None,)), (Place, (1, None)), (Dog, None)])
def test_get_refuses_none_as_a_key(repo: type[Repo], model: type[Any], key: Any) -> None:
    """None is no key: `get` and `get_one` raise `ValueError` instead of finding nothing."""
    for verb in (repo.get, repo.get_one):
        with pytest.raises(ValueError, match="never None"):
            verb(model, key)


def test_get_by(repo: type[Repo], three_users: None) -> None:
    """`get_by` finds the one row with these values, or None."""
    user = repo.get_by(User, name="Bob", age=40)
    assert user is not None
    assert user.id == 2
    assert repo.get_by(User, name="Bob", age=41) is None


def test_get_by_refuses_several_rows(repo: type[Repo], three_users: None) -> None:
    """`get_by` raises SQLAlchemy's error when more than one row has these values."""
    with pytest.raises(MultipleResultsFound):
        repo.get_by(User, age=40)


@pytest.mark.parametrize(
    ("columns", "message"), [({"email": None}, "is_\\(None\\)"), ({"emial": "x"}, "email"), ({}, "no column")]
)
def test_get_by_refuses_what_would_match_by_accident(
    repo: type[Repo], three_users: None, columns: dict[str, Any], message: str
) -> None:
    """None, a misspelt column and no column at all are each a `ValueError` with the remedy."""
    for verb in (repo.get_by, repo.get_one_by, repo.all_by):
        with pytest.raises(ValueError, match=message):
            verb(User, **columns)


def test_get_by_refuses_a_relationship(repo: type[Repo], three_users: None) -> None:
    """`get_by` looks by columns; a relationship is none."""
    with pytest.raises(ValueError, match="author"):
        repo.get_by(Post, author=1)


def test_get_one_by(repo: type[Repo], three_users: None) -> None:
    """`get_one_by` finds the one row with these values, and raises SQLAlchemy's errors for none and for several."""
    assert repo.get_one_by(User, name="Bob").id == 2
    with pytest.raises(NoResultFound):
        repo.get_one_by(User, name="Dot")
    with pytest.raises(MultipleResultsFound):
        repo.get_one_by(User, age=40)


def test_all_by(repo: type[Repo], three_users: None) -> None:
    """`all_by` finds every row with these values."""
    assert sorted(user.name for user in repo.all_by(User, age=40)) == ["Bob", "Cy"]
    assert repo.all_by(User, age=41) == []


def test_one(repo: type[Repo], three_users: None) -> None:
    """`one` returns the only result, and raises SQLAlchemy's errors for none and for several."""
    assert repo.one(select(User).where(User.name == "Bob")).id == 2
    with pytest.raises(NoResultFound):
        repo.one(select(User).where(User.id == 4))
    with pytest.raises(MultipleResultsFound):
        repo.one(User)


def test_one_or_none(repo: type[Repo], three_users: None) -> None:
    """`one_or_none` is `one` with None for no result."""
    assert repo.one_or_none(select(User).where(User.id == 4)) is None
    found = repo.one_or_none(select(User).where(User.id == 3))
    assert found is not None
    assert found.name == "Cy"
    with pytest.raises(MultipleResultsFound):
        repo.one_or_none(select(User))


def test_all_of_a_class(repo: type[Repo], three_users: None) -> None:
    """`all` of a mapped class is a list of all its objects, detached and at home."""
    users = repo.all(User)
    assert sorted(user.name for user in users) == ["Ada", "Bob", "Cy"]
    assert {repo.home(user) for user in users} == {repo.get_database().home}
    assert all(inspect(user).detached for user in users)


def test_all_of_a_select(repo: type[Repo], three_users: None) -> None:
    """`all` respects filter, order, limit and offset."""
    query = select(User).where(User.age > 1).order_by(User.name.desc()).limit(2).offset(1)
    assert [user.name for user in repo.all(query)] == ["Bob", "Ada"]
    assert repo.all(select(User).where(User.age > 99)) == []


def test_results_of_one_column_are_values_and_of_several_are_rows(repo: type[Repo], three_users: None) -> None:
    """A query of one column gives its values, of several columns or entities rows."""
    assert repo.all(select(User.name).order_by(User.id)) == ["Ada", "Bob", "Cy"]
    assert repo.one(select(func.max(User.age))) == 40
    assert [tuple(row) for row in repo.all(select(User.id, User.name).order_by(User.id).limit(1))] == [(1, "Ada")]
    user, age = repo.one(select(User, User.age).where(User.id == 1))
    assert (repo.home(user), age) == (repo.get_database().home, 36)


def test_count(repo: type[Repo], three_users: None) -> None:
    """`count` counts rows, with the query's filter, distinct, limit and offset."""
    assert repo.count(User) == 3
    assert repo.count(select(User).where(User.age == 40)) == 2
    assert repo.count(select(User.age).distinct()) == 2
    assert repo.count(select(User).order_by(User.name).limit(2)) == 2
    assert repo.count(select(User).offset(2)) == 1
    assert repo.count(Tag) == 0


def test_count_of_columns_with_one_name(repo: type[Repo], three_users: None, sql: SQL) -> None:
    """`count` counts the rows of a join whose tables have columns of the same name."""
    sql("INSERT INTO posts (title, author_id) VALUES ('x', 1), ('y', 1)")
    assert repo.count(select(User, Post).join(Post, Post.author_id == User.id)) == 2


def test_count_refuses_a_grouped_query(repo: type[Repo], three_users: None) -> None:
    """The count of a grouped query has two meanings, so it has none."""
    with pytest.raises(ValueError, match="group"):
        repo.count(select(User.age).group_by(User.age))


def test_exists(repo: type[Repo], three_users: None) -> None:
    """`exists` says whether there is a row."""
    assert repo.exists(User) is True
    assert repo.exists(select(User).where(User.id == 4)) is False
    assert repo.exists(select(User).order_by(User.id).offset(3)) is False


@pytest.mark.parametrize("verb", ["one", "one_or_none", "first", "last", "all", "count", "exists"])
def test_queries_take_a_select_or_a_class_and_nothing_else(repo: type[Repo], verb: str) -> None:
    """What is neither a `select` nor a mapped class is a `TypeError`, before anything is sent."""
    for query in ("SELECT 1", text("SELECT 1"), delete(User), update(User), User(name="x"), int, None):
        with pytest.raises(TypeError):
            getattr(repo, verb)(query)


@pytest.mark.parametrize("model", [select(User), "User", int, User(name="Ada"), None])
def test_get_takes_a_mapped_class_and_nothing_else(repo: type[Repo], model: Any) -> None:
    """A statement, an object and an unmapped class are each a `TypeError` for the verbs that take a model."""
    with pytest.raises(TypeError):
        repo.get(model, 1)
    for verb in (repo.get_by, repo.get_one_by, repo.all_by):
        with pytest.raises(TypeError):
            verb(model, id=1)
    with pytest.raises(TypeError):
        repo.load(model, {"id": 1})
    with pytest.raises(TypeError):
        repo.insert_all(model, [{"name": "x"}])


def test_joined_inheritance(repo: type[Repo], sql: SQL) -> None:
    """An object in two tables is loaded from both, also when it is asked for by its parent class."""
    sql("INSERT INTO animals (kind) VALUES ('dog'), ('animal')")
    sql("INSERT INTO dogs (id, breed) VALUES (1, 'pug')")
    assert repo.get_one(Dog, 1).breed == "pug"
    assert repo.get(Dog, 2) is None
    assert [type(animal) for animal in repo.all(select(Animal).order_by(Animal.id))] == [Dog, Animal]
    assert type(repo.get(Animal, 1)) is Dog
    assert repo.home(repo.get_one(Animal, 1)) == repo.get_database().home
    assert repo.count(Dog) == 1


def test_collections_that_a_mapping_joins(repo: type[Repo], shelves: None) -> None:
    """A lazy="joined" collection comes with its owner, once, whatever verb loads it, and has a home."""
    queries: list[Callable[[], Shelf | None]] = [
        lambda: repo.get(Shelf, 1),
        lambda: repo.get_by(Shelf, label="tall"),
        lambda: repo.one(select(Shelf).where(Shelf.id == 1)),
        lambda: repo.one_or_none(select(Shelf).where(Shelf.id == 1)),
        lambda: repo.all(select(Shelf).order_by(Shelf.id))[0],
    ]
    for query in queries:
        shelf = query()
        assert shelf is not None
        assert sorted(book.title for book in shelf.books) == ["One", "Two"]
        assert {repo.home(book) for book in shelf.books} == {repo.get_database().home}
    assert [len(shelf.books) for shelf in repo.all(select(Shelf).order_by(Shelf.id))] == [2, 0]


def test_joined_rows_are_counted_once(repo: type[Repo], shelves: None) -> None:
    """A joined collection multiplies rows; `count`, `exists` and limits do not see it."""
    assert repo.count(Shelf) == 2
    assert repo.exists(select(Shelf).where(Shelf.label == "bare"))
    assert [len(shelf.books) for shelf in repo.all(select(Shelf).order_by(Shelf.id).limit(1))] == [2]


def test_collections_that_a_mapping_selects(repo: type[Repo], shelves: None) -> None:
    """A lazy="selectin" collection comes with its owner, at home, through a joined one too."""
    book = repo.get_one(Book, 1)
    assert sorted(chapter.title for chapter in book.chapters) == ["a", "b"]
    shelf = repo.get_one(Shelf, 1)
    chapters = [chapter for book in shelf.books for chapter in book.chapters]
    assert {repo.home(chapter) for chapter in [*book.chapters, *chapters]} == {repo.get_database().home}
    assert len(chapters) == 3


def test_eager_loading_that_a_query_asks_for(repo: type[Repo], three_users: None, sql: SQL) -> None:
    """Loader options of a query load what they say, and what they load has a home."""
    sql("INSERT INTO posts (title, author_id) VALUES ('x', 1), ('y', 1)")
    for option in (joinedload(User.posts), selectinload(User.posts)):
        user = repo.one(select(User).where(User.id == 1).options(option))
        assert sorted(post.title for post in user.posts) == ["x", "y"]
        assert {repo.home(post) for post in user.posts} == {repo.get_database().home}


def test_column_property_and_deferred_column(repo: type[Repo], shelves: None) -> None:
    """What the SELECT computes is loaded; what the mapping defers is not, and says so."""
    book = repo.get_one(Book, 1)
    assert book.headline == "ONE"
    with pytest.raises(DetachedInstanceError):
        _ = book.text


def test_what_is_not_loaded_raises(repo: type[Repo], three_users: None) -> None:
    """A relationship that was not loaded raises SQLAlchemy's own error, and loads nothing from anywhere."""
    with pytest.raises(DetachedInstanceError):
        _ = repo.get_one(User, 1).posts


def test_a_transaction_reads_its_own_writes(repo: type[Repo], three_users: None) -> None:
    """Inside a transaction every reading verb sees what the transaction wrote, and others do not."""
    with repo.transaction():
        repo.insert(User(name="Dot"))
        assert repo.count(User) == 4
        assert repo.exists(select(User).where(User.name == "Dot"))
        assert repo.get_by(User, name="Dot") is not None
        with repo.detached():
            assert repo.count(User) == 3


def test_execute_a_string(repo: type[Repo], three_users: None) -> None:
    """`execute` runs SQL with named parameters; its result is complete and outlives the connection."""
    result = repo.execute("SELECT id, name FROM users WHERE age = :age ORDER BY id", {"age": 40})
    assert repo.stats().in_use == 0
    assert [tuple(row) for row in result] == [(2, "Bob"), (3, "Cy")]


def test_execute_a_statement(repo: type[Repo], three_users: None, sql: SQL) -> None:
    """`execute` runs and commits statements that write, and says how many rows they met."""
    result = repo.execute(update(User).where(User.age == 40).values(city="Rome"))
    assert result.rowcount == 2  # type: ignore[attr-defined]  # a CursorResult
    assert sql("SELECT count(*) FROM users WHERE city = 'Rome'") == [(2,)]
    returned = repo.execute("DELETE FROM users WHERE id = :id RETURNING name", {"id": 1})
    assert returned.scalars().all() == ["Ada"]
    assert sql("SELECT count(*) FROM users") == [(2,)]


def test_execute_gives_objects_their_home(repo: type[Repo], shelves: None) -> None:
    """Objects that come out of `execute` are detached and at home, joined collections included."""
    chapter = repo.execute(select(Chapter).where(Chapter.id == 1)).scalar_one()
    assert repo.home(chapter) == repo.get_database().home
    assert inspect(chapter).detached
    shelf = repo.execute(select(Shelf).where(Shelf.id == 1)).unique().scalar_one()
    assert {repo.home(book) for book in shelf.books} == {repo.get_database().home}


def test_execute_many(repo: type[Repo], sql: SQL) -> None:
    """A list of parameters runs the statement once for each."""
    repo.execute("INSERT INTO tags (label) VALUES (:label)", [{"label": "a"}, {"label": "b"}])
    assert sql("SELECT label FROM tags ORDER BY 1") == [("a",), ("b",)]


def test_execute_many_by_a_mapped_class(repo: type[Repo], sql: SQL) -> None:
    """An INSERT of many rows is executed once, and what it returns is what was asked for."""
    repo.execute(insert(Tag), [{"label": "a"}, {"label": "b"}])
    stored = repo.execute(insert(Tag).returning(Tag.label), [{"label": "c"}, {"label": "d"}])
    assert sorted(stored.scalars()) == ["c", "d"]
    assert sql("SELECT label FROM tags ORDER BY 1") == [("a",), ("b",), ("c",), ("d",)]


def test_errors_name_the_database(repo: type[Repo]) -> None:
    """An error of the driver passes through unwrapped, with a note that names the database."""
    with pytest.raises(Exception, match="does not exist") as caught:
        repo.execute("SELECT * FROM nothing")
    assert any(repo.get_database().home in note for note in caught.value.__notes__)
