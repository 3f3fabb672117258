"""Passwords: the right one is used, a wrong one never passes, and none is ever shown."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

import shardrepo
from shardrepo import AuthenticationError, Config, ConfigError, Database, Repo, UnknownDatabaseError
from shardrepo.testing.servers import Server

from ..conftest import books_balance
from ..models import Tag

pytestmark = pytest.mark.routing

PACKAGE = str(Path(shardrepo.__file__).parent)

SECRET = "hunter2-päss w'ord\\%40/@:?#&"
WRONG = "swordfish-" + SECRET
USER = "keeper"


@pytest.fixture(scope="module")
def keeper(server: Server) -> Iterator[str]:
    """A role whose password nobody may see."""
    with server.connect() as connection:
        role = psycopg.sql.Identifier(USER)
        connection.execute(
            psycopg.sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, psycopg.sql.Literal(SECRET))
        )
    yield USER
    with server.connect() as connection:
        connection.execute(f"DROP ROLE {USER}".encode())


@pytest.fixture
def repo(server: Server, keeper: str, two_databases: tuple[str, str]) -> Iterator[type[Repo]]:
    config = {
        "host": server.host,
        "port": server.port,
        "database": two_databases[0],
        "username": keeper,
        "password": SECRET,
        "engine_options": {"echo": "debug", "echo_pool": "debug"},
    }
    sqlalchemys = logging.getLogger("sqlalchemy")
    handlers = list(sqlalchemys.handlers)
    repo: type[Repo] = type("SecretRepo", (Repo,), {}, config=config)
    yield repo
    repo.dispose()
    sqlalchemys.handlers = handlers  # without the one to stdout that echo adds


def backend(repo: type[Repo]) -> int:
    pid: int = repo.execute("SELECT pg_backend_pid()").scalar_one()
    return pid


# The right password, and wrong ones


def test_a_wrong_password_after_a_right_one(repo: type[Repo]) -> None:
    """A connection that the right password opened is never given to a caller with a wrong one, and stays."""
    pid = backend(repo)
    for choice in ({"password": WRONG}, {"password": ""}, {"password": SECRET + " "}):
        with pytest.raises((AuthenticationError, ConfigError)), repo.using(choice):
            repo.execute("SELECT 1")
    assert backend(repo) == pid
    assert books_balance(repo)


def test_a_wrong_password_while_the_right_one_is_in_use(repo: type[Repo]) -> None:
    """Inside a transaction another password is another connection: it neither joins nor disturbs it."""
    with repo.transaction():
        pid = backend(repo)
        with repo.using(password=WRONG):
            assert not repo.in_transaction()
            with pytest.raises(AuthenticationError):
                repo.execute("SELECT 1")
        assert backend(repo) == pid


def test_a_wrong_password_in_a_complete_address(repo: type[Repo]) -> None:
    """Two that are equal but for the password are two choices."""
    address = repo.get_database()
    for password, refusal in ((SECRET, nullcontext()), (WRONG, pytest.raises(AuthenticationError))):
        with repo.using(replace(address, password=password)), refusal:
            assert repo.get_database() == address
            backend(repo)


def test_a_url_without_a_password_does_not_get_the_defaults(repo: type[Repo], server: Server) -> None:
    """A URL and a `Database` are complete: the default's password does not travel with them."""
    pid = backend(repo)
    address = repo.get_database()
    bare = Database(address.host, address.port, address.name, address.username)
    for choice in (address.url, bare):
        with repo.using(choice):
            assert repo.get_database() == address
            with pytest.raises(AuthenticationError):
                repo.execute("SELECT 1")
    assert backend(repo) == pid


def test_a_password_in_a_url(server: Server, keeper: str, repo: type[Repo]) -> None:
    """A password with every character that a URL has a meaning for arrives as it is."""
    url = server.url("postgres").set(username=keeper, password=SECRET)
    with repo.using(url):
        assert repo.execute("SELECT session_user").scalar_one() == keeper
    parsed: type[Repo] = type("Parsed", (Repo,), {}, config=url.render_as_string(hide_password=False))
    assert parsed.execute("SELECT session_user").scalar_one() == keeper
    parsed.dispose()


def test_a_changed_password_is_asked_anew(server: Server, keeper: str, repo: type[Repo]) -> None:
    """After a rotation the new password connects, the old one does not, and objects are at home still."""
    home = repo.get_database().home
    try:
        with server.connect() as connection:
            connection.execute(f"ALTER ROLE {keeper} PASSWORD 'rotated'".encode())
        with repo.using(password="rotated"):
            assert repo.execute("SELECT 1").scalar_one() == 1
            assert repo.get_database().home == home
        with pytest.raises(AuthenticationError):
            repo.execute("SELECT 1")
    finally:
        with server.connect() as connection:
            role = psycopg.sql.Identifier(keeper)
            connection.execute(psycopg.sql.SQL("ALTER ROLE {} PASSWORD {}").format(role, psycopg.sql.Literal(SECRET)))


def test_a_password_callable_is_asked_at_every_connect(server: Server, keeper: str) -> None:
    """A callable is asked once for each connection that is opened, and not before."""
    asked: list[str] = []

    def password() -> str:
        asked.append(SECRET)
        return SECRET

    config = {"host": server.host, "port": server.port, "database": "postgres", "username": keeper}
    repo: type[Repo] = type("Asking", (Repo,), {}, config={**config, "password": password})
    repo.get_database()
    assert len(asked) == 0
    repo.execute("SELECT 1")
    repo.execute("SELECT 1")
    assert len(asked) == 1
    with repo.transaction():
        repo.execute("SELECT 1")
        with repo.detached():
            repo.execute("SELECT 1")
    assert len(asked) == 2
    repo.disconnect_all()
    repo.execute("SELECT 1")
    repo.ping()
    assert len(asked) == 4
    repo.dispose()


class Vault(Exception):
    """What a password callable may raise."""


def test_a_password_callable_that_fails(server: Server, keeper: str) -> None:
    """The error of a callable reaches the caller, and the books stay right."""
    answers: list[Any] = [Vault("closed"), SECRET, 5, "nul\0", WRONG]

    def password() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        value: str = answer
        return value

    config = {"host": server.host, "port": server.port, "database": "postgres", "username": keeper}
    repo: type[Repo] = type("Asking", (Repo,), {}, config={**config, "password": password})
    with pytest.raises(Vault):
        repo.execute("SELECT 1")
    assert books_balance(repo)
    repo.execute("SELECT 1")
    for error in (ConfigError, ConfigError, AuthenticationError):
        repo.disconnect_all()
        with pytest.raises(error):
            repo.execute("SELECT 1")
        assert books_balance(repo)
    assert repo.stats().failed == 4
    repo.dispose()


# What is shown


class Everything(logging.Handler):
    """Keeps every record of every logger, formatted with all that it carries."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{self.format(record)} {record.__dict__!r}")


@pytest.fixture
def log() -> Iterator[Everything]:
    handler = Everything()
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    for name in ("sqlalchemy", "psycopg", "shardrepo"):
        logging.getLogger(name).setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(before)
    for name in ("sqlalchemy", "psycopg", "shardrepo"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def forms(secret: str) -> set[str]:
    """How a secret may show: as it is, as Python or SQL or a URL writes it, or the first word of it."""
    from urllib.parse import quote, quote_plus

    return {secret, repr(secret)[1:-1], quote(secret), quote_plus(secret), secret.split("-")[0]}


def assert_hidden(*texts: str, secrets: tuple[str, ...] = (SECRET, WRONG)) -> None:
    for shown in texts:
        for secret in secrets:
            for form in forms(secret):
                assert form not in shown


def told(error: BaseException) -> list[str]:
    """All that an error says: text, arguments, attributes, notes, and the library's frames with their locals."""
    shown = [str(error), repr(error), repr(error.args), repr(error.__dict__), *getattr(error, "__notes__", [])]
    seen: BaseException | None = error
    while seen is not None:
        trace = traceback.TracebackException.from_exception(seen, capture_locals=True)
        for frame in trace.stack:
            if frame.filename.startswith(PACKAGE) or "/site-packages/" in frame.filename:
                shown.append(f"{frame.filename} {frame.name} {frame.locals}")
        shown.extend(traceback.format_exception(seen))
        seen = seen.__cause__ or seen.__context__
    return shown


FAILURES: dict[str, Callable[[type[Repo]], Any]] = {
    "wrong password": lambda repo: use(repo, {"password": WRONG}),
    "unknown database": lambda repo: use(repo, {"database": "nowhere"}),
    "refused": lambda repo: use(repo, {"port": 1}),
    "no password": lambda repo: use(repo, repo.get_database().url),
    "a statement": lambda repo: repo.execute("SELECT * FROM nothing"),
    "a verb": lambda repo: repo.insert(Tag(label=None)),
    "a transaction": lambda repo: fail_in_a_transaction(repo),
    "ping": lambda repo: use(repo, {"password": WRONG}, repo.ping),
    "a session": lambda repo: use(repo, {"password": WRONG}, lambda: repo.session().execute(text("SELECT 1"))),
    "after dispose": lambda repo: (repo.dispose(), repo.execute("SELECT 1")),
}


def fail_in_a_transaction(repo: type[Repo]) -> None:
    with repo.transaction(), repo.session() as session:
        session.execute(text("SELECT nothing"))


def use(repo: type[Repo], choice: Any, verb: Callable[[], Any] | None = None) -> None:
    with repo.using(choice):
        verb() if verb is not None else repo.execute("SELECT 1")


@pytest.mark.parametrize("failure", FAILURES)
def test_no_error_shows_a_password(repo: type[Repo], log: Everything, failure: str) -> None:
    """Neither text, attributes, notes nor a traceback with the library's local variables shows a password."""
    with pytest.raises(Exception) as caught:  # each failure has an error of its own
        FAILURES[failure](repo)
    assert_hidden(*told(caught.value))
    assert_hidden(*log.lines)
    del caught
    gc.collect()


def test_an_unknown_connection_parameter_shows_no_password(server: Server, keeper: str) -> None:
    """The error about a parameter that libpq does not know, met while the password is at hand, hides it."""
    config = {"host": server.host, "port": server.port, "database": "postgres", "username": keeper, "password": SECRET}
    repo: type[Repo] = type("Wrong", (Repo,), {}, config={**config, "connect_args": {"no_such_parameter": "1"}})
    with pytest.raises(ConfigError, match="no_such_parameter") as caught:
        repo.execute("SELECT 1")
    assert_hidden(*told(caught.value))
    assert books_balance(repo)
    repo.dispose()


def test_a_password_that_cannot_be_sent_is_not_shown(server: Server, keeper: str) -> None:
    """The refusal of a password does not show it."""
    base = {"host": server.host, "port": server.port, "database": "postgres", "username": keeper}
    for password in (SECRET + "\0", 12345678901, SECRET.encode()):
        with pytest.raises(ConfigError) as caught:
            type("Wrong", (Repo,), {}, config={**base, "password": password})
        assert_hidden(str(caught.value), repr(caught.value), *traceback.format_exception(caught.value))
        assert "12345678901" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        type("Wrong", (Repo,), {}, config={**base, "password": SECRET, "url": f"postgresql://a:{'other'}@127.0.0.1/x"})
    assert_hidden(str(caught.value), repr(caught.value), *traceback.format_exception(caught.value))
    with pytest.raises(ConfigError) as caught:
        type("Wrong", (Repo,), {}, config=f"not a url {SECRET}")
    assert_hidden(str(caught.value), repr(caught.value), *traceback.format_exception(caught.value))


def test_no_choice_that_is_refused_shows_a_password(repo: type[Repo]) -> None:
    """A wrong choice with a password in it is refused without it."""
    for options in (
        {"databse": "x", "password": SECRET},
        {"database": "", "password": SECRET},
        {"port": "5432", "password": SECRET},
        {"passwrd": SECRET},
        {"query": {"password": SECRET}},
        {"query": {"sslmode": 1}, "password": SECRET},
    ):
        with pytest.raises(ConfigError) as caught:
            repo.set_database(options)
        assert_hidden(str(caught.value), repr(caught.value), *traceback.format_exception(caught.value))


def test_no_repr_shows_a_password(repo: type[Repo], server: Server, keeper: str) -> None:
    """No object of the library that a user can get hold of shows a password, nor does SQLAlchemy's over it."""
    url = server.url("postgres").set(username=keeper, password=SECRET)
    choice = [repo.set_database(url), repo.set_database(password=SECRET), repo.set_database(None)]
    with repo.using(password=SECRET), repo.transaction():
        session = repo.session()
        engine = repo.engine()
        connection = session.connection()
        raw = connection.connection
        things: list[object] = [
            *choice, repo, repo.get_database(), repo.stats(), session, engine, engine.url, engine.pool,
            engine.dialect, engine.pool.status(), connection, raw, raw.driver_connection, Config.of(url),
            Config.of({"url": url, "connect_args": {"sslmode": "prefer"}}),
        ]  # fmt: skip
        shown = [f"{thing!r} {thing!s}" for thing in things]
        shown += [repr(getattr(thing, "__dict__", "")) for thing in things]
        session.close()
    assert_hidden(*shown)


def test_no_log_record_shows_a_password(repo: type[Repo], log: Everything) -> None:
    """With every logger at DEBUG, echo of engine and pool included, no record shows a password."""
    repo.execute("SELECT 1")
    with repo.transaction():
        repo.execute("SELECT 1")
    with repo.using(password=WRONG), pytest.raises(AuthenticationError):
        repo.execute("SELECT 1")
    with repo.using("nowhere"), pytest.raises(UnknownDatabaseError):
        repo.execute("SELECT 1")
    repo.ping()
    repo.disconnect_all()
    repo.dispose()
    assert any("sqlalchemy.engine" in line for line in log.lines)
    assert any("Created new connection" in line for line in log.lines)
    assert_hidden(*log.lines)


def test_no_pickle_holds_a_password(repo: type[Repo]) -> None:
    """Databases, choices, objects and errors can be pickled, and copied, and their pickles hold no password."""
    repo.set_database(password=SECRET)
    choice = repo.set_database(repo.get_database())
    with pytest.raises(AuthenticationError) as caught, repo.using(password=WRONG):
        repo.execute("SELECT 1")
    with pytest.raises(DBAPIError) as refused:
        repo.execute("SELECT * FROM nothing")
    things: list[Any] = [repo.get_database(), choice, repo.set_database(None), caught.value, refused.value]
    for thing in things:
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            data = pickle.dumps(thing, protocol)
            assert SECRET.encode() not in data
            assert b"hunter2" not in data
            assert b"swordfish" not in data
            assert type(pickle.loads(data)) is type(thing)
    assert pickle.loads(pickle.dumps(repo.get_database())) == repo.get_database()
    assert pickle.loads(pickle.dumps(caught.value)).database == caught.value.database
    assert copy.deepcopy(repo.get_database()).password == SECRET


def test_the_server_never_gets_a_password_as_a_name(repo: type[Repo], server: Server) -> None:
    """What the server can show of a connection holds no password."""
    repo.execute("SELECT 1")
    with server.connect() as connection:
        shown = connection.execute("SELECT * FROM pg_stat_activity WHERE usename = %s", (USER,)).fetchall()
    assert shown
    assert_hidden(repr(shown))
