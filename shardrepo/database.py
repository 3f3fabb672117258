"""The address of one real database, and the choice that leads to it.

Three identities are kept apart: `Database` objects compare by address, without secrets; `Database.key`
is all that makes a connection what it is, the password included (as a keyed digest); `Database.home` is
the plain string that an object remembers, which survives pickling and a change of password.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, NoReturn, Self, TypeAlias, TypedDict, cast

from sqlalchemy.engine import URL

from .errors import ConfigError, unknown

Password: TypeAlias = str | Callable[[], str]
State: TypeAlias = Literal["active", "read_only", "suspended", "migrating"]

DEFAULT_PORT: Final = 5432

# PostgreSQL cuts a longer name off, at connect too: a 64-byte name would reach the database that has
# its first 63 bytes as name (NAMEDATALEN, https://www.postgresql.org/docs/current/limits.html).
MAX_NAME_BYTES: Final = 63

# libpq parameters that would lead a connection elsewhere, or let it in as somebody else, beside what
# `Database` says.
ADDRESS_PARAMETERS: Final = frozenset(
    {"host", "hostaddr", "port", "dbname", "user", "password", "passfile", "service", "servicefile"}
)

_DIGEST_KEY: Final = secrets.token_bytes(32)


class Options(TypedDict, total=False):
    """What may be chosen of a database's address; the rest comes from the repo's default."""

    host: str
    port: int
    database: str
    username: str
    password: Password
    query: Mapping[str, str]


class Secret:
    """A password that shows itself to nobody who does not ask: not in a repr, a copy's repr or a pickle."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """The password."""
        return self._value

    def __repr__(self) -> str:
        return "***"

    def __eq__(self, other: object) -> bool:
        return self._value == (other._value if isinstance(other, Secret) else other)

    def __hash__(self) -> int:
        return hash(self._value)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError("a password is not pickled: the process that needs it has a config of its own")


@dataclass(frozen=True, slots=True, repr=False)
class Database:
    """The address of one real database.

    Hashable, and equal to any other spelling of the same address: a missing port is 5432 and host names
    know no case, but ``localhost`` is not ``127.0.0.1``. The password takes no part in equality and
    appears neither in the repr nor in a pickle.

    Attributes:
        host: A host name, an address, or the folder of a socket (``/run/postgresql``).
        port: The port, also of a socket.
        name: The name of the database, at most 63 bytes of UTF-8.
        username: Who connects; None leaves it to the driver.
        query: Further libpq parameters, sorted by name.
        password: The password, or a callable that is asked for it at every connect.
        id: What a directory has given it for a home, which it keeps when it moves; None for ``server/name``.
        state: What a directory says may be done with it.
        home: What an object that is stored in it remembers.
    """

    host: str
    port: int
    name: str
    username: str | None = None
    query: tuple[tuple[str, str], ...] = ()
    password: Password | Secret | None = field(default=None, compare=False)
    id: str | None = field(default=None, compare=False)
    state: State = field(default="active", compare=False)
    home: str = field(init=False, compare=False)
    key: str = field(init=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.password, str):
            object.__setattr__(self, "password", Secret(self.password))
        object.__setattr__(self, "home", self.id or self.address)
        # One string, because it is looked up at every checkout and strings remember their hash.
        address = (self.host, self.port, self.name, self.username, self.query, digest(self.password))
        object.__setattr__(self, "key", repr(address))

    @classmethod
    def from_url(cls, url: URL) -> Database:
        """Read a complete address from *url*; raises `ConfigError` when a part is missing or wrong."""
        options = options_of_url(url)
        for part in ("host", "database"):
            if part not in options:
                raise ConfigError(f"the URL {url!r} names no {part}: a URL is a complete address, add one")
        return database_from(options)

    @property
    def server(self) -> str:
        """Host and port, as ``host:port``; an IPv6 address stands in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def address(self) -> str:
        """Where it is now, as ``host:port/name``: its home, unless a directory has given it an id."""
        return f"{self.server}/{self.name}"

    @property
    def labels(self) -> dict[str, str]:
        """What a log record says of it: ``database`` and ``server``."""
        return {"database": self.name, "server": self.server}

    @property
    def url(self) -> URL:
        """The address as a SQLAlchemy URL, without the password."""
        return URL.create("postgresql+psycopg", self.username, None, self.host, self.port, self.name, dict(self.query))

    def neighbour(self, name: str) -> Database:
        """Another database on the same server, for the same user."""
        return replace(self, name=name, id=None, state="active")

    def __repr__(self) -> str:
        who = f"{self.username}@" if self.username else ""
        return f"<Database {who}{self.home}>"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.host, self.port, self.name, self.username, self.query, None, self.id)


@dataclass(frozen=True, slots=True)
class Choice:
    """What `set_database` or `using` was given: validated, not yet located.

    Either a complete `Database`, or options that are merged into the repo's default ones.

    Attributes:
        options: What is chosen of an address.
        database: The whole of one.
        bare_name: The name, if a directory may say where that is: without a server of its own.
    """

    options: tuple[tuple[str, Any], ...] = ()
    database: Database | None = None
    bare_name: str | None = field(init=False, compare=False)
    # What the equality of databases leaves out: a choice of another password, or in another state, is another one.
    _facts: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        chosen = self.database
        object.__setattr__(self, "_facts", () if chosen is None else (chosen.key, chosen.id, chosen.state))
        options = dict(self.options)
        alone = self.database is None and not options.keys() & {"host", "port"}
        object.__setattr__(self, "bare_name", options.get("database") if alone else None)

    @property
    def names_database(self) -> bool:
        """Whether it has a database's name of its own, not the default's."""
        return self.database is not None or "database" in dict(self.options)

    def __repr__(self) -> str:
        if self.database is not None:
            return f"<Choice {self.database!r}>"
        shown = ", ".join(f"{key}={value!r}" for key, value in self.options)
        return f"<Choice {shown or 'default'}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (tuple(pair for pair in self.options if pair[0] != "password"), self.database)


DEFAULT: Final = Choice()
"""The choice of the repo's default database, by name rather than by choosing nothing."""

Chosen: TypeAlias = "str | Mapping[str, Any] | URL | Database | Choice | None"


def several(databases: Any, what: str, remedy: str) -> Iterable[Any]:
    """*databases*, unless that is one of what it should be several of. Raises `ConfigError` then."""
    if isinstance(databases, str | Mapping | URL | Database | Choice) or not isinstance(databases, Iterable):
        raise ConfigError(
            f"{what} takes a list of databases, not one {type(databases).__name__}: put it into brackets, {remedy}"
        )
    return databases


def choose(given: Chosen, options: Mapping[str, Any]) -> Choice | None:
    """Validate what `set_database` or `using` was given. Does no I/O.

    None (choose nothing) and a `Choice` are returned as they are; a name or a mapping becomes options to
    merge; a URL or a `Database` is complete, so that nothing is merged into it.
    """
    if given is not None and options:
        raise ConfigError(
            f"a database is chosen by one argument or by keywords, not by both: got {given!r} and "
            f"{', '.join(options)}; write database={given!r} among the keywords"
            if isinstance(given, str)
            else f"a database is chosen by one argument or by keywords, not by both: got also {', '.join(options)}"
        )
    if given is None:
        return Choice(checked(options)) if options else None
    if isinstance(given, Choice):
        return given
    if isinstance(given, str):
        return Choice(checked({"database": given}))
    if isinstance(given, URL):
        return Choice(database=Database.from_url(given))
    if isinstance(given, Database):
        return Choice(database=given)
    if isinstance(given, Mapping):
        return Choice(checked(given))
    raise ConfigError(
        f"cannot choose a database by {type(given).__name__} {given!r}: "
        "give a name, a mapping of options, a SQLAlchemy URL, a Database, DEFAULT or None"
    )


def checked(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Validate options one by one and give them a canonical order.

    Raises:
        ConfigError: There are none, one is unknown, or its value is of the wrong type or impossible.
    """
    if not options:
        raise ConfigError(f"no option given: choose by {', '.join(sorted(_CHECKS))}, or None for the default")
    for name in options:
        if name not in _CHECKS:
            raise ConfigError(unknown("option", str(name), _CHECKS))
    return tuple(sorted((name, _CHECKS[name](value)) for name, value in options.items()))


def database_from(options: Mapping[str, Any]) -> Database:
    """Make the `Database` that complete, validated *options* describe."""
    return Database(
        host=options["host"],
        port=options.get("port", DEFAULT_PORT),
        name=options["database"],
        username=options.get("username"),
        query=options.get("query", ()),
        password=options.get("password"),
    )


def options_of_url(url: URL) -> dict[str, Any]:
    """Read the options that *url* gives; a socket folder may stand in its query, as libpq has it."""
    if url.get_backend_name() != "postgresql" or url.drivername not in ("postgresql", "postgresql+psycopg"):
        raise ConfigError(f"cannot use the driver {url.drivername!r}: shardrepo speaks postgresql+psycopg")
    query = dict(url.query)
    given: dict[str, Any] = {
        "host": url.host or query.pop("host", None),
        "port": url.port if url.port is not None else _port_of(query.pop("port", None)),
        "database": url.database,
        "username": url.username,
        "password": url.password,
        "query": query or None,
    }
    present = {name: value for name, value in given.items() if value is not None}
    return dict(checked(present)) if present else {}


def _port_of(text: object) -> object:
    return int(text) if isinstance(text, str) and text.isdecimal() else text


def digest(password: Password | Secret | None) -> int | bytes | None:
    """What tells one password from another without saying anything of it, within this process."""
    # A callable stands for whatever it returns at the next connect, so it is its own identity. It cannot be
    # taken for a later one at the same place in memory: whatever is found by a key holds its Database.
    if not isinstance(password, Secret):
        return None if password is None else id(password)
    return hashlib.blake2b(password.reveal().encode(), key=_DIGEST_KEY, digest_size=16).digest()


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a string, not {type(value).__name__} {value!r}")
    if not value:
        raise ConfigError(f"{name} is empty: name one, or leave it out where there is a default")
    if "\0" in value:
        raise ConfigError(f"{name} {value!r} contains a NUL character, which PostgreSQL cannot be sent")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name} {value!r} cannot be written in UTF-8: {error.reason}") from None
    return value


def checked_name(kind: str, value: object) -> str:
    """Make sure that *value* can be a name in PostgreSQL, without being cut; `ConfigError` says its *kind*."""
    name = _text(kind, value)
    if (size := len(name.encode())) > MAX_NAME_BYTES:
        raise ConfigError(
            f"{kind} {name!r} is {size} bytes long: PostgreSQL would cut it to {MAX_NAME_BYTES} bytes, which may be "
            "the name of another; use a shorter one"
        )
    return name


def _check_host(value: object) -> str:
    host = _text("host", value)
    if "://" in host:
        raise ConfigError("a host is given as a name or an address, not as a URL, which may have a password in it")
    if "," in host:
        raise ConfigError(f"host {host!r} names several servers: a row is in one of them, name that one")
    return host if host.startswith(("/", "@")) else host.lower()


def _check_port(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"port must be an integer, not {type(value).__name__} {value!r}")
    if not 1 <= value <= 65535:
        raise ConfigError(f"port {value} does not exist: give one from 1 to 65535")
    return value


def _check_password(value: object) -> Callable[[], str] | Secret:
    if callable(value):
        return cast("Callable[[], str]", value)
    if not isinstance(value, str):
        raise ConfigError(f"password must be a string or a callable, not {type(value).__name__}")
    if "\0" in value:
        raise ConfigError("the password contains a NUL character, which PostgreSQL cannot be sent")
    return Secret(value)


def _check_query(value: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"query must be a mapping of libpq parameters, not {type(value).__name__} {value!r}")
    for name, text in value.items():
        if name in ADDRESS_PARAMETERS:
            raise ConfigError(f"query must not say where to connect: move {name!r} to the options of that purpose")
        if not isinstance(name, str) or not isinstance(text, str):
            raise ConfigError(f"query parameter {name!r} must be a string and have one as name, not {text!r}")
    return tuple(sorted(value.items()))


_CHECKS: Final[Mapping[str, Callable[[object], Any]]] = {
    "host": _check_host,
    "port": _check_port,
    "database": lambda value: checked_name("database", value),
    "username": lambda value: _text("username", value),
    "password": _check_password,
    "query": _check_query,
}
