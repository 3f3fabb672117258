"""What is stored of objects that were loaded before: the objects anew, or what they refer to.

Plain functions of a session of the objects' home. The objects themselves never enter it: of one row there may be
several, with different neighbours, where a session knows but one. Leans on how a loader option keeps its path and its
filters (``tests/test_private_api.py``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from sqlalchemy import ARRAY, ColumnElement, Select, any_, literal, select, tuple_
from sqlalchemy.orm import (
    InstanceState,
    Mapper,
    MapperProperty,
    QueryableAttribute,
    RelationshipProperty,
    aliased,
    selectinload,
)
from sqlalchemy.orm.attributes import set_committed_value
from sqlalchemy.orm.collections import collection_adapter
from sqlalchemy.orm.strategy_options import _AbstractLoad

from .reading import Options, unique
from .session import HomeSession, key_names, state_of

# Keys in one statement, as SQLAlchemy's own loaders have it.
CHUNK: Final = 500

# What loads by itself, row by row, whenever it is asked.
_NEVER_LOADED: Final = frozenset({"dynamic", "write_only"})


@dataclass(frozen=True, slots=True)
class Step:
    """A relationship to load, and which of what it refers to."""

    relationship: RelationshipProperty[Any]
    criteria: tuple[ColumnElement[bool], ...] = ()

    @property
    def key(self) -> str:
        return self.relationship.key

    def of(self, entity: Any) -> Any:
        """The attribute of *entity*, a class or an alias of one."""
        attribute = getattr(entity, self.key)
        return attribute.and_(*self.criteria) if self.criteria else attribute


# What to load, and below each what to load of that.
Tree: TypeAlias = "dict[Step, Tree]"


def tree_of(wanted: Iterable[object]) -> Tree:
    """Read relationships, and chains of them as loader options have them.

    Raises:
        TypeError: Something is neither.
        ValueError: A relationship is one that is never loaded.
    """
    tree: Tree = {}
    for each in wanted:
        for chain in _chains(each):
            node = tree
            for step in chain:
                if step.relationship.lazy in _NEVER_LOADED:
                    raise ValueError(f"{step.relationship} is lazy={step.relationship.lazy!r}: query it instead")
                node = node.setdefault(step, {})
    if not tree:
        raise ValueError("preload() was asked for no relationship: name one, such as User.posts")
    return tree


def _chains(wanted: object) -> Iterator[list[Step]]:
    if isinstance(wanted, _AbstractLoad):
        criteria = {_way(element.path.path): element._extra_criteria for element in wanted.context}  # type: ignore[attr-defined]  # of both its subclasses
        for way in criteria:
            yield [Step(each, tuple(criteria.get(way[:n], ()))) for n, each in enumerate(way, 1)]
    elif isinstance(wanted, QueryableAttribute) and isinstance(wanted.property, RelationshipProperty):
        yield [Step(wanted.property, tuple(wanted._extra_criteria))]
    else:
        raise TypeError(f"preload() takes relationships, such as User.posts, and loader options, not {wanted!r}")


def _way(path: Sequence[Any]) -> tuple[RelationshipProperty[Any], ...]:
    """The relationships along a loader's path, which alternate with mappers."""
    for part in path:
        if isinstance(part, MapperProperty) and not isinstance(part, RelationshipProperty):
            raise TypeError(f"preload() loads relationships, and {part} is none")
    return tuple(part for part in path if isinstance(part, RelationshipProperty))


def check_owners(objects: Iterable[object], tree: Tree) -> None:
    """Raise `ValueError` unless each of *objects* has the first relationships of *tree*."""
    for state in map(state_of, objects):
        for step in tree:
            if not state.mapper.isa(step.relationship.parent):
                raise ValueError(f"{step.relationship} is no relationship of a {state.class_.__name__}")


def reload(session: HomeSession, objects: Sequence[object], options: Options) -> list[Any]:
    """What is stored now of each of *objects*, in their order; None for what is not there any more."""
    states = [state_of(obj) for obj in objects]
    groups: defaultdict[Mapper[Any], list[InstanceState[Any]]] = defaultdict(list)
    for state in states:
        groups[state.mapper].append(state)
    found: dict[object, object] = {}
    for mapper, members in groups.items():
        for statement in _chunks(session.prepared(select(mapper).options(*options)), mapper.primary_key, members):
            for obj in unique(session.execute(statement)).scalars():
                found[mapper, _identity(state_of(obj))] = obj
    return [found.get((state.mapper, _identity(state))) for state in states]


def preload(session: HomeSession, objects: Sequence[object], tree: Tree, *, force: bool) -> None:
    """Load what *tree* says of *objects*, where that is not loaded yet or *force* says so; at once, or nothing."""
    for obj, name, value in list(_found(session, objects, tree, force=force)):
        set_committed_value(obj, name, value)


def _found(
    session: HomeSession, objects: Sequence[object], tree: Tree, *, force: bool
) -> Iterator[tuple[Any, str, Any]]:
    """Which value is to become which attribute of which object."""
    states = [state_of(obj) for obj in objects]
    for step, below in tree.items():
        missing: list[InstanceState[Any]] = []
        there: list[InstanceState[Any]] = []
        for state in states:
            (missing if force or step.key not in state.dict else there).append(state)
        yield from _loaded(session, missing, step, below)
        if below:
            members = [member for state in there for member in _members(state, step)]
            check_owners(members, below)
            yield from _found(session, members, below, force=force)


def _loaded(
    session: HomeSession, states: Sequence[InstanceState[Any]], step: Step, below: Tree
) -> Iterator[tuple[Any, str, Any]]:
    relationship = step.relationship
    owner: Any = aliased(relationship.parent)
    keys = [getattr(owner, name) for name in key_names(relationship.parent)]
    statement: Any = (
        select(*keys, relationship.entity.entity)
        .select_from(owner)
        .join(step.of(owner))
        .options(*_options(relationship.entity.entity, below))
        .order_by(*(relationship.order_by or ()))
    )
    targets: defaultdict[tuple[Any, ...], list[Any]] = defaultdict(list)
    for chunk in _chunks(session.prepared(statement), keys, states):
        for row in unique(session.execute(chunk)):
            targets[row[:-1]].append(row[-1])
    for state in states:
        found = targets[_identity(state)]
        yield state.obj(), step.key, list(found) if relationship.uselist else next(iter(found), None)


def _options(entity: Any, tree: Tree) -> list[Any]:
    return [
        selectinload(step.of(entity)).options(*_options(step.relationship.entity.entity, below))
        for step, below in tree.items()
    ]


def _members(state: InstanceState[Any], step: Step) -> list[object]:
    """What a relationship that is loaded refers to."""
    value = state.dict[step.key]
    if value is None:
        return []
    return list(collection_adapter(value)) if step.relationship.uselist else [value]


def _chunks(
    statement: Select[Any], columns: Sequence[Any], states: Sequence[InstanceState[Any]]
) -> Iterator[Select[Any]]:
    """*statement* for so many keys at a time."""
    keys = list(dict.fromkeys(map(_identity, states)))
    for start in range(0, len(keys), CHUNK):
        chunk = keys[start : start + CHUNK]
        if len(columns) > 1:
            yield statement.where(tuple_(*columns).in_(chunk))
            continue
        column, values = columns[0], [key for (key,) in chunk]
        if len(set(map(type, values))) > 1:  # which the driver puts into no array
            yield statement.where(column.in_(values))
        else:
            # As one parameter: of hundreds, client and server would each read the statement for longer than it runs.
            yield statement.where(column == any_(literal(values, ARRAY(column.type))))


def _identity(state: InstanceState[Any]) -> tuple[Any, ...]:
    assert state.key is not None
    return tuple(state.key[1])
