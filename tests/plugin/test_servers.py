"""Where the tests' servers come from, and what is said when there are none."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from shardrepo.testing.servers import Server, Servers

from ..conftest import run_sql
from .conftest import Project, url_of

pytestmark = pytest.mark.testing


def fails_with(result: pytest.RunResult, *lines: str) -> None:
    """The one test of a run has an error of a few lines, without a traceback."""
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*ERROR at setup of*", *lines])
    assert not re.search(r"Traceback|\.py:\d", result.stdout.str())


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A port where somebody answers who is no PostgreSQL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            with suppress(OSError):
                while True:
                    with listener.accept()[0] as client:
                        client.recv(100)
                        client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_embedded_servers(project: Project) -> None:
    """Without a URL as many servers are started as are asked for, and are gone at the end."""
    result = project.run(
        """
        def test_servers(shardrepo_servers, shardrepo_repo):
            assert len({server.port for server in shardrepo_servers}) == 2
            print("folder:", shardrepo_servers.directory)
            assert shardrepo_repo.get_database().server == f"127.0.0.1:{shardrepo_servers[0].port}"
        """,
        *("--shardrepo-servers=2", "-s"),
        given=False,
    )
    result.assert_outcomes(passed=1)
    (folder,) = (line.split()[-1] for line in result.stdout.lines if "folder:" in line)
    assert not Path(folder).exists()


@pytest.fixture
def maintenance(servers: Servers) -> Iterator[str]:
    """The URL of the third server, by way of a database of its own."""
    servers[2].create_database("maintenance")
    yield servers[2].url("maintenance").render_as_string(hide_password=False)
    servers[2].drop_database("maintenance")


def test_given_servers(project: Project, servers: Servers, maintenance: str) -> None:
    """Servers that are given are used in their order, by way of the databases in their URLs, and do what tests need."""
    result = project.run(
        f"""
        def test_servers(shardrepo_servers):
            one, other = shardrepo_servers
            assert [one.port, other.port] == {[servers[2].port, servers[0].port]}
            assert (one.host, one.username, one.password is None) == ("127.0.0.1", "shardrepo", False)
            assert [one.url().database, other.url().database, one.url("x").database] == ["maintenance", "postgres", "x"]
            one.create_database("plugin_one")
            with one.connect("plugin_one") as connection:
                connection.execute("CREATE TABLE kept (n int)")
            one.create_databases(["plugin_two"], template="plugin_one")
            with one.connect("plugin_two") as connection:
                connection.execute("SELECT n FROM kept")
            assert {{"plugin_one", "plugin_two"}} < set(one.databases())
            for name in ("plugin_one", "plugin_two"):
                one.drop_database(name)
            assert "plugin_one" not in one.databases()
        """,
        f"--shardrepo-url={maintenance} {url_of(servers[0])}",
        given=False,
    )
    result.assert_outcomes(passed=1)


USES = "def test_servers(shardrepo_servers): pass"


def test_nobody_answers(project: Project) -> None:
    """A server that cannot be reached is named, without its password, and so is where it was given."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    result = project.run(USES, f"--shardrepo-url=postgresql://u:hushhush@127.0.0.1:{port}", given=False)
    fails_with(result, f"*127.0.0.1:{port}*", "*--shardrepo-url, $SHARDREPO_URL or shardrepo_url")
    assert "hushhush" not in result.stdout.str()


def test_no_such_database(project: Project, server: Server) -> None:
    """A URL that names a database which is not there is an error that says so."""
    result = project.run(USES, f"--shardrepo-url={project.url.replace('/postgres', '/absent')}", given=False)
    fails_with(result, '*"absent" does not exist*--shardrepo-url*')


def test_no_postgresql(project: Project, mute_port: int) -> None:
    """Something else that listens there is told apart from a server."""
    result = project.run(USES, f"--shardrepo-url=postgresql://u:hushhush@127.0.0.1:{mute_port}", given=False)
    fails_with(result, f"*127.0.0.1:{mute_port}*--shardrepo-url*")
    assert "hushhush" not in result.stdout.str()


def test_wrong_credentials(project: Project, server: Server) -> None:
    """A server that refuses the user is named, and the user; the password is not."""
    url = server.url().set(password="hushhush").render_as_string(hide_password=False)
    result = project.run(USES, f"--shardrepo-url={url}", given=False)
    fails_with(result, "*password*shardrepo*--shardrepo-url*")
    assert "hushhush" not in result.stdout.str()


def test_a_user_who_may_not_create_databases(project: Project, server: Server) -> None:
    """A user without that right is refused before any test of theirs runs, with the statement that gives it."""
    run_sql(server, "postgres", "CREATE ROLE plain LOGIN PASSWORD 'hushhush'")
    try:
        url = server.url().set(username="plain", password="hushhush").render_as_string(hide_password=False)
        result = project.run(USES, f"--shardrepo-url={url}", given=False)
    finally:
        run_sql(server, "postgres", "DROP ROLE plain")
    fails_with(result, "*user plain may not create databases*ALTER ROLE*CREATEDB*")


def test_no_server_can_be_started(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no PostgreSQL is installed, the error says what to install, and how to give a running server instead."""
    monkeypatch.setenv("SHARDREPO_POSTGRES", os.devnull)
    result = project.run(USES, given=False)
    fails_with(result, "*no PostgreSQL found*shardrepo[[]embedded[]]*--shardrepo-url=*")


def test_a_server_may_be_behind_a_socket(project: Project, server: Server) -> None:
    """The URL of a server that listens in a folder survives as a text: it names the folder in its query."""
    from sqlalchemy import make_url

    from shardrepo.database import Database
    from shardrepo.testing.address import ServerAt

    there = ServerAt("/run/postgresql", 5433, "ada", None, parameters={"sslmode": "disable"})
    read = Database.from_url(make_url(there.url("app").render_as_string(hide_password=False)))
    assert (read.host, read.port, read.name, read.username) == ("/run/postgresql", 5433, "app", "ada")
    assert read.query == (("sslmode", "disable"),)
