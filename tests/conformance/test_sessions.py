"""What is handed to the user: sessions, engines, connections; and the verbs about the cache."""

from __future__ import annotations

import pytest
from sqlalchemy import inspect, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.orm import Session, selectinload

from shardrepo import Database, Repo, RepoDisposedError, RoutedSession, Stats, WrongDatabaseError
from shardrepo.testing.servers import Server

from ..conftest import SQL, await_connections, books_balance, connections_of
from ..models import Book, Post, Shelf, Tag, User

pytestmark = pytest.mark.verbs


def app_name(repo: type[Repo]) -> str:
    name: str = repo.execute("SHOW application_name").scalar_one()
    return name


def test_a_session_is_sqlalchemys_own(repo: type[Repo], sql: SQL) -> None:
    """`session` gives a plain SQLAlchemy session of the current database, whose objects are at home."""
    with repo.session() as session:
        assert isinstance(session, RoutedSession)
        assert isinstance(session, Session)
        assert session.database == repo.get_database()
        user = User(name="Ada", posts=[Post(title="x")])
        session.add(user)
        session.commit()
        assert repo.home(user) == repo.home(user.posts[0]) == repo.get_database().home
    assert sql("SELECT name, title FROM users u JOIN posts p ON p.author_id = u.id") == [("Ada", "x")]
    assert repo.stats().in_use == 0


def test_a_session_commits_only_when_told(repo: type[Repo], sql: SQL) -> None:
    """What was not committed is gone when the session is closed."""
    with repo.session() as session:
        session.add(Tag(label="a"))
        session.flush()
    assert sql("SELECT count(*) FROM tags") == [(0,)]


def test_a_session_has_an_identity_map(repo: type[Repo], sql: SQL) -> None:
    """In one session the same row is one object, however it comes in."""
    sql("INSERT INTO users (name, age) VALUES ('Ada', 1)")
    sql("INSERT INTO posts (title, author_id) VALUES ('x', 1)")
    with repo.session() as session:
        user = session.get(User, 1)
        assert user is not None
        assert session.get_one(User, 1) is user
        assert session.scalars(select(User)).one() is user
        assert session.scalars(select(Post)).one().author is user
        assert user.posts[0].author is user
        assert session.query(User).filter_by(id=1).one() is user


def test_everything_that_a_session_loads_is_at_home(repo: type[Repo], sql: SQL) -> None:
    """Objects have their home by whatever way a session loads them: lazily, eagerly, by refresh, by merge."""
    sql("INSERT INTO users (name, age) VALUES ('Ada', 1), ('Bob', 2)")
    sql("INSERT INTO posts (title, author_id) VALUES ('x', 1), ('y', 2)")
    sql("INSERT INTO tags (label) VALUES ('t')")
    sql("INSERT INTO post_tags VALUES (1, 1)")
    home = repo.get_database().home
    with repo.session() as session:
        lazily = session.get_one(User, 1)
        session.refresh(lazily)
        eagerly = session.scalars(select(User).where(User.id == 2).options(selectinload(User.posts))).one()
        session.expire(eagerly)
        found: list[object] = [lazily, lazily.posts[0], lazily.posts[0].tags[0], eagerly, eagerly.posts[0]]
        found.append(session.query(User).order_by(User.id).first())
        found.append(session.execute(text("SELECT 1")) and session.scalars(select(Tag)).one())
        assert {repo.home(obj) for obj in found} == {home}


def test_merge_of_a_new_object_finds_the_stored_one(repo: type[Repo], sql: SQL) -> None:
    """`merge` of an object with a stored key gives the stored object, at home, and updates it."""
    sql("INSERT INTO users (name, age) VALUES ('Ada', 1)")
    with repo.session() as session:
        merged = session.merge(User(id=1, name="Countess", age=1))
        assert repo.home(merged) == repo.get_database().home
        assert session.get(User, 1) is merged
        session.commit()
    assert sql("SELECT name FROM users") == [("Countess",)]


def test_merge_of_a_detached_object(repo: type[Repo], sql: SQL) -> None:
    """`merge` of an object that a verb loaded writes its changes."""
    user = repo.insert(User(name="Ada"))
    user.name = "Bob"
    with repo.session() as session:
        merged = session.merge(user)
        assert merged is not user
        session.commit()
        assert repo.home(merged) == repo.get_database().home
    assert sql("SELECT name FROM users") == [("Bob",)]


def test_detached_objects_can_be_added(repo: type[Repo], sql: SQL) -> None:
    """An object of this database can be attached again: it loads what it lacks, and its changes are written."""
    user = repo.insert(User(name="Ada"))
    repo.insert(Post(title="x", author=user))
    loaded = repo.get_one(User, user.id)
    with repo.session() as session:
        session.add(loaded)
        assert [post.title for post in loaded.posts] == ["x"]
        assert session.get(User, user.id) is loaded
        loaded.name = "Bob"
        session.commit()
    assert sql("SELECT name FROM users") == [("Bob",)]


def test_a_session_deletes_with_cascades(repo: type[Repo], sql: SQL) -> None:
    """`Session.delete` follows the mapping's cascades."""
    user = repo.insert(User(name="Ada", posts=[Post(title="x")]))
    with repo.session() as session:
        session.delete(user)
        session.commit()
    assert sql("SELECT count(*) FROM posts") == [(0,)]


def test_the_options_of_a_session(repo: type[Repo]) -> None:
    """`session` takes the options of SQLAlchemy's."""
    with repo.session(expire_on_commit=False, autoflush=False) as session:
        tag = Tag(label="a")
        session.add(tag)
        assert session.scalars(select(Tag)).all() == []
        session.commit()
        assert "label" in inspect(tag).dict


def test_a_session_that_an_object_leaves_unstored(repo: type[Repo]) -> None:
    """An object that a session expunged or rolled back before it was stored has no home, and can go anywhere."""
    one, other = Tag(label="a"), Tag(label="b")
    with repo.session() as session:
        session.add_all([one, other])
        session.expunge(one)
        session.flush()
        session.rollback()
    assert repo.home(one) is None
    assert repo.home(other) is None
    assert inspect(other).transient
    repo.insert(other)


def test_a_session_joins_the_open_transaction(repo: type[Repo], sql: SQL) -> None:
    """Inside a transaction a session is part of it: its commit flushes, and the transaction's end decides."""
    with pytest.raises(ZeroDivisionError), repo.transaction():
        repo.insert(Tag(label="a"))
        with repo.session() as session:
            assert session.scalars(select(Tag.label)).all() == ["a"]
            session.add(Tag(label="b"))
            session.commit()
        assert repo.count(Tag) == 2
        assert repo.stats().in_use == 1
        raise ZeroDivisionError
    assert sql("SELECT count(*) FROM tags") == [(0,)]
    with repo.transaction(), repo.session() as session:
        session.add(Tag(label="c"))
        session.commit()
    assert sql("SELECT label FROM tags") == [("c",)]


def test_a_session_belongs_to_its_database_for_life(repo: type[Repo], two_databases: tuple[str, str]) -> None:
    """A session made before a switch stays where it was made, and cannot be bound elsewhere."""
    used, other = two_databases
    with repo.session() as session:
        with repo.using(other):
            engine = repo.engine()
            assert session.execute(text("SELECT current_database()")).scalar_one() == used
            with pytest.raises(WrongDatabaseError):
                session.execute(text("SELECT 1"), bind_arguments={"bind": engine})
            with pytest.raises(WrongDatabaseError):
                session.get_bind(bind=engine)
            session.rollback()
            assert session.execute(text("SELECT current_database()")).scalar_one() == used
        assert session.get_bind(User) is session.get_bind()


def test_an_engine_is_sqlalchemys_own(repo: type[Repo], two_databases: tuple[str, str]) -> None:
    """`engine` gives the current database's engine, over the cache's connections, without a password in it."""
    engine = repo.engine()
    assert engine is repo.engine()
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO tags (label) VALUES ('a')"))
        assert connection.execute(text("SELECT current_database()")).scalar_one() == two_databases[0]
        assert repo.stats().in_use == 1
    assert repo.count(Tag) == 1
    assert engine.url.password is None


def test_stats(repo: type[Repo]) -> None:
    """`stats` counts what the cache does, and adds up after every step."""
    assert repo.stats() == Stats(20, *[0] * 14)
    repo.count(Tag)
    repo.count(Tag)
    stats = repo.stats()
    assert (stats.attempts, stats.hits, stats.idle, stats.in_use) == (1, 1, 1, 0)
    assert stats.hit_rate == 0.5
    with repo.transaction():
        assert (repo.stats().idle, repo.stats().in_use) == (0, 1)
        assert books_balance(repo)
    assert books_balance(repo)


def test_ping_opens_a_connection_of_its_own(repo: type[Repo], server: Server) -> None:
    """`ping` asks the current database on a connection that is not the cache's, and leaves none behind."""
    name = app_name(repo)
    before = connections_of(server, name)
    assert repo.ping() > 0
    await_connections(server, name, [repo.get_database().name])
    assert connections_of(server, name) == before
    stats = repo.stats()
    assert (stats.attempts, stats.closed, stats.idle, stats.transient) == (2, 1, 1, 0)


def test_disconnect_closes_what_is_idle(repo: type[Repo], server: Server, two_databases: tuple[str, str]) -> None:
    """`disconnect` closes the current database's connections and no other's."""
    used, other = two_databases
    name = app_name(repo)
    with repo.using(other):
        repo.count(Tag)
    await_connections(server, name, [used, other])
    repo.disconnect()
    await_connections(server, name, [other])
    repo.disconnect(other)
    await_connections(server, name, [])
    assert books_balance(repo)
    assert repo.count(Tag) == 0


def test_disconnect_all(repo: type[Repo], server: Server, two_databases: tuple[str, str]) -> None:
    """`disconnect_all` closes every idle connection, and what is in use when it comes back."""
    name = app_name(repo)
    with repo.using(two_databases[1]):
        repo.count(Tag)
    with repo.transaction():
        repo.count(Tag)
        repo.disconnect_all()
        assert len(connections_of(server, name)) == 1
        repo.insert(Tag(label="a"))
    await_connections(server, name, [])
    assert repo.count(Tag) == 1


def test_dispose(repo: type[Repo], server: Server) -> None:
    """After `dispose` nothing is connected, and a verb says which database it could not reach, and why."""
    name = app_name(repo)
    repo.dispose()
    await_connections(server, name, [])
    for verb in (
        lambda: repo.get(Tag, 1),
        lambda: repo.insert(Tag(label="a")),
        repo.ping,
        repo.transaction().__enter__,
    ):
        with pytest.raises(RepoDisposedError, match="disposed") as caught:
            verb()
        assert repo.get_database().home in str(caught.value)
    assert books_balance(repo)
    repo.dispose()


def test_dispose_while_a_connection_is_in_use(repo: type[Repo], server: Server, sql: SQL) -> None:
    """What is in use when the repo is disposed works to its end, and is closed then."""
    name = app_name(repo)
    with repo.transaction():
        repo.insert(Tag(label="a"))
        repo.dispose()
        repo.insert(Tag(label="b"))
        assert len(connections_of(server, name)) == 1
    await_connections(server, name, [])
    assert sql("SELECT count(*) FROM tags") == [(2,)]


def test_home(repo: type[Repo], server: Server, two_databases: tuple[str, str]) -> None:
    """`home` is `server/name` for what is stored, None for what is not, and an error for what cannot be."""
    assert repo.home(Tag(label="a")) is None
    assert repo.home(repo.insert(Tag(label="a"))) == f"127.0.0.1:{server.port}/{two_databases[0]}"
    with pytest.raises(TypeError):
        repo.home("Ada")


def test_rehome(repo: type[Repo], two_databases: tuple[str, str]) -> None:
    """`rehome` copies all columns, the key too, into a new object that only fits the database named."""
    _, other = two_databases
    tag = repo.insert(Tag(label="a"))
    copy = repo.rehome(tag, other)
    assert copy is not tag
    assert (copy.id, copy.label) == (tag.id, "a")
    assert inspect(copy).transient
    elsewhere = repo.home(copy)
    assert elsewhere is not None
    assert elsewhere.endswith(f"/{other}")
    with pytest.raises(WrongDatabaseError) as caught:
        repo.insert(copy)
    assert (caught.value.expected, caught.value.found) == (repo.get_database().home, elsewhere)


def test_rehome_takes_no_relationships_and_refuses_what_is_not_loaded(repo: type[Repo]) -> None:
    """A copy refers to nothing; a column that was not loaded is a `ValueError` that names it."""
    shelf = repo.insert(Shelf(label="tall", books=[Book(title="One", text="...")]))
    assert repo.rehome(shelf).books == []
    with pytest.raises(ValueError, match="text"):
        repo.rehome(repo.get_one(Book, 1))


def test_a_copy_for_the_same_database_replaces_what_was_deleted(repo: type[Repo], sql: SQL) -> None:
    """A deleted object comes back by way of its copy, with what the server computes computed anew."""
    user = repo.delete(repo.insert(User(name="Ada")))
    copy = repo.rehome(user)
    repo.insert(copy)
    assert sql("SELECT id, name, name_length FROM users") == [(user.id, "Ada", 3)]


def test_a_repo_is_not_instantiated(repo: type[Repo]) -> None:
    """A repo is its class: to call it is an error that says how it is used."""
    with pytest.raises(TypeError, match="instantiated"):
        repo()


def test_the_current_database(repo: type[Repo], server: Server, two_databases: tuple[str, str]) -> None:
    """`get_database` is the address that verbs use, and needs no connection."""
    database = repo.get_database()
    assert isinstance(database, Database)
    assert (database.host, database.port, database.name) == ("127.0.0.1", server.port, two_databases[0])
    assert repo.stats().attempts == 0


def test_a_session_refuses_what_it_is_not_asked(repo: type[Repo]) -> None:
    """A closed session of SQLAlchemy's works as documented: with `close_resets_only=False` it is closed for good."""
    session = repo.session(close_resets_only=False)
    session.close()
    with pytest.raises(InvalidRequestError):
        session.execute(text("SELECT 1"))
