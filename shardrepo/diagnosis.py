"""Why a connect failed: from libpq's trace of it, or from the server, asked in another of its databases.

psycopg has no SQLSTATE for a connect, and the server's text may be in any language.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final

import psycopg
from psycopg import pq

from .database import Database
from .errors import AuthenticationError, ConnectError, ServerFullError, ServerUnavailableError, UnknownDatabaseError

# Whether libpq's trace shows the login too: before version 18 it begins after that.
TRACES_LOGIN: Final = pq.version() >= 180000

NO_SUCH_DATABASE: Final = "3D000"

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_ERROR_OF: Final[Mapping[str, tuple[type[ConnectError], str]]] = {
    "28000": (AuthenticationError, "the server refused the user: check username and pg_hba.conf"),
    "28P01": (AuthenticationError, "the server refused the password: check username and password"),
    NO_SUCH_DATABASE: (UnknownDatabaseError, "the server has no such database: create it, or choose another"),
    "53300": (
        ServerFullError,
        "the server has no connection left: lower pool_size, or raise the server's max_connections",
    ),
    "57P01": (ServerUnavailableError, "the server is shutting down: try again later"),
    "57P02": (ServerUnavailableError, "the server has crashed and is recovering: try again later"),
    "57P03": (ServerUnavailableError, "the server is starting up or shutting down: try again later"),
}

# The server's answer in libpq's trace: B <length> ErrorResponse S "FATAL" V "FATAL" C "28P01" M …
_SQLSTATE: Final = re.compile(rb'\tErrorResponse\t.*? C "([0-9A-Z]{5})"')

# Seconds for which the reason of a failed connect is taken for that of the next; and how many are remembered.
_KEPT: Final = 5.0
_MAX_KEPT: Final = 256


@dataclass(slots=True)
class Attempt:
    """One try at connecting: libpq's connection, and what has become of it.

    Attributes:
        pgconn: libpq's connection.
        reached: Whether a server was there.
        timed_out: Whether it did not answer in time.
        cut_short: Whether that was the caller's time, not the connect's own.
        traced: Whether that was traced: its own connect, or one before that failed in the same words.
        trace: What libpq and the server told each other.
        sqlstate: The server's reason for a refusal, if that is known.
        before: What became of other addresses of the same host.
    """

    pgconn: pq.abc.PGconn
    reached: bool = False
    timed_out: bool = False
    cut_short: bool = False
    traced: bool = False
    trace: bytes = field(default=b"", repr=False)
    sqlstate: str | None = None
    before: str = ""

    @property
    def succeeded(self) -> bool:
        return self.pgconn.status == pq.ConnStatus.OK and not self.timed_out

    @property
    def was_refused(self) -> bool:
        """Whether a server was reached and ended it, for a reason of its own."""
        return self.reached and not self.succeeded and not self.timed_out

    @property
    def is_unexplained(self) -> bool:
        """Whether a server ended it, and nobody was listening when it said why."""
        return self.was_refused and not self.traced and not self.pgconn.needs_password

    @property
    def text(self) -> str:
        """What libpq or the server said, in its own words."""
        return self.pgconn.error_message.decode(errors="replace").strip()

    def read(self, trace: Trace) -> None:
        """Take what was traced of it."""
        self.traced, self.trace = trace.is_on, trace.read()
        found = _SQLSTATE.search(self.trace)
        self.sqlstate = found[1].decode() if found else None


class Reasons:
    """Why connects have failed of late: what fails again in the same words is not looked into again."""

    def __init__(self) -> None:
        self._found: dict[object, tuple[float, str, str | None, bool]] = {}

    def has(self, login: object) -> bool:
        """Whether this *login* (a target, and the digest of a password) has failed within the last seconds."""
        found = self._found.get(login)
        return found is not None and monotonic() < found[0]

    def explain(self, attempt: Attempt, login: object) -> bool:
        """Give *attempt* the reason of the one before, if that has failed in the same words."""
        found = self._found.get(login)
        if found is None or monotonic() >= found[0] or found[1] != attempt.text:
            return False
        _, _, attempt.sqlstate, attempt.traced = found
        return True

    def learn(self, attempt: Attempt, login: object) -> None:
        """Remember why *attempt* has failed."""
        if len(self._found) >= _MAX_KEPT:
            self._found.clear()
        self._found[login] = (monotonic() + _KEPT, attempt.text, attempt.sqlstate, attempt.traced)


class Trace:
    """libpq's trace of one connect, kept in memory.

    libpq writes it on Linux only; elsewhere it is empty. Each trace costs 4 KiB for good, because psycopg does not
    close the stream that it makes for libpq: for failures, and for the first connect with a password, not for every
    connect.
    """

    __slots__ = ("_file", "_pgconn", "_wanted")

    def __init__(self, pgconn: pq.abc.PGconn, *, wanted: bool = True) -> None:
        self._pgconn = pgconn
        self._wanted = wanted
        self._file: int | None = None

    def __enter__(self) -> Trace:
        if self._wanted and hasattr(os, "memfd_create"):
            self._file = os.memfd_create("shardrepo-connect")
            self._pgconn.trace(self._file)
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._file is not None:
            self._pgconn.untrace()
            os.close(self._file)
            self._file = None

    @property
    def is_on(self) -> bool:
        return self._file is not None

    def read(self) -> bytes:
        if self._file is None:
            return b""
        self._pgconn.untrace()  # which also flushes what was written
        return os.pread(self._file, 1 << 20, 0)


def error_of(attempt: Attempt, database: Database, timeout: float) -> ConnectError:
    """Tell why *attempt*, which had *timeout* seconds, has failed."""
    text = attempt.text
    if attempt.cut_short:
        text = "no answer within the call's own timeout"
    elif attempt.timed_out:
        text = f"no answer within connect_timeout={timeout} s"
    if attempt.before:
        text = f"{text}; before that: {attempt.before}"
    kind, remedy = ConnectError, "see the driver's message"
    facts: dict[str, Any] = {}
    if attempt.sqlstate is not None:
        kind, remedy = _ERROR_OF.get(attempt.sqlstate, (kind, remedy))
    elif attempt.pgconn.needs_password:
        kind, remedy = AuthenticationError, "the server wants a password: add one to the config"
    elif attempt.traced and not TRACES_LOGIN and attempt.pgconn.used_password and not attempt.timed_out:
        # It was refused before the trace began, and after the password was asked for.
        kind, remedy = _ERROR_OF["28P01"]
    elif attempt.timed_out or not attempt.reached:
        kind, remedy = ServerUnavailableError, "check host and port, and that the server runs"
        facts["reason"] = "refused" if not attempt.timed_out else "deadline" if attempt.cut_short else "timeout"
    if kind is ServerUnavailableError:
        facts.setdefault("reason", "starting")
    return kind(
        f"cannot connect to {database.home}: {text} ({remedy})",
        database=database,
        sqlstate=attempt.sqlstate,
        orig=psycopg.OperationalError(text),
        **facts,
    )
