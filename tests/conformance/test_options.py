"""What is said about calls beside their arguments: by a block, by the repo's class, by its config."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from sqlalchemy import Select, event, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import selectinload, with_loader_criteria

from shardrepo import ConfigError, Database, DatabaseFilter, ReadOnlyError, Repo
from shardrepo.event import Event, listens_for

from ..conftest import SQL
from ..models import Chapter, Note, Post, Tag, User

pytestmark = pytest.mark.verbs


# execution_options


def test_execution_options_reach_every_statement(repo: type[Repo], sql: SQL) -> None:
    """Of reads with and without a session, writes of every kind, text, and the statements of a transaction."""
    seen: list[object] = []
    engine = repo.engine()

    def note(conn: Any, *_: Any) -> None:
        seen.append(conn.get_execution_options().get("mine"))

    event.listen(engine, "before_cursor_execute", note)
    try:
        with repo.call_options(execution_options={"mine": 7}):
            user = repo.insert(User(name="Ada"))
            repo.get(User, user.id)
            repo.all(select(User).options(selectinload(User.posts)))
            repo.insert_all(Tag, [{"label": "a"}, {"label": "b"}])
            repo.execute("SELECT 1")
            with repo.transaction():
                repo.update(user, name="Bob")
            assert seen
            assert set(seen) == {7}
        seen.clear()
        with repo.transaction():
            with repo.call_options(execution_options={"mine": 8}):
                repo.count(User)
            repo.count(User)
        assert seen == [8, None]
    finally:
        event.remove(engine, "before_cursor_execute", note)


def test_a_schema_is_translated(repo: type[Repo], sql: SQL) -> None:
    """SQLAlchemy's own option, for a tenant per schema within a database."""
    sql("CREATE SCHEMA tenant CREATE TABLE tags (id serial PRIMARY KEY, label text)")
    try:
        with repo.call_options(execution_options={"schema_translate_map": {None: "tenant"}}):
            repo.insert(Tag(label="theirs"))
            repo.insert_all(Tag, [{"label": "x"}, {"label": "y"}])
            assert repo.count(Tag) == 3
            assert repo.get_one(Tag, 1).label == "theirs"
        assert repo.count(Tag) == 0
    finally:
        sql("DROP SCHEMA tenant CASCADE")


# tags


def test_tags_reach_events_and_log_records(repo: type[Repo], caplog: pytest.LogCaptureFixture) -> None:
    """Of the block that they are said in, merged with those around it."""
    happened: list[Event] = []
    listens_for(repo, "query")(happened.append)
    listens_for(repo, "checkout")(happened.append)
    logger = logging.getLogger("an application")
    labelling = DatabaseFilter(repo)
    caplog.handler.addFilter(labelling)
    with caplog.at_level(logging.DEBUG):
        repo.disconnect()
        with repo.call_options(tags={"request": 1, "user": "ada"}), repo.call_options(tags={"user": "bob"}):
            repo.count(Tag)
            logger.info("inside")
        repo.count(Tag)
        logger.info("outside")
    caplog.handler.removeFilter(labelling)
    assert {event.name for event in happened} == {"query", "checkout"}
    half = len(happened) // 2
    assert {tuple(event.tags.items()) for event in happened[:half]} == {(("request", 1), ("user", "bob"))}
    assert {tuple(event.tags.items()) for event in happened[half:]} == {()}
    tags = {record.message: record.__dict__["tags"] for record in caplog.records}
    assert tags["inside"] == {"request": 1, "user": "bob"}
    assert tags["outside"] == {}
    (connected,) = (record for record in caplog.records if record.message.startswith("connected to"))
    assert connected.__dict__["tags"] == {"request": 1, "user": "bob"}


# default_options


def test_default_options_of_a_class(repo: type[Repo]) -> None:
    """Asked by the verb's name at every call; what a block says comes before them, mappings are merged."""
    asked: list[str] = []
    happened: list[Mapping[str, Any]] = []

    class Own(repo):  # type: ignore[valid-type,misc]  # a fixture's class
        @classmethod
        def default_options(cls, operation: str) -> Any:
            asked.append(operation)
            return {"tags": {"verb": operation, "by": "default"}, "timeout": 30.0}

    listens_for(Own, "query")(lambda event: happened.append(event.tags))
    Own.count(Tag)
    with Own.call_options(tags={"by": "block"}):
        Own.all(Tag)
        Own.insert(Tag(label="x"))
    assert asked == ["count", "all", "insert"]
    assert happened == [
        {"verb": "count", "by": "default"}, {"verb": "all", "by": "block"}, {"verb": "insert", "by": "block"},
    ]  # fmt: skip
    asked.clear()
    repo.count(Tag)
    assert asked == []


def test_a_default_timeout(repo: type[Repo]) -> None:
    """It ends a call, and a block gives it more."""

    class Own(repo):  # type: ignore[valid-type,misc]
        @classmethod
        def default_options(cls, operation: str) -> Any:
            return {"timeout": 0.2}

    with Own.call_options(timeout=20.0):
        assert Own.execute("SELECT 1 FROM pg_sleep(0.3)").scalar_one() == 1
    with pytest.raises(DBAPIError, match="in time"):
        Own.execute("SELECT pg_sleep(5)")


def test_bad_default_options_are_refused(repo: type[Repo]) -> None:
    """Before anything is sent."""

    class Own(repo):  # type: ignore[valid-type,misc]
        @classmethod
        def default_options(cls, operation: str) -> Any:
            return {"timeuot": 1}

    with pytest.raises(ConfigError, match="did you mean 'timeout'"):
        Own.count(Tag)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "no option given"),
    "an unknown one": ({"timeuot": 1}, "did you mean 'timeout'"),
    "no seconds": ({"timeout": 0}, "above 0"),
    "tags that are none": ({"tags": "x"}, "must be a mapping"),
    "a nameless tag": ({"tags": {1: 2}}, "by name"),
    "another home": ({"execution_options": {"identity_token": "x"}}, "home is its database"),
    "results on the server": ({"execution_options": {"yield_per": 10}}, r"use stream\(batch"),
    "another isolation": ({"execution_options": {"isolation_level": "AUTOCOMMIT"}}, "belongs to a transaction"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_call_options_are_refused(repo: type[Repo], case: str) -> None:
    """Where they are given."""
    options, message = BAD_OPTIONS[case]
    with pytest.raises(ConfigError, match=message):
        repo.call_options(**options)


# prepare_query


@pytest.fixture
def adults(repo: type[Repo], sql: SQL) -> tuple[type[Repo], list[str]]:
    """A repo of whose users only adults are there, and the operations that its hook was called for."""
    sql("INSERT INTO users (name, age) VALUES ('Ada', 36), ('Di', 7), ('Bob', 40)")
    sql("INSERT INTO posts (title, author_id) VALUES ('one', 1), ('two', 2)")
    operations: list[str] = []

    class Own(repo):  # type: ignore[valid-type,misc]
        @classmethod
        def prepare_query(cls, operation: str, query: Select[Any]) -> Select[Any]:
            operations.append(operation)
            return query.options(with_loader_criteria(User, User.age >= 18))

    return Own, operations


READS: dict[str, tuple[Callable[[type[Repo]], Any], Any]] = {
    "get": (lambda repo: repo.get(User, 2), None),
    "get_by": (lambda repo: repo.get_by(User, name="Di"), None),
    "all_by": (lambda repo: repo.all_by(User, name="Di"), []),
    "one_or_none": (lambda repo: repo.one_or_none(select(User.name).where(User.id == 2)), None),
    "first": (lambda repo: repo.first(select(User.name).order_by(User.age)), "Ada"),
    "last": (lambda repo: repo.last(select(User.name).order_by(User.age.desc())), "Ada"),
    "all": (lambda repo: repo.all(select(User.name).order_by(User.id)), ["Ada", "Bob"]),
    "count": (lambda repo: repo.count(User), 2),
    "exists": (lambda repo: repo.exists(select(User).where(User.name == "Di")), False),
    "aggregate": (lambda repo: repo.aggregate(User, "min", User.age), 36),
    "reload": (lambda repo: repo.reload(repo.load(User, {"id": 2})), None),
    "update_all": (lambda repo: repo.update_all(User, {"city": "x"}).count, 2),
    "insert_all": (lambda repo: repo.insert_all(Tag, select(User.name.label("label"))).count, 2),
}


@pytest.mark.parametrize("verb", READS)
def test_a_query_is_prepared(adults: tuple[type[Repo], list[str]], verb: str) -> None:
    """Of every verb that takes or makes one; the hook is told which."""
    repo, operations = adults
    call, expected = READS[verb]
    assert call(repo) == expected
    assert set(operations) == {verb}


def test_streams_joins_and_loads_are_prepared(adults: tuple[type[Repo], list[str]], sql: SQL) -> None:
    """Also where another class is asked for: by a join, by a loader, by `preload`."""
    repo, operations = adults
    with repo.stream(select(User.name)) as names:
        assert sorted(names) == ["Ada", "Bob"]
    assert repo.all(select(Post.title).join(Post.author)) == ["one"]
    posts = repo.all(select(Post).order_by(Post.id), options=[selectinload(Post.author)])
    assert [post.author and post.author.name for post in posts] == ["Ada", None]
    again = repo.preload(repo.all(select(Post).order_by(Post.id)), Post.author)
    assert [post.author and post.author.name for post in again] == ["Ada", None]
    sql("UPDATE posts SET author_id = NULL")
    assert repo.delete_all(select(User).where(User.id != 1)).count == 1
    assert sql("SELECT name FROM users ORDER BY 1") == [("Ada",), ("Di",)]
    assert set(operations) == {"stream", "all", "preload", "delete_all"}
    assert "age >= 18" in repo.to_sql(User, literal_binds=True)[0]
    assert "age >= 18" in repo.explain(User)


def test_a_hook_that_adds_a_criterion(repo: type[Repo], sql: SQL) -> None:
    """A plain where() is enough for queries of one class; numbers are of what it leaves."""
    sql("INSERT INTO tags (label) VALUES ('a'), ('b')")

    class Own(repo):  # type: ignore[valid-type,misc]
        @classmethod
        def prepare_query(cls, operation: str, query: Select[Any]) -> Select[Any]:
            return query.where(Tag.label == "a") if operation != "delete_all" else query

    assert (Own.count(Tag), Own.exists(select(Tag).where(Tag.label == "b")), len(Own.all(Tag))) == (1, False, 1)
    assert Own.update_all(Tag, {"label": "c"}).count == 1
    assert Own.get(Tag, 2) is None
    assert Own.delete_all(Tag).count == 2


def test_a_hook_that_returns_nothing_is_found_out(repo: type[Repo]) -> None:
    """A forgotten return never runs the query unprepared."""

    class Own(repo):  # type: ignore[valid-type,misc]
        @classmethod
        def prepare_query(cls, operation: str, query: Select[Any]) -> Any:
            query.where(Tag.label == "a")

    with pytest.raises(TypeError, match="must return the select"):
        Own.all(Tag)


def test_a_hook_that_raises_keeps_a_verb_from_running(repo: type[Repo]) -> None:
    """As a guard that no tenant is forgotten."""

    class Own(repo):  # type: ignore[valid-type,misc]
        @classmethod
        def prepare_query(cls, operation: str, query: Select[Any]) -> Select[Any]:
            raise PermissionError("no tenant")

    for verb in (lambda: Own.get(Tag, 1), lambda: Own.count(Tag), lambda: Own.delete_all(Tag)):
        with pytest.raises(PermissionError, match="no tenant"):
            verb()


def test_hooks_of_a_base_class(make_repo: Callable[..., type[Repo]], database: str, server: Any) -> None:
    """They may stand on a class without config, of which those with one are made."""

    class Base(Repo):
        @classmethod
        def prepare_query(cls, operation: str, query: Select[Any]) -> Select[Any]:
            return query.limit(1)

    class App(Base, config={"url": server.url(database)}):
        pass

    App.insert_all(Tag, [{"label": "a"}, {"label": "b"}])
    assert len(App.all(Tag)) == 1
    App.dispose()


# configure_engine


def test_engines_are_configured(server: Any, make_databases: Callable[..., list[str]]) -> None:
    """Each that is made, with its database, before anything runs on it."""
    made: list[str] = []
    statements: list[str] = []

    class App(Repo, config={"url": server.url("postgres")}):
        @classmethod
        def configure_engine(cls, engine: Engine, database: Database) -> None:
            made.append(database.name)
            event.listen(engine, "before_cursor_execute", lambda *given: statements.append(given[2]))

    one, other = make_databases(2)
    for name in (one, other, one):
        with App.using(name):
            App.count(Chapter)
    assert made == [one, other]
    assert len([statement for statement in statements if "chapters" in statement]) == 3
    App.dispose()


# read_only

WRITES: dict[str, Callable[[type[Repo]], Any]] = {
    "insert": lambda repo: repo.insert(Tag(label="x")),
    "insert over a conflict": lambda repo: repo.insert(Tag(label="x"), on_conflict="nothing"),
    "insert_all": lambda repo: repo.insert_all(Tag, [{"label": "x"}]),
    "insert_all of nothing": lambda repo: repo.insert_all(Tag, []),
    "insert_or_update": lambda repo: repo.insert_or_update(Tag(label="x")),
    "update": lambda repo: repo.update(repo.get_one(Tag, 1), label="x"),
    "update_all": lambda repo: repo.update_all(Tag, {"label": "x"}),
    "delete": lambda repo: repo.delete(repo.get_one(Tag, 1)),
    "delete_all": lambda repo: repo.delete_all(Tag),
    "create_database": lambda repo: repo.create_database("never"),
    "drop_database": lambda repo: repo.drop_database("never", if_exists=True),
    "rename_database": lambda repo: repo.rename_database("never", "ever"),
}


@pytest.fixture
def reader(make_repo: Callable[..., type[Repo]], two_databases: tuple[str, str], sql: SQL) -> type[Repo]:
    """A repo that only reads, chosen away from its default database."""
    used, other = two_databases
    sql("INSERT INTO tags (label) VALUES ('a')")
    repo = make_repo(other, read_only=True)
    repo.set_database(used)
    return repo


@pytest.mark.parametrize("write", WRITES)
def test_verbs_that_write_are_refused(reader: type[Repo], sql: SQL, write: str) -> None:
    """Before anything is sent; what reads works."""
    assert reader.get_one(Tag, 1).label == "a"
    with pytest.raises(ReadOnlyError, match="read_only=True"):
        WRITES[write](reader)
    assert sql("SELECT label FROM tags") == [("a",)]


def test_the_server_refuses_what_is_no_verb(reader: type[Repo], sql: SQL) -> None:
    """SQL of one's own, sessions and transactions too; the connection stays."""
    pid = reader.execute("SELECT pg_backend_pid()").scalar_one()
    with pytest.raises(DBAPIError, match="read-only"):
        reader.execute("INSERT INTO tags (label) VALUES ('x')")
    with pytest.raises(DBAPIError, match="read-only"), reader.session() as session:
        session.add(Tag(label="x"))
        session.flush()
    with pytest.raises(DBAPIError, match="read-only"), reader.transaction():
        reader.execute("DELETE FROM tags")
    with pytest.raises(DBAPIError, match="read-only"), reader.connection() as connection:
        connection.execute(text("SET search_path TO public"))
        connection.execute(text("DELETE FROM tags"))
    assert reader.execute("SHOW transaction_read_only").scalar_one() == "on"
    assert reader.execute("SELECT pg_backend_pid()").scalar_one() == pid
    assert sql("SELECT label FROM tags") == [("a",)]


def test_read_only_keeps_other_options(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Those that the config gives to libpq for the server."""
    repo = make_repo(database, read_only=True, connect_args={"options": "-c statement_timeout=77s"})
    assert repo.execute("SHOW statement_timeout").scalar_one() == "77s"
    assert repo.execute("SHOW default_transaction_read_only").scalar_one() == "on"


def test_read_only_contradicts_a_pooler(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Which cannot be told; the error says what to do instead."""
    with pytest.raises(ConfigError, match="ALTER ROLE"):
        make_repo(database, read_only=True, pgbouncer=True)


def test_a_note_is_not_forgotten(reader: type[Repo]) -> None:
    """Plans and SQL are no writes."""
    assert "Scan" in reader.explain(Note)
    assert reader.to_sql(Note)[0].startswith("SELECT")
