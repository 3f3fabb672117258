"""Listening to a repo, in the style of `sqlalchemy.event`.

    >>> from shardrepo import event
    >>> @event.listens_for(MyRepo, "checkout")
    ... def note(happened: event.Event) -> None:
    ...     print(happened.database.name)

The events are ``connect checkout checkin evict close timeout query``; see `Event` for what each carries. A listener
is called in the thread where it happened, when the cache has done its own part: one that raises is logged, one that
takes long delays nobody but its caller, and what a listener does with the repo itself is told to nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .listeners import Event, EventName, Listener
from .repo import Repo

__all__ = ["Event", "EventName", "Listener", "listen", "listens_for", "remove"]

L = TypeVar("L", bound=Listener)


def listen(repo: type[Repo], name: EventName, listener: Listener) -> None:
    """Call *listener* with an `Event` whenever *name* happens on *repo*, or on one that shares its cache.

    Raises:
        ConfigError: There is no such event.
    """
    repo._router.listeners.add(name, listener)


def listens_for(repo: type[Repo], name: EventName) -> Callable[[L], L]:
    """`listen`, as a decorator."""

    def decorate(listener: L) -> L:
        listen(repo, name, listener)
        return listener

    return decorate


def remove(repo: type[Repo], name: EventName, listener: Listener) -> None:
    """Undo `listen`.

    Raises:
        ConfigError: There is no such event, or the listener does not listen to it.
    """
    repo._router.listeners.remove(name, listener)
