"""Which constraint refused a row: what the server says of it, and for its columns what the mapping knows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from sqlalchemy import ForeignKeyConstraint, PrimaryKeyConstraint, Table, UniqueConstraint
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import IntegrityError

from .errors import ConstraintError, Kind

# By SQLSTATE (https://www.postgresql.org/docs/current/errcodes-appendix.html, class 23).
_KINDS: Final[Mapping[str, Kind]] = {
    "23001": "foreign_key",
    "23502": "not_null",
    "23503": "foreign_key",
    "23505": "unique",
    "23514": "check",
    "23P01": "exclusion",
}


def told_apart(context: ExceptionContext) -> ConstraintError | None:
    """The `ConstraintError` to raise in place of SQLAlchemy's error; None if it is about no constraint.

    A listener to the dialect's ``handle_error``.
    """
    error = context.sqlalchemy_exception
    if not isinstance(error, IntegrityError):
        return None
    diagnosis: Any = getattr(context.original_exception, "diag", None)
    kind = _KINDS.get(getattr(diagnosis, "sqlstate", None) or "")
    if kind is None:
        return None
    if diagnosis.column_name is not None:
        columns: tuple[str, ...] = (diagnosis.column_name,)
    else:
        columns = _columns(_written(context), diagnosis)
    return ConstraintError(
        error, kind=kind, constraint=diagnosis.constraint_name, table=diagnosis.table_name, columns=columns
    )


def _written(context: ExceptionContext) -> Table | None:
    """The table that the statement wrote to; None where it was text, or a COMMIT."""
    compiled: Any = getattr(context.execution_context, "compiled", None)
    table = getattr(getattr(compiled, "statement", None), "table", None)
    return table if isinstance(table, Table) else None


def _columns(written: Table | None, diagnosis: Any) -> tuple[str, ...]:
    """The columns of a constraint, which may be of another table than the one that was written to."""
    if written is None or diagnosis.constraint_name is None:
        return ()
    for table in written.metadata.tables.values():
        if table.name == diagnosis.table_name and table.schema in (None, diagnosis.schema_name):
            for name, columns in _named(table):
                if name == diagnosis.constraint_name:
                    return columns
    return ()


def _named(table: Table) -> Iterator[tuple[str | None, tuple[str, ...]]]:
    """Each constraint of a table by its name, or by the one that PostgreSQL gives to one that has none."""
    every: tuple[Any, ...] = (*table.constraints, *table.indexes)
    for each in every:
        columns = tuple(column.name for column in each.columns)
        if isinstance(each.name, str):
            yield each.name, columns
        elif isinstance(each, PrimaryKeyConstraint):
            yield f"{table.name}_pkey", columns
        elif isinstance(each, UniqueConstraint | ForeignKeyConstraint):
            ending = "key" if isinstance(each, UniqueConstraint) else "fkey"
            yield "_".join((table.name, *columns, ending)), columns
