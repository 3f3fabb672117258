"""What the verbs that update and delete many rows at once do, as plain functions of a session.

Leans on a `Select` that compares all of its parts (``tests/test_private_api.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ARRAY, Column, ColumnElement, Select, func, inspect, literal, select, tuple_
from sqlalchemy import delete as sql_delete
from sqlalchemy import update as sql_update
from sqlalchemy.types import TypeEngine

from .destination import Destination
from .reading import selected, with_criteria
from .returning import BulkResult, Returning, returned, wanted
from .session import HomeSession


@dataclass(frozen=True, slots=True)
class Changes:
    """What an update writes into every row that it finds.

    Attributes:
        set: Values, or SQL, by column.
        inc: What to add, by column.
        push: What to append to an array, by column.
        pull: What to remove from an array, wherever it is in it, by column.
    """

    set: Mapping[Any, Any]
    inc: Mapping[Any, Any]
    push: Mapping[Any, Any]
    pull: Mapping[Any, Any]

    def values(self, destination: Destination) -> dict[str, Any]:
        """What becomes of each column, by its key.

        Raises:
            ValueError: There is none; one is unknown, of another table, or named twice; or it is no array.
        """
        found: dict[str, Any] = {}
        for how, given in (("set", self.set), ("inc", self.inc), ("push", self.push), ("pull", self.pull)):
            for name, value in given.items():
                column = destination.column(name)
                if column.key in found:
                    raise ValueError(f"{column} is to become two things at once: name it once")
                if column.table is not destination.table:
                    raise ValueError(f"{column} is not stored in {destination.table}: update the class that it is of")
                found[column.key] = _CHANGES[how](column, value)
        if not found:
            raise ValueError("update_all() was told of no change: name a column")
        return found


def _appended(column: Column[Any], value: Any) -> Any:
    return func.array_append(column, literal(value, _items(column)))


def _removed(column: Column[Any], value: Any) -> Any:
    return func.array_remove(column, literal(value, _items(column)))


def _items(column: Column[Any]) -> TypeEngine[Any]:
    if not isinstance(column.type, ARRAY):
        raise ValueError(  # noqa: TRY004  # of a column, not of an argument
            f"push= and pull= change arrays, and {column} is of type {column.type!r}"
        )
    return column.type.item_type


_CHANGES: Final[Mapping[str, Callable[[Column[Any], Any], Any]]] = {
    "set": lambda _, value: value,
    "inc": lambda column, value: column + value,
    "push": _appended,
    "pull": _removed,
}


def update_all(session: HomeSession, query: Any, changes: Changes, returning: Returning) -> BulkResult:
    destination = destination_of(query)
    statement = sql_update(destination.table).values(changes.values(destination))
    return _everywhere(session, destination, query, statement, returning)


def delete_all(session: HomeSession, query: Any, returning: Returning) -> BulkResult:
    destination = destination_of(query)
    destination.check_one_table("delete_all() deletes from one: use delete()")
    return _everywhere(session, destination, query, sql_delete(destination.table), returning)


def destination_of(query: Any) -> Destination:
    """What a mapped class, or a `select` of one, selects from; `TypeError` if it is neither."""
    if not isinstance(query, Select):
        return Destination.of(query)
    if len(query.column_descriptions) != 1 or query.column_descriptions[0]["expr"] is not _entity(query):
        raise TypeError(f"this verb takes a mapped class, or a select() of one: {query}")
    return Destination.of(inspect(_entity(query)).mapper)


def _entity(query: Select[Any]) -> Any:
    return query.column_descriptions[0].get("entity")


def _everywhere(
    session: HomeSession, destination: Destination, query: Any, statement: Any, returning: Returning
) -> BulkResult:
    """Run *statement* on what *query* selects."""
    chosen = selected(session, query)
    statement = with_criteria(statement, chosen)
    where = _where(destination, chosen)
    if where is not None:
        statement = statement.where(where)
    asked = wanted(destination, returning)
    if asked == "objects":
        destination.check_one_table("returning=True returns of one: name columns")
    if asked is None:
        return BulkResult(session.execute(statement).rowcount, None)  # type: ignore[attr-defined]  # a CursorResult
    rows = returned(session, destination, statement, asked)
    return BulkResult(len(rows), rows)


def _where(destination: Destination, query: Select[Any]) -> ColumnElement[bool] | None:
    """The criteria of *query* if it has nothing else, or that the key is among those that it selects."""
    entity, mapper = _entity(query), destination.mapper
    assert mapper is not None
    criteria = query.whereclause
    plain = select(entity) if criteria is None else select(entity).where(criteria)
    if entity is mapper.entity and not mapper.inherits and plain.compare(query):
        return criteria
    # The mapping may have another key than the table; of several tables, this one has its own.
    keys = mapper.primary_key if destination.is_one_table else tuple(destination.table.primary_key)
    found = [getattr(entity, mapper.get_property_by_column(column).key) for column in keys]
    chosen = query.with_only_columns(*found, maintain_column_froms=True)
    # On its own: correlated with what is written, its limit would be one for each row.
    return tuple_(*keys).in_(chosen.correlate(None))
