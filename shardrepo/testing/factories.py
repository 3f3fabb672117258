# mypy: allow-untyped-calls
# factory_boy annotates what its users call, and little of what is to be overridden.
"""Factories of factory_boy that write through a repo, into the database that is current when they are called.

Leans on how factory_boy makes an object, which it does not document: on `StepBuilder`, and `instantiate` of a factory's
options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, Unpack

from factory import base, declarations
from factory.builder import StepBuilder, parse_declarations
from factory.enums import CREATE_STRATEGY
from factory.faker import Faker
from factory.fuzzy import BaseFuzzyAttribute
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.orm import InstanceState
from sqlalchemy.orm.base import DEFAULT_STATE_ATTR

from ..database import Chosen, Database, Options
from ..errors import ConfigError, ConstraintError, sqlstate_of
from ..repo import Repo
from ..session import MANYTOONE, check_home, mapper_of, state_of
from .batch import insert_objects

T = TypeVar("T")

if TYPE_CHECKING:
    from factory.base import Factory
else:

    class Factory(base.Factory, Generic[T]):
        """factory_boy's, of which the first 3.3 is not generic."""


class RepoOptions(base.FactoryOptions):
    """What the ``class Meta`` of a `RepoFactory` says."""

    repo: type[Repo] | None
    get_or_create: Sequence[str]

    def _build_default_options(self) -> list[base.OptionDefault]:
        return [
            *super()._build_default_options(),
            base.OptionDefault("repo", None, inherit=True, checker=_check_repo),
            base.OptionDefault("get_or_create", (), inherit=True, checker=_check_names),
        ]

    def _fill_from_meta(self, meta: Any, base_meta: Any) -> None:
        for name in vars(meta or object):
            if name.startswith("sqlalchemy_"):
                instead = "get_or_create" if name == "sqlalchemy_get_or_create" else "repo"
                raise ConfigError(f"Meta.{name} is of factory_boy's own factories for SQLAlchemy: say {instead} here")
        super()._fill_from_meta(meta, base_meta)

    @property
    def name(self) -> str:
        """How the factory is called in messages."""
        return getattr(self.factory, "__name__", "")

    @property
    def used_repo(self) -> type[Repo]:
        """The repo; `ConfigError` where none is said."""
        if self.repo is None:
            raise ConfigError(f"{self.name} has no repo to write with: say repo = MyRepo in its Meta, or build()")
        return self.repo

    def check_model(self) -> None:
        """Raise `ConfigError` unless the model is a mapped class."""
        try:
            mapper_of(self.model)
        except TypeError:
            raise ConfigError(
                f"{self.name} is to make {self.model!r}, which is no mapped class and cannot be inserted: name one as "
                "Meta.model, or derive the factory from factory.Factory"
            ) from None

    def instantiate(self, step: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if step.builder.strategy != CREATE_STRATEGY:
            return super().instantiate(step, args, kwargs)
        graph = _Graph.of_step(step, self)
        with graph.writing(self):
            graph.check_homes(step.attributes.values())
            if getattr(step.builder, "is_held_back", False):
                return self.get_model_class()(*args, **kwargs)
            return super().instantiate(step, args, kwargs)


def _check_repo(_meta: object, repo: object) -> None:
    if repo is not None and not (isinstance(repo, type) and issubclass(repo, Repo)):
        raise ConfigError(f"Meta.repo is {repo!r}, which is no subclass of Repo: say repo = MyRepo")


def _check_names(_meta: object, names: object) -> None:
    if not isinstance(names, tuple | list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"Meta.get_or_create is {names!r}: give a tuple of attributes, such as ('email',)")


class RepoFactory(Factory[T]):
    """A factory of factory_boy whose objects are inserted by a repo.

        >>> class UserFactory(RepoFactory[User]):                                   # doctest: +SKIP
        ...     class Meta:
        ...         model = User
        ...         repo = MyRepo
        ...     name = factory.Sequence(lambda n: f"user {n}")
        >>> UserFactory.create()                                                    # doctest: +SKIP
        >>> UserFactory.on("shard02").create_batch(100)                             # doctest: +SKIP

    `create` inserts into the database that is current when it is called, and returns what `Repo.insert` does: a
    detached object that remembers its home. `build` and `stub` send nothing. A factory keeps no session and no
    database from one call to the next.

    What one call makes by its declarations (`SubFactory`, `RelatedFactory`, …) goes into that one database, whatever
    hooks and lazy attributes choose meanwhile, which is undone at the end. What those create by calls of their own
    goes where they have chosen to. If there may be more than one object, or a hook, all of it is one
    `Repo.transaction`: committed or rolled back as a whole, or part of the caller's, which an error dooms. What hooks
    change of the object is written after the last of them.

    `create_batch` makes all objects, of which only those of sub-factories are inserted one by one, then inserts them
    with `Repo.insert_all`, all or none. Where that would be something else than to insert each, it does that, in one
    transaction: for a model of several tables, one whose inserts somebody listens to or that refers to new objects;
    and after each, what is declared to follow its insert, or is overridden.

    ``Meta`` takes, beside what factory_boy's does, both inherited:

    - ``repo``: the repo class.
    - ``get_or_create``: column attributes by which a row is looked for with `Repo.get_by`, and taken as it is if there
      is one; if somebody else inserts it at the same moment and a constraint refuses ours, theirs is taken.

    Raises:
        ConfigError: No repo is said, the model is not mapped, or a sub-factory writes through a repo of another config.
        NoDatabaseError: Nothing is chosen, and there is no default to use.
        WrongDatabaseError: An object that was passed belongs to another database. Nothing is kept.
    """

    _options_class = RepoOptions
    _meta: RepoOptions
    Meta: Any  # so that a type checker takes that of a subclass, which derives from none

    @classmethod
    def on(cls, choice: Chosen = ..., /, **options: Unpack[Options]) -> BoundFactory[T]:  # type: ignore[assignment]  # ... is "not given"
        """This factory for one database, which is chosen for each call. Takes what `Repo.using` takes; does no I/O.

        Raises:
            ConfigError: The arguments name no database, or the factory has no repo.
        """
        using = partial(cls._meta.used_repo.using, choice, **options)
        using()
        return BoundFactory(cls, using)

    @classmethod
    def create_batch(cls, size: int, **attributes: Any) -> list[T]:
        """Create *size* objects, all or none, with one INSERT where that gives the same; in their order."""
        if cls._meta.abstract:
            return super().create_batch(size, **attributes)
        graph = _Graph.of(cls._meta)
        builders = [_Builder(cls._meta, dict(attributes), graph, is_held_back=True) for _ in range(size)]
        if not cls._ends_with_insert(builders):
            return graph.run(partial(super().create_batch, size, **attributes), together=size > 1)

        def create() -> list[T]:
            with _forgotten_unless_stored() as objects:
                for builder in builders:
                    objects.append(builder.build())
                with graph.writing(cls._meta):
                    insert_objects(cls._meta.used_repo, objects)
            return objects

        return graph.run(create, together=any(builder.has_parts for builder in builders[:1]))

    @classmethod
    def _ends_with_insert(cls, builders: Sequence[_Builder]) -> bool:
        """Whether a plain insert is the last thing that is done for each object."""
        return not (cls._is_overridden() or cls._meta.get_or_create or any(builder.post for builder in builders[:1]))

    @classmethod
    def _is_overridden(cls) -> bool:
        return any(_function(cls, name) is not _function(RepoFactory, name) for name in _STEPS)

    @classmethod
    def _generate(cls, strategy: str, params: dict[str, Any]) -> Any:
        if cls._meta.abstract or strategy != CREATE_STRATEGY:
            return super()._generate(strategy, params)
        graph = _Graph.of(cls._meta)
        builder = _Builder(cls._meta, params, graph)
        return graph.run(builder.build, together=builder.has_parts or bool(builder.post) or cls._is_overridden())

    @classmethod
    def _create(cls, model_class: type[T], *args: Any, **kwargs: Any) -> T:
        # Not by ON CONFLICT: it needs a constraint on just these columns, one table and no mapper events.
        repo = cls._meta.used_repo
        wanted = {name: cls._given(name, kwargs) for name in cls._meta.get_or_create}
        found = repo.get_by(model_class, **wanted) if wanted else None
        if found is not None:
            return found
        try:
            with repo.savepoint() if wanted and repo.in_transaction() else nullcontext():
                return cls._insert(model_class(*args, **kwargs))
        except ConstraintError:
            found = repo.get_by(model_class, **wanted) if wanted else None
            if found is None:
                raise
            return found

    @classmethod
    def _insert(cls, obj: T) -> T:
        with _forgotten_unless_stored() as objects:
            objects.append(obj)
            return cls._meta.used_repo.insert(obj)

    @classmethod
    def _given(cls, name: str, kwargs: Mapping[str, Any]) -> Any:
        if name not in kwargs:
            raise ConfigError(
                f"{cls.__name__} has no value for {name!r} of its Meta.get_or_create: declare or pass one"
            )
        return kwargs[name]

    @classmethod
    def _after_postgeneration(cls, instance: Any, create: bool, results: Mapping[str, Any] | None = None) -> None:
        # What a session would write at its end.
        if create and results and state_of(instance).modified:
            cls._meta.used_repo.update(instance)


# What of a factory may be overridden to do more than insert.
_STEPS: Final = ("create", "_generate", "_create", "_after_postgeneration")


def _function(cls: type, name: str) -> object:
    return getattr(getattr(cls, name), "__func__", None)


class BoundFactory(Generic[T]):
    """A factory for one database, made by `RepoFactory.on`: its methods, with that chosen while they run."""

    def __init__(self, factory: type[RepoFactory[T]], using: Callable[[], AbstractContextManager[None]]) -> None:
        self._factory = factory
        self._using = using

    def __call__(self, **attributes: Any) -> T:
        """Do what the factory's ``Meta.strategy`` says: `create`, unless it says otherwise."""
        made: Any
        with self._using():
            made = self._factory(**attributes)
        return made  # type: ignore[no-any-return]  # its metaclass makes of the call what it is

    def create(self, **attributes: Any) -> T:
        with self._using():
            return self._factory.create(**attributes)

    def create_batch(self, size: int, **attributes: Any) -> list[T]:
        with self._using():
            return self._factory.create_batch(size, **attributes)

    def build(self, **attributes: Any) -> T:
        with self._using():
            return self._factory.build(**attributes)

    def build_batch(self, size: int, **attributes: Any) -> list[T]:
        with self._using():
            return self._factory.build_batch(size, **attributes)


@dataclass(frozen=True, slots=True)
class _Graph:
    """The objects that one call makes, all of one home.

    Attributes:
        root: What the factory that was called says.
        database: Where they are stored.
    """

    root: RepoOptions
    database: Database

    @classmethod
    def of(cls, root: RepoOptions) -> _Graph:
        """Begin one, in the database that is current."""
        root.check_model()
        return cls(root, root.used_repo.get_database())

    @classmethod
    def of_step(cls, step: Any, meta: RepoOptions) -> _Graph:
        """That which a step belongs to, or one of its own in a factory that is none of ours."""
        graph: _Graph | None = getattr(step.builder, "graph", None)
        return graph or cls.of(meta)

    def run(self, function: Callable[[], T], *, together: bool) -> T:
        """Make the objects: all or none of them, if *together*."""
        repo = self.root.used_repo
        with repo.using(self.database):
            return repo.transact(function) if together else function()

    @contextmanager
    def writing(self, meta: RepoOptions) -> Iterator[None]:
        """Write for the factory of *meta* in the block: into this database, whatever has been chosen meanwhile."""
        meta.check_model()
        self._check_repo(meta)
        with meta.used_repo.using(self.database):
            try:
                yield
            except ProgrammingError as error:
                if sqlstate_of(error) == _UNDEFINED_TABLE:
                    error.add_note(
                        f"{meta.name} writes {meta.model.__name__}, whose table is not there: migrate this database, "
                        f"choose the one that has it with {meta.name}.on(...), or name the model that is stored here"
                    )
                raise

    def _check_repo(self, meta: RepoOptions) -> None:
        one, other = self.root.used_repo, meta.used_repo
        if one._router.databases is not other._router.databases:
            raise ConfigError(
                f"{meta.name} writes through {other.__name__} and is used by {self.root.name}, which writes through "
                f"{one.__name__}: repos of two configs have no database in common. Use one, or pass a key in place of "
                "the object"
            )

    def check_homes(self, values: Iterator[Any]) -> None:
        """Raise `WrongDatabaseError` if one of *values* is an object of another database, for whatever it is used."""
        for value in values:
            state = getattr(value, DEFAULT_STATE_ATTR, None)
            if isinstance(state, InstanceState):
                check_home(state, self.database.home)


# The server's name for a table that is not there (https://www.postgresql.org/docs/current/errcodes-appendix.html).
_UNDEFINED_TABLE: Final = "42P01"


class _Builder(StepBuilder):
    """What makes an object of a graph.

    Attributes:
        graph: The graph.
        is_held_back: Whether it is not to be inserted yet.
    """

    def __init__(self, factory_meta: Any, extras: dict[str, Any], graph: _Graph, *, is_held_back: bool = False) -> None:
        super().__init__(factory_meta, extras, CREATE_STRATEGY)
        self.graph = graph
        self.is_held_back = is_held_back

    def recurse(self, factory_meta: Any, extras: dict[str, Any]) -> _Builder:
        return _Builder(factory_meta, extras, self.graph)

    @property
    def has_parts(self) -> bool:
        """Whether other factories may be called to make it."""
        return not all(_is_plain(value) for value in self._declared[0].declarations.values())

    @property
    def post(self) -> Sequence[str]:
        """What is declared to follow."""
        return list(self._declared[1])

    @property
    def _declared(self) -> tuple[Any, Any]:
        meta = self.factory_meta
        declared: tuple[Any, Any] = parse_declarations(
            self.extras, base_pre=meta.pre_declarations, base_post=meta.post_declarations
        )
        return declared


_PLAIN: Final = (
    Faker, BaseFuzzyAttribute, declarations.ContainerAttribute, declarations.Iterator, declarations.LazyAttribute,
    declarations.LazyFunction, declarations.SelfAttribute, declarations.Sequence,
)  # fmt: skip


def _is_plain(value: Any) -> bool:
    """Whether what is declared as *value* provably calls no other factory."""
    if isinstance(value, declarations.Maybe):
        return all(map(_is_plain, (value.decider, value.yes, value.no)))
    if isinstance(value, declarations.Transformer):
        return _is_plain(value.default)
    return isinstance(value, _PLAIN) or not isinstance(value, declarations.BaseDeclaration)


@contextmanager
def _forgotten_unless_stored() -> Iterator[list[Any]]:
    """Take new objects; if the block fails, what they refer to forgets them, which would be written with it else."""
    objects: list[Any] = []
    try:
        yield objects
    except BaseException:
        for obj in objects:
            if state_of(obj).key is None:
                _let_go(obj)
        raise


def _let_go(obj: object) -> None:
    state = state_of(obj)
    for relationship in state.mapper.relationships:
        if relationship.direction is MANYTOONE and state.dict.get(relationship.key) is not None:
            setattr(obj, relationship.key, None)
