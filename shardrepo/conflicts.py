"""What becomes of a row that is there already: the ON CONFLICT of an INSERT."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeAlias

from sqlalchemy import Column, ColumnElement, Constraint, Index, Integer
from sqlalchemy.dialects.postgresql import Insert
from sqlalchemy.orm import InstrumentedAttribute

from .destination import Destination
from .errors import unknown

Named: TypeAlias = str | InstrumentedAttribute[Any] | Column[Any]
Values: TypeAlias = Mapping[Any, Any]
OnConflict: TypeAlias = (
    Literal["raise", "nothing", "replace"] | Named | Iterable[Named] | Values | Callable[[Any], Mapping[Any, Any]]
)
Target: TypeAlias = Named | Iterable[Named] | Index | Constraint
Where: TypeAlias = ColumnElement[bool] | Callable[[Any], ColumnElement[bool]]

_WORDS: Final = ("raise", "nothing", "replace")


@dataclass(frozen=True, slots=True)
class Conflict:
    """What to do about a conflict, checked.

    Attributes:
        destination: Where the row goes.
        target: SQLAlchemy's arguments that say with what it is a conflict.
        action: "nothing", or what to set.
        where: Which of the rows that are there are to be written.
    """

    destination: Destination
    target: Mapping[str, Any]
    action: OnConflict
    where: Where | None

    @classmethod
    def of(
        cls, destination: Destination, action: OnConflict, target: Target | None, where: Where | None
    ) -> Self | None:
        """Check what was given; None where a conflict is an error.

        Raises:
            ValueError: It contradicts itself, or names no column.
        """
        if isinstance(action, InstrumentedAttribute | Column):
            action = [action]
        if isinstance(action, str) and action not in _WORDS:
            raise ValueError(f"{unknown('on_conflict', action, _WORDS)}; or give columns, a mapping or a callable")
        if action in ("raise", "nothing") and where is not None:
            raise ValueError(f"where= says which rows to write, and on_conflict={action!r} writes none")
        if action == "raise":
            if target is not None:
                raise ValueError(
                    "conflict_target= means nothing with on_conflict='raise': say what to do on a conflict"
                )
            return None
        if not destination.is_one_table:
            raise ValueError(
                f"{destination.name} is stored in several tables, where ON CONFLICT concerns one: insert it"
            )
        if not (isinstance(action, str) or callable(action)):
            action = action if isinstance(action, Mapping) else list(action)
            for name in action:
                destination.column(name)
            if not action:
                raise ValueError("on_conflict= names no column to write: say 'nothing' to leave the row as it is")
        found = _target(destination, target)
        if not found and action != "nothing":
            raise ValueError("conflict_target= is missing: name the columns or the constraint whose conflict is meant")
        return cls(destination, found, action, where)

    def apply(self, statement: Insert) -> Insert:
        """*statement*, with this ON CONFLICT."""
        if self.action == "nothing":
            return statement.on_conflict_do_nothing(**self.target)
        where = self.where(statement.excluded) if callable(self.where) else self.where
        return statement.on_conflict_do_update(**self.target, set_=self._set(statement.excluded), where=where)

    def _set(self, excluded: Any) -> dict[str, Any]:
        action: Any = self.action
        column = self.destination.column
        if action == "replace":
            given = {each: excluded[each.key] for each in self._replaced()}
        elif callable(action) or isinstance(action, Mapping):
            said = action(excluded) if callable(action) else action
            given = {column(name): value for name, value in said.items()}
        else:
            given = {column(name): excluded[column(name).key] for name in action}
        return self._counted({each.key: value for each, value in given.items()})

    def _replaced(self) -> Iterable[Column[Any]]:
        """All columns, as an INSERT would have left them; without those by which the row was found."""
        found_by = set(self.target.get("index_elements", ()))
        for column in self.destination.table.columns:
            computed = column.computed is not None or (column.identity is not None and column.identity.always)
            if not (column.primary_key or computed or column in found_by):
                yield column

    def _counted(self, given: dict[str, Any]) -> dict[str, Any]:
        """The same with the next version, where rows are counted and it is not said."""
        version = self.destination.version
        if version is None or (version.key in given and self.action != "replace"):
            return given
        if not isinstance(version.type, Integer):
            raise ValueError(  # noqa: TRY004  # of a column, not of an argument
                f"on_conflict= leaves {version} open, which tells versions apart: say what it becomes"
            )
        return {**given, version.key: version + 1}


def _target(destination: Destination, target: Target | None) -> dict[str, Any]:
    if target is None:
        return {}
    if isinstance(target, Constraint | Index):
        return {"constraint": target}
    if isinstance(target, str) and target not in destination.columns:
        table = destination.table
        every: tuple[Any, ...] = (*table.constraints, *table.indexes)
        named = {str(each.name): each for each in every if each.name}
        if target in named:
            return {"constraint": named[target]}
        return {"constraint": target}
    names: Iterable[Any] = [target] if isinstance(target, str | InstrumentedAttribute | Column) else target
    elements = [destination.column(name) for name in names]
    if not elements:
        raise ValueError("conflict_target= names no column: leave it out, or name some")
    return {"index_elements": elements}
