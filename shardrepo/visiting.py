"""The verbs of many databases: each runs in all of them, on a connection of its own to each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias, TypeVar, cast, overload

from sqlalchemy import Executable, Select
from sqlalchemy.engine import Result

from . import reading
from .across import Outcome, Outcomes, Target, checked_per_server, fan_out
from .calls import checked_seconds
from .context import check_plain
from .database import Choice, Chosen, choose, several
from .directory import Location
from .errors import ConfigError, ListingError, note_database
from .router import Router

T = TypeVar("T")

Visited: TypeAlias = "Chosen | Location"

_ALL: Final = "or give nothing for all that the directory lists"


class Across:
    """What `Repo.across` returns: verbs that run in many databases, and give an `Outcome` for each.

    A verb asks the directory where the databases are, and does nothing else until its outcomes are iterated over or
    collected. They come in the order in which the databases are ready; those that cannot be located come first. Each
    is visited in a thread, on a connection that is opened for it and closed afterwards: cached connections are
    neither used nor closed for it, unless a hard bound leaves no room. `call_options` and context variables are those
    of where the verb was called, but no transaction is open.
    """

    def __init__(
        self, router: Router, databases: Iterable[Visited] | None, *, per_server: int, timeout: float | None
    ) -> None:
        checked_per_server(per_server)
        self._per_server = per_server
        self._timeout = checked_seconds("timeout", optional=True)(timeout)
        self._router = router
        self._given = None if databases is None else [_checked(each) for each in several(databases, "across()", _ALL)]
        if databases is None and router.databases.whereabouts is None:
            raise ConfigError(
                "across() visits all databases that the directory lists, and this repo has none: name them, as in "
                'across(["shard01", "shard02"]), or give a directory in the config'
            )

    @overload
    def all(self, query: type[T], options: reading.Options = ()) -> Outcomes[list[T]]: ...
    @overload
    def all(self, query: Select[T], options: reading.Options = ()) -> Outcomes[list[T]]: ...
    @overload
    def all(self, query: Select[*tuple[Any, ...]], options: reading.Options = ()) -> Outcomes[list[Any]]: ...
    def all(self, query: Any, options: reading.Options = ()) -> Any:
        """`Repo.all` in each: lists of detached objects, at home where they were found."""
        loaded = tuple(options)
        return self.map(lambda: self._router.read(reading.all_, query, loaded))

    def count(self, query: type[Any] | Select[*tuple[Any, ...]]) -> Outcomes[int]:
        """`Repo.count` in each."""
        return self.map(lambda: self._router.read(reading.count, query))

    def execute(self, statement: Executable | str, parameters: Any = None) -> Outcomes[Result[Any]]:
        """`Repo.execute` in each, the statement committed by itself. Nothing runs unless outcomes are asked for."""
        return self.map(lambda: self._router.run(reading.execute, statement, parameters))

    def map(self, function: Callable[[], T]) -> Outcomes[T]:
        """Call *function*, in several threads at a time, with each database chosen in turn; its verbs run there.

            >>> def purge():                                                        # doctest: +SKIP
            ...     with MyRepo.transaction():
            ...         return MyRepo.delete_all(expired).count
            >>> MyRepo.across(per_server=2, timeout=60.0).map(purge).collect()      # doctest: +SKIP
            {'shard001': 3, 'shard002': 0}

        They, and its transactions, are on one connection, as in a `Repo.connection` block; what it does on other
        databases, or `detached`, is on the cache's.

        Raises:
            TypeError: It is async or a generator, and would run after the visit.
        """
        check_plain(function, "map()", "do all of its work before it returns")

        def work(target: Target) -> T:
            with self._router.visit(target.database, self._timeout):
                return function()

        return fan_out(self._targets(), work, per_server=self._per_server)

    def _targets(self) -> list[Target | Outcome[Any]]:
        """The databases, each once; what cannot be located is an outcome already."""
        found: dict[str, Target | Outcome[Any]] = {}
        unlisted: list[Outcome[Any]] = []
        for given in self._listed(unlisted) if self._given is None else self._given:
            target = self._located(given)
            before = found.setdefault(target.name, target)
            if isinstance(before, Target) and isinstance(target, Target) and before != target:
                raise ConfigError(
                    f"{target.name!r} is named twice, as {before.database!r} and as {target.database!r}: their "
                    "outcomes could not be told apart"
                )
        return [*unlisted, *found.values()]

    def _listed(self, unlisted: list[Outcome[Any]]) -> Sequence[Location]:
        """What the directory lists; a server that does not say what it has is an outcome, called by its address."""
        try:
            return self._router.databases.listed()
        except ListingError as error:
            unlisted += [Outcome(server, None, 0.0, error=failure) for server, failure in error.failures.items()]
            return error.found

    def _located(self, given: Choice | Location | None) -> Target | Outcome[Any]:
        name = given.name if isinstance(given, Location) else given.bare_name if given is not None else None
        try:
            database = self._router.databases.locate(given)
        except Exception as error:
            name = name or repr(given)
            note_database(error, name)
            return Outcome(name, None, 0.0, error=error)
        return Target(name or database.home, database)


def _checked(given: Any) -> Choice | Location | None:
    return given if isinstance(given, Location) else choose(cast("Chosen", given), {})
