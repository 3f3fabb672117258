"""The table that rows go to, and its columns by the names that rows give them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Self, TypeAlias

from sqlalchemy import Column, Table
from sqlalchemy.orm import InstrumentedAttribute, Mapper, QueryableAttribute

from .errors import unknown
from .session import mapper_of

Named: TypeAlias = str | InstrumentedAttribute[Any] | Column[Any]

_ONE: Final = (str, InstrumentedAttribute, Column)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where rows go.

    Attributes:
        name: How it is called in messages.
        table: The table; of joined inheritance, the one that is its own.
        columns: Its columns: by attribute for a mapped class, else by key.
        mapper: Of the mapped class, None for a table.
        version: The column in which a session counts the versions of a row, if it does.
        constants: What every row has that does not say otherwise, by column key.
    """

    name: str
    table: Table
    columns: Mapping[str, Column[Any]]
    mapper: Mapper[Any] | None
    version: Column[Any] | None
    constants: Mapping[str, Any]

    @classmethod
    def of(cls, target: Any) -> Self:
        """Of a mapped class or a `Table`; `TypeError` if it is neither."""
        if isinstance(target, Table):
            return cls(target.name, target, dict(target.columns.items()), None, None, {})
        mapper = mapper_of(target)
        table = mapper.local_table
        if not isinstance(table, Table):
            raise TypeError(f"{mapper.class_.__name__} is mapped to no table, so that nothing can be written to it")
        columns = {
            prop.key: column
            for prop in mapper.column_attrs
            # Of several tables' columns for one attribute, that of this table.
            for column in sorted(prop.columns, key=lambda column: getattr(column, "table", None) is table)
            if isinstance(column, Column) and column.table in mapper.tables
        }
        version = mapper.version_id_col if callable(mapper.version_id_generator) else None
        counted = version if isinstance(version, Column) else None
        return cls(mapper.class_.__name__, table, columns, mapper, counted, dict(_constants(mapper, counted)))

    @property
    def entity(self) -> Any:
        """The mapped class, or the table."""
        return self.table if self.mapper is None else self.mapper.entity

    @property
    def is_one_table(self) -> bool:
        """Whether a row goes to one table alone."""
        return self.mapper is None or len(self.mapper.tables) == 1

    def column(self, named: object) -> Column[Any]:
        """The column that an attribute, a column or a name means; `ValueError` if it is none of these."""
        if isinstance(named, str):
            self.check([named])
            return self.columns[named]
        meant = getattr(named.property, "columns", ()) if isinstance(named, QueryableAttribute) else (named,)
        for column in self.columns.values():
            if any(column is each for each in meant):
                return column
        raise ValueError(f"{named} is no column of {self.name}: name one of {', '.join(sorted(self.columns))}")

    def named(self, given: Any) -> list[Column[Any]]:
        """The columns that one attribute, column or name means, or several of them."""
        return [self.column(each) for each in ([given] if isinstance(given, _ONE) else given)]

    def check_one_table(self, why: str) -> None:
        """Raise `ValueError`, which says *why*, unless a row goes to one table alone."""
        if not self.is_one_table:
            raise ValueError(f"{self.name} is stored in several tables, and {why}")

    def check(self, names: Iterable[object]) -> None:
        """Raise `ValueError` unless every one of *names* is a column."""
        for name in names:
            if name not in self.columns:
                raise ValueError(f"{self.name}: {unknown('column', str(name), self.columns)}")


def _constants(mapper: Any, version: Column[Any] | None) -> Iterator[tuple[str, Any]]:
    """What a session would write into a new row by itself: its first version, and which class it is of."""
    if version is not None:
        yield version.key, mapper.version_id_generator(None)
    if isinstance(mapper.polymorphic_on, Column) and mapper.polymorphic_identity is not None:
        yield mapper.polymorphic_on.key, mapper.polymorphic_identity
