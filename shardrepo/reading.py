"""What the verbs that read do, as plain functions of a session.

None of them knows a repo, chooses a database or begins a transaction: a session of the right database
comes in, which lets go of the objects that it gives. Leans on how a `Select` keeps its limit, its groups, its order
and its options, on the mark of a result whose rows repeat, and on how a session lets go of many objects at once
(``tests/test_private_api.py``).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Final, Literal, TypeAlias, TypeVar, get_args

from sqlalchemy import ColumnElement, Executable, Select, Table, bindparam, func, inspect, select, text
from sqlalchemy.engine import Connection, Result, Row
from sqlalchemy.orm import LoaderCriteriaOption, Mapper, QueryableAttribute, Session
from sqlalchemy.sql import operators
from sqlalchemy.sql.base import ExecutableOption

from .errors import unknown
from .session import HomeSession, key_names, load_object, mapper_of, state_of

E = TypeVar("E", bound=Executable)

Options: TypeAlias = Sequence[ExecutableOption]
Aggregate: TypeAlias = Literal["avg", "count", "max", "min", "sum"]

# Rows that a stream takes from the server at a time.
BATCH: Final = 500


# One object


def get(session: HomeSession, mapper: Mapper[Any], parameters: Mapping[str, Any], options: Options) -> Any:
    statement = session.prepared(_by_primary_key(mapper))
    return _results(session, statement.options(*options) if options else statement, parameters).one_or_none()


def get_plain(connection: Connection, home: str, mapper: Mapper[Any], parameters: Mapping[str, Any]) -> Any:
    """`get` for a mapping that `is_plain`, without a session: in half the time."""
    row = connection.execute(_by_primary_key_plain(mapper), parameters).one_or_none()
    return None if row is None else load_object(mapper, zip(_names(mapper), row, strict=True), home)


def get_by(session: HomeSession, model: type[Any], columns: Mapping[str, Any]) -> Any:
    return _results(session, _filtered(session, model, columns).limit(2)).one_or_none()


def get_one_by(session: HomeSession, model: type[Any], columns: Mapping[str, Any]) -> Any:
    return _results(session, _filtered(session, model, columns).limit(2)).one()


def load(home: str, model: Any, values: Any) -> Any:
    """Make the object that *values*, a row or a mapping, would be loaded as; what they leave out is not loaded."""
    mapper = mapper_of(model)
    given = values._mapping if isinstance(values, Row) else values
    if not isinstance(given, Mapping):
        raise TypeError(f"load() takes a row or a mapping, not {type(values).__name__}")
    names = set(mapper.column_attrs.keys())
    known = {name: value for name, value in given.items() if name in names}
    for name in key_names(mapper):
        if known.get(name) is None:
            raise ValueError(f"without a primary key this is no stored {mapper.class_.__name__}: {name} is missing")
    made = load_object(mapper, known.items(), home)
    # Else they would read as None.
    state_of(made).expired_attributes.update(names - known.keys())
    return made


# Results of a query


def one(session: HomeSession, query: Any, options: Options) -> Any:
    return _results(session, _limited(session, query).options(*options)).one()


def one_or_none(session: HomeSession, query: Any, options: Options) -> Any:
    return _results(session, _limited(session, query).options(*options)).one_or_none()


def first(session: HomeSession, query: Any, options: Options) -> Any:
    statement = _ordered(selected(session, query))
    if statement._limit_clause is None:
        statement = statement.limit(1)
    return _results(session, statement.options(*options)).first()


def last(session: HomeSession, query: Any, options: Options) -> Any:
    statement = _ordered(selected(session, query)).options(*options)
    if statement._limit_clause is None and statement._offset_clause is None:
        order = [_reversed(clause) for clause in statement._order_by_clauses]
        return _results(session, statement.order_by(None).order_by(*order).limit(1)).first()
    # The last of those that it is limited to is not the first of the others' order.
    return next(iter(_results(session, statement).all()[-1:]), None)


def all_(session: HomeSession, query: Any, options: Options) -> list[Any]:
    return list(_results(session, selected(session, query).options(*options)).all())


def all_by(session: HomeSession, model: type[Any], columns: Mapping[str, Any]) -> list[Any]:
    return list(_results(session, _filtered(session, model, columns)).all())


def streamable(query: Any, batch: int, options: Options) -> Select[Any]:
    """What to stream, *batch* rows at a time; raises before anything is sent."""
    if not isinstance(batch, int) or batch < 1:
        raise ValueError(f"batch={batch!r} takes no rows: give the number to take from the server at a time")
    return _select_of(query).options(*options).execution_options(yield_per=batch)


def stream(session: HomeSession, statement: Select[Any]) -> Generator[Any]:
    """The results one after the other, each let go of, from a cursor that the server keeps."""
    result: Any = session.execute(session.prepared(statement))
    try:
        for rows in (result.scalars() if _is_single(statement) else result).partitions():
            # Not `expunge_all`: to the result, a session that was emptied so would be another one.
            session._expunge_states(session.identity_map.all_states())
            yield from rows
    finally:
        result.close()


# Numbers


def count(session: HomeSession, query: Any) -> int:
    statement = _ungrouped(session, query, "count")
    rows = statement.order_by(None).subquery()
    return int(session.execute(with_criteria(select(func.count()).select_from(rows), statement)).scalar_one())


def aggregate(session: HomeSession, query: Any, function: Aggregate, column: Any) -> Any:
    if function not in get_args(Aggregate):
        raise ValueError(unknown("aggregate", str(function), get_args(Aggregate)))
    statement = _ungrouped(session, query, f"aggregate({function!r})")
    if not isinstance(column, ColumnElement | QueryableAttribute):
        raise TypeError(f"aggregate() takes a column, such as User.age, not {column!r}")
    over = getattr(func, function)
    if statement._limit_clause is None and statement._offset_clause is None and not statement._distinct:
        whole = statement.with_only_columns(over(column), maintain_column_froms=True).order_by(None)
        return session.execute(whole).scalar_one()
    rows = statement.subquery()
    expression: Any = column.expression
    found = rows.corresponding_column(expression)
    if found is None and statement._distinct:
        raise ValueError(f"{column} is not among the columns that are distinct: it has several values for each of them")
    if found is None:
        rows = statement.add_columns(column.label("aggregated")).subquery()
        found = rows.c.aggregated
    return session.execute(with_criteria(select(over(found)), statement)).scalar_one()


def exists(session: HomeSession, query: Any) -> bool:
    statement = selected(session, query)
    return bool(session.execute(with_criteria(select(statement.order_by(None).exists()), statement)).scalar_one())


def execute(session: HomeSession, statement: Executable | str, parameters: Any) -> Result[Any]:
    if isinstance(statement, str):
        statement = text(statement)
    result = session.execute(statement, parameters)
    return result.freeze()() if _returns_rows(result) else result


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
    if isinstance(key, int | str) and len(columns) == 1:
        return {"pk_0": key}
    if isinstance(key, Mapping):
        names = list(key_names(mapper))
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


def _filtered(session: HomeSession, model: Any, columns: Mapping[str, Any]) -> Select[Any]:
    mapper = mapper_of(model)
    if not columns:
        raise ValueError(f"{mapper.class_.__name__}: no column is named to look by")
    for name, value in columns.items():
        if name not in mapper.column_attrs:
            raise ValueError(f"{mapper.class_.__name__}: {unknown('column', name, mapper.column_attrs.keys())}")
        if value is None:
            raise ValueError(
                f"{name}=None matches no row in SQL, and any row where it means IS NULL: write "
                f"one_or_none(select({mapper.class_.__name__}).where({mapper.class_.__name__}.{name}.is_(None)))"
            )
    return session.prepared(select(mapper).filter_by(**columns))


def selected(session: HomeSession, query: Any) -> Select[Any]:
    """The `select` that *query* is, or a mapped class stands for, as it is to be run."""
    return session.prepared(_select_of(query))


def with_criteria(statement: E, query: Select[Any]) -> E:
    """*statement*, which has *query* in it, with the criteria that hold wherever their class is selected from."""
    criteria = [option for option in query._with_options if isinstance(option, LoaderCriteriaOption)]
    return statement.options(*criteria) if criteria else statement


def _select_of(query: Any) -> Select[Any]:
    if isinstance(query, Select):
        return query
    if isinstance(query, Executable):
        raise TypeError("this verb takes a select() or a mapped class; run other statements with execute()")
    return select(mapper_of(query))


def _ungrouped(session: HomeSession, query: Any, verb: str) -> Select[Any]:
    statement = selected(session, query)
    if statement._group_by_clauses:
        raise ValueError(f"{verb} of a grouped query has one meaning for each group: write it in the query, use all()")
    return statement


def _ordered(statement: Select[Any]) -> Select[Any]:
    """*statement* by its own order, else by the primary key of what it selects first."""
    if statement._order_by_clauses:
        return statement
    entity = next((each["entity"] for each in statement.column_descriptions if each.get("entity") is not None), None)
    if entity is None:
        raise ValueError("which row is first? The query has no order and no mapped class: give it an order_by()")
    return statement.order_by(*(getattr(entity, name) for name in key_names(inspect(entity).mapper)))


def _reversed(clause: Any) -> Any:
    """The opposite of an element of ORDER BY."""
    if clause.__visit_name__ == "label_reference":
        return _reversed(clause.element)
    inner: Any = getattr(clause, "element", None)
    match getattr(clause, "modifier", None):
        case operators.desc_op:
            return inner.asc()
        case operators.asc_op:
            return inner.desc()
        case operators.nulls_first_op:
            return _reversed(inner).nulls_last()
        case operators.nulls_last_op:
            return _reversed(inner).nulls_first()
    if not hasattr(clause, "desc"):
        raise ValueError(f"the opposite of the order {str(clause)!r} is not known: order by columns")
    return clause.desc()


def _limited(session: HomeSession, query: Any) -> Select[Any]:
    """Two rows are enough to know that there is more than one."""
    statement = selected(session, query)
    return statement.limit(2) if statement._limit_clause is None else statement


def _results(session: HomeSession, statement: Select[Any], parameters: Mapping[str, Any] | None = None) -> Any:
    """One column gives its values, several give rows."""
    result = unique(session.execute(statement, parameters))
    return result.scalars() if _is_single(statement) else result


def _is_single(statement: Select[Any]) -> bool:
    return len(statement.column_descriptions) == 1


def unique(result: Any) -> Any:
    # The ORM marks a result whose rows repeat because of joined eager loading, and refuses to give its
    # rows before unique() is called. There is no public way to see the mark.
    return result if result._unique_filter_state is None else result.unique()


def _returns_rows(result: Result[Any]) -> bool:
    # Of the columns, not of the result: that of an INSERT of many objects' rows is no cursor's, and has none.
    return getattr(result._metadata, "returns_rows", True)
