"""Database → Engine: the cache of connections, and the thin engines over it.

The engines of one server share one dialect and one cache of compiled SQL. A dialect of its own would cost
each database nine round trips at its first connect and 25 compilations, and past some 100 of them every
flush would miss the mappers' caches for ever (SQLAlchemy keys both by dialect).
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from time import monotonic
from typing import Any, Final, Self

from sqlalchemy import create_engine, event
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.util import LRUCache

from .calls import COPIED_ROWS
from .checks import Check
from .config import Config
from .connection import OUTDATED, DriverConnection
from .constraints import told_apart
from .database import Database
from .driver import Target, connect
from .entries import Kind
from .errors import DatabaseStateError, ServerUnavailableError
from .housekeeper import Housekeeper
from .ledger import Ledger
from .listeners import Listeners
from .pool import Books, LedgerPool, Lending, borrower, close, perform
from .session import check_parameter
from .stats import Stats

# An engine without connections costs about 10 KiB and 0.1 ms to make again.
MAX_ENGINES: Final = 256

# Connects to one server at a time. More of them end no sooner, where one interpreter and one server do the work, and
# while they are under way they take the places of idle connections (decision 9 has the figures).
MAX_CONNECTING: Final = 1

# Statements kept compiled per server; SQLAlchemy's own default per engine is 500.
MAX_COMPILED: Final = 1000


class SharedDialect(PGDialect_psycopg):
    """psycopg's dialect, one instance for all engines of a server.

    `create_engine` always makes a dialect; given *shared*, the class returns that one instead. It opens
    connections under the cache's own deadline, and takes no type's OID from one database into another.
    """

    driver = "psycopg"
    # Those of the cache whose server's dialect this is.
    listeners: Listeners
    supports_statement_cache = True

    def __new__(cls, shared: SharedDialect | None = None, **_: Any) -> Self:
        return shared if isinstance(shared, cls) else super().__new__(cls)

    def __init__(self, shared: SharedDialect | None = None, **kwargs: Any) -> None:
        if shared is None:
            super().__init__(use_native_hstore=False, skip_autocommit_rollback=True, **kwargs)  # type: ignore[no-untyped-call]  # SQLAlchemy's
            self.compiled: MutableMapping[Any, Any] = LRUCache(MAX_COMPILED)
            self.server_version: int | None = None
            self.outdated = False

    def create_connect_args(self, url: Any) -> Any:
        arguments = super().create_connect_args(url)[1]  # type: ignore[no-untyped-call]  # SQLAlchemy's
        return (), {"context": arguments.get("context")}

    def connect(self, *, target: Target, context: Any = None) -> Any:
        connection = connect(target, context)
        version = connection.info.server_version
        # Behind a pooler there may be servers of several versions, by turns.
        if self.server_version not in (None, version) and not target.pooled:
            connection.close()
            self.outdated = True
            raise ServerUnavailableError(
                f"{target.database.server} went from version {self.server_version} to {version} while it was in "
                "use: try again, the next call starts anew with it",
                reason="replaced",
                database=target.database,
            )
        return connection

    def do_execute(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        _check_home(cursor, context)
        if "set_config" in statement or "advisory_lock" in statement:
            cursor.connection.leaves_traces = True
        # SQLAlchemy asks its own first questions under a lock, under which no listener may use the repo.
        if self.listeners.query and self.server_version is not None:
            with self._told(cursor, statement):
                self._execute(cursor, statement, parameters, context)
        else:
            self._execute(cursor, statement, parameters, context)

    def do_execute_no_params(self, cursor: Any, statement: str, context: Any = None) -> None:
        rows = None if context is None else context.execution_options.get(COPIED_ROWS)
        if rows is None:
            self.do_execute(cursor, statement, None, context)
            return
        with self._told(cursor, statement), cursor.copy(statement) as copy:
            for row in rows:
                copy.write_row(row)

    def do_executemany(self, cursor: Any, statement: str, parameters: Any, context: Any = None) -> None:
        _check_home(cursor, context)
        with self._told(cursor, statement):
            super().do_executemany(cursor, statement, parameters, context)  # type: ignore[no-untyped-call]  # SQLAlchemy's

    @contextmanager
    def _told(self, cursor: Any, statement: str) -> Iterator[None]:
        begun, error = monotonic(), None
        try:
            yield
        except BaseException as raised:
            error = raised
            raise
        finally:
            database = cursor.connection.database
            self.listeners.tell("query", database, monotonic() - begun, statement=statement, error=error)

    def _execute(self, cursor: Any, statement: str, parameters: Any, context: Any) -> None:
        try:
            cursor.execute(statement, parameters)
        except OUTDATED as error:
            connection: DriverConnection = cursor.connection
            outdated = connection.is_outdated_by(error)
            if outdated and context is not None:
                context.root_connection.engine.pool.dispose()
            if outdated != "statements" or not connection.is_at_rest:
                raise
            connection.forget_statements()
            cursor.execute(statement, parameters)

    def initialize(self, connection: Connection) -> None:
        # Asks the server five times; two first connections at once may both do it, to the same effect.
        if self.server_version is None:
            super().initialize(connection)  # type: ignore[no-untyped-call]  # SQLAlchemy's
            driver_connection: Any = connection.connection.driver_connection
            self.server_version = driver_connection.info.server_version

    def reset_isolation_level(self, dbapi_conn: Any) -> None:
        # To the database's own default, which may differ from the one that the first database had.
        dbapi_conn.autocommit = False
        dbapi_conn.isolation_level = None


def _check_home(cursor: Any, context: Any) -> None:
    """Raise `WrongDatabaseError` if a statement asks by an object of another database; it has not been sent then."""
    if context is not None and isinstance(context.compiled, SQLCompiler):
        # None of a statement that is compiled anew every time, as an INSERT of several rows is.
        taken = context.extracted_parameters
        given = context.compiled.binds.values() if taken is None else taken
        for parameter in given:
            if parameter.callable is not None:
                check_parameter(parameter, cursor.connection.database.home)


registry.register("postgresql.shardrepo", __name__, "SharedDialect")


class ConnectionCache:
    """The connections of one repo, and an engine for each database that they go to.

    Thread-safe. Opens nothing by itself; idle connections are closed when it is disposed or collected.
    A forked child starts with an empty one and leaves the parent's sockets alone.
    """

    def __init__(
        self, config: Config, listeners: Listeners, configure: Callable[[Engine, Database], object] | None = None
    ) -> None:
        self.config = config
        self.listeners = listeners
        self._configure = configure
        self.lending = Lending()
        self.ledger: Books = Ledger(config.pool_size, config.bounds, config.ages, MAX_CONNECTING, borrower)
        self.housekeeper = Housekeeper(self.ledger, self.config.warn_after)
        self._start_empty()
        weakref.finalize(self, _close_idle, self.ledger)
        _caches.add(self)

    def _start_empty(self) -> None:
        # Guards the three mappings below; no I/O happens under it. Reentrant because the collector may run a
        # finaliser under it that uses a verb.
        self._lock = threading.RLock()
        self._recent: OrderedDict[object, Engine] = OrderedDict()
        # An engine that somebody holds, or that has a connection, is found here after it left the LRU.
        self._alive: weakref.WeakValueDictionary[object, Engine] = weakref.WeakValueDictionary()
        self._dialects: dict[str, SharedDialect] = {}

    def engine(self, database: Database) -> Engine:
        """The engine of *database*: the same object as long as anybody holds it. Does no I/O."""
        _check_state(database)
        key = database.key
        with self._lock:
            engine = self._recent.get(key) or self._alive.get(key)
            if engine is None or engine.dialect.outdated:  # type: ignore[attr-defined]  # a SharedDialect
                engine = self._alive[key] = self._build(database, Kind.KEPT)
            self._recent[key] = engine
            self._recent.move_to_end(key)
            if len(self._recent) > MAX_ENGINES:
                self._recent.popitem(last=False)
            return engine

    @contextmanager
    def transient(self, database: Database) -> Iterator[Connection]:
        """A connection of its own for a question to *database*: outside the target, closed at the end."""
        _check_state(database)
        with self._lock:
            engine = self._build(database, Kind.TRANSIENT)
        with engine.connect() as connection:
            yield connection

    def disconnect(self, database: Database) -> None:
        """Close the idle connections to *database* now, whoever's they are, those in use when they are returned."""
        for key in self._keys_of(database.home):
            perform(self.ledger, self.ledger.discard(key))

    def confine(self, check: Callable[[Database], object]) -> None:
        """Have *check* refuse databases, by raising: those that there are engines of, and each that one is made of."""
        for database in self._in_use():
            check(database)
        configure = self._configure

        def checked(engine: Engine, database: Database) -> None:
            check(database)
            if configure is not None:
                configure(engine, database)

        self._configure = checked

    def _keys_of(self, home: str) -> set[str]:
        """By what the books know the connections to a database: one key for each user and password."""
        return {database.key for database in self._in_use() if database.home == home}

    def _in_use(self) -> list[Database]:
        """Those that there are engines of: a connection keeps its engine alive."""
        # One call makes the list: a finaliser may add to them meanwhile.
        with self._lock:
            engines = [reference() for reference in self._alive.valuerefs()]
        return [engine.pool.database for engine in engines if engine is not None]  # type: ignore[attr-defined]  # a LedgerPool

    def disconnect_all(self) -> None:
        """`disconnect`, for every database."""
        perform(self.ledger, self.ledger.discard())

    def dispose(self) -> None:
        """Close everything and open nothing any more; what is in use is closed when it is returned."""
        perform(self.ledger, self.ledger.dispose())

    def stats(self) -> Stats:
        """A snapshot of the books, after taking over what finalisers have reclaimed."""
        perform(self.ledger, self.ledger.sweep())
        return self.ledger.stats()

    def after_fork(self) -> None:
        """Forget the parent's connections without closing them: their sockets are the parent's."""
        _parents_connections.extend(self.ledger.abandon())
        _parents_connections.extend(self._recent.values())
        self._start_empty()

    def _build(self, database: Database, kind: Kind) -> Engine:
        dialect = self._dialects.get(database.server)
        if dialect is not None and dialect.outdated:
            dialect = None
        check = Check.of(database, kind, self.config, self.listeners)
        engine = create_engine(
            database.url.set(drivername="postgresql+shardrepo"),
            shared=dialect,
            connect_args={"target": Target.of(database, self.config, check)},
            poolclass=LedgerPool,
            ledger=self.ledger,
            database=database,
            kind=kind,
            settings=self.config,
            attend=self.housekeeper.attend,
            listeners=self.listeners,
            lending=self.lending,
            query_cache_size=0,
            **self.config.engine_options,
        )
        shared = engine.dialect
        assert isinstance(shared, SharedDialect)
        if shared is not dialect:
            self._dialects[database.server] = shared
            shared.listeners = self.listeners
            event.listen(engine, "handle_error", told_apart, retval=True)
        engine.update_execution_options(compiled_cache=shared.compiled)
        engine.pool.engine = engine  # type: ignore[attr-defined]  # a LedgerPool
        if self._configure is not None:
            self._configure(engine, database)
        return engine


def _check_state(database: Database) -> None:
    """Raise `DatabaseStateError` if the directory says that *database* is not to be connected to."""
    if database.state in ("suspended", "migrating"):
        raise DatabaseStateError(
            f"{database.home} is {database.state}, as the directory says: try later, or change its state there",
            database=database,
            state=database.state,
        )


_caches: Final[weakref.WeakSet[ConnectionCache]] = weakref.WeakSet()

# What a forked child inherited. Kept, because letting go of it would close it.
_parents_connections: Final[list[object]] = []


def _after_fork() -> None:
    for cache in list(_caches):
        cache.after_fork()


os.register_at_fork(after_in_child=_after_fork)


def _close_idle(ledger: Books) -> None:
    close(ledger, ledger.discard().close)
