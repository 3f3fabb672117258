"""What is told of a failure, from process to process and in a journal."""

from __future__ import annotations

import pickle
import traceback
from typing import Any

import psycopg
import pytest
from psycopg import errors as pg
from sqlalchemy import exc as sa_exc

from shardrepo.errors import ConfigError, ConnectError, ConstraintError, ServerFullError, ServerUnavailableError
from shardrepo.fleet.outcomes import Failure

FACTS: dict[str, Any] = {"kind": "locked", "sqlstate": "55P03", "revision": "0002", "blockers": ("a", "b")}


def wrapped(error: Exception, secret: str = "s3cret") -> sa_exc.DBAPIError:
    return sa_exc.ProgrammingError("SELECT :p", {"p": secret}, error)


@pytest.mark.parametrize(
    ("error", "kind", "sqlstate", "message"),
    [
        (ValueError("wrong\n  value"), "ValueError", None, "wrong value"),
        (ValueError(), "ValueError", None, "ValueError"),
        (pg.DuplicateTable("there\nLINE 1: x"), "DuplicateTable", "42P07", "there LINE 1: x"),
        (wrapped(pg.UndefinedTable("no table")), "UndefinedTable", "42P01", "no table"),
        (wrapped(psycopg.OperationalError("gone")), "OperationalError", None, "gone"),
        (sa_exc.DBAPIError("SELECT 1", None, None), "DBAPIError", None, "[SQL: SELECT 1]"),  # type: ignore[arg-type]
        (ConfigError("no such"), "ConfigError", None, "no such"),
        (ServerFullError("full", database=None, sqlstate="53300"), "ServerFullError", "53300", "full"),
        (ConnectError("no", database=None, orig=pg.CannotConnectNow("x")), "ConnectError", "57P03", "no"),
        (
            ServerUnavailableError("down", database=None, orig=OSError("refused")),
            "ServerUnavailableError",
            None,
            "down",
        ),
    ],
)
def test_what_an_error_comes_to(error: Exception, kind: str, sqlstate: str | None, message: str) -> None:
    """Its class, or the driver's for what SQLAlchemy has wrapped; the server's code, wherever it stands; one line."""
    failure = Failure.of(error, revision="0001", blockers=["x"])
    assert (failure.kind, failure.sqlstate, failure.revision, failure.blockers) == (kind, sqlstate, "0001", ("x",))
    assert message in str(failure)
    assert "\n" not in str(failure)


def test_no_parameters_are_told() -> None:
    """What a migration was writing is in no report and no journal."""
    error = wrapped(pg.UniqueViolation("duplicate key"))
    constraint = ConstraintError(
        sa_exc.IntegrityError("INSERT", {"p": "s3cret"}, pg.UniqueViolation("duplicate key")),
        kind="unique",
        constraint="c",
        table="t",
    )
    assert "s3cret" in str(error)
    for failure in (Failure.of(error), Failure.of(constraint)):
        assert "s3cret" not in repr(failure.as_dict()) + "".join(traceback.format_exception(failure))
        assert (str(failure), failure.sqlstate) == ("duplicate key", "23505")
    assert Failure.of(constraint).kind == "ConstraintError"


def test_a_long_message() -> None:
    """It is cut, and says so."""
    message = str(Failure.of(ValueError("long " * 1000)))
    assert (len(message), message[-3:]) == (500, "...")


def test_a_failure_stays_as_it_is() -> None:
    """It is not wrapped in another."""
    failure = Failure("no", **FACTS)
    assert Failure.of(failure, revision="other") is failure


def test_a_failure_travels() -> None:
    """A pickle, and a dict of what JSON has, hold all of it."""
    failure = Failure("no", **FACTS)
    for again in (pickle.loads(pickle.dumps(failure)), Failure.from_dict(failure.as_dict())):
        assert (str(again), vars(again), again.cause) == (str(failure), vars(failure), failure.cause)


def test_an_error_that_cannot_be_pickled() -> None:
    """What is told of it can be."""

    class Local(Exception):
        def __reduce__(self) -> str:
            raise TypeError

    failure = pickle.loads(pickle.dumps(Failure.of(Local("odd"))))
    assert (failure.kind, str(failure)) == ("Local", "odd")


def test_a_dict_has_what_is_known() -> None:
    """Nothing stands there empty, but for a message that is."""
    assert Failure("", kind="lost").as_dict() == {"message": "", "kind": "lost"}
    assert str(Failure.from_dict({"message": "", "kind": "lost"})) == ""


def test_a_cause() -> None:
    """Failures of a kind, in the same revision, have the same one, whatever the message says."""
    assert Failure("a", kind="x").cause == Failure("b", kind="x").cause
    assert Failure("a", kind="x").cause != Failure("a", kind="x", revision="1").cause
