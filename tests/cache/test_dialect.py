"""One dialect and one cache of compiled SQL for a server, and nothing of one database's types in another."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import ARRAY, Select, create_engine, event, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import DOMAIN, ENUM, HSTORE, JSONB
from sqlalchemy.engine import Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import Integer

from shardrepo import Repo
from shardrepo.engines import SharedDialect
from shardrepo.testing.servers import Server, Servers, count_statements

from ..conftest import LONG, TEMPLATE, connections_of, run_sql
from ..models import Account, Book, Dog, Post, Shelf, Tag, User

pytestmark = pytest.mark.cache

# 54 in all; in `make test-all`, where there may be more than 100 databases, 102.
PER_SERVER = 34 if LONG else 18


@pytest.fixture(scope="module")
def fleet(servers: Servers) -> Iterator[list[tuple[Server, str]]]:
    """Databases on each of the three servers, in which the tests of this module write."""
    names = [f"fleet{number:02}" for number in range(PER_SERVER)]
    for server in servers:
        server.create_databases(names, template=TEMPLATE)
    yield [(server, name) for name in names for server in servers]
    for server in servers:
        for name in names:
            server.drop_database(name, force=True)


def at(server: Server, name: str) -> dict[str, Any]:
    return {"host": server.host, "port": server.port, "database": name}


def everything(repo: type[Repo]) -> None:
    """Every verb, and the ORM's flush in all its shapes."""
    user = repo.insert(User(name="Ada", posts=[Post(title="x", tags=[Tag(label=f"t{repo.count(Tag)}")])]))
    repo.update(user, name="Bob")
    repo.get(User, user.id)
    repo.get_by(User, name="Bob", id=user.id)
    repo.all(select(User).where(User.age > 3))
    repo.exists(User)
    repo.insert_all(Tag, [{"label": f"a{repo.count(Tag)}"}, {"label": f"b{repo.count(Tag)}"}])
    dog = repo.insert(Dog(breed="pug"))
    repo.update(repo.get_one(Dog, dog.id), breed="lab")
    account = repo.insert(Account(balance=1))
    repo.delete(repo.update(account, balance=2))
    repo.delete(repo.insert(Shelf(label="s", books=[Book(title="b")])))
    repo.execute(update(User).values(age=User.age + 1))
    repo.execute("SELECT count(*) FROM users WHERE age = :age", {"age": 1})
    with repo.transaction(), repo.savepoint(), repo.session() as session:
        session.scalars(select(Post)).all()[0].title = "changed"
        session.commit()
    repo.delete(user)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every statement that SQLAlchemy compiles from now on."""
    made: list[str] = []
    original = SQLCompiler.__init__

    def counting(self: SQLCompiler, dialect: Any, statement: Any, *args: Any, **kwargs: Any) -> None:
        original(self, dialect, statement, *args, **kwargs)
        if isinstance(dialect, SharedDialect) and "SAVEPOINT" not in self.string:  # which SQLAlchemy never caches
            made.append(self.string)

    monkeypatch.setattr(SQLCompiler, "__init__", counting)
    return made


def dialects() -> list[SharedDialect]:
    gc.collect()
    return [obj for obj in gc.get_objects() if isinstance(obj, SharedDialect)]


def test_one_dialect_per_server_and_no_statement_compiled_twice(
    fleet: list[tuple[Server, str]], servers: Servers, make_repo: Callable[..., type[Repo]], compiled: list[str]
) -> None:
    """After all databases were used, each server has one dialect, and it compiled each statement once."""
    others = {id(each): each for each in dialects()}
    repo = make_repo(None, pool_size=5)
    for server, name in fleet[: len(servers)]:
        with repo.using(at(server, name)):
            everything(repo)
    first = list(compiled)
    assert len(first) >= 3 * 15
    for server, name in fleet[len(servers) :]:
        with repo.using(at(server, name)):
            everything(repo)
    assert compiled == first
    assert Counter(compiled) == dict.fromkeys(compiled, 3)
    assert len([each for each in dialects() if id(each) not in others]) == len(servers)


def test_a_dialect_is_asked_for_once_per_server(
    fleet: list[tuple[Server, str]], server: Server, make_repo: Callable[..., type[Repo]]
) -> None:
    """Only the first connection to a server asks it questions; a new database's first verb is its one statement."""
    repo = make_repo(None, pool_size=5, application_name="asked-once")
    ours = [name for on, name in fleet if on is server]
    with repo.using(ours[0]):
        repo.count(Tag)
    with count_statements(server) as counted:
        for name in ours[1:]:
            with repo.using(name):
                repo.count(Tag)
    sent = [one for one in counted.statements if one.application_name == "asked-once"]
    assert [one.database for one in sent] == ours[1:]
    assert {one.sql for one in sent} == {sent[0].sql}


def test_threads_that_meet_a_server_first_share_its_dialect(
    fleet: list[tuple[Server, str]], server: Server, make_repo: Callable[..., type[Repo]]
) -> None:
    """Threads whose first verbs go to one server at the same moment all work, on one dialect."""
    repo = make_repo(None, pool_size=20)
    ours = [name for on, name in fleet if on is server][:8]
    start = threading.Barrier(8)

    def work(name: str) -> object:
        start.wait(30)
        with repo.using(name):
            assert repo.execute("SELECT current_database()").scalar_one() == name
            return repo.engine().dialect

    with ThreadPoolExecutor(8) as executor:
        found = list(executor.map(work, ours))
    assert len({id(dialect) for dialect in found}) == 1


def test_two_repos_do_not_share_a_dialect(
    fleet: list[tuple[Server, str]], server: Server, make_repo: Callable[..., type[Repo]]
) -> None:
    """Options of one repo's dialect are no other's."""
    one, other = make_repo("postgres"), make_repo("postgres")
    assert one.engine().dialect is one.engine().dialect
    assert one.engine().dialect is not other.engine().dialect


def test_an_applications_own_engines_are_untouched(server: Server, make_repo: Callable[..., type[Repo]]) -> None:
    """`create_engine` with psycopg's URL gives SQLAlchemy's own dialect, before and after a repo was used."""
    before = create_engine(server.url())
    repo = make_repo("postgres")
    repo.execute("SELECT 1")
    after = create_engine(server.url())
    for engine in (before, after):
        assert type(engine.dialect).__name__ == "PGDialect_psycopg"
        assert engine.dialect is not repo.engine().dialect
        assert engine.dialect._has_native_hstore  # type: ignore[attr-defined]  # psycopg's
        with engine.connect() as connection:
            assert connection.execute(text("SELECT 1")).scalar_one() == 1
        engine.dispose()
    assert repo.execute("SELECT 1").scalar_one() == 1


def test_a_listener_on_an_engine_hears_its_database(
    fleet: list[tuple[Server, str]], server: Server, make_repo: Callable[..., type[Repo]]
) -> None:
    """A listener for statements on one database's engine hears what runs there, and nothing of another's."""
    repo = make_repo(fleet[0][1])
    heard: list[str] = []
    engine = repo.engine()

    def listener(conn: Any, cursor: Any, statement: str, *args: Any) -> None:
        heard.append(statement)

    event.listen(engine, "before_cursor_execute", listener)
    repo.count(Tag)
    with repo.using(fleet[3][1]):
        repo.count(User)
    assert len(heard) == 1
    assert "tags" in heard[0]
    event.remove(engine, "before_cursor_execute", listener)


# Types whose OIDs differ from database to database


class TypedBase(DeclarativeBase):
    pass


class Typed(TypedBase):
    """A row of types that each database has under a number of its own."""

    __tablename__ = "typed"

    id: Mapped[int] = mapped_column(primary_key=True)
    labels: Mapped[dict[str, str | None]] = mapped_column(HSTORE)
    mood: Mapped[str] = mapped_column(ENUM("sad", "happy", name="mood", create_type=False))
    moods: Mapped[list[str]] = mapped_column(ARRAY(ENUM("sad", "happy", name="mood", create_type=False)))
    score: Mapped[int] = mapped_column(DOMAIN("score", Integer, create_type=False))
    data: Mapped[dict[str, Any]] = mapped_column(JSONB)


TYPES = [
    "CREATE EXTENSION hstore",
    "CREATE TYPE mood AS ENUM ('sad', 'happy')",
    "CREATE DOMAIN score AS integer CHECK (VALUE > 0)",
    "CREATE TYPE spare AS (a int, b text)",
]
TABLE = """
    CREATE TABLE typed (id serial PRIMARY KEY, labels hstore NOT NULL, mood mood NOT NULL, moods mood[] NOT NULL,
                        score score NOT NULL, data jsonb NOT NULL)
"""
OIDS = "SELECT typname, oid::int FROM pg_type WHERE typname IN ('hstore', 'mood', '_mood', 'score') ORDER BY 1"


@pytest.fixture(scope="module")
def typed(server: Server) -> tuple[str, str]:
    """Two databases with the same types, created in another order, so that each number means something else."""
    names = ("typed1", "typed2")
    server.create_databases(names)
    for name, statements in zip(names, (TYPES, [TYPES[3], *reversed(TYPES[:3])]), strict=True):
        for statement in [*statements, TABLE]:
            run_sql(server, name, statement)
    one, other = (dict(run_sql(server, name, OIDS)) for name in names)
    assert all(one[name] != other[name] for name in one)
    return names


@pytest.mark.parametrize("order", [1, -1])
def test_types_with_other_numbers(
    server: Server, typed: tuple[str, str], make_repo: Callable[..., type[Repo]], order: int
) -> None:
    """hstore, an enum, an array of it and a domain are written and read right in both, prepared or not."""
    repo = make_repo(None)
    for turn in range(8):
        for name in typed[::order]:
            with repo.using(name):
                stored = Typed(
                    labels={"at": name, "none": None, 'quo"te': "x=>y, z"},
                    mood="happy",
                    moods=["sad", "happy"],
                    score=turn + 1,
                    data={"at": name},
                )
                key = repo.insert(stored).id
                found = repo.get_one(Typed, key)
                assert found.labels == {"at": name, "none": None, 'quo"te': "x=>y, z"}
                assert (found.mood, found.moods, found.score, found.data) == (
                    "happy", ["sad", "happy"], turn + 1, {"at": name},
                )  # fmt: skip
                repo.update(found, labels={"now": "changed"}, mood="sad", moods=["sad"], score=99)
                assert repo.one(select(Typed.labels["now"]).where(Typed.id == key)) == "changed"
                assert repo.exists(select(Typed).where(Typed.mood == "sad", text("score = 99"), Typed.id == key))
                assert repo.exists(select(Typed).where(Typed.labels.contains({"now": "changed"}), Typed.id == key))
    rows = [
        run_sql(server, name, "SELECT count(*), min(mood::text), min(labels::text) FROM typed WHERE score = 99")
        for name in typed
    ]
    assert rows[0][0][1:] == rows[1][0][1:] == ("sad", '"now"=>"changed"')


def test_types_registered_with_the_driver_stay_with_their_connection(
    server: Server, typed: tuple[str, str], make_repo: Callable[..., type[Repo]]
) -> None:
    """A type that a borrower registers with the driver, by one database's number, is taken nowhere else."""
    from psycopg.types import TypeInfo
    from psycopg.types.hstore import register_hstore

    repo = make_repo(None)
    with repo.using(typed[0]), repo.engine().connect() as connection:
        driver: Any = connection.connection.driver_connection
        info = TypeInfo.fetch(driver, "hstore")
        assert info is not None
        register_hstore(info, driver)
    for name in typed:
        with repo.using(name):
            repo.insert(Typed(labels={"a": "b"}, mood="sad", moods=[], score=1, data={}))
            assert repo.all(select(Typed.labels).where(Typed.moods == []))[-1] == {"a": "b"}


def test_a_repos_connections_are_the_caches_alone(server: Server, make_repo: Callable[..., type[Repo]]) -> None:
    """Engine, session and verbs of one database draw on the same connections."""
    repo = make_repo("postgres", application_name="one-source")
    assert isinstance(repo.engine(), Engine)
    repo.execute("SELECT 1")
    with repo.engine().connect() as connection:
        connection.execute(text("SELECT 1"))
    with repo.session() as session:
        session.execute(text("SELECT 1"))
    assert len(connections_of(server, "one-source")) == 1


def test_statements_with_other_values_are_compiled_once(
    server: Server, two_databases: tuple[str, str], make_repo: Callable[..., type[Repo]], compiled: list[str]
) -> None:
    """The same statement with other values, another limit or another list of keys, is not compiled again."""
    repo = make_repo(two_databases[0])

    def statements(number: int) -> list[Select[Any]]:
        return [
            select(User).where(User.id == number).limit(number),
            select(User).where(User.id.in_(range(number))),
            select(func.count()).select_from(User).where(User.name == str(number)),
        ]

    def run(number: int) -> None:
        for statement in statements(number):
            repo.all(statement)
        repo.execute(insert(Tag).values(label=f"l{number}"))

    run(1)
    first = list(compiled)
    for number in range(2, 8):
        with repo.using(two_databases[number % 2]):
            run(number)
    assert compiled == first
