"""A repo's configuration: validated once, frozen afterwards."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, get_args

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from .calls import checked_seconds
from .database import (
    ADDRESS_PARAMETERS,
    Choice,
    Database,
    Options,
    checked,
    checked_name,
    database_from,
    options_of_url,
)
from .directory import Directory, Location, directory_of
from .entries import Ages
from .errors import ConfigError, NoDatabaseError, unknown
from .places import Bounds

ConfigSource: TypeAlias = "str | URL | Mapping[str, Any] | Callable[[], str | URL | Mapping[str, Any]]"
RequireHead: TypeAlias = Literal["off", "warn", "raise"]

_POOL_SIZE: Final = 20

_ADDRESS: Final = frozenset(Options.__annotations__)

# Settings of the driver that the cache itself decides on.
_OWN_CONNECT_ARGS: Final = ADDRESS_PARAMETERS | {"connect_timeout", "application_name", "autocommit", "conninfo"}

# Arguments of create_engine that would put another pool, driver or dialect behind the cache's back.
_OWN_ENGINE_OPTIONS: Final = frozenset(
    {
        *("connect_args", "creator", "async_creator", "module", "dialect", "url", "shared"),
        *("pool", "poolclass", "pool_size", "max_overflow", "pool_timeout", "pool_recycle", "pool_pre_ping"),
        *("pool_reset_on_return", "pool_use_lifo", "ledger", "database", "kind", "settings", "attend", "listeners"),
        *("use_native_hstore", "query_cache_size", "skip_autocommit_rollback", "isolation_level"),
    }
)

# What a pooler loses or refuses, and what to do instead.
_NOT_POOLED: Final = {
    "prepare_threshold": "what was prepared stays behind on one of the pooler's connections, so nothing is; remove it",
    "options": "PgBouncer refuses it, or is told to leave it out; use ALTER ROLE … SET or ALTER DATABASE … SET",
}

# What SQLAlchemy's own pool calls the nearest thing.
_SQLALCHEMYS: Final = {
    "max_overflow": "max_connections",
    "pool_timeout": "checkout_timeout",
    "pool_recycle": "max_lifetime",
    "pool_pre_ping": "check_after",
}

# Bounds that can never be reached contradict those around them.
_ENCLOSED: Final = (
    ("pool_size", "max_connections"),
    ("max_per_database", "max_per_server"),
    ("max_per_database", "max_connections"),
    ("max_per_server", "max_connections"),
)

_EMPTY: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Config:
    """The validated settings of a repo.

    Attributes:
        address: The options of the default database that the config gives, without what it leaves open.
        pool_size: The target: how many connections the process keeps, over all databases; 20, or `max_connections`
            if that is less.
        max_connections: How many connections there may be at a time, in this process; None for no bound.
        max_per_server: The same for each server.
        max_per_database: The same for each database.
        max_overtake: For how many seconds a caller who waits for a bound may be overtaken by those for whose
            database a connection is returned meanwhile.
        checkout_timeout: Seconds that a caller waits for a bound.
        connect_timeout: Seconds that opening a connection may take in all, name resolution excepted.
        idle_timeout: Seconds after which a connection that nobody uses is closed; None to keep it.
        max_lifetime: Seconds after which a connection is closed, some up to a tenth earlier; None for no end.
        check_after: Seconds after which a connection that nobody used is tested before it is used; None never
            to, except when its server has just lost another.
        warn_after: Seconds after which a connection that is still held is logged, with the stack that took it; None
            for no such warning, which would cost each checkout a few microseconds.
        require_database: Whether a verb needs a chosen database, the default being no fallback.
        read_only: Whether verbs that write are refused, and the server is told to refuse what writes beside them.
        pgbouncer: Whether PgBouncer in transaction mode stands in front of the servers, where each transaction may
            run in another session. Nothing is prepared then, and nothing reset. What your own SQL leaves in a session
            (`SET`, `LISTEN`, an advisory lock, a temporary table) stays there for whoever is given it next, other
            programs included: use what ends with its transaction, such as `SET LOCAL` and `pg_advisory_xact_lock`.
        maintenance_database: The database of a server that is used for what concerns others of it: they are made,
            dropped, renamed and looked up there, and where libpq cannot tell why a connect failed, the server is asked
            in it. It cannot be dropped or renamed itself.
        application_name: How the connections name themselves to the server.
        connect_args: Further libpq parameters, and psycopg's ``prepare_threshold``.
        engine_options: Arguments for ``create_engine``, those of the pool excepted.
        directory: What knows where a database lives that is chosen by its name alone; see `shardrepo.directory`.
        directory_ttl: Seconds for which its answers are believed; that there is no such database for 5 at most.
        verify_database: Whether each new connection is asked which database it leads to, by the server's own word: a
            pooler or a directory may send it to another one than its address says.
        require_head: What becomes of a new connection to a database that lacks revisions of `script_location`, more
            than the last one: "off" for nothing, "warn" for a log record, "raise" for `DatabaseBehindError`. One
            by which databases are made, migrated or asked a single question is not held to it, and a revision that
            the scripts do not have is a newer one.
        script_location: Where the schema's Alembic scripts are: a folder, or a package's as ``package:folder``.
        version_table: Where Alembic notes a database's revision, as ``table`` or ``schema.table``.
        template_database: The database of each server that new ones are copies of, kept at head; see `shardrepo.fleet`.
    """

    address: Mapping[str, Any] = field(repr=False)
    pool_size: int = _POOL_SIZE
    max_connections: int | None = None
    max_per_server: int | None = None
    max_per_database: int | None = None
    max_overtake: float = 0.05
    checkout_timeout: float = 30.0
    connect_timeout: float = 5.0
    idle_timeout: float | None = 600.0
    max_lifetime: float | None = 3600.0
    check_after: float | None = 30.0
    warn_after: float | None = None
    require_database: bool = False
    read_only: bool = False
    pgbouncer: bool = False
    maintenance_database: str = "postgres"
    application_name: str = "shardrepo"
    connect_args: Mapping[str, Any] = field(default_factory=lambda: _EMPTY, repr=False)
    engine_options: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    directory: Directory | None = None
    directory_ttl: float = 60.0
    verify_database: bool = False
    require_head: RequireHead = "off"
    script_location: str | None = None
    version_table: str = "alembic_version"
    template_database: str | None = None

    @classmethod
    def of(cls, source: ConfigSource) -> Config:
        """Validate *source*; a callable is called.

        Raises:
            ConfigError: A setting is unknown (with the one probably meant), contradicts another or
                has an impossible value.
        """
        given = source() if callable(source) else source
        settings = dict(given) if isinstance(given, Mapping) else {"url": given}
        address = _address_of(settings)
        for name in settings:
            if name not in _SETTINGS:
                known = [*_SETTINGS, *_ADDRESS, "url", "drivername"]
                raise ConfigError(unknown("setting", str(name), known, _SQLALCHEMYS.get(name)))
        values = {name: _SETTINGS[name](value) for name, value in settings.items()}
        if values.get("max_connections") is not None:
            values.setdefault("pool_size", min(_POOL_SIZE, values["max_connections"]))
        for inner, outer in _ENCLOSED:
            _check_order(values, inner, outer)
        config = cls(address=address, **values)
        if config.read_only and config.pgbouncer:
            raise ConfigError(
                "read_only=True contradicts pgbouncer=True, which cannot be told: "
                "use a role with ALTER ROLE … SET default_transaction_read_only = on"
            )
        if config.require_head != "off" and config.script_location is None:
            raise ConfigError(
                f"require_head={config.require_head!r} needs to know where the migrations are: add script_location, "
                "their folder, or package:folder"
            )
        config._check_pooled("connect_args", config.connect_args)
        config._check_pooled("the query", dict(address.get("query", ())))
        return config

    @property
    def bounds(self) -> Bounds:
        """The hard bounds of the cache."""
        return Bounds(self.max_connections, self.max_per_server, self.max_per_database, self.max_overtake)

    @property
    def ages(self) -> Ages:
        """How old the connections of the cache may grow."""
        return Ages(
            *(math.inf if age is None else age for age in (self.idle_timeout, self.max_lifetime, self.check_after))
        )

    def locate(self, choice: Choice | None, location: Location | None = None) -> Database:
        """Merge *choice* into the default options, over what a directory says of it. Pure: no I/O, the same choice is
        always the same database.

        Raises:
            NoDatabaseError: Nothing is chosen, and the default names no database or may not be used.
            ConfigError: The merged options have no host, or a parameter that pgbouncer=True rules out.
        """
        database = self._merged(choice, location)
        self._check_pooled("the query", dict(database.query))
        return database

    def _check_pooled(self, where: str, parameters: Mapping[str, Any]) -> None:
        for name, remedy in _NOT_POOLED.items():
            if self.pgbouncer and (value := parameters.get(name)) is not None:
                raise ConfigError(f"pgbouncer=True contradicts {name}={value!r} in {where}: {remedy}")

    def _merged(self, choice: Choice | None, location: Location | None) -> Database:
        if choice is None and self.require_database:
            raise NoDatabaseError(
                "no database is chosen and this repo requires one (require_database=True): "
                "call set_database(...) first, or use `with repo.using(...)`"
            )
        if choice is not None and choice.database is not None:
            return choice.database
        options = {**self.address, **dict(choice.options)} if choice is not None else dict(self.address)
        if location is not None:
            options |= location.options
            options |= {name: value for name, value in (choice.options if choice else ()) if name != "database"}
        if "database" not in options:
            raise NoDatabaseError(
                "no database is chosen and the config names no default one: call set_database(...) first, "
                "or add a database to the config"
            )
        if "host" not in options:
            raise ConfigError(
                f"database {options['database']!r} has no host: add one to the config, a name, an address or "
                "the folder of a socket (nothing is taken from PGHOST, so that a row's place is never ambiguous)"
            )
        if location is None:
            return database_from(options)
        if location.state == "read_only":
            # Other connections than those by which it is written, once it may be again.
            query = dict(options.get("query", ()))
            query["options"] = f"{query.get('options', '')} -c default_transaction_read_only=on".strip()
            options["query"] = tuple(sorted(query.items()))
        return replace(database_from(options), id=location.id, state=location.state)


def _address_of(settings: dict[str, Any]) -> Mapping[str, Any]:
    """Take the address out of *settings*: a URL, single options, or both where they agree."""
    options = _options_of(settings.pop("url")) if "url" in settings else {}
    if (driver := settings.pop("drivername", None)) is not None:
        options_of_url(URL.create(_checked_text("drivername", driver)))
    given = {name: settings.pop(name) for name in list(settings) if name in _ADDRESS}
    for name, value in checked(given) if given else ():
        if options.get(name, value) != value:
            shown = "two different passwords" if name == "password" else f"{options[name]!r} and {value!r}"
            raise ConfigError(f"the config contradicts itself on {name}: its url and its own key say {shown}")
        options[name] = value
    return MappingProxyType(options)


def _options_of(url: object) -> dict[str, Any]:
    if not isinstance(url, str | URL):
        raise ConfigError(f"a config is a URL, a mapping or a callable that returns one, not {type(url).__name__}")
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The text is not repeated: what cannot be parsed may hold a password anywhere.
        raise ConfigError("the config's url cannot be parsed: write postgresql+psycopg://user@host/name") from None
    return options_of_url(parsed)


def _check_order(values: Mapping[str, Any], inner: str, outer: str) -> None:
    small, large = values.get(inner), values.get(outer)
    if small is not None and large is not None and small > large:
        raise ConfigError(f"{inner}={small} is above {outer}={large}: lower the one, or raise the other")


def _checked_text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a non-empty string, not {value!r}")
    return value


def _checked_word(name: str, value: object, known: Sequence[str]) -> str:
    if value not in known:
        raise ConfigError(unknown(name, str(value), known))
    return str(value)


def _checked_table(name: str, value: object) -> str:
    for part in (parts := _checked_text(name, value).split(".")):
        checked_name(name, part)
    if len(parts) > 2:
        raise ConfigError(f"{name} must be table or schema.table, not {value!r}")
    return ".".join(parts)


def checked_count(name: str, remedy: str, *, optional: bool = False) -> Callable[[object], int | None]:
    """Make a check of a number of things, which raises `ConfigError`; None passes if it is *optional*."""

    def check(value: object) -> int | None:
        if value is None and optional:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            wanted = "an integer or None" if optional else "an integer"
            raise ConfigError(f"{name} must be {wanted}, not {type(value).__name__} {value!r}")
        if value < 1:
            raise ConfigError(f"{name}={value} {remedy}")
        return value

    return check


def checked_flag(name: str) -> Callable[[object], bool]:
    """Make a check of a switch, which raises `ConfigError` for what is merely true or false."""

    def check(value: object) -> bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{name} must be True or False, not {value!r}")
        return value

    return check


def _checked_mapping(name: str, refused: frozenset[str], remedy: str) -> Callable[[object], Mapping[str, Any]]:
    def check(value: object) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a mapping, not {type(value).__name__}")
        for key in value:
            if key in refused:
                raise ConfigError(f"{name} must not contain {key!r}: {remedy}")
        return MappingProxyType(dict(value))

    return check


_SETTINGS: Final[Mapping[str, Callable[[object], Any]]] = {
    "pool_size": checked_count("pool_size", "keeps no connection: give the number to keep over all databases"),
    **{
        name: checked_count(name, "lets nobody connect: give the most that there may be, or None", optional=True)
        for name in ("max_connections", "max_per_server", "max_per_database")
    },
    **{
        name: checked_seconds(name) for name in ("max_overtake", "checkout_timeout", "connect_timeout", "directory_ttl")
    },
    "directory": lambda value: None if value is None else directory_of(value),
    **{
        name: checked_seconds(name, optional=True)
        for name in ("idle_timeout", "max_lifetime", "check_after", "warn_after")
    },
    **{name: checked_flag(name) for name in ("require_database", "read_only", "pgbouncer", "verify_database")},
    "require_head": lambda value: _checked_word("require_head", value, get_args(RequireHead)),
    "script_location": lambda value: None if value is None else _checked_text("script_location", value),
    "version_table": lambda value: _checked_table("version_table", value),
    "maintenance_database": lambda value: checked_name("maintenance_database", value),
    "template_database": lambda value: None if value is None else checked_name("template_database", value),
    "application_name": lambda value: _checked_text("application_name", value),
    "connect_args": _checked_mapping(
        "connect_args", _OWN_CONNECT_ARGS, "the config's own settings say where and how to connect"
    ),
    "engine_options": _checked_mapping(
        "engine_options", _OWN_ENGINE_OPTIONS, "connections are the cache's; see pool_size and connect_args"
    ),
}
assert set(_SETTINGS) == {f.name for f in fields(Config)} - {"address"}
