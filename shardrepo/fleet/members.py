"""Which databases an operation is for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final, Self

from ..across import Outcome, Target
from ..database import Database
from ..directory import Location
from ..errors import ConfigError, ListingError, UnknownDatabaseError
from .lines import some

if TYPE_CHECKING:
    from ..databases import Databases
    from ..repo import Repo


@dataclass(frozen=True, slots=True)
class Member:
    """One database of the fleet.

    Attributes:
        name: By which it is chosen.
        database: Its address, for those who look after it: whatever its state, they get in and may write.
        state: What the directory says may be done with it.
        tags: What it is selected by.
    """

    name: str
    database: Database
    state: str = "active"
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Selection:
    """Which members of a fleet are meant: all of them, where nothing is said.

    Attributes:
        names: Those of these names, in place of all that the directory lists.
        match: Whose names fit one of these patterns, as a shell has them (``shard0*``).
        servers: Those on one of these, each a host, or ``host:port``.
        tags: Those that have all of these.

    Raises:
        ConfigError: One of them is no tuple of texts.
    """

    names: tuple[str, ...] = ()
    match: tuple[str, ...] = ()
    servers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            given = getattr(self, field.name)
            # A text would be taken for its characters, of which a * fits every name.
            if not isinstance(given, tuple) or not all(isinstance(each, str) and each for each in given):
                raise ConfigError(f"{field.name} of a selection is a tuple of texts, like ('shard01',), not {given!r}")

    @property
    def is_all(self) -> bool:
        """Whether nothing is left out."""
        return not any(getattr(self, field.name) for field in fields(self))

    def admits(self, member: Member) -> bool:
        """Whether *member*, which has a name that is meant, is meant."""
        return (
            (not self.match or any(fnmatchcase(member.name, pattern) for pattern in self.match))
            and self.reaches(member.database.server)
            and set(self.tags) <= member.tags
        )

    def reaches(self, server: str) -> bool:
        """Whether databases on *server*, ``host:port``, may be meant; host names know no case."""
        address = server.lower()
        host = address.rpartition(":")[0]
        return not self.servers or bool({address, host, host.strip("[]")} & {each.lower() for each in self.servers})

    def as_dict(self) -> dict[str, list[str]]:
        """As it stands in a journal."""
        return {field.name: list(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def of(cls, given: dict[str, list[str]]) -> Self:
        """Read what `as_dict` has written."""
        return cls(**{name: tuple(values) for name, values in given.items()})


ALL: Final = Selection()


@dataclass(frozen=True, slots=True)
class Members:
    """Those that are selected, by name, and what is not known of the rest.

    Attributes:
        found: The selected ones.
        failures: Why the databases of a server, ``host:port``, could not be listed.
    """

    found: Sequence[Member]
    failures: Mapping[str, Exception]

    def targets(self) -> list[Target | Outcome[Any]]:
        """What to visit; a server whose databases could not be listed is an outcome, called by its address."""
        unlisted: list[Outcome[Any]] = [
            Outcome(server, None, 0.0, error=error) for server, error in self.failures.items()
        ]
        return [*unlisted, *targets_of(self.found)]


def targets_of(members: Iterable[Member]) -> list[Target]:
    """The databases of *members*, to visit."""
    return [Target(member.name, member.database) for member in members]


def members(repo: type[Repo], where: Selection = ALL) -> Members:
    """The members of the fleet that *where* selects; what the directory says now.

    Raises:
        UnknownDatabaseError: A name is none that the directory knows.
        ConfigError: Nothing is selected, or there is no directory and nothing is named.
    """
    databases = repo._router.databases
    failures: Mapping[str, Exception] = {}
    if len(where.names) > 1:
        learn_places(databases)
    try:
        known = _named(where.names, databases.location) if where.names else databases.listed()
    except ListingError as error:
        known, failures = error.found, error.failures
    found = [Member(each.name, databases.tended(each), each.state, each.tags) for each in known]
    return _selected(where, found, failures)


def _selected(where: Selection, found: Sequence[Member], failures: Mapping[str, Exception]) -> Members:
    selected = [member for member in found if where.admits(member)]
    missed = {server: error for server, error in failures.items() if where.reaches(server)}
    if (found or failures) and not selected and not missed:
        raise ConfigError(f"{_said(where)} selects none of {len(found)} databases{_hint(where, found, failures)}")
    return Members(selected, missed)


def learn_places(databases: Databases) -> None:
    """Have the directory list all, if it can, before it is asked for several: some ask all servers for each."""
    with suppress(Exception):
        databases.listed()


def _named(names: Iterable[str], locate: Callable[[str], Location]) -> Sequence[Location]:
    found, unknown = [], []
    for name in dict.fromkeys(names):
        try:
            found.append(locate(name))
        except UnknownDatabaseError:
            unknown.append(name)
    if unknown:
        raise UnknownDatabaseError(
            f"the directory knows no database {', '.join(map(repr, unknown))}: check the spelling, or make it first",
            database=None,
        )
    return found


def _said(where: Selection) -> str:
    said: dict[str, Any] = {field.name: getattr(where, field.name) for field in fields(where) if field.name != "names"}
    return ", ".join(f"{name}={' '.join(values)}" for name, values in said.items() if values)


def _hint(where: Selection, found: Sequence[Member], failures: Iterable[str]) -> str:
    """What may have been meant by a server or tag that nobody has."""
    addresses = {*failures, *(member.database.server for member in found)}
    hosts = {address.rpartition(":")[0].strip("[]") for address in addresses}
    tags = {tag for member in found for tag in member.tags}
    for given, known in ((where.servers, hosts | addresses), (where.tags, tags)):
        for each in given:
            if each not in known:
                close = get_close_matches(each, known, n=1)
                return f": did you mean {close[0]!r}?" if close else f": known are {some(sorted(known)) or 'none'}"
    return f", the first of which is {found[0].name!r}" if found else ""
