"""The cache's decisions: which connection a caller gets, and which ones have to go.

Pure state: no I/O, no SQL, no thread of its own. Every step takes the one lock, changes the books and
returns what the caller has to do outside it: connections to close, waiters to wake. A connection is
whatever the caller says it is; a key is all that makes two of them interchangeable.

    acquire ─┬─ in use (was idle) ────────────────┬─ release ──┬─ idle
             ├─ connecting (a permit) ─┬─ opened ─┤            └─ closing ── closed
             │                         └─ failed  └─ reclaimed (by a finaliser) ── closing ── closed
             └─ Wait ── one of the two above, or give_up; or hopeless, or the server down
"""

from __future__ import annotations

import math
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from itertools import islice
from random import random
from time import monotonic
from typing import Final, Generic

from .breaker import Breaker, Verdict
from .entries import AGELESS, NOTHING, Ages, C, Entry, K, Kind, Reason, State, Step, Turn, Wait
from .places import UNBOUNDED, Bounds, Places
from .stats import Stats

_IN_USE, _IDLE, _TRANSIENT = State.IN_USE, State.IDLE, Kind.TRANSIENT


class Ledger(Generic[K, C]):
    """The books of one cache. Every method may be called from any thread and does no I/O.

    Args:
        pool_size: The target, for all keys together. Above it nothing idle is kept; it bounds nobody.
        bounds: The hard bounds, for which callers wait.
        ages: How old connections may grow.
        max_connecting: How many connect to one server at a time while they are patient; None for no bound.
        borrower: Tells who is asking, so that a cycle of waiters is seen.
        clock: Seconds that only go forward.
        jitter: What part of the tenth of its lifetime that may be missing a connection misses: from 0 to 1.
    """

    def __init__(
        self,
        pool_size: int,
        bounds: Bounds = UNBOUNDED,
        ages: Ages = AGELESS,
        max_connecting: int | None = None,
        borrower: Callable[[], Hashable] = threading.current_thread,
        clock: Callable[[], float] = monotonic,
        jitter: Callable[[], float] = random,
    ) -> None:
        self.pool_size: Final = pool_size
        self.bounds: Final = bounds
        self.ages: Final = ages
        self.max_connecting: Final = max_connecting
        self._borrower = borrower
        self._clock = clock
        self._jitter = jitter
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
        # that the one to evict is always the first of its key. A key may have none left, while one of its is in use.
        self._idle: OrderedDict[Entry[K, C], None] = OrderedDict()
        self._idle_of: defaultdict[K, list[Entry[K, C]]] = defaultdict(list)
        # Idle or in use, as their states say: to be lent and returned moves none about.
        self._opened: set[Entry[K, C]] = set()
        self._connecting: set[Entry[K, C]] = set()
        self._connecting_to: Counter[Hashable] = Counter()
        self._waiting: list[Wait[K, C]] = []
        self.disposed = False
        # Those that count towards the target: idle, in use or connecting, and not transient.
        self._kept = 0
        # Since when there are more of them than the target, all of them busy.
        self._over_since: float | None = None
        self._closing = self._transient = 0
        self._places = Places(self.bounds)
        self._breaker = Breaker(self._clock)
        self._attempts = self._failed = self._closed = 0
        self._hits = self._misses = self._evictions = self._reclaimed = 0

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
        any thread, when it has been granted. If it never could be, a `Wait` that says what the caller *held*;
        when nobody may connect to *server* because it is down, one with that *outage*.

        Raises:
            RuntimeError: The collector runs a finaliser inside a step of this ledger, and that asks for a
                connection: it would have to wait for the thread that it interrupts.
        """
        if self._in_step():
            raise RuntimeError("a finaliser asked for a connection while the cache was at its books: open none in one")
        # Not `with`, which takes twice as long (decision 10). Inside, as a signal may end the wait or come right after.
        try:
            self._lock.acquire()
            lost = self._take_over_lost() if self._lost else ()
            idle = self._idle_of.get(key)
            if idle and kind is not _TRANSIENT:
                if lost:
                    self._note_target()
                return self._lend(idle, kind, self._borrower() if self._places.limits else None, lost)
            wait = Wait(key, kind, server, self._borrower(), self._places.scopes(key, server), lost)
            return self._permit_or_queue(wait, make_turn)
        finally:
            if self._in_step():
                self._lock.release()

    def opened(self, entry: Entry[K, C], connection: C) -> Step[K, C]:
        """A permit's connect succeeded; *connection* is in use by its caller."""
        with self._lock:
            self._end_connect(entry, Verdict.ANSWERED)
            now = self._clock()
            entry.connection = connection
            entry.state = State.IN_USE
            entry.since = now
            entry.expires = now + self.ages.max_lifetime * (1 - self._jitter() / 10)
            entry.retired = entry.retired or self.disposed
            self._opened.add(entry)
            return self._settle(())

    def failed(self, entry: Entry[K, C], verdict: Verdict = Verdict.UNKNOWN, cause: str = "") -> Step[K, C]:
        """A permit came to nothing: its connect failed, which says *verdict* about the server, or was never begun."""
        with self._lock:
            self._end_connect(entry, verdict, cause)
            self._failed += 1
            self._count(entry.kind, -1)
            self._forget(entry)
            return self._settle(())

    def release(self, entry: Entry[K, C], reusable: bool = True) -> Step[K, C]:
        """A borrower returns its connection, the newest of the idle ones from now on.

        It is to be closed instead when it is not *reusable*, was transient, was retired meanwhile, is too old,
        or is one too many; and when a finaliser returns it, see `reclaimed`. What these books do not have in
        use changes nothing: a forked child returns what its parent has borrowed.
        """
        if self._in_step():
            self.reclaimed(entry)
            return NOTHING
        try:  # as in `acquire`
            self._lock.acquire()
            if entry.state is not _IN_USE:
                return NOTHING
            now = self._clock()
            if not reusable or entry.retired or entry.kind is _TRANSIENT or entry.expires <= now:
                return self._settle((self._retire(entry, _why(entry, reusable=reusable)),))
            entry.state = _IDLE
            entry.since = now
            self._idle[entry] = None
            self._idle_of[entry.key].append(entry)
            if self._waiting:
                self._pass_on(entry)
            elif self._kept <= self.pool_size and not self._lost:
                return NOTHING
            return self._settle(())
        finally:
            if self._in_step():
                self._lock.release()

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
            self._forget(entry)
            return self._settle(())

    def insist(self, wait: Wait[K, C]) -> Entry[K, C] | None:
        """Wait no longer for a turn to connect, only for a hard bound. Returns the grant if there is one now."""
        with self._lock:
            wait.patient = False
            if not wait.is_over:
                wait.grant = self._grant(wait)
                self._note_target()
                if wait.is_over:
                    self._waiting.remove(wait)
            return wait.grant

    def give_up(self, wait: Wait[K, C]) -> Entry[K, C] | None:
        """Leave the queue. Returns the grant if it came first: the caller must then use or end it."""
        with self._lock:
            if not wait.is_over:
                self._waiting.remove(wait)
                wait.bounds = self._bounds_of(wait)
            return wait.grant

    def discard(self, key: K | None = None) -> Step[K, C]:
        """Give up every connection of *key*, of all keys if None: idle ones are to be closed now, those
        in use, or being opened, when they are returned."""
        with self._lock:
            idle = list(self._idle if key is None else self._idle_of.get(key, ()))
            for entry in (*self._opened, *self._connecting):
                entry.retired = entry.retired or key is None or entry.key == key
            return self._settle([self._take(entry, "disconnected") for entry in idle])

    def found_dead(self, entry: Entry[K, C]) -> Step[K, C]:
        """A connection turned out to be dead: close the idle ones of its key, and doubt all others of its server.

        It is itself to be released as not reusable. Nothing happens when a finaliser calls this inside a step.
        """
        if self._in_step():
            return NOTHING
        with self._lock:
            self._doubt(entry.server)
            siblings = list(self._idle_of.get(entry.key, ()))
            return self._settle([self._take(sibling, "sibling") for sibling in siblings])

    def doubt(self, server: Hashable) -> None:
        """Have every connection to *server* tested before it is lent again."""
        with self._lock:
            self._doubt(server)

    def evict(self, server: Hashable) -> Step[K, C]:
        """Give up the idle connection to *server* that was returned longest ago, if there is one."""
        with self._lock:
            victim = next((entry for entry in self._idle if entry.server == server), None)
            if victim is None:
                return self._settle(())
            self._evictions += 1
            return self._settle([self._take(victim, "server full")])

    def sweep(self) -> Step[K, C]:
        """Close what has been idle for too long or is too old, and take over what finalisers have reclaimed."""
        with self._lock:
            now = self._clock()
            unused = [entry for entry in self._idle if now - entry.since >= self.ages.idle_timeout]
            old = [entry for entry in self._idle if entry.expires <= now and entry not in unused]
            close = [self._take(entry, "idle_timeout") for entry in unused]
            return self._settle([*close, *(self._take(entry, "max_lifetime") for entry in old)])

    def loans(self) -> list[tuple[Entry[K, C], float]]:
        """What is in use, and for how many seconds already, the longest first."""
        with self._lock:
            now = self._clock()
            return sorted(((entry, now - entry.since) for entry in self._in_use()), key=lambda loan: -loan[1])

    def dispose(self) -> Step[K, C]:
        """`discard` everything, and keep nothing that is returned or opened from now on."""
        with self._lock:
            self.disposed = True
        return self.discard()

    def abandon(self) -> list[C]:
        """Start empty, as a forked child must; returns the parent's connections, not to be touched."""
        entries = self._opened
        for entry in entries:
            entry.state = State.GONE
        self._lost.clear()
        self._begin()
        return [entry.connection for entry in entries if entry.connection is not None]

    def stats(self) -> Stats:
        """Read the books, all at one moment."""
        with self._lock:
            return Stats(
                pool_size=self.pool_size,
                idle=len(self._idle),
                in_use=len(self._in_use()),
                connecting=len(self._connecting),
                closing=self._closing,
                waiting=len(self._waiting),
                transient=self._transient,
                over_target=0.0 if self._over_since is None else self._clock() - self._over_since,
                attempts=self._attempts,
                failed=self._failed,
                closed=self._closed,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                reclaimed=self._reclaimed,
            )

    # What follows runs with the lock held.

    def _in_use(self) -> list[Entry[K, C]]:
        return [entry for entry in self._opened if entry.state is _IN_USE]

    def _grant(self, wait: Wait[K, C]) -> Entry[K, C] | None:
        idle = self._idle_of.get(wait.key)
        if idle and wait.kind is not _TRANSIENT:
            return self._lend(idle, wait.kind, wait.borrower, ())
        return self._permit(wait)

    def _lend(
        self, idle: list[Entry[K, C]], kind: Kind, borrower: Hashable, lost: Sequence[Entry[K, C]]
    ) -> Entry[K, C]:
        entry = idle.pop()
        del self._idle[entry]
        now = self._clock()
        if now - entry.since > self.ages.check_after:
            entry.suspect = True
        entry.since = now
        entry.kind = kind
        entry.state = _IN_USE
        entry.borrower = borrower
        entry.close = lost
        self._hits += 1
        return entry

    def _permit_or_queue(self, wait: Wait[K, C], make_turn: Callable[[], Turn]) -> Entry[K, C] | Wait[K, C]:
        # Whoever waits is blocked, and so is who needs the same: nobody is overtaken by this.
        grant = self._permit(wait)
        self._note_target()
        if grant is not None:
            grant.close = [*wait.close, *grant.close]
            return grant
        if wait.outage is not None:
            return wait
        wait.held = self._held_in_a_cycle(wait)
        if wait.held:
            wait.bounds = self._bounds_of(wait)
        else:
            wait.turn = make_turn()
            self._waiting.append(wait)
        return wait

    def _permit(self, wait: Wait[K, C]) -> Entry[K, C] | None:
        """Let *wait* open a connection, unless its server is down, its turn has not come or a bound leaves no room."""
        wait.outage = self._breaker.outage(wait.server)
        if wait.outage is not None:
            return None
        if wait.patient and self._connecting_to[wait.server] >= (self.max_connecting or math.inf):
            return None
        chosen = self._victims(wait)
        if chosen is None:
            return None
        victims = [self._take(victim, reason) for victim, reason in chosen]
        entry: Entry[K, C] = Entry(wait.key, wait.kind, wait.server, wait.scopes)
        entry.borrower = wait.borrower
        entry.since = self._clock()
        entry.close = victims
        entry.probes = self._breaker.begin(wait.server)
        self._attempts += 1
        self._misses += entry.kind is not _TRANSIENT
        self._connecting.add(entry)
        self._connecting_to[entry.server] += 1
        self._count(entry.kind, 1)
        self._evictions += len(victims)
        self._places.take(entry)
        return entry

    def _victims(self, wait: Wait[K, C]) -> list[tuple[Entry[K, C], Reason]] | None:
        """What has to be closed before a connection for *wait* may be opened; None if that does not make room."""
        victims: dict[Entry[K, C], Reason] = {}
        for scope in self._places.full(wait.scopes):
            if not any(scope in victim.places for victim in victims):
                victim = next((entry for entry in self._idle if scope in entry.places), None)
                if victim is None:
                    return None
                victims[victim] = "bound"
        surplus = 0 if wait.kind is _TRANSIENT else self._kept + 1 - len(victims) - self.pool_size
        if surplus > 0:
            others = (entry for entry in self._idle if entry not in victims)
            victims |= dict.fromkeys(islice(others, surplus), "target")
        return list(victims.items())

    def _end_connect(self, entry: Entry[K, C], verdict: Verdict, cause: str = "") -> None:
        self._breaker.end(entry.server, verdict, entry.probes, cause)
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
            close = [*close, self._take(next(iter(self._idle)), "target")]
        self._note_target()
        return Step(close, wake) if close or wake else NOTHING

    def _serve(self) -> list[Wait[K, C]]:
        """Grant what can be granted, oldest first, and take those whose wait is over out of the queue."""
        for wait in self._waiting:
            wait.grant = wait.grant or self._grant(wait)
        over = [wait for wait in self._waiting if wait.is_over]
        if over:
            self._waiting = [wait for wait in self._waiting if not wait.is_over]
        return over

    def _pass_on(self, entry: Entry[K, C]) -> None:
        """Lend what has just come back to the oldest who waits for its key, also past those who need its place.

        They would have it closed, and wait for a connect: strict order costs a third of the throughput. None of
        them is overtaken so for longer than `max_overtake`.
        """
        older: list[Wait[K, C]] = []
        for wait in self._waiting:
            if wait.key == entry.key and wait.kind is not _TRANSIENT:
                break
            older.append(wait)
        else:
            return
        overtaken = [other for other in older if self._needs_place_of(entry, other)]
        now = self._clock() if overtaken else 0.0
        for other in overtaken:
            other.overtaken_at = min(other.overtaken_at, now)
        if all(now - other.overtaken_at < self.bounds.max_overtake for other in overtaken):
            wait.grant = self._grant(wait)

    def _needs_place_of(self, entry: Entry[K, C], wait: Wait[K, C]) -> bool:
        return any(scope in entry.places for scope in self._places.full(wait.scopes))

    def _bounds_of(self, wait: Wait[K, C]) -> dict[str, int]:
        """The bounds, by name, that leave no room for *wait*."""
        return {bound: self._places.limits[bound] for bound, _ in self._places.full(wait.scopes)}

    def _held_in_a_cycle(self, wait: Wait[K, C]) -> list[Entry[K, C]]:
        """What the borrower of *wait* holds, if it would wait for ever; else nothing.

        A wait of somebody who holds nothing closes no cycle.
        """
        if not self._places.full(wait.scopes):
            return []
        in_use = self._in_use()
        held = [entry for entry in in_use if entry.borrower == wait.borrower]
        return held if held and self._places.is_hopeless(wait, self._waiting, in_use) else []

    def _take_over_lost(self) -> list[Entry[K, C]]:
        close = []
        while self._lost:
            entry = self._lost.popleft()
            if entry.state is _IN_USE:
                self._reclaimed += 1
                close.append(self._retire(entry, "reclaimed"))
        return close

    def _doubt(self, server: Hashable) -> None:
        for entry in self._opened:
            if entry.server == server:
                entry.suspect = True

    def _take(self, entry: Entry[K, C], reason: Reason) -> Entry[K, C]:
        """Take an idle entry out, to be closed."""
        del self._idle[entry]
        self._idle_of[entry.key].remove(entry)
        return self._retire(entry, reason)

    def _retire(self, entry: Entry[K, C], reason: Reason) -> Entry[K, C]:
        entry.state = State.CLOSING
        entry.reason = reason
        self._opened.remove(entry)
        if not self._idle_of[entry.key]:
            del self._idle_of[entry.key]
        self._closing += 1
        self._count(entry.kind, -1)
        return entry

    def _count(self, kind: Kind, change: int) -> None:
        if kind is _TRANSIENT:
            self._transient += change
        else:
            self._kept += change

    def _note_target(self) -> None:
        """Remember since when the busy exceed the target. At the end of a step: in between, anything may be."""
        if self._kept <= self.pool_size:
            self._over_since = None
        elif self._over_since is None:
            self._over_since = self._clock()

    def _forget(self, entry: Entry[K, C]) -> None:
        self._places.leave(entry)
        entry.state = State.GONE
        entry.connection = None


def _why(entry: Entry[K, C], *, reusable: bool) -> Reason:
    """Why a connection that was returned is closed."""
    if not reusable:
        return "broken"
    if entry.retired:
        return "disconnected"
    return "transient" if entry.kind is _TRANSIENT else "max_lifetime"
