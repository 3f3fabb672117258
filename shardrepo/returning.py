"""What the statements that write many rows did, and return."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from sqlalchemy import Column, select
from sqlalchemy.orm import InstrumentedAttribute

from .destination import Destination
from .reading import unique
from .session import HomeSession

Named: TypeAlias = str | InstrumentedAttribute[Any] | Column[Any]
Returning: TypeAlias = bool | Named | Sequence[Named]


@dataclass(frozen=True, slots=True)
class BulkResult:
    """What a write of many rows did.

    Attributes:
        count: The number of rows written.
        rows: What ``returning=`` asked for; None when nothing was asked for.
    """

    count: int
    rows: list[Any] | None


def returned(
    session: HomeSession, destination: Destination, statement: Any, returning: Returning, parameters: Any = None
) -> list[Any]:
    """What a statement that writes returns: objects, values of one column, or rows of several."""
    if returning is True and destination.mapper is not None:
        # As the results of a query, which know their home, where those of an ORM statement that writes do not.
        returned = statement.returning(*destination.table.columns)
        query: Any = select(destination.entity).from_statement(returned)
        return list(unique(session.execute(query, parameters)).scalars())
    columns = (
        destination.table.columns if returning is True else [destination.column(each) for each in listed(returning)]
    )
    result = session.execute(statement.returning(*columns), parameters)
    return list(result.scalars() if len(columns) == 1 else result)


def listed(returning: Any) -> Iterable[Any]:
    return [returning] if isinstance(returning, str | InstrumentedAttribute | Column) else returning
