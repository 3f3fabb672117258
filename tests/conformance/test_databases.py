"""Databases that are made, dropped, renamed and looked up while the application runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Barrier
from typing import Any

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError

from shardrepo import (
    DEFAULT,
    ConfigError,
    Database,
    Repo,
    RepoDisposedError,
    UnknownDatabaseError,
    event,
)
from shardrepo.testing.servers import Server, Servers

from ..conftest import TEMPLATE, await_connections, books_balance, plant_decoys, run_sql
from ..models import Tag
from ..proxy import Proxy

pytestmark = pytest.mark.verbs

UGLY = ["a\"b%s;--'é", "%(name)s {} {name} :name", "back\\slash", "new\nline", " Spaces ", "DEFAULT", "é" * 31 + "x"]

_numbers = itertools.count(1)


@pytest.fixture
def name(servers: Servers) -> Iterator[str]:
    """A name that no database has; whatever has been made with the test is dropped after it, on all servers."""
    before = [server.databases() for server in servers]
    yield f"made{next(_numbers)}"
    for server, kept in zip(servers, before, strict=True):
        for left in set(server.databases()) - set(kept):
            server.drop_database(left)


@pytest.fixture
def make_role(server: Server) -> Iterator[Callable[..., str]]:
    """Make a role that may log in, its name its password; it is dropped after the test."""
    made: list[str] = []

    def make(role: str, attributes: str = "") -> str:
        run(server, f"CREATE ROLE {{}} LOGIN PASSWORD 'guest' {attributes}", role)
        made.append(role)
        return role

    yield make
    for role in made:
        run(server, "DROP ROLE {}", role)


@pytest.fixture
def guest(name: str, make_role: Callable[..., str]) -> dict[str, str]:
    """Options that choose another user, who may read everything and make nothing."""
    return {"username": make_role("guest", "IN ROLE pg_read_all_data"), "password": "guest"}


def run(server: Server, statement: str, name: str) -> None:
    with server.connect() as connection:
        connection.execute(SQL(statement).format(Identifier(name)))  # type: ignore[arg-type]


def row(server: Server, name: str, column: str) -> Any:
    """What the server says of a database."""
    return run_sql(server, "postgres", f"SELECT {column} FROM pg_database WHERE datname = %s", (name,))[0][0]


def sqlstate(error: DBAPIError) -> str | None:
    assert isinstance(error.orig, psycopg.Error)
    return error.orig.sqlstate


@contextmanager
def refused(state: str, repo: type[Repo], name: str) -> Iterator[pytest.ExceptionInfo[DBAPIError]]:
    """Check that the server refuses what the block does, and that the error says about which database."""
    with pytest.raises(DBAPIError) as caught:
        yield caught
    assert sqlstate(caught.value) == state
    host = repo.get_database().server
    assert f"database: {host}/{name}" in caught.value.__notes__


# What is made


def test_a_database_from_its_making_to_its_end(repo: type[Repo], server: Server, name: str) -> None:
    """It is there when it was made, empty, for all verbs at once, and gone when it was dropped."""
    with repo.using(name), pytest.raises(UnknownDatabaseError):
        repo.count(Tag)
    assert not repo.database_exists(name)
    assert repo.create_database(name)
    assert repo.database_exists(name)
    with repo.using(name):
        assert repo.execute("SELECT current_database()").scalar_one() == name
    assert repo.drop_database(name)
    assert not repo.database_exists(name)
    assert name not in server.databases()
    with repo.using(name), pytest.raises(UnknownDatabaseError):
        repo.count(Tag)
    assert books_balance(repo)


def test_a_copy_of_a_template(repo: type[Repo], server: Server, name: str) -> None:
    """It has the tables and rows of its template, and goes its own way from there."""
    template = f"{name} template"
    repo.create_database(template, template=TEMPLATE)
    plant_decoys(server, template, count=3)
    assert repo.create_database(name, template=template)
    with repo.using(name):
        assert [tag.label for tag in repo.all(Tag)] == ["decoy 1", "decoy 2", "decoy 3"]
        repo.insert(Tag(id=9, label="its own"))
    with repo.using(template):
        assert repo.count(Tag) == 3


def test_a_template_that_was_just_used(repo: type[Repo], server: Server, name: str, guest: dict[str, str]) -> None:
    """What this repo keeps open to the template does not keep it from being copied."""
    template = f"{name} template"
    repo.create_database(template, template=TEMPLATE)
    for user in ({}, guest):
        with repo.using({**user, "database": template}):
            repo.count(Tag)
    assert repo.create_database(name, template=template)
    assert repo.database_exists(name)


def test_an_encoding(repo: type[Repo], server: Server, name: str) -> None:
    """It has the encoding that was asked for; one that PostgreSQL does not know is its error."""
    assert repo.create_database(name, template="template0", encoding="SQL_ASCII")
    assert row(server, name, "pg_encoding_to_char(encoding)") == "SQL_ASCII"
    with refused("42704", repo, f"{name} too"):
        repo.create_database(f"{name} too", encoding="x' OWNER \"y")


@pytest.mark.parametrize("owner", ["proprietor", *UGLY[:2]], ids=repr)
def test_an_owner(repo: type[Repo], server: Server, name: str, make_role: Callable[..., str], owner: str) -> None:
    """It belongs to the role that was named; without one, to whoever made it."""
    repo.create_database(f"{name} own")
    assert row(server, f"{name} own", "pg_get_userbyid(datdba)") == server.username
    make_role(owner)
    try:
        assert repo.create_database(name, owner=owner)
        assert row(server, name, "pg_get_userbyid(datdba)") == owner
        with refused("42704", repo, f"{name} too"):
            repo.create_database(f"{name} too", owner="nobody there")
    finally:
        repo.drop_database(name)


@pytest.mark.parametrize("ugly", UGLY, ids=repr)
def test_a_name_is_a_name(repo: type[Repo], server: Server, name: str, ugly: str) -> None:
    """Whatever it looks like: as a new database's, a template's, an old one's and a new one's when it is renamed."""
    assert repo.create_database(ugly, template=TEMPLATE)
    assert repo.database_exists(ugly)
    assert ugly in server.databases()
    assert repo.create_database(name, template=ugly)
    repo.drop_database(ugly)
    repo.rename_database(name, ugly)
    with repo.using(ugly):
        assert repo.count(Tag) == 0
    repo.rename_database(ugly, name)
    assert (repo.database_exists(ugly), repo.database_exists(name)) == (False, True)


@pytest.mark.parametrize("way", ["keywords", "mapping", "url", "database"])
def test_on_another_server(repo: type[Repo], servers: Servers, name: str, way: str) -> None:
    """All four act on the server that they are told, and on no other."""
    here, there = servers[:2]
    options = {"host": there.host, "port": there.port, "database": name}
    default = repo.get_database()
    chosen: Any = {
        "keywords": None,
        "mapping": options,
        "url": there.url(name),
        "database": Database(there.host, there.port, name, default.username, default.query, default.password),
    }[way]
    keywords: Any = options if way == "keywords" else {}
    assert repo.create_database(chosen, template=TEMPLATE, **keywords)
    assert (name in here.databases(), name in there.databases()) == (False, True)
    assert repo.database_exists(chosen, **keywords)
    assert not repo.database_exists(name)
    with repo.using(chosen, **keywords):
        assert repo.count(Tag) == 0
    repo.rename_database(chosen, f"{name} renamed", **keywords)
    repo.rename_database({**options, "database": f"{name} renamed"}, name)
    repo.create_database(name)
    assert repo.drop_database(chosen, **keywords)
    assert (name in here.databases(), name in there.databases()) == (True, False)


def test_one_that_is_there_already(repo: type[Repo], server: Server, name: str) -> None:
    """To make it again is the server's error, or False where it may be there; it stays as it is."""
    assert repo.create_database(name, template=TEMPLATE, if_not_exists=True)
    plant_decoys(server, name, count=1)
    with refused("42P04", repo, name):
        repo.create_database(name)
    assert repo.create_database(name, if_not_exists=True) is False
    with repo.using(name):
        assert repo.count(Tag) == 1


def test_if_not_exists_hides_no_other_error(repo: type[Repo], name: str) -> None:
    """Only that it is there already is no error: that its template is missing remains one."""
    with refused("3D000", repo, name):
        repo.create_database(name, template="nothing there", if_not_exists=True)


def test_many_make_the_same_database(repo: type[Repo], name: str) -> None:
    """Of twenty threads at once, exactly one makes it."""
    start = Barrier(20)

    def make(_: int) -> bool:
        start.wait()
        return repo.create_database(name, if_not_exists=True)

    with ThreadPoolExecutor(20) as pool:
        assert sorted(pool.map(make, range(20))) == [False] * 19 + [True]
    assert repo.database_exists(name)
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


# What is dropped


def test_one_that_is_not_there(repo: type[Repo], name: str) -> None:
    """To drop it is the server's error, or False where it need not be there; to rename it is an error."""
    with refused("3D000", repo, name):
        repo.drop_database(name)
    assert repo.drop_database(name, if_exists=True) is False
    with refused("3D000", repo, name):
        repo.rename_database(name, f"{name} renamed")


def test_many_drop_the_same_database(repo: type[Repo], name: str) -> None:
    """Of eight threads at once, exactly one drops it."""
    repo.create_database(name)
    start = Barrier(8)

    def drop(_: int) -> bool:
        start.wait()
        return repo.drop_database(name, if_exists=True)

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(drop, range(8))) == [False] * 7 + [True]


def test_what_is_idle_keeps_no_database(
    make_repo: Callable[..., type[Repo]], server: Server, name: str, guest: dict[str, str]
) -> None:
    """The idle connections of all users are closed before it is dropped; those to other databases stay."""
    repo = make_repo("postgres", application_name="idle")
    repo.execute("SELECT 1")
    repo.create_database(name, template=TEMPLATE)
    for user in ({}, guest):
        with repo.using({**user, "database": name}):
            repo.count(Tag)
    await_connections(server, "idle", [name, name, "postgres"])
    assert repo.drop_database(name)
    await_connections(server, "idle", ["postgres"])
    assert (repo.stats().idle, repo.stats().transient, books_balance(repo)) == (1, 0, True)


def test_one_that_is_in_use(make_repo: Callable[..., type[Repo]], server: Server, name: str) -> None:
    """The server says by how many, and the error what to do about it; with `force` nobody is asked."""
    repo = make_repo("postgres")
    repo.create_database(name)
    with server.connect(name) as other:
        with refused("55006", repo, name) as caught:
            repo.drop_database(name, if_exists=True)
        assert "1 other session" in str(caught.value)
        assert any("force=True" in note for note in caught.value.__notes__)
        assert repo.database_exists(name)
        assert repo.drop_database(name, force=True)
        with pytest.raises(psycopg.OperationalError):
            other.execute("SELECT 1")
    assert not repo.database_exists(name)


def test_one_that_is_in_use_is_not_renamed_or_copied(
    make_repo: Callable[..., type[Repo]], server: Server, name: str
) -> None:
    """Neither takes place, and the error says what to do about it."""
    repo = make_repo("postgres")
    repo.create_database(name)
    with server.connect(name):
        with refused("55006", repo, name) as caught:
            repo.rename_database(name, f"{name} renamed")
        assert any("renamed while nobody is" in note for note in caught.value.__notes__)
        with refused("55006", repo, f"{name} copy") as caught:
            repo.create_database(f"{name} copy", template=name)
        assert any("template" in note for note in caught.value.__notes__)
    assert [each for each in server.databases() if each.startswith(name)] == [name]


def test_a_transaction_that_a_forced_drop_ends(repo: type[Repo], name: str) -> None:
    """Its next verb fails, its block cannot end well, and the repo goes on."""
    repo.create_database(name, template=TEMPLATE)
    with repo.using(name), pytest.raises(DBAPIError), repo.transaction():
        repo.insert(Tag(label="lost"))
        assert repo.drop_database(name, force=True)
        repo.insert(Tag(label="lost too"))
    assert repo.count(Tag) == 0
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


# What is renamed


def test_rename(repo: type[Repo], name: str) -> None:
    """The rows are found by the new name, and by the old one nothing; objects keep the home that they had."""
    repo.create_database(name, template=TEMPLATE)
    with repo.using(name):
        tag = repo.insert(Tag(label="moved"))
        home = repo.get_database().home
    repo.rename_database(name, f"{name} renamed")
    assert (repo.database_exists(name), repo.database_exists(f"{name} renamed")) == (False, True)
    with repo.using(name), pytest.raises(UnknownDatabaseError):
        repo.count(Tag)
    with repo.using(f"{name} renamed"):
        assert [each.label for each in repo.all(Tag)] == ["moved"]
    assert repo.home(tag) == home


def test_two_that_change_places(repo: type[Repo], name: str) -> None:
    """No connection that was opened under one name answers for the other."""
    one, other = f"{name} one", f"{name} other"
    for each in (one, other):
        repo.create_database(each, template=TEMPLATE)
        with repo.using(each):
            repo.insert(Tag(label=each))
    repo.rename_database(one, name)
    repo.rename_database(other, one)
    repo.rename_database(name, other)
    for each, found in ((one, other), (other, one)):
        with repo.using(each):
            assert [tag.label for tag in repo.all(Tag)] == [found]


def test_a_name_that_is_taken(repo: type[Repo], name: str) -> None:
    """To rename a database to it is the server's error, and both stay."""
    repo.create_database(name)
    with refused("42P04", repo, name):
        repo.rename_database(name, TEMPLATE)
    assert repo.database_exists(name)


# Around it


def test_in_a_transaction(repo: type[Repo], name: str) -> None:
    """They are no part of it: a rollback brings nothing back."""
    with repo.transaction():
        repo.insert(Tag(label="lost"))
        assert repo.create_database(name)
        assert repo.create_database(f"{name} too")
        assert repo.drop_database(f"{name} too")
        assert repo.count(Tag) == 1
        repo.rollback()
    assert (repo.database_exists(name), repo.count(Tag)) == (True, 0)


def test_the_maintenance_database(make_repo: Callable[..., type[Repo]], server: Server, name: str) -> None:
    """All that is said is said to it, and nothing of it is kept; it is not dropped or renamed from itself."""
    repo = make_repo("postgres", maintenance_database=TEMPLATE)
    asked: list[str] = []
    event.listen(repo, "query", lambda happened: asked.append(happened.database.name))
    repo.create_database(name)
    repo.database_exists(name)
    repo.rename_database(name, f"{name} renamed")
    repo.drop_database(f"{name} renamed")
    assert set(asked) == {TEMPLATE}
    assert repo.stats().idle == 0
    attempts = repo.stats().attempts
    for force in (False, True):
        with pytest.raises(ConfigError, match="maintenance_database"):
            repo.drop_database(TEMPLATE, force=force)
    with pytest.raises(ConfigError, match="maintenance_database"):
        repo.rename_database({"database": TEMPLATE, "host": "elsewhere"}, name)
    assert repo.stats().attempts == attempts
    assert repo.database_exists(TEMPLATE)


def test_without_a_maintenance_database(make_repo: Callable[..., type[Repo]], name: str) -> None:
    """That it is missing says nothing of the one that was named: never False, and both are in the error."""
    repo = make_repo("postgres", maintenance_database="nothing there")
    for call in (
        lambda: repo.drop_database(name, if_exists=True),
        lambda: repo.create_database(name, if_not_exists=True),
        lambda: repo.database_exists(name),
    ):
        with pytest.raises(UnknownDatabaseError, match="nothing there") as caught:
            call()
        assert any(note.endswith(f"/{name}") for note in caught.value.__notes__)


def test_a_user_who_may_not(repo: type[Repo], name: str, guest: dict[str, str]) -> None:
    """The server's refusal passes through: the user that is chosen is the one who acts."""
    repo.create_database(f"{name} own")
    with refused("42501", repo, name) as caught:
        repo.create_database({**guest, "database": name}, if_not_exists=True)
    assert isinstance(caught.value, ProgrammingError)
    with refused("42501", repo, f"{name} own"):
        repo.drop_database({**guest, "database": f"{name} own"}, if_exists=True)
    with refused("42501", repo, f"{name} own"):
        repo.rename_database({**guest, "database": f"{name} own"}, name)
    assert repo.database_exists({**guest, "database": f"{name} own"})


@pytest.mark.parametrize("verb", ["create", "drop", "rename"])
def test_a_timeout(make_repo: Callable[..., type[Repo]], server: Server, name: str, verb: str) -> None:
    """`call_options` ends a statement that the server does not answer in time, and its connection."""
    repo = make_repo("postgres", application_name="hasty")
    if verb != "create":
        repo.create_database(name)
    calls: dict[str, Callable[[], Any]] = {
        "create": lambda: repo.create_database(name, if_not_exists=True),
        "drop": lambda: repo.drop_database(name, if_exists=True),
        "rename": lambda: repo.rename_database(name, f"{name} renamed"),
    }
    with server.connect(autocommit=False) as other:
        other.execute("LOCK TABLE pg_database IN SHARE MODE")
        with repo.call_options(timeout=0.3), pytest.raises(OperationalError, match="did not answer in time") as caught:
            calls[verb]()
        assert f"database: {repo.get_database().server}/{name}" in caught.value.__notes__
    await_connections(server, "hasty", [])
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


def test_a_silent_network(make_repo: Callable[..., type[Repo]], proxy: Proxy, name: str) -> None:
    """`call_options` covers the connect too."""
    repo = make_repo("postgres", on=proxy)
    assert not repo.database_exists(name)
    proxy.deafen()
    with repo.call_options(timeout=0.3), pytest.raises(OperationalError, match="call's own timeout"):
        repo.database_exists(name)
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


# What is refused before anything is sent

BAD_CHOICES: list[Any] = [
    None,
    DEFAULT,
    "",
    "\0",
    "x" * 64,
    5,
    {},
    {"host": "db02"},
    {"databse": "x"},
    {"database": ""},
]


@pytest.mark.parametrize("choice", BAD_CHOICES, ids=repr)
def test_a_choice_that_names_no_database(make_repo: Callable[..., type[Repo]], choice: Any) -> None:
    """Neither the current nor the default database is meant by it, nor one whose name begins like it."""
    repo = make_repo(TEMPLATE)
    verbs: list[Callable[..., Any]] = [repo.create_database, repo.drop_database, repo.database_exists]
    for verb in (*verbs, lambda choice: repo.rename_database(choice, "x")):
        with repo.using("postgres"), pytest.raises(ConfigError):
            verb(choice)
    assert repo.stats().attempts == 0


def test_no_choice(make_repo: Callable[..., type[Repo]]) -> None:
    """No argument, and options without a database, name none either."""
    repo = make_repo(TEMPLATE)
    for verb in (repo.create_database, repo.drop_database, repo.database_exists):
        with pytest.raises(ConfigError, match="no database is named"):
            verb()
        with pytest.raises(ConfigError, match="no database is named"):
            verb(username="guest")
        with pytest.raises(ConfigError, match="not by both"):
            verb("x", host="db02")
    assert repo.stats().attempts == 0


@pytest.mark.parametrize("kind", ["template", "encoding", "owner", "database"])
@pytest.mark.parametrize("value", ["", "a\0b", "\ud800", "é" * 32, 5, b"x"], ids=repr)
def test_a_name_that_there_cannot_be(make_repo: Callable[..., type[Repo]], kind: str, value: Any) -> None:
    """A template, an encoding, an owner or a new name that PostgreSQL would cut, or cannot be sent, is refused."""
    repo = make_repo(TEMPLATE)
    given: Any = {kind: value}
    with pytest.raises(ConfigError, match=kind):
        if kind == "database":
            repo.rename_database("x", value)
        else:
            repo.create_database("x", **given)
    assert repo.stats().attempts == 0


@pytest.mark.parametrize("value", ["false", 1, None], ids=repr)
def test_a_switch_is_true_or_false(make_repo: Callable[..., type[Repo]], value: Any) -> None:
    """What is merely taken for true forces nothing."""
    repo = make_repo(TEMPLATE)
    for call in (
        lambda: repo.create_database("x", if_not_exists=value),
        lambda: repo.drop_database("x", force=value),
        lambda: repo.drop_database("x", if_exists=value),
    ):
        with pytest.raises(ConfigError, match="True or False"):
            call()
    assert repo.stats().attempts == 0


def test_a_disposed_repo(repo: type[Repo], name: str) -> None:
    """It makes, drops, renames and finds nothing any more."""
    repo.dispose()
    for call in (
        lambda: repo.create_database(name),
        lambda: repo.drop_database(name, if_exists=True),
        lambda: repo.rename_database(name, f"{name} renamed"),
        lambda: repo.database_exists(name),
    ):
        with pytest.raises(RepoDisposedError):
            call()
