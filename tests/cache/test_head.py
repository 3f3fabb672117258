"""`require_head`: no new connection to a database that lacks more than one of the application's own revisions."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import text

from shardrepo import (
    ConfigError,
    ConnectError,
    DatabaseBehindError,
    Repo,
    ServerUnavailableError,
    WrongDatabaseError,
    event,
)
from shardrepo.testing.servers import Server, count_statements

from ..conftest import await_, await_connections, books_balance, run_sql
from ..migrations import write_line, write_script
from ..models import Tag
from ..proxy import Proxy

pytestmark = pytest.mark.cache

TABLE = "alembic_version"


@pytest.fixture
def location(tmp_path: Path) -> str:
    """Scripts of five revisions, one after the other."""
    return write_line(tmp_path / "migrations", "r1", "r2", "r3", "r4", "r5")


@pytest.fixture
def repo(make_repo: Callable[..., type[Repo]], database: str, location: str) -> type[Repo]:
    """A repo that refuses what is behind, on a database that has no revision."""
    return make_repo(database, require_head="raise", script_location=location, application_name="headed")


@pytest.fixture
def put_at(server: Server, database: str) -> Callable[..., None]:
    """Note that the database is at some revisions, as Alembic does."""

    def put(*revisions: str, table: str = TABLE) -> None:
        rows = "".join(f"; INSERT INTO {table} VALUES ('{revision}')" for revision in revisions)
        made = f"CREATE TABLE IF NOT EXISTS {table} (version_num varchar(32) PRIMARY KEY)"
        run_sql(server, database, f"{made}; DELETE FROM {table}{rows}")

    return put


def refused(repo: type[Repo]) -> DatabaseBehindError:
    with pytest.raises(DatabaseBehindError) as caught:
        repo.count(Tag)
    return caught.value


def test_a_database_that_is_behind(repo: type[Repo], put_at: Any, server: Server) -> None:
    """The connection is closed and nobody gets it; the error has the facts, and says what to do."""
    put_at("r2")
    error = refused(repo)
    database = repo.get_database()
    assert (error.database, error.found, error.heads, error.missing) == (database, ("r2",), ("r5",), 3)
    assert str(error) == (
        f"{database.home} is 3 revisions behind: it is at r2, and this application's migrations end in r5; run "
        f"`shardrepo upgrade head -d {database.name}`"
    )
    await_connections(server, "headed", [])
    assert (repo.stats().failed, repo.stats().idle, books_balance(repo)) == (1, 0, True)


WAYS: dict[str, Callable[[type[Repo]], Any]] = {
    "transaction": lambda repo: repo.transact(lambda: repo.count(Tag)),
    "session": lambda repo: repo.session().connection(),
    "engine": lambda repo: repo.engine().connect(),
    "raw": lambda repo: repo.engine().raw_connection(),
    "connection": lambda repo: repo.connection().__enter__(),
    "stream": lambda repo: repo.stream(Tag).__enter__(),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_a_connection(repo: type[Repo], way: str) -> None:
    """Whatever the application takes a connection for, it is refused."""
    with pytest.raises(DatabaseBehindError):
        WAYS[way](repo)
    assert repo.stats().in_use == 0


@pytest.mark.parametrize("found", [("r5",), ("r4",), ("r6",), ("r5", "other"), ("r1", "other")])
def test_a_database_that_is_far_enough(repo: type[Repo], put_at: Any, found: tuple[str, ...]) -> None:
    """At head, one behind it, or at a revision that these scripts do not have and which is newer, it is used."""
    put_at(*found)
    assert repo.count(Tag) == 0


@pytest.mark.parametrize("found", [("r3",), ("r1",), ()])
def test_a_database_that_is_too_far_behind(repo: type[Repo], put_at: Any, found: tuple[str, ...]) -> None:
    """Two behind is too many, and so is no revision in a table that is there."""
    put_at(*found)
    assert refused(repo).found == found


def test_a_database_without_a_version_table(repo: type[Repo]) -> None:
    """It lacks all revisions; that is no error of the server's."""
    error = refused(repo)
    assert (error.found, error.missing) == ((), 5)
    assert "it is at no revision" in str(error)


def test_the_next_connect_asks_again(repo: type[Repo], put_at: Any) -> None:
    """However often it was refused, its server does not count as down, and it works once it is migrated."""
    for _ in range(5):
        refused(repo)
    put_at("r5")
    assert repo.count(Tag) == 0
    assert (repo.stats().idle, books_balance(repo)) == (1, True)


def test_a_connection_that_is_open_is_not_asked(repo: type[Repo], put_at: Any) -> None:
    """A database that falls behind keeps its connections; the next new one is refused."""
    put_at("r5")
    repo.count(Tag)
    put_at("r1")
    assert repo.count(Tag) == 0
    repo.disconnect()
    refused(repo)


def test_a_refusal_is_an_answer(
    make_repo: Callable[..., type[Repo]], two_databases: tuple[str, str], location: str, server: Server, proxy: Proxy
) -> None:
    """A server that was down is back when one of its databases turns out to be behind."""
    behind, head = two_databases
    repo = make_repo(None, on=proxy, require_head="raise", script_location=location, version_table="versions")
    run_sql(server, head, "CREATE TABLE versions AS SELECT 'r5' AS version_num")
    try:
        proxy.cut()
        with repo.using(behind), pytest.raises(ServerUnavailableError):
            repo.count(Tag)
        proxy.restore()
        await_(lambda: kind_of_failure(repo, behind) is DatabaseBehindError)
        with repo.using(head):
            assert repo.count(Tag) == 0
    finally:
        run_sql(server, head, "DROP TABLE versions")


def kind_of_failure(repo: type[Repo], database: str) -> type[Exception]:
    with repo.using(database), pytest.raises((DatabaseBehindError, ServerUnavailableError)) as caught:
        repo.count(Tag)
    return caught.type


def test_a_warning(
    make_repo: Callable[..., type[Repo]], database: str, location: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each new connection to a database that is behind is logged, and used as if nothing had been asked."""
    repo = make_repo(database, require_head="warn", script_location=location)
    with caplog.at_level(logging.WARNING, "shardrepo"), repo.call_options(tags={"job": "nightly"}):
        assert repo.insert(Tag(label="a")).id == 1
        repo.count(Tag)
        repo.disconnect()
        with repo.transaction():
            assert repo.count(Tag) == 1
    assert [record.name for record in caplog.records] == ["shardrepo.checks"] * 2
    for record in caplog.records:
        assert (vars(record)["database"], vars(record)["tags"]) == (database, {"job": "nightly"})
        assert "is 5 revisions behind" in record.message


def test_no_warning_at_head(
    make_repo: Callable[..., type[Repo]], database: str, location: str, put_at: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor one behind it."""
    put_at("r4")
    make_repo(database, require_head="warn", script_location=location).count(Tag)
    assert caplog.records == []


def test_what_maintains_and_migrates_is_not_asked(repo: type[Repo]) -> None:
    """A connection of its own for one question gets to a database that is behind."""
    assert repo.ping() > 0
    assert not repo.database_exists("nowhere")


@pytest.mark.parametrize("table", ["audit.versions", '"Audit"."ver""sions %s"', '"Versions"'])
def test_the_version_table(
    make_repo: Callable[..., type[Repo]], database: str, location: str, server: Server, put_at: Any, table: str
) -> None:
    """It may be in a schema, and both may have any name."""
    run_sql(server, database, 'CREATE SCHEMA audit; CREATE SCHEMA "Audit"')
    given = table.replace('""', "\0").replace('"', "").replace("\0", '"')
    repo = make_repo(database, require_head="raise", script_location=location, version_table=given)
    refused(repo)
    put_at("r5", table=table)
    assert repo.count(Tag) == 0


def test_several_heads(make_repo: Callable[..., type[Repo]], database: str, put_at: Any, tmp_path: Path) -> None:
    """A database has to be near the end of each branch; what takes it there is named."""
    for revision, *down in (["r1"], ["a2", "r1"], ["a3", "a2"], ["b2", "r1"], ["b3", "b2"]):
        write_script(tmp_path, revision, *down)
    repo = make_repo(database, require_head="raise", script_location=str(tmp_path))
    put_at("a3")
    error = refused(repo)
    assert (error.found, error.heads, error.missing) == (("a3",), ("a3", "b3"), 2)
    assert "shardrepo upgrade heads -d" in str(error)
    put_at("a3", "b2")
    assert repo.count(Tag) == 0


@pytest.mark.parametrize("table", [TABLE, "no.such"])
def test_one_statement_for_both_checks(
    make_repo: Callable[..., type[Repo]], database: str, location: str, server: Server, put_at: Any, table: str
) -> None:
    """A new connection is asked once, whether there is a version table or not, and lent as if nothing had been."""
    put_at("r5")
    repo = make_repo(database, verify_database=True, require_head="warn", script_location=location, version_table=table)
    repo.count(Tag)
    repo.disconnect()
    with count_statements(server, database=database) as counted:
        repo.count(Tag)
        with repo.engine().connect() as connection:
            driver: Any = connection.connection.driver_connection
            assert (driver.prepare_threshold, driver.autocommit, driver.is_at_rest) == (5, False, True)
            changed = connection.execute(text("SELECT name FROM pg_settings WHERE source = 'session'")).scalars()
            assert list(changed) == []
            assert connection.scalar(text("SELECT count(*) FROM pg_prepared_statements")) == 0
    assert ["current_database()" in each.sql for each in counted.statements][:2] == [True, False]
    assert sum("current_database()" in each.sql for each in counted.statements) == 1


def test_the_name_counts_first(
    make_repo: Callable[..., type[Repo]], two_databases: tuple[str, str], location: str, proxy: Proxy
) -> None:
    """Another database's revision is of no interest."""
    proxy.mislead(two_databases[1])
    repo = make_repo(two_databases[0], on=proxy, verify_database=True, require_head="raise", script_location=location)
    with pytest.raises(WrongDatabaseError):
        repo.count(Tag)


def test_who_listens_is_told(repo: type[Repo]) -> None:
    """A refused connection is a connect that failed, and says why."""
    told: list[event.Event] = []
    event.listen(repo, "connect", told.append)
    error = refused(repo)
    assert [each.error for each in told] == [error]


# Servers that do not answer


@contextmanager
def locked(server: Server, database: str) -> Iterator[None]:
    """Keep everybody else from the version table."""
    with server.connect(database) as connection, connection.transaction():
        connection.execute(f"LOCK TABLE {TABLE}")
        yield


@pytest.fixture
def impatient(make_repo: Callable[..., type[Repo]], database: str, location: str, put_at: Any) -> type[Repo]:
    put_at("r5")
    return make_repo(
        database, require_head="raise", script_location=location, connect_timeout=0.2, application_name="impatient"
    )


def test_a_connect_ends_in_time(impatient: type[Repo], server: Server, database: str) -> None:
    """A version table that is locked takes no more than the connect's time, and does not make its server down."""
    with locked(server, database):
        for _ in range(5):
            with pytest.raises(ConnectError, match=r"no answer within connect_timeout=0\.2 s") as caught:
                impatient.count(Tag)
            assert type(caught.value) is ConnectError
        assert impatient.ping() > 0
    assert impatient.count(Tag) == 0
    await_connections(server, "impatient", [database])
    assert books_balance(impatient)


def test_a_call_ends_in_time(impatient: type[Repo], server: Server, database: str) -> None:
    """A call's own timeout is for the question too."""
    with locked(server, database), impatient.call_options(timeout=0.1):
        with pytest.raises(ServerUnavailableError, match="no answer within the call's own timeout") as caught:
            impatient.count(Tag)
    assert caught.value.reason == "deadline"
    assert impatient.count(Tag) == 0


def test_a_table_that_may_not_be_read(
    make_repo: Callable[..., type[Repo]], server: Server, database: str, location: str, put_at: Any
) -> None:
    """The error has the server's own reason, and who connects is not told that the database is behind."""
    put_at("r5")
    role = f"reader of {database}"
    run_sql(server, database, f"CREATE ROLE \"{role}\" LOGIN PASSWORD 'x'")
    try:
        repo = make_repo(None, require_head="raise", script_location=location)
        with repo.using(database=database, username=role, password="x"):
            with pytest.raises(ConnectError, match="permission denied for table alembic_version") as caught:
                repo.count(Tag)
            assert isinstance(caught.value.orig, InsufficientPrivilege)
            assert caught.value.sqlstate == "42501"
            run_sql(server, database, f'GRANT SELECT ON {TABLE} TO "{role}"')
            assert repo.execute("SELECT 1").scalar_one() == 1
        repo.disconnect_all()
    finally:
        run_sql(server, database, f'DROP OWNED BY "{role}"; DROP ROLE "{role}"')


# The application's own scripts


def test_scripts_that_cannot_be_loaded(repo: type[Repo], location: str, put_at: Any) -> None:
    """The first connect says which, before it is begun; once they can, it works."""
    put_at("r5")
    script = write_script(Path(location), "r6", "r5", body="import nothing_of_the_kind")
    for _ in range(2):
        with pytest.raises(ConfigError, match="nothing_of_the_kind"):
            repo.count(Tag)
    assert (repo.stats().failed, repo.stats().in_use) == (2, 0)
    script.unlink()
    assert repo.count(Tag) == 0


def test_scripts_are_loaded_once(
    make_repo: Callable[..., type[Repo]], make_databases: Callable[..., list[str]], tmp_path: Path
) -> None:
    """By the first of many connects at once, for all databases of all repos that have the same ones."""
    loaded = tmp_path / "loaded"
    write_script(tmp_path / "scripts", "r1", body=f"with open({str(loaded)!r}, 'a') as file: file.write('x')")
    databases = make_databases(4)
    repos = [make_repo(None, require_head="raise", script_location=str(tmp_path / "scripts")) for _ in range(2)]
    barrier = threading.Barrier(8, timeout=30)

    def visit(number: int) -> int:
        barrier.wait()
        with repos[number % 2].using(databases[number // 2]):
            return repos[number % 2].count(Tag)

    with ThreadPoolExecutor(8) as executor:
        assert list(executor.map(visit, range(8))) == [0] * 8
    assert loaded.read_text() == "x"
