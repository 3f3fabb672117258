"""Nothing of one database is read from, written to, or mixed with another."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import insert, inspect, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, make_transient, selectinload
from sqlalchemy.orm.exc import DetachedInstanceError

from shardrepo import Repo, WrongDatabaseError

from ..models import Account, Book, Dog, Post, Shelf, Tag, User
from .conftest import Pair

pytestmark = pytest.mark.routing


def test_the_same_key_in_two_databases(repo: type[Repo], pair: Pair) -> None:
    """One key is two rows and two objects, each with its home, however often the choice goes back and forth."""
    for _ in range(3):
        assert repo.get_one(User, 1).name == "Ada of A"
        with repo.using(pair.b):
            user = repo.get_one(User, 1)
            assert user.name == "Ada of B"
            assert repo.home(user) == pair.home(pair.b)


def test_every_reading_verb_reads_the_current_database(repo: type[Repo], pair: Pair) -> None:
    """All verbs follow the choice, and what they load eagerly comes from the same place."""
    repo.set_database(pair.b)
    assert repo.one(select(User.name).where(User.id == 1)) == "Ada of B"
    assert repo.get_by(User, name="Ada of A") is None
    assert {user.name for user in repo.all(User)} == {"Ada of B", "Bob of B"}
    assert not repo.exists(select(User).where(User.name.like("% of A")))
    assert repo.get_one(Shelf, 1).books[0].title == "book of B"
    assert repo.get_one(Dog, 1).breed == "dog of B"
    user = repo.one(select(User).where(User.id == 1).options(selectinload(User.posts).selectinload(Post.tags)))
    assert (user.posts[0].title, user.posts[0].tags[0].label) == ("x of B", "t of B")
    assert repo.execute("SELECT name FROM users WHERE id = 1").scalar_one() == "Ada of B"


def test_identities_of_two_databases_differ(repo: type[Repo], pair: Pair) -> None:
    """SQLAlchemy's identity of two rows with one key is not the same, so that no identity map mixes them."""
    one = repo.get_one(User, 1)
    with repo.using(pair.b):
        other = repo.get_one(User, 1)
    assert inspect(one).identity_key != inspect(other).identity_key
    assert inspect(one).identity == inspect(other).identity


def test_lazy_loading_after_a_switch_stays_at_home(repo: type[Repo], pair: Pair) -> None:
    """A session loads later what belongs to its objects from their database, whatever is current then."""
    with repo.session() as session:
        user = session.get_one(User, 1)
        repo.set_database(pair.b)
        assert user.posts[0].title == "x of A"
        assert user.posts[0].tags[0].label == "t of A"
        session.expire(user)
        assert user.name == "Ada of A"
        session.commit()
        assert user.name == "Ada of A"
        assert session.get_one(User, 2).name == "Bob of A"


def test_lazy_loading_of_a_detached_object_loads_nothing(repo: type[Repo], pair: Pair) -> None:
    """What was not loaded is not loaded from the database that happens to be current."""
    user = repo.get_one(User, 1)
    with repo.using(pair.b), pytest.raises(DetachedInstanceError):
        _ = user.posts


def test_preloading_later_in_a_session_of_the_home(repo: type[Repo], pair: Pair) -> None:
    """An object attached to a session of its home loads from there, while another database is current."""
    user = repo.get_one(User, 1)
    session = repo.session()
    with repo.using(pair.b), session:
        session.add(user)
        assert [post.title for post in user.posts] == ["x of A"]


FOREIGN: dict[str, Callable[[type[Repo], Any], Any]] = {
    "insert": lambda repo, user: repo.insert(user),
    "update": lambda repo, user: repo.update(user, name="changed"),
    "update of pending changes": lambda repo, user: rename_and_update(repo, user),
    "delete": lambda repo, user: repo.delete(user),
    "insert of a child": lambda repo, user: repo.insert(Post(title="new", author=user)),
    "add": lambda repo, user: in_session(repo, lambda session: session.add(user)),
    "add_all": lambda repo, user: in_session(repo, lambda session: session.add_all([Tag(label="x"), user])),
    "add of a child": lambda repo, user: in_session(repo, lambda session: session.add(Post(title="new", author=user))),
    "merge": lambda repo, user: in_session(repo, lambda session: session.merge(user)),
    "merge without load": lambda repo, user: in_session(repo, lambda session: session.merge(user, load=False)),
    "merge_all": lambda repo, user: in_session(repo, lambda session: session.merge_all([user])),
    "Session.delete": lambda repo, user: in_session(repo, lambda session: session.delete(user)),
    "Session.delete_all": lambda repo, user: in_session(repo, lambda session: session.delete_all([user])),
    "refresh": lambda repo, user: in_session(repo, lambda session: refresh(session, user)),
    "bulk": lambda repo, user: in_session(repo, lambda session: session.bulk_save_objects([user])),
    "by a relationship": lambda repo, user: in_session(
        repo, lambda session: setattr(session.get_one(Post, 1), "author", user)
    ),
    "enable_relationship_loading": lambda repo, user: in_session(
        repo, lambda session: session.enable_relationship_loading(user)
    ),
}


def rename_and_update(repo: type[Repo], user: User) -> None:
    user.name = "changed"
    repo.update(user)


def refresh(session: Session, user: User) -> None:
    session.add(user)
    session.refresh(user)


def in_session(repo: type[Repo], work: Callable[[Session], Any]) -> None:
    with repo.session() as session:
        work(session)
        session.commit()


@pytest.mark.parametrize("way", FOREIGN)
@pytest.mark.parametrize("change", ["loaded", "changed", "inserted", "unpickled"])
def test_an_object_of_another_database_is_refused(repo: type[Repo], pair: Pair, way: str, change: str) -> None:
    """An object of A cannot be written, deleted, attached or merged while B is current, whatever became of it."""
    user = repo.insert(User(name="new of A")) if change == "inserted" else repo.get_one(User, 1)
    if change == "changed":
        user.name = "changed"
    if change == "unpickled":
        user = pickle.loads(pickle.dumps(user))
    before = pair.contents()
    with repo.using(pair.b), pytest.raises((WrongDatabaseError, ValueError)) as caught:
        FOREIGN[way](repo, user)
    if way != "insert":
        assert isinstance(caught.value, WrongDatabaseError)
        assert (caught.value.expected, caught.value.found) == (pair.home(pair.b), pair.home(pair.a))
        assert pair.home(pair.a) in str(caught.value)
        assert pair.home(pair.b) in str(caught.value)
    assert pair.contents() == before
    assert repo.home(user) == pair.home(pair.a)
    if not way.endswith("of a child"):  # the child still refers to it, and was never stored
        repo.update(user, name="still writable at home")


def test_a_deleted_object_is_refused_elsewhere(repo: type[Repo], pair: Pair) -> None:
    """An object deleted from A deletes nothing in B."""
    user = repo.delete(repo.get_one(User, 1))
    before = pair.contents()
    with repo.using(pair.b):
        for verb in (repo.delete, repo.update, repo.insert):
            with pytest.raises((WrongDatabaseError, ValueError)):
                verb(user)
    assert pair.contents() == before


def test_a_pickled_object_remembers_its_home(repo: type[Repo], pair: Pair) -> None:
    """Home and state survive pickling, without anything of the connection."""
    user = pickle.loads(pickle.dumps(repo.get_one(User, 1)))
    assert repo.home(user) == pair.home(pair.a)
    repo.update(user, name="by pickle")
    assert pair.sql(pair.a, "SELECT name FROM users WHERE id = 1") == [("by pickle",)]


def test_a_pickled_copy_for_another_database_remembers_where_it_goes(repo: type[Repo], pair: Pair) -> None:
    """A copy made by `rehome` still fits its database only after pickling."""
    copied = pickle.loads(pickle.dumps(repo.rehome(repo.get_one(Tag, 1), pair.b)))
    assert repo.home(copied) == pair.home(pair.b)
    before = pair.contents()
    with pytest.raises(WrongDatabaseError):
        repo.insert(copied)
    assert pair.contents() == before


def test_an_object_of_another_orm_session_is_refused(repo: type[Repo], pair: Pair) -> None:
    """An object that was loaded past every repo has no home, and is not guessed to be at this one."""
    with Session(repo.engine()) as session:
        user = session.get_one(User, 1)
        session.expunge(user)
    with pytest.raises(WrongDatabaseError, match="unknown"):
        repo.update(user, name="x")
    with pytest.raises(WrongDatabaseError), repo.session() as ours:
        ours.add(user)


MIXED: dict[str, Callable[[type[Repo], dict[str, Any]], Any]] = {
    "insert many-to-one": lambda repo, of_b: repo.insert(Post(title="new", author=of_b["user"])),
    "insert one-to-many": lambda repo, of_b: repo.insert(User(name="new", posts=[of_b["post"]])),
    "insert many-to-many": lambda repo, of_b: repo.insert(Post(title="new", tags=[of_b["tag"]])),
    "insert, two steps away": lambda repo, of_b: repo.insert(
        User(name="new", posts=[Post(title="new", tags=[of_b["tag"]])])
    ),
    "insert beside its own": lambda repo, of_b: repo.insert(
        Post(title="new", tags=[repo.get_one(Tag, 1), of_b["tag"]])
    ),
    "insert a cascade": lambda repo, of_b: repo.insert(Shelf(label="new", books=[of_b["book"]])),
    "update many-to-one": lambda repo, of_b: repo.update(repo.get_one(Post, 1), author=of_b["user"]),
    "update one-to-many": lambda repo, of_b: repo.update(
        repo.one(select(User).where(User.id == 1).options(selectinload(User.posts))), posts=[of_b["post"]]
    ),
    "update many-to-many": lambda repo, of_b: repo.update(
        repo.one(select(Post).where(Post.id == 1).options(selectinload(Post.tags))), tags=[of_b["tag"]]
    ),
    "update a cascade": lambda repo, of_b: repo.update(repo.get_one(Shelf, 1), books=[of_b["book"]]),
    "update of a pending reference": lambda repo, of_b: refer_and_update(repo, of_b),
    "delete with a cascade": lambda repo, of_b: append_and_delete(repo, of_b),
    "session many-to-one": lambda repo, of_b: in_session(
        repo, lambda session: session.add(Post(title="new", author=of_b["user"]))
    ),
    "session one-to-many": lambda repo, of_b: in_session(
        repo, lambda session: append(session.get_one(User, 1), "posts", of_b["post"])
    ),
    "session many-to-many": lambda repo, of_b: in_session(
        repo, lambda session: append(session.get_one(Post, 1), "tags", of_b["tag"])
    ),
    "merge a graph": lambda repo, of_b: in_session(
        repo, lambda session: session.merge(User(name="new", posts=[of_b["post"]]))
    ),
    "merge a reference": lambda repo, of_b: in_session(
        repo, lambda session: session.merge(Post(title="new", author=of_b["user"]))
    ),
}


def append(owner: object, name: str, member: object) -> None:
    getattr(owner, name).append(member)


def refer_and_update(repo: type[Repo], foreign: dict[str, Any]) -> None:
    post = repo.get_one(Post, 1)
    post.author = foreign["user"]
    repo.update(post, title="changed")


def append_and_delete(repo: type[Repo], foreign: dict[str, Any]) -> None:
    user = repo.one(select(User).where(User.id == 1).options(selectinload(User.posts)))
    user.posts.append(foreign["post"])
    repo.delete(user)


@pytest.mark.parametrize("way", MIXED)
def test_objects_that_refer_to_another_database_are_refused(repo: type[Repo], pair: Pair, way: str) -> None:
    """Two homes never meet in one call: a reference, a collection or a cascade into B is refused in A."""
    with repo.using(pair.b):
        foreign = {
            "user": repo.get_one(User, 2),
            "post": repo.get_one(Post, 2),
            "tag": repo.get_one(Tag, 1),
            "book": repo.get_one(Book, 1),
        }
    before = pair.contents()
    with pytest.raises(WrongDatabaseError) as caught:
        MIXED[way](repo, foreign)
    assert (caught.value.expected, caught.value.found) == (pair.home(pair.a), pair.home(pair.b))
    assert pair.contents() == before
    for obj in foreign.values():
        assert repo.home(obj) == pair.home(pair.b)
        assert inspect(obj).session is None
    with repo.using(pair.b):
        repo.update(repo.get_one(Tag, 1), label="still writable")


def test_what_was_refused_elsewhere_can_be_written_at_home(repo: type[Repo], pair: Pair) -> None:
    """A refusal changes nothing: the same call works when its objects' database is current."""
    user = repo.get_one(User, 1)
    post = Post(title="new", author=user)
    with repo.using(pair.b):
        with pytest.raises(WrongDatabaseError):
            repo.insert(post)
        with pytest.raises(WrongDatabaseError):
            repo.update(user, name="changed")
    assert user.name == "Ada of A"
    assert not inspect(user).attrs.name.history.has_changes()
    assert repo.home(post) is None
    repo.insert(post)
    assert pair.sql(pair.a, "SELECT author_id FROM posts WHERE title = 'new'") == [(1,)]


def test_what_failed_here_can_be_inserted_elsewhere(repo: type[Repo], pair: Pair) -> None:
    """A new object whose insert failed belongs nowhere: it can be inserted into another database as it is."""
    pair.sql(pair.a, "INSERT INTO users (name, email, age) VALUES ('Eve', 'taken', 1)")
    user = User(name="Ada", email="taken", posts=[Post(title="p")])
    with pytest.raises(IntegrityError):
        repo.insert(user)
    with repo.using(pair.b):
        repo.insert(user)
    assert repo.home(user) == repo.home(user.posts[0]) == pair.home(pair.b)
    assert pair.sql(pair.b, "SELECT p.title FROM posts p JOIN users u ON u.id = author_id WHERE email = 'taken'") == [
        ("p",)
    ]
    assert pair.sql(pair.a, "SELECT count(*) FROM posts WHERE title = 'p'") == [(0,)]


def test_what_failed_here_can_be_rehomed(repo: type[Repo], pair: Pair) -> None:
    """The copy of an object is inserted into another database, with its key, after it failed in this one."""
    pair.sql(pair.b, "DELETE FROM post_tags; DELETE FROM tags")
    tag = repo.get_one(Tag, 1)
    repo.insert(Tag(label="taken"))
    with pytest.raises(IntegrityError):
        repo.update(tag, label="taken")
    copied = repo.rehome(tag, pair.b)
    with repo.using(pair.b):
        repo.insert(copied)
    assert pair.sql(pair.b, "SELECT id, label FROM tags") == [(1, "t of A")]
    assert repo.home(tag) == pair.home(pair.a)
    assert repo.home(copied) == pair.home(pair.b)
    repo.update(tag, label="free")


def test_rehome_copies_a_whole_row(repo: type[Repo], pair: Pair) -> None:
    """A copy takes everything but what the server computes, which is computed where it goes."""
    pair.sql(
        pair.b,
        "DELETE FROM post_tags; DELETE FROM posts; DELETE FROM users; DELETE FROM accounts; DELETE FROM dogs; "
        "DELETE FROM animals",
    )
    for obj in (repo.get_one(User, 1), repo.get_one(Account, 1), repo.get_one(Dog, 1)):
        copied = repo.rehome(obj, pair.b)
        with repo.using(pair.b):
            repo.insert(copied)
    assert pair.sql(pair.b, "SELECT id, name, name_length FROM users") == [(1, "Ada of A", 8)]
    assert pair.sql(pair.b, "SELECT id, breed FROM dogs") == [(1, "dog of A")]
    with repo.using(pair.b):
        repo.update(repo.get_one(Account, 1), balance=2)


def test_rehome_copies_into_the_current_database_by_default(repo: type[Repo], pair: Pair) -> None:
    """Without a database named, the copy is for the one that is current."""
    tag = repo.get_one(Tag, 1)
    with repo.using(pair.b):
        assert repo.home(repo.rehome(tag)) == pair.home(pair.b)


def test_make_transient_lets_an_object_go(repo: type[Repo], pair: Pair) -> None:
    """SQLAlchemy's `make_transient` keeps the home: an object is made for another database by `rehome` only."""
    tag = repo.get_one(Tag, 1)
    make_transient(tag)
    before = pair.contents()
    with repo.using(pair.b), pytest.raises(WrongDatabaseError):
        repo.insert(tag)
    assert pair.contents() == before


def test_using_inside_a_transaction_is_independent(repo: type[Repo], pair: Pair) -> None:
    """What is done in another database inside a transaction is a unit of work of its own."""
    with pytest.raises(ZeroDivisionError), repo.transaction():
        repo.insert(Tag(label="in A"))
        with repo.using(pair.b):
            assert not repo.in_transaction()
            repo.insert(Tag(label="in B"))
            with repo.using(pair.a):
                assert repo.in_transaction()
                assert repo.exists(select(Tag).where(Tag.label == "in A"))
        raise ZeroDivisionError
    assert pair.sql(pair.a, "SELECT count(*) FROM tags WHERE label LIKE 'in %'") == [(0,)]
    assert pair.sql(pair.b, "SELECT label FROM tags WHERE label LIKE 'in %'") == [("in B",)]


def test_two_transactions_on_two_databases(repo: type[Repo], pair: Pair) -> None:
    """Each database's transaction ends by itself; an error in the inner one leaves the outer one alone."""
    with repo.transaction():
        repo.insert(Tag(label="in A"))
        with pytest.raises(ZeroDivisionError), repo.using(pair.b), repo.transaction():
            repo.insert(Tag(label="in B"))
            with repo.using(pair.a):
                repo.insert(Tag(label="in A again"))
            raise ZeroDivisionError
        assert repo.count(Tag) == 3
    assert pair.sql(pair.a, "SELECT label FROM tags ORDER BY 1") == [("in A",), ("in A again",), ("t of A",)]
    assert pair.sql(pair.b, "SELECT label FROM tags") == [("t of B",)]


@pytest.mark.parametrize("spelling", ["name", "options", "url", "database", "default"])
def test_a_transaction_is_joined_by_any_spelling_of_its_database(repo: type[Repo], pair: Pair, spelling: str) -> None:
    """A transaction belongs to a database, not to the words by which it was chosen."""
    ways: dict[str, Any] = {
        "name": pair.a,
        "options": {"host": "127.0.0.1", "port": pair.server.port, "database": pair.a},
        "url": pair.server.url(pair.a),
        "database": repo.get_database(),
        "default": None,
    }
    with repo.transaction():
        repo.insert(Tag(label="in A"))
        with repo.using(ways[spelling]):
            assert repo.in_transaction()
            assert repo.count(Tag) == 2
        repo.set_database(ways[spelling])


def test_set_database_inside_using_inside_a_transaction(repo: type[Repo], pair: Pair) -> None:
    """Inside `using` of another database the choice is free, and is put back with the block."""
    with repo.transaction():
        with repo.using(pair.b):
            repo.set_database("third")
            assert repo.get_database().name == "third"
            repo.set_database(pair.b)
            with repo.transaction():
                with pytest.raises(WrongDatabaseError):
                    repo.set_database(pair.a)
                with pytest.raises(WrongDatabaseError):
                    repo.set_database(None)
        assert repo.get_database().name == pair.a
        assert repo.in_transaction()


def test_a_session_outlives_a_switch(repo: type[Repo], pair: Pair) -> None:
    """A session made before a switch writes where it was made, and refuses what is loaded after the switch."""
    with repo.session() as session:
        user = session.get_one(User, 1)
        repo.set_database(pair.b)
        user.name = "changed"
        session.add(Tag(label="new"))
        with pytest.raises(WrongDatabaseError):
            session.add(repo.get_one(User, 2))
        session.execute(update(User).where(User.id == 2).values(age=7))
        session.execute(insert(Tag).values(label="newer"))
        session.execute(text("INSERT INTO tags (label) VALUES ('newest')"))
        session.commit()
    assert pair.sql(pair.a, "SELECT name, age FROM users ORDER BY id") == [("changed", 1), ("Bob of A", 7)]
    assert pair.sql(pair.a, "SELECT count(*) FROM tags WHERE label LIKE 'new%'") == [(3,)]
    assert pair.sql(pair.b, "SELECT name, age FROM users ORDER BY id") == [("Ada of B", 1), ("Bob of B", 2)]
    assert pair.sql(pair.b, "SELECT count(*) FROM tags") == [(1,)]


def test_sessions_of_two_databases_at_once(repo: type[Repo], pair: Pair) -> None:
    """Two sessions, each pinned to its own database, flushed in turns, never see each other's objects."""
    with repo.session() as in_a, repo.using(pair.b), repo.session() as in_b:
        one, other = in_a.get_one(User, 1), in_b.get_one(User, 1)
        assert (one.name, other.name) == ("Ada of A", "Ada of B")
        one.age, other.age = 10, 20
        in_b.commit()
        in_a.commit()
        with pytest.raises(WrongDatabaseError):
            in_a.merge(other)
    assert pair.sql(pair.a, "SELECT age FROM users WHERE id = 1") == [(10,)]
    assert pair.sql(pair.b, "SELECT age FROM users WHERE id = 1") == [(20,)]


def test_databases_of_two_servers_with_one_name(
    servers: Any, make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]]
) -> None:
    """The same name on two servers is two databases: rows, homes, connections and refusals differ."""
    (name,) = make_databases(1)
    servers[1].create_database(name, template="template_app")
    try:
        repo = make_repo(name)
        here = repo.insert(Tag(label="here"))
        with repo.using(host="127.0.0.1", port=servers[1].port, database=name):
            there = repo.insert(Tag(label="there"))
            assert (here.id, there.id) == (1, 1)
            assert repo.home(there) != repo.home(here)
            assert repo.one(select(Tag.label)) == "there"
            with pytest.raises(WrongDatabaseError):
                repo.delete(here)
        assert repo.one(select(Tag.label)) == "here"
        repo.disconnect_all()
    finally:
        servers[1].drop_database(name, force=True)
