"""What became of one database of a fleet, in a form that goes from process to process and into a journal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Self

from sqlalchemy.exc import DBAPIError

from ..errors import ConnectError, ShardRepoError, sqlstate_of

# What stands in a report of a message: the server's first line says what is wrong, the statement follows.
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
        """What *error* says, without what cannot be pickled."""
        if isinstance(error, Failure):
            return error
        told = error.orig if isinstance(error, DBAPIError) and not isinstance(error, ShardRepoError) else error
        sqlstate = error.sqlstate if isinstance(error, ConnectError) else None
        return cls(
            " ".join(str(told).split())[:_MAX_MESSAGE] or type(told).__name__,
            kind=type(told).__name__,
            sqlstate=sqlstate_of(error) if isinstance(error, DBAPIError) else sqlstate,
            revision=revision,
            blockers=blockers,
        )

    @property
    def cause(self) -> tuple[str, ...]:
        """What it has in common with others of the same cause."""
        return self.kind, self.sqlstate or "", self.revision or ""

    def as_dict(self) -> dict[str, Any]:
        """As it stands in a journal."""
        facts = {"message": str(self), "kind": self.kind, "sqlstate": self.sqlstate, "revision": self.revision}
        return {name: value for name, value in facts.items() if value} | (
            {"blockers": list(self.blockers)} if self.blockers else {}
        )

    @classmethod
    def from_dict(cls, given: dict[str, Any]) -> Self:
        """Read what `as_dict` has written."""
        facts = dict(given)
        return cls(facts.pop("message"), **facts)


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
