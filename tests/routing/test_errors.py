"""What goes wrong on the way to a database: which error, that it names the database, and that the books stay right."""

from __future__ import annotations

import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from time import monotonic
from typing import Any

import pytest
from psycopg import pq
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardrepo import (
    AuthenticationError,
    Config,
    ConfigError,
    ConnectError,
    Repo,
    RepoDisposedError,
    ServerFullError,
    ServerUnavailableError,
    ShardRepoError,
    UnknownDatabaseError,
)
from shardrepo.testing.servers import Server

from ..conftest import books_balance, run_sql
from ..models import Tag, User
from .conftest import Pair

pytestmark = pytest.mark.routing

# In time: what the issue asks for, with room for a busy machine.
SOON = 5.0


# Configuration


GOOD: dict[str, Any] = {"url": "postgresql+psycopg://app@127.0.0.1/x"}
BAD_CONFIGS: dict[str, tuple[Any, str]] = {
    "misspelt setting": ({**GOOD, "pool_sise": 5}, "did you mean 'pool_size'"),
    "misspelt address": ({"hots": "127.0.0.1"}, "did you mean 'host'"),
    "target of 0": ({**GOOD, "pool_size": 0}, "pool_size=0"),
    "negative target": ({**GOOD, "pool_size": -1}, "pool_size=-1"),
    "target of no number": ({**GOOD, "pool_size": "20"}, "integer"),
    "target of a fraction": ({**GOOD, "pool_size": 2.5}, "integer"),
    "target True": ({**GOOD, "pool_size": True}, "integer"),
    "negative timeout": ({**GOOD, "connect_timeout": -1}, "connect_timeout=-1"),
    "timeout of 0": ({**GOOD, "connect_timeout": 0}, "connect_timeout=0"),
    "timeout without end": ({**GOOD, "connect_timeout": float("inf")}, "connect_timeout=inf"),
    "timeout that is no number": ({**GOOD, "connect_timeout": float("nan")}, "connect_timeout=nan"),
    "timeout None": ({**GOOD, "connect_timeout": None}, "number"),
    "another driver": ({"url": "postgresql+asyncpg://app@127.0.0.1/x"}, "asyncpg"),
    "another database system": ({"url": "sqlite:///x"}, "sqlite"),
    "another drivername": ({"host": "127.0.0.1", "drivername": "mysql"}, "mysql"),
    "no URL": ({"url": "127.0.0.1"}, "cannot be parsed"),
    "contradiction": ({**GOOD, "database": "y"}, "contradicts"),
    "port out of range": ({"host": "127.0.0.1", "port": 65536}, "65536"),
    "port of no number": ({"host": "127.0.0.1", "port": "5432"}, "integer"),
    "no text": ({"host": 5}, "host"),
    "two hosts": ({"host": "127.0.0.1,127.0.0.2"}, "several servers"),
    "empty name": ({"host": "127.0.0.1", "database": ""}, "empty"),
    "no config at all": (5, "int"),
    "no flag": ({**GOOD, "require_database": "yes"}, "require_database"),
    "empty application_name": ({**GOOD, "application_name": ""}, "application_name"),
    "engine_options of no mapping": ({**GOOD, "engine_options": ["echo"]}, "mapping"),
    "engine_options of ours": ({**GOOD, "engine_options": {"poolclass": None}}, "poolclass"),
    "connect_args of ours": ({**GOOD, "connect_args": {"dbname": "y"}}, "dbname"),
}


@pytest.mark.parametrize("config", BAD_CONFIGS)
def test_a_wrong_config_fails_where_it_is_written(config: str) -> None:
    """A config that cannot be meant is a `ConfigError` at the class statement, with what is wrong in it."""
    given, message = BAD_CONFIGS[config]
    with pytest.raises(ConfigError, match=message) as caught:
        type("Wrong", (Repo,), {}, config=given)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(ConfigError, match=message):
        Config.of(given)


def test_the_limits_of_a_config() -> None:
    """The smallest values that mean something are accepted."""
    config = Config.of({**GOOD, "pool_size": 1, "connect_timeout": 0.001})
    assert (config.pool_size, config.connect_timeout) == (1, 0.001)
    assert (Config.of(GOOD).pool_size, Config.of(GOOD).connect_timeout) == (20, 5.0)


def test_a_repo_without_a_config() -> None:
    """`Repo` itself, and a subclass that never got a config, say how one is given."""
    bare: type[Repo] = type("Bare", (Repo,), {})
    for repo in (Repo, bare):
        with pytest.raises(ConfigError, match="config"):
            repo.get(Tag, 1)
        with pytest.raises(ConfigError, match="config"):
            repo.set_database("x")


def test_a_config_callable_that_is_wrong() -> None:
    """A callable's config is validated when it is first needed, and asked again after it failed."""
    answers: list[Any] = [{"pool_sise": 1}, GOOD]
    repo: type[Repo] = type("Late", (Repo,), {}, config=lambda: answers.pop(0))
    with pytest.raises(ConfigError, match="pool_size"):
        repo.get_database()
    assert repo.get_database().name == "x"


def test_an_unknown_connection_parameter(pair: Pair, make_repo: Callable[..., type[Repo]]) -> None:
    """A parameter that libpq does not know is a `ConfigError` that names it and the database."""
    repo = make_repo(pair.a, connect_args={"no_such_thing": "1"})
    with pytest.raises(ConfigError, match="no_such_thing") as caught:
        repo.count(Tag)
    assert pair.home(pair.a) in str(caught.value)
    assert books_balance(repo)


# Arguments


class Unmapped:
    id = 1


class Abstract(DeclarativeBase):
    __abstract__ = True


class OtherBase(DeclarativeBase):
    pass


class Missing(OtherBase):
    """Mapped, but its table was never created."""

    __tablename__ = "missing"

    id: Mapped[int] = mapped_column(primary_key=True)


def test_a_model_that_is_not_mapped(repo: type[Repo]) -> None:
    """A class without a mapping is a `TypeError` that names it, and nothing is sent."""
    models: list[Any] = [Unmapped, Abstract, OtherBase, int, "User", None]
    verbs: list[Callable[..., Any]] = [repo.all, repo.count, repo.exists, repo.one, repo.one_or_none]
    for model in models:
        for verb in verbs:
            with pytest.raises(TypeError):
                verb(model)
        with pytest.raises(TypeError, match=getattr(model, "__name__", repr(model))):
            repo.get(model, 1)
    with pytest.raises(TypeError, match="Unmapped"):
        repo.insert(Unmapped())
    assert repo.stats().in_use == 0


def test_a_statement_for_get(repo: type[Repo]) -> None:
    """`get` takes a class; for a statement it names the verbs that take one."""
    with pytest.raises(TypeError, match="one_or_none"):
        repo.get(select(User), 1)  # type: ignore[arg-type]  # the point


def test_none_as_a_key(repo: type[Repo]) -> None:
    """None as a key is a `ValueError` that names the model."""
    with pytest.raises(ValueError, match="User"):
        repo.get(User, None)


def test_a_table_that_does_not_exist(repo: type[Repo], pair: Pair) -> None:
    """What the server refuses passes through, with a note that names the database."""
    with pytest.raises(Exception, match="missing") as caught:
        repo.get(Missing, 1)
    assert any(pair.home(pair.a) in note for note in caught.value.__notes__)
    assert repo.stats().in_use == 0
    assert repo.count(Tag) == 1


# The way to the server


@pytest.fixture
def closed_port() -> int:
    """A port of this machine on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port of this machine on which somebody listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


VERBS: dict[str, Callable[[type[Repo]], Any]] = {
    "get": lambda repo: repo.get(Tag, 1),
    "all": lambda repo: repo.all(Tag),
    "insert": lambda repo: repo.insert(Tag(label="new")),
    "insert_all": lambda repo: repo.insert_all(Tag, [{"label": "new"}]),
    "execute": lambda repo: repo.execute("SELECT 1"),
    "ping": lambda repo: repo.ping(),
    "transaction": lambda repo: repo.transaction().__enter__(),
    "session": lambda repo: repo.session().execute(text("SELECT 1")),
    "engine": lambda repo: repo.engine().connect(),
}


@pytest.mark.parametrize("verb", VERBS)
def test_three_causes_are_three_errors(repo: type[Repo], pair: Pair, closed_port: int, verb: str) -> None:
    """An unreachable server, a missing database and a wrong password each have an error, in time, that names the
    database, whatever the verb; afterwards the books add up and the repo works."""
    causes: list[tuple[dict[str, Any], type[ConnectError]]] = [
        ({"port": closed_port}, ServerUnavailableError),
        ({"database": "missing"}, UnknownDatabaseError),
        ({"password": "wrong"}, AuthenticationError),
        ({"username": "nobody"}, AuthenticationError),
    ]
    for choice, kind in causes:
        begun = monotonic()
        with repo.using(choice):
            with pytest.raises(kind) as caught:
                VERBS[verb](repo)
            assert type(caught.value) is kind
            assert caught.value.database == repo.get_database()
            assert repo.get_database().home in str(caught.value)
        assert monotonic() - begun < SOON
        assert isinstance(caught.value, ShardRepoError)
        assert isinstance(caught.value, OperationalError)
        assert books_balance(repo)
    stats = repo.stats()
    assert (stats.attempts, stats.failed, stats.in_use, stats.connecting) == (4, 4, 0, 0)
    assert repo.count(Tag) == 1


def test_the_remedy_and_the_sqlstate(repo: type[Repo], closed_port: int) -> None:
    """Each error says what to do, and carries the server's code where the server gave one."""
    for choice, remedy, sqlstate in (
        ({"port": closed_port}, "check host and port", None),
        ({"database": "missing"}, "create it, or choose another", "3D000"),
        # Before version 18, libpq's trace begins after authentication.
        ({"password": "wrong"}, "check username and password", "28P01" if pq.version() >= 180000 else None),
    ):
        with repo.using(choice), pytest.raises(ConnectError, match=remedy) as caught:
            repo.execute("SELECT 1")
        assert caught.value.sqlstate == sqlstate
        again = pickle.loads(pickle.dumps(caught.value))
        assert (type(again), str(again), again.sqlstate) == (type(caught.value), str(caught.value), sqlstate)


def test_a_server_that_does_not_answer(pair: Pair, make_repo: Callable[..., type[Repo]], deaf_port: int) -> None:
    """A server that accepts and says nothing is given up after `connect_timeout`, fractions of a second included."""
    repo = make_repo(pair.a, connect_timeout=0.3)
    for verb in (lambda: repo.count(Tag), repo.ping):
        begun = monotonic()
        with repo.using(port=deaf_port), pytest.raises(ServerUnavailableError, match=r"connect_timeout=0\.3") as caught:
            verb()
        assert 0.3 <= monotonic() - begun < SOON
        assert caught.value.database.port == deaf_port
        assert books_balance(repo)
    assert repo.stats().failed == 2
    assert repo.count(Tag) == 1


def test_a_deaf_server_delays_nobody_else(pair: Pair, make_repo: Callable[..., type[Repo]]) -> None:
    """While one thread waits for a server that does not answer, others reach theirs."""
    repo = make_repo(pair.a, connect_timeout=60, pool_size=2)
    errors: list[BaseException] = []

    def wait() -> None:
        with repo.using(port=port):
            try:
                repo.count(Tag)
            except ConnectError as error:
                errors.append(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=wait)
        thread.start()
        client, _ = listener.accept()
        assert repo.count(Tag) == 1
        with repo.using(pair.b):
            assert repo.count(Tag) == 1
        stats = repo.stats()
        assert (stats.connecting, stats.in_use) == (1, 0)
        assert books_balance(repo)
        listener.close()  # a second try, to learn the reason, is refused
        client.close()
        thread.join(30)
    assert len(errors) == 1
    assert books_balance(repo)


def test_a_server_that_hangs_up(repo: type[Repo], pair: Pair) -> None:
    """A server that closes the connection instead of answering is a `ConnectError` with the driver's words."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            client, _ = listener.accept()
            client.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with repo.using(port=listener.getsockname()[1]), pytest.raises(ConnectError) as caught:
            repo.count(Tag)
        thread.join(30)
        assert repo.home(Tag(label="x")) is None
        assert str(listener.getsockname()[1]) in str(caught.value)
    assert books_balance(repo)


def test_a_server_that_is_full(server: Server, repo: type[Repo], pair: Pair) -> None:
    """A database that takes no more connections is a `ServerFullError`, and works again when it does."""
    run_sql(server, "postgres", "CREATE ROLE limited LOGIN PASSWORD 'pw' CONNECTION LIMIT 0")
    try:
        with repo.using(username="limited", password="pw", database="postgres"):
            with pytest.raises(ServerFullError) as caught:
                repo.execute("SELECT 1")
            assert caught.value.sqlstate == "53300"
            run_sql(server, "postgres", "ALTER ROLE limited CONNECTION LIMIT 1")
            assert repo.execute("SELECT session_user").scalar_one() == "limited"
            repo.disconnect()
    finally:
        run_sql(server, "postgres", "DROP ROLE limited")
    assert books_balance(repo)


def test_a_role_that_may_not_log_in(server: Server, repo: type[Repo]) -> None:
    """A role without LOGIN, and a database without CONNECT, are told apart from a missing database."""
    run_sql(server, "postgres", "CREATE ROLE locked PASSWORD 'pw'")
    try:
        with repo.using(username="locked", password="pw"), pytest.raises(AuthenticationError):
            repo.execute("SELECT 1")
        run_sql(server, "postgres", "ALTER ROLE locked LOGIN")
        run_sql(server, "postgres", "REVOKE CONNECT ON DATABASE postgres FROM PUBLIC")
        with repo.using(username="locked", password="pw", database="postgres"), pytest.raises(ConnectError) as caught:
            repo.execute("SELECT 1")
        assert not isinstance(caught.value, UnknownDatabaseError | ServerUnavailableError)
        assert "postgres" in str(caught.value)
    finally:
        run_sql(server, "postgres", "GRANT CONNECT ON DATABASE postgres TO PUBLIC")
        run_sql(server, "postgres", "DROP ROLE locked")
    assert books_balance(repo)


def test_a_failed_insert_for_want_of_a_server_leaves_the_object(repo: type[Repo], closed_port: int) -> None:
    """An object whose insert never reached a server is new still, and can be inserted elsewhere."""
    tag = Tag(label="new")
    with repo.using(port=closed_port), pytest.raises(ServerUnavailableError):
        repo.insert(tag)
    assert repo.home(tag) is None
    assert tag.id is None
    repo.insert(tag)


def test_a_transaction_that_cannot_begin_leaves_nothing(repo: type[Repo], closed_port: int) -> None:
    """A block whose transaction never began does not run, and no transaction is open after it."""
    with repo.using(port=closed_port):
        with pytest.raises(ServerUnavailableError), repo.transaction():
            pytest.fail("the block must not run")
        assert not repo.in_transaction()
    with repo.transaction():
        with repo.using(port=closed_port), pytest.raises(ServerUnavailableError):
            repo.count(Tag)
        repo.insert(Tag(label="new"))
    assert repo.count(Tag) == 2


def test_every_verb_after_dispose(repo: type[Repo], pair: Pair) -> None:
    """After `dispose` every verb raises at once, names the database, and opens nothing."""
    tag = repo.get_one(Tag, 1)
    attempts = repo.stats().attempts
    repo.dispose()
    verbs: list[Callable[[type[Repo]], Any]] = [*VERBS.values(), lambda repo: repo.update(tag, label="x")]
    verbs.append(lambda repo: repo.delete(tag))
    for verb in verbs:
        with pytest.raises(RepoDisposedError, match="disposed") as caught:
            verb(repo)
        assert pair.home(pair.a) in str(caught.value)
    stats = repo.stats()
    assert (stats.attempts - stats.failed, stats.idle, stats.in_use, stats.connecting) == (attempts, 0, 0, 0)
    assert books_balance(repo)
    assert tag.label == "t of A"


def test_a_database_that_was_dropped(
    server: Server, make_databases: Callable[..., list[str]], repo: type[Repo]
) -> None:
    """A database dropped under its cached connections fails once, then says that it is missing, then works again."""
    (name,) = make_databases(1)
    with repo.using(name):
        repo.count(Tag)
        server.drop_database(name, force=True)
        try:
            with pytest.raises(OperationalError):
                repo.count(Tag)
            with pytest.raises(UnknownDatabaseError):
                repo.count(Tag)
            assert books_balance(repo)
        finally:
            server.create_database(name, template="template_app")
        assert repo.count(Tag) == 0
    assert books_balance(repo)
