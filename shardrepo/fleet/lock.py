"""The lock of a database that is being migrated, and who stands in the way of a migration.

It is an advisory lock of the session that migrates, so that it goes when that goes, whatever becomes of its process.
It is polled: a session that waits for it in a statement holds a snapshot, for which CREATE INDEX CONCURRENTLY in the
session that has the lock would wait, and both for ever.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from time import monotonic, sleep
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

from sqlalchemy import Row, TextClause, text
from sqlalchemy.engine import Connection

from ..calls import deadline
from ..pool import autocommit, limited, set_autocommit, vouch
from .outcomes import Failure

if TYPE_CHECKING:
    from ..database import Database
    from ..databases import Databases

# The first eight bytes of the SHA-256 of "shardrepo migrations". Advisory locks are of one database each.
KEY: Final = 0x72EF4503AC371396

# Seconds between two tries, at first and at most.
_POLL: Final = (0.02, 0.5)

# Seconds after which a migration takes long enough to ask who blocks it, and between two such questions.
_LOOK: Final = 1.0

_TAKE: Final = text(
    "SELECT pg_catalog.set_config('application_name', :name, false), "
    "pg_catalog.set_config('lock_timeout', :lock_timeout, false), pg_catalog.pg_try_advisory_lock(:key)"
)

# How a key of 64 bits stands in pg_locks: https://www.postgresql.org/docs/current/view-pg-locks.html.
_HOLDERS: Final = text(
    "SELECT a.pid, a.usename, a.application_name, a.state, a.query, a.backend_start AS since "
    "FROM pg_catalog.pg_locks l JOIN pg_catalog.pg_stat_activity a USING (pid) "
    "WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1 AND a.datname = current_database() "
    "AND l.classid::bigint = :high AND l.objid::bigint = :low"
).bindparams(high=KEY >> 32, low=KEY & 0xFFFFFFFF)
_BLOCKERS: Final = text(
    "SELECT a.pid, a.usename, a.application_name, a.state, a.query, a.xact_start AS since "
    "FROM pg_catalog.pg_stat_activity a WHERE a.pid = ANY (pg_catalog.pg_blocking_pids(:pid))"
)


def take(connection: Connection, name: str, lock_timeout: float, patience: float, check: Callable[[], None]) -> None:
    """Take the lock of the connection's database, for as long as the connection is open, and call the session *name*.

    Args:
        lock_timeout: Seconds that its statements will wait for a lock of the server's own.
        patience: Seconds to wait for this one.
        check: Called between two tries; raises to give up.

    Raises:
        Failure: Somebody else has it all the time; says who.
        OperationalError: The server has not answered for as long.
    """

    def ask(question: TextClause, **given: Any) -> Sequence[Any]:
        with limited(connection, monotonic() + patience):
            return connection.execute(question, given).all()

    parameters = {"name": name, "lock_timeout": f"{lock_timeout * 1000:.0f}ms", "key": KEY}
    until, pause = monotonic() + patience, _POLL[0]
    set_autocommit(connection, True)
    while not ask(_TAKE, **parameters)[0][2]:
        check()
        if monotonic() > until:
            holders = tuple(_shown(row) for row in ask(_HOLDERS))
            raise Failure(
                f"another migration of this database has held its lock for {patience:.0f} s",
                kind="locked",
                blockers=holders,
            )
        sleep(pause * random.uniform(0.5, 1.5))  # noqa: S311  # so that two runners do not try in step
        pause = min(pause * 2, _POLL[1])
    # Of what SQLAlchemy takes for a transaction, in which Alembic would begin none of its own.
    connection.commit()
    set_autocommit(connection, False)


class Lookout:
    """Asks, from another connection, who blocks a session that takes long; asks nobody about one that does not.

    Attributes:
        seen: Who did, when it last asked and there was somebody.
    """

    def __init__(self, databases: Databases, database: Database, connection: Connection, lock_timeout: float) -> None:
        self._databases = databases
        self._database = database
        self._pid = connection.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]  # it is open
        self._interval = min(_LOOK, lock_timeout / 4)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="shardrepo-lookout", daemon=True)
        self.seen: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        if self._over.wait(self._interval):
            return
        # Where a bound leaves no room beside the migration itself, nobody is asked.
        deadline.set(monotonic() + self._interval)
        # Not to be seen is no failure of the migration.
        with suppress(Exception), self._databases.cache.transient(self._database) as connection:
            vouch(connection)
            autocommit(connection)
            while True:
                with limited(connection, monotonic() + self._databases.config.connect_timeout):
                    rows = connection.execute(_BLOCKERS, {"pid": self._pid}).all()
                self.seen = tuple(_shown(row) for row in rows) or self.seen
                if self._over.wait(self._interval):
                    return


def _shown(row: Row[Any]) -> str:
    query = " ".join((row.query or "").split())[:120]
    return f"{row.application_name or row.usename} (pid {row.pid}, {row.state}, since {row.since:%H:%M:%S}): {query}"
