"""Every error that the library raises, and what each one carries.

Where SQLAlchemy already has the error that callers catch, ours is a subclass of both. The facts of an
error are attributes; its message says what happened, with the numbers, and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sqlalchemy import exc as sa_exc
from sqlalchemy.orm.exc import StaleDataError

if TYPE_CHECKING:
    from .database import Database
    from .directory import Location

Kind: TypeAlias = Literal["unique", "foreign_key", "check", "exclusion", "not_null"]
Unavailable: TypeAlias = Literal["refused", "timeout", "starting", "deadline", "replaced", "down"]


class ShardRepoError(Exception):
    """Root of every error of this library."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from their message by default, which an error with facts of its own
        # cannot be: carry the facts as they are, so that a worker process can report any of these.
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[BaseException], args: tuple[Any, ...], facts: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(facts)
    return error


class ConfigError(ShardRepoError, ValueError):
    """Config, options or a choice that name nothing, contradict each other, or are misspelt."""


class NoDatabaseError(ShardRepoError):
    """Nothing is chosen and there is no default to use."""


class RepoDisposedError(ShardRepoError):
    """The repo was disposed; it opens no connection any more."""


class SandboxError(ShardRepoError):
    """A thread belongs to no sandbox, or to one that is over; a database is none of a sandbox's; or one was left, and
    something could not be undone."""


class WrongDatabaseError(ShardRepoError):
    """An object, a transaction or an answering server belongs to another database.

    Attributes:
        expected: The home (``server/name``) of the database that was to be used.
        found: The home that the object, transaction or server has; None if it has none.
    """

    def __init__(self, message: str, *, expected: str, found: str | None) -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class ConnectError(ShardRepoError, sa_exc.OperationalError):
    """No connection could be opened; alone when the cause cannot be told.

    Attributes:
        database: The database that was to be reached, without its password; None where nobody knows where it is.
        sqlstate: The server's SQLSTATE, None if it gave none.
        orig: The driver's error.
    """

    # SQLAlchemy appends a link for this code to the message; the remedy is in ours.
    code = None  # type: ignore[assignment]  # as SQLAlchemy's own base class has it

    def __init__(
        self, message: str, *, database: Database | None, sqlstate: str | None = None, orig: BaseException | None = None
    ) -> None:
        sa_exc.StatementError.__init__(self, message, None, None, orig)
        self.connection_invalidated = False
        self.database = database
        self.sqlstate = sqlstate


class UnknownDatabaseError(ConnectError):
    """The server says that the database does not exist, or the directory does not know it: then `database` is None."""


class DatabaseStateError(ShardRepoError):
    """The directory says that a database is not to be connected to now. Nothing was sent to it.

    Attributes:
        database: The database.
        state: Its state: "suspended" or "migrating".
    """

    def __init__(self, message: str, *, database: Database, state: str) -> None:
        super().__init__(message)
        self.database = database
        self.state = state


class DatabaseBehindError(ShardRepoError):
    """A database lacks revisions that this application's migrations have, and ``require_head="raise"``. Nothing was
    sent to it but the question.

    Attributes:
        database: The database.
        found: The revisions that it is at; () if it has none.
        heads: Those that the migrations end in.
        missing: How many it lacks.
    """

    def __init__(
        self, message: str, *, database: Database, found: Iterable[str], heads: Iterable[str], missing: int
    ) -> None:
        super().__init__(message)
        self.database = database
        self.found = tuple(found)
        self.heads = tuple(heads)
        self.missing = missing


class ListingError(ConnectError):
    """The directory could not list every database, as some of the servers that it asks did not answer.

    Attributes:
        found: Where those are that it could list.
        failures: Why each of the others did not answer, by ``host:port``.
    """

    def __init__(self, message: str, *, found: Iterable[Location], failures: Mapping[str, Exception]) -> None:
        super().__init__(message, database=None, orig=next(iter(failures.values()), None))
        self.found = tuple(found)
        self.failures = failures


class FleetError(ShardRepoError):
    """A fleet operation did not reach its goal.

    Attributes:
        report: What became of each database.
    """

    def __init__(self, message: str, *, report: Any) -> None:
        super().__init__(message)
        self.report = report


class AuthenticationError(ConnectError):
    """The server refused the credentials."""


class ServerUnavailableError(ConnectError):
    """The server refused the connection, did not answer in time, or is starting up; or it is known to be down.

    Attributes:
        reason: Which of these it is: "refused", "timeout", "starting", "deadline" (the call's own timeout came first),
            "replaced" (another version has taken its place) or "down" (it failed others a moment ago, and nothing was
            sent to it).
        retry_after: Seconds until the next connect tries it, when it is "down".
    """

    def __init__(
        self, message: str, *, reason: Unavailable = "refused", retry_after: float = 0.0, **facts: Any
    ) -> None:
        super().__init__(message, **facts)
        self.reason: Unavailable = reason
        self.retry_after = retry_after


class ServerFullError(ConnectError):
    """The server has no connection left (SQLSTATE 53300)."""


class CheckoutTimeoutError(ShardRepoError, sa_exc.TimeoutError):
    """A hard bound is reached and no connection came free in time, or none ever could.

    Attributes:
        database: The database that a connection was wanted for.
        bounds: The bounds that left no room, by name.
        held: The homes of what the caller itself holds, if it would have waited for that for ever.
    """

    code = None

    def __init__(
        self, message: str, *, database: Database, bounds: Mapping[str, int] | None = None, held: Iterable[str] = ()
    ) -> None:
        super().__init__(message)
        self.database = database
        self.bounds = dict(bounds or {})
        self.held = tuple(held)


class TransactionDoomedError(ShardRepoError):
    """A statement failed earlier in this transaction, so nothing of it can be kept.

    Attributes:
        home: The database of the transaction.
        cause: The first error, which doomed it.
    """

    def __init__(self, message: str, *, home: str, cause: BaseException) -> None:
        super().__init__(message)
        self.home = home
        self.cause = cause


class TransactionOwnerError(ShardRepoError):
    """A transaction was used by a thread, task or process that did not open it.

    Attributes:
        home: The database of the transaction.
    """

    def __init__(self, message: str, *, home: str) -> None:
        super().__init__(message)
        self.home = home


class NotInTransactionError(ShardRepoError):
    """What was asked for needs an open transaction."""


class ReadOnlyError(ShardRepoError):
    """A verb that writes was called on a repo whose config says ``read_only=True``. Nothing was sent."""


class ConstraintError(ShardRepoError, sa_exc.IntegrityError):
    """The server refused a row because of a constraint. The message, statement and parameters are SQLAlchemy's.

    Attributes:
        kind: Which kind of constraint it is. A primary key is "unique".
        constraint: Its name; None for "not_null", which has none before PostgreSQL 18.
        table: The table that it belongs to; for a foreign key the one that refers.
        columns: Its columns, from the server where it says them, else from the mapping; () where neither knows.
        orig: The driver's error.
    """

    code = None  # type: ignore[assignment]  # as above

    def __init__(
        self,
        error: sa_exc.IntegrityError,
        *,
        kind: Kind,
        constraint: str | None,
        table: str | None,
        columns: Iterable[str] = (),
    ) -> None:
        sa_exc.IntegrityError.__init__(
            self,
            error.statement,
            error.params,
            error.orig,  # type: ignore[arg-type]  # an IntegrityError of SQLAlchemy's always has one
            hide_parameters=error.hide_parameters,
            connection_invalidated=error.connection_invalidated,
            ismulti=error.ismulti,
        )
        self.kind: Kind = kind
        self.constraint = constraint
        self.table = table
        self.columns = tuple(columns)


class StaleError(ShardRepoError, StaleDataError):
    """The row to be updated or deleted is gone, or was changed by somebody else.

    Attributes:
        home: The database that was asked.
    """

    def __init__(self, message: str, *, home: str) -> None:
        super().__init__(message)
        self.home = home


def sqlstate_of(error: sa_exc.DBAPIError) -> str | None:
    """What the server has called an error; None if it is the driver's own, and nothing was sent."""
    return getattr(error.orig, "sqlstate", None)


def note_database(error: BaseException, home: str) -> None:
    """Have *error* name the database that it belongs to, once."""
    note = f"database: {home}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)


def unknown(kind: str, given: str, known: Iterable[str], meant: str | None = None) -> str:
    """Say that *given* is no *kind*, and which of the *known* was probably meant: the nearest, unless that is said."""
    names = sorted(known)
    close = [meant] if meant else get_close_matches(given, names, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
    return f"unknown {kind} {given!r}; {hint}"
