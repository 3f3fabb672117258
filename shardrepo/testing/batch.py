"""New objects of one class on their way into a database: as rows of one INSERT, where that makes no difference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeAlias

from sqlalchemy import ClauseElement, Column
from sqlalchemy.orm import make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value

from ..destination import Destination
from ..repo import Repo
from ..session import HomeSession, Snapshot, check_graph, state_of, write_by_key
from ..writing import is_single_statement

Row: TypeAlias = Mapping[str, Any]


def insert_objects(repo: type[Repo], objects: Sequence[Any]) -> None:
    """Insert new objects into the current database, all or none.

    Afterwards they are what `Repo.insert` makes of each. With one `Repo.insert_all` where that is provably so, else
    one by one in a transaction.
    """
    if objects and not _insert_rows(repo, objects):
        repo.transact(lambda: [repo.insert(obj) for obj in objects])


def _insert_rows(repo: type[Repo], objects: Sequence[Any]) -> bool:
    """Insert objects as rows; False where that might not be the same, and nothing was done."""
    home, states = repo.get_database().home, [state_of(obj) for obj in objects]
    check_graph(states, home)
    if not _are_rows(repo, home, objects):
        return False
    destination, snapshot = Destination.of(type(objects[0])), Snapshot(states)
    put_back = [write_by_key(state) for state in states]
    names, stored = list(destination.columns), None
    try:
        rows = [dict(_cells(obj, destination)) for obj in objects]
        if _is_one_statement(rows):
            stored = repo.insert_all(type(objects[0]), rows, returning=names).rows
    finally:
        if stored is None:
            snapshot.restore()
    if stored is None:
        return False
    for obj, row, values in zip(objects, rows, stored, strict=True):
        _become(obj, home, row, dict(zip(names, values if len(names) > 1 else [values], strict=True)))
    for references in put_back:
        references()
    return True


def _are_rows(repo: type[Repo], home: str, objects: Sequence[Any]) -> bool:
    """Whether each object provably is one row and nothing else, to those who listen too."""
    mapper = state_of(objects[0]).mapper
    if any(state_of(obj).mapper is not mapper for obj in objects) or mapper.class_manager.dispatch.refresh_flush:
        return False
    with HomeSession(home, repo.engine()) as session:
        if any(getattr(session.dispatch, name) for name in _LIFE_EVENTS):
            return False
        return all(is_single_statement(session, obj) for obj in objects)


# What a session tells of new objects, beside what `is_single_statement` asks for.
_LIFE_EVENTS: Final = ("after_attach", "transient_to_pending", "pending_to_persistent", "persistent_to_detached")


def _is_one_statement(rows: Sequence[Row]) -> bool:
    """Whether rows have the same columns, as they would not get their keys in order else, and no SQL among them."""
    return all(row.keys() == rows[0].keys() for row in rows) and not any(
        isinstance(value, ClauseElement) or hasattr(value, "__clause_element__")
        for row in rows
        for value in row.values()
    )


def _cells(obj: object, destination: Destination) -> Iterator[tuple[str, Any]]:
    """What a session's INSERT of *obj* gives: None for a column without a default only, unless None is a value."""
    given = state_of(obj).dict
    for name, column in destination.columns.items():
        value, means_none = given.get(name), column.type.should_evaluate_none
        if value is not None or (means_none and name in given):
            yield name, value
        elif not (means_none or column.primary_key or _has_default(column, destination)):
            yield name, None


def _has_default(column: Column[Any], destination: Destination) -> bool:
    return column.default is not None or column.server_default is not None or column.key in destination.constants


def _become(obj: object, home: str, row: Row, stored: Row) -> None:
    """Make *obj* what was stored of it; what it gave stays as it gave it."""
    for name, value in stored.items():
        if row.get(name) is None:
            set_committed_value(obj, name, value)
    state_of(obj).identity_token = home
    make_transient_to_detached(obj)
