"""The statements that a server executed, as its own log has them."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

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
    """One statement as the server logged it; *prepared* is the name of its prepared statement, if any."""

    database: str
    pid: int
    application_name: str
    sql: str
    prepared: str | None = None


@dataclass
class CountedStatements:
    """The statements of one `count_statements` block: empty until the block ends."""

    statements: list[Statement] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.statements)


@contextlib.contextmanager
def count_statements(server: Server, *, database: str | None = None) -> Iterator[CountedStatements]:
    """Collect every statement that *server* executes during the block, as its own log has them.

    In the order in which the server logged them, whoever sent them, also from sessions that were open
    before; BEGIN, COMMIT and DEALLOCATE count. Complete for every statement whose answer arrived before
    the block ended. The list is filled when the block ends, also by an exception. With *database*, only
    the statements sent to that database. What the server refuses before it executes anything (a syntax
    error; an unknown table, when sent with parameters) is not among them.

    Raises:
        ValueError: The server does not log statements. Logging cannot be turned on afterwards: open
            sessions would take it up at a moment of their own, and their statements be missed until then.
    """
    if not server.log_statements:
        raise ValueError(f"{server!r} does not log its statements: start it with start_servers(log_statements=True)")
    counted = CountedStatements()
    offset = server.statement_log.stat().st_size
    begin = _mark(server)
    try:
        yield counted
    finally:
        end = _mark(server)
        records = _records(server.statement_log, offset, begin, end)
        found = filter(None, map(_statement, records))
        counted.statements.extend(one for one in found if database in (None, one.database))


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
