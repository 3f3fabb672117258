"""What became of one database of a fleet, in a form that goes from process to process and into a journal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

from sqlalchemy.exc import DBAPIError

from ..errors import ConnectError, ShardRepoError
from .lines import line

# Characters of a message: the server says first what is wrong, and then where.
_MAX_MESSAGE: Final = 500


class Failure(ShardRepoError):
    """Why an operation failed in one database.

    Attributes:
        kind: The name of the error's class, or "locked", "lost" (its process died) and "interrupted".
        sqlstate: What the server called it, None if it was not the server.
        revision: The revision that was being run; None outside of one.
        blockers: Who stood in the way, where somebody did.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: str,
        sqlstate: str | None = None,
        revision: str | None = None,
        blockers: Iterable[str] = (),
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.sqlstate = sqlstate
        self.revision = revision
        self.blockers = tuple(blockers)

    @classmethod
    def of(cls, error: BaseException, *, revision: str | None = None, blockers: Iterable[str] = ()) -> Self | Failure:
        """What *error* and its notes say, without what cannot be pickled; a failure stays as it is.

        Of a statement that failed it is what the driver says, without the statement and its parameters.
        """
        if isinstance(error, Failure):
            return error
        told: BaseException = error
        # A ConnectError says itself what the driver did not know.
        if isinstance(error, DBAPIError) and not isinstance(error, ConnectError):
            told = error.orig or error
        kind = type(error if isinstance(error, ShardRepoError) else told).__name__
        # Which database it was is told beside it.
        notes = [note for note in getattr(error, "__notes__", ()) if not note.startswith("database: ")]
        return cls(
            "; ".join(line(each, _MAX_MESSAGE) for each in (str(told) or kind, *notes)),
            kind=kind,
            sqlstate=_sqlstate(error),
            revision=revision,
            blockers=blockers,
        )

    @property
    def cause(self) -> tuple[str, ...]:
        """What it has in common with others of the same cause."""
        return self.kind, self.sqlstate or "", self.revision or ""

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a journal."""
        more = {"sqlstate": self.sqlstate, "revision": self.revision, "blockers": list(self.blockers)}
        return {"message": str(self), "kind": self.kind, **{name: value for name, value in more.items() if value}}

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Self:
        """Read what `as_dict` has written."""
        facts = dict(given)
        return cls(facts.pop("message"), **facts)


def _sqlstate(error: BaseException) -> str | None:
    """What the server has called *error*: its own word, or that of the driver's error within."""
    for each in (error, getattr(error, "orig", None)):
        if sqlstate := getattr(each, "sqlstate", None):
            return str(sqlstate)
    return None


@dataclass(frozen=True, slots=True)
class Migration:
    """What a database's migration came to.

    Attributes:
        before: The revisions that it was at.
        after: Those that it is at now, read from it.
        attempts: How often it was tried, where a lock of somebody else's had to be waited for.
        drift: What differs from the models, for a check.
    """

    before: tuple[str, ...]
    after: tuple[str, ...]
    attempts: int = 1
    drift: tuple[str, ...] = ()
