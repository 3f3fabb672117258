"""From a choice to a session on the right connection: the one seam that every verb goes through.

`Router.resolve` turns a choice into a `Database`, and nothing else does. A verb then runs in a short
session of its own, on the open transaction's connection if the caller has one on that database, else on
one from the cache.
"""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, Concatenate, Final, NoReturn, ParamSpec, TypeVar

from sqlalchemy import text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import NoResultFound, PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.util import memoized_property  # functools' own locks before Python 3.12, which no fork survives

from . import reading, reloading, writing
from .config import Config, ConfigSource
from .context import Context, deadline
from .database import Choice, Chosen, Database, choose
from .errors import NoDatabaseError, NotInTransactionError, StaleError, WrongDatabaseError
from .listeners import Listeners
from .pool import autocommit, begin_as, disown, is_aborted, limited, vouch
from .session import HomeSession, RoutedSession, Snapshot, common_home, mapper_of
from .transaction import Ending, Mode, Transaction

if TYPE_CHECKING:
    from .engines import ConnectionCache

P = ParamSpec("P")
T = TypeVar("T")

# Choices whose database is remembered; making one again takes a few microseconds.
MAX_RESOLVED: Final = 1024


class Router:
    """What stands behind a repo class: its config, its context and its cache of connections.

    Args:
        name: How the repo is called in messages.
        source: The config; a callable is called when a database is first needed.
    """

    def __init__(self, name: str, source: ConfigSource) -> None:
        self.context = Context(name)
        self.listeners = Listeners()
        self._source = source
        # Guards the making of config and cache, which happens once, and what follows.
        self._lock = threading.RLock()
        # Every database that a choice has meant so far, by home and key: one home may have several users.
        self._met: dict[str, dict[str, Database]] = {}
        _routers.add(self)
        if not callable(source):
            self.config  # noqa: B018  # a wrong config fails where it is written

    @memoized_property
    def config(self) -> Config:
        with self._lock:
            made: Config | None = self.__dict__.get("config")
            return made or Config.of(self._source)

    @memoized_property
    def cache(self) -> ConnectionCache:
        from .engines import ConnectionCache  # here, so that `import shardrepo` loads no driver

        with self._lock:
            made: ConnectionCache | None = self.__dict__.get("cache")
            if made is None:
                made = self.__dict__["cache"] = ConnectionCache(self.config, self.listeners)
            return made

    @memoized_property
    def resolve(self) -> Callable[[Choice | None], Database]:
        """Turn a choice into the database it means, the same one every time."""
        return lru_cache(maxsize=MAX_RESOLVED)(self._locate)

    def _locate(self, choice: Choice | None) -> Database:
        database = self.config.locate(choice)
        with self._lock:
            if len(self._met) >= MAX_RESOLVED:
                self._met.clear()
            self._met.setdefault(database.home, {})[database.key] = database
        return database

    # Choosing

    @property
    def current(self) -> Database:
        """The database that a verb would use now."""
        return self.resolve(self.context.choice)

    def named(self, given: Chosen, options: Mapping[str, Any]) -> Database:
        """The database that *given* or *options* mean, the current one if there are neither."""
        return self.current if given is None and not options else self.resolve(choose(given, options))

    def at(self, home: str) -> Database:
        """The database that *home* means: the current one, else the one that was chosen there before.

        No credentials travel to a server for which they were not chosen, and no user stands in for another.
        """
        with suppress(NoDatabaseError):
            if self.current.home == home:
                return self.current
        with self._lock:
            met = list(self._met.get(home, {}).values())
        if len(met) == 1:
            return met[0]
        raise WrongDatabaseError(
            f"{home} is not the current database, and {'several users have' if met else 'nobody has'} chosen it "
            "before: choose it with using(...)",
            expected=home,
            found=None,
        )

    def set_database(self, choice: Choice | None) -> Choice | None:
        """Choose, unless the caller has a transaction open on the current database."""
        if self.context.has_transactions:
            self._check_switch(choice)
        return self.context.choose(choice)

    def _check_switch(self, choice: Choice | None) -> None:
        try:
            current = self.current
        except NoDatabaseError:
            return
        transaction = self.context.transaction(current)
        if transaction is None or not transaction.owner.is_current:
            return
        wanted = self.resolve(choice)
        if wanted.key != current.key:
            raise WrongDatabaseError(
                f"cannot switch to {wanted.home}: a transaction is open on {current.home}. Leave its block first, "
                "or use `with repo.using(...)` for an independent unit of work",
                expected=current.home,
                found=wanted.home,
            )

    # Units of work

    def get(self, model: type[T], key: Any, options: reading.Options) -> T | None:
        """Load one object by its key: without a session, where that provably makes no difference."""
        mapper = mapper_of(model)
        parameters = reading.key_parameters(mapper, key)
        if options or not reading.is_plain(mapper):
            found: T | None = self.read(reading.get, mapper, parameters, options)
            return found
        database = self.current
        with self._connection(database) as connection:
            autocommit(connection)
            plain: T | None = reading.get_plain(connection, database.home, mapper, parameters)
            return plain

    def get_one(self, model: type[T], key: Any, options: reading.Options) -> T:
        """`get`, for a row that has to be there."""
        found = self.get(model, key, options)
        if found is None:
            raise NoResultFound(f"no {model.__name__} with primary key {key!r} in {self.current.home}")
        return found

    def read(self, verb: Callable[Concatenate[HomeSession, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a verb that only reads: each of its statements by itself, or in the open transaction."""
        return self._read(self.current, verb, *args, **kwargs)

    def _read(
        self, database: Database, verb: Callable[Concatenate[HomeSession, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        with self._connection(database) as connection:
            autocommit(connection)
            with _session(database, connection) as session:
                return verb(session, *args, **kwargs)

    def reload(self, objects: Sequence[object], options: reading.Options) -> list[Any]:
        """Load each of *objects* anew, from its home."""
        return self._read(self.at(common_home(objects)), reloading.reload, objects, options) if objects else []

    def preload(self, objects: Sequence[object], wanted: Iterable[object], *, force: bool) -> None:
        """Load relationships of *objects*, from their home."""
        tree = reloading.tree_of(wanted)
        reloading.check_owners(objects, tree)
        if objects:
            self._read(self.at(common_home(objects)), reloading.preload, objects, tree, force=force)

    @contextmanager
    def stream(self, query: Any, batch: int, options: reading.Options) -> Iterator[Iterator[Any]]:
        """Results as they are wanted: in the open transaction, or in one of their own that only reads."""
        database = self.current
        statement = reading.streamable(query, batch, options)
        transaction = self.context.transaction(database)
        with ExitStack() as stack:
            with _noted(database):
                if transaction is not None:
                    transaction.check_usable()
                    connection = transaction.connection
                else:
                    connection = stack.enter_context(self._own_connection(database, Mode(read_only=True)))
            session = stack.enter_context(_session(database, connection))
            rows = _watched(reading.stream(session, statement), database, transaction)
            yield stack.enter_context(closing(rows))

    def run(self, verb: Callable[Concatenate[HomeSession, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a verb with SQL of the user's own, each statement by itself, or in the open transaction."""
        database = self.current
        with self._connection(database) as connection:
            autocommit(connection)
            disown(connection)
            with _session(database, connection) as session:
                return verb(session, *args, **kwargs)

    def write(self, verb: Callable[[HomeSession, Any], None], obj: Any) -> None:
        """Run a verb that writes *obj*; if it fails, *obj* and what it refers to are as they were."""
        self._write(verb, obj, {})

    def update(self, obj: Any, changes: Mapping[str, Any]) -> None:
        """Set attributes and write them; if that fails, everything is as it was."""
        writing.check_changes(obj, changes)
        self._write(lambda session, obj: writing.update(session, obj, changes), obj, changes)

    def _write(self, verb: Callable[[HomeSession, Any], None], obj: Any, changes: Mapping[str, Any]) -> None:
        database = self.current
        deleting = verb is writing.delete
        snapshot = Snapshot(writing.touched(obj, changes, deleting=deleting))
        try:
            with self._connection(database) as connection, _session(database, connection) as session:
                if writing.is_single_statement(session, obj, deleting=deleting):
                    autocommit(connection)
                verb(session, obj)
                session.commit()
        except BaseException as error:
            snapshot.restore()
            if isinstance(error, StaleDataError):
                raise StaleError(
                    f"this {type(obj).__name__} is not in {database.home} any more as it was loaded, and nothing was "
                    f"written: load it again ({error})",
                    home=database.home,
                ) from error
            raise

    def write_rows(self, verb: Callable[Concatenate[HomeSession, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a verb that writes rows without objects, in one transaction."""
        database = self.current
        with self._connection(database) as connection, _session(database, connection) as session:
            result = verb(session, *args, **kwargs)
            session.commit()
            return result

    @contextmanager
    def _connection(self, database: Database) -> Iterator[Connection]:
        """The connection of the caller's transaction on *database*, else one of the cache's."""
        transaction = self.context.transaction(database)
        try:
            if self.context.timeout is not None or (transaction is not None and transaction.until is not None):
                with self._limited_connection(database, transaction) as connection:
                    yield connection
            elif transaction is not None:
                with transaction.watch():
                    yield transaction.connection
            else:
                with self.cache.engine(database).connect() as connection:
                    vouch(connection)
                    yield connection
        except SQLAlchemyError as error:
            _note(error, database)
            raise

    @contextmanager
    def _limited_connection(self, database: Database, transaction: Transaction | None) -> Iterator[Connection]:
        """The same for a call that has so many seconds in all: to get a connection, and for its statements."""
        with self._timed(transaction) as until:
            if transaction is not None:
                with transaction.watch(), limited(transaction.connection, until):
                    yield transaction.connection
            else:
                with self.cache.engine(database).connect() as connection, limited(connection, until):
                    vouch(connection)
                    yield connection

    @contextmanager
    def _timed(self, transaction: Transaction | None = None) -> Iterator[float | None]:
        """Give a call the seconds that `call_options` says, or are left of its transaction's; yields when it has to be
        over, None for never."""
        timeout, before = self.context.timeout, deadline.get()
        until = None if timeout is None else monotonic() + timeout
        if transaction is not None and transaction.until is not None:
            until = min(until or math.inf, transaction.until)
        deadline.set(until)
        try:
            yield until
        finally:
            deadline.set(before)

    @contextmanager
    def _limited(self, connection: Connection, transaction: Transaction | None = None) -> Iterator[None]:
        """Give what the block sends on *connection* the time of one call."""
        with self._timed(transaction) as until, limited(connection, until):
            yield

    @contextmanager
    def _own_connection(self, database: Database, mode: Mode) -> Iterator[Connection]:
        """A connection for a transaction in *mode*, whatever else is open."""
        with self._timed():
            connection = self.cache.engine(database).connect()
        with connection:
            vouch(connection)
            begin_as(connection, mode)
            yield connection

    @contextmanager
    def transaction(self, mode: Mode) -> Iterator[Ending]:
        """Open a transaction on the current database, or join the one that is open on it."""
        database = self.current
        joined = self.context.transaction(database)
        if joined is not None:
            with joined.joined(mode) as ending:
                yield ending
            return
        with (
            self._own_connection(database, mode) as connection,
            self.context.entered(database, connection, mode) as transaction,
            transaction.block() as ending,
        ):
            try:
                yield ending
                if is_aborted(connection):
                    # PostgreSQL would answer a COMMIT with a ROLLBACK, and call it a success.
                    transaction.doom(PendingRollbackError("a statement of a session that had joined it failed"))
                with self._limited(connection, transaction):
                    transaction.commit()
            except BaseException as error:
                with self._limited(connection):
                    transaction.rollback()
                if not ending.takes(error):
                    raise

    @contextmanager
    def plain_transaction(self, mode: Mode) -> Iterator[None]:
        """`transaction`, for those who have no use for how it ends."""
        with self.transaction(mode):
            yield

    def transact(self, function: Callable[[], T], mode: Mode) -> T:
        """The value of *function*, run in a transaction, or of the `rollback` that ended it."""
        with self.transaction(mode) as ending:
            ending.value = function()
        value: T = ending.value
        return value

    def rollback(self, value: Any) -> NoReturn:
        """End the innermost block of the transaction on the current database."""
        self._transaction("rollback() ends a block of one").rollback_with(value)

    def _transaction(self, why: str) -> Transaction:
        database = self.current
        transaction = self.context.transaction(database)
        if transaction is None:
            raise NotInTransactionError(
                f"there is no open transaction on {database.home}, and {why}: wrap it in `with repo.transaction():`"
            )
        return transaction

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Mark a point in the open transaction that a failure in the block goes back to."""
        transaction = self._transaction("a savepoint is a part of one")
        with transaction.savepoint(partial(self._limited, transaction.connection, transaction)):
            yield

    def in_transaction(self) -> bool:
        """Whether the caller has a transaction open on the current database."""
        transaction = self.context.transaction(self.current)
        return transaction is not None and transaction.owner.is_current

    # What is handed to the user

    def session(self, **options: Any) -> RoutedSession:
        """A session of the current database, in the open transaction if there is one."""
        database = self.current
        transaction = self.context.transaction(database)
        if transaction is None:
            return RoutedSession(database, self.engine(), **options)
        transaction.check_usable()
        disown(transaction.connection)
        return RoutedSession(database, transaction.connection, join_transaction_mode="rollback_only", **options)

    def engine(self) -> Engine:
        """The engine of the current database."""
        return self.cache.engine(self.current)

    def ping(self) -> float:
        """Open a connection, ask one question, close it; the seconds that it took."""
        begun = perf_counter()
        with self._timed() as until, self.cache.transient(self.current) as connection, limited(connection, until):
            vouch(connection)
            autocommit(connection)
            connection.execute(text("SELECT 1"))
        return perf_counter() - begun


_routers: Final[weakref.WeakSet[Router]] = weakref.WeakSet()


def _after_fork() -> None:
    # Another thread of the parent's may have been in the middle of it.
    for router in list(_routers):
        router._lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def _note(error: BaseException, database: Database) -> None:
    error.add_note(f"database: {database.home}")


@contextmanager
def _noted(database: Database) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        _note(error, database)
        raise


def _watched(rows: Iterator[T], database: Database, transaction: Transaction | None) -> Generator[T]:
    """*rows*, whose errors name their database and doom their transaction; those of who takes them do not."""
    with _noted(database), transaction.watch() if transaction is not None else nullcontext():
        yield from rows


def _session(database: Database, connection: Connection) -> HomeSession:
    return HomeSession(
        database.home, connection, autoflush=False, expire_on_commit=False, join_transaction_mode="rollback_only"
    )
