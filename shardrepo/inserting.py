"""Rows on their way into a table.

Rows are sent as one array for each column, which the server takes apart: more than twice as fast as a statement for
each row (docs/figures.md), and with as many parameters as there are columns, however many rows. What cannot be sent so
is sent as SQLAlchemy does it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from typing import Any, Final, Literal, TypeAlias

from sqlalchemy import (
    ARRAY,
    JSON,
    Boolean,
    Column,
    Date,
    DateTime,
    Dialect,
    Enum,
    Float,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    Select,
    String,
    Table,
    Time,
    Uuid,
    bindparam,
    func,
    literal,
    select,
)
from sqlalchemy.dialects.postgresql import INTERVAL
from sqlalchemy.dialects.postgresql import insert as sql_insert
from sqlalchemy.dialects.postgresql.ranges import AbstractRange
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DataError
from sqlalchemy.sql.type_api import TypeEngine
from sqlalchemy.types import TypeDecorator, UserDefinedType

from .calls import COPIED_ROWS
from .conflicts import Conflict
from .destination import Destination
from .errors import sqlstate_of
from .reading import with_criteria
from .returning import BulkResult, Returning, Wanted, returned, wanted
from .session import HomeSession

Row: TypeAlias = Mapping[str, Any]
Via: TypeAlias = Literal["insert", "copy"]

# Rows in one statement, and twice as many in memory at a time; and how many times as many in a COPY, at whose end the
# client waits until the server has caught up (2.5 ms, of 20 for 10,000 rows).
CHUNK: Final = 10_000
COPIED_CHUNKS: Final = 5

# PostgreSQL's limit on the parameters of one statement
# (https://www.postgresql.org/docs/current/protocol-message-formats.html, Bind: an Int16).
MAX_PARAMETERS: Final = 65_535
_OTHER_PARAMETERS: Final = 1_000


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows with the same keys, and their places among the rows that were given."""

    names: tuple[str, ...]
    rows: Sequence[Row]
    places: Sequence[int]

    def cells(self) -> Iterator[Sequence[Any]]:
        """The values of each row, in the order of the names; made as they are wanted."""
        return map(_cells_of(self.names), self.rows)


class Insertion:
    """Rows on their way into a table, taken from where they come from a chunk at a time.

    Attributes:
        destination: The table.
        source: The query that gives the rows, where it is one.
        conflict: What to do about a row that is there already; None to raise.
        wanted: What to return of each row.
        is_one_statement: Whether one statement inserts everything, unless `run` finds that it takes several.

    Raises:
        TypeError: The rows are no mappings.
        ValueError: A row has a key that is no column, or the options contradict each other.
    """

    def __init__(
        self,
        destination: Destination,
        source: Iterable[Row] | Select[Any],
        conflict: Conflict | None,
        returning: Returning,
        via: Via,
    ) -> None:
        self.destination = destination
        self.conflict = conflict
        self.wanted: Wanted = wanted(destination, returning)
        self.source = source if isinstance(source, Select) else None
        self._via = via
        self._check_options()
        size = CHUNK * COPIED_CHUNKS if via == "copy" else CHUNK
        given: Iterable[Row] = () if isinstance(source, Select) else source
        self._chunks = _chunks(destination, given, size, in_order=conflict is not None)
        self._ahead: list[list[Batch]] = []
        self.is_one_statement = False

    def begin(self) -> None:
        """Take the first two chunks: to know whether there are any rows, and whether one statement is enough."""
        self._ahead = list(islice(self._chunks, 2))
        self.is_one_statement = self.destination.is_one_table and (
            self.source is not None or [len(batches) for batches in self._ahead] == [1]
        )

    def _check_options(self) -> None:
        if self._via not in ("insert", "copy"):
            raise ValueError(f"via={self._via!r} is no way to send rows: say 'insert' or 'copy'")
        if self.wanted is not None:
            self.destination.check_one_table("returning= returns of one")
        if self._via == "copy":
            if self.source is not None:
                raise ValueError("via='copy' sends rows of yours, and a select() gives the server's own: leave it out")
            if self.conflict is not None or self.wanted is not None:
                raise ValueError("via='copy' knows neither on_conflict= nor returning=: use via='insert'")
            self.destination.check_one_table("via='copy' writes one")

    @property
    def statement(self) -> Any:
        """The INSERT, without what is inserted."""
        statement = sql_insert(self.destination.table)
        return statement if self.conflict is None else self.conflict.apply(statement)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to insert."""
        return self.source is None and not self._ahead

    def nothing(self) -> BulkResult:
        """The result where there was nothing to insert."""
        return BulkResult(0, None if self.wanted is None else [])

    def run(self, session: HomeSession) -> BulkResult:
        """Insert everything; `SeveralStatementsError`, before anything is sent, if one is not enough after all."""
        if self.source is not None:
            return _insert_selected(session, self, self.source)
        count, returned = 0, []
        while self._ahead:
            for batches in self._ahead:
                found: list[tuple[int, Any]] = []
                for batch in batches:
                    written, rows = self._insert(session, batch)
                    count += written
                    found.extend(zip(batch.places, rows, strict=False))
                if self.conflict is None:
                    found.sort(key=lambda each: each[0])
                returned += [row for _, row in found]
            self._ahead = list(islice(self._chunks, 1))
        return BulkResult(count, None if self.wanted is None else returned)

    def _insert(self, session: HomeSession, batch: Batch) -> tuple[int, list[Any]]:
        """Insert a batch; returns how many rows were written, and what they return."""
        if not self.destination.is_one_table:
            return _insert_joined(session, self, batch)
        if self._via == "copy":
            return _copy(session, self.destination, batch), []
        values, number = _completed(self.destination, batch), len(batch.rows)
        if number > 1 and (arrays := _arrays(session, values)):
            try:
                return _insert_arrays(session, self, *arrays)
            except DataError as error:
                # The driver's own, before anything was sent: an array is of one type, and these values were not.
                if sqlstate_of(error) is not None:
                    raise
        if number > 1 and self.is_one_statement:
            self.is_one_statement = False
            raise SeveralStatementsError
        return _insert_rows(session, self, values, number)


class SeveralStatementsError(Exception):
    """Rows cannot be sent with one statement, and belong into a transaction."""


def _chunks(destination: Destination, rows: Iterable[Row], size: int, *, in_order: bool) -> Iterator[list[Batch]]:
    """The rows, so many at a time, in batches with the same keys; *in_order* if one may be written over another."""
    waiting, start = iter(rows), 0
    while chunk := list(islice(waiting, size)):
        kinds = set(map(type, chunk))
        for kind in kinds:
            if not issubclass(kind, Mapping):
                wrong = next(row for row in chunk if type(row) is kind)
                raise TypeError(f"insert_all() takes mappings by column, not {wrong!r}: insert() takes objects")
        # Of other mappings, which may have a value for every key, only those that they say they have are taken.
        alike = _alike(chunk, start) if kinds == {dict} else None
        batches = [alike] if alike is not None else list(_batches(chunk, start, in_order=in_order))
        for batch in batches:
            destination.check(batch.names)
        yield batches
        start += len(chunk)


def _alike(chunk: Sequence[Row], start: int) -> Batch | None:
    """One batch of rows with the same keys; None if they have others."""
    batch = Batch(tuple(chunk[0]), chunk, range(start, start + len(chunk)))
    if set(map(len, chunk)) != {len(batch.names)}:
        return None
    try:
        # Nothing of it is kept: to make the cells twice is cheaper than to hold them meanwhile (decision 13).
        deque(batch.cells(), maxlen=0)
        return batch
    except KeyError:
        return None


def _batches(chunk: Sequence[Row], start: int, *, in_order: bool) -> Iterator[Batch]:
    """Batches of rows whose keys are the same, in whatever order; *in_order*, of those that follow one another."""
    merged: dict[object, tuple[tuple[str, ...], list[Row], list[int]]] = {}
    run, before = 0, None
    for place, row in enumerate(chunk, start):
        keys = frozenset(row)
        run += in_order and keys != before
        before = keys
        _, rows, places = merged.setdefault((keys, run), (tuple(row), [], []))
        # Read now: what is no plain dict may run somebody's code, for which the middle of a COPY is no place.
        rows.append({name: row[name] for name in row})
        places.append(place)
    return (Batch(*parts) for parts in merged.values())


def _cells_of(names: Sequence[str]) -> Callable[[Row], tuple[Any, ...]]:
    if len(names) > 1:
        return itemgetter(*names)
    return lambda row: tuple(row[name] for name in names)


class _Given:
    """What a column's default may ask about the row that it is for, as it asks SQLAlchemy's own context."""

    def __init__(self, row: Row) -> None:
        self.current_parameters = row

    def get_current_parameters(self, isolate_multiinsert_params: bool = True) -> Row:  # noqa: ARG002  # SQLAlchemy's
        return self.current_parameters


def _completed(destination: Destination, batch: Batch, *, scalars: bool = False) -> dict[Column[Any], list[Any]]:
    """The values of each column that rows give, that Python computes, or that is the same for all of them: *scalars*
    too, which SQLAlchemy puts into its own statements."""
    values = {destination.columns[name]: [row[name] for row in batch.rows] for name in batch.names}
    for column in destination.table.columns:
        if column in values:
            continue
        if column.key in destination.constants:
            values[column] = [destination.constants[column.key]] * len(batch.rows)
        elif (default := column.default) is not None and default.is_callable:
            keys = [each.key for each in values]
            rows = zip(*values.values(), strict=True) if values else [()] * len(batch.rows)
            given_rows = (dict(zip(keys, row, strict=True)) for row in rows)
            values[column] = [default.arg(_Given(row)) for row in given_rows]  # type: ignore[attr-defined]  # a callable's
        elif scalars and default is not None:
            values[column] = [default.arg] * len(batch.rows)  # type: ignore[attr-defined]  # a scalar's
    return values


def _processed(values: Mapping[Column[Any], list[Any]], dialect: Dialect) -> dict[Column[Any], list[Any]]:
    """The same as the driver takes them."""
    processed = {}
    for column, given in values.items():
        processor = _processor(column, dialect)
        processed[column] = given if processor is None else [processor(value) for value in given]
    return processed


def _processor(column: Column[Any], dialect: Dialect) -> Callable[[Any], Any] | None:
    """What makes a value of a column one of the driver's; None where it is one already."""
    return column.type.dialect_impl(dialect).bind_processor(dialect)


def _arrays(
    session: HomeSession, values: Mapping[Column[Any], list[Any]]
) -> tuple[dict[Column[Any], list[Any]], list[_Cells]] | None:
    """An array for each column, and their types; None if they cannot be sent as such."""
    dialect = session.get_bind().dialect
    types = [_cells(column.type, dialect) for column in values]
    if not types or any(each is None for each in types):
        return None
    return _processed(values, dialect), [each for each in types if each is not None]


class _Cells(UserDefinedType[Any]):
    """An array of a column's values, which have become what the driver takes."""

    cache_ok = True
    render_bind_cast = True

    def __init__(self, spec: str) -> None:
        self.spec = spec

    def get_col_spec(self, **_: Any) -> str:
        return f"{self.spec}[]"


# Types whose values survive an array, and a cast to the type without its length.
_PLAIN: Final = (
    Boolean, Date, DateTime, Enum, Float, INTERVAL, Integer, Interval, JSON, LargeBinary, Numeric, String, Time, Uuid,
    AbstractRange,
)  # fmt: skip


def _cells(type_: TypeEngine[Any], dialect: Dialect) -> _Cells | None:
    """The type of an array of values of *type_*; None if there is none that changes nothing."""
    overridden = type(type_).bind_expression not in (TypeEngine.bind_expression, TypeDecorator.bind_expression)
    plain: Any = type_.dialect_impl(dialect)
    if isinstance(plain, TypeDecorator):
        plain = plain.impl_instance
    if overridden or isinstance(type_, ARRAY) or not isinstance(plain, _PLAIN):
        return None
    if isinstance(plain, String) and not (isinstance(plain, Enum) and plain.native_enum):
        # With its length the cast would cut off what the column itself refuses.
        return _Cells("VARCHAR")
    return _Cells(dialect.type_compiler_instance.process(plain))


def _insert_arrays(
    session: HomeSession, insertion: Insertion, values: Mapping[Column[Any], list[Any]], types: Sequence[_Cells]
) -> tuple[int, list[Any]]:
    arrays = [bindparam(f"array_{n}", type_=type_) for n, type_ in enumerate(types)]
    names = [f"cell_{n}" for n in range(len(types))]
    cells = func.unnest(*arrays).table_valued(*names, with_ordinality="place").render_derived("given")
    given = select(*(cells.c[name] for name in names))
    if insertion.wanted is not None:
        given = given.order_by(cells.c.place)
    statement = insertion.statement.from_select([column.key for column in values], given)
    return _written(session, insertion, statement, {f"array_{n}": each for n, each in enumerate(values.values())})


def _insert_joined(session: HomeSession, insertion: Insertion, batch: Batch) -> tuple[int, list[Any]]:
    """Insert rows of which each goes to several tables."""
    session.execute(sql_insert(insertion.destination.entity), batch.rows)
    return len(batch.rows), []


def _insert_rows(
    session: HomeSession, insertion: Insertion, values: Mapping[Column[Any], list[Any]], number: int
) -> tuple[int, list[Any]]:
    """Insert rows as SQLAlchemy does it: one statement for each, or as many values in one as there may be."""
    keys = [column.key for column in values]
    rows = [dict(zip(keys, row, strict=True)) for row in zip(*values.values(), strict=True)] or [{}] * number
    if insertion.wanted is None:
        return _written(session, insertion, insertion.statement, rows if number > 1 else rows[0])
    count, returned = 0, []
    # Of an INSERT without values there is none for several rows; and what is done about conflicts has parameters too.
    size = (MAX_PARAMETERS - _OTHER_PARAMETERS) // len(insertion.destination.table.columns) if values else 1
    for start in range(0, number, size):
        written, found = _written(session, insertion, insertion.statement.values(rows[start : start + size]), {})
        count += written
        returned += found
    return count, returned


def _insert_selected(session: HomeSession, insertion: Insertion, source: Select[Any]) -> BulkResult:
    destination = insertion.destination
    names = [str(each["name"]) for each in source.column_descriptions]
    destination.check(names)
    given = {destination.columns[name].key for name in names}
    for column in destination.table.columns:
        if column.default is not None and column.default.is_callable and column.key not in given:
            raise ValueError(f"{column} has a default that Python computes, one for each row: select a value for it")
    fixed = {key: value for key, value in destination.constants.items() if key not in given}
    types = {key: destination.table.columns[key].type for key in fixed}
    chosen = session.prepared(source).add_columns(*(literal(fixed[key], types[key]) for key in fixed))
    keys = [destination.columns[name].key for name in names]
    statement = with_criteria(insertion.statement.from_select([*keys, *fixed], chosen), chosen)
    count, rows = _written(session, insertion, statement, {})
    return BulkResult(count, None if insertion.wanted is None else rows)


def _written(session: HomeSession, insertion: Insertion, statement: Any, parameters: Any) -> tuple[int, list[Any]]:
    if insertion.wanted is not None:
        rows = returned(session, insertion.destination, statement, insertion.wanted, parameters)
        return len(rows), rows
    return session.execute(statement, parameters, execution_options=_COUNTED).rowcount, []  # type: ignore[attr-defined]  # a CursorResult


# SQLAlchemy asks for the number of rows only where it needs it.
_COUNTED: Final = {"preserve_rowcount": True}


def _copy(session: HomeSession, destination: Destination, batch: Batch) -> int:
    connection = session.connection()
    columns, rows = _copied(destination, batch, connection.dialect)
    preparer = connection.dialect.identifier_preparer
    names = ", ".join(preparer.format_column(column) for column in columns)
    # It doubles percents, for a driver that looks for parameters.
    statement = f"COPY {_translated(destination.table, connection)} ({names}) FROM STDIN".replace("%%", "%")
    options = {"no_parameters": True, COPIED_ROWS: rows}
    return connection.exec_driver_sql(statement, execution_options=options).rowcount


def _translated(table: Table, connection: Connection) -> str:
    """The quoted name of a table, in the schema that ``schema_translate_map`` has for its own."""
    preparer = connection.dialect.identifier_preparer
    translate = connection.get_execution_options().get("schema_translate_map") or {}
    schema = translate.get(table.schema, table.schema)
    name = preparer.format_table(table, use_schema=False)
    return name if schema is None else f"{preparer.quote_schema(schema)}.{name}"


def _copied(
    destination: Destination, batch: Batch, dialect: Dialect
) -> tuple[Sequence[Column[Any]], Iterable[Sequence[Any]]]:
    """The columns that a COPY names, and the rows as the driver takes them."""
    given = [destination.columns[name] for name in batch.names]
    others = [column for column in destination.table.columns if column not in given]
    for column in others:
        if not (column.default is None or column.default.is_scalar or column.default.is_callable):
            raise ValueError(f"{column} has a default that is SQL, which via='copy' cannot send: give a value for it")
    computed = any(column.default is not None or column.key in destination.constants for column in others)
    if given and not computed and not any(_processor(column, dialect) for column in given):
        return given, batch.cells()
    values = _processed(_completed(destination, batch, scalars=True), dialect)
    if not values:
        raise ValueError("via='copy' needs a column: use via='insert' for rows that are all defaults")
    return list(values), zip(*values.values(), strict=True)
