"""What a call is told beside its arguments: how long it may take, and how it is to be run, named and answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Final, Self, TypeAlias, TypedDict

from .errors import ConfigError, ConstraintError, unknown

# A day; what the system can wait for at once ends somewhere above.
MAX_TIMEOUT: Final = 86_400

# When the call that runs here has to be over, on the clock of `time.monotonic`; None for never.
deadline: Final[ContextVar[float | None]] = ContextVar("shardrepo deadline", default=None)

# Names the execution option in which the rows of a COPY reach the driver.
COPIED_ROWS: Final = "shardrepo_copied_rows"

ConstraintErrors: TypeAlias = Mapping[str, Callable[[ConstraintError], BaseException]]

# Would give an object another home, or a connection a mode that its next borrower knows nothing of; or have a verb
# leave its results on the server.
_OWN_EXECUTION_OPTIONS: Final = {
    "identity_token": "an object's home is its database",
    "isolation_level": "it belongs to a transaction: transaction(isolation=...)",
    "postgresql_readonly": "it belongs to a transaction: transaction(read_only=True)",
    "yield_per": "use stream(batch=...)",
    "stream_results": "use stream()",
    "postgresql_deferrable": "it belongs to a transaction: transaction(deferrable=True)",
}

_EMPTY: Final[Mapping[str, Any]] = MappingProxyType({})


class Options(TypedDict, total=False):
    """What `call_options` takes, and `default_options` returns."""

    timeout: float
    execution_options: Mapping[str, Any]
    constraint_errors: ConstraintErrors
    tags: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CallOptions:
    """How calls are run.

    Attributes:
        timeout: Seconds for each call in all; None for no limit.
        execution_options: SQLAlchemy's, for every statement.
        constraint_errors: What is raised in place of a `ConstraintError`, by the name of the constraint.
        tags: What events and log records carry.
    """

    timeout: float | None = None
    execution_options: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)
    constraint_errors: ConstraintErrors = field(default_factory=lambda: _EMPTY)
    tags: Mapping[str, Any] = field(default_factory=lambda: _EMPTY)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Self:
        """Validate *given*; raises `ConfigError`."""
        for name in given:
            if name not in _CHECKS:
                raise ConfigError(unknown("option", str(name), _CHECKS))
        return cls(**{name: _CHECKS[name](value) for name, value in given.items()})

    def __str__(self) -> str:
        given = ((f.name, getattr(self, f.name)) for f in fields(self))
        return f"call_options({', '.join(f'{name}={value}' for name, value in given if value)})"

    def over(self, outer: CallOptions | None) -> CallOptions:
        """These, and of *outer* what they leave open."""
        if outer is None:
            return self
        return CallOptions(
            timeout=outer.timeout if self.timeout is None else self.timeout,
            execution_options={**outer.execution_options, **self.execution_options},
            constraint_errors={**outer.constraint_errors, **self.constraint_errors},
            tags={**outer.tags, **self.tags},
        )


def checked_seconds(name: str, *, optional: bool = False) -> Callable[[object], float | None]:
    """Make a check of a duration, which raises `ConfigError`; None passes if the duration is *optional*."""

    def check(value: object) -> float | None:
        if value is None and optional:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool):
            wanted = "a number of seconds or None" if optional else "a number of seconds"
            raise ConfigError(f"{name} must be {wanted}, not {type(value).__name__} {value!r}")
        if not 0 < value <= MAX_TIMEOUT:
            raise ConfigError(f"{name}={value} cannot be kept: give seconds, above 0 and up to {MAX_TIMEOUT}")
        return float(value)

    return check


def _checked_names(name: str) -> Callable[[object], Mapping[str, Any]]:
    def check(value: object) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a mapping, not {type(value).__name__} {value!r}")
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{name} is a mapping by name, and {key!r} is none")
        return MappingProxyType(dict(value))

    return check


def _check_execution_options(value: object) -> Mapping[str, Any]:
    checked = _checked_names("execution_options")(value)
    for name, remedy in _OWN_EXECUTION_OPTIONS.items():
        if name in checked:
            raise ConfigError(f"execution_options must not contain {name!r}: {remedy}")
    return checked


def _check_constraint_errors(value: object) -> ConstraintErrors:
    checked: ConstraintErrors = _checked_names("constraint_errors")(value)
    for name, error in checked.items():
        if not callable(error):
            raise ConfigError(f"constraint_errors[{name!r}] must be an exception class or make one, not {error!r}")
    return checked


_CHECKS: Final[Mapping[str, Callable[[object], Any]]] = {
    "timeout": checked_seconds("timeout"),
    "execution_options": _check_execution_options,
    "constraint_errors": _check_constraint_errors,
    "tags": _checked_names("tags"),
}
