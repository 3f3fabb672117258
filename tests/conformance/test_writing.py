"""What the verbs that write do to the row and to the object, and what they leave alone when they fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import event, inspect
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm.exc import StaleDataError

from shardrepo import BulkResult, Repo, ShardRepoError, StaleError

from ..conftest import SQL
from ..models import Account, Animal, Book, Chapter, Dog, Place, Post, Shelf, Tag, User

pytestmark = pytest.mark.verbs

SANDBOXED = True


def picture(*objects: Any) -> list[Any]:
    """Everything that can be seen of objects: values, pending changes, state, identity and home."""
    return [_picture(inspect(obj)) for obj in objects]


def _picture(state: Any) -> dict[str, Any]:
    def shown(value: Any) -> Any:
        return [id(one) for one in value] if isinstance(value, list) else value

    return {
        "values": {name: shown(value) for name, value in state.dict.items() if name != "_sa_instance_state"},
        "changes": {attr.key: tuple(map(list, (part or () for part in attr.history))) for attr in state.attrs},
        "state": (state.transient, state.pending, state.persistent, state.deleted, state.was_deleted, state.detached),
        "identity": (state.key, state.identity_token, state.session),
        "modified": (state.modified, frozenset(state.unmodified), frozenset(state.expired_attributes)),
    }


# insert


def test_insert_returns_the_object_with_its_key_and_home(repo: type[Repo], sql: SQL) -> None:
    """`insert` returns the object that it was given, detached, with key, defaults and home."""
    user = User(name="Ada", email="ada@x")
    assert repo.home(user) is None
    assert repo.insert(user) is user
    assert (user.id, user.age, user.city, user.name_length) == (1, 0, "nowhere", 3)
    assert repo.home(user) == repo.get_database().home
    assert inspect(user).detached
    assert not inspect(user).modified
    assert sql("SELECT id, name, email, city FROM users") == [(1, "Ada", "ada@x", "nowhere")]


def test_insert_with_children(repo: type[Repo], sql: SQL) -> None:
    """`insert` stores what the object's relationships hold that is new, with keys and homes for all."""
    first, second = Post(title="one", tags=[Tag(label="t")]), Post(title="two")
    user = repo.insert(User(name="Ada", posts=[first, second]))
    assert sql("SELECT title, author_id FROM posts ORDER BY title") == [("one", user.id), ("two", user.id)]
    assert sql("SELECT post_id, tag_id FROM post_tags") == [(first.id, first.tags[0].id)]
    stored: list[Any] = [user, first, second, first.tags[0]]
    for obj in stored:
        assert repo.home(obj) == repo.get_database().home
        assert inspect(obj).detached
    assert first.author is user
    assert user.posts == [first, second]


def test_insert_of_a_new_child_with_a_new_parent(repo: type[Repo], sql: SQL) -> None:
    """A new parent is stored with its child, when the child is what is inserted."""
    post = repo.insert(Post(title="one", author=User(name="Ada")))
    assert post.author is not None
    assert sql("SELECT p.author_id = u.id FROM posts p, users u") == [(True,)]
    assert repo.home(post.author) == repo.get_database().home


def test_insert_with_a_stored_parent_writes_its_key(repo: type[Repo], sql: SQL) -> None:
    """A stored parent is written by key: it is neither attached nor changed, and stays where it was referred to."""
    user = repo.get_one(User, repo.insert(User(name="Ada")).id)
    post = Post(title="one", author=user)
    assert repo.insert(post).author is user
    assert post.author_id == user.id
    assert sql("SELECT author_id FROM posts") == [(user.id,)]
    assert inspect(user).session is None
    assert not inspect(post).modified


@pytest.mark.parametrize("loaded", [False, True], ids=["posts not loaded", "posts loaded"])
def test_one_parent_serves_many_threads(repo: type[Repo], sql: SQL, loaded: bool) -> None:
    """Threads that insert children of one stored parent at once each store their own, and all of them."""
    user = repo.insert(User(name="Ada", posts=[Post(title="first")] if loaded else []))
    if not loaded:
        user = repo.get_one(User, user.id)
    start = threading.Barrier(8)

    def work(number: int) -> list[Post]:
        start.wait(30)
        return [repo.insert(Post(title=f"{number}.{n}", author=user)) for n in range(10)]

    with ThreadPoolExecutor(8) as executor:
        made = [post for posts in executor.map(repo.carry(work), range(8)) for post in posts]
    titles = {f"{number}.{n}" for number in range(8) for n in range(10)} | ({"first"} if loaded else set())
    assert {title for (title,) in sql("SELECT title FROM posts")} == titles
    assert sql("SELECT count(*) FROM posts WHERE author_id = %s", user.id) == [(len(titles),)]
    assert len(sql("SELECT id FROM posts")) == len(titles)
    assert {repo.home(post) for post in made} == {repo.get_database().home}
    assert inspect(user).session is None
    assert all(post.author is user for post in made)


def test_insert_into_two_tables(repo: type[Repo], sql: SQL) -> None:
    """An object of joined inheritance is stored in both tables."""
    dog = repo.insert(Dog(breed="pug"))
    assert sql("SELECT a.id, kind, breed FROM animals a JOIN dogs d ON d.id = a.id") == [(dog.id, "dog", "pug")]
    assert repo.home(dog) == repo.get_database().home


def test_insert_with_a_version(repo: type[Repo]) -> None:
    """A version starts at 1."""
    assert repo.insert(Account(balance=5)).version == 1


def test_insert_with_a_composite_key(repo: type[Repo]) -> None:
    """A key of two columns comes from the object, what the server computes from the server."""
    place = repo.insert(Place(row=1, seat=2))
    assert place.changed is not None
    assert repo.get_one(Place, (1, 2)).changed == place.changed


def test_insert_refuses_a_stored_object(repo: type[Repo], sql: SQL) -> None:
    """An object that is stored, or was deleted, is not inserted again, and says where it is."""
    user = repo.insert(User(name="Ada"))
    with pytest.raises(ValueError, match="stored already"):
        repo.insert(user)
    repo.delete(user)
    with pytest.raises(ValueError, match="deleted"):
        repo.insert(user)
    assert sql("SELECT count(*) FROM users") == [(0,)]


@pytest.mark.parametrize("verb", ["insert", "update", "delete"])
@pytest.mark.parametrize("what", [object(), User, "Ada", None])
def test_writes_take_an_object_of_a_mapped_class(repo: type[Repo], verb: str, what: Any) -> None:
    """What is no object of a mapped class is a `TypeError`."""
    with pytest.raises(TypeError, match="mapped class"):
        getattr(repo, verb)(what)


def test_insert_all(repo: type[Repo], sql: SQL) -> None:
    """`insert_all` stores mappings by attribute, from any iterable, and says how many."""
    rows = ({"name": name, "age": age} for name, age in (("Ada", 36), ("Bob", 40)))
    assert repo.insert_all(User, rows) == BulkResult(2, None)
    assert sql("SELECT name, age, city FROM users ORDER BY id") == [("Ada", 36, "nowhere"), ("Bob", 40, "nowhere")]


def test_insert_all_with_rows_of_several_shapes(repo: type[Repo], sql: SQL) -> None:
    """Rows need not name the same columns; what one leaves out has its default."""
    repo.insert_all(User, [{"name": "Ada"}, {"name": "Bob", "city": "Rome"}, {"name": "Cy"}])
    assert sql("SELECT name, city FROM users ORDER BY 1") == [("Ada", "nowhere"), ("Bob", "Rome"), ("Cy", "nowhere")]


def test_insert_all_into_two_tables(repo: type[Repo], sql: SQL) -> None:
    """Rows of joined inheritance go into both tables."""
    repo.insert_all(Dog, [{"breed": "pug"}, {"breed": "lab"}])
    assert sql("SELECT breed, kind FROM animals JOIN dogs USING (id) ORDER BY 1") == [("lab", "dog"), ("pug", "dog")]


def test_insert_all_stores_all_or_nothing(repo: type[Repo], sql: SQL) -> None:
    """A row that fails takes the others with it, of whatever shape."""
    with pytest.raises(IntegrityError):
        repo.insert_all(User, [{"name": "Ada"}, {"name": "Bob", "email": "x"}, {"name": "Cy", "email": "x"}])
    assert sql("SELECT count(*) FROM users") == [(0,)]


@pytest.mark.parametrize("name", ["nmae", "posts"])
def test_insert_all_refuses_what_is_no_column(repo: type[Repo], sql: SQL, name: str) -> None:
    """A key that names no column is a `ValueError`, and nothing is stored."""
    with pytest.raises(ValueError, match=name):
        repo.insert_all(User, [{"name": "Ada"}, {"name": "Bob", name: "x"}])
    assert sql("SELECT count(*) FROM users") == [(0,)]


# update


def test_update_writes_and_returns_the_object(repo: type[Repo], sql: SQL) -> None:
    """`update` sets attributes, writes them, and brings back what the server computes from them."""
    user = repo.insert(User(name="Ada"))
    assert repo.update(user, {"age": 36}, name="Countess") is user
    assert (user.name, user.age, user.name_length) == ("Countess", 36, 8)
    assert sql("SELECT name, age FROM users") == [("Countess", 36)]
    assert inspect(user).detached
    assert not inspect(user).modified


def test_update_of_a_loaded_object(repo: type[Repo], sql: SQL) -> None:
    """An object that a verb loaded is written with the changes made on it since."""
    repo.insert(User(name="Ada"))
    user = repo.get_one(User, 1)
    user.name = "Bob"
    repo.update(user, age=7)
    assert sql("SELECT name, age FROM users") == [("Bob", 7)]
    assert (user.name_length, inspect(user).modified) == (3, False)


def test_update_brings_back_what_a_trigger_would_change(repo: type[Repo], sql: SQL) -> None:
    """A column with a server-side onupdate is loaded anew by the UPDATE itself."""
    place = repo.insert(Place(row=1, seat=2))
    sql("UPDATE places SET changed = 'by somebody'")
    repo.update(place, label="here")
    assert place.changed == "by somebody"


def test_update_without_changes_leaves_everything(repo: type[Repo], sql: SQL) -> None:
    """Values that are what they were are not written: another's change of that row stays."""
    account = repo.insert(Account(balance=5))
    before = picture(account)
    sql("UPDATE accounts SET balance = 6, version = 2")
    repo.update(account, balance=5)
    assert picture(account) == before
    assert sql("SELECT balance FROM accounts") == [(6,)]


def test_update_counts_the_version(repo: type[Repo], sql: SQL) -> None:
    """Each update raises the version by one, in the row and on the object."""
    account = repo.insert(Account(balance=5))
    repo.update(account, balance=6)
    repo.update(account, balance=7)
    assert account.version == 3
    assert sql("SELECT balance, version FROM accounts") == [(7, 3)]


def test_update_of_two_tables(repo: type[Repo], sql: SQL) -> None:
    """An object of joined inheritance is updated where the column is."""
    dog = repo.insert(Dog(breed="pug"))
    repo.update(repo.get_one(Dog, dog.id), breed="lab")
    assert sql("SELECT breed FROM dogs") == [("lab",)]


def test_update_of_a_relationship_to_one(repo: type[Repo], sql: SQL) -> None:
    """A reference is changed to another stored object, or to none, by key."""
    ada, bob = repo.insert(User(name="Ada")), repo.insert(User(name="Bob"))
    post = repo.insert(Post(title="x", author=ada))
    repo.update(post, author=bob)
    assert sql("SELECT author_id FROM posts") == [(bob.id,)]
    assert (post.author, post.author_id) == (bob, bob.id)
    repo.update(post, author=None)
    assert sql("SELECT author_id FROM posts") == [(None,)]
    assert (post.author, post.author_id) == (None, None)
    assert inspect(bob).session is None


def test_update_of_a_collection(repo: type[Repo], sql: SQL) -> None:
    """A loaded collection is written as it was changed: what is new is stored, what left is let go."""
    shelf = repo.insert(Shelf(label="tall", books=[Book(title="One"), Book(title="Two")]))
    one, two = shelf.books
    repo.update(shelf, books=[two, Book(title="Three")])
    assert sql("SELECT title FROM books ORDER BY id") == [("Two",), ("Three",)]
    assert [book.title for book in repo.get_one(Shelf, shelf.id).books] == ["Two", "Three"]
    assert repo.home(shelf.books[1]) == repo.get_database().home
    assert inspect(two).session is None


def test_update_of_many_to_many(repo: type[Repo], sql: SQL) -> None:
    """Links to stored objects are added and removed."""
    red, blue = repo.insert(Tag(label="red")), repo.insert(Tag(label="blue"))
    post = repo.insert(Post(title="x", tags=[red]))
    repo.update(post, tags=[blue])
    assert sql("SELECT tag_id FROM post_tags") == [(blue.id,)]
    assert sql("SELECT count(*) FROM tags") == [(2,)]


def test_update_refuses_an_unknown_attribute(repo: type[Repo], sql: SQL) -> None:
    """A misspelt attribute is a `ValueError` with a suggestion, and nothing is set or written."""
    user = repo.insert(User(name="Ada"))
    before = picture(user)
    with pytest.raises(ValueError, match="did you mean 'name'"):
        repo.update(user, {"age": 5}, nmae="Bob")
    assert picture(user) == before
    assert sql("SELECT name, age FROM users") == [("Ada", 0)]


@pytest.mark.parametrize("verb", ["update", "delete"])
def test_update_and_delete_refuse_what_was_never_stored(repo: type[Repo], verb: str) -> None:
    """A new object has no row to change: `ValueError`, which says what to do instead."""
    user = User(name="Ada")
    before = picture(user)
    with pytest.raises(ValueError, match="insert"):
        getattr(repo, verb)(user)
    assert picture(user) == before


# delete


def test_delete_returns_the_object(repo: type[Repo], sql: SQL) -> None:
    """`delete` removes the row and returns the object, which knows its values and that it is gone."""
    tag = repo.insert(Tag(label="x"))
    assert repo.delete(tag) is tag
    assert tag.label == "x"
    assert inspect(tag).was_deleted
    assert sql("SELECT count(*) FROM tags") == [(0,)]


def test_delete_takes_with_it_what_the_mapping_says(repo: type[Repo], sql: SQL) -> None:
    """A cascade is followed in the database, loaded or not, and links of many-to-many are removed."""
    user = repo.insert(User(name="Ada", posts=[Post(title="x", tags=[Tag(label="t")])]))
    repo.insert(User(name="Bob", posts=[Post(title="y")]))
    repo.delete(repo.get_one(User, user.id))
    assert sql("SELECT title FROM posts") == [("y",)]
    assert sql("SELECT count(*) FROM post_tags") == [(0,)]
    assert sql("SELECT count(*) FROM tags") == [(1,)]


def test_delete_lets_go_of_children_that_it_does_not_cascade_to(repo: type[Repo], sql: SQL) -> None:
    """Children without a delete cascade stay, and lose their reference."""
    book = repo.insert(Book(title="One", chapters=[Chapter(title="a")]))
    repo.delete(repo.get_one(Book, book.id))
    assert sql("SELECT title, book_id FROM chapters") == [("a", None)]


def test_delete_from_two_tables(repo: type[Repo], sql: SQL) -> None:
    """An object of joined inheritance is removed from both tables."""
    dog = repo.insert(Dog(breed="pug"))
    repo.delete(dog)
    assert sql("SELECT count(*) FROM animals") == sql("SELECT count(*) FROM dogs") == [(0,)]


@pytest.mark.parametrize("verb", ["update", "delete"])
def test_a_deleted_object_is_not_written_again(repo: type[Repo], verb: str) -> None:
    """An object that was deleted by a verb is a `ValueError` for the next one."""
    user = repo.delete(repo.insert(User(name="Ada")))
    with pytest.raises(ValueError, match="deleted"):
        getattr(repo, verb)(user)


# What is stale


MAKERS: dict[str, Callable[[], Any]] = {
    "one table": lambda: Tag(label="x"),
    "relationships": lambda: User(name="Ada", posts=[Post(title="x")]),
    "joined inheritance": lambda: Dog(breed="pug"),
    "a version": lambda: Account(balance=1),
    "a composite key": lambda: Place(row=1, seat=2, label="x"),
}
CHANGED = {Tag: "label", User: "name", Dog: "breed", Account: "balance", Place: "label"}


@pytest.mark.parametrize("verb", ["update", "delete"])
@pytest.mark.parametrize("maker", MAKERS)
def test_a_missing_row_is_stale(repo: type[Repo], sql: SQL, verb: str, maker: str) -> None:
    """Updating or deleting a row that is gone is a `StaleError` with its home, and the object is as it was."""
    obj = repo.insert(MAKERS[maker]())
    sql("TRUNCATE users, tags, animals, accounts, places CASCADE")
    before = picture(obj)
    with pytest.raises(StaleError) as caught:
        repo.delete(obj) if verb == "delete" else repo.update(
            obj, {CHANGED[type(obj)]: 9 if maker == "a version" else "y"}
        )
    assert caught.value.home == repo.get_database().home
    assert isinstance(caught.value, StaleDataError)
    assert isinstance(caught.value, ShardRepoError)
    assert picture(obj) == before


@pytest.mark.parametrize("verb", ["update", "delete"])
def test_another_version_is_stale(repo: type[Repo], sql: SQL, verb: str) -> None:
    """A row that somebody else has written since is not written, and stays as they left it."""
    account = repo.insert(Account(balance=1))
    repo.update(repo.get_one(Account, account.id), balance=2)
    before = picture(account)
    with pytest.raises(StaleError):
        repo.delete(account) if verb == "delete" else repo.update(account, balance=3)
    assert picture(account) == before
    assert sql("SELECT balance, version FROM accounts") == [(2, 2)]


# Verbs that fail


def test_a_failed_insert_leaves_the_object_as_it_was(repo: type[Repo], sql: SQL) -> None:
    """The object is transient again, without key, defaults or home, and can be inserted when the cause is gone."""
    sql("INSERT INTO users (id, name, email, age) VALUES (99, 'Eve', 'taken', 1)")
    user = User(name="Ada", email="taken")
    before = picture(user)
    with pytest.raises(IntegrityError):
        repo.insert(user)
    assert picture(user) == before
    assert repo.home(user) is None
    sql("DELETE FROM users")
    repo.insert(user)
    assert sql("SELECT name FROM users") == [("Ada",)]
    assert repo.home(user) == repo.get_database().home


def test_a_failed_insert_of_a_graph_leaves_all_of_it_as_it_was(repo: type[Repo], sql: SQL) -> None:
    """When the last table of a graph fails, nothing of it is stored, and every object is as it was."""
    sql("INSERT INTO tags (label) VALUES ('taken')")
    tag = Tag(label="taken")
    posts = [Post(title="one"), Post(title="two", tags=[tag])]
    user = User(name="Ada", posts=posts)
    before = picture(user, *posts, tag)
    with pytest.raises(IntegrityError):
        repo.insert(user)
    assert picture(user, *posts, tag) == before
    assert sql("SELECT count(*) FROM users") == sql("SELECT count(*) FROM posts") == [(0,)]
    tag.label = "free"
    repo.insert(user)
    assert sql("SELECT title, author_id FROM posts ORDER BY 1") == [("one", user.id), ("two", user.id)]
    assert sql("SELECT label FROM tags ORDER BY 1") == [("free",), ("taken",)]


def test_a_failed_insert_beside_a_stored_parent(repo: type[Repo], sql: SQL) -> None:
    """A stored parent of what fails is as it was, and so is its reference."""
    user = repo.get_one(User, repo.insert(User(name="Ada")).id)
    post = Post(title=None, author=user)
    before = picture(user, post)
    with pytest.raises(IntegrityError):
        repo.insert(post)
    assert picture(user, post) == before
    assert post.author is user
    post.title = "x"
    repo.insert(post)
    assert sql("SELECT author_id FROM posts") == [(user.id,)]


def test_siblings_of_what_is_inserted_stay_new(repo: type[Repo], sql: SQL) -> None:
    """Another new child of the same stored parent is not inserted along, whether that succeeds or fails."""
    user = repo.insert(User(name="Ada", posts=[Post(title="first")]))
    good, bad, sibling = Post(title="good", author=user), Post(title=None, author=user), Post(title="s", author=user)
    before = picture(sibling)
    repo.insert(good)
    with pytest.raises(IntegrityError):
        repo.insert(bad)
    assert picture(sibling) == before
    assert sql("SELECT title FROM posts ORDER BY id") == [("first",), ("good",)]


def test_a_failure_leaves_alone_what_another_call_stored(repo: type[Repo], sql: SQL) -> None:
    """When an insert fails, a sibling that was stored while it ran, as by another thread, stays stored."""
    user = repo.insert(User(name="Ada", posts=[Post(title="first")]))
    fails, sibling = Post(title="fails", author=user), Post(title="sibling", author=user)

    def store_sibling(mapper: Any, connection: Any, target: Post) -> None:
        if target is fails:
            with repo.detached():
                repo.insert(sibling)
            raise ZeroDivisionError

    event.listen(Post, "before_insert", store_sibling)
    try:
        with pytest.raises(ZeroDivisionError):
            repo.insert(fails)
    finally:
        event.remove(Post, "before_insert", store_sibling)
    assert repo.home(fails) is None
    assert repo.home(sibling) == repo.get_database().home
    assert sibling.author is user
    repo.update(sibling, title="changed")
    assert sql("SELECT title, author_id FROM posts ORDER BY id") == [("first", user.id), ("changed", user.id)]


def test_a_failed_insert_into_two_tables(repo: type[Repo], sql: SQL) -> None:
    """When the second table of joined inheritance fails, the first has no row, and the object no key."""
    dog = Dog()
    before = picture(dog)
    with pytest.raises(IntegrityError):
        repo.insert(dog)
    assert picture(dog) == before
    assert sql("SELECT count(*) FROM animals") == [(0,)]
    dog.breed = "pug"
    repo.insert(dog)
    assert repo.one(Animal) is not dog


def test_a_failed_update_leaves_the_object_as_it_was(repo: type[Repo], sql: SQL) -> None:
    """Values from before the call are back, changes that were pending stay pending, and the retry writes both."""
    sql("INSERT INTO users (id, name, email, age) VALUES (99, 'Eve', 'taken', 1)")
    user = repo.insert(User(name="Ada", email="ada@x"))
    user.age = 36
    before = picture(user)
    with pytest.raises(IntegrityError):
        repo.update(user, email="taken", name="Countess")
    assert picture(user) == before
    assert inspect(user).attrs.age.history.has_changes()
    assert not inspect(user).attrs.name.history.has_changes()
    repo.update(user, email="free")
    assert sql("SELECT name, email, age FROM users WHERE id <> 99") == [("Ada", "free", 36)]


def test_a_failed_update_of_relationships(repo: type[Repo], sql: SQL) -> None:
    """References and collections from before the call are back, on both ends."""
    ada, bob = repo.insert(User(name="Ada", posts=[])), repo.insert(User(name="Bob", posts=[]))
    post = repo.insert(Post(title="x", author=ada, tags=[Tag(label="t")]))
    tag, new = post.tags[0], Tag(label="t")
    before = picture(ada, bob, post, tag, new)
    with pytest.raises(IntegrityError):
        repo.update(post, author=bob, tags=[new])
    assert picture(ada, bob, post, tag, new) == before
    assert (post.author, post.tags, bob.posts, ada.posts) == (ada, [tag], [], [post])
    repo.update(post, author=bob)
    assert sql("SELECT author_id FROM posts") == [(bob.id,)]


def test_an_attribute_that_refuses_a_value(repo: type[Repo], sql: SQL) -> None:
    """An error while attributes are set takes back those that were set before it."""
    user = repo.insert(User(name="Ada", posts=[]))
    before = picture(user)
    with pytest.raises(TypeError):
        repo.update(user, {"name": "Bob", "posts": 5})
    assert picture(user) == before
    assert sql("SELECT name FROM users") == [("Ada",)]


def test_a_failed_delete_leaves_the_object_as_it_was(repo: type[Repo], sql: SQL) -> None:
    """An object that could not be deleted is still stored, and can be deleted when the cause is gone."""
    tag = repo.insert(Tag(label="t"))
    repo.insert(Post(title="x", tags=[tag]))
    before = picture(tag)
    with pytest.raises(IntegrityError):
        repo.delete(tag)
    assert picture(tag) == before
    sql("DELETE FROM post_tags")
    repo.delete(tag)
    assert sql("SELECT count(*) FROM tags") == [(0,)]


def test_a_failed_delete_of_a_graph(repo: type[Repo], sql: SQL) -> None:
    """When the last of a cascade cannot be deleted, everything is still there, and every object as it was."""
    user = repo.insert(User(name="Ada", posts=[Post(title="x"), Post(title="y")]))
    sql("CREATE TABLE IF NOT EXISTS readers (user_id int REFERENCES users)")
    sql("INSERT INTO readers VALUES (%s)", user.id)
    before = picture(user, *user.posts)
    try:
        with pytest.raises(IntegrityError):
            repo.delete(user)
    finally:
        sql("DROP TABLE readers")
    assert picture(user, *user.posts) == before
    assert sql("SELECT count(*) FROM posts") == [(2,)]
    repo.delete(user)
    assert sql("SELECT count(*) FROM posts") == [(0,)]


def test_a_verb_that_fails_in_a_transaction_leaves_its_objects_as_they_were(repo: type[Repo], sql: SQL) -> None:
    """In a transaction too, an object is as it was before the verb that failed, not as before the transaction."""
    sql("INSERT INTO users (id, name, email, age) VALUES (99, 'Eve', 'taken', 1)")
    with repo.transaction():
        user = repo.insert(User(name="Ada"))
        before = picture(user)
        with pytest.raises(DBAPIError), repo.savepoint():
            repo.update(user, email="taken")
        assert picture(user) == before
        repo.update(user, email="free")
    assert sql("SELECT email FROM users WHERE name = 'Ada'") == [("free",)]
