"""How a project says what the command works with: ``pyproject.toml``, the environment, flags, each over those before.

    [tool.shardrepo]
    repo = "app.repo:MyRepo"
    jobs = 8
    max_failures = "2%"

    [[tool.shardrepo.stages]]
    size = 1
    max_failures = 0

In the environment they are called ``SHARDREPO_REPO``, ``SHARDREPO_JOBS`` and so on; stages are sizes, ``1,10%,rest``.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, Final, Self

from ..errors import ConfigError, unknown
from ..scripts import Source, location_of
from .plan import Share, Stage
from .planning import SCRIPTS, Rollout

PROJECT: Final = "pyproject.toml"
PREFIX: Final = "SHARDREPO_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What is set.

    Attributes:
        root: The project's folder: where its ``pyproject.toml`` is, else the current one. Paths are relative to it.
        repo: The repo, as ``module:Class``.
        script_location: Alembic's scripts, a folder or ``package:folder``.
        journal: The folder in which the journals of runs are kept.
        jobs: Databases at a time.
        per_server: Databases of one server at a time.
        stages: Parts of the fleet that are migrated one after the other.
        max_failures: How many databases may fail, a number or a percentage.
        lock_timeout: Seconds that a statement of a migration waits for a lock.
        lock_retries: How often such a migration is tried again.
        patience: Seconds to wait for another migration of the same database.
    """

    root: Path
    repo: str | None = None
    script_location: str | None = None
    journal: str = ".shardrepo"
    jobs: int | None = None
    per_server: int | None = None
    stages: Sequence[Stage] = ()
    max_failures: Share | None = None
    lock_timeout: float | None = None
    lock_retries: int | None = None
    patience: float | None = None

    @classmethod
    def load(cls, flags: Mapping[str, Any], start: Path | None = None, environ: Mapping[str, str] = os.environ) -> Self:
        """Read what is set for the project that *start*, the current folder, is in; *flags* of None are not given.

        Raises:
            ConfigError: Something is set that does not exist, or to what it cannot be.
        """
        start = (start or Path.cwd()).absolute()
        file = next((each / PROJECT for each in (start, *start.parents) if (each / PROJECT).is_file()), None)
        spoken = {name: environ[PREFIX + name.upper()] for name in _NAMES if PREFIX + name.upper() in environ}
        asked = {name: value for name, value in flags.items() if value is not None}
        given = {} if file is None else _checked(f"{file}, [tool.shardrepo]", _table(file))
        given |= _checked("the environment", spoken, PREFIX)
        given |= _checked("the options", asked)
        return cls(root=start if file is None else file.parent, **given)

    @property
    def source(self) -> Source | None:
        """The scripts; None where only the repo's own config says where they are."""
        ini, toml = self.root / "alembic.ini", self.root / PROJECT
        file = ini if ini.is_file() else toml if toml.is_file() else None
        location = self.script_location
        if location is None and (self.root / SCRIPTS).is_dir():
            location = SCRIPTS
        if location is None:
            return None
        absolute = location if ":" in location else str(self.root / location)
        return Source(location_of(absolute), None if file is None else str(file))

    @property
    def journals(self) -> Path:
        """The folder of the journals."""
        return self.root / self.journal

    def rollout(self, **more: Any) -> Rollout:
        """How a fleet is migrated, as it is set, and *more*."""
        names = ("jobs", "per_server", "stages", "max_failures", "lock_timeout", "lock_retries", "patience")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return Rollout(**{**given, "journal": self.journals, **more})


def _table(file: Path) -> Mapping[str, Any]:
    """What stands under ``[tool.shardrepo]``."""
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    for name in ("tool", "shardrepo"):
        table = table.get(name, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{file}: {name} is a table, as in [tool.shardrepo], not {table!r}")
    return table


def _checked(where: str, given: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of *given*, each as what it is; errors say that they stand *where*, and begin with *prefix*."""
    found = {}
    for name, value in given.items():
        if name not in _READERS:
            raise ConfigError(f"{where}: {unknown('setting', name, _NAMES)}")
        try:
            found[name] = _READERS[name](prefix + name.upper() if prefix else name, value)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error
    return found


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ConfigError(f"{name} must be a text, not {value!r}")
    return value


def _integer(name: str, value: Any) -> int:
    number = _number(name, value, "an integer")
    if number != int(number):
        raise ConfigError(f"{name} must be an integer, not {value!r}")
    return int(number)


def _number(name: str, value: Any, kind: str = "a number") -> float:
    with suppress(TypeError, ValueError):
        number = float(value)
        if not isinstance(value, bool) and isfinite(number):
            return number
    raise ConfigError(f"{name} must be {kind}, not {value!r}")


def _stages(name: str, value: Any) -> tuple[Stage, ...]:
    if isinstance(value, str):
        value = [size.strip() for size in value.split(",")]
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} must be a list of stages, not {value!r}")
    return tuple(each if isinstance(each, Stage) else Stage.of(each) for each in value)


_READERS: Final[Mapping[str, Any]] = {
    "repo": _text,
    "script_location": _text,
    "journal": _text,
    "jobs": _integer,
    "per_server": _integer,
    "stages": _stages,
    "max_failures": Share.of,
    "lock_timeout": _number,
    "lock_retries": _integer,
    "patience": _number,
}
_NAMES: Final = tuple(_READERS)
assert set(_NAMES) == {field.name for field in fields(Settings)} - {"root"}
