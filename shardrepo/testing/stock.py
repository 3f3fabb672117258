"""The databases that a test run makes on one server: a template, copies of it that last as long as the run, fresh ones.

The processes of a run share the template and what lasts. Whoever comes first makes it, and the last to leave drops it;
a run that was killed has its databases dropped by the next. What is ours is known by PostgreSQL's comment on it, and
nothing else is ever used or dropped; whether a run goes on, by an advisory lock that each of its processes holds.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import psycopg
from psycopg.sql import SQL, Identifier
from sqlalchemy.engine import URL

from .address import ServerAt, comment_on

APPLICATION: Final = "shardrepo-tests"

_COMMENT: Final = "made by the shardrepo test run {run}"
_UNFINISHED: Final = ", which has not finished it"
_OURS: Final = re.compile(rf"{_COMMENT.format(run='(?P<run>[0-9a-f]+)')}(?P<unfinished>{_UNFINISHED})?")


class StockError(RuntimeError):
    """A database for tests cannot be made. The message says why, and what to do."""


class Stock:
    """The databases of one test run on one server, as one of its processes sees them. Not thread-safe.

    Args:
        schema: Makes the schema of the template, given the URL of an empty database; leaves no session open there.
        run: Hexadecimal digits that the processes of the run have in common, and no other run.
        worker: The name of this process among them.
    """

    def __init__(self, server: ServerAt, schema: Callable[[URL], object], run: str, worker: str) -> None:
        self._server = server
        self._schema = schema
        self._run = run
        self._worker = worker
        self._numbers = itertools.count(1)
        self._template: str | None = None
        self._lasting: set[str] = set()
        # Says that the run goes on, as long as it is open.
        self._presence: psycopg.Connection | None = None

    def template(self) -> str:
        """Make the template unless it is there, with its schema; returns its name."""
        if self._template is None:
            self._join()
            name = f"test_template_{self._run}"
            with self._alone() as connection:
                self._fill(connection, name)
            self._template = name
        return self._template

    def fresh(self, count: int = 1) -> list[str]:
        """Make *count* copies of the template, under names that nobody had before; returns them."""
        names = [f"test_{self._worker}_{self._run}_{next(self._numbers):04d}" for _ in range(count)]
        self._copy(names)
        return names

    def drop(self, names: Iterable[str]) -> None:
        """Drop what `fresh` made, whoever is connected to it, unless the test has done so itself."""
        with self._server.connect() as connection:
            for name in names:
                _drop(connection, name)

    def last(self, names: Iterable[str]) -> None:
        """Make sure that there are copies of the template of these names, for the rest of the run.

        Raises:
            StockError: A database of that name is there that is not the run's.
        """
        wanted = [name for name in names if name not in self._lasting]
        if not wanted:
            return
        self.template()
        with self._alone() as connection:
            _drop_leftovers(connection)
            there = _marks(connection)
            missing = [name for name in wanted if name not in there]
            for name in set(wanted).difference(missing):
                self._check_ours(name, there[name])
            self._copy(missing)
        self._lasting.update(wanted)

    def close(self) -> None:
        """Leave the run; the last one to do so drops all that it has made."""
        if self._presence is None:
            return
        # A server that is gone has nothing to be dropped; what comes back with it, the next run drops.
        with suppress(psycopg.OperationalError):
            self._presence.execute("SELECT pg_advisory_unlock_shared(%s)", [_key(self._run)])
        self._presence.close()
        with suppress(psycopg.OperationalError), self._alone() as connection:
            _drop_leftovers(connection)

    def _copy(self, names: Sequence[str]) -> None:
        template = self.template()
        try:
            self._server.create_databases(names, template=template, comment=_COMMENT.format(run=self._run))
        except psycopg.errors.ObjectInUse as error:
            raise self._in_use(template) from error
        except psycopg.errors.DuplicateDatabase as error:
            raise StockError(f"{self._server.host}:{self._server.port}: {error}; drop it") from error

    def _join(self) -> None:
        if self._presence is not None:
            return
        with self._alone() as connection:
            _drop_leftovers(connection)
            self._presence = self._server.connect(application_name=APPLICATION)
            self._presence.execute("SELECT pg_advisory_lock_shared(%s)", [_key(self._run)])

    def _fill(self, connection: psycopg.Connection, name: str) -> None:
        comment = _COMMENT.format(run=self._run)
        found = _marks(connection).get(name)
        if found == comment:
            return
        if found is not None:
            _drop(connection, name)  # whoever made it was killed on the way
        self._server.create_databases([name], comment=comment + _UNFINISHED)
        try:
            self._schema(self._server.url(name))
        except BaseException:
            _drop(connection, name)
            raise
        connection.execute(comment_on(name, comment))

    def _check_ours(self, name: str, comment: str) -> None:
        made = _OURS.fullmatch(comment)
        place = f"the database {name!r} on {self._server.host}:{self._server.port}"
        if made is None:
            raise StockError(
                f"{place} was not made by a test run, and is neither used nor dropped: choose another name, or drop it"
            )
        if made["run"] != self._run:
            raise StockError(f"{place} is used by another test run, which goes on: wait for it, or choose another name")

    def _in_use(self, template: str) -> StockError:
        query = "SELECT pid, usename, application_name, state FROM pg_stat_activity WHERE datname = %s ORDER BY pid"
        with self._server.connect() as connection:
            rows = connection.execute(query, [template]).fetchall()
        sessions = "; ".join(f"pid {pid}, user {user}, {name or 'no name'}, {state}" for pid, user, name, state in rows)
        return StockError(
            f"the template {template} on {self._server.host}:{self._server.port} cannot be copied while somebody is "
            f"connected to it ({sessions or 'gone since'}): close that session; if it is of the tests themselves, what "
            "makes the schema has to close its connections: use poolclass=NullPool, or dispose of the engine"
        )

    @contextmanager
    def _alone(self) -> Iterator[psycopg.Connection]:
        """A connection for as long as no other process, of this run or another, makes or drops what they share."""
        with self._server.connect(application_name=APPLICATION) as connection:
            connection.execute("SELECT pg_advisory_lock(%s)", [_key("")])
            yield connection


def _drop_leftovers(connection: psycopg.Connection) -> None:
    """Drop all that was made by runs that are over."""
    for name, comment in _marks(connection).items():
        made = _OURS.fullmatch(comment)
        if made is not None and _is_over(connection, made["run"]):
            _drop(connection, name)


def _is_over(connection: psycopg.Connection, run: str) -> bool:
    """Whether no process of the run holds its lock."""
    query = "SELECT pg_try_advisory_lock(%(key)s) AND pg_advisory_unlock(%(key)s)"
    row: Any = connection.execute(query, {"key": _key(run)}).fetchone()
    return bool(row[0])


def _marks(connection: psycopg.Connection) -> dict[str, str]:
    """PostgreSQL's comment on each database of the server, by its name."""
    query = "SELECT datname, coalesce(shobj_description(oid, 'pg_database'), '') FROM pg_database"
    return dict(connection.execute(query).fetchall())


def _drop(connection: psycopg.Connection, name: str) -> None:
    connection.execute(SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(Identifier(name)))


def _key(run: str) -> int:
    """The key of an advisory lock: of a run, or without one of what all runs do one after the other."""
    return int.from_bytes(hashlib.sha256(f"shardrepo test run {run}".encode()).digest()[:8], "big", signed=True)
