"""The Repo: one class over all databases, and its verbs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, ParamSpec, TypeVar, Unpack, overload

from sqlalchemy import Executable, Select
from sqlalchemy.engine import Engine, Result

from . import verbs
from .config import ConfigSource, checked_seconds
from .database import Choice, Chosen, Database, Options, choose
from .errors import ConfigError
from .router import Router
from .session import RoutedSession, home_of, rehome
from .stats import Stats
from .verbs import BulkResult

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
    def get(cls, model: type[T], key: Any) -> T | None:
        """Load the row with primary key *key*, or None. Always one query.

        Args:
            model: A mapped class.
            key: The key's value; a tuple in the mapping's order, or a mapping by attribute, for several columns.

        Raises:
            ValueError: The key is None or does not fit.
        """
        return cls._router.get(model, key)

    @classmethod
    def get_one(cls, model: type[T], key: Any) -> T:
        """`get`; raises `sqlalchemy.exc.NoResultFound` when there is no such row."""
        return cls._router.get_one(model, key)

    @classmethod
    def get_by(cls, model: type[T], /, **columns: Any) -> T | None:
        """Load the row with these column values, or None.

        Raises:
            ValueError: A column is unknown or its value is None, which would match nothing.
            MultipleResultsFound: SQLAlchemy's, when there is more than one.
        """
        found: T | None = cls._router.read(verbs.get_by, model, columns)
        return found

    @overload
    @classmethod
    def one(cls, query: type[T]) -> T: ...
    @overload
    @classmethod
    def one(cls, query: Select[T]) -> T: ...
    @overload
    @classmethod
    def one(cls, query: Select[*tuple[Any, ...]]) -> Any: ...
    @classmethod
    def one(cls, query: Any) -> Any:
        """The only result of a `select` or a mapped class; `NoResultFound` or `MultipleResultsFound` else."""
        return cls._router.read(verbs.one, query)

    @overload
    @classmethod
    def one_or_none(cls, query: type[T]) -> T | None: ...
    @overload
    @classmethod
    def one_or_none(cls, query: Select[T]) -> T | None: ...
    @overload
    @classmethod
    def one_or_none(cls, query: Select[*tuple[Any, ...]]) -> Any: ...
    @classmethod
    def one_or_none(cls, query: Any) -> Any:
        """`one`, or None when there is no result."""
        return cls._router.read(verbs.one_or_none, query)

    @overload
    @classmethod
    def all(cls, query: type[T]) -> list[T]: ...
    @overload
    @classmethod
    def all(cls, query: Select[T]) -> list[T]: ...
    @overload
    @classmethod
    def all(cls, query: Select[*tuple[Any, ...]]) -> list[Any]: ...
    @classmethod
    def all(cls, query: Any) -> list[Any]:
        """All results of a `select` or a mapped class: values of one column, rows of several."""
        return cls._router.read(verbs.all_, query)

    @classmethod
    def count(cls, query: type[Any] | Select[*tuple[Any, ...]]) -> int:
        """How many rows a `select` or a mapped class has; its limit and offset count."""
        return cls._router.read(verbs.count, query)

    @classmethod
    def exists(cls, query: type[Any] | Select[*tuple[Any, ...]]) -> bool:
        """Whether a `select` or a mapped class has a row."""
        return cls._router.read(verbs.exists, query)

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
        cls._router.write(verbs.insert, obj)
        return obj

    @classmethod
    def insert_all(cls, model: type[Any], rows: Iterable[Mapping[str, Any]]) -> BulkResult:
        """Insert rows, given as mappings by column attribute, in one transaction; no rows, no statement.

        Raises:
            ValueError: A row has a key that is no column.
        """
        return cls._router.write_rows(verbs.insert_all, model, rows)

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
        cls._router.write(verbs.delete, obj)
        return obj

    @classmethod
    def execute(cls, statement: Executable | str, parameters: Any = None) -> Result[Any]:
        """Run any statement, or SQL as a string with ``:name`` parameters. The result outlives the connection.

        Outside a transaction the statement is committed by itself. The connection is reset afterwards: no
        ``SET``, role, temporary table or lock that the statement leaves behind meets a later borrower, unless
        the config says ``pgbouncer=True``.
        """
        return cls._router.run(verbs.execute, statement, parameters)

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
    def transaction(cls) -> AbstractContextManager[None]:
        """Run a block in a transaction on the current database: committed at its end, rolled back on any error.

        It belongs to the thread or task that opened it. Inside another one on the same database it is part
        of that. A database error outside a `savepoint` dooms it: later verbs raise `TransactionDoomedError`,
        and so does leaving the block normally.
        """
        return cls._router.transaction()

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


def _chosen(choice: Any, options: Mapping[str, Any]) -> Choice | None:
    if choice is not ...:
        return choose(choice, options)
    if not options:
        raise ConfigError("no database given: pass a name or options, DEFAULT for the default, None to choose nothing")
    return choose(None, options)
