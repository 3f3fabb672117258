"""Behind PgBouncer in transaction mode, where a connection's next transaction may run in another session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from psycopg.rows import dict_row
from sqlalchemy import select, text
from sqlalchemy.engine import URL

from shardrepo import DatabaseBehindError, Repo, WrongDatabaseError
from shardrepo.testing.servers import Server, Servers, count_statements

from ..conftest import TEMPLATE, books_balance, run_sql
from ..migrations import write_line
from ..models import Tag
from ..pgbouncer import MISSING, PROGRAM, start_pgbouncer

pytestmark = [pytest.mark.cache, pytest.mark.skipif(PROGRAM is None, reason=MISSING)]

THREADS = 6
DATABASES = 3
UNITS = 360

# Connections enough for each thread to have one to each database.
KEPT = THREADS * DATABASES


@pytest.fixture(scope="module")
def pooler(servers: Servers) -> Iterator[URL]:
    """The address of a PgBouncer in front of the first server, with one entry that leads to another database."""
    with start_pgbouncer(servers[0], servers.directory / "pgbouncer", {"misled": "lasting2"}) as url:
        yield url


@pytest.fixture
def make_pooled(make_repo: Callable[..., type[Repo]], pooler: URL) -> Callable[..., type[Repo]]:
    """Define a repo that reaches its databases through PgBouncer."""

    def make(database: str, **config: Any) -> type[Repo]:
        return make_repo(url=pooler.set(database=database), **{"pgbouncer": True, **config})

    return make


@pytest.fixture
def repo(make_pooled: Callable[..., type[Repo]], two_databases: tuple[str, str]) -> type[Repo]:
    return make_pooled(two_databases[0])


def by_verbs(repo: type[Repo], label: str) -> None:
    tag = repo.insert(Tag(label=label))
    for _ in range(8):  # more often than the driver lets a statement go unprepared
        assert repo.get_one(Tag, tag.id).label == label
    repo.update(tag, label=f"{label} kept")


def in_a_transaction(repo: type[Repo], label: str) -> None:
    with repo.transaction():
        repo.insert_all(Tag, [{"label": label}, {"label": f"{label} deleted"}])
        repo.delete(repo.get_by(Tag, label=f"{label} deleted"))
        with pytest.raises(ZeroDivisionError), repo.savepoint():
            repo.execute("UPDATE tags SET label = 'lost' WHERE label = :label", {"label": label})
            raise ZeroDivisionError
        repo.update(repo.one(select(Tag).where(Tag.label == label)), label=f"{label} kept")


def in_a_session(repo: type[Repo], label: str) -> None:
    with repo.session() as session:
        tag = Tag(label=label)
        session.add(tag)
        session.commit()
        tag.label += " kept"
        session.commit()
        assert session.scalars(select(Tag).where(Tag.label == f"{label} kept")).one() is tag


def rolled_back(repo: type[Repo], label: str) -> None:
    with pytest.raises(ZeroDivisionError), repo.transaction():
        repo.insert(Tag(label=label))
        raise ZeroDivisionError
    assert not repo.exists(select(Tag).where(Tag.label == label))
    repo.insert(Tag(label=f"{label} kept"))


WAYS = [by_verbs, in_a_transaction, in_a_session, rolled_back]


def work(repo: type[Repo], databases: list[str]) -> list[BaseException]:
    """Do all units of work, over all databases in every way; returns the errors that there were."""

    def unit(number: int) -> None:
        database = databases[number % len(databases)]
        with repo.using(database):
            WAYS[number // len(databases) % len(WAYS)](repo, f"{database} {number}")

    with ThreadPoolExecutor(THREADS) as executor:
        futures = [executor.submit(unit, number) for number in range(UNITS)]
    return [error for future in futures if (error := future.exception()) is not None]


def labels(server: Server, database: str) -> list[str]:
    return [label for (label,) in run_sql(server, database, "SELECT label FROM tags")]


@pytest.mark.parametrize("pool_size", [2, KEPT])
def test_many_threads_over_several_databases(
    make_pooled: Callable[..., type[Repo]], make_databases: Callable[..., list[str]], server: Server, pool_size: int
) -> None:
    """Each row is where it belongs, whether connections are made for every use or kept to meet all sessions."""
    databases = make_databases(DATABASES)
    repo = make_pooled(databases[0], pool_size=pool_size)
    assert work(repo, databases) == []
    for place, database in enumerate(databases):
        expected = {f"{database} {number} kept" for number in range(place, UNITS, len(databases))}
        assert sorted(labels(server, database)) == sorted(expected)
    assert books_balance(repo)


def test_the_same_without_the_setting(
    make_pooled: Callable[..., type[Repo]], make_databases: Callable[..., list[str]]
) -> None:
    """The load would show it: statements are then prepared in one session, and looked for in another."""
    databases = make_databases(DATABASES)
    errors = work(make_pooled(databases[0], pool_size=KEPT, pgbouncer=False), databases)
    assert any("prepared statement" in str(error) for error in errors)


def test_nothing_is_prepared_and_nothing_reset(repo: type[Repo], server: Server) -> None:
    """The server gets the borrowers' own statements and no other, unprepared however often they are repeated."""
    repo.execute("SELECT 0")
    with count_statements(server, database=repo.get_database().name) as counted:
        for _ in range(8):
            repo.execute("SELECT 1")
            repo.get(Tag, 1)
        with repo.session() as session:
            session.execute(text("SELECT 2"))
    sent = [one.sql.split(" \n")[0] for one in counted.statements]
    assert sent == [*["SELECT 1", "SELECT tags.id, tags.label"] * 8, "BEGIN", "SELECT 2", "ROLLBACK"]
    assert {one.prepared for one in counted.statements} == {None}


def test_an_open_transaction_is_rolled_back(repo: type[Repo], server: Server) -> None:
    """A transaction that a borrower leaves open is undone, and its connection kept."""
    raw = repo.engine().raw_connection()
    driver: Any = raw.driver_connection
    driver.execute("INSERT INTO tags (label) VALUES ('left')")
    raw.close()
    assert repo.stats().idle == 1
    assert repo.all(Tag) == []
    locks = "SELECT count(*) FROM pg_locks WHERE relation = 'tags'::regclass AND pid <> pg_backend_pid()"
    assert run_sql(server, repo.get_database().name, locks) == [(0,)]


@pytest.mark.parametrize(
    ("name", "value"), [("row_factory", dict_row), ("prepare_threshold", 0), ("autocommit", True), ("read_only", True)]
)
def test_what_was_set_on_the_drivers_connection(repo: type[Repo], name: str, value: object) -> None:
    """What a borrower set on the connection's own side is as it was for the next one."""
    raw = repo.engine().raw_connection()
    driver: Any = raw.driver_connection
    before = getattr(driver, name)
    setattr(driver, name, value)
    raw.close()
    with repo.engine().connect() as connection:
        assert connection.connection.driver_connection is driver
        assert getattr(driver, name) == before


def test_an_isolation_level_is_its_transactions(repo: type[Repo]) -> None:
    """SQLAlchemy's isolation levels hold for the transaction, and are not left in the session."""
    level = text("SHOW transaction_isolation")
    with repo.engine().connect().execution_options(isolation_level="SERIALIZABLE") as connection:
        assert connection.execute(level).scalar_one() == "serializable"
    with repo.transaction():
        assert repo.execute(level).scalar_one() == "read committed"


def test_each_connect_is_one_login(
    make_pooled: Callable[..., type[Repo]], two_databases: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """PgBouncer gives each login a salt of its own: no keys are kept, and no connect begins with stale ones."""
    traces: list[str] = []
    make = os.memfd_create

    def remember(name: str) -> int:
        traces.append(name)
        return make(name)

    monkeypatch.setattr(os, "memfd_create", remember)
    repo = make_pooled(two_databases[0], pool_size=1)
    for database in two_databases * 3:
        with repo.using(database):
            repo.count(Tag)
    assert repo.stats().attempts == 6
    assert traces == []


def test_servers_of_several_versions(repo: type[Repo]) -> None:
    """One address may lead to servers of several versions, such as PgBouncer's own console, and all are served."""
    for _ in range(2):
        assert repo.all(Tag) == []
        with repo.using("pgbouncer"):
            raw = repo.engine().raw_connection()
            driver: Any = raw.driver_connection
            driver.autocommit = True
            assert "PgBouncer" in driver.execute("SHOW VERSION").fetchone()[0]
            raw.close()


def test_a_database_that_is_made_and_dropped(repo: type[Repo]) -> None:
    """It is made, used and dropped through PgBouncer, whose own connections to it a drop has to force."""
    name = "pooled made"
    assert repo.create_database(name, template=TEMPLATE)
    with repo.using(name):
        assert repo.insert(Tag(label="a")).id == 1
    assert repo.database_exists(name)
    assert repo.drop_database(name, force=True)
    assert not repo.database_exists(name)


def test_an_entry_that_leads_to_another_database(make_pooled: Callable[..., type[Repo]], two_databases: Any) -> None:
    """`verify_database` finds it out before anybody gets the connection; without it, nobody does."""
    repo = make_pooled("misled", verify_database=True)
    for _ in range(2):
        with pytest.raises(WrongDatabaseError) as caught:
            repo.insert(Tag(label="lost"))
        assert caught.value.found == f"{repo.get_database().server}/{two_databases[1]}"
    assert (repo.stats().failed, books_balance(repo)) == (2, True)
    assert make_pooled("misled").count(Tag) == 0


def test_a_connection_that_is_asked(
    make_pooled: Callable[..., type[Repo]], database: str, server: Server, tmp_path: Path
) -> None:
    """Both questions are one statement, unprepared, and leave no transaction open; the answer may change."""
    location = write_line(tmp_path, "r1", "r2", "r3")
    repo = make_pooled(database, verify_database=True, require_head="raise", script_location=location)
    with pytest.raises(DatabaseBehindError):
        repo.count(Tag)
    run_sql(server, database, "CREATE TABLE alembic_version AS SELECT 'r3' AS version_num")
    repo.count(Tag)
    repo.disconnect()
    with count_statements(server, database=database) as counted:
        assert repo.count(Tag) == 0
    assert ["current_database()" in each.sql for each in counted.statements] == [True, False]
    assert {each.prepared for each in counted.statements} == {None}
