"""What becomes of a row that is there already: the ON CONFLICT of an INSERT."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeAlias, cast

from sqlalchemy import Column, ColumnElement, Constraint, Index, Integer
from sqlalchemy.dialects.postgresql import Insert

from .destination import Destination, Named
from .errors import unknown
from .session import is_written

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
        values: Makes what to write, by column, of the row that would have been inserted; None to write nothing.
        where: Which of the rows that are there are to be written.
    """

    destination: Destination
    target: Mapping[str, Any]
    values: Callable[[Any], Values] | None
    where: Where | None

    @classmethod
    def of(
        cls, destination: Destination, action: OnConflict, target: Target | None, where: Where | None
    ) -> Self | None:
        """Check what was given; None where a conflict is an error.

        Raises:
            ValueError: It contradicts itself, or names no column.
        """
        word = action if isinstance(action, str) else None
        if word is not None and word not in _WORDS:
            raise ValueError(f"{unknown('on_conflict', word, _WORDS)}; or give columns, a mapping or a callable")
        if word in ("raise", "nothing") and where is not None:
            raise ValueError(f"where= says which rows to write, and on_conflict={word!r} writes none")
        if word == "raise":
            if target is not None:
                raise ValueError("conflict_target= means nothing with on_conflict='raise': say what to do instead")
            return None
        destination.check_one_table("ON CONFLICT is about one: insert it")
        found = _target(destination, target)
        if not found and word != "nothing":
            raise ValueError("conflict_target= is missing: name the columns or the constraint whose conflict is meant")
        return cls(destination, found, _values(destination, found, action), where)

    def apply(self, statement: Insert) -> Insert:
        """*statement*, with this ON CONFLICT."""
        if self.values is None:
            return statement.on_conflict_do_nothing(**self.target)
        given = {self.destination.column(name).key: value for name, value in self.values(statement.excluded).items()}
        where = self.where(statement.excluded) if callable(self.where) else self.where
        return statement.on_conflict_do_update(**self.target, set_=self._counted(given), where=where)

    def _counted(self, given: dict[str, Any]) -> dict[str, Any]:
        """The same with the next version, where rows are counted and it is not said."""
        version = self.destination.version
        if version is None or version.key in given:
            return given
        if not isinstance(version.type, Integer):
            raise ValueError(  # noqa: TRY004  # of a column, not of an argument
                f"on_conflict= leaves {version} open, which tells versions apart: say what it becomes"
            )
        return {**given, version.key: version + 1}


def _values(destination: Destination, target: Mapping[str, Any], action: Any) -> Callable[[Any], Values] | None:
    """What *action* comes down to."""
    if isinstance(action, str):
        replaced = _replaced(destination, target.get("index_elements", ()))
        return None if action == "nothing" else lambda excluded: {each: excluded[each.key] for each in replaced}
    if callable(action):
        return cast("Callable[[Any], Values]", action)
    columns = destination.named(action)
    if not columns:
        raise ValueError("on_conflict= names no column to write: say 'nothing' to leave the row as it is")
    if isinstance(action, Mapping):
        return lambda _: action
    return lambda excluded: {each: excluded[each.key] for each in columns}


def _replaced(destination: Destination, found_by: Collection[Column[Any]]) -> list[Column[Any]]:
    """All columns, as an INSERT would have left them; without those by which the row was found, and its version."""
    return [
        column
        for column in destination.table.columns
        if not (column.primary_key or column is destination.version or column in found_by) and is_written(column)
    ]


def _target(destination: Destination, target: Target | None) -> dict[str, Any]:
    if target is None:
        return {}
    if isinstance(target, Constraint | Index):
        return {"constraint": target}
    if isinstance(target, str) and target not in destination.columns:
        table = destination.table
        every: tuple[Any, ...] = (*table.constraints, *table.indexes)
        return {"constraint": next((each for each in every if each.name == target), target)}
    elements = destination.named(target)
    if not elements:
        raise ValueError("conflict_target= names no column: leave it out, or name some")
    return {"index_elements": elements}
