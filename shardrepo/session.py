"""Sessions that belong to one database for life, and objects that remember theirs.

An object's home is the ``identity_token`` of its ORM identity: the string ``server/name``. It is set when a
row is loaded or inserted, survives detaching and pickling, and keeps equal primary keys of two databases
apart. Here, too, is what leans on SQLAlchemy's insides (``tests/test_private_api.py``): `Snapshot` on those of
`InstanceState`, because a failed flush leaves traces on objects that SQLAlchemy does not take back; on how a criterion
keeps the object that it asks by; on ``Session._merge``; and on where an object has its state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, TypeVar

from sqlalchemy import BindParameter, Column, Executable, Select, event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.inspection import inspect
from sqlalchemy.orm import InstanceState, Mapper, ORMExecuteState, RelationshipDirection, Session
from sqlalchemy.orm.attributes import instance_state, set_committed_value
from sqlalchemy.orm.base import DEFAULT_STATE_ATTR
from sqlalchemy.orm.collections import collection_adapter
from sqlalchemy.orm.exc import DetachedInstanceError

from .database import Database
from .errors import WrongDatabaseError

T = TypeVar("T")

# Where a copy that is not stored yet says where it goes: unlike the identity token, this is pickled.
_BOUND_FOR: Final = "shardrepo bound for"

MANYTOONE: Final = RelationshipDirection.MANYTOONE


def state_of(obj: object) -> InstanceState[Any]:
    """The ORM's state of *obj*; `TypeError` when it is not an instance of a mapped class."""
    # What inspect() gives, at a tenth of its price.
    state = getattr(obj, DEFAULT_STATE_ATTR, None)
    if not isinstance(state, InstanceState):
        raise TypeError(f"{obj!r} is not an object of a mapped class, which is what this verb takes")
    return state


def mapper_of(model: Any) -> Mapper[Any]:
    """The mapper of *model*; `TypeError` when it is not a mapped class."""
    own = model.__dict__.get("__mapper__") if isinstance(model, type) else None
    if isinstance(own, Mapper):  # what inspect() gives, at a quarter of its price
        return own
    try:
        mapper = inspect(model)
    except NoInspectionAvailable:
        mapper = None
    if isinstance(mapper, Mapper):
        return mapper
    if isinstance(model, Executable):
        raise TypeError("this verb takes a mapped class, not a statement: use one(), one_or_none() or all()")
    raise TypeError(f"{model!r} is not a mapped class")


# As many mappers as an application has, and some.
@lru_cache(maxsize=1024)
def key_names(mapper: Mapper[Any]) -> tuple[str, ...]:
    """The attributes of the primary key, in its order."""
    return tuple(mapper.get_property_by_column(column).key for column in mapper.primary_key)


def home_of(obj: object) -> str | None:
    """The home of *obj*, as ``server/name``; None for one that was never stored nor rehomed."""
    return _home(state_of(obj))


def _home(state: InstanceState[Any]) -> str | None:
    if state.key is not None:
        home = state.key[2]
    else:
        home = state.identity_token or state.__dict__.get("info", {}).get(_BOUND_FOR)
    return home if isinstance(home, str) else None


def common_home(objects: Iterable[object]) -> str:
    """The one home of all *objects*, of which there is one at least.

    Raises:
        ValueError: One of them was never stored.
        WrongDatabaseError: They have several.
    """
    homes: dict[str, None] = {}
    for obj in objects:
        state = state_of(obj)
        home = _home(state)
        if state.key is None or home is None:
            raise ValueError(f"this {type(obj).__name__} was never stored through a repo: insert() it first")
        homes[home] = None
    first, *others = homes
    if others:
        raise WrongDatabaseError(
            f"objects of {first} and of {others[0]} meet in one call: do one database after the other",
            expected=first,
            found=others[0],
        )
    return first


def check_home(state: InstanceState[Any], home: str) -> None:
    """Raise `WrongDatabaseError` if the object of *state* is stored, or bound, anywhere but in *home*."""
    is_new = state.key is None
    found = _home(state)
    if found == home or (found is None and is_new):
        return
    where = f"belongs to {found}" if found else "was not loaded through a repo, so its home is unknown"
    raise WrongDatabaseError(
        f"this {state.class_.__name__} {where}, and {home} is the current database: choose its home with "
        "using(...), or make a copy for this one with rehome(...)",
        expected=home,
        found=found,
    )


def graph(state: InstanceState[Any], cascade: str = "save-update") -> Iterator[InstanceState[Any]]:
    """The objects that writing this one may touch: itself, and what the mapping cascades to. Loads nothing.

    It ends at stored objects that are referred to, which are written by key: what else those refer to, the
    children of a shared parent among it, is somebody else's.
    """
    seen, ahead = {state}, [state]
    while ahead:
        current = ahead.pop()
        yield current
        related = {
            other for one in current.mapper.relationships if cascade in one.cascade for other in _members(current, one)
        }
        ahead.extend(related - seen)
        seen |= related


def _members(state: InstanceState[Any], relationship: Any) -> list[InstanceState[Any]]:
    """What a relationship holds, and held before it was changed, as far as it is loaded."""
    pending = state.manager[relationship.key].impl.get_all_pending(state, state.dict)
    members = [member for member, _ in pending if member is not None]
    if relationship.direction is MANYTOONE:
        return [member for member in members if member.key is None]
    return members


def check_graph(states: Iterable[InstanceState[Any]], home: str) -> None:
    """Raise `WrongDatabaseError` if one of *states*, or what it refers to, belongs to another database."""
    for state in states:
        check_home(state, home)
        for relationship in state.mapper.relationships:
            target = state.dict.get(relationship.key)
            if relationship.direction is MANYTOONE and target is not None:
                check_home(state_of(target), home)


def check_parameter(parameter: BindParameter[Any], home: str) -> None:
    """Raise `WrongDatabaseError` if a parameter is the key of an object of another database.

    ``Post.author == user`` asks by the user's key, which in another database is the key of somebody else.
    """
    for cell in getattr(parameter.callable, "__closure__", None) or ():
        asked_by = cell.cell_contents
        if isinstance(asked_by, InstanceState) and _home(asked_by) is not None:
            check_home(asked_by, home)


def load_object(mapper: Mapper[Any], values: Iterable[tuple[str, Any]], home: str) -> Any:
    """Make the detached object that a session would make of these column values, loaded in *home*."""
    obj = mapper.class_manager.new_instance()
    state: InstanceState[Any] = instance_state(obj)
    loaded = state.dict
    loaded.update(values)
    state.key = mapper.identity_key_from_primary_key(tuple(loaded[name] for name in key_names(mapper)), home)
    state.identity_token = home
    return obj


def rehome(obj: T, home: str) -> T:
    """Copy the columns of *obj* into a new object that can be inserted into *home*, and nowhere else."""
    state = state_of(obj)
    copy: T = state.mapper.class_manager.new_instance()
    for prop in state.mapper.column_attrs:
        if is_written(prop.columns[0]) and (state.key is not None or prop.key in state.dict):
            setattr(copy, prop.key, _loaded(obj, prop.key))
    bound = state_of(copy)
    bound.identity_token = bound.info[_BOUND_FOR] = home
    return copy


def is_written(column: object) -> bool:
    """Whether a column takes values; what the server computes does not."""
    if not isinstance(column, Column):
        return False
    return column.computed is None and not (column.identity and column.identity.always)


def _loaded(obj: object, name: str) -> Any:
    try:
        return getattr(obj, name)
    except DetachedInstanceError:
        raise ValueError(f"cannot copy this {type(obj).__name__}: {name} is not loaded; load it whole") from None


class HomeSession(Session):
    """A session whose objects all have one home; anything of another database is refused on its way in."""

    def __init__(self, home: str, bind: Engine | Connection, **options: Any) -> None:
        # An option of the session, so that what is loaded along with a query's objects gets the token too.
        given = options.pop("execution_options", {})
        super().__init__(bind, execution_options={**given, "identity_token": home}, **options)
        self.home = home
        # Objects that got their token here, to lose it again should they become transient.
        self._stamped: weakref.WeakSet[InstanceState[Any]] = weakref.WeakSet()

    def prepared(self, statement: Select[Any]) -> Select[Any]:
        """*statement*, a verb's query, as it is to be run."""
        return statement


@event.listens_for(HomeSession, "before_attach")
def _take_in(session: HomeSession, instance: object) -> None:
    state = state_of(instance)
    check_home(state, session.home)
    if state.key is None and state.identity_token is None:
        state.identity_token = session.home
        session._stamped.add(state)


@event.listens_for(HomeSession, "persistent_to_transient")
@event.listens_for(HomeSession, "pending_to_transient")
def _let_go(session: HomeSession, instance: object) -> None:
    state = state_of(instance)
    if state in session._stamped:
        state.identity_token = None


class PreparedSession(HomeSession):
    """The session of a verb whose queries are rewritten, those by which relationships are loaded among them."""

    def __init__(self, prepare: Callable[[Any], Any], home: str, bind: Engine | Connection, **options: Any) -> None:
        super().__init__(home, bind, **options)
        self._prepare = prepare

    def prepared(self, statement: Select[Any]) -> Select[Any]:
        """*statement* as it is to be run."""
        prepared = self._prepare(statement)
        if not isinstance(prepared, Select):
            raise TypeError(f"prepare_query() must return the select() to run, and returned {prepared!r}")
        return prepared


@event.listens_for(PreparedSession, "do_orm_execute")
def _prepare_loads(execution: ORMExecuteState) -> None:
    session = execution.session
    if isinstance(session, PreparedSession) and execution.is_relationship_load:
        execution.statement = session.prepared(execution.statement)  # type: ignore[arg-type]  # it loads, so it selects


class RoutedSession(HomeSession):
    """A plain SQLAlchemy session, pinned for life to the database that was current when it was made.

    Every SQLAlchemy method works as documented. `get_bind` always yields this database's engine, or the
    connection of the transaction that was open when the session was made; whatever is chosen on the repo
    later makes no difference. Objects of another database are refused with `WrongDatabaseError` by `add`,
    `merge`, `delete` and the bulk methods, also when they come in by a relationship.

    Attributes:
        database: The database that the session belongs to.
        home: Its home, as ``server/name``.
    """

    def __init__(self, database: Database, bind: Engine | Connection, **options: Any) -> None:
        super().__init__(database.home, bind, **options)
        self.database = database

    def __repr__(self) -> str:
        return f"<RoutedSession {self.home}>"

    def get_bind(self, mapper: Any = None, *, bind: Any = None, **kwargs: Any) -> Engine | Connection:  # noqa: ARG002  # Session's
        """The engine or connection of this session's database; no other can be asked for."""
        own = self.bind
        assert own is not None
        if bind is not None and bind.engine is not own.engine:
            raise WrongDatabaseError(
                f"this session belongs to {self.home} for life, and was asked to use {bind.engine!r}",
                expected=self.home,
                found=None,
            )
        return own

    def get(self, entity: Any, ident: Any, **kwargs: Any) -> Any:
        """`Session.get`, with the home as identity token, so that a loaded object is found again."""
        kwargs.setdefault("identity_token", self.home)
        return super().get(entity, ident, **kwargs)

    def merge(self, instance: T, **kwargs: Any) -> T:
        """`Session.merge`; refuses an object of another database, and one that refers to such an object."""
        state = state_of(instance)
        check_graph([state, *(other for *_, other, _ in state.mapper.cascade_iterator("merge", state))], self.home)
        return super().merge(instance, **kwargs)

    def _merge(self, state: InstanceState[Any], *args: Any, **kwargs: Any) -> Any:
        # The way in of results that were frozen in another session, which take no other.
        check_home(state, self.home)
        return super()._merge(state, *args, **kwargs)

    def merge_all(self, instances: Iterable[T], **kwargs: Any) -> Sequence[T]:
        """`Session.merge_all`; refuses what `merge` refuses."""
        return [self.merge(instance, **kwargs) for instance in instances]

    def bulk_save_objects(self, objects: Iterable[object], *args: Any, **kwargs: Any) -> None:
        """`Session.bulk_save_objects`; refuses objects of another database."""
        objects = list(objects)
        for obj in objects:
            check_home(state_of(obj), self.home)
        super().bulk_save_objects(objects, *args, **kwargs)


@event.listens_for(RoutedSession, "before_flush")
def _check_all(session: RoutedSession, *_: object) -> None:
    # The last door: whatever way an object came in, a frozen result or a way not thought of here.
    for obj in (*session.new, *session.dirty, *session.deleted):
        check_home(state_of(obj), session.home)


class Snapshot:
    """Objects as they were before a verb touched them, to be put back if it fails.

    Values, collections, pending changes, identity and home: all of it, because a failed flush leaves generated
    keys and defaults behind on objects that were never stored, and setting one end of a relationship has
    changed the other.
    """

    def __init__(self, states: Iterable[InstanceState[Any]]) -> None:
        self._saved = [(state, _Saved.of(state)) for state in states]

    def restore(self) -> None:
        """Put everything back. The session must have let go of the objects before."""
        for state, saved in self._saved:
            saved.put_back(state)


@dataclass(frozen=True, slots=True)
class _Saved:
    """One object's part of a snapshot."""

    attributes: dict[str, Any]
    values: dict[str, Any]
    items: dict[str, list[Any]]
    committed: dict[str, Any]
    expired: set[str]

    @classmethod
    def of(cls, state: InstanceState[Any]) -> _Saved:
        collections = {name: value for name, value in state.dict.items() if hasattr(value, "_sa_adapter")}
        return cls(
            attributes=_copied(state.__dict__),
            values=dict(state.dict),
            items={name: list(collection_adapter(value)) for name, value in collections.items()},
            committed=dict(state.committed_state),
            expired=set(state.expired_attributes),
        )

    def put_back(self, state: InstanceState[Any]) -> None:
        state.dict.clear()
        state.dict.update(self.values)
        for name, items in self.items.items():
            adapter = self.values[name]._sa_adapter
            # A collection that was replaced has lost its adapter, and can only be made again.
            if adapter is None or list(adapter) != items:
                set_committed_value(state.obj(), name, items)
        state.__dict__.clear()
        state.__dict__.update(self.attributes)
        state.committed_state = self.committed
        state.expired_attributes = self.expired


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    # Two levels: what relates a state to others is kept in dictionaries of its own.
    return {name: dict(value) if type(value) is dict else value for name, value in attributes.items()}


def write_by_key(state: InstanceState[Any]) -> Callable[[], None]:
    """Turn references to stored objects into foreign key values, so that those are not attached.

    One stored parent may then serve many threads at once. Returns what puts the references back, as
    loaded, after a flush that succeeded.
    """
    taken: dict[Any, object] = {}
    for relationship in state.mapper.relationships:
        name = relationship.key
        if relationship.direction is not MANYTOONE or relationship.viewonly or name not in state.dict:
            continue
        target = state.dict[name]
        if target is not None and state_of(target).key is None:
            continue
        if name in state.committed_state or (state.key is None and target is not None):
            for local, remote in relationship.local_remote_pairs:
                value = None if target is None else _value_of(target, remote)
                setattr(state.obj(), state.mapper.get_property_by_column(local).key, value)
        taken[relationship] = state.dict.pop(name)
        state.committed_state.pop(name, None)

    def put_back() -> None:
        for relationship, target in taken.items():
            state.dict[relationship.key] = target
            if target is not None:
                _forget_pending(state, relationship, state_of(target))

    return put_back


def _forget_pending(state: InstanceState[Any], relationship: Any, target: InstanceState[Any]) -> None:
    """Take *state* out of what its stored parent would still have to add to a collection that it has not
    loaded: it is written by key, and a parent that serves for long would collect them all."""
    waiting = target.__dict__.get("_pending_mutations", {})
    for reverse in relationship._reverse_property:
        if (pending := waiting.get(reverse.key)) is not None:
            pending.added_items.discard(state.obj())
            if not pending.added_items and not pending.deleted_items:
                waiting.pop(reverse.key, None)
                target.committed_state.pop(reverse.key, None)


def _value_of(obj: object, column: Any) -> Any:
    mapper = state_of(obj).mapper
    return getattr(obj, mapper.get_property_by_column(column).key)
