"""What the verbs that take a query make of its order, its limits and its options."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.orm import aliased, joinedload, selectinload

from shardrepo import Repo

from ..conftest import SQL
from ..models import Dog, Place, Post, Shelf, Tag, User

pytestmark = pytest.mark.verbs


@pytest.fixture(autouse=True)
def _rows(sql: SQL) -> None:
    sql("INSERT INTO users (name, email, age) VALUES ('Cy', 'c@x', 40), ('Ada', 'a@x', 36), ('Bob', NULL, 40)")
    sql("INSERT INTO posts (title, author_id) VALUES ('x', 1), ('y', 1), ('z', 2)")
    sql("INSERT INTO places (row, seat, label) VALUES (2, 1, 'c'), (1, 2, 'b'), (1, 1, 'a')")


# first and last

ORDERS: dict[str, tuple[Any, list[str]]] = {
    "by primary key": (select(User), ["Cy", "Ada", "Bob"]),
    "by name": (select(User).order_by(User.name), ["Ada", "Bob", "Cy"]),
    "by name, downwards": (select(User).order_by(User.name.desc()), ["Cy", "Bob", "Ada"]),
    "by name, upwards": (select(User).order_by(User.name.asc()), ["Ada", "Bob", "Cy"]),
    "by two columns": (select(User).order_by(User.age.desc(), User.name), ["Bob", "Cy", "Ada"]),
    "nulls last": (select(User).order_by(User.email.nulls_last()), ["Ada", "Cy", "Bob"]),
    "nulls first": (select(User).order_by(User.email.nulls_first()), ["Bob", "Ada", "Cy"]),
    "nulls last, downwards": (select(User).order_by(User.email.desc().nulls_last()), ["Cy", "Ada", "Bob"]),
    "by an expression": (select(User).order_by(func.lower(User.name)), ["Ada", "Bob", "Cy"]),
    "by a name": (select(User).order_by("name"), ["Ada", "Bob", "Cy"]),
    "by a label": (select(User).order_by(func.lower(User.name).label("low").desc()), ["Cy", "Bob", "Ada"]),
    "limited": (select(User).order_by(User.name).limit(2), ["Ada", "Bob"]),
    "from an offset": (select(User).order_by(User.name).offset(1), ["Bob", "Cy"]),
    "none": (select(User).where(User.id > 9), []),
    "limited to none": (select(User).limit(0), []),
}


@pytest.mark.parametrize("order", ORDERS)
def test_first_and_last(repo: type[Repo], order: str) -> None:
    """They are what `all` begins and ends with, in the query's order, else by primary key."""
    query, names = ORDERS[order]
    if order != "by primary key":
        assert [user.name for user in repo.all(query)] == names
    first, last = repo.first(query), repo.last(query)
    assert [user.name for user in (first, last) if user is not None] == names[:1] + names[-1:]
    assert {repo.home(user) for user in (first, last) if user is not None} <= {repo.get_database().home}


def test_first_and_last_of_a_class(repo: type[Repo]) -> None:
    """By primary key, all of it."""
    first, last = repo.first(Place), repo.last(Place)
    assert first is not None
    assert last is not None
    assert (first.label, last.label) == ("a", "c")
    assert repo.first(Tag) is repo.last(Dog) is None


def test_first_and_last_of_an_alias_and_of_columns(repo: type[Repo]) -> None:
    """The mapped class is found in what is selected, else an order is needed."""
    user = aliased(User)
    assert repo.last(select(user)).name == "Bob"
    assert repo.first(select(User.name)) == "Cy"
    assert tuple(repo.last(select(User.age, User.name).order_by(User.name))) == (40, "Cy")
    for verb in (repo.first, repo.last):
        with pytest.raises(ValueError, match="no order"):
            verb(select(func.now()))


def test_an_order_without_an_opposite(repo: type[Repo]) -> None:
    """Text can be ordered by, and has no opposite that is known."""
    query = select(User).order_by(text("name"))
    first = repo.first(query)
    assert first is not None
    assert first.name == "Ada"
    with pytest.raises(ValueError, match="opposite"):
        repo.last(query)


def test_first_and_last_with_a_joined_collection(repo: type[Repo]) -> None:
    """A collection that is joined multiplies rows, not results."""
    query = select(User).options(joinedload(User.posts)).order_by(User.name.desc())
    first, last = repo.first(query), repo.last(query.limit(2))
    assert first is not None
    assert last is not None
    assert (first.name, len(first.posts), last.name) == ("Cy", 2, "Bob")


# aggregate


def test_aggregates(repo: type[Repo]) -> None:
    """Each function of a class; an average of integers is a `Decimal`."""
    found = {name: repo.aggregate(User, name, User.age) for name in ("avg", "count", "max", "min", "sum")}
    assert found == {"avg": Decimal(116) / 3, "count": 3, "max": 40, "min": 36, "sum": 116} | {"avg": found["avg"]}
    assert abs(found["avg"] - Decimal(116) / 3) < Decimal("0.0001")


def test_aggregates_of_nothing(repo: type[Repo]) -> None:
    """The count of no values is 0, anything else is None; a count leaves None out."""
    nobody = select(User).where(User.id > 9)
    assert repo.aggregate(nobody, "count", User.id) == 0
    assert repo.aggregate(nobody, "max", User.age) is None
    assert repo.aggregate(User, "count", User.email) == 2


def test_aggregates_over_what_a_query_selects(repo: type[Repo]) -> None:
    """Filter, join, distinct, limit and offset count; an order only with a limit."""
    assert repo.aggregate(select(User).where(User.age == 40), "sum", User.age) == 80
    assert repo.aggregate(select(Post).join(Post.author), "max", User.name) == "Cy"
    assert repo.aggregate(select(User.age).distinct(), "sum", User.age) == 76
    assert repo.aggregate(select(User).order_by(User.name).limit(2), "sum", User.age) == 76
    assert repo.aggregate(select(User.name).order_by(User.name).limit(2), "sum", User.age) == 76
    assert repo.aggregate(select(User).order_by(User.name).offset(1), "min", User.name) == "Bob"
    assert repo.aggregate(User, "max", func.length(User.name)) == 3


def test_aggregates_that_have_no_one_meaning(repo: type[Repo]) -> None:
    """A grouped query, an unknown function, what is no column, a value that several rows have made one."""
    with pytest.raises(ValueError, match="group"):
        repo.aggregate(select(User.age).group_by(User.age), "max", User.age)
    with pytest.raises(ValueError, match="'avrg'; did you mean 'avg'"):
        repo.aggregate(User, "avrg", User.age)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(TypeError, match="column"):
        repo.aggregate(User, "max", "age")
    with pytest.raises(ValueError, match="distinct"):
        repo.aggregate(select(User.age).distinct(), "max", User.name)


# options=


def test_loader_options(repo: type[Repo]) -> None:
    """Every verb that loads objects takes them; what they load is at home."""
    options = [selectinload(User.posts)]
    found = [
        repo.get(User, 1, options=options),
        repo.get_one(User, 1, options=options),
        repo.one(select(User).where(User.id == 1), options=options),
        repo.one_or_none(select(User).where(User.id == 1), options=options),
        repo.first(User, options=options),
        repo.last(select(User).order_by(User.id.desc()), options=options),
        repo.all(select(User).order_by(User.id), options=options)[0],
        repo.reload(repo.load(User, {"id": 1}), options=options),
    ]
    with repo.stream(select(User).order_by(User.id), options=options) as users:
        found.append(next(users))
    for user in found:
        assert user is not None
        assert sorted(post.title for post in user.posts) == ["x", "y"]
        assert {repo.home(post) for post in user.posts} == {repo.get_database().home}


# load


def test_load(repo: type[Repo]) -> None:
    """A row or a mapping becomes a stored object of the current database, as a query would have loaded it."""
    row = repo.execute("SELECT * FROM users WHERE id = 2").one()
    for values in (row, row._mapping, dict(row._mapping)):
        user = repo.load(User, values)
        assert (user.id, user.name, user.name_length) == (2, "Ada", 3)
        assert repo.home(user) == repo.get_database().home
    assert repo.update(user, name="Adele").name_length == 5
    found = repo.get(User, 2)
    assert found is not None
    assert found.name == "Adele"


def test_load_leaves_out_what_is_not_given(repo: type[Repo]) -> None:
    """What is missing is not loaded, what is unknown is left out, and a primary key there must be."""
    user = repo.load(User, {"id": 1, "nonsense": 1})
    with pytest.raises(Exception, match="not bound to a Session"):
        _ = user.name
    with pytest.raises(ValueError, match="id is missing"):
        repo.load(User, {"name": "Ada"})
    with pytest.raises(ValueError, match="seat is missing"):
        repo.load(Place, {"row": 1, "seat": None})
    with pytest.raises(TypeError, match="list"):
        repo.load(User, [1, "Ada"])  # type: ignore[arg-type]  # that is the point


def test_what_was_loaded_so_is_written_by_what_changed(repo: type[Repo], sql: SQL) -> None:
    """An update of it touches what it sets, and nothing that it was not given."""
    repo.update(repo.load(User, {"id": 1}), age=41)
    assert sql("SELECT name, age, email FROM users WHERE id = 1") == [("Cy", 41, "c@x")]
    repo.delete(repo.load(Tag, {"id": repo.insert(Tag(label="t")).id}))
    assert repo.count(Tag) == 0


def test_a_shelf_is_loaded_with_its_books(repo: type[Repo]) -> None:
    """What a mapping loads along is not loaded by `load`."""
    shelf = repo.insert(Shelf(label="one"))
    with pytest.raises(Exception, match="not bound to a Session"):
        _ = repo.load(Shelf, {"id": shelf.id}).books
