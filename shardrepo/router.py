"""From a verb to a session on the right connection.

A verb runs in a short session of its own, on what the caller holds to the current database, the connection of a
transaction or of a `connection()` block, else on a connection from the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, Concatenate, Final, NoReturn, ParamSpec, TypeVar

from sqlalchemy import text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import NoResultFound, PendingRollbackError, SQLAlchemyError
from sqlalchemy.orm.exc import StaleDataError
from sqlalchemy.util import memoized_property

from . import bulk, catalog, inserting, plans, reading, reloading, writing
from .calls import CallOptions, deadline
from .config import checked_flag
from .conflicts import Conflict
from .database import Choice, Database, checked_name
from .databases import Databases
from .errors import ConfigError, ConstraintError, NotInTransactionError, ReadOnlyError, StaleError, note_database
from .pinned import Pinned
from .pool import autocommit, begin_as, disown, is_aborted, limited, optioned, vouch
from .returning import BulkResult, Returning
from .session import HomeSession, PreparedSession, RoutedSession, Snapshot, common_home, mapper_of, state_of
from .transaction import Ending, Held, Mode, Transaction

if TYPE_CHECKING:
    from .engines import ConnectionCache

P = ParamSpec("P")
T = TypeVar("T")

NO_OPTIONS: Final = CallOptions()


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a repo class has to say about its verbs; None where it says nothing.

    Attributes:
        prepare_query: Rewrites the query of a verb.
        default_options: What a verb's call options are where nobody gives others.
    """

    prepare_query: Callable[[str, Any], Any] | None = None
    default_options: Callable[[str], Mapping[str, Any]] | None = None


class Router:
    """What runs the verbs of a repo class.

    Args:
        databases: The databases of its config, which it may share with other classes.
        hooks: What is this class's own.
    """

    def __init__(self, databases: Databases, hooks: Hooks) -> None:
        self.databases = databases
        self.context = databases.context
        self.listeners = databases.listeners
        self._prepare_query = hooks.prepare_query
        self._default_options = hooks.default_options

    @memoized_property
    def cache(self) -> ConnectionCache:
        return self.databases.cache

    # Units of work

    def get(self, model: type[T], key: Any, options: reading.Options) -> T | None:
        """Load one object by its key: without a session, where that provably makes no difference."""
        mapper = mapper_of(model)
        parameters = reading.key_parameters(mapper, key)
        if options or self._prepare_query is not None or not reading.is_plain(mapper):
            found: T | None = self.read(reading.get, mapper, parameters, options)
            return found
        database = self.databases.current
        with self._connection("get", database) as connection:
            autocommit(connection)
            plain: T | None = reading.get_plain(connection, database.home, mapper, parameters)
            return plain

    def get_one(self, model: type[T], key: Any, options: reading.Options) -> T:
        """`get`, for a row that has to be there."""
        found = self.get(model, key, options)
        if found is None:
            raise NoResultFound(f"no {model.__name__} with primary key {key!r} in {self.databases.current.home}")
        return found

    def read(self, verb: Callable[Concatenate[HomeSession, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a verb that only reads: each of its statements by itself, or in the open transaction."""
        return self._read(self.databases.current, verb, *args, **kwargs)

    def _read(
        self, database: Database, verb: Callable[Concatenate[HomeSession, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        operation = verb.__name__.rstrip("_")
        with self._connection(operation, database) as connection:
            autocommit(connection)
            with self._session(operation, database, connection) as session:
                return verb(session, *args, **kwargs)

    def reload(self, objects: Sequence[object], options: reading.Options) -> list[Any]:
        """Load each of *objects* anew, from its home."""
        return self._read(self._home(objects), reloading.reload, objects, options) if objects else []

    def preload(self, objects: Sequence[object], wanted: Iterable[object], *, force: bool) -> None:
        """Load relationships of *objects*, from their home."""
        tree = reloading.tree_of(wanted)
        reloading.check_owners(objects, tree)
        if objects:
            self._read(self._home(objects), reloading.preload, objects, tree, force=force)

    def _home(self, objects: Iterable[object]) -> Database:
        return self.databases.at(common_home(objects))

    @contextmanager
    def stream(self, query: Any, batch: int, options: reading.Options) -> Iterator[Iterator[Any]]:
        """Results as they are wanted: in the open transaction, or in one of their own that only reads."""
        database = self.databases.current
        statement = reading.streamable(query, batch, options)
        transaction = self.context.transaction(database)
        with ExitStack() as stack:
            with _noted(database):
                if transaction is not None:
                    transaction.check_usable()
                    connection = transaction.connection
                else:
                    connection = stack.enter_context(self._own_connection("stream", database, Mode(read_only=True)))
            with self._with_defaults("stream"):
                session = stack.enter_context(self._session("stream", database, connection))
            rows = _watched(reading.stream(session, statement), database, transaction)
            yield stack.enter_context(closing(rows))

    def run(self, verb: Callable[Concatenate[HomeSession, P], T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a verb with SQL of the user's own, each statement by itself, or in the open transaction."""
        database = self.databases.current
        with self._connection(verb.__name__, database) as connection:
            autocommit(connection)
            disown(connection)
            with self._session(verb.__name__, database, connection) as session:
                return verb(session, *args, **kwargs)

    def insert(self, obj: Any) -> None:
        """Insert *obj*; if that fails, it and what it refers to are as they were."""
        self._write("insert", writing.insert, obj, {})

    def upsert(self, obj: T, conflict: Conflict) -> T | None:
        """Insert *obj*, or do what *conflict* says; None where that is nothing, and *obj* is as it was."""
        written = self._write("insert", lambda session, obj: writing.upsert(session, obj, conflict), obj, {})
        return obj if written else None

    def update(self, obj: Any, changes: Mapping[str, Any]) -> None:
        """Set attributes and write them; if that fails, everything is as it was."""
        writing.check_changes(obj, changes)
        self._write("update", lambda session, obj: writing.update(session, obj, changes), obj, changes)

    def insert_or_update(self, obj: Any) -> None:
        """Insert *obj* if it was never stored, else update it."""
        if state_of(obj).key is None:
            self.insert(obj)
        else:
            self.update(obj, {})

    def delete(self, obj: Any) -> None:
        """Delete *obj*; if that fails, everything is as it was."""
        self._write("delete", writing.delete, obj, {})

    def _write(
        self,
        operation: str,
        verb: Callable[[HomeSession, Any], bool],
        obj: Any,
        changes: Mapping[str, Any],
    ) -> bool:
        """Run a verb that writes *obj* and says whether it has; if it has not, *obj* is as it was."""
        database = self.databases.current
        self._check_writable(operation, database)
        deleting = verb is writing.delete
        snapshot = Snapshot(writing.touched(obj, changes, deleting=deleting))
        try:
            with (
                self._connection(operation, database) as connection,
                self._session(operation, database, connection) as session,
            ):
                if writing.is_single_statement(session, obj, deleting=deleting):
                    autocommit(connection)
                written = verb(session, obj)
                session.commit()
            if not written:
                snapshot.restore()
            return written
        except BaseException as error:
            snapshot.restore()
            if isinstance(error, StaleDataError):
                raise StaleError(
                    f"this {type(obj).__name__} is not in {database.home} any more as it was loaded, and nothing was "
                    f"written: load it again ({error})",
                    home=database.home,
                ) from error
            raise

    def insert_all(self, insertion: inserting.Insertion) -> BulkResult:
        """Insert rows; without any, nothing is sent."""
        # Before any row is taken: what yields the rows may choose other databases meanwhile.
        database = self.databases.current
        self._check_writable("insert_all", database)
        insertion.begin()
        if insertion.is_empty:
            return insertion.nothing()
        try:
            return self._write_rows(database, "insert_all", insertion.run, at_once=insertion.is_one_statement)
        except inserting.SeveralStatementsError:
            return self._write_rows(database, "insert_all", insertion.run, at_once=False)

    def update_all(self, query: Any, changes: bulk.Changes, returning: Returning) -> BulkResult:
        """Update every row that *query* selects."""
        database = self.databases.current
        self._check_writable("update_all", database)
        verb = partial(bulk.update_all, query=query, changes=changes, returning=returning)
        return self._write_rows(database, "update_all", verb, at_once=True)

    def delete_all(self, query: Any, returning: Returning) -> BulkResult:
        """Delete every row that *query* selects."""
        database = self.databases.current
        self._check_writable("delete_all", database)
        verb = partial(bulk.delete_all, query=query, returning=returning)
        return self._write_rows(database, "delete_all", verb, at_once=True)

    def _write_rows(self, database: Database, operation: str, verb: Callable[[HomeSession], T], *, at_once: bool) -> T:
        """Run a verb that writes rows without objects: *at_once* with one statement, else all or nothing."""
        with (
            self._connection(operation, database) as connection,
            self._session(operation, database, connection) as session,
        ):
            if at_once and not session.dispatch.do_orm_execute:
                autocommit(connection)
            # In an open transaction, which may go on after what is no error of the database's.
            several = not at_once and connection.in_transaction()
            with connection.begin_nested() if several else nullcontext():
                result = verb(session)
            session.commit()
            return result

    def explain(
        self, query: Any, parameters: Any, format: plans.PlanFormat, switches: Mapping[str, bool | None]
    ) -> Any:
        """The plan of a statement, which is undone if it was run for that."""
        database = self.databases.current
        with self._connection("explain", database) as connection:
            disown(connection)
            handle = connection.begin_nested() if connection.in_transaction() else connection.begin()
            try:
                with self._session("explain", database, connection) as session:
                    return plans.explain(session, query, parameters, format, switches)
            finally:
                if handle.is_active:
                    handle.rollback()

    def to_sql(self, query: Any, *, literal_binds: bool) -> tuple[str, dict[str, Any]]:
        """A query as SQL and its parameters. Sends nothing."""
        database = self.databases.current
        engine = self._engine(database)
        with self._session("to_sql", database, engine) as session:
            return plans.to_sql(session, query, engine.dialect, literal_binds=literal_binds)

    def _check_writable(self, operation: str, database: Database) -> None:
        """Raise `ReadOnlyError` if this repo only reads, or the directory says that *database* is only read."""
        if self.databases.config.read_only:
            raise ReadOnlyError(f"{operation}() writes, and this repo's config says read_only=True: use another repo")
        if database.state == "read_only":
            raise ReadOnlyError(f"{operation}() writes, and the directory says that {database.home} is read_only")

    def _session(self, operation: str, database: Database, connection: Connection | Engine) -> HomeSession:
        options = self.context.options
        settings = {"execution_options": options.execution_options} if options is not None else {}
        if self._prepare_query is None:
            return HomeSession(database.home, connection, **_OF_A_VERB, **settings)
        prepare = partial(self._prepare_query, operation)
        return PreparedSession(prepare, database.home, connection, **_OF_A_VERB, **settings)

    @contextmanager
    def _connection(self, operation: str, database: Database) -> Iterator[Connection]:
        """The connection that the caller holds to *database*, else one of the cache's."""
        held = self.context.held(database)
        latest = None if held is None else held.until
        try:
            if self.context.options or self._default_options or latest is not None:
                with self._called(operation, latest) as until, self._held_or_taken(database, held, until) as connection:
                    yield connection
            elif held is not None:
                with held.watch():
                    yield held.connection
            else:
                with self.cache.engine(database).connect() as connection:
                    vouch(connection)
                    yield connection
        except SQLAlchemyError as error:
            note_database(error, database.home)
            raise

    @contextmanager
    def _held_or_taken(self, database: Database, held: Held | None, until: float | None) -> Iterator[Connection]:
        if held is None:
            with self.cache.engine(database).connect() as connection, self._ruled(connection, until):
                vouch(connection)
                yield connection
        else:
            with held.watch(), self._ruled(held.connection, until):
                yield held.connection

    @contextmanager
    def _called(self, operation: str, latest: float | None = None) -> Iterator[float | None]:
        """Run a call with its options; yields when it has to be over, *latest* if not before, None for never."""
        with self._with_defaults(operation):
            options = self.context.options or NO_OPTIONS
            before = deadline.get()
            until = None if options.timeout is None else monotonic() + options.timeout
            if latest is not None:
                until = min(until or math.inf, latest)
            deadline.set(until)
            try:
                yield until
            except ConstraintError as error:
                make = options.constraint_errors.get(error.constraint or "")
                if make is None:
                    raise
                raise make(error) from error
            finally:
                deadline.set(before)

    @contextmanager
    def _with_defaults(self, operation: str) -> Iterator[None]:
        if self._default_options is None:
            yield
        else:
            with self.context.calling(CallOptions.of(self._default_options(operation)), by_default=True):
                yield

    @contextmanager
    def _ruled(self, connection: Connection, until: float | None) -> Iterator[None]:
        """Run what the block sends on *connection* with the call's options."""
        options = self.context.options or NO_OPTIONS
        with limited(connection, until), optioned(connection, options.execution_options):
            yield

    @contextmanager
    def _step(self, operation: str, connection: Connection, latest: float | None = None) -> Iterator[None]:
        """Run a part of a block, its beginning or its end, as a call of its own."""
        with self._called(operation, latest) as until, limited(connection, until):
            yield

    @contextmanager
    def _own_connection(self, operation: str, database: Database, mode: Mode) -> Iterator[Connection]:
        """A connection for a transaction in *mode*, whatever else is open."""
        with self._called(operation):
            connection = self._engine(database).connect()
        with connection:
            vouch(connection)
            begin_as(connection, mode)
            yield connection

    @contextmanager
    def _begun(self, database: Database, mode: Mode) -> Iterator[Connection]:
        """A connection for a transaction in *mode*: the one that the caller holds, else one of its own."""
        held = self.context.held(database)
        if held is None:
            with self._own_connection("transaction", database, mode) as connection:
                yield connection
        else:
            with held.watch():
                begin_as(held.connection, mode)
                yield held.connection

    @contextmanager
    def transaction(self, mode: Mode) -> Iterator[Ending]:
        """Open a transaction on the current database, or join the one that is open on it."""
        database = self.databases.current
        joined = self.context.transaction(database)
        if joined is not None:
            with joined.joined(mode) as ending:
                yield ending
            return
        with (
            self._begun(database, mode) as connection,
            self.context.holding(Transaction(database, connection, mode)) as transaction,
            transaction.block() as ending,
        ):
            try:
                yield ending
                if is_aborted(connection):
                    # PostgreSQL would answer a COMMIT with a ROLLBACK, and call it a success.
                    transaction.doom(PendingRollbackError("a statement of a session that had joined it failed"))
                with self._step("transaction", connection, transaction.until):
                    transaction.commit()
            except BaseException as error:
                with self._step("transaction", connection):
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
        database = self.databases.current
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
        with transaction.savepoint(partial(self._step, "savepoint", transaction.connection, transaction.until)):
            yield

    def in_transaction(self) -> bool:
        """Whether the caller has a transaction open on the current database."""
        transaction = self.context.transaction(self.databases.current)
        return transaction is not None and transaction.owner.is_current

    # What is handed to the user

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """Hold one connection to the current database for a block: the open transaction's if there is one."""
        database = self.databases.current
        held = self.context.held(database)
        if held is not None:
            held.check_usable()
            if isinstance(held, Pinned):
                held.check_ended()
            disown(held.connection)
            yield held.connection
            return
        with self._called("connection"):
            connection = self.cache.engine(database).connect()
        with connection, self.context.holding(Pinned(database, connection)) as pinned:
            yield connection
            pinned.check_ended()

    @contextmanager
    def visit(self, database: Database, timeout: float | None = None) -> Iterator[None]:
        """Choose *database* for the block, and run what is called in it on one connection of its own.

        That is opened for it and closed at its end, outside the target and every open transaction; other connections
        that the block takes to *database* are too. *timeout* is the seconds for all of it, the connect included.

        Raises:
            DatabaseStateError: The directory says that it is not to be connected to. Nothing was sent.
        """
        self.databases.admit(database)
        until = None if timeout is None else monotonic() + timeout
        with self.context.detached(), self.context.using(Choice(database=database)), ExitStack() as stack:
            with self._called("across", until):
                connection = stack.enter_context(self.cache.transient(database))
            vouch(connection)
            stack.enter_context(limited(connection, until))
            pinned = stack.enter_context(self.context.holding(Pinned(database, connection)))
            yield
            pinned.check_ended()

    def session(self, **options: Any) -> RoutedSession:
        """A session of the current database, in the open transaction if there is one."""
        database = self.databases.current
        transaction = self.context.transaction(database)
        if transaction is None:
            return RoutedSession(database, self.engine(), **options)
        transaction.check_usable()
        disown(transaction.connection)
        return RoutedSession(database, transaction.connection, join_transaction_mode="rollback_only", **options)

    def engine(self) -> Engine:
        """The engine of the current database."""
        return self._engine(self.databases.current)

    def _engine(self, database: Database) -> Engine:
        """The engine of what the caller holds to *database*, else the cache's: a visit takes nothing from the cache."""
        held = self.context.held(database)
        if held is not None and held.owner.is_current:
            return held.connection.engine
        return self.cache.engine(database)

    def ping(self) -> float:
        """Open a connection, ask one question, close it; the seconds that it took."""
        begun = perf_counter()
        with self._transient("ping", self.databases.current) as connection:
            connection.execute(text("SELECT 1"))
        return perf_counter() - begun

    @contextmanager
    def _transient(self, operation: str, database: Database) -> Iterator[Connection]:
        """A connection of its own for one call, outside every transaction; each statement is committed by itself."""
        with (
            self._called(operation) as until,
            self.cache.transient(database) as connection,
            self._ruled(connection, until),
        ):
            vouch(connection)
            autocommit(connection)
            yield connection

    # The databases of a server

    def create_database(self, database: Database, blueprint: catalog.Blueprint, *, if_not_exists: bool) -> bool:
        """Make *database*; False if it was there, and might be."""
        self._check_writable("create_database", database)
        self.databases.check_undoable("create_database")
        checked_flag("if_not_exists")(if_not_exists)
        with self._maintaining("create_database", database) as connection, self._moved(database.name):
            if blueprint.template is not None:
                self.cache.disconnect(database.neighbour(blueprint.template))
            return catalog.create(connection, database.name, blueprint, if_not_exists=if_not_exists)

    def drop_database(self, database: Database, *, force: bool, if_exists: bool) -> bool:
        """Drop *database*; False if it was not there, and need not be."""
        self._check_writable("drop_database", database)
        self.databases.check_undoable("drop_database")
        checked_flag("force")(force)
        checked_flag("if_exists")(if_exists)
        self._check_dispensable(database)
        with self._maintaining("drop_database", database) as connection, self._moved(database.name):
            self.cache.disconnect(database)
            return catalog.drop(connection, database.name, force=force, if_exists=if_exists)

    def rename_database(self, database: Database, name: str) -> None:
        """Give *database* another name."""
        self._check_writable("rename_database", database)
        self.databases.check_undoable("rename_database")
        checked_name("database", name)
        self._check_dispensable(database)
        with self._maintaining("rename_database", database) as connection, self._moved(database.name, name):
            self.cache.disconnect(database)
            catalog.rename(connection, database.name, name)

    def database_exists(self, database: Database) -> bool:
        """Whether its server has *database*."""
        with self._maintaining("database_exists", database) as connection:
            return catalog.exists(connection, database.name)

    @contextmanager
    def _maintaining(self, operation: str, database: Database) -> Iterator[Connection]:
        """A connection for one call about *database*, to its server's maintenance database."""
        there = database.neighbour(self.databases.config.maintenance_database)
        with _noted(database), self._transient(operation, there) as connection:
            yield connection

    @contextmanager
    def _moved(self, *names: str) -> Iterator[None]:
        """Have the directory asked anew about *names* once the block has changed what there is."""
        yield
        for name in names:
            self.databases.forget(name)

    def _check_dispensable(self, database: Database) -> None:
        if database.name == self.databases.config.maintenance_database:
            raise ConfigError(
                f"{database.home} is the maintenance_database, from which the others are dropped and renamed: that "
                "takes a repo with another one in its config"
            )


@contextmanager
def _noted(database: Database) -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        note_database(error, database.home)
        raise


def _watched(rows: Iterator[T], database: Database, transaction: Transaction | None) -> Generator[T]:
    """*rows*, whose errors name their database and doom their transaction; those of who takes them do not."""
    with _noted(database), transaction.watch() if transaction is not None else nullcontext():
        yield from rows


# A verb's session lets go of its objects, and is a part of the transaction that its connection is in.
_OF_A_VERB: Final[Mapping[str, Any]] = {
    "autoflush": False,
    "expire_on_commit": False,
    "join_transaction_mode": "rollback_only",
}
