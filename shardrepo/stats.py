"""What can be seen of a cache: a snapshot of its books."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stats:
    """The books of a connection cache at one moment.

    ``attempts - failed - closed == in_use + idle + connecting + closing`` holds in every snapshot.

    Attributes:
        pool_size: The target.
        idle: Open and waiting for a borrower.
        in_use: Held by borrowers, *transient* ones included.
        connecting: Being opened.
        closing: Taken out of the cache and not yet closed.
        waiting: Callers that wait for a hard bound.
        over_target: For how many seconds, up to now, more connections than the target have been busy.
        transient: Those of *in_use* and *connecting* that do not count towards the target.
        attempts: Connects begun, ever.
        failed: Those that came to nothing.
        closed: Connections closed, ever.
        hits: Checkouts served by an idle connection, ever.
        misses: Connects begun for others, ever; not those for *transient* ones, which no idle connection could serve.
        evictions: Idle connections closed to make room, ever.
        reclaimed: Connections that came back because their borrower was lost, ever.
    """

    pool_size: int
    idle: int
    in_use: int
    connecting: int
    closing: int
    waiting: int
    transient: int
    over_target: float
    attempts: int
    failed: int
    closed: int
    hits: int
    misses: int
    evictions: int
    reclaimed: int

    @property
    def hit_rate(self) -> float:
        """The share of checkouts that an idle connection served, of those that one could; 0.0 before the first."""
        checkouts = self.hits + self.misses
        return self.hits / checkouts if checkouts else 0.0
