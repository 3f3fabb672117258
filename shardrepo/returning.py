"""What the statements that write many rows did, and return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sqlalchemy import Column, select

from .destination import Destination, Named
from .reading import unique
from .session import HomeSession

Returning: TypeAlias = bool | Named | Sequence[Named]

# The same, checked; of a `Table` "objects" are rows of all its columns.
Wanted: TypeAlias = "Literal['objects'] | tuple[Column[Any], ...] | None"


@dataclass(frozen=True, slots=True)
class BulkResult:
    """What a write of many rows did.

    Attributes:
        count: The number of rows written.
        rows: What ``returning=`` asked for; None when nothing was asked for.
    """

    count: int
    rows: list[Any] | None


def wanted(destination: Destination, returning: Returning) -> Wanted:
    """Check what is to be returned; `ValueError` for what is no column."""
    if isinstance(returning, bool):
        return "objects" if returning else None
    return tuple(destination.named(returning)) or None


def returned(
    session: HomeSession, destination: Destination, statement: Any, wanted: Wanted, parameters: Any = None
) -> list[Any]:
    """What a statement that writes returns: objects, values of one column, or rows of several."""
    if wanted == "objects" and destination.mapper is not None:
        # As the results of a query, which know their home, where those of an ORM statement that writes do not.
        query: Any = select(destination.entity).from_statement(statement.returning(*destination.table.columns))
        # What an earlier statement of the same call returned of a row may not be so any more.
        fresh = {"populate_existing": True}
        return list(unique(session.execute(query, parameters, execution_options=fresh)).scalars())
    columns = wanted if isinstance(wanted, tuple) else tuple(destination.table.columns)
    result = session.execute(statement.returning(*columns), parameters)
    return list(result.scalars() if len(columns) == 1 else result)
