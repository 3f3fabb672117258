"""What stands in a ledger's books: connections in their states, and those who wait for one."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Any, Final, Generic, Literal, Protocol, TypeAlias, TypeVar

from .breaker import Outage

K = TypeVar("K", bound=Hashable)
C = TypeVar("C")

# A hard bound, by name, and what it is over: a key, a server, or None for everything.
Scope: TypeAlias = tuple[str, Hashable]

# Why a connection is closed. The first three are evictions: an idle one has to make room for another.
Reason: TypeAlias = Literal[
    "target", "bound", "server full", "idle_timeout", "max_lifetime", "broken", "sibling", "reclaimed", "disconnected",
    "transient",
]  # fmt: skip
EVICTIONS: Final[frozenset[Reason]] = frozenset({"target", "bound", "server full"})


class Kind(Enum):
    """What a connection is borrowed for.

    KEPT is the usual: it may come from the cache and goes back into it. TRANSIENT is for sweeps and
    questions to a server: always a connection of its own, closed on return; it does not count towards the
    target and evicts nothing unless a hard bound forces it. PINNED is held for long by design, and counts.
    """

    KEPT = auto()
    TRANSIENT = auto()
    PINNED = auto()


class State(Enum):
    """Where a connection is in its life."""

    CONNECTING = auto()
    IN_USE = auto()
    IDLE = auto()
    CLOSING = auto()
    GONE = auto()


class Turn(Protocol):
    """What a waiter waits for: a `threading.Event`, or what wakes a task on its event loop."""

    def set(self) -> object: ...


@dataclass(frozen=True, slots=True)
class Ages:
    """How old connections may grow, in seconds.

    Attributes:
        idle_timeout: An idle one is closed.
        max_lifetime: Any is closed, once it is idle or returned; each up to a tenth earlier, so that those opened
            together do not all go at once.
        check_after: An idle one is tested before it is used.
    """

    idle_timeout: float = math.inf
    max_lifetime: float = math.inf
    check_after: float = math.inf


AGELESS: Final = Ages()


class Entry(Generic[K, C]):
    """One connection in the books, from the permit to connect until it is closed.

    `acquire` grants one in either of two states. IN_USE: a cached connection, the caller's until `release`.
    CONNECTING: a permit to open one, which ends in `opened` or `failed`. In both, *close* holds what the
    caller has to close first.

    Attributes:
        since: When it came into its present state.
        expires: When it is too old.
        suspect: Whether it may be dead: it is to be tested before use.
        probes: The outage that this connect tries to end, if it is its probe.
        reason: Why it is closed, once it is.
    """

    __slots__ = (
        *("borrower", "close", "connection", "expires", "key", "kind", "places", "probes", "reason", "retired"),
        *("server", "since", "state", "suspect"),
    )

    def __init__(self, key: K, kind: Kind, server: Hashable, places: Sequence[Scope]) -> None:
        self.key = key
        self.kind = kind
        self.server = server
        # The bounded scopes in which it takes a place; one that is closed for a permit leaves it those in common.
        self.places = places
        self.borrower: Hashable = None
        self.state = State.CONNECTING
        self.connection: C | None = None
        self.since = 0.0
        self.expires = math.inf
        self.retired = self.suspect = False
        self.probes: Outage | None = None
        self.reason: Reason | None = None
        self.close: Sequence[Entry[K, C]] = ()

    def __repr__(self) -> str:
        return f"<Entry {self.state.name} {self.kind.name} {self.key!r}>"


@dataclass(slots=True, eq=False)
class Wait(Generic[K, C]):
    """A place in the queue, for a hard bound or for a turn to connect. *grant* is set before *turn* is, once.

    *scopes* are the bounded ones in which the connection would take a place. Ends in that grant or in `give_up`.
    *close* holds what is to be closed meanwhile. Once it is not *patient* any more, it waits for no turn to
    connect. If it would wait for ever, because all that could make room is held by borrowers who wait
    themselves, it is not in the queue and *held* is what its own borrower holds. It ends with an *outage* when
    nobody may connect to its server. When it ends without a grant, *bounds* are those that left no room.
    """

    key: K
    kind: Kind
    server: Hashable
    borrower: Hashable
    scopes: Sequence[Scope] = ()
    close: Sequence[Entry[K, C]] = ()
    held: Sequence[Entry[K, C]] = ()
    bounds: Mapping[str, int] = field(default_factory=dict)
    grant: Entry[K, C] | None = None
    outage: Outage | None = None
    patient: bool = True
    overtaken_at: float = math.inf
    turn: Turn = field(init=False, repr=False)

    @property
    def is_over(self) -> bool:
        """Whether it has left the queue."""
        return self.grant is not None or self.outage is not None


@dataclass(frozen=True, slots=True)
class Step(Generic[K, C]):
    """What a step leaves to its caller: waiters to wake, entries to close. `NOTHING`, most of the time."""

    close: Sequence[Entry[K, C]]
    wake: Sequence[Wait[K, C]]


NOTHING: Final[Step[Any, Any]] = Step((), ())
