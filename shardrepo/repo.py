"""The Repo: one class over all databases, and its verbs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from inspect import getattr_static
from typing import Any, ClassVar, Final, Literal, NoReturn, ParamSpec, TypeVar, Unpack, overload

from sqlalchemy import Executable, Select, Table
from sqlalchemy.engine import Connection, Engine, Result, Row

from . import reading
from .bulk import Changes
from .calls import CallOptions, checked_seconds
from .calls import Options as CallOptionsGiven
from .catalog import Blueprint
from .config import ConfigSource
from .conflicts import Conflict, OnConflict
from .conflicts import Target as ConflictTarget
from .conflicts import Where as ConflictWhere
from .database import Choice, Chosen, Database, Options, choose
from .databases import Databases
from .destination import Destination
from .directory import Answer, Called, Location
from .errors import ConfigError
from .inserting import Insertion, Via
from .plans import PlanFormat
from .reading import Options as LoaderOptions
from .returning import BulkResult, Returning
from .router import Hooks, Router
from .sandbox import Sandbox
from .session import RoutedSession, home_of, rehome
from .stats import Stats
from .transaction import Isolation, Mode
from .visiting import Across, Visited

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
            locate, listing = _own(cls, "locate"), _own(cls, "list_databases")
            directory = Called(locate, listing) if locate is not None else None
            databases = Databases(cls.__qualname__, config, cls.configure_engine, directory)
        elif isinstance(inherited := getattr_static(cls, "_router"), Router):
            databases = inherited.databases
            for hook in _OF_THE_CONFIG & cls.__dict__.keys():
                raise ConfigError(
                    f"{cls.__name__} shares its parent's databases: override {hook}() where the config is"
                )
        else:
            return
        cls._router = Router(databases, Hooks(_own(cls, "prepare_query"), _own(cls, "default_options")))

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
        return cls._router.databases.set_database(_chosen(choice, options))

    @classmethod
    def get_database(cls) -> Database:
        """The database that a verb called here would use. Does no I/O.

        Raises:
            NoDatabaseError: Nothing is chosen, and there is no default to use.
        """
        return cls._router.databases.current

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
        made: T = reading.load(cls._router.databases.current.home, model, values)
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

    @overload
    @classmethod
    def insert(cls, obj: T, *, on_conflict: Literal["raise"] = "raise") -> T: ...
    @overload
    @classmethod
    def insert(
        cls,
        obj: T,
        *,
        on_conflict: OnConflict,
        conflict_target: ConflictTarget | None = None,
        where: ConflictWhere | None = None,
    ) -> T | None: ...
    @classmethod
    def insert(
        cls,
        obj: T,
        *,
        on_conflict: OnConflict = "raise",
        conflict_target: ConflictTarget | None = None,
        where: ConflictWhere | None = None,
    ) -> T | None:
        """Insert a new object, with what its relationships hold that is new; returns it, with its home set.

        One autocommitted statement where that is provably enough, else one transaction. Columns that the
        server computes come back with it. Stored objects that it refers to are written by key and stay
        as they are. If it fails, every object is as it was.

            >>> MyRepo.insert(                                                      # doctest: +SKIP
            ...     User(email="ada@x", visits=1),
            ...     on_conflict=lambda excluded: {"visits": User.visits + excluded.visits},
            ...     conflict_target=User.email,
            ... )

        With *on_conflict* it is one row in one statement, for an object that refers to nothing that is new, without
        SQLAlchemy's mapper events. The object becomes the row as it is stored afterwards, its key included; None is
        returned, and the object left as it was, when nothing was written.

        Args:
            obj: An object that was never stored.
            on_conflict: What to do when a row is in its way: "raise" `ConstraintError`; "nothing"; "replace" all its
                columns, but for the key and the target, by those that would have been inserted; a list of the columns
                to replace; a mapping of columns to values or SQL; or a callable that makes one of what would have been
                inserted. A version is counted.
            conflict_target: What a conflict is: columns, the name of a constraint, or a constraint or `Index`, a
                partial one too. It can be left out for "nothing", which then means any.
            where: Write over rows that meet this only: a criterion, or a callable as *on_conflict*.

        Raises:
            ConstraintError: The row is in conflict with a constraint.
            ValueError: The object is stored already, or the options contradict each other or name no column.
            WrongDatabaseError: It, or an object that it refers to, belongs to another database.
        """
        plain = isinstance(on_conflict, str) and on_conflict == "raise" and conflict_target is None and where is None
        conflict = None if plain else Conflict.of(Destination.of(type(obj)), on_conflict, conflict_target, where)
        if conflict is not None:
            return cls._router.upsert(obj, conflict)
        cls._router.insert(obj)
        return obj

    @classmethod
    def insert_all(
        cls,
        model: type[Any] | Table,
        rows: Iterable[Mapping[str, Any]] | Select[*tuple[Any, ...]],
        *,
        on_conflict: OnConflict = "raise",
        conflict_target: ConflictTarget | None = None,
        where: ConflictWhere | None = None,
        returning: Returning = False,
        via: Via = "insert",
    ) -> BulkResult:
        """Insert rows, 10,000 of them with a statement, 50,000 with a COPY: all or none; no rows, no statement.

            >>> MyRepo.insert_all(User, ({"name": name} for name in names), returning=User.id) # doctest: +SKIP

        Args:
            model: A mapped class, or a `Table`.
            rows: Mappings by column attribute, of which each may name other columns, the rest getting their defaults;
                they are taken as they are sent. Or a `select` of columns so named, which runs in the same database.
            on_conflict: What to do about a row that is there already, as for `insert`.
            conflict_target: As for `insert`.
            where: As for `insert`.
            returning: True for objects, or columns: their values, rows of several. In the order of *rows*, unless
                there is an *on_conflict*, for which those that were not written are missing.
            via: "copy" to use COPY, the fastest; it knows neither conflicts nor returning.

        Raises:
            ConstraintError: A row is in conflict with a constraint.
            TypeError: A row is no mapping.
            ValueError: A row has a key that is no column, or the options contradict each other.
        """
        destination = Destination.of(model)
        conflict = Conflict.of(destination, on_conflict, conflict_target, where)
        return cls._router.insert_all(Insertion(destination, rows, conflict, returning, via))

    @classmethod
    def insert_or_update(cls, obj: T) -> T:
        """`insert` an object that was never stored, write what was changed of one that was; returns it.

        By what the object is, not by what is stored: see *on_conflict* of `insert` for that.
        """
        cls._router.insert_or_update(obj)
        return obj

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
        cls._router.delete(obj)
        return obj

    @classmethod
    def update_all(
        cls,
        query: type[Any] | Select[*tuple[Any, ...]],
        changes: Mapping[Any, Any] | None = None,
        /,
        *,
        inc: Mapping[Any, Any] | None = None,
        push: Mapping[Any, Any] | None = None,
        pull: Mapping[Any, Any] | None = None,
        returning: Returning = False,
    ) -> BulkResult:
        """Update every row of a mapped class, or those that a `select` of one selects, with one statement.

            >>> MyRepo.update_all(select(User).where(User.age < 18), {"role": "minor"}, inc={"n": 1})   # doctest: +SKIP

        Objects that were loaded before stay as they are; versions are not counted.

        Args:
            query: Which rows; also with joins, an order and a limit.
            changes: Values, or SQL, by column.
            inc: What to add to columns.
            push: What to append to array columns.
            pull: What to remove from array columns, wherever it is in them.
            returning: True for objects, or columns: their values, rows of several.

        Raises:
            ValueError: No column is named, one is unknown or named twice, or is no array.
        """
        return cls._router.update_all(query, Changes(changes or {}, inc or {}, push or {}, pull or {}), returning)

    @classmethod
    def delete_all(cls, query: type[Any] | Select[*tuple[Any, ...]], *, returning: Returning = False) -> BulkResult:
        """Delete every row of a mapped class, or those that a `select` of one selects, with one statement.

        What the mapping cascades to is left to the server's foreign keys. *returning* is as for `update_all`.
        """
        return cls._router.delete_all(query, returning)

    @classmethod
    def execute(cls, statement: Executable | str, parameters: Any = None) -> Result[Any]:
        """Run any statement, or SQL as a string with ``:name`` parameters. The result outlives the connection.

        Outside a transaction the statement is committed by itself. The connection is reset afterwards: no
        ``SET``, role, temporary table or lock that the statement leaves behind meets a later borrower, unless
        the config says ``pgbouncer=True``.
        """
        return cls._router.run(reading.execute, statement, parameters)

    @classmethod
    def explain(
        cls,
        query: type[Any] | Executable | str,
        parameters: Mapping[str, Any] | None = None,
        *,
        format: PlanFormat = "text",
        **switches: bool,
    ) -> Any:
        """How the server would run a statement; with ``analyze=True`` it is run, and undone.

            >>> print(MyRepo.explain(select(User).where(User.age > 30), analyze=True, buffers=True)) # doctest: +SKIP

        Args:
            query: A `select`, a mapped class, any other statement, or SQL as a string.
            parameters: Of the statement.
            format: "text", "yaml" and "xml" give a string, "json" what the server's JSON says.
            **switches: Of PostgreSQL's EXPLAIN: analyze, verbose, costs, settings, generic_plan, buffers, wal, timing
                and summary.

        Raises:
            ValueError: The format or a switch is unknown.
        """
        return cls._router.explain(query, parameters, format, switches)

    @classmethod
    def to_sql(cls, query: type[Any] | Executable | str, *, literal_binds: bool = False) -> tuple[str, dict[str, Any]]:
        """The SQL of a query and its parameters, as the driver is given them. Sends nothing.

        With *literal_binds* the values stand in the SQL: to be read, not to be run.
        """
        return cls._router.to_sql(query, literal_binds=literal_binds)

    @classmethod
    def call_options(cls, **options: Unpack[CallOptionsGiven]) -> AbstractContextManager[None]:
        """Say for each call in the block how long it may take, how it is run, what its errors are, and its tags.

            >>> with MyRepo.call_options(timeout=2.0, tags={"request": 7}):         # doctest: +SKIP
            ...     MyRepo.all(Report)

        A call that takes longer than its timeout is given up within a quarter of a second: the server is asked to
        stop, the connection is closed, and `sqlalchemy.exc.OperationalError` is raised, `CheckoutTimeoutError` or
        `ServerUnavailableError` if there was no connection yet. Entering a `transaction`, a `savepoint` or a
        `connection`, and leaving it, are calls of their own; what is done with a `session`, an `engine` or by hand on
        a `connection` keeps its own time. Whether a COMMIT that was given up took place, nobody knows.

        Blocks nest; of each option the innermost counts, mappings are merged. Tasks inherit them, threads do not.

        Args:
            **options: *timeout*, seconds for each call in all: to get a connection, and for its statements.
                *execution_options*, SQLAlchemy's, for every statement. *constraint_errors*, what to raise in place of
                a `ConstraintError` by the name of the constraint: an exception class or a callable, which is called
                with it. *tags*, a mapping that every `Event` and log record carries.

        Raises:
            ConfigError: There is no such option, none is given, or a value is impossible.
        """
        if not options:
            raise ConfigError("no option given: give some of timeout, execution_options, constraint_errors and tags")
        return cls._router.context.calling(CallOptions.of(options))

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

    @classmethod
    def connection(cls) -> AbstractContextManager[Connection]:
        """Hold one connection to the current database for a block, and run its verbs and transactions on it.

            >>> with MyRepo.connection() as connection:                             # doctest: +SKIP
            ...     connection.execute(text("SET search_path TO archive"))
            ...     MyRepo.all(Report)

        Each statement is committed by itself, also those of SQLAlchemy's *connection*, whose own ``begin()`` begins
        nothing: use `transaction` for what belongs together. What SQL sets in the session lasts until the end of the
        block. Blocks nest, on the same connection; in an open transaction it is that one's. It belongs to the thread
        or task that opened it. A `stream` outside a transaction has a connection of its own. With ``pgbouncer=True``
        the pooler may run each statement in another session of the server.

        Raises:
            TransactionDoomedError: At a later verb or the end: the connection was lost, or a BEGIN that was sent by
                hand is still open. It is closed, and what was not committed is rolled back.
        """
        return cls._router.connection()

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

    # Many databases

    @classmethod
    def across(
        cls, databases: Iterable[Visited] | None = None, /, *, per_server: int = 4, timeout: float | None = None
    ) -> Across:
        """Run `all`, `count`, `execute` or a function in many databases, several at a time. Does no I/O itself.

            >>> for outcome in MyRepo.across(timeout=10.0).count(User):             # doctest: +SKIP
            ...     print(outcome.name, outcome.value if outcome.ok else outcome.error)
            >>> MyRepo.across(["shard01", "shard02"]).count(User).collect()         # doctest: +SKIP
            {'shard01': 3, 'shard02': 0}

        An outcome for each database, as soon as it is there; one that fails hides no other. Each is visited on a
        connection of its own, closed afterwards, so that what the cache keeps stays there.

        Args:
            databases: Names, or whatever `set_database` takes or `databases` returns; each is visited once. All that
                the directory lists if not given.
            per_server: At how many databases of a server at a time; 64 on all servers together.
            timeout: Seconds for all that is done in one database, the connect included; then its connection is closed,
                and its outcome an error. What is done with a `session` keeps its own time.

        Raises:
            ConfigError: An argument is impossible, or there is no directory to list the databases.
        """
        return Across(cls._router, databases, per_server=per_server, timeout=timeout)

    # Tests

    @classmethod
    def sandbox(
        cls, databases: Iterable[Chosen] | None = None, *, shared: bool = False, check_deferred: bool = False
    ) -> Sandbox:
        """Have every database be at the end of a block as it was at its beginning. For tests; does no I/O itself.

            >>> with MyRepo.sandbox():                                              # doctest: +SKIP
            ...     MyRepo.insert(User(name="Ada"))                 # rolled back, in whatever database it was

        The first use of a database takes one connection to it, from the cache, for as long as the block lasts, and
        begins a transaction there. What runs in the block needs to know nothing of it: its transactions are savepoints,
        `in_transaction` says what it would say, a statement that fails spoils nothing. Whatever way a connection is
        taken, by a verb, a `session`, an `engine` or `across`, it is that one; one thread at a time has it.

        The thread or task that enters the block belongs to it, with the tasks and `asyncio.to_thread` calls that it
        starts, what is `carry`-ed, and what `Sandbox.allow` names; any other use of this repo is a `SandboxError`
        meanwhile. Not undone are sequences, and what is done in `Sandbox.unboxed`; ``now()`` stands still, NOTIFY
        reaches nobody, and a transaction's isolation is the sandbox's.

        Args:
            databases: Only these may be used; all if not given.
            shared: Every thread of the process belongs to it.
            check_deferred: Check deferred constraints where a transaction ends, as a COMMIT would.

        Raises:
            ConfigError: An argument is impossible; or a block is open that this cannot begin in, or a connection that
                what is written on would stay.
            SandboxError: At the end: a connection is still in use, or something cannot have been undone.
        """
        return cls._router.databases.sandbox(databases, shared=shared, check_deferred=check_deferred)

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
        return rehome(obj, cls._router.databases.named(choice, options).home)

    # Hooks, for a subclass to override

    @classmethod
    def prepare_query(cls, operation: str, query: Select[Any]) -> Select[Any]:  # noqa: ARG003  # for who overrides it
        """Rewrite the query of a verb before it is run, and those by which it loads relationships.

            >>> class MyRepo(Repo, config={...}):                                   # doctest: +SKIP
            ...     @classmethod
            ...     def prepare_query(cls, operation, query):
            ...         return query.options(with_loader_criteria(Document, Document.deleted_at.is_(None)))

        Called with the name of the verb: for those that read, for `update_all` and `delete_all` with the query that
        says which rows, for `insert_all` with one that gives the rows. Not for text, nor in a `session`.
        """
        return query

    @classmethod
    def default_options(cls, operation: str) -> CallOptionsGiven:  # noqa: ARG003
        """The `call_options` of a verb, by its name, where none are given. Called at every call."""
        return {}

    @classmethod
    def configure_engine(cls, engine: Engine, database: Database) -> None:
        """Prepare a new engine: add listeners to it, say. Does no I/O.

        Called by the class that has the config, for every database that is used, and again when an engine that was
        not used for long is made anew.
        """

    # The databases of a server

    @classmethod
    def databases(cls) -> list[Location]:
        """All databases that the directory knows, by name; asked anew at every call.

        Raises:
            ConfigError: There is no directory, or it cannot list.
        """
        return cls._router.databases.listed()

    @classmethod
    def create_database(
        cls,
        choice: Chosen = None,
        /,
        *,
        template: str | None = None,
        encoding: str | None = None,
        owner: str | None = None,
        if_not_exists: bool = False,
        **options: Unpack[Options],
    ) -> bool:
        """Make a database; True when it was made.

            >>> MyRepo.create_database("shard08", template="template_app", if_not_exists=True)  # doctest: +SKIP
            True

        This and the three that follow take what `set_database` takes, but need a name. Each is one statement, on a
        connection of its own to the server's `maintenance_database`, as the user that is chosen: it is committed at
        once, and no part of a transaction that is open. After a timeout nobody knows whether it took place.

        Args:
            choice: A name, a mapping of options, a URL or a `Database`.
            template: The database to copy, to which nobody may be connected; this repo's idle connections to it are
                closed first. The server's own template if not given.
            encoding: Its character set, "UTF8" or "SQL_ASCII" say; the template's if not given.
            owner: The role that it is to belong to; the user if not given.
            if_not_exists: Return False if there is one of that name, however that was made. Of several callers at the
                same time one makes it.
            **options: Some of host, port, database, username, password and query, instead of *choice*.

        Raises:
            ConfigError: No database is named, or an argument is nothing that PostgreSQL could take.
            DBAPIError: SQLAlchemy's, where the server refuses.
        """
        blueprint = Blueprint(template, encoding, owner)
        database = cls._router.databases.singled_out(choice, options)
        return cls._router.create_database(database, blueprint, if_not_exists=if_not_exists)

    @classmethod
    def drop_database(
        cls, choice: Chosen = None, /, *, force: bool = False, if_exists: bool = False, **options: Unpack[Options]
    ) -> bool:
        """Drop a database, with all that is in it; True when it was dropped.

        This repo's idle connections to it are closed first, those of all users. What else is connected to it, the open
        sessions and transactions of this repo included, the server waits for some seconds, then refuses (SQLSTATE
        55006).

        Args:
            choice: As for `create_database`.
            force: Have the server end whatever is connected to it first, such as a pooler's own connections.
            if_exists: Return False if there is none of that name.

        Raises:
            ConfigError: No database is named, or it is the `maintenance_database`.
            DBAPIError: SQLAlchemy's, where the server refuses; if it is in use, with a note that says what to do.
        """
        database = cls._router.databases.singled_out(choice, options)
        return cls._router.drop_database(database, force=force, if_exists=if_exists)

    @classmethod
    def rename_database(cls, choice: Chosen, name: str, /, **options: Unpack[Options]) -> None:
        """Give a database the name *name*, on the same server, while nobody is connected to it.

        This repo's idle connections to it are closed first. Objects that were loaded before keep their old home, which
        is no database any more: load them again.

        Args:
            choice: As for `create_database`; None beside *options*.
            name: Its new name.
            **options: As for `create_database`.

        Raises:
            ConfigError: As for `drop_database`, or *name* is no name.
            DBAPIError: As for `drop_database`.
        """
        cls._router.rename_database(cls._router.databases.singled_out(choice, options), name)

    @classmethod
    def database_exists(cls, choice: Chosen = None, /, **options: Unpack[Options]) -> bool:
        """Whether its server has a database of that name; nothing connects to that.

        Raises:
            ConfigError: No database is named.
        """
        return cls._router.database_exists(cls._router.databases.singled_out(choice, options))

    @classmethod
    def locate(cls, name: str) -> Answer | Awaitable[Answer]:
        """Say where the database *name* is, in place of a directory in the config: a host, a mapping of options, None.

        May be async. Its answers are remembered as a directory's are.
        """
        raise NotImplementedError

    @classmethod
    def list_databases(cls) -> Iterable[str | Location] | Awaitable[Iterable[str | Location]]:
        """Name all databases, beside `locate`. May be async."""
        raise NotImplementedError

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

        Those of all users, whoever is chosen to disconnect it. Those in use are closed when they are returned.
        """
        cls._router.cache.disconnect(cls._router.databases.named(choice, options))

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


# Hooks of what classes without a config share.
_OF_THE_CONFIG: Final = frozenset({"configure_engine", "locate", "list_databases"})


def _own(repo: type[Repo], hook: str) -> Any:
    """A hook of *repo*, if it or a class between has overridden it."""
    return None if getattr_static(repo, hook) is Repo.__dict__[hook] else getattr(repo, hook)


def _mode(isolation: Any, read_only: bool, deferrable: bool, timeout: float | None) -> Mode:
    return Mode(isolation, read_only, deferrable, checked_seconds("timeout", optional=True)(timeout))


def _chosen(choice: Any, options: Mapping[str, Any]) -> Choice | None:
    if choice is not ...:
        return choose(choice, options)
    if not options:
        raise ConfigError("no database given: pass a name or options, DEFAULT for the default, None to choose nothing")
    return choose(None, options)
