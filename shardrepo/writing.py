"""What the verbs that write do, as plain functions of a session.

None of them knows a repo, chooses a database or begins a transaction: a session of the right database
comes in, and the flush is left to it. Each says whether it has written the object, or that it is as it should be.
Leans on where a mapped class has its listeners (``tests/test_private_api.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from sqlalchemy import event
from sqlalchemy.dialects.postgresql import insert as sql_insert
from sqlalchemy.engine import Connection
from sqlalchemy.orm import InstanceState, make_transient_to_detached
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.exc import StaleDataError

from .conflicts import Conflict
from .destination import Destination
from .errors import unknown
from .session import HomeSession, check_graph, graph, state_of, write_by_key


def insert(session: HomeSession, obj: object) -> bool:
    return _flush(session, _new(obj))


def upsert(session: HomeSession, obj: object, conflict: Conflict) -> bool:
    """Insert an object, or do what *conflict* says; whether a row was written, which *obj* then is."""
    state = _new(obj)
    destination = conflict.destination
    check_graph(graph(state), session.home)
    _check_alone(state)
    put_back = write_by_key(state)
    statement = conflict.apply(sql_insert(destination.table).values(dict(_given(state, destination))))
    row = session.execute(statement.returning(*destination.table.columns)).one_or_none()
    if row is None:
        return False
    for name, column in destination.columns.items():
        set_committed_value(obj, name, row._mapping[column])
    # As a session tells it: values that notice their own changes are made of those that came.
    state.manager.dispatch.refresh(state, None, set(destination.columns))
    state.identity_token = session.home
    make_transient_to_detached(obj)
    put_back()
    return True


def _given(state: InstanceState[Any], destination: Destination) -> Iterator[tuple[str, Any]]:
    """The values that an INSERT of an object names, as a session has it: None leaves a column to its default."""
    yield from destination.constants.items()
    for name, column in destination.columns.items():
        value = state.dict.get(name)
        if value is not None or (name in state.dict and column.type.should_evaluate_none):
            yield column.key, value


def _check_alone(state: InstanceState[Any]) -> None:
    """Raise `ValueError` if an object's relationships hold what would have to be written with it."""
    others = [other for other in graph(state) if other is not state]
    held = [each.key for each in state.mapper.relationships if each.uselist and state.dict.get(each.key)]
    if others or held:
        raise ValueError(
            f"on_conflict= writes one row, and this {state.class_.__name__} refers to objects that would be written "
            f"with it ({', '.join(held) or others[0].class_.__name__}): insert them after it"
        )


def update(session: HomeSession, obj: object, changes: Mapping[str, Any]) -> bool:
    state = _stored(obj, "update")
    for name, value in changes.items():
        setattr(obj, name, value)
    return _flush(session, state)


def delete(session: HomeSession, obj: object) -> bool:
    states = list(graph(_stored(obj, "delete")))
    check_graph(states, session.home)
    put_back = [write_by_key(state) for state in states]
    with _every_delete_counts(session.connection()):
        # What the object holds comes with it, so that children which are not deleted are let go of.
        session.add(obj)
        session.delete(obj)
        session.flush()
    for reference in put_back:
        reference()
    return True


def check_changes(obj: object, changes: Mapping[str, Any]) -> None:
    """Raise unless every name in *changes* is a mapped attribute of *obj*."""
    mapper = state_of(obj).mapper
    for name in changes:
        if name not in mapper.attrs:
            raise ValueError(f"{mapper.class_.__name__}: {unknown('attribute', name, mapper.attrs.keys())}")


def touched(obj: object, changes: Mapping[str, Any], *, deleting: bool = False) -> set[InstanceState[Any]]:
    """The objects that writing *obj* may change: itself, what the mapping cascades to, and both ends of
    every relationship among the *changes*."""
    state = state_of(obj)
    states = set(graph(state))
    if deleting:
        states.update(graph(state, "delete"))
    for name in changes.keys() & state.mapper.relationships.keys():
        for end in (changes[name], state.dict.get(name)):
            states.update(state_of(one) for one in _members(end) if one is not None)
    return states


def _members(end: Any) -> Collection[Any]:
    """What one end of a relationship refers to."""
    if isinstance(end, Mapping):
        return end.values()
    return end if isinstance(end, Collection) else [end]


def is_single_statement(session: HomeSession, obj: object, *, deleting: bool = False) -> bool:
    """Whether writing *obj* provably takes one statement: one instance, one table, and no listener that
    may emit SQL of its own."""
    state = state_of(obj)
    mapper = state.mapper
    if len(mapper.tables) != 1 or state.__dict__.get("_pending_mutations"):
        return False
    if any(getattr(mapper.dispatch, name) for name in _MAPPER_EVENTS):
        return False
    if any(getattr(session.dispatch, name) for name in _SESSION_EVENTS):
        return False
    return all(_is_quiet(state, relationship, deleting) for relationship in mapper.relationships)


_MAPPER_EVENTS: Final = (
    "before_insert", "after_insert", "before_update", "after_update", "before_delete", "after_delete",
)  # fmt: skip
_SESSION_EVENTS: Final = ("before_flush", "after_flush", "after_flush_postexec", "before_commit", "after_begin")


def _is_quiet(state: InstanceState[Any], relationship: Any, deleting: bool) -> bool:
    """Whether *relationship* provably takes no part in writing *state*."""
    if relationship.viewonly:
        return True
    to_one = relationship.direction.name == "MANYTOONE"
    if deleting and not (relationship.cascade.delete if to_one else relationship.passive_deletes != "all"):
        return True
    if deleting:
        return False
    value = state.dict.get(relationship.key)
    if to_one:
        return value is None or state_of(value).key is not None
    return not value and relationship.key not in state.committed_state


def _flush(session: HomeSession, state: InstanceState[Any]) -> bool:
    states = list(graph(state))
    check_graph(states, session.home)
    for each in states:
        # By RETURNING on UPDATE too, where SQLAlchemy's "auto" stops at INSERT and would leave server-computed
        # columns unloaded on an object that is about to be detached.
        if each.mapper.base_mapper.eager_defaults == "auto":
            each.mapper.base_mapper.eager_defaults = True
    put_back = [write_by_key(each) for each in states]
    session.add(state.obj())
    session.flush()
    for reference in put_back:
        reference()
    return True


def _new(obj: object) -> InstanceState[Any]:
    state = state_of(obj)
    if state.key is not None:
        became = "was deleted" if state.was_deleted else "is stored already"
        raise ValueError(
            f"this {type(obj).__name__} {became}, in {state.key[2]}: use update(), or insert a copy made by rehome()"
        )
    return state


def _stored(obj: object, verb: str) -> InstanceState[Any]:
    state = state_of(obj)
    if state.key is None:
        raise ValueError(f"cannot {verb} this {type(obj).__name__}: it was never stored, insert() it first")
    if state.was_deleted:
        raise ValueError(f"cannot {verb} this {type(obj).__name__}: it was deleted; insert a copy made by rehome()")
    return state


@contextmanager
def _every_delete_counts(connection: Connection) -> Iterator[None]:
    """Raise `StaleDataError` when a DELETE by key finds fewer rows than keys; SQLAlchemy only warns."""

    def check(_conn: Any, cursor: Any, _statement: str, parameters: Any, context: Any, executemany: bool) -> None:
        expected = len(parameters) if executemany else 1
        if context.isdelete and cursor.rowcount < expected:
            raise StaleDataError(f"DELETE was to remove {expected} row(s), and {cursor.rowcount} were there")

    event.listen(connection, "after_cursor_execute", check)
    try:
        yield
    finally:
        event.remove(connection, "after_cursor_execute", check)
