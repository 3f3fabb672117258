"""The cache's decisions: which connection a caller gets, and which ones have to go.

Pure state: no I/O, no SQL, no thread of its own. Every step takes the one lock, changes the books and
returns what the caller has to do outside it: connections to close, waiters to wake. A connection is
whatever the caller says it is; a key is all that makes two of them interchangeable.

    acquire ─┬─ in use (was idle) ────────────────┬─ release ──┬─ idle
             ├─ connecting (a permit) ─┬─ opened ─┤            └─ closing ── closed
             │                         └─ failed  └─ reclaimed (by a finaliser) ── closing ── closed
             └─ Wait ── one of the two above, or give_up
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Final, Generic, Protocol, TypeVar

from .stats import Stats

K = TypeVar("K", bound=Hashable)
C = TypeVar("C")


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


_CONNECTING, _IN_USE, _IDLE = State.CONNECTING, State.IN_USE, State.IDLE
_TRANSIENT = Kind.TRANSIENT


class Entry(Generic[K, C]):
    """One connection in the books, from the permit to connect until it is closed.

    `acquire` grants one in either of two states. IN_USE: a cached connection, the caller's until `release`.
    CONNECTING: a permit to open one, which ends in `opened` or `failed`. In both, *close* holds what the
    caller has to close first.
    """

    __slots__ = ("close", "connection", "key", "kind", "retired", "server", "state", "succeeded")

    def __init__(self, key: K, kind: Kind, server: Hashable) -> None:
        self.key = key
        self.kind = kind
        self.server = server
        self.state = _CONNECTING
        self.connection: C | None = None
        self.retired = False
        # Whether a permit stands for this entry's place already, while it is being closed.
        self.succeeded = False
        self.close: Sequence[Entry[K, C]] = ()

    def __repr__(self) -> str:
        return f"<Entry {self.state.name} {self.kind.name} {self.key!r}>"


@dataclass(slots=True, eq=False)
class Wait(Generic[K, C]):
    """A place in the queue, for a hard bound or for a turn to connect. *grant* is set before *turn* is, once.

    Ends in that grant or in `give_up`. *close* holds what is to be closed meanwhile. Once it is not *patient*
    any more, it waits for no turn to connect.
    """

    key: K
    kind: Kind
    server: Hashable
    turn: Turn
    close: Sequence[Entry[K, C]]
    grant: Entry[K, C] | None = None
    patient: bool = True


@dataclass(frozen=True, slots=True)
class Step(Generic[K, C]):
    """What a step leaves to its caller: waiters to wake, entries to close. `NOTHING`, most of the time."""

    close: Sequence[Entry[K, C]]
    wake: Sequence[Wait[K, C]]


NOTHING: Final[Step[Any, Any]] = Step((), ())


class Ledger(Generic[K, C]):
    """The books of one cache. Every method may be called from any thread and does no I/O.

    Args:
        pool_size: The target, for all keys together. Above it nothing idle is kept; it bounds nobody.
        max_connections: A hard bound over everything that is open or being opened; None for no bound.
        max_connecting: How many connect to one server at a time while they are patient; None for no bound.
    """

    def __init__(self, pool_size: int, max_connections: int | None = None, max_connecting: int | None = None) -> None:
        self.pool_size: Final = pool_size
        self.max_connections: Final = max_connections
        self.max_connecting: Final = max_connecting
        # Lost connections arrive from finalisers, which the collector may run inside the locked section:
        # they append here, which needs no lock, and the next step takes them over.
        self._lost: deque[Entry[K, C]] = deque()
        self._begin()

    def _begin(self) -> None:
        # Guards everything below. Held for a few dozen bytecodes at a time, never during I/O. Reentrant only
        # so that a step can see that a finaliser called it, which the collector runs inside another step.
        self._lock = threading.RLock()
        self._in_step: Callable[[], bool] = self._lock._is_owned  # type: ignore[attr-defined]  # as Condition uses it
        # All idle entries, least recently returned first; per key the same entries in the same order, so
        # that the one to evict is always the first of its key.
        self._idle: OrderedDict[Entry[K, C], None] = OrderedDict()
        self._idle_of: dict[K, list[Entry[K, C]]] = {}
        self._in_use: set[Entry[K, C]] = set()
        self._connecting: set[Entry[K, C]] = set()
        self._connecting_to: Counter[Hashable] = Counter()
        self._waiting: list[Wait[K, C]] = []
        self.disposed = False
        # Those that count towards the target: idle, in use or connecting, and not transient.
        self._kept = 0
        self._closing = self._succeeded = self._transient = 0
        self._attempts = self._failed = self._closed = 0
        self._hits = self._evictions = self._reclaimed = 0

    def acquire(
        self,
        key: K,
        kind: Kind = Kind.KEPT,
        server: Hashable = None,
        make_turn: Callable[[], Turn] = threading.Event,
    ) -> Entry[K, C] | Wait[K, C]:
        """Decide how a caller gets a connection to *key*.

        The most recently returned connection of *key* if one is idle. Otherwise a permit to open one,
        with the connections that must be closed first to stay within the target: closing them is the
        caller's job, after the lock is gone. When a hard bound leaves no room, or enough others are
        connecting to *server*, a place in the queue, with a *turn* that is set, outside the lock and from
        any thread, when it has been granted.

        Raises:
            RuntimeError: The collector runs a finaliser inside a step of this ledger, and that asks for a
                connection: it would have to wait for the thread that it interrupts.
        """
        if self._in_step():
            raise RuntimeError("a finaliser asked for a connection while the cache was at its books: open none in one")
        with self._lock:
            lost = self._take_over_lost() if self._lost else ()
            # Whoever waits is blocked, and so is who needs the same: nobody is overtaken by this.
            grant = self._grant(key, kind, server, lost)
            if grant is not None:
                return grant
            wait = Wait(key, kind, server, make_turn(), lost)
            self._waiting.append(wait)
            return wait

    def opened(self, entry: Entry[K, C], connection: C) -> Step[K, C]:
        """A permit's connect succeeded; *connection* is in use by its caller."""
        with self._lock:
            self._end_connect(entry)
            entry.connection = connection
            entry.state = State.IN_USE
            entry.retired = entry.retired or self.disposed
            self._in_use.add(entry)
            return self._settle(())

    def failed(self, entry: Entry[K, C]) -> Step[K, C]:
        """A permit came to nothing: its connect failed or was never begun."""
        with self._lock:
            self._end_connect(entry)
            self._failed += 1
            self._count(entry.kind, -1)
            self._forget(entry)
            return self._settle(())

    def release(self, entry: Entry[K, C], reusable: bool = True) -> Step[K, C]:
        """A borrower returns its connection, the newest of the idle ones from now on.

        It is to be closed instead when it is not *reusable*, was transient, was retired meanwhile, or
        is one too many; and when a finaliser returns it, see `reclaimed`. What these books do not have in
        use changes nothing: a forked child returns what its parent has borrowed.
        """
        if self._in_step():
            self.reclaimed(entry)
            return NOTHING
        with self._lock:
            try:
                self._in_use.remove(entry)
            except KeyError:
                return NOTHING
            if not reusable or entry.retired or entry.kind is _TRANSIENT:
                return self._settle((self._retire(entry),))
            entry.state = _IDLE
            self._idle[entry] = None
            siblings = self._idle_of.get(entry.key)
            if siblings is None:
                self._idle_of[entry.key] = [entry]
            else:
                siblings.append(entry)
            if self._kept > self.pool_size or self._waiting or self._lost:
                return self._settle(())
            return NOTHING

    def reclaimed(self, entry: Entry[K, C]) -> None:
        """A connection in use came back without its borrower. Takes no lock: finalisers call this.

        It counts as in use until the next step, which hands it out to be closed; it is never reused.
        """
        self._lost.append(entry)

    def closed(self, entry: Entry[K, C]) -> Step[K, C]:
        """A connection that was handed out for closing is closed."""
        with self._lock:
            self._closing -= 1
            self._closed += 1
            self._succeeded -= entry.succeeded
            self._forget(entry)
            return self._settle(())

    def insist(self, wait: Wait[K, C]) -> Entry[K, C] | None:
        """Wait no longer for a turn to connect, only for a hard bound. Returns the grant if there is one now."""
        with self._lock:
            wait.patient = False
            if wait.grant is None:
                wait.grant = self._grant(wait.key, wait.kind, wait.server, (), patient=False)
                if wait.grant is not None:
                    self._waiting.remove(wait)
            return wait.grant

    def give_up(self, wait: Wait[K, C]) -> Entry[K, C] | None:
        """Leave the queue. Returns the grant if it came first: the caller must then use or end it."""
        with self._lock:
            if wait.grant is None:
                self._waiting.remove(wait)
            return wait.grant

    def discard(self, key: K | None = None) -> Step[K, C]:
        """Give up every connection of *key*, of all keys if None: idle ones are to be closed now, those
        in use, or being opened, when they are returned."""
        with self._lock:
            idle = list(self._idle if key is None else self._idle_of.get(key, ()))
            for entry in (*self._in_use, *self._connecting):
                entry.retired = entry.retired or key is None or entry.key == key
            return self._settle([self._take(entry) for entry in idle])

    def dispose(self) -> Step[K, C]:
        """`discard` everything, and keep nothing that is returned or opened from now on."""
        with self._lock:
            self.disposed = True
        return self.discard()

    def collect(self) -> Step[K, C]:
        """Take over what finalisers have reclaimed since the last step."""
        with self._lock:
            return self._settle(())

    def abandon(self) -> list[C]:
        """Start empty, as a forked child must; returns the parent's connections, not to be touched."""
        entries = [*self._idle, *self._in_use]
        self._lost.clear()
        self._begin()
        return [entry.connection for entry in entries if entry.connection is not None]

    def stats(self) -> Stats:
        """Read the books, all at one moment."""
        with self._lock:
            return Stats(
                pool_size=self.pool_size,
                idle=len(self._idle),
                in_use=len(self._in_use),
                connecting=len(self._connecting),
                closing=self._closing,
                waiting=len(self._waiting),
                transient=self._transient,
                attempts=self._attempts,
                failed=self._failed,
                closed=self._closed,
                hits=self._hits,
                evictions=self._evictions,
                reclaimed=self._reclaimed,
            )

    # What follows runs with the lock held.

    def _grant(
        self, key: K, kind: Kind, server: Hashable, lost: Sequence[Entry[K, C]], *, patient: bool = True
    ) -> Entry[K, C] | None:
        idle = self._idle_of.get(key)
        if idle is None or kind is _TRANSIENT:
            may = self._has_room() and not (patient and self._is_connecting_enough(server))
            return self._permit(key, kind, server, lost) if may else None
        entry = idle.pop()
        if not idle:
            del self._idle_of[key]
        del self._idle[entry]
        entry.kind = kind
        entry.state = _IN_USE
        entry.close = lost
        self._in_use.add(entry)
        self._hits += 1
        return entry

    def _is_connecting_enough(self, server: Hashable) -> bool:
        return self.max_connecting is not None and self._connecting_to[server] >= self.max_connecting

    def _has_room(self) -> bool:
        return self._excess() < 0 or bool(self._idle)

    def _excess(self) -> float:
        """How far everything that is open, or may still be, is above the hard bound; negative below it.

        A permit and the victim that is closed before its connect take one place together.
        """
        if self.max_connections is None:
            return -math.inf
        closing = self._closing - self._succeeded
        return len(self._idle) + len(self._in_use) + len(self._connecting) + closing - self.max_connections

    def _permit(self, key: K, kind: Kind, server: Hashable, lost: Sequence[Entry[K, C]]) -> Entry[K, C]:
        entry: Entry[K, C] = Entry(key, kind, server)
        self._attempts += 1
        self._connecting.add(entry)
        self._connecting_to[server] += 1
        self._count(kind, 1)
        entry.close = [*lost, *self._evict_for(kind)]
        return entry

    def _evict_for(self, kind: Kind) -> list[Entry[K, C]]:
        """Take out what has to go before a connection of *kind*, already booked, may be opened."""
        over_target = 0 if kind is _TRANSIENT else self._kept - self.pool_size
        number = min(int(max(self._excess(), over_target, 0)), len(self._idle))
        victims = [self._take(next(iter(self._idle))) for _ in range(number)]
        self._evictions += number
        for first in victims[:1]:
            first.succeeded = True
            self._succeeded += 1
        return victims

    def _end_connect(self, entry: Entry[K, C]) -> None:
        self._connecting.remove(entry)
        self._connecting_to[entry.server] -= 1
        if not self._connecting_to[entry.server]:
            del self._connecting_to[entry.server]

    def _settle(self, close: Sequence[Entry[K, C]]) -> Step[K, C]:
        """End a step: take over what was lost, serve those who wait, and keep nothing idle above the target."""
        if self._lost:
            close = [*close, *self._take_over_lost()]
        wake = self._serve() if self._waiting else ()
        if self._idle and self._kept > self.pool_size:
            close = [*close, self._take(next(iter(self._idle)))]
        return Step(close, wake) if close or wake else NOTHING

    def _serve(self) -> list[Wait[K, C]]:
        """Grant what can be granted, oldest first, and take those who were served out of the queue."""
        for wait in self._waiting:
            wait.grant = self._grant(wait.key, wait.kind, wait.server, (), patient=wait.patient)
        served = [wait for wait in self._waiting if wait.grant is not None]
        if served:
            self._waiting = [wait for wait in self._waiting if wait.grant is None]
        return served

    def _take_over_lost(self) -> list[Entry[K, C]]:
        close = []
        while self._lost:
            entry = self._lost.popleft()
            if entry in self._in_use:
                self._in_use.remove(entry)
                self._reclaimed += 1
                close.append(self._retire(entry))
        return close

    def _take(self, entry: Entry[K, C]) -> Entry[K, C]:
        """Take an idle entry out, to be closed."""
        del self._idle[entry]
        siblings = self._idle_of[entry.key]
        siblings.remove(entry)
        if not siblings:
            del self._idle_of[entry.key]
        return self._retire(entry)

    def _retire(self, entry: Entry[K, C]) -> Entry[K, C]:
        entry.state = State.CLOSING
        self._closing += 1
        self._count(entry.kind, -1)
        return entry

    def _count(self, kind: Kind, change: int) -> None:
        if kind is _TRANSIENT:
            self._transient += change
        else:
            self._kept += change

    def _forget(self, entry: Entry[K, C]) -> None:
        entry.state = State.GONE
        entry.connection = None
