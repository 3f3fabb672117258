"""Opening a connection with psycopg: under one deadline, and with a reason when it fails.

Leans on six things that psycopg does not document, each tested in ``tests/test_private_api.py``: a
`psycopg.Connection` can be made from a `psycopg.pq.PGconn`; it takes its adapters from ``_adapters``, and whether
to begin a transaction from ``_autocommit``; every exchange with the server goes through its method ``wait``, as a
generator that yields what to wait for and is sent what came; and ``_prepared`` has what is prepared, and forgets it.
"""

from __future__ import annotations

import math
import os
import re
import selectors
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, Literal

import psycopg
from psycopg import pq
from psycopg.abc import AdaptContext
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import make_conninfo
from psycopg.errors import FeatureNotSupported, ReadOnlySqlTransaction

from .config import Config
from .context import deadline as call_deadline
from .database import Database, Secret, digest
from .errors import (
    AuthenticationError,
    ConfigError,
    ConnectError,
    ServerFullError,
    ServerUnavailableError,
    UnknownDatabaseError,
    WrongDatabaseError,
)
from .scram import Keys, KeyStore

_BAD: Final = pq.ConnStatus.BAD
_STARTED: Final = pq.ConnStatus.STARTED
_OK: Final = pq.PollingStatus.OK
_FAILED: Final = pq.PollingStatus.FAILED
_EVENTS: Final = {
    pq.PollingStatus.READING: selectors.EVENT_READ,
    pq.PollingStatus.WRITING: selectors.EVENT_WRITE,
}

# Whether libpq takes the keys that SCRAM derives from a password in its place, and which keys are known.
_TAKES_KEYS: Final = pq.version() >= 180000
_known: Final = KeyStore()

# Seconds for which the reason of a failed connect is taken for that of the next; and how many are remembered.
_REASON_KEPT: Final = 5.0
_MAX_REASONS: Final = 256

# The server's answer in libpq's trace: B <length> ErrorResponse S "FATAL" V "FATAL" C "28P01" M …
_SQLSTATE: Final = re.compile(rb'\tErrorResponse\t.*? C "([0-9A-Z]{5})"')

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_ERROR_OF: Final[Mapping[str, tuple[type[ConnectError], str]]] = {
    "28000": (AuthenticationError, "the server refused the user: check username and pg_hba.conf"),
    "28P01": (AuthenticationError, "the server refused the password: check username and password"),
    "3D000": (UnknownDatabaseError, "the server has no such database: create it, or choose another"),
    "53300": (
        ServerFullError,
        "the server has no connection left: lower pool_size, or raise the server's max_connections",
    ),
    "57P01": (ServerUnavailableError, "the server is shutting down: try again later"),
    "57P02": (ServerUnavailableError, "the server has crashed and is recovering: try again later"),
    "57P03": (ServerUnavailableError, "the server is starting up or shutting down: try again later"),
}


# DISCARD ALL without its DEALLOCATE ALL and DISCARD PLANS, so that prepared statements stay, in one round
# trip (https://www.postgresql.org/docs/current/sql-discard.html).
_RESET: Final = (
    "CLOSE ALL; SET SESSION AUTHORIZATION DEFAULT; RESET ALL; UNLISTEN *; "
    "SELECT pg_advisory_unlock_all(); DISCARD TEMP; DISCARD SEQUENCES"
)


# What a borrower may set on a connection beside what SQL sets in its session.
_SETTINGS: Final = ("row_factory", "cursor_factory", "server_cursor_factory", "prepare_threshold", "prepared_max")


# What a statement may fail with because its connection is of an earlier time, see `is_outdated_by`.
OUTDATED: Final = (FeatureNotSupported, ReadOnlySqlTransaction)

# The server's own function that refuses a plan of an earlier time, before anything of it has run; no message tells,
# as those are translated. And what a server reports that is read-only whatever a transaction asks for
# (https://www.postgresql.org/docs/current/libpq-status.html#LIBPQ-PQPARAMETERSTATUS); a pooler may keep it to itself.
_REVALIDATES: Final = "RevalidateCachedQuery"
_READ_ONLY: Final = (b"default_transaction_read_only", b"in_hot_standby")

# A peer that is gone is found out within a minute, where the system's own settings take two hours
# (https://www.postgresql.org/docs/current/libpq-connect.html, keepalives; the last one is in milliseconds).
_KEEPALIVE: Final = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}

# Stands for the owner of a connection whose borrower was lost; no process has this number.
_LOST: Final = -1

# Whether libpq can ask a server to stop without waiting for its answer for ever; and the seconds that it gets.
_CAN_CANCEL: Final = pq.version() >= 170000
_CANCEL: Final = 0.1

# Seconds that a server process gets to end.
_DEPARTURE: Final = 0.25


class DriverConnection(psycopg.Connection[Any]):
    """A psycopg connection that knows whether it was used, and whose it is.

    In a forked child, whose copy shares the parent's socket, nothing is sent and nothing is closed.

    Attributes:
        database: Where it leads.
        used: Whether anything was sent, or a setting changed, since `settle` or `rest`.
        pooled: Whether each transaction may run in another session of the server, as a pooler has it.
    """

    database: Database
    used: bool
    pooled: bool = False

    def __init__(self, pgconn: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(pgconn, *args, **kwargs)
        self._pid = os.getpid()
        self._deadline: float | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, "used", True)
        object.__setattr__(self, name, value)

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        if self._pid != os.getpid():
            owner = "the cache, which closes it" if self._pid == _LOST else "the parent process, which opened it"
            raise psycopg.OperationalError(f"this connection belongs to {owner}")
        object.__setattr__(self, "used", True)
        if self._deadline is None:
            return super().wait(gen, *args, **kwargs)
        try:
            return _until(self._deadline, gen, self.pgconn.socket)
        except (NoAnswer, KeyboardInterrupt):
            self._abort()
            raise

    def add_notice_handler(self, callback: Any) -> None:
        super().add_notice_handler(callback)
        object.__setattr__(self, "used", True)

    def add_notify_handler(self, callback: Any) -> None:
        super().add_notify_handler(callback)
        object.__setattr__(self, "used", True)

    def settle(self) -> None:
        """Take the settings that it has now for those that `reset` restores: everybody has prepared it."""
        self._settings = {name: getattr(self, name) for name in _SETTINGS}
        self._handlers = (tuple(self._notice_handlers), tuple(self._notify_handlers))
        self._own_adapters = AdaptersMap(self.adapters)
        self.rest()

    def rest(self) -> None:
        """Wait for the next borrower: not in autocommit mode, and unused."""
        self.set_autocommit_mode(False)
        self.limit(None)
        object.__setattr__(self, "used", False)

    def set_autocommit_mode(self, mode: bool) -> None:
        """Set `autocommit` outside a transaction, in one step where psycopg takes a lock and runs a generator."""
        object.__setattr__(self, "_autocommit", mode)

    def reset(self) -> None:
        """Undo whatever SQL, or a setting of this object, may have left in the session. One round trip.

        None if pooled: the session that SQL has changed belongs to somebody else by now.
        """
        for name, value in self._settings.items():
            setattr(self, name, value)
        self._notice_handlers[:], self._notify_handlers[:] = self._handlers
        self._adapters = AdaptersMap(self._own_adapters)
        self.isolation_level = None
        self.read_only = None
        self.deferrable = None
        self.autocommit = True
        if not self.pooled:
            self.execute(_RESET, prepare=False)

    def test(self, seconds: float) -> None:
        """Ask the server for a sign of life. Raises `NoAnswer` when there is none in time, else what psycopg raises."""
        self.set_autocommit_mode(True)
        self.limit(monotonic() + seconds)
        self.execute("", prepare=False)
        self.rest()

    def limit(self, deadline: float | None) -> float | None:
        """Wait for no answer beyond *deadline*, on the clock of `time.monotonic`: then close, and raise `NoAnswer`.

        Returns the deadline that it had before.
        """
        before = self._deadline
        object.__setattr__(self, "_deadline", deadline)
        return before

    def _abort(self) -> None:
        """Close, after asking the server to stop, which may go unheard."""
        if _CAN_CANCEL:
            with suppress(psycopg.Error):
                self.cancel_safe(timeout=_CANCEL)
        self.close()

    def lose(self) -> None:
        """Nobody may use it any more: its borrower is gone, and another thread will close it."""
        object.__setattr__(self, "_pid", _LOST)

    @property
    def is_at_rest(self) -> bool:
        """Whether it is in no transaction."""
        return self.pgconn.transaction_status == pq.TransactionStatus.IDLE

    def is_outdated_by(self, error: psycopg.Error) -> Literal["statements", "connection"] | None:
        """What of it *error* shows to be of an earlier time; None if it is the caller's own mistake.

        Its prepared statements, when the type of a column has changed since; all of it, when its server has become
        read-only, as one does that another has taken over from.
        """
        if isinstance(error, ReadOnlySqlTransaction):
            own = self.read_only or all(self.pgconn.parameter_status(name) == b"off" for name in _READ_ONLY)
            return None if own else "connection"
        return "statements" if error.diag.source_function == _REVALIDATES and self._prepared._names else None

    def forget_statements(self) -> None:
        """Drop what the server has prepared for this connection, before its next statement."""
        self._prepared.clear()

    @contextmanager
    def departure(self) -> Iterator[None]:
        """Wait, once the block has closed this connection, until the server has let go of it too; not for long."""
        socket = os.dup(self.fileno())
        try:
            yield
            _ready(socket, selectors.EVENT_READ, monotonic() + _DEPARTURE)
        finally:
            os.close(socket)

    def rollback(self) -> None:
        if self._pid == os.getpid():
            super().rollback()

    def close(self) -> None:
        if self._pid in (os.getpid(), _LOST):
            super().close()


class NoAnswer(psycopg.OperationalError):
    """The server did not answer in time."""


def _until(deadline: float, exchange: Any, socket: int) -> Any:
    """Go through an exchange with the server as psycopg's own `waiting.wait` does, but not beyond *deadline*."""
    try:
        awaited = next(exchange)
        with selectors.DefaultSelector() as selector:
            selector.register(socket, awaited)
            # Also when something comes all the time: a result without end is no answer either.
            while (left := deadline - monotonic()) > 0:
                found = selector.select(left)
                if found:
                    awaited = exchange.send(found[0][1])
                    selector.modify(socket, awaited)
        raise NoAnswer("the server did not answer in time")
    except StopIteration as ended:
        return ended.value


@dataclass(frozen=True, slots=True)
class Target:
    """Where to connect, and how: what one database's engine passes to every connect."""

    database: Database
    timeout: float
    prepare_threshold: int | None
    conninfo: str
    pooled: bool

    @classmethod
    def of(cls, database: Database, config: Config) -> Target:
        """Prepare connects to *database*. Raises `ConfigError` for a connection parameter that libpq does not know."""
        parameters = {**_KEEPALIVE, **dict(database.query), **config.connect_args}
        prepare_threshold = parameters.pop("prepare_threshold", None if config.pgbouncer else 5)
        try:
            conninfo = make_conninfo(
                host=database.host,
                # An empty one keeps PGHOSTADDR and service files from leading elsewhere.
                hostaddr="",
                port=database.port,
                dbname=database.name,
                user=database.username,
                application_name=config.application_name,
                **parameters,
            )
        except psycopg.ProgrammingError as error:
            raise ConfigError(f"cannot connect to {database.home}: {str(error).strip()}; see connect_args") from None
        return cls(database, config.connect_timeout, prepare_threshold, conninfo, config.pgbouncer)


@dataclass(slots=True)
class _Attempt:
    """One try at connecting: libpq's connection, and what has become of it."""

    pgconn: pq.abc.PGconn
    reached: bool = False
    timed_out: bool = False
    cut_short: bool = False
    trace: bytes = field(default=b"", repr=False)

    @property
    def succeeded(self) -> bool:
        return self.pgconn.status == pq.ConnStatus.OK and not self.timed_out

    @property
    def is_unexplained(self) -> bool:
        """Whether a server was reached and ended it, for a reason that only a trace would show."""
        return self.reached and not self.succeeded and not self.timed_out

    @property
    def sqlstate(self) -> str | None:
        found = _SQLSTATE.search(self.trace)
        return found[1].decode() if found else None


class _Reasons:
    """Why connects have failed of late: what fails again in the same words is not traced again."""

    def __init__(self) -> None:
        self._found: dict[object, tuple[bytes, bytes, float]] = {}

    def has(self, login: object) -> bool:
        """Whether this *login* (a target, and the digest of a password) has failed within the last seconds."""
        found = self._found.get(login)
        return found is not None and monotonic() < found[2]

    def explain(self, attempt: _Attempt, login: object) -> bool:
        """Give *attempt* the trace of the one before, if that has failed in the same words."""
        found = self._found.get(login)
        if found is None or monotonic() >= found[2] or found[0] != attempt.pgconn.error_message:
            return False
        attempt.trace = found[1]
        return True

    def learn(self, attempt: _Attempt, login: object) -> None:
        """Remember why *attempt* has failed."""
        if len(self._found) >= _MAX_REASONS:
            self._found.clear()
        self._found[login] = attempt.pgconn.error_message, attempt.trace, monotonic() + _REASON_KEPT


_reasons: Final = _Reasons()


def connect(target: Target, context: AdaptContext | None) -> DriverConnection:
    """Open a connection to the target's database, or fail within its timeout.

    The timeout covers everything but libpq's look-up of a host name, which it does not let go of.

    Raises:
        ConnectError: One of its subclasses where the cause can be told.
        WrongDatabaseError: The connection leads to another database than the one that was named.
    """
    attempt = _attempt(target)
    if not attempt.succeeded:
        raise _error_of(attempt, target)
    attempt.pgconn.nonblocking = 1
    connection = DriverConnection(attempt.pgconn)
    connection.database = target.database
    connection.pooled = target.pooled
    connection.prepare_threshold = target.prepare_threshold
    if context is not None:
        connection._adapters = AdaptersMap(context.adapters)
    _check_address(connection, target.database)
    return connection


def _attempt(target: Target) -> _Attempt:
    """Connect with the keys of the password if they are known, else with the password.

    What failed is tried once more, with the password and under libpq's trace, to learn the reason or new keys.
    """
    database = target.database
    deadline = min(monotonic() + target.timeout, call_deadline.get() or math.inf)
    password = _password_of(database)
    login = target.conninfo, digest(password)
    # PgBouncer makes up a new salt for each login, or has one per server behind it: no keys are good for the next one.
    takes_keys = _TAKES_KEYS and not target.pooled
    keys = _known.get(database, password) if takes_keys else None
    traced = takes_keys and not _known.has(database, password) and not _reasons.has(login)
    attempt = _try(target, password, keys, deadline, traced=traced)
    if attempt.is_unexplained and not traced and not _reasons.explain(attempt, login):
        attempt.pgconn.finish()
        attempt, traced = _try(target, password, None, deadline, traced=True), True
    if attempt.is_unexplained and traced:
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


def _try(target: Target, password: Secret | None, keys: Keys | None, deadline: float, *, traced: bool) -> _Attempt:
    """Run libpq's connect until *deadline*. No secret is in a local variable while it waits."""
    attempt = _Attempt(pq.PGconn.connect_start(_conninfo(target, password, keys)))
    with _Trace(attempt.pgconn, wanted=traced) as trace:
        while attempt.pgconn.status != _BAD:
            polled = attempt.pgconn.connect_poll()
            if polled in (_OK, _FAILED):
                break
            attempt.reached = attempt.reached or attempt.pgconn.status != _STARTED
            if not _ready(attempt.pgconn.socket, _EVENTS[pq.PollingStatus(polled)], deadline):
                attempt.timed_out = True
                attempt.cut_short = deadline == call_deadline.get()
                break
        attempt.trace = trace.read()
    return attempt


def _conninfo(target: Target, password: Secret | None, keys: Keys | None) -> bytes:
    # Never raises: its frame holds what no traceback may show.
    conninfo = target.conninfo
    if password is not None:
        conninfo += f" password={_quoted(password.reveal())}"
    if keys is not None:
        conninfo += f" scram_client_key={keys.client} scram_server_key={keys.server}"
    return conninfo.encode()


def _quoted(value: str) -> str:
    # https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-CONNSTRING-KEYWORD-VALUE
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _ready(socket: int, event: int, deadline: float) -> bool:
    """Wait for the socket; False when the deadline comes first."""
    with selectors.DefaultSelector() as selector:
        selector.register(socket, event)
        while (left := deadline - monotonic()) > 0:
            if selector.select(left):
                return True
    return False


class _Trace:
    """libpq's trace of one connect, kept in memory: the only place that has the server's SQLSTATE.

    libpq writes it on Linux only; elsewhere there is none and the cause of a failure stays untold. Each trace
    costs 4 KiB for good, because psycopg does not close the stream that it makes for libpq: for failures, and for
    the first connect with a password, not for every connect.
    """

    __slots__ = ("_file", "_pgconn", "_wanted")

    def __init__(self, pgconn: pq.abc.PGconn, *, wanted: bool = True) -> None:
        self._pgconn = pgconn
        self._wanted = wanted
        self._file: int | None = None

    def __enter__(self) -> _Trace:
        if self._wanted and hasattr(os, "memfd_create"):
            self._file = os.memfd_create("shardrepo-connect")
            self._pgconn.trace(self._file)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._pgconn.untrace()
            os.close(self._file)
            self._file = None

    def read(self) -> bytes:
        if self._file is None:
            return b""
        self._pgconn.untrace()  # which also flushes what was written
        return os.pread(self._file, 1 << 20, 0)


def _error_of(attempt: _Attempt, target: Target) -> ConnectError:
    """Tell why an attempt failed, and end it."""
    text = attempt.pgconn.error_message.decode(errors="replace").strip()
    wants_password = attempt.pgconn.needs_password
    # Before libpq 18 the trace begins after authentication: a server that had asked for the password and then
    # ended it has refused it.
    refused = not _TAKES_KEYS and attempt.pgconn.used_password and not attempt.timed_out
    attempt.pgconn.finish()
    home = target.database.home
    if attempt.cut_short:
        text = "no answer within the call's own timeout"
    elif attempt.timed_out:
        text = f"no answer within connect_timeout={target.timeout} s"
    kind, remedy = ConnectError, "see the driver's message"
    facts: dict[str, Any] = {}
    if attempt.sqlstate is not None:
        kind, remedy = _ERROR_OF.get(attempt.sqlstate, (kind, remedy))
    elif wants_password:
        kind, remedy = AuthenticationError, "the server wants a password: add one to the config"
    elif refused:
        kind, remedy = AuthenticationError, "the server refused the password: check username and password"
    elif attempt.timed_out or not attempt.reached:
        kind, remedy = ServerUnavailableError, "check host and port, and that the server runs"
        facts["reason"] = "refused" if not attempt.timed_out else "deadline" if attempt.cut_short else "timeout"
    if kind is ServerUnavailableError:
        facts.setdefault("reason", "starting")
    return kind(
        f"cannot connect to {home}: {text} ({remedy})",
        database=target.database,
        sqlstate=attempt.sqlstate,
        orig=psycopg.OperationalError(text),
        **facts,
    )


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
