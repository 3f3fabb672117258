"""The Repo: one class over all databases, and its verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, NoReturn, ParamSpec, TypeVar, Unpack, overload

from sqlalchemy import Executable, Select
from sqlalchemy.engine import Engine, Result, Row

from . import reading, writing
from .config import ConfigSource, checked_seconds
from .database import Choice, Chosen, Database, Options, choose
from .errors import ConfigError
from .reading import Options as LoaderOptions
from .router import Router
from .session import RoutedSession, home_of, rehome
from .stats import Stats
from .transaction import Isolation, Mode
from .writing import BulkResult

P = ParamSpec("P")
T = TypeVar("T")


class _Unconfigured:
    """Stands where a repo's router will be, until a subclass brings a config."""

    def __get__(self, instance: object, owner: type[Repo]) -> Router:
        raise ConfigError(f"{owner.__name__} has no config: define `class MyRepo(Repo, config={{...}})` and call that")


class Repo:
    """A repository over any number of PostgreSQL databases.

        >>> class MyRepo(Repo, config={"url": "postgresql+psycopg://app@db01/app", "pool_size": 20}):
        ...     pass

    A class is a repo: it is never instantiated, and every method is a class method. A subclass with a
    config of its own has its own choice of database and its own cache of connections; one without shares
    its parent's. Safe for threads and, within one of them, for asyncio tasks that do not block.

    Verbs run on the database that is chosen where they are called, in a short session of their own, and
    return detached objects that remember their home. They raise `ConnectError` (one of its subclasses,
    where the cause is known) when the database cannot be reached, `TransactionOwnerError` in a transaction
    that another thread, task or process opened, and `TransactionDoomedError` in one that has failed.
    Errors of SQLAlchemy and the driver pass through, with a note that names the database.
    """

    _router: ClassVar[Router] = _Unconfigured()  # type: ignore[assignment]  # a descriptor that yields one

    def __init_subclass__(cls, config: ConfigSource | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if config is not None:
            cls._router = Router(cls.__qualname__, config)

    def __new__(cls) -> Repo:
        raise TypeError(f"{cls.__name__} is used as it is, not instantiated: call {cls.__name__}.get(...)")

    # Choosing a database

    @classmethod
    def set_database(cls, choice: Chosen = ..., /, **options: Unpack[Options]) -> Choice | None:  # type: ignore[assignment]  # ... is "not given"
        """Choose the database that later calls on this repo use.

        The choice belongs to the current context: this thread, or this asyncio task and the tasks that it
        starts from now on. Nothing connects until a verb runs. A name or options are merged into the repo's
        configuration, never into the previous choice, so that the same arguments always mean the same
        database; a name is only ever a name, whatever it looks like. A URL or a `Database` is complete.

            >>> before = MyRepo.set_database("shard02")
            >>> MyRepo.get_database().name
            'shard02'
            >>> _ = MyRepo.set_database(before)

        Args:
            choice: A name, a mapping of options, a URL, a `Database`, or what this method returned;
                `DEFAULT` for the repo's default, None to choose nothing.
            **options: Some of host, port, database, username, password and query, instead.

        Returns:
            What was chosen before, None if nothing was; passing it back restores exactly that.

        Raises:
            ConfigError: The arguments name no database. The choice stays as it was.
            WrongDatabaseError: A transaction is open on another database.
        """
        return cls._router.set_database(_chosen(choice, options))

    @classmethod
    def get_database(cls) -> Database:
        """The database that a verb called here would use. Does no I/O.

        Raises:
            NoDatabaseError: Nothing is chosen, and there is no default to use.
        """
        return cls._router.current

    @classmethod
    def using(cls, choice: Chosen = ..., /, **options: Unpack[Options]) -> AbstractContextManager[None]:  # type: ignore[assignment]  # ... is "not given"
        """Choose a database for a block, and restore what was chosen before on every way out.

            >>> with MyRepo.using("shard07"):
            ...     MyRepo.get_database().name
            'shard07'

        Takes what `set_database` takes. Inside a transaction on another database the block is an
        independent unit of work.

        Raises:
            ConfigError: The arguments name no database.
        """
        return cls._router.context.using(_chosen(choice, options))

    @classmethod
    def carry(cls, function: Callable[P, T]) -> Callable[P, T]:
        """Wrap *function* so that it runs with the choice made here, in whatever thread calls it.

            >>> executor.submit(MyRepo.carry(work), 1)                              # doctest: +SKIP

        Threads and executors start with the default database; tasks and `asyncio.to_thread` need no wrapping.
        An open transaction is not carried: using it there raises `TransactionOwnerError`.
        """
        return cls._router.context.carry(function)

    # Reading

    @classmethod
    def get(cls, model: type[T], key: Any, *, options: LoaderOptions = ()) -> T | None:
        """Load the row with primary key *key*, or None. Always one query, and what loader *options* ask for.

        Args:
            model: A mapped class.
            key: The key's value; a tuple in the mapping's order, or a mapping by attribute, for several columns.
            options: SQLAlchemy's loader options, such as ``selectinload(User.posts)``.

        Raises:
            ValueError: The key is None or does not fit.
        """
        return cls._router.get(model, key, options)

    @classmethod
    def get_one(cls, model: type[T], key: Any, *, options: LoaderOptions = ()) -> T:
        """`get`; raises `sqlalchemy.exc.NoResultFound` when there is no such row."""
        return cls._router.get_one(model, key, options)

    @classmethod
    def get_by(cls, model: type[T], /, **columns: Any) -> T | None:
        """Load the row with these column values, or None.

        Raises:
            ValueError: A column is unknown or its value is None, which would match nothing.
            MultipleResultsFound: SQLAlchemy's, when there is more than one.
        """
        found: T | None = cls._router.read(reading.get_by, model, columns)
        return found

    @classmethod
    def get_one_by(cls, model: type[T], /, **columns: Any) -> T:
        """`get_by`; raises `sqlalchemy.exc.NoResultFound` when there is no such row."""
        found: T = cls._router.read(reading.get_one_by, model, columns)
        return found

    @overload
    @classmethod
    def one(cls, query: type[T], *, options: LoaderOptions = ()) -> T: ...
    @overload
    @classmethod
    def one(cls, query: Select[T], *, options: LoaderOptions = ()) -> T: ...
    @overload
    @classmethod
    def one(cls, query: Select[*tuple[Any, ...]], *, options: LoaderOptions = ()) -> Any: ...
    @classmethod
    def one(cls, query: Any, *, options: LoaderOptions = ()) -> Any:
        """The only result of a `select` or a mapped class; `NoResultFound` or `MultipleResultsFound` else."""
        return cls._router.read(reading.one, query, options)

    @overload
    @classmethod
    def one_or_none(cls, query: type[T], *, options: LoaderOptions = ()) -> T | None: ...
    @overload
    @classmethod
    def one_or_none(cls, query: Select[T], *, options: LoaderOptions = ()) -> T | None: ...
    @overload
    @classmethod
    def one_or_none(cls, query: Select[*tuple[Any, ...]], *, options: LoaderOptions = ()) -> Any: ...
    @classmethod
    def one_or_none(cls, query: Any, *, options: LoaderOptions = ()) -> Any:
        """`one`, or None when there is no result."""
        return cls._router.read(reading.one_or_none, query, options)

    @overload
    @classmethod
    def first(cls, query: type[T], *, options: LoaderOptions = ()) -> T | None: ...
    @overload
    @classmethod
    def first(cls, query: Select[T], *, options: LoaderOptions = ()) -> T | None: ...
    @overload
    @classmethod
    def first(cls, query: Select[*tuple[Any, ...]], *, options: LoaderOptions = ()) -> Any: ...
    @classmethod
    def first(cls, query: Any, *, options: LoaderOptions = ()) -> Any:
        """The first result, or None: in the query's order, by primary key if it has none.

        Raises:
            ValueError: The query has neither an order nor a mapped class.
        """
        return cls._router.read(reading.first, query, options)

    @overload
    @classmethod
    def last(cls, query: type[T], *, options: LoaderOptions = ()) -> T | None: ...
    @overload
    @classmethod
    def last(cls, query: Select[T], *, options: LoaderOptions = ()) -> T | None: ...
    @overload
    @classmethod
    def last(cls, query: Select[*tuple[Any, ...]], *, options: LoaderOptions = ()) -> Any: ...
    @classmethod
    def last(cls, query: Any, *, options: LoaderOptions = ()) -> Any:
        """The last result, or None: `first`, in the opposite order.

        Raises:
            ValueError: The query has neither an order nor a mapped class, or its order is text.
        """
        return cls._router.read(reading.last, query, options)

    @overload
    @classmethod
    def all(cls, query: type[T], *, options: LoaderOptions = ()) -> list[T]: ...
    @overload
    @classmethod
    def all(cls, query: Select[T], *, options: LoaderOptions = ()) -> list[T]: ...
    @overload
    @classmethod
    def all(cls, query: Select[*tuple[Any, ...]], *, options: LoaderOptions = ()) -> list[Any]: ...
    @classmethod
    def all(cls, query: Any, *, options: LoaderOptions = ()) -> Any:
        """All results of a `select` or a mapped class: values of one column, rows of several."""
        return cls._router.read(reading.all_, query, options)

    @classmethod
    def all_by(cls, model: type[T], /, **columns: Any) -> list[T]:
        """Load all rows with these column values.

        Raises:
            ValueError: A column is unknown or its value is None, which would match nothing.
        """
        return cls._router.read(reading.all_by, model, columns)

    @overload
    @classmethod
    def stream(
        cls, query: type[T], *, batch: int = reading.BATCH, options: LoaderOptions = ()
    ) -> AbstractContextManager[Iterator[T]]: ...
    @overload
    @classmethod
    def stream(
        cls, query: Select[T], *, batch: int = reading.BATCH, options: LoaderOptions = ()
    ) -> AbstractContextManager[Iterator[T]]: ...
    @overload
    @classmethod
    def stream(
        cls, query: Select[*tuple[Any, ...]], *, batch: int = reading.BATCH, options: LoaderOptions = ()
    ) -> AbstractContextManager[Iterator[Any]]: ...
    @classmethod
    def stream(
        cls, query: Any, *, batch: int = reading.BATCH, options: LoaderOptions = ()
    ) -> AbstractContextManager[Iterator[Any]]:
        """Results as they are wanted, *batch* of them at a time from the server, in bounded memory.

            >>> with MyRepo.stream(User) as users:                                  # doctest: +SKIP
            ...     for user in users:
            ...         print(user.name)

        Part of the open transaction, else one of its own that only reads. It belongs to the database that was
        current when it began, whatever is chosen in the block.

        Raises:
            ValueError: *batch* is less than 1.
        """
        return cls._router.stream(query, batch, options)

    @classmethod
    def count(cls, query: type[Any] | Select[*tuple[Any, ...]]) -> int:
        """How many rows a `select` or a mapped class has; its limit and offset count."""
        return cls._router.read(reading.count, query)

    @classmethod
    def exists(cls, query: type[Any] | Select[*tuple[Any, ...]]) -> bool:
        """Whether a `select` or a mapped class has a row."""
        return cls._router.read(reading.exists, query)

    @classmethod
    def aggregate(cls, query: type[Any] | Select[*tuple[Any, ...]], function: reading.Aggregate, column: Any, /) -> Any:
        """``"avg"``, ``"count"``, ``"max"``, ``"min"`` or ``"sum"`` of a column, over what a query selects.

            >>> MyRepo.aggregate(User, "max", User.age)                             # doctest: +SKIP

        Its distinct, limit and offset count. Of no rows it is None, a count is 0.

        Raises:
            ValueError: The function is unknown, or the query is grouped.
        """
        return cls._router.read(reading.aggregate, query, function, column)

    # Objects that were loaded before

    @classmethod
    def load(cls, model: type[T], values: Mapping[str, Any] | Row[Any]) -> T:
        """Make a stored object of a row or mapping of column attributes, at home in the current database.

        Nothing is sent. Names that are no column attribute are left out; columns that are not given are not loaded.

        Raises:
            ValueError: A part of the primary key is missing.
        """
        made: T = reading.load(cls._router.current.home, model, values)
        return made

    @overload
    @classmethod
    def reload(cls, objects: list[T], *, options: LoaderOptions = ()) -> list[T | None]: ...
    @overload
    @classmethod
    def reload(cls, objects: T, *, options: LoaderOptions = ()) -> T | None: ...
    @classmethod
    def reload(cls, objects: Any, *, options: LoaderOptions = ()) -> Any:
        """Load an object, or a list of them, anew from its home; None for what is not there any more.

        New objects, in the order of the old ones, which stay as they are.

        Raises:
            ValueError: One was never stored.
            WrongDatabaseError: They have several homes, or one that is not the current database and that nobody, or
                several users, have chosen before.
        """
        many = isinstance(objects, list)
        found = cls._router.reload(objects if many else [objects], options)
        return found if many else found[0]

    @classmethod
    def preload(cls, objects: T, /, *wanted: Any, force: bool = False) -> T:
        """Load relationships of an object, or of a list of them, where they are not loaded yet; returns *objects*.

            >>> MyRepo.preload(users, User.posts, selectinload(User.groups).selectinload(Group.owner)) # doctest: +SKIP

        One query for each relationship and 500 objects, on the objects' home, whatever is current. Where a chain's
        first relationship is loaded, the rest of it is loaded for what is there. If it fails, nothing has changed.

        Args:
            objects: An object, a list of them, or None, for which nothing is done.
            *wanted: Relationships (``User.posts``, ``User.posts.and_(...)``), or chains of them as loader options.
            force: Load also what is loaded.

        Raises:
            ValueError: One was never stored, or has no such relationship.
            WrongDatabaseError: As for `reload`.
        """
        many = objects if isinstance(objects, list) else [objects]
        cls._router.preload([obj for obj in many if obj is not None], wanted, force=force)
        return objects

    # Writing

    @classmethod
    def insert(cls, obj: T) -> T:
        """Insert a new object, with what its relationships hold that is new; returns it, with its home set.

        One autocommitted statement where that is provably enough, else one transaction. Columns that the
        server computes come back with it. Stored objects that it refers to are written by key and stay
        as they are. If it fails, every object is as it was.

        Raises:
            ValueError: The object is stored already.
            WrongDatabaseError: It, or an object that it refers to, belongs to another database.
        """
        cls._router.write(writing.insert, obj)
        return obj

    @classmethod
    def insert_all(cls, model: type[Any], rows: Iterable[Mapping[str, Any]]) -> BulkResult:
        """Insert rows, given as mappings by column attribute, in one transaction; no rows, no statement.

        Raises:
            ValueError: A row has a key that is no column.
        """
        return cls._router.write_rows(writing.insert_all, model, rows)

    @classmethod
    def update(cls, obj: T, changes: Mapping[str, Any] | None = None, /, **columns: Any) -> T:
        """Set attributes of a stored object and write what differs from the row; returns it.

            >>> MyRepo.update(user, {"name": "Ada"})                                # doctest: +SKIP

        Nothing changed, nothing is sent. If it fails, the object is as it was before the call.

        Raises:
            ValueError: The object was never stored, or an attribute is unknown.
            StaleError: The row is gone, or has another version.
            WrongDatabaseError: The object belongs to another database.
        """
        cls._router.update(obj, {**(changes or {}), **columns})
        return obj

    @classmethod
    def delete(cls, obj: T) -> T:
        """Delete a stored object, with what the mapping cascades to; returns it.

        Raises:
            ValueError: The object was never stored.
            StaleError: The row is gone, or has another version.
            WrongDatabaseError: The object belongs to another database.
        """
        cls._router.write(writing.delete, obj)
        return obj

    @classmethod
    def execute(cls, statement: Executable | str, parameters: Any = None) -> Result[Any]:
        """Run any statement, or SQL as a string with ``:name`` parameters. The result outlives the connection.

        Outside a transaction the statement is committed by itself. The connection is reset afterwards: no
        ``SET``, role, temporary table or lock that the statement leaves behind meets a later borrower, unless
        the config says ``pgbouncer=True``.
        """
        return cls._router.run(reading.execute, statement, parameters)

    @classmethod
    def call_options(cls, *, timeout: float) -> AbstractContextManager[None]:
        """Give each call in the block *timeout* seconds in all: to get a connection, and for its statements.

            >>> with MyRepo.call_options(timeout=2.0):                              # doctest: +SKIP
            ...     MyRepo.all(Report)

        One that takes longer is given up within a quarter of a second: the server is asked to stop, the connection
        is closed, and `sqlalchemy.exc.OperationalError` is raised, `CheckoutTimeoutError` or `ServerUnavailableError`
        if there was no connection yet. Entering a `transaction` or a `savepoint`, and leaving it, are calls of their
        own; what is done with a `session` or an `engine` keeps its own time. Whether a COMMIT that was given up took
        place, nobody knows. Blocks nest; the innermost counts. Tasks inherit it, threads do not.

        Raises:
            ConfigError: The timeout is no number of seconds above 0.
        """
        return cls._router.context.limited(checked_seconds("timeout")(timeout))

    # Transactions

    @classmethod
    def transaction(
        cls,
        *,
        isolation: Isolation | None = None,
        read_only: bool = False,
        deferrable: bool = False,
        timeout: float | None = None,
    ) -> AbstractContextManager[None]:
        """Run a block in a transaction on the current database: committed at its end, rolled back on any error.

        It belongs to the thread or task that opened it. Inside another one on the same database it is part
        of that. A database error outside a `savepoint` dooms it: later verbs raise `TransactionDoomedError`,
        and so does leaving the block normally.

            >>> with MyRepo.transaction(isolation="serializable", timeout=5.0):     # doctest: +SKIP
            ...     MyRepo.update(account, balance=account.balance - 10)

        Args:
            isolation: "read committed", "repeatable read" or "serializable"; the database's own if not given.
            read_only: Have the server refuse to write in it.
            deferrable: Let the server wait until it can run to its end; for serializable ones that only read.
            timeout: Seconds for all of its verbs, savepoints and its COMMIT together; what is left when a call
                begins is its time, as with `call_options`, which may give it less. A COMMIT that would be too late
                is not sent. What is done with a `session` keeps its own time.

        Raises:
            ConfigError: An option is unknown or contradicts another; or the block is part of a transaction that was
                opened with others.
        """
        return cls._router.plain_transaction(_mode(isolation, read_only, deferrable, timeout))

    @classmethod
    def transact(
        cls,
        function: Callable[[], T],
        *,
        isolation: Isolation | None = None,
        read_only: bool = False,
        deferrable: bool = False,
        timeout: float | None = None,
    ) -> T:
        """Call *function* in a `transaction` with these options, and return what it returns.

        If it calls `rollback`, nothing is kept, and what that was given is returned in its place.
        """
        return cls._router.transact(function, _mode(isolation, read_only, deferrable, timeout))

    @classmethod
    def rollback(cls, value: object = None) -> NoReturn:
        """End the innermost `transaction` or `transact` block on the current database, and keep nothing of it.

        `transact` returns *value*; a ``with`` block ends quietly. When the block is part of another one, that one is
        doomed: it can only be rolled back too.

        Raises:
            NotInTransactionError: There is no open transaction on the current database.
        """
        cls._router.rollback(value)

    @classmethod
    def savepoint(cls) -> AbstractContextManager[None]:
        """Run a block of a transaction whose failure undoes the block alone.

        Raises:
            NotInTransactionError: There is no open transaction on the current database.
        """
        return cls._router.savepoint()

    @classmethod
    def in_transaction(cls) -> bool:
        """Whether the caller has a transaction open on the current database."""
        return cls._router.in_transaction()

    @classmethod
    def detached(cls) -> AbstractContextManager[None]:
        """Run a block outside every open transaction: what it does is an independent unit of work."""
        return cls._router.context.detached()

    # SQLAlchemy's own

    @classmethod
    def session(cls, **options: Any) -> RoutedSession:
        """A plain SQLAlchemy session, pinned for life to the current database. The caller closes it.

            >>> with MyRepo.session() as session:                                   # doctest: +SKIP
            ...     session.add(User(name="Ada"))
            ...     session.commit()

        Inside a transaction on that database it is part of it. *options* are those of `sqlalchemy.orm.Session`.
        """
        return cls._router.session(**options)

    @classmethod
    def engine(cls) -> Engine:
        """The SQLAlchemy engine of the current database: the same object as long as anybody holds it."""
        return cls._router.engine()

    # Objects and their homes

    @staticmethod
    def home(obj: object) -> str | None:
        """Where *obj* is stored, as ``server/name``; None for an object that is not."""
        return home_of(obj)

    @classmethod
    def rehome(cls, obj: T, choice: Chosen = None, /, **options: Unpack[Options]) -> T:
        """Copy *obj* into a new object to be inserted into another database, by default the current one.

        The copy has the values of all columns, the primary key included, and no relationships. It can be
        inserted into that database only.

        Raises:
            ValueError: A column is not loaded.
        """
        return rehome(obj, cls._router.named(choice, options).home)

    # The connections

    @classmethod
    def stats(cls) -> Stats:
        """The books of the connection cache, at this moment."""
        return cls._router.cache.stats()

    @classmethod
    def ping(cls) -> float:
        """Open a connection to the current database, ask it one question and close it; the seconds it took.

        Outside the cache: neither a cached connection nor the target plays a part.
        """
        return cls._router.ping()

    @classmethod
    def disconnect(cls, choice: Chosen = None, /, **options: Unpack[Options]) -> None:
        """Close the cached connections to a database, by default the current one, so that it can be dropped.

        Those in use are closed when they are returned.
        """
        cls._router.cache.disconnect(cls._router.named(choice, options))

    @classmethod
    def disconnect_all(cls) -> None:
        """`disconnect`, for every database."""
        cls._router.cache.disconnect_all()

    @classmethod
    def dispose(cls) -> None:
        """Close every connection for good: a later verb raises `RepoDisposedError`.

        Connections in use are closed when they are returned.
        """
        cls._router.cache.dispose()


def _mode(isolation: Any, read_only: bool, deferrable: bool, timeout: float | None) -> Mode:
    return Mode(isolation, read_only, deferrable, checked_seconds("timeout", optional=True)(timeout))


def _chosen(choice: Any, options: Mapping[str, Any]) -> Choice | None:
    if choice is not ...:
        return choose(choice, options)
    if not options:
        raise ConfigError("no database given: pass a name or options, DEFAULT for the default, None to choose nothing")
    return choose(None, options)
