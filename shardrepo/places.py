"""Places under the hard bounds: how many are taken, and whether those who wait for one wait for each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from .entries import Entry, Scope, Wait


@dataclass(frozen=True, slots=True)
class Bounds:
    """Hard bounds on what is open or being opened; None for no bound.

    Attributes:
        max_connections: Over everything.
        max_per_server: On each server.
        max_per_database: To each database.
        max_overtake: For how many seconds the oldest waiter may be overtaken by those whom a returned connection
            serves as it is, which is cheaper than closing it for the oldest.
    """

    max_connections: int | None = None
    max_per_server: int | None = None
    max_per_database: int | None = None
    max_overtake: float = 0.05


UNBOUNDED: Final = Bounds()


class Places:
    """How many places are taken in each bounded scope. Part of a ledger's books: used under its lock.

    A permit and what is closed before its connect have one place together.
    """

    def __init__(self, bounds: Bounds) -> None:
        # The narrowest first: what has to go for it makes room under the wider ones too.
        limits = {name: getattr(bounds, name) for name in ("max_per_database", "max_per_server", "max_connections")}
        self.limits: Final[Mapping[str, int]] = {name: limit for name, limit in limits.items() if limit is not None}
        # Of those scopes alone that have any.
        self._taken: Counter[Scope] = Counter()

    def scopes(self, key: Hashable, server: Hashable) -> Sequence[Scope]:
        """The scopes in which a connection to *key*, on *server*, takes a place."""
        over = {"max_per_database": key, "max_per_server": server, "max_connections": None}
        return [(bound, over[bound]) for bound in self.limits]

    def full(self, scopes: Sequence[Scope]) -> list[Scope]:
        """Those of *scopes* that have no place left."""
        return [scope for scope in scopes if self._taken[scope] >= self.limits[scope[0]]]

    def take(self, entry: Entry[Any, Any]) -> None:
        """Book the places of a permit. What is closed before its connect leaves it those that both are in."""
        for scope in entry.places:
            for victim in entry.close:
                if scope in victim.places:
                    victim.places = [place for place in victim.places if place != scope]
                    break
            else:
                self._taken[scope] += 1

    def leave(self, entry: Entry[Any, Any]) -> None:
        """Free the places that *entry* still has: it is gone."""
        for scope in entry.places:
            self._taken[scope] -= 1
            if not self._taken[scope]:
                del self._taken[scope]

    def is_hopeless(
        self, wait: Wait[Any, Any], waiting: Sequence[Wait[Any, Any]], in_use: Collection[Entry[Any, Any]]
    ) -> bool:
        """Whether all that could make room for *wait* is held by borrowers who wait, and so on in a circle."""
        stuck = [*waiting, wait]
        while wait in stuck:
            borrowers = {one.borrower for one in stuck}
            still = [one for one in stuck if self._is_stuck(one, borrowers, in_use)]
            if len(still) == len(stuck):
                return True
            stuck = still
        return False

    def _is_stuck(
        self, wait: Wait[Any, Any], borrowers: Collection[Hashable], in_use: Collection[Entry[Any, Any]]
    ) -> bool:
        """Whether *wait* needs a place in a scope where none comes free before one of *borrowers* goes on."""
        return any(
            self._taken[scope] <= sum(scope in entry.places and entry.borrower in borrowers for entry in in_use)
            for scope in self.full(wait.scopes)
        )
