"""What knows where a database lives, and which there are.

A directory is asked for a database by the name that was chosen, and says where it is. `Static`, `Servers` and `Table`
are ready-made; a function of a name, sync or async, is one too, and so are the hooks `Repo.locate` and
`Repo.list_databases`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from time import monotonic
from types import MappingProxyType
from typing import Any, Final, Protocol, Self, TypeAlias, cast, get_args

from sqlalchemy import Select, select, text
from sqlalchemy.engine import Connection

from .database import DEFAULT_PORT, State, checked, checked_name
from .errors import ConfigError, ListingError, UnknownDatabaseError, unknown

logger: Final = logging.getLogger("shardrepo.directory")

Connect: TypeAlias = "Callable[[Mapping[str, Any]], AbstractContextManager[Connection]]"
Answer: TypeAlias = "Location | Mapping[str, Any] | str | None"

# Seconds for which an answer that there is no such database is believed at most: new ones are made while we run.
MAX_NEGATIVE_TTL: Final = 5.0

# Seconds after which a directory that has failed is asked again about a name that it knew.
RETRY: Final = 1.0

# Names whose answers are remembered.
MAX_KNOWN: Final = 10_000

# Not those that nobody is to meet by chance, or to which nobody can connect.
_NAMES: Final = text(
    "SELECT datname FROM pg_catalog.pg_database WHERE datallowconn AND NOT datistemplate "
    "AND datname <> current_database() AND datname LIKE :like AND datname = coalesce(:name, datname)"
)


@dataclass(frozen=True, slots=True)
class Location:
    """Where a database is, and what else is known of it.

    Attributes:
        name: The name by which it is chosen.
        options: Of its address, what differs from the repo's default: host, port, username, password, query, and
            database where it has another name on its server.
        state: "active"; "read_only", where verbs that write are refused and the server is told too; "suspended" or
            "migrating", where it is not connected to.
        tags: What it is selected by.
        id: What its objects have for a home in place of ``server/name``, so that they keep it when it moves.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    state: State = "active"
    tags: frozenset[str] = frozenset()
    id: str | None = None

    @classmethod
    def of(cls, name: str, answer: Answer) -> Self | Location:
        """Read what a directory has said of *name*: a host, or a mapping of options and facts.

        Raises:
            ConfigError: It is none of these, or says something impossible.
        """
        if isinstance(answer, Location):
            return answer
        given = {"host": answer} if isinstance(answer, str) else answer
        if not isinstance(given, Mapping):
            raise ConfigError(f"a directory says where {name!r} is by a mapping of options, not by {answer!r}")
        facts = {key: value for key, value in given.items() if key in ("state", "tags", "id") and value is not None}
        options = {key: value for key, value in given.items() if key not in ("name", "state", "tags", "id")}
        present = {key: value for key, value in options.items() if value is not None}
        state = facts.get("state", "active")
        if state not in get_args(State):
            raise ConfigError(f"the directory says of {name!r}: {unknown('state', str(state), get_args(State))}")
        tags = facts.get("tags", ())
        return cls(
            name=checked_name("database", name),
            options=MappingProxyType(dict(checked(present)) if present else {}),
            state=cast("State", state),
            tags=frozenset(tags.replace(",", " ").split() if isinstance(tags, str) else tags),
            id=facts.get("id"),
        )


class Directory(Protocol):
    """What a repo asks where a database is."""

    def locate(self, name: str, connect: Connect) -> Location | None:
        """Where *name* is; None if there is no such database. May use *connect* to ask a database."""
        ...

    def list_databases(self, connect: Connect) -> Iterable[Location]:
        """All databases that there are."""
        ...


class Static:
    """A directory that is written down.

        >>> Static({"shard001": "db01", "shard201": {"host": "db02", "tags": "canary"}}).names
        ['shard001', 'shard201']

    Args:
        locations: By name: a host, or a mapping of options of the address, and `state`, `tags` or `id`.
    """

    def __init__(self, locations: Mapping[str, Answer]) -> None:
        self._locations = {name: Location.of(name, answer) for name, answer in locations.items()}

    @property
    def names(self) -> list[str]:
        """The names of all databases."""
        return list(self._locations)

    def locate(self, name: str, connect: Connect) -> Location | None:  # noqa: ARG002  # a directory's
        return self._locations.get(name)

    def list_databases(self, connect: Connect) -> Iterable[Location]:  # noqa: ARG002
        return list(self._locations.values())


class Servers:
    """A directory of what the servers themselves say that they have.

    A name that two servers have is refused: nobody knows which is meant. A server that does not answer hides its
    databases, and no other's; when all are to be listed it is a `ListingError`, which has what the others say.

    Args:
        hosts: The servers, each a host or a mapping with host and port.
        like: Which databases, as a pattern of SQL's LIKE.
    """

    def __init__(self, hosts: Iterable[str | Mapping[str, Any]], *, like: str = "%") -> None:
        given = ({"host": host} if isinstance(host, str) else dict(host) for host in hosts)
        self._servers = [dict(checked(each)) for each in given]
        self._like = like
        if not self._servers:
            raise ConfigError("a directory of Servers needs some: name their hosts")

    @property
    def servers(self) -> Sequence[Mapping[str, Any]]:
        """The options of the servers' addresses, as they were given."""
        return self._servers

    def locate(self, name: str, connect: Connect) -> Location | None:
        found, failure = [], None
        for server in self._servers:
            try:
                found += self._ask(server, connect, name)
            except Exception as error:
                failure = error
        if failure is not None and not found:
            raise failure
        return self._one_of_each(found).get(name)

    def list_databases(self, connect: Connect) -> Iterable[Location]:
        found: list[Location] = []
        failures: dict[str, Exception] = {}
        for server in self._servers:
            try:
                found += self._ask(server, connect, None)
            except Exception as error:
                failures[f"{server['host']}:{server.get('port', DEFAULT_PORT)}"] = error
        locations = self._one_of_each(found).values()
        if failures:
            reasons = "; ".join(f"{server}: {error}" for server, error in failures.items())
            raise ListingError(
                f"{len(failures)} of {len(self._servers)} servers did not say what they have, so the "
                f"{len(locations)} databases of the others are not all: {reasons}",
                found=locations,
                failures=failures,
            )
        return locations

    def _ask(self, server: Mapping[str, Any], connect: Connect, name: str | None) -> list[Location]:
        with connect(server) as connection:
            names = connection.execute(_NAMES, {"like": self._like, "name": name}).scalars().all()
        return [Location(each, MappingProxyType(dict(server))) for each in sorted(names)]

    def _one_of_each(self, found: Iterable[Location]) -> dict[str, Location]:
        locations: dict[str, Location] = {}
        for location in found:
            other = locations.setdefault(location.name, location)
            if other is not location:
                raise ConfigError(
                    f"{location.name!r} is on {other.options['host']} and on {location.options['host']}, and nobody "
                    "knows which is meant: choose it with its host, or drop one of them"
                )
        return locations


class Table:
    """A directory in a table of a catalogue database.

        >>> Table(select(Shard.name, Shard.host, Shard.state), database="catalogue")   # doctest: +SKIP

    Args:
        statement: Selects a row for each database, with the columns ``name`` and those of ``host port database username
            password query state tags id`` that there are.
        **options: Of the catalogue's address, as `set_database` takes them; the repo's default database without.
    """

    def __init__(self, statement: Select[*tuple[Any, ...]], **options: Any) -> None:
        self._rows = statement.subquery()
        if "name" not in self._rows.c:
            raise ConfigError("a directory's table has a column called name: select(Shard.name, …), or label one so")
        self._options = dict(checked(options)) if options else {}

    def locate(self, name: str, connect: Connect) -> Location | None:
        with connect(self._options) as connection:
            rows = connection.execute(select(self._rows).where(self._rows.c.name == name)).mappings().all()
        if len(rows) > 1:
            raise ConfigError(f"the directory's table has {len(rows)} rows for {name!r}: its name has to be unique")
        return Location.of(name, dict(rows[0])) if rows else None

    def list_databases(self, connect: Connect) -> Iterable[Location]:
        with connect(self._options) as connection:
            rows = connection.execute(select(self._rows)).mappings().all()
        return [Location.of(row["name"], dict(row)) for row in rows]


class Called:
    """A directory of functions, of which each may be async.

    Args:
        locate: Says of a name where that database is, None if there is none.
        listing: Yields the names of all, or their locations; None where nobody can tell.
    """

    def __init__(
        self,
        locate: Callable[[str], Answer | Awaitable[Answer]],
        listing: Callable[[], Iterable[str | Location] | Awaitable[Iterable[str | Location]]] | None = None,
    ) -> None:
        self._locate = locate
        self._listing = listing

    def locate(self, name: str, connect: Connect) -> Location | None:  # noqa: ARG002
        answer = _awaited(self._locate(name))
        return None if answer is None else Location.of(name, answer)

    def list_databases(self, connect: Connect) -> Iterable[Location]:
        if self._listing is None:
            raise ConfigError("this directory tells where a database is, not which there are: give list_databases too")
        for each in _awaited(self._listing()):
            location = each if isinstance(each, Location) else self.locate(each, connect)
            if location is not None:
                yield location


def _awaited(answer: Any) -> Any:
    """What a function has returned, or what it is awaited for, in a loop of its own: this thread's may be running."""
    if not inspect.isawaitable(answer):
        return answer

    async def wait() -> Any:
        return await answer

    with ThreadPoolExecutor(1, "shardrepo-directory") as thread:
        return thread.submit(asyncio.run, wait()).result()


@dataclass(frozen=True, slots=True)
class Known:
    """An answer, and until when it is believed."""

    location: Location | None
    until: float


class Whereabouts:
    """The answers of a directory, each remembered for a while.

    However many callers wait for a name, the directory is asked once. While it fails, what it last said of a name
    that it knew holds.

    Args:
        directory: What is asked.
        connect: Opens a connection for a question of the directory's own.
        apart: Makes the block in which it is asked.
        ttl: Seconds for which an answer is believed; one that there is no such database for 5 at most.
    """

    def __init__(
        self, directory: Directory, connect: Connect, apart: Callable[[], AbstractContextManager[None]], ttl: float
    ) -> None:
        self._directory = directory
        self._connect = connect
        self._apart = apart
        self._ttl = ttl
        self.start_empty()

    def start_empty(self) -> None:
        """Forget who is asking, as a forked child has to, and everything else."""
        # Guards both mappings; nothing is asked under it.
        self._lock = threading.Lock()
        self._known: dict[str, Known] = {}
        self._asking: dict[str, tuple[threading.Thread, Future[Location | None]]] = {}

    def find(self, name: str) -> Location:
        """Where *name* is.

        Raises:
            UnknownDatabaseError: The directory says that there is no such database. Nothing was connected to for it.
        """
        known = self._known.get(name)
        location = known.location if known is not None and monotonic() < known.until else self._ask(name)
        if location is None:
            raise UnknownDatabaseError(
                f"the directory knows no database {name!r}: check the name, or make it known there", database=None
            )
        return location

    def forget(self, name: str) -> None:
        """Believe no longer what was said of *name*."""
        with self._lock:
            self._known.pop(name, None)

    def forget_all(self) -> None:
        """Believe nothing any longer that was said."""
        with self._lock:
            self._known.clear()

    def list_databases(self) -> list[Location]:
        """All databases, by name, as the directory has them now; where each of them is needs no question then.

        Raises:
            ConfigError: It lists a name twice, and nobody knows which is meant.
            ListingError: It could not list all; what it could is remembered too.
        """
        try:
            with self._apart():
                listed = list(self._directory.list_databases(self._connect))
        except ListingError as error:
            self._learn_all(error.found)
            raise
        return self._learn_all(listed)

    def _learn_all(self, listed: Iterable[Location]) -> list[Location]:
        found: dict[str, Location] = {}
        for location in listed:
            if found.setdefault(location.name, location) != location:
                raise ConfigError(
                    f"the directory lists {location.name!r} twice, in different places or states: its name has to be "
                    "unique"
                )
        for location in found.values():
            self._learn(location.name, location)
        return sorted(found.values(), key=lambda location: location.name)

    def _ask(self, name: str) -> Location | None:
        mine: Future[Location | None] = Future()
        with self._lock:
            thread, answer = self._asking.setdefault(name, (threading.current_thread(), mine))
        if answer is not mine:
            if thread is threading.current_thread():
                raise ConfigError(f"the directory asks itself where {name!r} is: have it ask another repo")
            return answer.result()
        try:
            location = self._told(name)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(location)
            return location
        finally:
            with self._lock:
                self._asking.pop(name, None)

    def _told(self, name: str) -> Location | None:
        before = self._known.get(name)
        try:
            with self._apart():
                location = self._directory.locate(name, self._connect)
        except Exception as error:
            if before is None or before.location is None:
                error.add_note(f"the directory was asked where {name!r} is")
                raise
            logger.warning("the directory failed, its last answer about %r holds", name, exc_info=True)
            self._remember(name, before.location, RETRY)
            return before.location
        return self._learn(name, location)

    def _learn(self, name: str, location: Location | None) -> Location | None:
        """Believe what the directory has just said; returns the same object as before as long as it says the same."""
        before = self._known.get(name)
        if before is not None and before.location == location:
            location = before.location
        self._remember(name, location, self._ttl if location is not None else min(self._ttl, MAX_NEGATIVE_TTL))
        return location

    def _remember(self, name: str, location: Location | None, seconds: float) -> None:
        with self._lock:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            self._known[name] = Known(location, monotonic() + seconds)


def directory_of(given: Any) -> Directory:
    """The directory that the config gives: one, a mapping or a function of a name; or `ConfigError`."""
    if isinstance(given, Mapping):
        return Static(given)
    if hasattr(given, "locate") and hasattr(given, "list_databases"):
        return cast("Directory", given)
    if callable(given):
        return Called(cast("Callable[[str], Answer]", given))
    raise ConfigError(f"a directory is Static, Servers, Table, a mapping or a function of a name, not {given!r}")
