"""Opening a connection with psycopg: under one deadline, and with a reason when it fails."""

from __future__ import annotations

import ipaddress
import math
import os
import selectors
import socket
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Final

import psycopg
from psycopg import pq
from psycopg.abc import AdaptContext
from psycopg.conninfo import make_conninfo

from .calls import deadline as call_deadline
from .checks import Check
from .config import Config
from .connection import DriverConnection, NoAnswer, ready
from .database import Database, Secret, digest
from .diagnosis import NO_SUCH_DATABASE, TRACES_LOGIN, Attempt, Reasons, Trace, error_of
from .errors import ConfigError, ConnectError, ServerUnavailableError, WrongDatabaseError
from .scram import Keys, KeyStore

_BAD: Final = pq.ConnStatus.BAD
_STARTED: Final = pq.ConnStatus.STARTED
_OK: Final = pq.PollingStatus.OK
_FAILED: Final = pq.PollingStatus.FAILED
_EVENTS: Final = {
    pq.PollingStatus.READING: selectors.EVENT_READ,
    pq.PollingStatus.WRITING: selectors.EVENT_WRITE,
}

# A peer that is gone is found out within a minute, where the system's own settings take two hours
# (https://www.postgresql.org/docs/current/libpq-connect.html, keepalives; the last one is in milliseconds).
_KEEPALIVE: Final = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}

# Which keys, that libpq takes from version 18 on in place of a password, are known; and why connects have failed.
_known: Final = KeyStore()
_reasons: Final = Reasons()

# Held per server by whoever asks it why it refused a connect.
_asking: Final[dict[str, threading.Lock]] = {}
os.register_at_fork(after_in_child=_asking.clear)


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect, and how: what one database's engine passes to every connect."""

    database: Database
    timeout: float
    prepare_threshold: int | None
    conninfo: str
    pooled: bool
    reads_only: bool
    maintenance_database: str
    check: Check | None = None

    @classmethod
    def of(cls, database: Database, config: Config, check: Check | None = None) -> Target:
        """Prepare connects to *database*. Raises `ConfigError` for a connection parameter that libpq does not know."""
        parameters = {**_KEEPALIVE, **dict(database.query), **config.connect_args}
        prepare_threshold = parameters.pop("prepare_threshold", None if config.pgbouncer else 5)
        if config.read_only:
            given = parameters.get("options", os.environ.get("PGOPTIONS", ""))
            parameters["options"] = f"{given} -c default_transaction_read_only=on"
        try:
            conninfo = make_conninfo(
                host=database.host,
                port=database.port,
                dbname=database.name,
                user=database.username,
                application_name=config.application_name,
                **parameters,
            )
        except psycopg.ProgrammingError as error:
            raise ConfigError(f"cannot connect to {database.home}: {str(error).strip()}; see connect_args") from None
        return cls(
            database=database,
            timeout=config.connect_timeout,
            prepare_threshold=prepare_threshold,
            conninfo=conninfo,
            pooled=config.pgbouncer,
            reads_only=config.read_only,
            maintenance_database=config.maintenance_database,
            check=check,
        )


def connect(target: Target, context: AdaptContext | None) -> DriverConnection:
    """Open a connection to the target's database, or fail within its timeout.

    The timeout covers everything but the look-up of a host name, which the system does not let go of. A host with
    several addresses is tried at each of them, in the system's order, for an equal part of the time that is left.

    Raises:
        ConnectError: One of its subclasses where the cause can be told.
        WrongDatabaseError: The connection leads to another database than the one that was named.
        DatabaseBehindError: Its database lacks too many revisions, and the target's check refuses that.
        ConfigError: That check has no migrations to go by.
    """
    if target.check is not None:
        target.check.prepare()
    deadline = min(monotonic() + target.timeout, call_deadline.get() or math.inf)
    attempt = _attempt(target, deadline)
    if not attempt.succeeded:
        try:
            raise error_of(attempt, target.database, target.timeout)
        finally:
            attempt.pgconn.finish()
    connection = _opened(attempt, target)
    _check_address(connection, target.database)
    if target.check is not None:
        _run(target.check, connection, target, deadline)
    connection.prepare_threshold = target.prepare_threshold
    if context is not None:
        connection.adapt_as(context)
    return connection


def _opened(attempt: Attempt, target: Target) -> DriverConnection:
    attempt.pgconn.nonblocking = 1
    connection = DriverConnection(attempt.pgconn)
    connection.database = target.database
    connection.pooled = target.pooled
    connection.reads_only = target.reads_only
    return connection


def _attempt(target: Target, deadline: float) -> Attempt:
    """Connect with the keys of the password if they are known, else with the password.

    What failed is tried once more, with the password and under libpq's trace, to learn the reason or new keys.
    """
    database = target.database
    password = _password_of(database)
    login = target.conninfo, digest(password)
    # PgBouncer makes up a new salt for each login, or has one per server behind it: no keys are good for the next one.
    takes_keys = TRACES_LOGIN and not target.pooled
    keys = _known.get(database, password) if takes_keys else None
    traced = takes_keys and not _known.has(database, password) and not _reasons.has(login)
    attempt = _try(target, password, keys, deadline, traced=traced)
    if attempt.was_refused and not traced and not _reasons.explain(attempt, login):
        attempt.pgconn.finish()
        attempt, traced = _try(target, password, None, deadline, traced=True), True
    if attempt.is_unexplained:
        _ask(attempt, target, password, login, deadline)
    elif attempt.was_refused and traced:
        _reasons.learn(attempt, login)
    if attempt.succeeded and traced and takes_keys:
        _known.learn(database, password, attempt.trace)
    return attempt


def _password_of(database: Database) -> Secret | None:
    given = database.password() if callable(database.password) else database.password
    if isinstance(given, str) and "\0" not in given:
        return Secret(given)
    if given is None or isinstance(given, Secret):
        return given
    raise ConfigError(f"the password callable of {database.home} must return a string without NUL characters")


def _try(target: Target, password: Secret | None, keys: Keys | None, deadline: float, *, traced: bool) -> Attempt:
    """Connect to one address of the target's host after the other, until a server answers."""
    *others, last = _addresses(target.database)
    before: list[str] = []
    for number, address in enumerate(others):
        now = monotonic()
        share = now + (deadline - now) / (len(others) + 1 - number)
        attempt = _try_address(target, address, password, keys, share, traced=traced)
        if attempt.succeeded or attempt.was_refused:
            return attempt
        before.append(f"{address}: {'no answer' if attempt.timed_out else attempt.text}")
        attempt.pgconn.finish()
    attempt = _try_address(target, last, password, keys, deadline, traced=traced)
    attempt.before = "; ".join(before)
    attempt.cut_short = attempt.timed_out and deadline == call_deadline.get()
    return attempt


def _addresses(database: Database) -> Sequence[str]:
    """The addresses of a host's name; libpq knows what else a host may be."""
    if _is_no_name(database.host):
        return ("",)
    try:
        found = socket.getaddrinfo(database.host, database.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServerUnavailableError(
            f"cannot connect to {database.home}: {database.host!r} has no address: {error} (check host and port, and "
            "that the server runs)",
            reason="refused",
            database=database,
            orig=psycopg.OperationalError(str(error)),
        ) from None
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _is_no_name(host: str) -> bool:
    """Whether *host* is an address, or the folder or abstract name of a socket."""
    if host.startswith(("/", "@")):
        return True
    with suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return False


def _try_address(
    target: Target, address: str, password: Secret | None, keys: Keys | None, deadline: float, *, traced: bool
) -> Attempt:
    """Run libpq's connect until *deadline*. No secret is in a local variable while it waits."""
    attempt = Attempt(pq.PGconn.connect_start(_conninfo(target, address, password, keys)))
    with Trace(attempt.pgconn, wanted=traced) as trace:
        while attempt.pgconn.status != _BAD:
            polled = attempt.pgconn.connect_poll()
            if polled in (_OK, _FAILED):
                break
            attempt.reached = attempt.reached or attempt.pgconn.status != _STARTED
            if not ready(attempt.pgconn.socket, _EVENTS[pq.PollingStatus(polled)], deadline):
                attempt.timed_out = True
                break
        attempt.read(trace)
    return attempt


def _conninfo(target: Target, address: str, password: Secret | None, keys: Keys | None) -> bytes:
    # Never raises: its frame holds what no traceback may show. An empty address keeps PGHOSTADDR and service files
    # from leading elsewhere.
    conninfo = f"{target.conninfo} hostaddr={_quoted(address)}"
    if password is not None:
        conninfo += f" password={_quoted(password.reveal())}"
    if keys is not None:
        conninfo += f" scram_client_key={keys.client} scram_server_key={keys.server}"
    return conninfo.encode()


def _quoted(value: str) -> str:
    # https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-KEYWORD-VALUE
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _ask(attempt: Attempt, target: Target, password: Secret | None, login: object, deadline: float) -> None:
    """Ask a server that gave no reason that could be read, in another of its databases, whether it has this one.

    In the failed connect's place, and one at a time per server; the answer is remembered.
    """
    turn = _asking.setdefault(target.database.server, threading.Lock())
    if not turn.acquire(timeout=max(0.0, deadline - monotonic())):
        return
    try:
        if not _reasons.explain(attempt, login):
            attempt.sqlstate = NO_SUCH_DATABASE if _is_missing(target, password, deadline) else None
            _reasons.learn(attempt, login)
    finally:
        turn.release()


def _is_missing(target: Target, password: Secret | None, deadline: float) -> bool:
    """Whether the server says that it has no database of that name; False if it says nothing."""
    name = target.maintenance_database
    attempt = _try(
        replace(target, conninfo=make_conninfo(target.conninfo, dbname=name)), password, None, deadline, traced=False
    )
    if not attempt.succeeded:
        attempt.pgconn.finish()
        return False
    with closing(_opened(attempt, target)) as connection, suppress(psycopg.Error):
        connection.set_autocommit_mode(True)
        connection.limit(deadline)
        found = connection.execute("SELECT FROM pg_catalog.pg_database WHERE datname = %s", (target.database.name,))
        return found.rowcount == 0
    return False


def _check_address(connection: DriverConnection, database: Database) -> None:
    """Make sure that libpq went where it was sent, whatever the name, the environment or a file said."""
    pgconn = connection.pgconn
    found = (pgconn.host.decode(), int(pgconn.port), pgconn.db.decode())
    if found != (database.host, database.port, database.name):
        connection.close()
        host, port, name = found
        raise WrongDatabaseError(
            f"asked for {database.home}, libpq connected to {host}:{port}/{name}: nothing was sent to it",
            expected=database.home,
            found=f"{host}:{port}/{name}",
        )


def _run(check: Check, connection: DriverConnection, target: Target, deadline: float) -> None:
    """Have *connection* checked until *deadline*; it is closed unless it passes, and as new if it does."""
    connection.prepare_threshold = None
    connection.set_autocommit_mode(True)
    connection.limit(deadline)
    try:
        check.run(connection)
        connection.rest()
    except BaseException as error:
        connection.close()
        if isinstance(error, psycopg.Error):
            raise _unanswered(error, target, deadline) from error
        raise


def _unanswered(error: psycopg.Error, target: Target, deadline: float) -> ConnectError:
    """Tell why a check got no answer. No sign that the server is down: it has just let somebody in, and a lock on the
    version table may be all that there is to it."""
    text, cut_short = str(error), False
    if isinstance(error, NoAnswer):
        cut_short = deadline == call_deadline.get()
        limit = "the call's own timeout" if cut_short else f"connect_timeout={target.timeout} s"
        text = f"no answer within {limit}"
    message = (
        f"cannot connect to {target.database.home}: it was let in, then asked which database it is and at which "
        f"revision: {text} (see verify_database and require_head; the user has to be allowed to read version_table)"
    )
    facts: dict[str, Any] = {"database": target.database, "sqlstate": error.sqlstate, "orig": error}
    return ServerUnavailableError(message, reason="deadline", **facts) if cut_short else ConnectError(message, **facts)
