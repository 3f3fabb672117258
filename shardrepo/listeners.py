"""What a repo tells those who listen: what its connections do, in which database, why, and for how long."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias, get_args

from .database import Database
from .errors import ConfigError, unknown

EventName: TypeAlias = Literal["connect", "checkout", "checkin", "evict", "close", "timeout", "query"]
Listener: TypeAlias = "Callable[[Event], object]"

NAMES: Final[tuple[EventName, ...]] = get_args(EventName)

logger: Final = logging.getLogger("shardrepo.event")


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a connection.

    Attributes:
        name: Which event it is.
        database: The database that it concerns; its repr has no password.
        duration: Seconds: to connect; to get a connection, for ``checkout``; that it was held, for ``checkin``; that
            it was idle, for ``evict``; that it was open, for ``close``; waited, for ``timeout``; to execute, for
            ``query``.
        reason: Why, for ``evict``, ``close`` and ``timeout``.
        statement: The SQL, for ``query``. Its parameters are not told.
        error: What it failed with, for ``connect`` and ``query``.
        tags: What `call_options` said about the call in which it happened.
    """

    name: EventName
    database: Database
    duration: float
    reason: str | None = None
    statement: str | None = None
    error: BaseException | None = None
    tags: Mapping[str, Any] = field(default_factory=dict)


class Listeners:
    """Those who listen to one repo, by event: each attribute is a tuple, replaced when somebody comes or goes.

    Args:
        tags: Yields what is said about the call that runs where it is called.
    """

    __slots__ = ("_inside", "_lock", "_tags", *NAMES)

    connect: tuple[Listener, ...]
    checkout: tuple[Listener, ...]
    checkin: tuple[Listener, ...]
    evict: tuple[Listener, ...]
    close: tuple[Listener, ...]
    timeout: tuple[Listener, ...]
    query: tuple[Listener, ...]

    def __init__(self, tags: Callable[[], Mapping[str, Any]] = dict) -> None:
        self._tags = tags
        self._lock = threading.Lock()
        # Whether this thread runs a listener: what it does with the repo is told to nobody.
        self._inside = threading.local()
        for name in NAMES:
            setattr(self, name, ())

    def add(self, name: str, listener: Listener) -> None:
        """Call *listener* whenever *name* happens, from now on. Raises `ConfigError` for an unknown event."""
        checked = _checked(name)
        with self._lock:
            setattr(self, checked, (*getattr(self, checked), listener))

    def remove(self, name: str, listener: Listener) -> None:
        """Do not call it any more. Raises `ConfigError` if nothing of the kind was added."""
        checked = _checked(name)
        with self._lock:
            kept = list(getattr(self, checked))
            if listener not in kept:
                raise ConfigError(f"{listener!r} does not listen to {name!r}: nothing to remove")
            kept.remove(listener)
            setattr(self, checked, tuple(kept))

    def tell(self, name: EventName, database: Database, duration: float, **facts: Any) -> None:
        """Call those who listen to *name*, one after the other. What one of them raises is logged."""
        if not getattr(self, name) or getattr(self._inside, "now", False):
            return
        event = Event(name, database, duration, tags=self._tags(), **facts)
        self._inside.now = True
        try:
            for listener in getattr(self, name):
                try:
                    listener(event)
                except Exception:
                    logger.exception("a listener to %r failed: %r", name, listener, extra=self.labels(database))
        finally:
            self._inside.now = False

    def labels(self, database: Database) -> dict[str, Any]:
        """What a log record says of what happens here to a connection of *database*."""
        return {**database.labels, "tags": self._tags()}


def _checked(name: str) -> EventName:
    if name not in NAMES:
        raise ConfigError(unknown("event", str(name), NAMES))
    return name
