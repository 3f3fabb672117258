"""Objects that were loaded before: loaded anew, and with what they refer to."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import inspect, select
from sqlalchemy.orm import joinedload, load_only, selectinload

from shardrepo import Repo, WrongDatabaseError

from ..conftest import SQL
from ..models import Book, Chapter, Dog, Place, Post, Shelf, Tag, User

pytestmark = pytest.mark.verbs


@pytest.fixture(autouse=True)
def _rows(sql: SQL) -> None:
    sql("INSERT INTO users (name, age) VALUES ('Ada', 1), ('Bob', 2), ('Cy', 3)")
    sql("INSERT INTO posts (title, author_id) VALUES ('x', 1), ('y', 1), ('z', 2), ('alone', NULL)")
    sql("INSERT INTO tags (label) VALUES ('a'), ('b'), ('c')")
    sql("INSERT INTO post_tags (post_id, tag_id) VALUES (1, 1), (1, 2), (2, 2), (3, 3)")
    sql("INSERT INTO places (row, seat, label) VALUES (1, 1, 'a'), (1, 2, 'b'), (2, 1, 'c')")
    sql("INSERT INTO animals (kind) VALUES ('dog'), ('animal')")
    sql("INSERT INTO dogs (id, breed) VALUES (1, 'pug')")
    sql("INSERT INTO shelves (label) VALUES ('tall'), ('bare')")
    sql("INSERT INTO books (title, shelf_id) VALUES ('One', 1), ('Two', 1)")
    sql("INSERT INTO chapters (book_id, title) VALUES (1, 'a'), (1, 'b'), (2, 'c')")


def titles(user: User) -> list[str]:
    return sorted(post.title for post in user.posts)


# reload


def test_reload(repo: type[Repo], sql: SQL) -> None:
    """A new object with what is stored now; the old one stays as it is."""
    user = repo.get_one(User, 1)
    sql("UPDATE users SET name = 'Adele' WHERE id = 1")
    again = repo.reload(user)
    assert again is not None
    assert again is not user
    assert (user.name, again.name) == ("Ada", "Adele")
    assert repo.home(again) == repo.home(user)
    sql("DELETE FROM users WHERE id = 3")
    assert repo.reload(repo.load(User, {"id": 3})) is None


def test_reload_of_a_list(repo: type[Repo]) -> None:
    """Order and duplicates stay, what is missing is None, and classes may be mixed."""
    users = [repo.load(User, {"id": key}) for key in (3, 77, 1, 3)]
    again = repo.reload(users)
    assert [user and user.name for user in again] == ["Cy", None, "Ada", "Cy"]
    mixed: list[Any] = [repo.get_one(Dog, 1), repo.get_one(Place, (1, 2)), repo.get_one(Tag, 2)]
    dog, place, tag = repo.reload(mixed)
    assert (dog.breed, place.label, tag.label) == ("pug", "b", "b")
    assert repo.reload([]) == []


def test_reload_of_many(repo: type[Repo], sql: SQL) -> None:
    """More than one statement's keys."""
    sql("INSERT INTO tags (label) SELECT 'n' || n FROM generate_series(1, 1200) n")
    tags = repo.all(select(Tag).order_by(Tag.id.desc()))
    assert [tag and tag.id for tag in repo.reload(tags)] == [tag.id for tag in tags]
    places = [repo.load(Place, {"row": row, "seat": seat}) for row in range(30) for seat in range(30)]
    assert sum(place is not None for place in repo.reload(places)) == 3


# preload


def test_preload_of_a_collection(repo: type[Repo]) -> None:
    """The objects that were passed get what they refer to, and are returned."""
    users = repo.all(select(User).order_by(User.id))
    assert repo.preload(users, User.posts) is users
    assert [titles(user) for user in users] == [["x", "y"], ["z"], []]
    assert {repo.home(post) for user in users for post in user.posts} == {repo.get_database().home}
    assert not any(inspect(user).modified for user in users)


def test_preload_of_a_reference(repo: type[Repo]) -> None:
    """One row that several refer to is one object; a reference to nothing is None."""
    posts = repo.all(select(Post).order_by(Post.id))
    repo.preload(posts, Post.author)
    assert [post.author and post.author.name for post in posts] == ["Ada", "Ada", "Bob", None]
    assert posts[0].author is posts[1].author


def test_preload_through_a_table(repo: type[Repo]) -> None:
    """Many-to-many."""
    post = repo.get_one(Post, 1)
    repo.preload(post, Post.tags)
    assert sorted(tag.label for tag in post.tags) == ["a", "b"]


def test_preload_of_several_and_of_chains(repo: type[Repo]) -> None:
    """A chain loads along its way, and several relationships are loaded at once."""
    for wanted in (
        (selectinload(User.posts).selectinload(Post.tags),),
        (selectinload(User.posts, Post.tags),),
        (joinedload(User.posts).options(joinedload(Post.tags)),),
        (User.posts, selectinload(User.posts).selectinload(Post.tags)),
    ):
        user = repo.preload(repo.get_one(User, 1), *wanted)
        assert sorted((post.title, sorted(tag.label for tag in post.tags)) for post in user.posts) == [
            ("x", ["a", "b"]),
            ("y", ["b"]),
        ]
    post = repo.preload(repo.get_one(Post, 1), Post.author, Post.tags)
    assert post.author is not None
    assert (post.author.name, len(post.tags)) == ("Ada", 2)


def test_preload_of_some(repo: type[Repo]) -> None:
    """A filter, on its own and in a chain."""
    user = repo.preload(repo.get_one(User, 1), User.posts.and_(Post.title == "y"))
    assert titles(user) == ["y"]
    chain = selectinload(User.posts.and_(Post.title == "x")).selectinload(Post.tags.and_(Tag.label == "b"))
    user = repo.preload(repo.get_one(User, 1), chain)
    assert [[tag.label for tag in post.tags] for post in user.posts] == [["b"]]


def test_what_is_loaded_is_not_loaded_again(repo: type[Repo], sql: SQL) -> None:
    """Unless it is forced; where a chain begins with what is loaded, the rest is loaded for that."""
    user = repo.preload(repo.get_one(User, 1), User.posts)
    posts = list(user.posts)
    sql("INSERT INTO posts (title, author_id) VALUES ('late', 1)")
    repo.preload(user, selectinload(User.posts).selectinload(Post.tags))
    assert all(one is other for one, other in zip(user.posts, posts, strict=True))
    assert sorted(len(post.tags) for post in user.posts) == [1, 2]
    repo.preload(user, User.posts, force=True)
    assert titles(user) == ["late", "x", "y"]


def test_order_and_duplicates(repo: type[Repo]) -> None:
    """Two objects of one row, and one object twice, are each loaded; None is passed over."""
    one, other = repo.get_one(User, 1), repo.get_one(User, 1)
    given = [other, None, one, other]
    assert repo.preload(given, User.posts) is given
    assert titles(one) == titles(other) == ["x", "y"]
    assert repo.preload(None, User.posts) is None
    assert repo.preload([], User.posts) == []


def test_preload_leaves_neighbours_alone(repo: type[Repo]) -> None:
    """Objects with neighbours of their own, each another object of one row, do not get into each other's way."""
    posts = [repo.preload(repo.get_one(Post, key), Post.author) for key in (1, 2)]
    assert posts[0].author is not posts[1].author
    authors = [post.author for post in posts]
    repo.preload(posts, Post.tags)
    assert [post.author for post in posts] == authors
    assert [len(post.tags) for post in posts] == [2, 1]


def test_preload_of_what_a_mapping_loads(repo: type[Repo]) -> None:
    """Objects whose relationships come by a join or a second statement bring those along."""
    (book, *_) = repo.preload([repo.get_one(Book, 1)], Book.shelf)
    assert book.shelf is not None
    assert sorted(other.title for other in book.shelf.books) == ["One", "Two"]
    shelf = repo.load(Shelf, {"id": 1})
    repo.preload(shelf, Shelf.books)
    assert sorted(len(other.chapters) for other in shelf.books) == [1, 2]


def test_preload_of_many(repo: type[Repo], sql: SQL) -> None:
    """More than one statement's keys."""
    sql("INSERT INTO posts (title, author_id) SELECT 'n', 3 FROM generate_series(1, 1200)")
    posts = repo.preload(repo.all(select(Post)), Post.author)
    assert sum(post.author is not None and post.author.name == "Cy" for post in posts) == 1200


def test_in_a_transaction(repo: type[Repo]) -> None:
    """Both see what the transaction has written."""
    with repo.transaction():
        user = repo.get_one(User, 3)
        repo.insert(Post(title="new", author_id=3))
        assert titles(repo.preload(user, User.posts)) == ["new"]
        repo.update(user, name="Cyd")
        again = repo.reload(user)
        assert again is not None
        assert again.name == "Cyd"


def test_at_home_whatever_is_current(
    repo: type[Repo], two_databases: tuple[str, str], make_repo: Callable[..., type[Repo]]
) -> None:
    """Objects are loaded from where they are stored, in another thread and in another context, too."""
    user, post = repo.get_one(User, 1), repo.get_one(Post, 1)
    home = repo.home(user)
    found: list[Any] = []

    def elsewhere() -> None:
        with repo.using(two_databases[1]):
            found.extend([repo.reload(user), repo.preload(post, Post.author)])

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert [repo.home(each) for each in (*found, post.author)] == [home] * 3
    assert found[0].name == "Ada"
    stranger = make_repo(two_databases[1])
    with pytest.raises(WrongDatabaseError, match="nobody has chosen it") as caught:
        stranger.reload(user)
    assert caught.value.expected == home


def test_two_users_of_one_home(repo: type[Repo], two_databases: tuple[str, str]) -> None:
    """Neither stands in for the other while a third database is current."""
    user = repo.get_one(User, 1)
    with repo.using(database=two_databases[0], username="somebody", password="else"):
        assert repo.home(user) == repo.get_database().home
    with repo.using(two_databases[1]), pytest.raises(WrongDatabaseError, match="several users"):
        repo.reload(user)
    assert repo.reload(user) is not None


def test_two_homes_in_one_call(repo: type[Repo], two_databases: tuple[str, str], sql: SQL) -> None:
    """They are refused before anything is sent."""
    here = repo.load(User, {"id": 1})
    with repo.using(two_databases[1]):
        there = repo.load(User, {"id": 1})
    for call in (lambda: repo.reload([here, there]), lambda: repo.preload([here, there], User.posts)):
        with pytest.raises(WrongDatabaseError, match="meet in one call"):
            call()


BAD: dict[str, tuple[Callable[[type[Repo]], object], type[Exception], str]] = {
    "reload of what was never stored": (lambda repo: repo.reload(User(name="x")), ValueError, "never stored"),
    "preload of what was never stored": (lambda repo: repo.preload(User(name="x"), User.posts), ValueError, "never"),
    "reload of a class": (lambda repo: repo.reload(User), TypeError, "object of a mapped class"),
    "preload of nothing": (lambda repo: repo.preload(repo.load(User, {"id": 1})), ValueError, "no relationship"),
    "a column": (lambda repo: repo.preload(repo.load(User, {"id": 1}), User.name), TypeError, "relationships"),
    "a name": (lambda repo: repo.preload(repo.load(User, {"id": 1}), "posts"), TypeError, "'posts'"),
    "another's": (lambda repo: repo.preload(repo.load(User, {"id": 1}), Post.tags), ValueError, "no relationship of a"),
    "columns": (lambda repo: repo.preload(repo.load(User, {"id": 1}), load_only(User.name)), TypeError, "is none"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(repo: type[Repo], case: str) -> None:
    """What cannot be meant says so, before anything is sent."""
    call, kind, message = BAD[case]
    attempts = repo.stats().attempts
    with pytest.raises(kind, match=message):
        call(repo)
    assert repo.stats().attempts == attempts


def test_a_preload_that_fails_changes_nothing(repo: type[Repo], sql: SQL) -> None:
    """Not even what had been loaded before the failure."""
    shelf = repo.load(Book, {"id": 1})
    sql("ALTER TABLE chapters RENAME TO pages")
    try:
        with pytest.raises(Exception, match="does not exist"):
            repo.preload(shelf, Book.shelf, Book.chapters)
    finally:
        sql("ALTER TABLE pages RENAME TO chapters")
    assert inspect(shelf).unloaded >= {"shelf", "chapters"}
    assert repo.count(Chapter) == 3
