"""Every error: what it is caught as, what it carries, and that it survives the way to another process."""

from __future__ import annotations

import copy
import inspect
import pickle
import traceback
from typing import Any

import pytest
from sqlalchemy import exc as sa_exc
from sqlalchemy.orm.exc import StaleDataError

import shardrepo
from shardrepo import Database, errors
from shardrepo.errors import ConnectError, ShardRepoError, unknown

SECRET = "hunter2-s3cr3t"
DATABASE = Database("db01", 5432, "app", "ada", (), SECRET)

FACTS: dict[type[ShardRepoError], dict[str, Any]] = {
    errors.ShardRepoError: {},
    errors.ConfigError: {},
    errors.NoDatabaseError: {},
    errors.RepoDisposedError: {},
    errors.NotInTransactionError: {},
    errors.SandboxError: {},
    errors.WrongDatabaseError: {"expected": "db01:5432/app", "found": None},
    errors.ConnectError: {"database": DATABASE, "sqlstate": "08006", "orig": OSError("gone")},
    errors.UnknownDatabaseError: {"database": DATABASE, "sqlstate": "3D000", "orig": OSError("gone")},
    errors.AuthenticationError: {"database": DATABASE, "sqlstate": "28P01", "orig": OSError("gone")},
    errors.ServerUnavailableError: {"database": DATABASE, "sqlstate": None, "orig": None},
    errors.ServerFullError: {"database": DATABASE, "sqlstate": "53300", "orig": OSError("gone")},
    errors.CheckoutTimeoutError: {"database": DATABASE},
    errors.TransactionDoomedError: {"home": "db01:5432/app", "cause": OSError("gone")},
    errors.TransactionOwnerError: {"home": "db01:5432/app"},
    errors.StaleError: {"home": "db01:5432/app"},
    errors.ReadOnlyError: {},
    errors.DatabaseStateError: {"database": DATABASE, "state": "suspended"},
    errors.DatabaseBehindError: {"database": DATABASE, "found": ("0001",), "heads": ("0003",), "missing": 2},
    errors.ListingError: {"found": (), "failures": {}},
    errors.FleetError: {"report": "599 done, 1 failed"},
    errors.ConstraintError: {
        "kind": "unique",
        "constraint": "users_email_key",
        "table": "users",
        "columns": ("email",),
    },
}

CAUGHT_AS: dict[type[ShardRepoError], type[Exception]] = {
    errors.ConfigError: ValueError,
    errors.ConnectError: sa_exc.OperationalError,
    errors.UnknownDatabaseError: errors.ConnectError,
    errors.AuthenticationError: errors.ConnectError,
    errors.ServerUnavailableError: errors.ConnectError,
    errors.ServerFullError: errors.ConnectError,
    errors.ListingError: errors.ConnectError,
    errors.CheckoutTimeoutError: sa_exc.TimeoutError,
    errors.StaleError: StaleDataError,
    errors.ConstraintError: sa_exc.IntegrityError,
}

every_error = pytest.mark.parametrize("kind", FACTS, ids=lambda kind: kind.__name__)


def made(kind: type[ShardRepoError]) -> ShardRepoError:
    said: Any = "what happened: 3 of 5"
    if kind is errors.ConstraintError:
        said = sa_exc.IntegrityError("INSERT", {"email": "ada@x"}, OSError(said))
    return kind(said, **FACTS[kind])


def same(one: object, other: object) -> bool:
    return one == other or (type(one) is type(other) and str(one) == str(other))


def test_no_error_is_forgotten_here() -> None:
    """The facts above are of all the errors that the module defines."""
    defined = {
        kind
        for _, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, BaseException) and kind.__module__ == errors.__name__
    }
    assert defined == set(FACTS)


@every_error
def test_every_error_is_public_and_has_one_root(kind: type[ShardRepoError]) -> None:
    """Whatever is raised can be imported from the package, and caught as ShardRepoError."""
    assert issubclass(kind, ShardRepoError)
    assert getattr(shardrepo, kind.__name__) is kind
    assert kind.__name__ in shardrepo.__all__
    assert kind.__doc__


@pytest.mark.parametrize(("kind", "caught_as"), CAUGHT_AS.items(), ids=lambda kind: kind.__name__)
def test_an_error_is_caught_as_what_it_refines(kind: type[ShardRepoError], caught_as: type[Exception]) -> None:
    """Code that catches SQLAlchemy's or Python's error of that meaning catches ours."""
    with pytest.raises(caught_as):
        raise made(kind)


@every_error
def test_an_error_is_caught_as_nothing_else(kind: type[ShardRepoError]) -> None:
    """Those without a counterpart are no SQLAlchemy errors and no ValueErrors."""
    foreign = {sa_exc.SQLAlchemyError, sa_exc.OperationalError, sa_exc.TimeoutError, StaleDataError, ValueError}
    expected = CAUGHT_AS.get(kind)
    assert {base for base in foreign if issubclass(kind, base)} == {
        base for base in foreign if expected is not None and issubclass(expected, base)
    }


@every_error
def test_an_error_carries_its_facts(kind: type[ShardRepoError]) -> None:
    """Each fact is an attribute, and the message is nothing but the message."""
    error = made(kind)
    statement = "[SQL: INSERT]\n[parameters: {'email': 'ada@x'}]"
    told = f"(builtins.OSError) what happened: 3 of 5\n{statement}" if kind is errors.ConstraintError else None
    assert str(error) == (told or "what happened: 3 of 5")
    for fact, value in FACTS[kind].items():
        assert getattr(error, fact) is value


@every_error
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(kind: type[ShardRepoError], protocol: int) -> None:
    """A worker process can report any of them, with message, facts and notes."""
    error = made(kind)
    error.add_note("database: db01:5432/app")
    again = pickle.loads(pickle.dumps(error, protocol))
    assert type(again) is kind
    assert (str(again), repr(again)) == (str(error), repr(error))
    assert again.__notes__ == ["database: db01:5432/app"]
    for fact, value in FACTS[kind].items():
        assert same(getattr(again, fact), value)
    with pytest.raises(kind):
        raise again


@every_error
def test_an_error_can_be_copied(kind: type[ShardRepoError]) -> None:
    """concurrent.futures and others copy what they raise again."""
    again = copy.copy(made(kind))
    assert type(again) is kind
    assert vars(again) == vars(made(kind)) or str(vars(again)) == str(vars(made(kind)))


@every_error
def test_an_error_shows_no_password(kind: type[ShardRepoError]) -> None:
    """Not in its message, its repr, a formatted traceback with local variables, its attributes or its pickle."""
    error = made(kind)
    try:
        raise error
    except ShardRepoError as caught:
        shown = traceback.TracebackException.from_exception(caught, capture_locals=True)
        text = "".join(shown.format()) + str(caught) + repr(caught) + repr(vars(caught)) + str(pickle.dumps(caught))
    assert "what happened: 3 of 5" in text
    assert SECRET not in text


@pytest.mark.parametrize("kind", [kind for kind in FACTS if issubclass(kind, ConnectError)])
def test_a_connect_error_is_like_sqlalchemys(kind: type[ConnectError]) -> None:
    """Handlers of DBAPIError find the attributes that they look at, and no link to a page of SQLAlchemy's."""
    error = made(kind)
    assert isinstance(error, ConnectError)
    assert (error.statement, error.params, error.connection_invalidated) == (None, None, False)
    assert "sqlalche.me" not in str(error)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("databse", "unknown option 'databse'; did you mean 'database'?"),
        ("usrname", "unknown option 'usrname'; did you mean 'username'?"),
        ("zzz", "unknown option 'zzz'; known: database, host, username"),
        ("", "unknown option ''; known: database, host, username"),
    ],
)
def test_what_is_unknown_comes_with_what_was_meant(given: str, message: str) -> None:
    """The nearest known name if there is a near one, else all of them in order."""
    assert unknown("option", given, ["username", "host", "database"]) == message
