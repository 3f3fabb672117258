"""The options of the pytest plugin: one table, from which the flags and the ini options are made and both are read."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, Literal, Self

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from ..database import Database, checked_name
from ..errors import ConfigError, unknown

URL_VARIABLE: Final = "SHARDREPO_URL"


@dataclass(frozen=True, slots=True)
class Lasting:
    """A database that lasts as long as the test run.

    Attributes:
        name: Its name.
        server: Which of the servers it is on: 1 for the first.
    """

    name: str
    server: int = 1

    @classmethod
    def of(cls, text: str) -> Self:
        """Read ``name`` or ``name@2``."""
        name, at, number = text.rpartition("@")
        if not at:
            return cls(checked_name("database", text))
        return cls(checked_name("database", name), _number(number))


@dataclass(frozen=True, slots=True)
class Settings:
    """What the options say; `OPTIONS` explains each."""

    url: Sequence[Database]
    servers: int
    repo: str | None
    url_variable: str
    metadata: str | None
    script_location: str | None
    databases: Mapping[str, Lasting]
    shared: bool
    check_deferred: bool

    @classmethod
    def of(cls, config: pytest.Config) -> Self:
        """Read what is set for a test run: by a flag, else in the environment, else in the ini file.

        Raises:
            ConfigError: A value is impossible. The message says where it stands, and what it has to be.
        """
        settings = cls(**{option.name: option.value(config) for option in OPTIONS})
        count = len(settings.url) or settings.servers
        for each in settings.databases.values():
            if each.server > count:
                raise ConfigError(
                    f"shardrepo_databases: {each.name}@{each.server} is on none of the {count} servers: name one from "
                    f"1 to {count}, or raise shardrepo_servers"
                )
        return settings

    def choose(self, names: Sequence[object]) -> list[Lasting]:
        """The lasting databases of these names, which a test is marked with.

        Raises:
            ConfigError: There are none, one is given twice or is no text, or it is not among the options' databases.
        """
        if not names:
            raise ConfigError('shards() names no database: write @pytest.mark.shards("shard01"), or several')
        for name in names:
            if not isinstance(name, str):
                raise ConfigError(f"shards() takes names of databases, not {type(name).__name__} {name!r}")
            if names.count(name) > 1:
                raise ConfigError(f"shards() names the database {name!r} twice: once is enough")
            if name not in self.databases:
                listed = unknown("database", name, self.databases) if self.databases else f"no database {name!r}"
                raise ConfigError(f"shards(): {listed}; the ini option shardrepo_databases lists those that there are")
        return [self.databases[str(name)] for name in names]


@dataclass(frozen=True, slots=True)
class Option:
    """One option, as ``--shardrepo-<name>`` and as ``shardrepo_<name>`` in the ini file.

    Attributes:
        read: Turns what is given, a text, the lines of a list or a bool, into the value; raises `ConfigError`.
        default: Its value where nothing is given.
        variable: The environment variable that gives it, over the ini file and under the flag.
    """

    name: str
    help: str
    read: Callable[[Any], Any]
    default: Any = None
    kind: Literal["string", "linelist", "bool"] = "string"
    variable: str | None = None

    @property
    def flag(self) -> str:
        return "--shardrepo-" + self.name.replace("_", "-")

    @property
    def ini(self) -> str:
        return f"shardrepo_{self.name}"

    def add(self, parser: pytest.Parser, group: pytest.OptionGroup) -> None:
        """Add it to what pytest knows."""
        # A switch can be turned off by a flag too.
        how: dict[str, Any] = {"action": argparse.BooleanOptionalAction} if self.kind == "bool" else {}
        group.addoption(self.flag, dest=self.ini, default=None, help=self.help, **how)
        parser.addini(self.ini, self.help, type=self.kind, default=None)

    def value(self, config: pytest.Config) -> Any:
        """What it is set to."""
        where, given = self._given(config)
        if given is None:
            return self.default
        try:
            return self.read(given)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error

    def _given(self, config: pytest.Config) -> tuple[str, Any]:
        if (flag := config.getoption(self.ini)) is not None:
            return self.flag, flag
        if self.variable and (text := os.environ.get(self.variable)):
            return self.variable, text
        # An ini option that is not given may be None, "" or [], by pytest's version.
        return self.ini, config.getini(self.ini) or None


def _words(given: str | list[str]) -> list[str]:
    """The words of a text, or of the lines of a list."""
    return given.split() if isinstance(given, str) else [word for line in given for word in line.split()]


def _urls(given: str | list[str]) -> tuple[Database, ...]:
    servers: dict[str, Database] = {}
    for number, text in enumerate(_words(given), start=1):
        database = _address(number, text)
        if database.server in servers:
            raise ConfigError(f"{database.server} is named twice: name each server once")
        servers[database.server] = database
    if not servers:
        raise ConfigError(
            "names no server: give a URL, as postgresql://user@host, or leave it out for embedded servers"
        )
    return tuple(servers.values())


def _address(number: int, text: str) -> Database:
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        # The text is not repeated: what cannot be parsed may hold a password anywhere.
        raise ConfigError(f"URL {number} cannot be parsed: write postgresql://user@host") from None
    return Database.from_url(url if url.database else url.set(database="postgres"))


def _number(given: str) -> int:
    if not (given.isascii() and given.isdecimal() and int(given)):
        raise ConfigError(f"must be a number of at least 1, not {given!r}")
    return int(given)


def _dotted(example: str) -> Callable[[str], str]:
    def check(given: str) -> str:
        module, _, name = given.partition(":")
        if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
            raise ConfigError(f"must be module:name, like {example}, not {given!r}")
        return given

    return check


def _text(given: str) -> str:
    if not given.strip():
        raise ConfigError(f"must be a text, not {given!r}")
    return given


def _variable(given: str) -> str:
    if not given or "=" in given or "\0" in given:
        raise ConfigError(f"must be the name of an environment variable, like DATABASE_URL, not {given!r}")
    return given


def _lasting(given: str | list[str]) -> dict[str, Lasting]:
    found: dict[str, Lasting] = {}
    for text in _words(given):
        lasting = Lasting.of(text)
        if lasting.name in found:
            raise ConfigError(f"the database {lasting.name!r} is listed twice: list each name once, on one server")
        found[lasting.name] = lasting
    return found


OPTIONS: Final = (
    Option(
        "url",
        f"URLs of PostgreSQL servers to use in place of embedded ones, with spaces between them; also ${URL_VARIABLE}",
        _urls,
        default=(),
        kind="linelist",
        variable=URL_VARIABLE,
    ),
    Option("servers", "how many embedded PostgreSQL servers to start (1)", _number, default=1),
    Option("repo", "the repo, as myapp.db:MyRepo", _dotted("myapp.db:MyRepo")),
    Option(
        "url_variable",
        "the environment variable that is set to the first server's URL before the repo is imported (DATABASE_URL)",
        _variable,
        default="DATABASE_URL",
    ),
    Option(
        "metadata", "the schema of the databases, as myapp.models:Base.metadata", _dotted("myapp.models:Base.metadata")
    ),
    Option("script_location", "the Alembic scripts that make the schema, a folder or package:folder", _text),
    Option(
        "databases",
        "names of databases that last as long as the run, for the marker shards; name@2 is on the second server",
        _lasting,
        default={},
        kind="linelist",
    ),
    Option("shared", "let all threads of a test use its sandbox", bool, default=False, kind="bool"),
    Option(
        "check_deferred",
        "check deferred constraints where a transaction ends in a sandbox",
        bool,
        default=False,
        kind="bool",
    ),
)
assert [option.name for option in OPTIONS] == [field.name for field in fields(Settings)]
