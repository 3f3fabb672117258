"""Whatever a borrower leaves behind on a connection, the next one does not see it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any

import psycopg
import pytest
from packaging.version import Version
from psycopg.rows import dict_row
from sqlalchemy import func, select, text

from shardrepo import Repo
from shardrepo.testing.servers import Server

from ..conftest import books_balance, run_sql
from ..models import Tag

pytestmark = pytest.mark.cache

LEFT_BEHIND: dict[str, list[str]] = {
    "SET": ["SET search_path = pg_catalog", "SET statement_timeout = 1234", "SET my.tenant = 'x'"],
    "SET of what the connection asked for": ["SET application_name = 'other'", "SET client_encoding = 'LATIN1'"],
    "defaults": [
        "SET default_transaction_read_only = on",
        "SET default_transaction_isolation = 'serializable'",
    ],
    "SET ROLE": ["SET ROLE somebody"],
    "SET SESSION AUTHORIZATION": ["SET SESSION AUTHORIZATION somebody"],
    "both": ["SET SESSION AUTHORIZATION somebody", "SET ROLE somebody"],
    "temporary table": ["CREATE TEMP TABLE tags (id int, label text)", "INSERT INTO tags VALUES (1, 'temporary')"],
    "advisory lock": ["SELECT pg_advisory_lock(42)", "SELECT pg_advisory_lock_shared(43)"],
    "LISTEN": ["LISTEN something"],
    "cursor": ["DECLARE leftover CURSOR WITH HOLD FOR SELECT 1"],
    "sequence": ["SELECT nextval('tags_id_seq')"],
}  # fmt: skip

# What the next borrower can see of a session.
SEEN = {
    "settings": "SELECT name, setting FROM pg_settings WHERE source = 'session' ORDER BY 1",
    "search_path": "SELECT current_setting('search_path'), current_setting('statement_timeout')",
    "tenant": "SELECT coalesce(current_setting('my.tenant', true), '')",
    "who": "SELECT session_user::text, current_user::text",
    "name": "SELECT current_setting('application_name'), current_setting('client_encoding')",
    "defaults": "SELECT current_setting('default_transaction_read_only'), current_setting('transaction_isolation')",
    "temporary": "SELECT count(*) FROM pg_class WHERE relname = 'tags' AND relpersistence = 't'",
    "locks": "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()",
    "channels": "SELECT count(*) FROM pg_listening_channels()",
    "cursors": "SELECT count(*) FROM pg_cursors WHERE name = 'leftover'",
    "transaction": "SELECT now() = statement_timestamp()",
}


def through_execute(repo: type[Repo], statements: list[str]) -> None:
    with repo.transaction():
        for statement in statements:
            repo.execute(statement)


def through_execute_alone(repo: type[Repo], statements: list[str]) -> None:
    repo.execute("; ".join(statements))


def through_a_session(repo: type[Repo], statements: list[str]) -> None:
    with repo.session() as session:
        for statement in statements:
            session.execute(text(statement))
        session.commit()


def through_a_session_in_a_transaction(repo: type[Repo], statements: list[str]) -> None:
    with repo.transaction(), repo.session() as session:
        for statement in statements:
            session.execute(text(statement))


def through_the_engine(repo: type[Repo], statements: list[str]) -> None:
    with repo.engine().begin() as connection:
        for statement in statements:
            connection.execute(text(statement))


def through_autocommit(repo: type[Repo], statements: list[str]) -> None:
    with repo.engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        for statement in statements:
            connection.execute(text(statement))


def through_the_driver(repo: type[Repo], statements: list[str]) -> None:
    raw = repo.engine().raw_connection()
    driver: Any = raw.driver_connection
    driver.autocommit = True
    for statement in statements:
        driver.execute(statement)
    raw.close()


WAYS: list[Callable[[type[Repo], list[str]], None]] = [
    through_execute,
    through_execute_alone,
    through_a_session,
    through_a_session_in_a_transaction,
    through_the_engine,
    through_autocommit,
    through_the_driver,
]


@pytest.fixture(scope="module")
def somebody(server: Server) -> Iterator[None]:
    run_sql(server, "postgres", "CREATE ROLE somebody")
    yield
    run_sql(server, "postgres", "DROP ROLE somebody")


@pytest.fixture
def repo(make_repo: Callable[..., type[Repo]], two_databases: tuple[str, str], somebody: None) -> type[Repo]:
    return make_repo(two_databases[0])


def seen(repo: type[Repo]) -> dict[str, Any]:
    """What a borrower sees of its session, by a connection that no statement of its own has touched before."""
    with repo.engine().connect() as connection:
        pids = connection.connection.dbapi_connection.info.backend_pid  # type: ignore[union-attr]  # psycopg's
        found = {what: [tuple(row) for row in connection.execute(text(sql))] for what, sql in SEEN.items()}
    return {**found, "pid": pids}


@pytest.mark.parametrize("way", WAYS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_the_next_borrower_sees_nothing(repo: type[Repo], way: Any, what: str) -> None:
    """The next borrower's session is as new, by whatever way its predecessor changed it."""
    before = seen(repo)
    way(repo, LEFT_BEHIND[what])
    after = seen(repo)
    assert {**after, "pid": 0} == {**before, "pid": 0}
    assert repo.all(Tag) == []
    assert books_balance(repo)


@pytest.mark.parametrize("what", LEFT_BEHIND)
def test_a_verb_sees_nothing(repo: type[Repo], what: str) -> None:
    """The library's own verbs, which reset nothing themselves, get a session that was reset."""
    repo.insert(Tag(label="real"))
    through_a_session(repo, LEFT_BEHIND[what])
    assert [tag.label for tag in repo.all(Tag)] == ["real"]
    repo.insert(Tag(label="another"))
    assert repo.count(Tag) == 2


def test_a_reset_connection_is_reused(repo: type[Repo]) -> None:
    """A reset keeps the connection, and what was prepared on it."""
    pids = {repo.execute("SELECT pg_backend_pid()").scalar_one() for _ in range(8)}
    assert len(pids) == 1
    for _ in range(8):
        repo.get(Tag, 1)
        repo.execute("SELECT 1")
    assert repo.execute("SELECT count(*) > 0 FROM pg_prepared_statements").scalar_one()


def test_dropping_what_was_prepared_is_survived(repo: type[Repo]) -> None:
    """A borrower that drops the driver's prepared statements breaks nobody's next statement, where psycopg notices."""
    notices = Version(version("psycopg")) >= Version("3.3")
    for statement in ("DISCARD ALL", "DEALLOCATE ALL") if notices else ("SELECT 1",):
        for _ in range(8):
            repo.get(Tag, 1)
        with repo.engine().connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(statement))
        for _ in range(8):
            assert repo.get(Tag, 1) is None


@pytest.mark.parametrize("statement", ["BEGIN", "BEGIN; INSERT INTO tags (label) VALUES ('left')", "START TRANSACTION"])
def test_an_open_transaction_is_rolled_back(repo: type[Repo], server: Server, statement: str) -> None:
    """A transaction that a borrower opened behind everybody's back is undone."""
    through_the_driver(repo, [statement])
    assert run_sql(
        server, repo.get_database().name, "SELECT count(*) FROM pg_locks WHERE relation = 'tags'::regclass"
    ) == [(0,)]
    repo.insert(Tag(label="committed"))
    assert run_sql(server, repo.get_database().name, "SELECT label FROM tags") == [("committed",)]


def test_a_failed_transaction_is_rolled_back(repo: type[Repo]) -> None:
    """A transaction that a borrower left in its failed state is undone."""
    raw = repo.engine().raw_connection()
    driver: Any = raw.driver_connection
    with pytest.raises(psycopg.Error):
        driver.execute("SELECT * FROM nothing")
    raw.close()
    assert repo.count(Tag) == 0


def test_a_command_left_unfinished_closes_the_connection(repo: type[Repo]) -> None:
    """A connection in the middle of a COPY cannot be reset: it is closed."""
    raw = repo.engine().raw_connection()
    driver: Any = raw.driver_connection
    pid = driver.info.backend_pid
    driver.pgconn.exec_(b"COPY tags FROM STDIN")
    raw.close()
    assert repo.execute("SELECT pg_backend_pid()").scalar_one() != pid
    assert books_balance(repo)


ATTRIBUTES: dict[str, Any] = {
    "autocommit": True,
    "isolation_level": psycopg.IsolationLevel.SERIALIZABLE,
    "read_only": True,
    "deferrable": True,
    "row_factory": dict_row,
    "cursor_factory": psycopg.ClientCursor,
    "prepare_threshold": 0,
    "prepared_max": 1,
}


@pytest.mark.parametrize("name", ATTRIBUTES)
@pytest.mark.parametrize("used", [False, True], ids=["unused", "used"])
def test_what_was_set_on_the_drivers_connection(repo: type[Repo], name: str, used: bool) -> None:
    """Attributes of the driver's connection that a borrower set are as they were for the next one."""
    with repo.engine().connect() as connection:
        before = getattr(connection.connection.driver_connection, name)
    raw = repo.engine().raw_connection()
    driver: Any = raw.driver_connection
    setattr(driver, name, ATTRIBUTES[name])
    if used:
        driver.execute("SELECT 1")
    raw.close()
    assert repo.insert(Tag(label="x")).id == 1
    assert repo.get_one(Tag, 1).label == "x"
    with repo.engine().connect() as connection:
        assert getattr(connection.connection.driver_connection, name) == before


def test_adapters_of_a_borrower(repo: type[Repo]) -> None:
    """How a borrower had the driver convert values is not how the next one's are converted."""

    class Shouting(psycopg.adapt.Loader):
        def load(self, data: Any) -> str:
            return bytes(data).decode().upper()

    repo.insert(Tag(label="quiet"))
    raw = repo.engine().raw_connection()
    driver: Any = raw.driver_connection
    driver.adapters.register_loader("varchar", Shouting)
    driver.execute("SELECT 1")
    raw.close()
    assert repo.get_one(Tag, 1).label == "quiet"


def test_handlers_of_a_borrower(repo: type[Repo]) -> None:
    """A borrower's handlers for notices hear nothing of what the next one does."""
    heard: list[object] = []
    raw = repo.engine().raw_connection()
    driver: Any = raw.driver_connection
    driver.add_notice_handler(heard.append)
    driver.execute("SELECT 1")
    raw.close()
    repo.execute("DO $$ BEGIN RAISE NOTICE 'private'; END $$")
    assert heard == []


@pytest.mark.parametrize("level", ["SERIALIZABLE", "REPEATABLE READ", "AUTOCOMMIT"])
def test_an_isolation_level_of_sqlalchemys(repo: type[Repo], level: Any) -> None:
    """An isolation level set through SQLAlchemy ends with its borrower."""
    with repo.engine().connect().execution_options(isolation_level=level) as connection:
        connection.execute(text("SELECT 1"))
    with repo.session() as session:
        session.connection(execution_options={"isolation_level": level})
        session.execute(text("SELECT 1"))
    with repo.transaction():
        assert repo.execute("SHOW transaction_isolation").scalar_one() == "read committed"
        with pytest.raises(ZeroDivisionError), repo.savepoint():
            repo.insert(Tag(label="x"))
            raise ZeroDivisionError
    assert repo.count(Tag) == 0


def test_a_database_with_an_isolation_level_of_its_own(
    make_databases: Callable[..., list[str]], make_repo: Callable[..., type[Repo]], server: Server
) -> None:
    """A reset goes back to the database's own settings, not to those of the first database that was met."""
    (name,) = make_databases(1)
    run_sql(server, "postgres", f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'")
    run_sql(server, "postgres", f"ALTER DATABASE {name} SET search_path = pg_catalog, public")
    repo = make_repo("postgres")
    repo.execute("SELECT 1")
    for _ in range(2):
        with repo.using(name):
            with repo.engine().connect().execution_options(isolation_level="REPEATABLE READ") as connection:
                connection.execute(text("SET search_path = public"))
            with repo.transaction():
                assert repo.execute("SHOW transaction_isolation").scalar_one() == "serializable"
                assert repo.execute("SHOW search_path").scalar_one() == "pg_catalog, public"
        with repo.transaction():
            assert repo.execute("SHOW transaction_isolation").scalar_one() == "read committed"
    gc.collect()


def test_a_verb_after_its_own_error(repo: type[Repo]) -> None:
    """A connection on which a verb failed, outside a transaction and in one, is as good as before."""
    repo.insert(Tag(label="a"))
    pid = repo.execute("SELECT pg_backend_pid()").scalar_one()
    for _ in range(3):
        with pytest.raises(Exception, match="duplicate"):
            repo.insert(Tag(label="a"))
        with pytest.raises(Exception, match="duplicate"), repo.transaction():
            repo.insert(Tag(label="a"))
        assert repo.count(Tag) == 1
    assert repo.execute("SELECT pg_backend_pid()").scalar_one() == pid


@pytest.mark.parametrize("verb", ["all", "one", "update_all"])
def test_functions_of_a_query_leave_nothing(make_repo: Callable[..., type[Repo]], database: str, verb: str) -> None:
    """Settings and locks by functions that a query calls are gone for the next borrower, as those of one's own SQL."""
    repo = make_repo(database)
    repo.insert(Tag(label="x"))
    changing = select(func.set_config("search_path", "nowhere", False), func.pg_advisory_lock(77))
    if verb == "update_all":
        repo.update_all(Tag, {"label": func.set_config("search_path", "nowhere", False)})
    else:
        getattr(repo, verb)(changing)
    assert repo.all(select(func.current_setting("search_path"))) == ['"$user", public']
    assert repo.one(select(func.count()).select_from(text("pg_locks WHERE locktype = 'advisory'"))) == 0
