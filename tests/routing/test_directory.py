"""Directories: which database a name means, whom they ask, how long they are believed, and what they forbid."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Column, MetaData, String, select, text
from sqlalchemy import Table as SQLTable
from sqlalchemy.exc import DBAPIError, OperationalError

from shardrepo import (
    DEFAULT,
    ConfigError,
    DatabaseStateError,
    ListingError,
    ReadOnlyError,
    Repo,
    UnknownDatabaseError,
    WrongDatabaseError,
    databases,
    directory,
)
from shardrepo.directory import Location, Servers, Static, Table
from shardrepo.testing.servers import Server
from shardrepo.testing.servers import Servers as RealServers

from ..conftest import await_, connections_of, run_sql
from ..models import Tag, User

pytestmark = pytest.mark.routing


def address(server: Server) -> dict[str, Any]:
    """What leads to a server, as the options of a directory."""
    url = server.url("postgres")
    return {"host": url.host, "port": url.port, "username": url.username, "password": url.password}


def here(repo: type[Repo], name: str) -> str:
    with repo.using(name):
        return str(repo.execute("SELECT current_database()").scalar_one())


@pytest.fixture
def shards(servers: RealServers, make_databases: Callable[..., list[str]]) -> dict[str, Server]:
    """Two databases on the first server, and two on the second."""
    return {name: on for on in servers[:2] for name in make_databases(2, on=on)}


class Book:
    """A directory that counts what it is asked, and can be told to fail or to wait."""

    def __init__(self, locations: dict[str, Any]) -> None:
        self.locations = locations
        self.asked: list[str] = []
        self.failure: Exception | None = None
        self.go_on = threading.Event()
        self.go_on.set()

    def __call__(self, name: str) -> Any:
        self.asked.append(name)
        assert self.go_on.wait(30)
        if self.failure is not None:
            raise self.failure
        return self.locations.get(name)


@pytest.fixture
def book(shards: dict[str, Server]) -> Book:
    return Book({name: address(server) for name, server in shards.items()})


@pytest.fixture
def repo(make_repo: Callable[..., type[Repo]], book: Book) -> Iterator[type[Repo]]:
    return make_repo("postgres", directory=book)


# What there is


def test_a_name_leads_to_its_server(repo: type[Repo], book: Book, shards: dict[str, Server]) -> None:
    """Rows are where the directory says that the database is, and objects know it."""
    for name, server in shards.items():
        with repo.using(name):
            tag = repo.insert(Tag(label=name))
            assert repo.home(tag) == f"127.0.0.1:{server.port}/{name}"
            assert repo.get_database().port == server.port
        assert run_sql(server, name, "SELECT label FROM tags") == [(name,)]
    assert book.asked == list(shards)


def test_choosing_asks_nobody(repo: type[Repo], book: Book) -> None:
    """`set_database` and `using` do no I/O; a verb does."""
    before = repo.set_database("no matter what")
    with repo.using("nor this"):
        pass
    repo.set_database(before)
    assert book.asked == []


def test_what_names_a_server_is_not_looked_up(
    repo: type[Repo], book: Book, shards: dict[str, Server], server: Server
) -> None:
    """A host, a URL, and the default are complete by themselves."""
    name = next(iter(shards))
    with repo.using(database=name, **address(server)):
        assert repo.get_database().name == name
    with repo.using(server.url(name)):
        assert repo.get_database().name == name
    with repo.using(DEFAULT):
        assert repo.get_database().name == "postgres"
    assert repo.get_database().name == "postgres"
    assert book.asked == []


def test_options_go_over_what_the_directory_says(repo: type[Repo], book: Book, shards: dict[str, Server]) -> None:
    """Who connects may be chosen beside the name."""
    name = next(iter(shards))
    with repo.using(database=name, username="somebody"):
        assert (repo.get_database().username, repo.get_database().port) == ("somebody", shards[name].port)


def test_an_unknown_name_costs_no_socket(make_repo: Callable[..., type[Repo]], book: Book, server: Server) -> None:
    """It is an error of its own before anything is connected to, also where the server has such a database."""
    repo = make_repo("postgres", directory=book)
    with repo.using("template1"), pytest.raises(UnknownDatabaseError, match="knows no database 'template1'") as caught:
        repo.count(Tag)
    assert caught.value.database is None
    assert repo.stats().attempts == 0
    with pytest.raises(UnknownDatabaseError), repo.using("nope"), repo.transaction():
        pass
    assert repo.stats().attempts == 0


def test_a_new_database_needs_no_restart(
    make_repo: Callable[..., type[Repo]], book: Book, make_databases: Callable[..., list[str]], server: Server
) -> None:
    """That there is none is believed for a short while only."""
    repo = make_repo("postgres", directory=book, directory_ttl=0.05)
    (name,) = make_databases()
    with repo.using(name), pytest.raises(UnknownDatabaseError):
        repo.count(Tag)
    book.locations[name] = address(server)

    def known() -> bool:
        try:
            return here(repo, name) == name
        except UnknownDatabaseError:
            return False

    await_(known)


# Whom a repo asks


def test_a_mapping_and_static(make_repo: Callable[..., type[Repo]], shards: dict[str, Server]) -> None:
    """What is written down is a directory; a database may have another name on its server."""
    one, *_, other = shards
    written = {
        "alpha": {**address(shards[one]), "database": one, "tags": "canary, small"},
        other: address(shards[other]),
    }
    for given in (written, Static(written)):
        repo = make_repo("postgres", directory=given)
        assert here(repo, "alpha") == one
        assert here(repo, other) == other
        assert [(each.name, each.tags) for each in repo.databases()] == sorted(
            [("alpha", frozenset({"canary", "small"})), (other, frozenset())]
        )


def test_servers_tell_what_they_have(
    make_repo: Callable[..., type[Repo]], servers: RealServers, shards: dict[str, Server]
) -> None:
    """By pattern, on each of them; what does not match is not there."""
    repo = make_repo("postgres", directory=Servers([address(server) for server in servers[:2]], like="db____"))
    assert {each.name for each in repo.databases()} >= set(shards)
    assert "lasting1" not in {each.name for each in repo.databases()}
    for name, server in shards.items():
        assert here(repo, name) == name
        with repo.using(name):
            assert repo.get_database().port == server.port
    with repo.using("template_app"), pytest.raises(UnknownDatabaseError):
        repo.count(Tag)


def test_a_name_on_two_servers_is_refused(
    make_repo: Callable[..., type[Repo]], servers: RealServers, shards: dict[str, Server]
) -> None:
    """Nobody knows which is meant, so neither is taken."""
    name = next(iter(shards))
    servers[1].create_database(name)
    try:
        repo = make_repo("postgres", directory=Servers([address(server) for server in servers[:2]]))
        with repo.using(name), pytest.raises(ConfigError, match="nobody knows which is meant"):
            repo.count(Tag)
        with pytest.raises(ConfigError, match="nobody knows which is meant"):
            repo.databases()
    finally:
        servers[1].drop_database(name)


def test_a_server_that_is_down_hides_its_own_databases_only(
    make_repo: Callable[..., type[Repo]], server: Server, shards: dict[str, Server]
) -> None:
    """What another server has is found; what nobody has may be on the one that is down, which is the error."""
    down = {"host": "127.0.0.1", "port": 1}
    repo = make_repo("postgres", directory=Servers([down, address(server)], like="db%"))
    name = next(iter(shards))
    assert here(repo, name) == name
    with repo.using("dbnope"), pytest.raises(OperationalError, match=r"127\.0\.0\.1:1/"):
        repo.count(Tag)


def test_a_table_of_a_catalogue(
    make_repo: Callable[..., type[Repo]], server: Server, shards: dict[str, Server], database: str
) -> None:
    """A row for each database: where it is, its state, its tags. One question for each name."""
    columns = ("name", "host", "port", "username", "password", "state", "tags")
    catalogue = SQLTable("shards", MetaData(), *(Column(name, String) for name in columns if name != "port"))
    run_sql(server, database, "CREATE TABLE shards (name text, host text, port int, username text, password text, "
            "state text, tags text)")  # fmt: skip
    for name, on in shards.items():
        given = address(on)
        run_sql(server, database, "INSERT INTO shards VALUES (%s, %s, %s, %s, %s, 'active', 'a b')",
                (name, given["host"], given["port"], given["username"], given["password"]))  # fmt: skip
    statement = select(catalogue.c.name, catalogue.c.host, text("port"), catalogue.c.state, catalogue.c.tags)
    statement = select(
        *(getattr(catalogue.c, name) for name in columns if name != "port"), Column("port", String)
    ).select_from(catalogue)
    repo = make_repo("postgres", directory=Table(statement, database=database))
    for name in shards:
        assert here(repo, name) == name
    assert [each.name for each in repo.databases()] == sorted(shards)
    assert {each.tags for each in repo.databases()} == {frozenset({"a", "b"})}
    with repo.using("nope"), pytest.raises(UnknownDatabaseError):
        repo.count(Tag)
    with pytest.raises(ConfigError, match="a column called name"):
        Table(select(catalogue.c.host))


def test_async_functions(make_repo: Callable[..., type[Repo]], book: Book, shards: dict[str, Server]) -> None:
    """They are awaited in a loop of their own, whether one runs here or not."""

    async def locate(name: str) -> Any:
        await asyncio.sleep(0)
        return book(name)

    repo = make_repo("postgres", directory=locate)
    one, other, *_ = shards
    assert here(repo, one) == one

    async def main() -> str:
        return here(repo, other)

    assert asyncio.run(main()) == other
    with pytest.raises(ConfigError, match="not which there are"):
        repo.databases()


def test_hooks_of_a_class(server: Server, shards: dict[str, Server]) -> None:
    """A class may say it itself, by way of its own default database, where nothing is chosen and nothing open."""

    class App(Repo, config={"url": server.url("postgres")}):
        @classmethod
        def locate(cls, name: str) -> Any:
            assert not cls.in_transaction()
            there = cls.execute("SELECT count(*) FROM pg_database WHERE datname = :name", {"name": name}).scalar_one()
            return address(server) if there else None

        @classmethod
        async def list_databases(cls) -> Any:
            return cls.execute("SELECT datname FROM pg_database WHERE datname LIKE 'db%'").scalars().all()

    try:
        one, other, *_ = (name for name, on in shards.items() if on is server)
        with App.using(one), App.transaction():
            assert here(App, other) == other
            assert App.execute("SELECT current_database()").scalar_one() == one
        assert {each.name for each in App.databases()} >= {one, other}
        with App.using("nope"), pytest.raises(UnknownDatabaseError):
            App.count(Tag)
    finally:
        App.dispose()


def test_hooks_stand_where_the_config_is(repo: type[Repo]) -> None:
    """A class that shares its parent's databases cannot have its own idea of where they are."""
    for hook in ("locate", "list_databases", "configure_engine"):
        with pytest.raises(ConfigError, match=f"override {hook}"):
            type("Shared", (repo,), {hook: classmethod(lambda cls, *_: None)})


def test_a_directory_that_asks_itself(make_repo: Callable[..., type[Repo]], shards: dict[str, Server]) -> None:
    """It is told so, and nobody waits for ever."""
    made: list[type[Repo]] = []
    repo = make_repo("postgres", directory=lambda name: here(made[0], name))
    made.append(repo)
    with repo.using("circle"), pytest.raises(ConfigError, match="asks itself"):
        repo.count(Tag)


# How long it is believed


def test_many_callers_ask_once(repo: type[Repo], book: Book, shards: dict[str, Server]) -> None:
    """Whoever needs a name that is being asked for waits for that answer."""
    name = next(iter(shards))
    book.go_on.clear()
    with ThreadPoolExecutor(16) as executor:
        calls = [executor.submit(here, repo, name) for _ in range(16)]
        await_(lambda: book.asked == [name])
        book.go_on.set()
        assert [call.result(30) for call in calls] == [name] * 16
    assert book.asked == [name]


def test_an_answer_is_believed_for_its_time(
    make_repo: Callable[..., type[Repo]], book: Book, shards: dict[str, Server]
) -> None:
    """And asked for again afterwards; the same answer is the same database object."""
    name = next(iter(shards))
    repo = make_repo("postgres", directory=book, directory_ttl=0.05)
    with repo.using(name):
        first = repo.get_database()
        await_(lambda: repo.get_database() is first and len(book.asked) >= 3)


def test_the_last_good_answer_serves_while_the_directory_fails(
    make_repo: Callable[..., type[Repo]], book: Book, shards: dict[str, Server], caplog: pytest.LogCaptureFixture
) -> None:
    """A name that it knew goes on working; one that it did not is its error, with the name."""
    one, other, *_ = shards
    repo = make_repo("postgres", directory=book, directory_ttl=0.05)
    assert here(repo, one) == one
    book.failure = OSError("the catalogue is down")
    await_(lambda: here(repo, one) == one and len(book.asked) >= 2)
    assert "its last answer about" in caplog.text
    with repo.using(other), pytest.raises(OSError, match="the catalogue is down") as caught:
        repo.count(Tag)
    assert any(other in note for note in caught.value.__notes__)
    book.failure = None
    assert here(repo, other) == other


def test_a_forked_child_asks_for_itself(repo: type[Repo], book: Book, shards: dict[str, Server]) -> None:
    """Also when another thread of its parent was waiting for an answer."""
    one, other, *_ = shards
    assert here(repo, one) == one
    book.go_on.clear()
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(here, repo, other)
        await_(lambda: book.asked == [one, other])
        child = os.fork()
        if child == 0:
            try:
                book.go_on.set()
                os._exit(0 if here(repo, other) == other else 1)
            finally:
                os._exit(2)
        book.go_on.set()
        assert waiting.result(30) == other
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# What it forbids


@pytest.mark.parametrize("state", ["suspended", "migrating"])
def test_a_database_that_is_not_to_be_connected_to(
    make_repo: Callable[..., type[Repo]], book: Book, shards: dict[str, Server], state: str
) -> None:
    """Every way in is closed, without a socket, until its state changes."""
    name = next(iter(shards))
    book.locations[name] |= {"state": state}
    repo = make_repo("postgres", directory=book, directory_ttl=0.05, application_name=f"state-{state}")
    ways: list[Callable[[], Any]] = [
        lambda: repo.count(Tag), lambda: repo.insert(Tag(label="x")), lambda: repo.engine(), lambda: repo.session(),
        lambda: repo.connection().__enter__(), lambda: repo.transaction().__enter__(),
        lambda: repo.stream(Tag).__enter__(),
    ]  # fmt: skip
    with repo.using(name):
        for way in ways:
            with pytest.raises(DatabaseStateError, match=state) as caught:
                way()
            assert (caught.value.state, caught.value.database.name) == (state, name)
        assert connections_of(shards[name], f"state-{state}") == []
        del book.locations[name]["state"]
        await_(lambda: repo.get_database().state == "active")
        assert repo.count(Tag) == 0


def test_a_database_that_is_read_only(
    make_repo: Callable[..., type[Repo]], book: Book, shards: dict[str, Server]
) -> None:
    """Verbs that write are refused, and the server refuses what else would; it is writable again when it says so."""
    one, other, *_ = shards
    repo = make_repo("postgres", directory=book, directory_ttl=0.05)
    with repo.using(one):
        repo.insert(Tag(label="before"))
        book.locations[one] |= {"state": "read_only"}
        await_(lambda: repo.get_database().state == "read_only")
        assert repo.count(Tag) == 1
        with pytest.raises(ReadOnlyError, match="is read_only"):
            repo.insert(Tag(label="x"))
        with pytest.raises(ReadOnlyError):
            repo.delete_all(Tag)
        with pytest.raises(DBAPIError, match="read-only"):
            repo.execute("DELETE FROM tags")
        with repo.using(other):
            repo.insert(Tag(label="elsewhere"))
        del book.locations[one]["state"]
        await_(lambda: repo.get_database().state == "active")
        repo.insert(Tag(label="after"))
        assert repo.count(Tag) == 2


def test_an_id_is_a_home_that_survives_a_move(
    make_repo: Callable[..., type[Repo]], servers: RealServers, make_databases: Callable[..., list[str]]
) -> None:
    """An object of a database that has moved to another server is still of that database, and of no other."""
    (old,) = make_databases(1, on=servers[0])
    (new,) = make_databases(1, on=servers[1])
    (third,) = make_databases(1, on=servers[1])
    book = Book(
        {
            "acme": {**address(servers[0]), "database": old, "id": "tenant-7"},
            "other": {**address(servers[1]), "database": third, "id": "tenant-8"},
        }
    )
    repo = make_repo("postgres", directory=book, directory_ttl=0.05)
    with repo.using("acme"):
        user = repo.insert(User(name="Ada"))
        assert repo.home(user) == "tenant-7"
    run_sql(servers[1], new, "INSERT INTO users (id, name, age) VALUES (%s, 'Ada', 0)", (user.id,))
    book.locations["acme"] = {**address(servers[1]), "database": new, "id": "tenant-7"}
    with repo.using("acme"):
        await_(lambda: repo.get_database().name == new)
        repo.update(user, name="Augusta")
    assert run_sql(servers[1], new, "SELECT name FROM users") == [("Augusta",)]
    assert run_sql(servers[0], old, "SELECT name FROM users") == [("Ada",)]
    with repo.using("other"), pytest.raises(WrongDatabaseError):
        repo.update(user, name="wrong")


def test_an_object_is_read_where_its_database_is_now(
    make_repo: Callable[..., type[Repo]], servers: RealServers, make_databases: Callable[..., list[str]]
) -> None:
    """`reload` and `preload` of what belongs to another database ask the directory, as a verb on it would."""
    (old,) = make_databases(1, on=servers[0])
    (new,) = make_databases(1, on=servers[1])
    book = Book({"acme": {**address(servers[0]), "database": old, "id": "tenant-7"}})
    repo = make_repo("postgres", directory=book, directory_ttl=0.05)
    with repo.using("acme"):
        user = repo.insert(User(name="Ada"))
    run_sql(servers[1], new, "INSERT INTO users (id, name, age) VALUES (%s, 'moved', 0)", (user.id,))
    book.locations["acme"] = {**address(servers[1]), "database": new, "id": "tenant-7"}

    def name_now() -> str:
        found = repo.reload(user)
        assert found is not None
        return found.name

    await_(lambda: name_now() == "moved")
    book.locations["acme"] = {**address(servers[1]), "database": new, "id": "tenant-8"}

    def refused() -> bool:
        try:
            repo.reload(user)
        except WrongDatabaseError:
            return True
        return False

    await_(refused)


def test_a_change_of_state_makes_no_second_user(
    make_repo: Callable[..., type[Repo]], book: Book, shards: dict[str, Server]
) -> None:
    """Objects of a database that was read-only for a while are still read from it, by the one who has chosen it."""
    name = next(iter(shards))
    repo = make_repo("postgres", directory=book, directory_ttl=0.05)
    with repo.using(name):
        user = repo.insert(User(name="Ada"))
        book.locations[name] |= {"state": "read_only"}
        await_(lambda: repo.get_database().state == "read_only")
    assert repo.reload(user) is not None
    del book.locations[name]["state"]
    with repo.using(name):
        await_(lambda: repo.get_database().state == "active")
    assert repo.reload(user) is not None


def test_what_is_chosen_again_is_met_again(
    make_repo: Callable[..., type[Repo]], book: Book, shards: dict[str, Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many others were chosen since, of those that a directory knows and of those that name their server."""
    monkeypatch.setattr(databases, "MAX_RESOLVED", 8)
    one, *_, other = shards
    repo = make_repo("postgres", directory=book)
    complete = {"database": other, **address(shards[other])}
    objects = []
    for choice in (one, complete):
        with repo.using(choice):
            objects.append(repo.insert(User(name="Ada")))
    for number in range(40):
        book.locations[f"db{number}"] = address(shards[one])
        for passing in (f"db{number}", {"database": f"db{number}", "host": "db09"}):
            with repo.using(passing):
                repo.get_database()
            for choice, user in zip((one, complete), objects, strict=True):
                with repo.using(choice):
                    repo.get_database()
                assert repo.reload(user) is not None


def test_databases_are_made_whatever_is_current(
    make_repo: Callable[..., type[Repo]], book: Book, shards: dict[str, Server], server: Server
) -> None:
    """What the directory says of the current database, or that there is none, says nothing of another."""
    name = next(iter(shards))
    book.locations[name] |= {"state": "read_only"}
    repo = make_repo("postgres", directory=book, require_database=True)
    made = {"database": f"{name}made", **address(server)}
    with repo.using(name):
        assert repo.create_database(made)
    assert repo.drop_database(made)
    with pytest.raises(ReadOnlyError, match="is read_only"):
        repo.drop_database(name)


def test_a_template_is_let_go_of_though_the_copy_has_an_id(
    make_repo: Callable[..., type[Repo]], book: Book, shards: dict[str, Server], server: Server
) -> None:
    """Another database on the same server is another one, whatever home the first one has."""
    template = next(iter(shards))
    book.locations["acme"] = {**address(server), "database": f"{template}made", "id": "tenant-7"}
    repo = make_repo("postgres", directory=book)
    assert here(repo, template) == template
    assert repo.create_database("acme", template=template)
    try:
        assert here(repo, "acme") == f"{template}made"
    finally:
        assert repo.drop_database("acme")


BAD_ANSWERS: dict[str, tuple[Any, str]] = {
    "no mapping": (7, "by a mapping of options, not by 7"),
    "an unknown option": ({"hots": "db01"}, "did you mean 'host'"),
    "an unknown state": ({"host": "db01", "state": "activ"}, "did you mean 'active'"),
    "a wrong port": ({"host": "db01", "port": 0}, "port 0 does not exist"),
}


@pytest.mark.parametrize("case", BAD_ANSWERS)
def test_a_directory_that_answers_nonsense(make_repo: Callable[..., type[Repo]], case: str) -> None:
    """Nothing is guessed of it."""
    answer, message = BAD_ANSWERS[case]
    repo = make_repo("postgres", directory=lambda _: answer)
    with repo.using("x"), pytest.raises(ConfigError, match=message):
        repo.count(Tag)
    assert repo.stats().attempts == 0


def test_bad_directories(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Refused where they are given."""
    for given, message in ((7, "is Static, Servers, Table"), ({"x": 7}, "by a mapping"), ({"": "db01"}, "is empty")):
        with pytest.raises(ConfigError, match=message):
            make_repo("postgres", directory=given)
    with pytest.raises(ConfigError, match="needs some"):
        Servers([])
    with pytest.raises(ConfigError, match="no directory"):
        make_repo(database).databases()


def test_only_so_many_names_are_remembered(
    make_repo: Callable[..., type[Repo]], book: Book, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing grows with the number of names ever asked for."""
    monkeypatch.setattr(directory, "MAX_KNOWN", 10)
    repo = make_repo("postgres", directory=book)
    for number in range(100):
        with repo.using(f"nope{number}"), pytest.raises(UnknownDatabaseError):
            repo.get_database()
    known = repo._router.databases.whereabouts
    assert known is not None
    assert len(known._known) <= 10
    assert Location.of("x", "db01") == Location.of("x", {"host": "db01"})


def test_a_template_is_not_listed(
    make_repo: Callable[..., type[Repo]], server: Server, shards: dict[str, Server]
) -> None:
    """What the config names as the servers' template is none of the databases, nor of those that are known when a
    server does not answer, which are remembered all the same.
    """
    template, *others = [name for name, on in shards.items() if on is server]
    down = {"host": "127.0.0.1", "port": 1}
    repo = make_repo("postgres", directory=Servers([address(server)], like="db%"), template_database=template)
    found = [each.name for each in repo.databases()]
    assert template not in found
    assert set(others) <= set(found)
    half = make_repo("postgres", directory=Servers([address(server), down], like="db%"), template_database=template)
    with pytest.raises(ListingError, match="1 of 2 servers did not say what they have") as caught:
        half.databases()
    assert [each.name for each in caught.value.found] == found
    assert list(caught.value.failures) == ["127.0.0.1:1"]
    asked = half.stats().attempts
    with half.using(others[0]):
        assert half.get_database().port == server.port
    assert half.stats().attempts == asked


def test_what_a_listing_says_is_remembered(
    make_repo: Callable[..., type[Repo]], server: Server, shards: dict[str, Server]
) -> None:
    """Where a database is that has just been listed costs no further question."""
    repo = make_repo("postgres", directory=Servers([address(on) for on in set(shards.values())], like="db%"))
    repo.databases()
    asked = repo.stats().attempts
    for name, on in shards.items():
        with repo.using(name):
            assert repo.get_database().port == on.port
    assert repo.stats().attempts == asked
