"""The databases of a config: which one a choice means, who has chosen what, and the connections to all of them.

`Databases.resolve` turns a choice into a `Database`, and nothing else does. Repo classes that share a config share
this.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.util import memoized_property  # functools' own locks before Python 3.12, which no fork survives

from .config import Config, ConfigSource, checked_flag
from .context import Context
from .database import Choice, Chosen, Database, choose, several
from .directory import Directory, Location, Whereabouts
from .errors import ConfigError, ListingError, NoDatabaseError, WrongDatabaseError
from .listeners import Listeners
from .pool import autocommit, vouch
from .sandbox import Sandbox, Sandboxes

if TYPE_CHECKING:
    from .engines import ConnectionCache

# Choices whose database is remembered; making one again takes a few microseconds.
MAX_RESOLVED: Final = 1024


class Databases:
    """What stands behind the repo classes of one config.

    Args:
        name: How the repo is called in messages.
        source: The config; a callable is called when a database is first needed.
        configure: Called with each engine that is made, and its database.
        directory: What the repo's class says of where databases are; the config's counts if it says nothing.
    """

    def __init__(
        self,
        name: str,
        source: ConfigSource,
        configure: Callable[[Engine, Database], object],
        directory: Directory | None = None,
    ) -> None:
        self.context = context = Context(name)
        self.listeners = Listeners(lambda: context.tags)
        self._source = source
        self._configure = configure
        self._directory = directory
        # Guards the making of config and cache, which happens once, and what follows.
        self._lock = threading.RLock()
        # What choices mean; of those that the directory has found, by its answer too, which is kept with it so that no
        # other can take its place in memory.
        self._resolved: dict[Choice | None, Database] = {}
        self._found: dict[tuple[Choice, int], tuple[Location, Database]] = {}
        # By which choice each home was found, and at what address, by who connects to it and how. A choice, as a
        # database may have moved.
        self._met: dict[str, dict[object, tuple[Choice | None, Database]]] = {}
        _all.add(self)
        if not callable(source):
            self.config  # noqa: B018  # a wrong config fails where it is written

    @memoized_property
    def config(self) -> Config:
        with self._lock:
            made: Config | None = self.__dict__.get("config")
            return made or Config.of(self._source)

    @memoized_property
    def cache(self) -> ConnectionCache:
        from .engines import ConnectionCache  # here, so that `import shardrepo` loads no driver

        with self._lock:
            made: ConnectionCache | None = self.__dict__.get("cache")
            if made is None:
                made = self.__dict__["cache"] = ConnectionCache(self.config, self.listeners, self._configure)
            return made

    @memoized_property
    def sandboxes(self) -> Sandboxes:
        with self._lock:
            made: Sandboxes | None = self.__dict__.get("sandboxes")
            return made or Sandboxes(self.context, self.cache.lending, self.cache.ledger, self._forget_all)

    def sandbox(self, databases: Iterable[Chosen] | None, *, shared: bool, check_deferred: bool) -> Sandbox:
        """A sandbox, which begins when it is entered; over *databases*, if they are given."""
        remedy = "or give nothing for all that are used"
        named = None if databases is None else several(databases, "sandbox()", remedy)
        return Sandbox(
            self.sandboxes,
            self.resolve,
            self.config.maintenance_database,
            addresses=None if named is None else frozenset(self.resolve(choose(each, {})).address for each in named),
            shared=checked_flag("shared")(shared),
            check_deferred=checked_flag("check_deferred")(check_deferred),
        )

    def check_undoable(self, operation: str) -> None:
        """Raise `SandboxError` if the caller is in a sandbox, which could not undo *operation*."""
        if "sandboxes" in self.__dict__:
            self.sandboxes.check_undoable(operation)

    def admit(self, database: Database) -> None:
        """Have *database* be in the caller's sandbox, if there is one; raise `SandboxError` if it may not be."""
        if "sandboxes" in self.__dict__:
            self.sandboxes.admit(database)

    @property
    def directory(self) -> Directory | None:
        """What is asked where a database is; None where nobody is."""
        return self._directory or self.config.directory

    @memoized_property
    def whereabouts(self) -> Whereabouts | None:
        """What the directory has said; None without one."""
        with self._lock:
            directory = self.directory
            made: Whereabouts | None = self.__dict__.get("whereabouts")
            if made is None and directory is not None:
                made = self.__dict__["whereabouts"] = Whereabouts(
                    directory, self._connect, self._apart, self.config.directory_ttl
                )
            return made

    @contextmanager
    def _apart(self) -> Iterator[None]:
        """With nothing chosen and nothing open: the directory may ask by way of this repo."""
        with self.context.using(None), self.context.detached():
            yield

    @contextmanager
    def _connect(self, options: Mapping[str, Any]) -> Iterator[Connection]:
        """A connection of its own for a question of the directory's, to what *options*, which are checked, name."""
        given = {"database": self.config.maintenance_database, **options} if "host" in options else options
        database = self.config.locate(Choice(tuple(sorted(given.items()))))
        with self.cache.transient(database) as connection:
            vouch(connection)
            autocommit(connection)
            yield connection

    def resolve(self, choice: Choice | None) -> Database:
        """Turn a choice into the database it means, the same one every time."""
        return self._resolved.get(choice) or self._remember(choice)

    def _remember(self, choice: Choice | None) -> Database:
        if choice is not None and choice.bare_name is not None and self.whereabouts is not None:
            return self._located(choice, self.whereabouts.find(choice.bare_name))
        database = self.config.locate(choice)
        with self._lock:
            self._meet(choice, database, database.query)
            return self._resolved.setdefault(choice, database)

    def _located(self, choice: Choice, location: Location) -> Database:
        """The database of a choice that the directory has found: the same one as long as it says the same."""
        key = choice, id(location)
        found = self._found.get(key)
        if found is None:
            database = self.config.locate(choice, location)
            with self._lock:
                # Not the database's own query: its state, which may change, has put something into that.
                self._meet(choice, database, dict(choice.options).get("query"))
                found = self._found.setdefault(key, (location, database))
        return found[1]

    def _meet(self, choice: Choice | None, database: Database, query: object) -> None:
        """Note by which choice a home is found; with the lock held, before what the choice means is remembered."""
        if len(self._resolved) + len(self._found) >= MAX_RESOLVED:
            # All at once, so that what is found in one of them has been met since.
            self._resolved.clear()
            self._found.clear()
            self._met.clear()
        met = self._met.setdefault(database.home, {})
        complete = choice is not None and choice.database is not None
        if not complete or all(known.key != database.key for _, known in met.values()):
            # A password that has changed is the same user's. An address that a name has led to is met by its name.
            met[database.username, query] = choice, database

    def locate(self, given: Choice | Location | None) -> Database:
        """The database of a choice, or of what the directory has listed."""
        if isinstance(given, Location):
            return self._located(Choice((("database", given.name),)), given)
        return self.resolve(given)

    @property
    def current(self) -> Database:
        """The database that a verb would use now."""
        choice = self.context.choice
        return self._resolved.get(choice) or self._remember(choice)

    def named(self, given: Chosen, options: Mapping[str, Any]) -> Database:
        """The database that *given* or *options* mean, the current one if there are neither."""
        return self.current if given is None and not options else self.resolve(choose(given, options))

    def singled_out(self, given: Chosen, options: Mapping[str, Any]) -> Database:
        """The database that *given* or *options* mean, by a name of their own: never the current or default one."""
        choice = choose(given, options)
        if choice is None or not choice.names_database:
            raise ConfigError(
                "no database is named, and none is made, dropped, renamed or looked up unless it is: pass its name, or "
                "options with a database among them"
            )
        return self.resolve(choice)

    def listed(self) -> list[Location]:
        """All databases that the directory knows; a server's template is none that anybody works in."""
        if self.whereabouts is None:
            raise ConfigError("this repo has no directory that could list its databases: give one in its config")
        template = self.config.template_database
        try:
            return [each for each in self.whereabouts.list_databases() if each.name != template]
        except ListingError as error:
            error.found = tuple(each for each in error.found if each.name != template)
            raise

    def location(self, name: str) -> Location:
        """What the directory says of *name* now; on the default's server without one."""
        return Location(name) if self.whereabouts is None else self.whereabouts.find(name)

    def forget(self, name: str) -> None:
        """Ask the directory anew about *name*: it has been made or dropped."""
        if self.whereabouts is not None:
            self.whereabouts.forget(name)

    def _forget_all(self) -> None:
        """Ask the directory anew about everything: it may have read what is gone since."""
        if self.whereabouts is not None:
            self.whereabouts.forget_all()

    def tended(self, location: Location) -> Database:
        """The database at *location* for those who look after it: no state keeps them out, or from writing."""
        return self.config.locate(choose(location.name, {}), replace(location, state="active"))

    def at(self, home: str) -> Database:
        """The database that *home* means: the current one, else the one that was chosen there before.

        No credentials travel to a server for which they were not chosen, and no user stands in for another.
        """
        with suppress(NoDatabaseError):
            if self.current.home == home:
                return self.current
        with self._lock:
            met = [choice for choice, _ in self._met.get(home, {}).values()]
        if len(met) == 1 and (database := self.resolve(met[0])).home == home:
            return database
        why = ("nobody has chosen it", "what was chosen there means another now", "several users have chosen it")
        raise WrongDatabaseError(
            f"{home} is not the current database, and {why[min(len(met), 2)]} before, or only long ago: "
            "choose it with using(...)",
            expected=home,
            found=None,
        )

    def set_database(self, choice: Choice | None) -> Choice | None:
        """Choose, unless the caller has a transaction open on the current database."""
        if self.context.is_holding:
            self._check_switch(choice)
        return self.context.choose(choice)

    def _check_switch(self, choice: Choice | None) -> None:
        try:
            current = self.current
        except NoDatabaseError:
            return
        transaction = self.context.transaction(current)
        if transaction is None or not transaction.owner.is_current:
            return
        wanted = self.resolve(choice)
        if wanted.key != current.key:
            raise WrongDatabaseError(
                f"cannot switch to {wanted.home}: a transaction is open on {current.home}. Leave its block first, "
                "or use `with repo.using(...)` for an independent unit of work",
                expected=current.home,
                found=wanted.home,
            )


_all: Final[weakref.WeakSet[Databases]] = weakref.WeakSet()


def _after_fork() -> None:
    # Another thread of the parent's may have been in the middle of it.
    for databases in list(_all):
        databases._lock = threading.RLock()
        if (whereabouts := databases.__dict__.get("whereabouts")) is not None:
            whereabouts.start_empty()


os.register_at_fork(after_in_child=_after_fork)
