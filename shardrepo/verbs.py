"""What the verbs do, as plain functions of a session.

None of them knows a repo, chooses a database or begins a transaction: a session of the right database
comes in. Reads return objects that the caller's session lets go of; writes leave their flush to it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import ColumnElement, Executable, Select, Table, bindparam, event, func, inspect, select, text
from sqlalchemy import insert as sql_insert
from sqlalchemy.engine import Connection, CursorResult, Result
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.orm import InstanceState, Mapper, Session
from sqlalchemy.orm.exc import StaleDataError

from .errors import unknown
from .session import HomeSession, check_graph, graph, load, state_of, write_by_key


@dataclass(frozen=True, slots=True)
class BulkResult:
    """What a write of many rows did.

    Attributes:
        count: The number of rows written.
        rows: What the statement returned; None when it was not asked to return anything.
    """

    count: int
    rows: list[Any] | None


def mapper_of(model: Any) -> Mapper[Any]:
    """The mapper of *model*; `TypeError` when it is not a mapped class."""
    try:
        mapper = inspect(model)
    except NoInspectionAvailable:
        mapper = None
    if isinstance(mapper, Mapper):
        return mapper
    if isinstance(model, Executable):
        raise TypeError("this verb takes a mapped class, not a statement: use one(), one_or_none() or all()")
    raise TypeError(f"{model!r} is not a mapped class")


# Reading


def get(session: HomeSession, mapper: Mapper[Any], parameters: Mapping[str, Any]) -> Any:
    return _results(session, _by_primary_key(mapper), parameters).one_or_none()


def get_plain(connection: Connection, home: str, mapper: Mapper[Any], parameters: Mapping[str, Any]) -> Any:
    """`get` for a mapping that `is_plain`, without a session: in half the time."""
    row = connection.execute(_by_primary_key_plain(mapper), parameters).one_or_none()
    return None if row is None else load(mapper, zip(_names(mapper), row, strict=True), home)


def get_by(session: HomeSession, model: type[Any], columns: Mapping[str, Any]) -> Any:
    return _results(session, _filtered(model, columns).limit(2)).one_or_none()


def one(session: HomeSession, query: Any) -> Any:
    return _results(session, _limited(query)).one()


def one_or_none(session: HomeSession, query: Any) -> Any:
    return _results(session, _limited(query)).one_or_none()


def all_(session: HomeSession, query: Any) -> list[Any]:
    return list(_results(session, _selected(query)).all())


def count(session: HomeSession, query: Any) -> int:
    statement = _selected(query)
    if statement._group_by_clauses:
        raise ValueError("count() of a grouped query would count its groups: count in the query, and use all()")
    rows = statement.order_by(None).subquery()
    return int(session.execute(select(func.count()).select_from(rows)).scalar_one())


def exists(session: HomeSession, query: Any) -> bool:
    return bool(session.execute(select(_selected(query).order_by(None).exists())).scalar_one())


def execute(session: HomeSession, statement: Executable | str, parameters: Any) -> Result[Any]:
    if isinstance(statement, str):
        statement = text(statement)
    result = session.execute(statement, parameters)
    return result.freeze()() if _returns_rows(result) else result


# Writing


def insert(session: HomeSession, obj: object) -> None:
    state = state_of(obj)
    if state.key is not None:
        became = "was deleted" if state.was_deleted else "is stored already"
        raise ValueError(
            f"this {type(obj).__name__} {became}, in {state.key[2]}: use update(), or insert a copy made by rehome()"
        )
    _flush(session, state)


def update(session: HomeSession, obj: object, changes: Mapping[str, Any]) -> None:
    state = _stored(obj, "update")
    for name, value in changes.items():
        setattr(obj, name, value)
    _flush(session, state)


def delete(session: HomeSession, obj: object) -> None:
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


def insert_all(session: HomeSession, model: Any, rows: Iterable[Mapping[str, Any]]) -> BulkResult:
    mapper = mapper_of(model)
    rows = [dict(row) for row in rows]
    for name in {name for row in rows for name in row}:
        if name not in mapper.columns:
            raise ValueError(f"{mapper.class_.__name__}: {unknown('column', name, mapper.columns.keys())}")
    if rows:
        session.execute(sql_insert(mapper.class_), rows)
    return BulkResult(len(rows), None)


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
            states.update(state_of(one) for one in (end if isinstance(end, Collection) else [end]) if one is not None)
    return states


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


def _flush(session: HomeSession, state: InstanceState[Any]) -> None:
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


# Statements


# Below: as many mappers as an application has, and some.
@lru_cache(maxsize=1024)
def _by_primary_key(mapper: Mapper[Any]) -> Select[Any]:
    return select(mapper).where(*_key_criteria(mapper))


@lru_cache(maxsize=1024)
def _by_primary_key_plain(mapper: Mapper[Any]) -> Select[Any]:
    return select(*mapper.local_table.columns).where(*_key_criteria(mapper))


@lru_cache(maxsize=1024)
def _names(mapper: Mapper[Any]) -> tuple[str, ...]:
    return tuple(mapper.get_property_by_column(column).key for column in mapper.local_table.columns)


def _key_criteria(mapper: Mapper[Any]) -> Iterator[ColumnElement[bool]]:
    return (column == bindparam(f"pk_{n}", type_=column.type) for n, column in enumerate(mapper.primary_key))


def is_plain(mapper: Mapper[Any]) -> bool:
    """Whether a row of one table, column by column, is all that loading an object takes, and nobody listens."""
    if mapper.class_manager.dispatch.load or mapper.class_manager.dispatch.refresh or _listened.dispatch.do_orm_execute:
        return False
    return _maps_columns_only(mapper)


# Shows what applications listen to on all sessions.
_listened: Final = Session()


@lru_cache(maxsize=1024)
def _maps_columns_only(mapper: Mapper[Any]) -> bool:
    table = mapper.local_table
    return (
        isinstance(table, Table)
        and not mapper.inherits
        and mapper.polymorphic_on is None
        and {column for prop in mapper.column_attrs for column in prop.columns} == set(table.columns)
        and all(len(prop.columns) == 1 and not prop.deferred for prop in mapper.column_attrs)
        and all(relationship.lazy in _LAZY for relationship in mapper.relationships)
    )


# The values of relationship(lazy=) that load nothing together with the object.
_LAZY: Final = frozenset({True, None, "select", "raise", "raise_on_sql", "noload", "write_only", "dynamic"})


def key_parameters(mapper: Mapper[Any], key: Any) -> dict[str, Any]:
    columns = mapper.primary_key
    if isinstance(key, Mapping):
        names = [mapper.get_property_by_column(column).key for column in columns]
        if set(key) != set(names):
            raise ValueError(f"the primary key of {mapper.class_.__name__} is {names}, not {sorted(key)}")
        values: Sequence[Any] = [key[name] for name in names]
    else:
        values = key if isinstance(key, tuple) else (key,)
    if len(values) != len(columns):
        raise ValueError(
            f"the primary key of {mapper.class_.__name__} has {len(columns)} column(s), and {key!r} has {len(values)}"
        )
    if any(value is None for value in values):
        raise ValueError(
            f"a primary key is never None, so get({mapper.class_.__name__}, {key!r}) asks for nothing: "
            "check for None before"
        )
    return {f"pk_{n}": value for n, value in enumerate(values)}


def _filtered(model: Any, columns: Mapping[str, Any]) -> Select[Any]:
    mapper = mapper_of(model)
    if not columns:
        raise ValueError(f"get_by({mapper.class_.__name__}) names no column to look by")
    for name, value in columns.items():
        if name not in mapper.column_attrs:
            raise ValueError(f"{mapper.class_.__name__}: {unknown('column', name, mapper.column_attrs.keys())}")
        if value is None:
            raise ValueError(
                f"{name}=None matches no row in SQL, and any row where it means IS NULL: write "
                f"one_or_none(select({mapper.class_.__name__}).where({mapper.class_.__name__}.{name}.is_(None)))"
            )
    return select(mapper).filter_by(**columns)


def _selected(query: Any) -> Select[Any]:
    if isinstance(query, Select):
        return query
    if isinstance(query, Executable):
        raise TypeError("this verb takes a select() or a mapped class; run other statements with execute()")
    return select(mapper_of(query))


def _limited(query: Any) -> Select[Any]:
    """Two rows are enough to know that there is more than one."""
    statement = _selected(query)
    return statement.limit(2) if statement._limit_clause is None else statement


def _results(session: HomeSession, statement: Select[Any], parameters: Mapping[str, Any] | None = None) -> Any:
    """One column gives its values, several give rows."""
    result = _unique(session.execute(statement, parameters))
    return result.scalars() if len(statement.column_descriptions) == 1 else result


def _unique(result: Any) -> Any:
    # The ORM marks a result whose rows repeat because of joined eager loading, and refuses to give its
    # rows before unique() is called. There is no public way to see the mark.
    return result if result._unique_filter_state is None else result.unique()


def _returns_rows(result: Result[Any]) -> bool:
    return not isinstance(result, CursorResult) or result.returns_rows
