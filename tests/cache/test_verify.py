"""`verify_database`: a new connection leads where it was sent, by the server's own word."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from shardrepo import Repo, WrongDatabaseError
from shardrepo.testing.servers import Server, count_statements

from ..conftest import await_connections, books_balance, plant_decoys, run_sql
from ..models import Tag
from ..proxy import Proxy

pytestmark = pytest.mark.cache


@pytest.fixture
def misled(make_repo: Callable[..., type[Repo]], two_databases: tuple[str, str], proxy: Proxy) -> type[Repo]:
    """A repo whose network leads to the second database, where it asks for the first."""
    proxy.mislead(two_databases[1])
    return make_repo(two_databases[0], on=proxy, verify_database=True, application_name="misled")


WAYS: dict[str, Callable[[type[Repo]], Any]] = {
    "verb": lambda repo: repo.count(Tag),
    "write": lambda repo: repo.insert(Tag(label="lost")),
    "transaction": lambda repo: repo.transact(lambda: repo.count(Tag)),
    "session": lambda repo: repo.session().connection(),
    "engine": lambda repo: repo.engine().connect(),
    "connection": lambda repo: repo.connection().__enter__(),
    "stream": lambda repo: repo.stream(Tag).__enter__(),
    "transient": lambda repo: repo.ping(),
}


@pytest.mark.parametrize("way", WAYS)
def test_another_database_answers(misled: type[Repo], two_databases: tuple[str, str], server: Server, way: str) -> None:
    """However a connection is taken, it is closed after the one question, and nobody gets it."""
    expected, found = two_databases
    with count_statements(server, database=found) as counted, pytest.raises(WrongDatabaseError) as caught:
        WAYS[way](misled)
    assert caught.value.expected == misled.get_database().home
    assert caught.value.found == f"{misled.get_database().server}/{found}"
    assert f"asked for {caught.value.expected}, connected to database {found!r}" in str(caught.value)
    assert ["current_database()" in each.sql for each in counted.statements] == [True]
    await_connections(server, "misled", [])
    assert misled.stats().failed == 1
    assert books_balance(misled)


def test_it_works_again_at_once(misled: type[Repo], two_databases: tuple[str, str], proxy: Proxy) -> None:
    """However often it was wrong, the server does not count as down: the next connect is asked anew."""
    for _ in range(5):
        with pytest.raises(WrongDatabaseError):
            misled.count(Tag)
    with misled.using(two_databases[1]):
        assert misled.count(Tag) == 0
    proxy.mislead(None)
    assert misled.count(Tag) == 0
    assert misled.stats().idle == 2


def test_a_maintenance_connection_is_asked_too(misled: type[Repo], server: Server) -> None:
    """What makes and drops databases runs in the maintenance database, or not at all."""
    with pytest.raises(WrongDatabaseError):
        misled.create_database("never made")
    assert "never made" not in server.databases()


def test_off_by_default(
    make_repo: Callable[..., type[Repo]], two_databases: tuple[str, str], server: Server, proxy: Proxy
) -> None:
    """Nothing is asked then, and another database's rows are taken for those that were wanted."""
    plant_decoys(server, two_databases[1])
    proxy.mislead(two_databases[1])
    repo = make_repo(two_databases[0], on=proxy)
    repo.ping()  # SQLAlchemy asks a server five questions, once
    with count_statements(server, database=two_databases[1]) as counted:
        assert repo.count(Tag) == 9
    assert ["tags" in each.sql for each in counted.statements] == [True]


def test_one_question_per_connect(
    make_repo: Callable[..., type[Repo]], two_databases: tuple[str, str], server: Server
) -> None:
    """A connection that goes where it should is asked once, when it is new, and lent as if nothing had been asked."""
    repo = make_repo(two_databases[0], verify_database=True)
    repo.count(Tag)
    with repo.using(two_databases[1]), count_statements(server, database=two_databases[1]) as counted:
        for _ in range(3):
            repo.count(Tag)
        with repo.engine().connect() as connection:
            driver: Any = connection.connection.driver_connection
            assert (driver.prepare_threshold, driver.autocommit, driver.is_at_rest) == (5, False, True)
    assert ["current_database()" in each.sql for each in counted.statements] == [True, False, False, False]
    assert {each.prepared for each in counted.statements} == {None}


@pytest.mark.parametrize(
    ("encoding", "arguments"),
    [
        ("UTF8", {}),
        ("LATIN1", {}),
        ("LATIN1", {"client_encoding": "UTF8"}),
        ("SQL_ASCII", {"client_encoding": "UTF8"}),  # without it, nothing that SQLAlchemy asks is text
    ],
)
def test_a_name_is_compared_byte_by_byte(
    make_repo: Callable[..., type[Repo]], server: Server, encoding: str, arguments: dict[str, str]
) -> None:
    """A name means itself in a database of any encoding, whatever the client's is."""
    name = f"größe 'n\" {encoding} %s"
    quoted = name.replace('"', '""')
    run_sql(server, "postgres", f"CREATE DATABASE \"{quoted}\" ENCODING '{encoding}' TEMPLATE template0 LOCALE 'C'")
    try:
        repo = make_repo(name, verify_database=True, connect_args=arguments)
        assert repo.execute("SELECT 1").scalar_one() == 1
    finally:
        repo.disconnect_all()
        server.drop_database(name, force=True)


PROGRAM = """
import sys
from shardrepo import Repo
class MyRepo(Repo, config={"url": sys.argv[1], "verify_database": True, "script_location": "nowhere"}): pass
assert MyRepo.execute("SELECT 1").scalar_one() == 1
print("alembic" in sys.modules)
"""


def test_nobody_else_loads_alembic(server: Server) -> None:
    """A repo that requires no head connects without Alembic, wherever its migrations are."""
    url = server.url().render_as_string(hide_password=False)
    done = subprocess.run([sys.executable, "-c", PROGRAM, url], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("False", "")
