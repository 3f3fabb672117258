"""The statements that a server executed, as its own log has them, or that a repo sent, as its events tell them."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .. import event
from ..repo import Repo
from .watchdog import POLL

if TYPE_CHECKING:
    from .servers import Server

_COUNTER = "shardrepo-count-statements"
_LOG_TIMEOUT = 10.0
_STATEMENT = re.compile(r"(?:statement|execute (?:fetch from )?(?P<prepared>.*?)(?:/.*?)?): (?P<sql>.*)", re.DOTALL)

# What a server needs in its configuration to log statements where they are looked for.
STATEMENT_LOG = {
    "log_statement": "all",
    "logging_collector": "on",
    "log_destination": "jsonlog",
    "log_filename": "statements.log",
    "log_rotation_age": "0",
    "log_rotation_size": "0",
}


@dataclass(frozen=True)
class Statement:
    """One statement as the server logged it; *prepared* is the name of its prepared statement, if any.

    Where a repo tells of it, the server's *pid* is not known, nor whether it was prepared.
    """

    database: str
    pid: int | None
    application_name: str
    sql: str
    prepared: str | None = None


@dataclass
class CountedStatements:
    """The statements of one `count_statements` block: empty until the block ends."""

    statements: list[Statement] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.statements)

    def __iter__(self) -> Iterator[Statement]:
        return iter(self.statements)

    def of(self, database: str) -> list[Statement]:
        """Those that were sent to the database of that name."""
        return [one for one in self.statements if one.database == database]


@contextlib.contextmanager
def count_statements(source: Server | type[Repo], *, database: str | None = None) -> Iterator[CountedStatements]:
    """Collect every statement that is sent during the block. The list is filled when it ends, also by an exception.

    Of a server that we started: what it executes, as its own log has it, in the order in which it logged it. Whoever
    sent it, also from sessions that were open before; BEGIN, COMMIT and DEALLOCATE count. Complete for every statement
    whose answer arrived before the block ended. What the server refuses before it executes anything (a syntax error;
    an unknown table, when sent with parameters) is not among them.

    Of a repo, on whatever servers: what it sends, as its ``query`` events tell it, also what fails. From every thread
    and for every repo that shares its cache; BEGIN and COMMIT do not count, nor does what the cache itself asks.

    Args:
        database: The name of the only database whose statements count.

    Raises:
        ValueError: The server does not log statements. Logging cannot be turned on afterwards: open
            sessions would take it up at a moment of their own, and their statements be missed until then.
    """
    counted = CountedStatements()
    with _logged(source) if not isinstance(source, type) else _told(source) as found:
        try:
            yield counted
        finally:
            counted.statements.extend(one for one in found() if database in (None, one.database))


@contextlib.contextmanager
def _told(repo: type[Repo]) -> Iterator[Callable[[], list[Statement]]]:
    """What yields the statements that *repo* has sent since the block began."""
    name = repo._router.databases.config.application_name
    statements: list[Statement] = []

    def note(happened: event.Event) -> None:
        statements.append(Statement(happened.database.name, None, name, happened.statement or ""))

    event.listen(repo, "query", note)
    try:
        yield lambda: list(statements)
    finally:
        event.remove(repo, "query", note)


@contextlib.contextmanager
def _logged(server: Server) -> Iterator[Callable[[], list[Statement]]]:
    """What yields the statements that *server* has logged since the block began."""
    if not server.log_statements:
        raise ValueError(f"{server!r} does not log its statements: start it with start_servers(log_statements=True)")
    offset = server.statement_log.stat().st_size
    begin = _mark(server)

    def found() -> list[Statement]:
        records = _records(server.statement_log, offset, begin, _mark(server))
        return list(filter(None, map(_statement, records)))

    yield found


def _mark(server: Server) -> str:
    """Have a statement logged that nobody else sends, on a connection of its own, and return its mark.

    A connection kept open from one mark to the other would not survive a restart of the server.
    """
    mark = secrets.token_hex(16)
    with server.connect(application_name=_COUNTER) as connection:
        connection.execute(f"SELECT '{mark}'".encode())
    return mark


def _records(log: Path, offset: int, begin: str, end: str) -> list[dict[str, Any]]:
    """Return what was logged between two marks, waiting until the second has reached the file.

    Every session writes to the collector's one pipe, before it executes: what was answered before *end*
    was sent lies before it in the file.
    """
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(offset)
        lines = _follow(file)
        next(line for line in lines if begin in line)
        return [json.loads(line) for line in itertools.takewhile(lambda line: end not in line, lines)]


def _follow(file: TextIO) -> Iterator[str]:
    """Yield the file's complete lines as they are written."""
    deadline = time.monotonic() + _LOG_TIMEOUT
    rest = ""
    while time.monotonic() < deadline:
        *lines, rest = (rest + file.read()).split("\n")
        yield from lines
        time.sleep(POLL)
    raise TimeoutError(f"the end of the counted statements did not reach {file.name} in {_LOG_TIMEOUT} s")


def _statement(record: Mapping[str, Any]) -> Statement | None:
    """Return the statement that a record of the log is about, None for any other record, and our marks."""
    logged = _STATEMENT.fullmatch(record.get("message", ""))
    application = record.get("application_name", "")
    if logged is None or record["error_severity"] != "LOG" or application == _COUNTER:
        return None
    prepared = None if logged["prepared"] == "<unnamed>" else logged["prepared"]
    return Statement(record["dbname"], record["pid"], application, logged["sql"], prepared)
