"""A name is a name: whatever it looks like, it reaches the database of that very name, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from shardrepo import ConfigError, ConnectError, Database, Repo, UnknownDatabaseError
from shardrepo.testing.servers import Server, Servers

from ..conftest import connections_of

pytestmark = pytest.mark.routing

STRANGE = [
    "postgresql://evil/x",
    "postgresql+psycopg://app:secret@127.0.0.1:1/x",
    "host=evil dbname=x",
    "dbname=postgres",
    "service=evil",
    "hostaddr=10.0.0.1",
    "../postgres",
    "/etc/passwd",
    "it's",
    'say "hello"',
    "back\\slash",
    "a%20b?c=d&e#f@g:h",
    " spaces ",
    "semi;colon -- comment",
    "Größe-名前-🦆",
    "UPPER",
    "upper",
    "new\nline",
    "é" * 31 + "x",
]


@pytest.fixture(scope="module")
def strange(server: Server) -> list[str]:
    """Databases with strange names, which go with the server."""
    server.create_databases(STRANGE)
    return STRANGE


@pytest.mark.parametrize("name", STRANGE, ids=repr)
def test_a_strange_name_reaches_the_database_of_that_name(
    server: Server, strange: list[str], make_repo: Callable[..., type[Repo]], name: str
) -> None:
    """A name that looks like a URL, a conninfo string, a path or SQL is a name, by whatever way it comes in."""
    repo = make_repo("postgres")
    default = repo.get_database()
    address = Database(default.host, default.port, name, default.username, default.query, default.password)
    for way in (name, {"database": name}, server.url(name), address):
        with repo.using(way):
            assert_reached(repo, server, name)
    repo.set_database(database=name)
    assert_reached(repo, server, name)
    repo = make_repo(name)
    assert_reached(repo, server, name)


def assert_reached(repo: type[Repo], server: Server, name: str) -> None:
    reached = repo.execute("SELECT current_database(), current_setting('port')::int").one()
    assert tuple(reached) == (name, server.port)
    assert repo.get_database().name == name
    assert repo.get_database().home == f"127.0.0.1:{server.port}/{name}"


@pytest.mark.parametrize("name", [*STRANGE[:12], "Postgres", "template_app ", "x" * 63], ids=repr)
def test_a_strange_name_that_no_database_has(servers: Servers, make_repo: Callable[..., type[Repo]], name: str) -> None:
    """Where no database has the name, the error names it, and no server was asked for another."""
    repo = make_repo("postgres", on=servers[2], application_name="strange")
    with repo.using(name), pytest.raises(UnknownDatabaseError) as caught:
        repo.execute("SELECT 1")
    assert caught.value.database.name == name
    assert caught.value.database.port == servers[2].port
    assert name in str(caught.value)
    assert repo.stats().attempts == repo.stats().failed == 1


@pytest.mark.parametrize(
    "name",
    ["", "\0", "a\0b", "x" * 64, "é" * 32, "postgres" + "x" * 56, "\ud800"],
    ids=["empty", "nul", "nul inside", "64 bytes", "64 bytes of 32", "64 with a prefix", "surrogate"],
)
def test_a_name_that_no_database_can_have(make_repo: Callable[..., type[Repo]], name: str) -> None:
    """A name that PostgreSQL would cut, or cannot be sent, is refused where it is given; the choice stays."""
    repo = make_repo("postgres")
    before = repo.set_database("template_app")
    ways: list[Callable[[], Any]] = [
        lambda: repo.set_database(name),
        lambda: repo.set_database({"database": name}),
        lambda: repo.set_database(database=name),
        lambda: repo.using(name).__enter__(),
        lambda: repo.disconnect(name),
    ]
    for choose in ways:
        with pytest.raises(ConfigError):
            choose()
        assert repo.get_database().name == "template_app"
    assert before is None
    assert repo.stats().attempts == 0


def test_a_name_of_63_bytes_is_not_cut(server: Server, make_repo: Callable[..., type[Repo]]) -> None:
    """The longest name works, and one byte more does not reach it."""
    name = "n" * 63
    server.create_database(name)
    try:
        repo = make_repo("postgres")
        with repo.using(name):
            assert repo.execute("SELECT current_database()").scalar_one() == name
        with pytest.raises(ConfigError, match="64 bytes"):
            repo.set_database(name + "n")
    finally:
        repo.disconnect_all()
        server.drop_database(name, force=True)


@pytest.mark.parametrize(
    "host",
    ["/nowhere hostaddr=127.0.0.1", "/nowhere' hostaddr='127.0.0.1", "127.0.0.1,127.0.0.1", "", "\0", "127.0.0.1\0"],
    ids=repr,
)
def test_a_strange_host_leads_nowhere_else(make_repo: Callable[..., type[Repo]], host: str) -> None:
    """A host is a host: what is smuggled into one is refused, or is no host."""
    repo = make_repo("postgres")
    with pytest.raises((ConfigError, ConnectError)), repo.using(host=host):
        repo.execute("SELECT 1")


@pytest.mark.parametrize("username", ["evil dbname=x", "x' dbname='postgres", "a\\"], ids=repr)
def test_a_strange_user_is_a_user(server: Server, make_repo: Callable[..., type[Repo]], username: str) -> None:
    """A user name with the syntax of conninfo is a user name."""
    with server.connect() as connection:
        role = psycopg.sql.Identifier(username)
        connection.execute(psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'pw'").format(role))
    try:
        repo = make_repo("postgres")
        with repo.using(username=username, password="pw"):
            found = repo.execute("SELECT session_user, current_database()").one()
            assert tuple(found) == (username, "postgres")
        repo.disconnect_all()
        repo.dispose()
    finally:
        with server.connect() as connection:
            connection.execute(psycopg.sql.SQL("DROP ROLE {}").format(role))


@pytest.mark.parametrize("name", ["host", "hostaddr", "port", "dbname", "user", "password", "service", "passfile"])
def test_a_query_does_not_say_where(make_repo: Callable[..., type[Repo]], name: str) -> None:
    """What says where to connect has an option of its own, and is refused in the query and in connect_args."""
    repo = make_repo("postgres")
    with pytest.raises(ConfigError, match=name):
        repo.set_database(database="x", query={name: "evil"})
    with pytest.raises(ConfigError, match=name):
        make_repo("postgres", connect_args={name: "evil"})


@pytest.fixture
def evil(servers: Servers, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which every variable of libpq leads to the second server's postgres."""
    there = servers[1]
    services = tmp_path / "pg_service.conf"
    services.write_text(
        f"[evil]\nhost=127.0.0.2\nhostaddr=127.0.0.2\nport={there.port}\ndbname=postgres\nuser={there.username}\n"
        f"password={there.password}\n"
    )
    variables = {
        "PGHOST": "127.0.0.2",
        "PGHOSTADDR": "127.0.0.2",  # this machine too, where no server listens
        "PGPORT": str(there.port),
        "PGDATABASE": "postgres",
        "PGUSER": "nobody",
        "PGSERVICE": "evil",
        "PGSERVICEFILE": str(services),
        "PGAPPNAME": "evil",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return variables


def test_the_environment_leads_nowhere(
    server: Server, evil: dict[str, str], two_databases: tuple[str, str], make_repo: Callable[..., type[Repo]]
) -> None:
    """libpq's variables and service files do not move a database that the repo has named."""
    repo = make_repo(two_databases[0])
    for name in two_databases:
        with repo.using(name):
            found = repo.execute("SELECT current_database(), current_setting('port')::int, session_user").one()
            assert tuple(found) == (name, server.port, server.username)
    assert repo.ping() > 0


@pytest.mark.parametrize("variable", ["PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE"])
def test_each_variable_leads_nowhere(
    server: Server,
    evil: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    make_repo: Callable[..., type[Repo]],
    variable: str,
) -> None:
    """One variable by itself leads nowhere either, and an address that is not this machine's is not tried."""
    for name in evil:
        if name not in (variable, "PGSERVICEFILE"):
            monkeypatch.delenv(name)
    repo = make_repo("template_app")
    found = repo.execute("SELECT current_database(), current_setting('port')::int, session_user").one()
    assert tuple(found) == ("template_app", server.port, server.username)


def test_a_config_without_a_host_takes_none_from_the_environment(
    evil: dict[str, str], make_repo: Callable[..., type[Repo]], server: Server
) -> None:
    """A host or a database that nobody named is an error, not the environment's."""
    no_host: type[Repo] = type("NoHost", (Repo,), {}, config={"database": "postgres", "port": server.port})
    with pytest.raises(ConfigError, match="host"):
        no_host.execute("SELECT 1")
    no_database = make_repo(None)
    with pytest.raises(Exception, match="no database is chosen"):
        no_database.execute("SELECT 1")


def test_a_missing_port_is_5432_and_not_the_environments(evil: dict[str, str]) -> None:
    """The port that nobody named is PostgreSQL's own, whatever PGPORT says."""
    repo: type[Repo] = type("NoPort", (Repo,), {}, config={"url": "postgresql+psycopg://app@127.0.0.1/x"})
    assert repo.get_database().port == 5432
    assert repo.get_database().home == "127.0.0.1:5432/x"


def test_all_spellings_of_a_database_share_a_connection(
    server: Server, two_databases: tuple[str, str], make_repo: Callable[..., type[Repo]]
) -> None:
    """Every way to name one database leads to the same cached connection."""
    name, _ = two_databases
    repo = make_repo(name)
    spellings: list[Any] = [
        None,
        name,
        {"database": name},
        {"port": server.port, "host": "127.0.0.1"},
        {"host": "127.0.0.1", "port": server.port},
        server.url(name),
        repo.get_database(),
        {"username": server.username, "password": server.password},
    ]
    pids = set()
    for spelling in spellings:
        with repo.using(spelling):
            pids.add(repo.execute("SELECT pg_backend_pid()").scalar_one())
    assert len(pids) == 1
    with repo.using(name):
        application: str = repo.execute("SHOW application_name").scalar_one()
    assert len(connections_of(server, application)) == 1
