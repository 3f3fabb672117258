"""A sandbox: every database is at its end as it was at its beginning, and what runs in it cannot tell."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import pytest
from sqlalchemy import delete, select, text
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError, ProgrammingError

from shardrepo import (
    AuthenticationError,
    ConfigError,
    ConstraintError,
    Database,
    Repo,
    RepoDisposedError,
    SandboxError,
    TransactionDoomedError,
    fleet,
)
from shardrepo.testing.servers import Server, Servers

from ..conftest import TEMPLATE, await_, await_connections, books_balance, connections_of, contents, run_sql
from ..models import Post, Tag, User

pytestmark = pytest.mark.testing

Make = Callable[..., type[Repo]]


@pytest.fixture(scope="module")
def twenty(server: Server) -> Iterator[list[str]]:
    """Twenty databases that no test leaves anything in."""
    names = [f"boxed{number:02d}" for number in range(20)]
    server.create_databases(names, template=TEMPLATE)
    yield names
    for name in names:
        assert contents(server, name) == []
        server.drop_database(name, force=True)


@pytest.fixture
def names(twenty: list[str]) -> tuple[str, str]:
    """Two of them."""
    return twenty[0], twenty[1]


@pytest.fixture
def repo(make_repo: Make, names: tuple[str, str]) -> type[Repo]:
    """A repo on the first of them."""
    return make_repo(names[0])


def name_of(repo: type[Repo]) -> str:
    """How its connections are called."""
    return repo._router.databases.config.application_name


def states_of(server: Server, repo: type[Repo]) -> list[tuple[str, str]]:
    """What the server says of a repo's connections: their databases, and what they are doing."""
    asked = "SELECT datname, state FROM pg_stat_activity WHERE application_name = %s ORDER BY 1"
    return run_sql(server, "postgres", asked, (name_of(repo),))


# Everything is undone


def test_every_database_is_as_it_was(repo: type[Repo], names: tuple[str, str], server: Server) -> None:
    """What is written to several databases is seen there until the end, and by nobody else."""
    with repo.sandbox() as sandbox:
        repo.insert(Tag(label="here"))
        with repo.using(names[1]):
            repo.insert_all(Tag, [{"label": "there"}, {"label": "too"}])
            assert repo.count(Tag) == 2
        assert repo.count(Tag) == 1
        assert [database.name for database in sandbox.databases] == list(names)
        assert [contents(server, name) for name in names] == [[], []]
        assert states_of(server, repo) == [(name, "idle in transaction") for name in names]
    assert [contents(server, name) for name in names] == [[], []]
    assert states_of(server, repo) == [(name, "idle") for name in names]
    assert repo.count(Tag) == 0


def test_nothing_connects_before_it_is_used(repo: type[Repo], server: Server) -> None:
    """A sandbox that nothing is done in takes no connection, and a choice is none either."""
    with repo.sandbox() as sandbox, repo.using("wherever"):
        assert sandbox.databases == []
        assert repo.stats().attempts == 0
    assert connections_of(server, name_of(repo)) == []


def test_a_cached_connection_is_taken(repo: type[Repo], names: tuple[str, str], server: Server) -> None:
    """And goes back to the cache, as good as it was."""
    repo.count(Tag)
    before = await_connections(server, name_of(repo), [names[0]])
    for _ in range(3):
        with repo.sandbox():
            repo.insert(Tag(label="once"))
    assert await_connections(server, name_of(repo), [names[0]]) == before
    assert books_balance(repo)


def test_a_schema_is_as_it_was(repo: type[Repo]) -> None:
    """Tables too: PostgreSQL's DDL is part of a transaction."""
    with repo.sandbox():
        repo.execute("CREATE TABLE made (id int); ALTER TABLE tags ADD COLUMN colour text; DROP TABLE notes")
        assert repo.execute("SELECT colour FROM tags").all() == []
    assert repo.execute("SELECT to_regclass('made'), to_regclass('notes')").one() == (None, "notes")
    with pytest.raises(ProgrammingError, match="colour"):
        repo.execute("SELECT colour FROM tags")


def test_an_error_of_the_test_passes(repo: type[Repo]) -> None:
    """Whatever the block raises is raised, and everything is undone."""
    with pytest.raises(ZeroDivisionError), repo.sandbox():
        repo.insert(Tag(label="lost"))
        1 / 0  # noqa: B018
    assert repo.count(Tag) == 0
    assert repo.stats().in_use == 0


# What runs in it cannot tell


def test_a_transaction(repo: type[Repo]) -> None:
    """It is kept at its end and undone by an error, and there is none at the top."""
    with repo.sandbox():
        assert not repo.in_transaction()
        with repo.transaction():
            repo.insert(Tag(label="kept"))
            assert repo.in_transaction()
            with pytest.raises(ZeroDivisionError), repo.savepoint():
                repo.insert(Tag(label="lost"))
                1 / 0  # noqa: B018
        with pytest.raises(ZeroDivisionError), repo.transaction():
            repo.insert(Tag(label="lost too"))
            1 / 0  # noqa: B018
        assert not repo.in_transaction()
        assert repo.all(select(Tag.label)) == ["kept"]


def test_a_failure_dooms_a_transaction(repo: type[Repo]) -> None:
    """As it does without a sandbox; what had been written before it stays."""
    with repo.sandbox():
        repo.insert(Tag(id=1_000_000, label="before"))
        with pytest.raises(TransactionDoomedError), repo.transaction():
            repo.insert(Tag(label="lost"))
            with pytest.raises(ConstraintError):
                repo.insert(Tag(id=1_000_000, label="again"))
            repo.count(Tag)
        assert repo.all(select(Tag.label)) == ["before"]


@pytest.mark.parametrize("way", ["a verb", "execute", "a session", "an engine", "a connection"])
def test_a_failing_statement_spoils_nothing(repo: type[Repo], way: str) -> None:
    """Whatever way it is sent, the next one runs, and what had been written is there."""
    wrong = text("SELECT nothing FROM tags")
    with repo.sandbox():
        repo.insert(Tag(id=1_000_000, label="before"))
        with pytest.raises(DBAPIError):
            match way:
                case "a verb":
                    repo.insert(Tag(id=1_000_000, label="again"))
                case "execute":
                    repo.execute(wrong)
                case "a session":
                    with repo.session() as session:
                        session.execute(wrong)
                case "an engine":
                    with repo.engine().connect() as connection:
                        connection.execute(wrong)
                case "a connection":
                    with repo.connection() as connection:
                        with pytest.raises(DBAPIError):
                            connection.execute(wrong)
                        connection.execute(text("INSERT INTO tags (label) VALUES ('in the block')"))
                        connection.execute(wrong)
        found = repo.all(select(Tag.label).order_by(Tag.label))
        assert found == (["before", "in the block"] if way == "a connection" else ["before"])


def test_a_session(repo: type[Repo]) -> None:
    """It commits and rolls back as any other does."""
    with repo.sandbox():
        with repo.session() as session:
            session.add(Tag(label="kept"))
            session.commit()
            session.add(Tag(label="lost"))
            session.flush()
            session.rollback()
            with session.begin_nested():
                session.add(Tag(label="nested"))
            session.commit()
            session.add(Tag(label="never committed"))
            session.flush()
        assert repo.all(select(Tag.label).order_by(Tag.id)) == ["kept", "nested"]


def test_a_session_that_only_reads(repo: type[Repo]) -> None:
    """What verbs write while it is open is there after it was closed: to a database they are strangers."""
    with repo.sandbox():
        with repo.session() as session:
            assert session.scalars(select(Tag)).all() == []
            repo.insert(Tag(label="meanwhile"))
        assert repo.count(Tag) == 1


def test_a_session_in_the_sandbox_of_an_older_engine(repo: type[Repo], server: Server, names: tuple[str, str]) -> None:
    """An engine that was taken before the sandbox began leads into it, too."""
    engine = repo.engine()
    with engine.connect() as connection:
        connection.execute(text("SELECT 1"))
    with repo.sandbox():
        with engine.begin() as connection:
            connection.execute(text("INSERT INTO tags (label) VALUES ('boxed')"))
        assert repo.count(Tag) == 1
        assert contents(server, names[0]) == []
    assert repo.count(Tag) == 0


@pytest.mark.parametrize(
    "read", ["WITH one AS (SELECT 1) SELECT * FROM one", "/* why */ SELECT 1", "(SELECT 1) UNION (SELECT 2)"]
)
def test_a_session_that_only_reads_otherwise(repo: type[Repo], read: str) -> None:
    """However it says that, it takes nothing along."""
    with repo.sandbox():
        with repo.session() as session:
            session.execute(text(read))
            repo.insert(Tag(label="meanwhile"))
        assert repo.count(Tag) == 1


def test_a_stream(repo: type[Repo]) -> None:
    """Rows are written while they are streamed, which a stream that only reads neither refuses nor undoes."""
    with repo.sandbox():
        repo.insert_all(Tag, [{"label": f"tag {number}"} for number in range(30)])
        with repo.stream(select(Tag).order_by(Tag.id), batch=7) as tags:
            for tag in tags:
                repo.update(tag, label=tag.label.upper())
                repo.execute("SET search_path TO public")
        assert repo.count(select(Tag).where(Tag.label.like("TAG%"))) == 30


def test_many_databases(repo: type[Repo], names: tuple[str, str]) -> None:
    """`across` visits the sandbox's, from its own threads."""
    with repo.sandbox():
        for name in names:
            with repo.using(name):
                repo.insert(Tag(label=name))
        assert repo.across(names).all(select(Tag.label)).collect() == {name: [name] for name in names}
        repo.across(names).execute(delete(Tag)).collect()
        assert repo.across(names).count(Tag).collect() == dict.fromkeys(names, 0)


def test_rows_by_copy_and_in_batches(repo: type[Repo]) -> None:
    """The protocol's other ways of sending rows are undone, too."""
    with repo.sandbox():
        repo.insert_all(Tag, ({"label": str(number)} for number in range(10)), via="copy")
        repo.execute("INSERT INTO tags (label) VALUES (:label)", [{"label": "a"}, {"label": "b"}])
        with repo.connection() as connection:
            connection.execute(text("INSERT INTO tags (label) VALUES (:label)"), [{"label": "c"}, {"label": "d"}])
        assert repo.count(Tag) == 14
        with pytest.raises(ConstraintError):
            repo.execute("INSERT INTO tags (id, label) VALUES (:id, 'x')", [{"id": 100}, {"id": 100}])
        assert repo.count(Tag) == 14
    assert repo.count(Tag) == 0


def test_a_transaction_that_only_reads(repo: type[Repo]) -> None:
    """The server refuses what it writes, with savepoints and without; others may write."""
    with repo.sandbox():
        with pytest.raises(InternalError, match="read-only"), repo.transaction(read_only=True):
            with repo.savepoint():
                assert repo.count(Tag) == 0
            with repo.detached():
                repo.insert(Tag(label="on its own"))
            repo.insert(Tag(label="refused"))
        assert repo.all(select(Tag.label)) == ["on its own"]


def test_a_timeout_is_not_the_end_of_it(repo: type[Repo]) -> None:
    """The server stops what takes too long, and what the test has written is there."""
    with repo.sandbox():
        repo.insert(Tag(label="kept"))
        with pytest.raises(OperationalError), repo.call_options(timeout=0.1):
            repo.execute("SELECT pg_sleep(30)")
        with pytest.raises(OperationalError), repo.transaction(timeout=0.1):
            repo.insert(Tag(label="lost"))
            repo.execute("SELECT pg_sleep(30)")
        assert repo.all(select(Tag.label)) == ["kept"]


def test_what_a_borrower_leaves_behind(repo: type[Repo]) -> None:
    """Settings, temporary tables and locks of a session end with it, as they do without a sandbox."""
    with repo.sandbox():
        repo.execute("SET statement_timeout = 77; CREATE TEMP TABLE kept (id int); SELECT pg_advisory_lock(7)")
        assert repo.execute("SHOW statement_timeout").scalar_one() == "0"
        assert repo.execute("SELECT to_regclass('kept')").scalar_one() is None
        assert repo.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").scalar_one() == 0


def test_isolation_levels_are_taken_and_change_nothing(repo: type[Repo]) -> None:
    """A transaction may ask for one; SQLAlchemy's AUTOCOMMIT is each statement by itself."""
    with repo.sandbox():
        with repo.transaction(isolation="serializable"):
            repo.insert(Tag(label="serial"))
        with repo.engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("INSERT INTO tags (label) VALUES ('by itself')"))
        assert repo.all(select(Tag.label).order_by(Tag.id)) == ["serial", "by itself"]


def test_the_drivers_own_transactions(repo: type[Repo]) -> None:
    """psycopg's blocks nest in it, whichever mode the connection is in."""
    with repo.sandbox(), repo.engine().connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        for mode in (True, False):
            driver.autocommit = mode
            with driver.transaction():
                driver.execute(b"INSERT INTO tags (label) VALUES (%s)", (f"kept {mode}",))
                with pytest.raises(ZeroDivisionError), driver.transaction():
                    driver.execute(b"INSERT INTO tags (label) VALUES ('lost')")
                    1 / 0  # noqa: B018
            driver.commit()
        assert driver.execute(b"SELECT label FROM tags").fetchall() == [("kept True",), ("kept False",)]


# Deferred constraints


DEFERRED = "ALTER TABLE posts ALTER CONSTRAINT posts_author_id_fkey DEFERRABLE INITIALLY DEFERRED"


@pytest.mark.parametrize("way", ["a transaction", "a statement", "a session"])
def test_deferred_constraints_are_checked_where_a_commit_would_be(repo: type[Repo], way: str) -> None:
    """What violates one is undone with its transaction, as it would be; checks are deferred in the next one again."""
    orphan = text("INSERT INTO posts (title, author_id) VALUES ('orphan', 1)")
    with repo.sandbox(check_deferred=True):
        repo.execute(DEFERRED)
        with pytest.raises(ConstraintError) as caught:
            if way == "a statement":
                repo.execute(orphan)
            elif way == "a transaction":
                with repo.transaction():
                    repo.execute(orphan)
            else:
                with repo.session() as session:
                    session.execute(orphan)
                    session.commit()
        assert caught.value.kind == "foreign_key"
        assert repo.count(Post) == 0
        with repo.transaction():
            repo.execute(orphan)
            repo.insert(User(id=1, name="late"))
        assert repo.count(Post) == 1


def test_deferred_constraints_wait_for_ever_else(repo: type[Repo]) -> None:
    """Without being asked to, a sandbox does not check them: it commits nothing."""
    with repo.sandbox():
        repo.execute(DEFERRED)
        repo.execute("INSERT INTO posts (title, author_id) VALUES ('orphan', 1)")
        assert repo.count(Post) == 1


# What it cannot undo


@pytest.mark.parametrize("ending", ["COMMIT", "ROLLBACK"])
def test_a_transaction_that_is_ended_by_hand(repo: type[Repo], names: tuple[str, str], ending: str) -> None:
    """It is reported at the end, with the database and the line; what follows it is undone all the same."""
    with pytest.raises(SandboxError, match="ended by hand") as caught, repo.sandbox():
        with repo.using(names[1]):
            repo.execute(ending)
            repo.insert(Tag(label="after it"))
            with repo.transaction():
                repo.insert(Tag(label="in a transaction"))
                repo.execute(ending)
                repo.insert(Tag(label="still in it"))
            assert repo.count(Tag) > 0
    assert names[1] in str(caught.value)
    assert Path(__file__).name in str(caught.value)
    with repo.using(names[1]):
        left = repo.all(select(Tag.label).order_by(Tag.id))
        repo.delete_all(Tag)
    assert left == (["after it", "in a transaction"] if ending == "COMMIT" else [])


def test_what_is_undone_with_another(repo: type[Repo]) -> None:
    """What a detached unit of work has kept goes with the transaction around it, which is reported."""
    with pytest.raises(SandboxError, match="was undone when another one") as caught, repo.sandbox():
        with pytest.raises(ZeroDivisionError), repo.transaction():
            repo.insert(Tag(label="lost"))
            with repo.detached():
                repo.insert(Tag(label="audited"))
            1 / 0  # noqa: B018
    assert repo.get_database().home in str(caught.value)


def test_what_an_older_one_has_written_since(repo: type[Repo]) -> None:
    """Goes with a newer one that is rolled back: that is reported if it is committed, with the line, and only then."""
    for keeps in (True, False):
        with pytest.raises(SandboxError, match="was undone when") if keeps else nullcontext() as caught, repo.sandbox():
            with repo.session() as older, repo.session() as newer:
                older.execute(text("SELECT 1"))
                newer.add(Tag(label="newer"))
                newer.flush()
                older.add(Tag(label="older"))
                older.flush()
                newer.rollback()
                if keeps:
                    older.commit()
        if keeps:
            assert f"{Path(__file__).name}:" in str(caught.value)  # type: ignore[union-attr]


def test_savepoints_of_several(repo: type[Repo]) -> None:
    """Each one's are its own, though all are called alike, and end in whatever order."""
    with repo.sandbox(), repo.session() as one, repo.session() as other:
        one.add(Tag(label="one"))
        one.flush()
        ones = one.begin_nested()
        one.add(Tag(label="lost"))
        one.flush()
        others = other.begin_nested()
        other.execute(text("SELECT 1"))
        ones.rollback()
        other.add(Tag(label="other"))
        others.commit()
        with pytest.raises(ZeroDivisionError), one.begin_nested(), other.begin_nested():
            other.add(Tag(label="lost, too"))
            other.flush()
            1 / 0  # noqa: B018
        other.commit()
        one.commit()
        assert repo.all(select(Tag.label).order_by(Tag.id)) == ["one", "other"]


def test_what_is_kept_in_a_savepoint_of_another(repo: type[Repo]) -> None:
    """It outlives that one, if nothing else was done in it; else that is reported, as with a transaction."""
    for label in ("", "lost"):
        with pytest.raises(SandboxError, match="was undone when") if label else nullcontext(), repo.sandbox():
            with repo.transaction():
                repo.insert(Tag(label="one"))
                with pytest.raises(ZeroDivisionError), repo.savepoint():
                    if label:
                        repo.insert(Tag(label=label))
                    with repo.detached():
                        repo.insert(Tag(label="audited"))
                    1 / 0  # noqa: B018
            assert repo.all(select(Tag.label).order_by(Tag.id)) == (["one"] if label else ["one", "audited"])


def test_a_connection_that_is_still_in_use(repo: type[Repo], names: tuple[str, str], server: Server) -> None:
    """It is reported with the line that took it, closed, and of no use to anybody any more."""
    with pytest.raises(SandboxError, match="still in use") as caught, repo.sandbox():
        session = repo.session()
        session.add(Tag(label="never"))
        session.flush()
    assert f"{Path(__file__).name}:" in str(caught.value)
    with pytest.raises(DBAPIError):
        session.execute(text("SELECT 1"))
    session.close()
    await_connections(server, name_of(repo), [])
    assert repo.stats().in_use == 0
    assert books_balance(repo)


def test_an_error_of_the_test_comes_first(repo: type[Repo]) -> None:
    """What could not be undone is a note of it."""
    with pytest.raises(ZeroDivisionError) as caught, repo.sandbox():
        repo.execute("COMMIT")
        1 / 0  # noqa: B018
    assert "ended by hand" in caught.value.__notes__[0]


def test_a_session_that_nobody_has_any_more(repo: type[Repo]) -> None:
    """It blocks nobody, and what it had not committed is undone."""
    with repo.sandbox():
        session = repo.session()
        session.add(Tag(label="never"))
        session.flush()
        del session
        gc.collect()
        assert repo.count(Tag) == 0


def test_a_connection_that_is_lost(repo: type[Repo], server: Server, names: tuple[str, str]) -> None:
    """Nothing takes its place in silence: what the test had written is gone."""
    with pytest.raises(SandboxError, match="its connection was lost"), repo.sandbox():
        repo.insert(Tag(label="gone"))
        ((pid, _),) = connections_of(server, name_of(repo))
        run_sql(server, "postgres", f"SELECT pg_terminate_backend({pid}, 5000)")
        with pytest.raises(DBAPIError):
            repo.count(Tag)
        with pytest.raises(SandboxError, match="was lost"):
            repo.count(Tag)
    assert repo.count(Tag) == 0
    assert books_balance(repo)


# What is left alone


def test_unboxed(repo: type[Repo], names: tuple[str, str], server: Server) -> None:
    """In the block a database is used as if there were no sandbox: what it writes stays, whatever is rolled back."""
    with repo.sandbox() as sandbox:
        with pytest.raises(DBAPIError, match="VACUUM") as caught:
            repo.execute("VACUUM tags")
        assert "unboxed" in caught.value.orig.__notes__[0]  # type: ignore[union-attr]
        with sandbox.unboxed(names[1]):
            repo.execute("VACUUM tags")
            with repo.transaction():
                repo.insert(Tag(id=1_000_000, label="stays"))
            assert [row[0] for row in contents(server, names[1])] == ["tags"]
            with repo.using(names[0]):
                repo.insert(Tag(label="undone"))
        with repo.using(names[1]):
            assert repo.delete_all(Tag).count == 1
    with repo.using(names[1]):
        assert repo.delete_all(Tag).count == 1
    assert repo.count(Tag) == 0


def test_unboxed_in_a_transaction(repo: type[Repo], names: tuple[str, str], server: Server) -> None:
    """It is outside of the one that is open; without a database it is the current one."""
    with repo.sandbox() as sandbox, repo.transaction():
        repo.insert(Tag(id=1_000_000, label="undone"))
        with sandbox.unboxed():
            assert not repo.in_transaction()
            assert repo.count(Tag) == 0
        assert repo.count(Tag) == 1


def test_databases_are_made_and_dropped_outside(repo: type[Repo], server: Server) -> None:
    """In a sandbox that is refused, before anything is sent; in an unboxed block it is done."""
    with repo.sandbox() as sandbox:
        with pytest.raises(SandboxError, match=r"create_database.*unboxed"):
            repo.create_database("unboxed_made")
        with pytest.raises(SandboxError, match=r"drop_database.*unboxed"):
            repo.drop_database("unboxed_made")
        with pytest.raises(SandboxError, match=r"rename_database.*unboxed"):
            repo.rename_database("unboxed_made", "else")
        assert repo.database_exists("unboxed_made") is False
        with sandbox.unboxed("unboxed_made"):
            assert repo.create_database("unboxed_made")
            assert repo.drop_database("unboxed_made")
    assert "unboxed_made" not in server.databases()


def test_a_fleet_is_migrated_outside(repo: type[Repo], tmp_path: Path) -> None:
    """Its workers are processes, of which no sandbox knows: they are not started, nor for a run that is taken up."""
    with repo.sandbox():
        with pytest.raises(SandboxError, match=r"fleet.upgrade.*unboxed"):
            fleet.upgrade(repo)
        with pytest.raises(SandboxError, match=r"fleet.upgrade.*unboxed"):
            fleet.resume(repo, "upgrade", "last", fleet.Rollout(journal=tmp_path))


# Which database


def test_two_spellings_are_one_database(repo: type[Repo], names: tuple[str, str], server: Server) -> None:
    """Whatever way a database is named, it is the same one, with what the test has written."""
    with repo.sandbox() as sandbox:
        repo.insert(Tag(label="one"))
        for spelling in (names[0], {"database": names[0]}, server.url(names[0]), repo.get_database()):
            with repo.using(spelling):
                assert repo.count(Tag) == 1
        assert len(sandbox.databases) == 1


def test_another_user_of_a_database(repo: type[Repo], names: tuple[str, str], server: Server) -> None:
    """He gets the connection that there is, if the server would let him in."""
    run_sql(server, "postgres", "CREATE ROLE boxer LOGIN PASSWORD 'right'")
    try:
        with repo.sandbox():
            repo.insert(Tag(label="seen"))
            with repo.using(username="boxer", password="right"):
                assert repo.count(Tag) == 1
            with repo.using(username="boxer", password="wrong"), pytest.raises(AuthenticationError):
                repo.count(Tag)
            with repo.using(username="nobody_else", password="x"), pytest.raises(AuthenticationError):
                repo.count(Tag)
            assert len(states_of(server, repo)) == 1
    finally:
        repo.disconnect_all()
        run_sql(server, "postgres", "DROP ROLE boxer")


def test_on_several_servers(servers: Servers, make_repo: Make) -> None:
    """A name on another server is another database."""
    for server in servers[:2]:
        server.create_database("boxed_twice", template=TEMPLATE)
    repo = make_repo("boxed_twice")
    other = servers[1].url("boxed_twice")
    with repo.sandbox() as sandbox:
        repo.insert(Tag(label="here"))
        with repo.using(other):
            assert repo.count(Tag) == 0
            repo.insert_all(Tag, [{"label": "there"}, {"label": "too"}])
        assert repo.count(Tag) == 1
        assert len(sandbox.databases) == 2
    assert list(repo.across(["boxed_twice", other]).count(Tag).collect().values()) == [0, 0]
    repo.dispose()
    for server in servers[:2]:
        server.drop_database("boxed_twice")


def test_two_databases_of_one_id(servers: Servers, make_repo: Make) -> None:
    """What a directory calls alike, as a tenant that has moved in between, is told apart by where it is."""
    for server in servers[:2]:
        server.create_database("boxed_moved", template=TEMPLATE)
    before, after = (
        Database(server.host, server.port, "boxed_moved", server.username, (), server.password, "tenant 1")
        for server in servers[:2]
    )
    repo = make_repo()
    with repo.sandbox([after]) as sandbox:
        with repo.using(after):
            repo.insert(Tag(label="there"))
        with repo.using(before), pytest.raises(SandboxError, match="none of the databases"):
            repo.count(Tag)
        with sandbox.unboxed(before):
            assert repo.count(Tag) == 0
            with repo.using(after):
                assert repo.count(Tag) == 1
    with repo.sandbox() as sandbox:
        with repo.using(before):
            repo.insert(Tag(label="here"))
        with repo.using(after):
            assert repo.count(Tag) == 0
        assert [database.port for database in sandbox.databases] == [before.port, after.port]
    repo.dispose()
    for server in servers[:2]:
        server.drop_database("boxed_moved")


def test_only_the_databases_that_are_named(repo: type[Repo], names: tuple[str, str]) -> None:
    """Any other is refused before anything is sent to it."""
    with repo.sandbox([names[0]]):
        assert repo.count(Tag) == 0
        attempts = repo.stats().attempts
        with repo.using(names[1]), pytest.raises(SandboxError, match=f"{names[1]} is none of the databases"):
            repo.count(Tag)
        with pytest.raises(ExceptionGroup) as visited:
            repo.across([names[1]]).count(Tag).collect()
        assert f"{names[1]} is none of the databases" in str(visited.value.exceptions[0])
        assert repo.stats().attempts == attempts


def test_the_maintenance_database_too(make_repo: Make, names: tuple[str, str], server: Server) -> None:
    """What is written there is undone, by whatever way; questions to it, as whether a database exists, take none."""
    repo = make_repo(names[0], maintenance_database=names[1])
    with repo.sandbox() as sandbox:
        assert repo.database_exists(names[0])
        assert sandbox.databases == []
        repo.across([names[1]]).execute("INSERT INTO tags (label) VALUES ('undone')").collect()
        assert repo.across([names[1]]).count(Tag).collect() == {names[1]: 1}
        assert contents(server, names[1]) == []
    assert contents(server, names[1]) == []


def test_more_databases_than_there_may_be_connections(make_repo: Make, twenty: list[str]) -> None:
    """The one too many is refused at once, with those that have theirs."""
    repo = make_repo(twenty[0], max_connections=3, checkout_timeout=60)
    with repo.sandbox():
        for name in twenty[:3]:
            with repo.using(name):
                repo.insert(Tag(label=name))
        with repo.using(twenty[3]), pytest.raises(SandboxError, match="raise max_connections") as caught:
            repo.insert(Tag(label="too many"))
        assert all(name in str(caught.value) for name in twenty[:4])
        assert repo.count(Tag) == 1


def test_none_is_evicted(make_repo: Make, twenty: list[str], server: Server) -> None:
    """A target that is smaller than the sandbox closes none of its connections, and they count."""
    repo = make_repo(twenty[0], pool_size=2)
    with repo.sandbox():
        for name in twenty[:5]:
            with repo.using(name):
                repo.insert(Tag(label=name))
        assert len(states_of(server, repo)) == repo.stats().in_use == 5
        assert repo.across(twenty[:5]).count(Tag).collect() == dict.fromkeys(twenty[:5], 1)
    await_(lambda: len(states_of(server, repo)) == 2)


def test_a_disposed_repo(repo: type[Repo], server: Server) -> None:
    """In a sandbox, too, it does nothing any more; what the sandbox has is closed at its end."""
    with repo.sandbox():
        repo.count(Tag)
        repo.dispose()
        with pytest.raises(RepoDisposedError):
            repo.count(Tag)
    await_connections(server, name_of(repo), [])


def test_what_a_directory_has_read_in_it(make_repo: Make, names: tuple[str, str]) -> None:
    """Is as gone as the rows that it has read: the next test's names lead where its own rows say."""
    repo = make_repo(names[0], directory=lambda _: {"database": repo.all(select(Tag.label))[0]})
    for name in names:
        with repo.sandbox():
            repo.insert(Tag(label=name))
            with repo.using("tenant"):
                assert repo.get_database().name == name


# How it begins and ends


def test_bad_arguments(repo: type[Repo], names: tuple[str, str]) -> None:
    """Each says what it takes."""
    with pytest.raises(ConfigError, match="takes a list of databases, not one str"):
        repo.sandbox(names[0])
    with pytest.raises(ConfigError, match="databse"):
        repo.sandbox([{"databse": "x"}])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="shared must be True or False, not 'yes'"):
        repo.sandbox(shared="yes")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="check_deferred must be"):
        repo.sandbox(check_deferred=1)  # type: ignore[arg-type]


def test_it_does_not_nest(repo: type[Repo]) -> None:
    """A second one in it, or one in a transaction, is refused; the next one is not."""
    with repo.sandbox():
        with pytest.raises(ConfigError, match="already"), repo.sandbox():
            raise AssertionError
        repo.insert(Tag(label="still in it"))
    with repo.transaction(), pytest.raises(ConfigError, match="transaction"), repo.sandbox():
        raise AssertionError
    with repo.sandbox():
        assert repo.count(Tag) == 0


@pytest.mark.parametrize("shared", [False, True])
def test_a_connection_that_is_open_already(repo: type[Repo], shared: bool) -> None:
    """It leads to the database itself: no sandbox begins where somebody who would belong to it has one."""
    with repo.session() as session, ThreadPoolExecutor(1) as executor:
        if shared:
            executor.submit(session.execute, text("SELECT 1")).result()
        else:
            session.execute(text("SELECT 1"))
        with pytest.raises(ConfigError, match=r"cannot begin while .* has a connection to .*close its session"):
            repo.sandbox(shared=shared).__enter__()
    with repo.sandbox(shared=shared):
        assert repo.count(Tag) == 0


def test_a_session_that_was_forgotten_is_no_hindrance(repo: type[Repo]) -> None:
    """Nobody can write on it any more."""
    session = repo.session()
    session.execute(text("SELECT 1"))
    session.info["itself"] = session
    del session
    with repo.sandbox():
        assert repo.count(Tag) == 0


def test_classes_that_share_databases_share_it(repo: type[Repo]) -> None:
    """A subclass without a config is in its parent's sandbox."""

    class Careful(repo):  # type: ignore[valid-type,misc]
        pass

    with repo.sandbox():
        Careful.insert(Tag(label="in it"))
        assert repo.count(Tag) == 1
    assert Careful.count(Tag) == 0
