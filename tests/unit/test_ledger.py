"""The ledger's decisions: examples to read, a model to be compared with, collectors and threads that interfere."""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FrameType
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from shardrepo.breaker import Verdict
from shardrepo.entries import NOTHING, Ages, Entry, Kind, Scope, State, Step, Wait
from shardrepo.ledger import Ledger
from shardrepo.places import UNBOUNDED, Bounds

Books: TypeAlias = "Ledger[str, str]"
Slot: TypeAlias = "Entry[str, str]"
Place: TypeAlias = "Wait[str, str]"
Steps: TypeAlias = "Step[str, str]"

LEDGER = Ledger.acquire.__code__.co_filename

# How many histories the model is compared over; more for a soak.
HISTORIES = int(os.environ.get("SHARDREPO_HISTORIES", "40"))


def bounded(pool_size: int, max_connecting: int | None = None, **bounds: Any) -> Books:
    """A ledger with hard bounds, each of whose callers is another one."""
    return Ledger(pool_size, Bounds(**bounds), max_connecting=max_connecting, borrower=itertools.count().__next__)


def granted(ledger: Books, key: str, kind: Kind = Kind.KEPT, server: str = "server") -> Slot:
    grant = ledger.acquire(key, kind, server)
    assert isinstance(grant, Entry)
    return grant


def queued(ledger: Books, key: str, kind: Kind = Kind.KEPT, server: str = "server") -> Place:
    wait = ledger.acquire(key, kind, server)
    assert isinstance(wait, Wait)
    return wait


def borrow(ledger: Books, key: str, kind: Kind = Kind.KEPT) -> Slot:
    """Take a connection as the pool does: close what has to go, connect if that is what was granted."""
    entry = granted(ledger, key, kind)
    for victim in entry.close:
        ledger.closed(victim)
    if entry.state is State.CONNECTING:
        assert ledger.opened(entry, f"connection to {key}") is NOTHING
    return entry


def give_back(ledger: Books, entry: Slot, reusable: bool = True) -> None:
    for victim in ledger.release(entry, reusable).close:
        ledger.closed(victim)


def make_idle(ledger: Books, *keys: str) -> list[Slot]:
    """Open a connection for each key and return them in that order."""
    entries = [borrow(ledger, key) for key in keys]
    for entry in entries:
        give_back(ledger, entry)
    return entries


def idle_in(ledger: Books) -> list[Slot]:
    """The idle entries, least recently returned first, after a look at the ledger's own consistency."""
    of_key: dict[str, list[Slot]] = {}
    for entry in ledger._idle:
        of_key.setdefault(entry.key, []).append(entry)
    assert {key: idle for key, idle in ledger._idle_of.items() if idle} == of_key
    assert ledger._idle_of.keys() <= {entry.key for entry in ledger._opened}
    return list(ledger._idle)


def balanced(ledger: Books) -> bool:
    books = ledger.stats()
    there = books.in_use + books.idle + books.connecting + books.closing
    return books.attempts - books.failed - books.closed == there


# Examples


def test_a_miss_is_a_permit_to_connect() -> None:
    """Without an idle connection the caller gets a permit, and nothing has to go for it."""
    ledger: Books = Ledger(2)
    entry = granted(ledger, "a")
    assert (entry.state, entry.connection, list(entry.close)) == (State.CONNECTING, None, [])
    assert ledger.stats().connecting == 1


def test_a_hit_is_the_cached_connection() -> None:
    """A returned connection goes out again for the same key, without a connect."""
    ledger: Books = Ledger(2)
    (entry,) = make_idle(ledger, "a")
    again = granted(ledger, "a")
    assert again is entry
    assert (again.state, again.connection) == (State.IN_USE, "connection to a")
    assert (ledger.stats().hits, ledger.stats().attempts) == (1, 1)


def test_a_connection_of_another_key_is_no_hit() -> None:
    """A connection is never lent for a key that it was not opened for."""
    ledger: Books = Ledger(2)
    (entry,) = make_idle(ledger, "a")
    other = granted(ledger, "b")
    assert other is not entry
    assert other.state is State.CONNECTING


def test_the_most_recently_returned_goes_out_first() -> None:
    """Of several idle connections of a key the one that came back last is lent."""
    ledger: Books = Ledger(3)
    first, second, third = (borrow(ledger, "a") for _ in range(3))
    for entry in (second, third, first):
        give_back(ledger, entry)
    assert [granted(ledger, "a") for _ in range(3)] == [first, third, second]


def test_the_least_recently_returned_is_evicted_first() -> None:
    """At the target each new permit names the idle connection that was returned longest ago, whatever its key."""
    ledger: Books = Ledger(3)
    a, b, c = make_idle(ledger, "a", "b", "c")
    give_back(ledger, borrow(ledger, "a"))
    evicted = [granted(ledger, key).close for key in ("x", "y", "z")]
    assert evicted == [[b], [c], [a]]
    assert ledger.stats().evictions == 3


def test_below_the_target_nothing_is_evicted() -> None:
    """A permit that stays within the target closes nothing, the one after it does."""
    ledger: Books = Ledger(2)
    (a,) = make_idle(ledger, "a")
    assert list(granted(ledger, "b").close) == []
    assert granted(ledger, "c").close == [a]


def test_above_the_target_everybody_is_served_and_nothing_kept() -> None:
    """The target bounds nobody; what is returned above it is closed."""
    ledger: Books = Ledger(2)
    entries = [borrow(ledger, key) for key in "abcd"]
    closed = [list(ledger.release(entry).close) for entry in entries]
    assert closed == [[entries[0]], [entries[1]], [], []]
    assert idle_in(ledger) == entries[2:]


def test_a_connection_in_use_is_not_evicted() -> None:
    """With everything in use a permit above the target has no victim."""
    ledger: Books = Ledger(1)
    borrow(ledger, "a")
    assert list(granted(ledger, "b").close) == []


def test_a_connection_that_cannot_be_reused_is_closed() -> None:
    """What is returned as not reusable never becomes idle."""
    ledger: Books = Ledger(2)
    entry = borrow(ledger, "a")
    assert ledger.release(entry, reusable=False).close == (entry,)
    assert ledger.stats().idle == 0


def test_a_transient_connection_is_its_own() -> None:
    """A transient borrower gets no cached connection, evicts none, and its own is closed on return."""
    ledger: Books = Ledger(1)
    (idle,) = make_idle(ledger, "a")
    entry = borrow(ledger, "a", Kind.TRANSIENT)
    assert entry is not idle
    assert idle_in(ledger) == [idle]
    assert ledger.stats().transient == 1
    assert list(ledger.release(entry).close) == [entry]
    assert ledger.stats().transient == 0


def test_a_transient_connection_does_not_count_towards_the_target() -> None:
    """Connections are kept up to the target however many transient ones are out."""
    ledger: Books = Ledger(1)
    borrow(ledger, "sweep", Kind.TRANSIENT)
    (entry,) = make_idle(ledger, "a")
    assert idle_in(ledger) == [entry]


def test_a_pinned_connection_counts_towards_the_target() -> None:
    """A pinned connection takes a place of the target for as long as it is out."""
    ledger: Books = Ledger(1)
    borrow(ledger, "stream", Kind.PINNED)
    make_idle(ledger, "a")
    assert idle_in(ledger) == []


def test_at_the_bound_a_caller_waits_and_gets_what_is_returned() -> None:
    """A returned connection goes to the caller that waits for its key, and to nobody else."""
    ledger: Books = bounded(1, max_connections=1)
    entry = borrow(ledger, "a")
    wait = queued(ledger, "a")
    assert ledger.stats().waiting == 1
    step = ledger.release(entry)
    assert (list(step.close), list(step.wake)) == ([], [wait])
    assert wait.grant is entry
    assert (ledger.stats().waiting, ledger.stats().hits) == (0, 1)


def test_below_the_bound_nobody_waits() -> None:
    """The bound itself may be filled; the first caller above it waits."""
    ledger: Books = bounded(1, max_connections=2)
    borrow(ledger, "a")
    borrow(ledger, "b")
    queued(ledger, "c")


def test_a_waiter_for_another_key_gets_the_returned_connections_place() -> None:
    """The returned connection is evicted for the waiter, who closes it before connecting."""
    ledger: Books = bounded(1, max_connections=1)
    entry = borrow(ledger, "a")
    wait = queued(ledger, "b")
    step = ledger.release(entry)
    assert (list(step.close), list(step.wake)) == ([], [wait])
    assert wait.grant is not None
    assert (wait.grant.state, wait.grant.close) == (State.CONNECTING, [entry])


def test_an_idle_connection_is_evicted_before_anybody_waits() -> None:
    """At the bound an idle connection makes room, below the target too."""
    ledger: Books = bounded(5, max_connections=2)
    a, _ = make_idle(ledger, "a", "b")
    assert granted(ledger, "c").close == [a]


def test_a_transient_caller_evicts_when_the_bound_forces_it() -> None:
    """Only a hard bound makes a transient borrower close somebody's cached connection."""
    ledger: Books = bounded(1, max_connections=1)
    (idle,) = make_idle(ledger, "a")
    assert granted(ledger, "a", Kind.TRANSIENT).close == [idle]


def test_what_is_being_closed_counts_for_the_bound() -> None:
    """A connection keeps its place under the bound until it is closed, and then the waiter has it."""
    ledger: Books = bounded(1, max_connections=1)
    entry = borrow(ledger, "a")
    wait = queued(ledger, "b")
    assert list(ledger.release(entry, reusable=False).wake) == []
    assert list(ledger.closed(entry).wake) == [wait]


def test_an_idle_connection_does_not_hide_what_is_being_closed_from_the_bound() -> None:
    """A permit evicts an idle connection also if it is another one's closing that fills the bound."""
    ledger: Books = bounded(2, max_connections=2)
    idle, broken = borrow(ledger, "a"), borrow(ledger, "b")
    give_back(ledger, idle)
    ledger.release(broken, reusable=False)
    assert granted(ledger, "c").close == [idle]


def test_waiters_are_served_in_order() -> None:
    """Freed capacity goes to the oldest waiter; a newcomer does not overtake it."""
    ledger: Books = bounded(1, max_connections=1)
    entry = borrow(ledger, "a")
    waits = [queued(ledger, "a") for _ in range(3)]
    for wait in waits:
        assert list(ledger.release(entry).wake) == [wait]


def test_a_failed_connect_frees_its_place() -> None:
    """The place of a permit that came to nothing goes to the oldest waiter."""
    ledger: Books = bounded(1, max_connections=1)
    permit = granted(ledger, "a")
    wait = queued(ledger, "a")
    assert list(ledger.failed(permit).wake) == [wait]
    assert (ledger.stats().attempts, ledger.stats().failed) == (2, 1)


def test_giving_up_leaves_the_queue() -> None:
    """Whoever gave up is granted nothing any more, and the next in the queue is."""
    ledger: Books = bounded(1, max_connections=1)
    entry = borrow(ledger, "a")
    first, second = queued(ledger, "a"), queued(ledger, "a")
    assert ledger.give_up(first) is None
    assert list(ledger.release(entry).wake) == [second]
    assert first.grant is None


def test_giving_up_too_late_returns_the_grant() -> None:
    """A grant that came before the give-up is the caller's to use or to end."""
    ledger: Books = bounded(1, max_connections=1)
    entry = borrow(ledger, "a")
    wait = queued(ledger, "a")
    ledger.release(entry)
    assert ledger.give_up(wait) is entry


def test_callers_connect_to_a_server_one_after_the_other() -> None:
    """The next begins when a connect has ended, well or not, in the order in which they came."""
    ledger: Books = Ledger(9, max_connecting=1)
    first = granted(ledger, "a")
    waits = [queued(ledger, key) for key in "bcd"]
    assert list(ledger.opened(first, "connection").wake) == waits[:1]
    assert waits[0].grant is not None
    assert waits[0].grant.state is State.CONNECTING
    assert list(ledger.failed(waits[0].grant).wake) == waits[1:2]


def test_so_many_connect_to_a_server_at_a_time() -> None:
    """The bound itself may be filled; the first caller above it waits."""
    ledger: Books = Ledger(9, max_connecting=2)
    granted(ledger, "a")
    granted(ledger, "b")
    queued(ledger, "c")


def test_a_connect_delays_no_other_server() -> None:
    """Whoever wants another server neither waits for it nor behind those who do."""
    ledger: Books = Ledger(9, max_connecting=1)
    granted(ledger, "a")
    queued(ledger, "b")
    granted(ledger, "c", server="other")


def test_a_connect_delays_no_cached_connection() -> None:
    """What is idle is lent at once, also past those who wait to connect."""
    ledger: Books = Ledger(9, max_connecting=1)
    (idle,) = make_idle(ledger, "a")
    granted(ledger, "b")
    queued(ledger, "c")
    assert granted(ledger, "a") is idle


def test_whoever_waits_to_connect_takes_what_is_returned_meanwhile() -> None:
    """A returned connection serves the oldest waiter for its key, also above the target, and no connect is made."""
    ledger: Books = Ledger(1, max_connecting=1)
    entry = borrow(ledger, "a")
    granted(ledger, "b")
    queued(ledger, "c")
    first, second = queued(ledger, "a"), queued(ledger, "a")
    step = ledger.release(entry)
    assert (list(step.close), list(step.wake)) == ([], [first])
    assert first.grant is entry
    assert (second.grant, ledger.stats().attempts) == (None, 2)


def test_whoever_has_waited_long_enough_connects_besides_the_others() -> None:
    """A slow connect delays those behind it only for as long as they are patient."""
    ledger: Books = Ledger(9, max_connecting=1)
    granted(ledger, "a")
    first, second = queued(ledger, "b"), queued(ledger, "c")
    grant = ledger.insist(second)
    assert grant is not None
    assert (grant.key, grant.state) == ("c", State.CONNECTING)
    assert second.grant is grant
    assert (first.grant, ledger.stats().waiting) == (None, 1)


def test_insisting_does_not_break_a_hard_bound() -> None:
    """It ends the wait for a turn to connect, and leaves the place in the queue for the bound."""
    ledger: Books = bounded(9, max_connections=1, max_connecting=1)
    entry = borrow(ledger, "a")
    waits = [queued(ledger, "b"), queued(ledger, "c")]
    assert [ledger.insist(wait) for wait in waits] == [None, None]
    assert list(ledger.release(entry).wake) == waits[:1]


def test_insisting_too_late_returns_the_grant() -> None:
    """A grant that came before is the caller's, and no second one is made."""
    ledger: Books = Ledger(9, max_connecting=1)
    permit = granted(ledger, "a")
    wait = queued(ledger, "b")
    ledger.failed(permit)
    assert ledger.insist(wait) is wait.grant is not None
    assert ledger.stats().attempts == 2


def test_whoever_waits_for_another_server_is_not_overtaken() -> None:
    """A returned connection is lent past those whom its place would not help, for however long."""
    now = [0.0]
    ledger: Books = Ledger(9, Bounds(max_per_server=1), borrower=itertools.count().__next__, clock=lambda: now[0])
    entry = borrow(ledger, "a")
    ledger.opened(granted(ledger, "x", server="other"), "connection to x")
    queued(ledger, "y", server="other")
    for _ in range(3):
        now[0] += 1
        rival = queued(ledger, "b")
        own = queued(ledger, "a")
        assert list(ledger.release(entry).wake) == [own]
        assert ledger.give_up(rival) is None


def test_the_oldest_waiter_is_overtaken_for_a_while() -> None:
    """A returned connection serves who waits for its key; after `max_overtake` it is closed for the oldest."""
    now = [0.0]
    bounds = Bounds(max_connections=1, max_overtake=0.05)
    ledger: Books = Ledger(9, bounds, borrower=itertools.count().__next__, clock=lambda: now[0])
    entry = borrow(ledger, "a")
    oldest = queued(ledger, "b")
    first, second, third = (queued(ledger, "a") for _ in range(3))
    assert list(ledger.release(entry).wake) == [first]
    now[0] = 0.04
    assert list(ledger.release(entry).wake) == [second]
    now[0] = 0.05
    assert list(ledger.release(entry).wake) == [oldest]
    assert oldest.grant is not None
    assert list(oldest.grant.close) == [entry]
    assert third.grant is None


class Asking:
    """A ledger's callers, by number."""

    def __init__(self, **bounds: Any) -> None:
        self._who = 0
        self.ledger: Books = Ledger(9, Bounds(**bounds), borrower=lambda: self._who)

    def hold(self, who: int, key: str, server: str = "server") -> Slot:
        self._who = who
        entry = granted(self.ledger, key, server=server)
        self.ledger.opened(entry, key)
        return entry

    def wait(self, who: int, key: str, server: str = "server") -> Place:
        self._who = who
        return queued(self.ledger, key, server=server)


def test_waiting_for_what_one_holds_oneself_is_hopeless() -> None:
    """It is refused at once with what the caller holds, and leaves no place in the queue."""
    asking = Asking(max_connections=2)
    entries = [asking.hold(1, "a"), asking.hold(1, "b")]
    assert set(asking.wait(1, "c").held) == set(entries)
    assert asking.ledger.stats().waiting == 0


def test_waiting_for_somebody_who_does_not_wait_is_not() -> None:
    """One connection that may come back is enough, also one that is being opened or closed."""
    asking = Asking(max_connections=3)
    asking.hold(1, "a")
    asking.hold(2, "b")
    asking.hold(1, "c")
    assert not asking.wait(1, "d").held
    asking = Asking(max_connections=2)
    asking.hold(1, "a")
    granted(asking.ledger, "b")
    assert not asking.wait(1, "c").held
    asking = Asking(max_connections=2)
    asking.hold(1, "a")
    asking.ledger.release(asking.hold(1, "b"), reusable=False)
    assert not asking.wait(1, "c").held


def test_a_circle_of_three_is_closed_by_the_last_who_waits() -> None:
    """Each waits for the next one's server; only the newest wait is refused, and who holds nothing may wait."""
    asking = Asking(max_per_server=1)
    for who, server in enumerate("xyz"):
        asking.hold(who, server, server)
    assert not asking.wait(0, "y2", "y").held
    assert not asking.wait(1, "z2", "z").held
    assert not asking.wait(9, "x9", "x").held
    refused = asking.wait(2, "x2", "x")
    assert [entry.key for entry in refused.held] == ["z"]
    assert asking.ledger.stats().waiting == 3


def test_a_turn_is_what_the_caller_brings() -> None:
    """The ledger makes a turn only for who has to wait, and never sets it itself."""
    made: list[threading.Event] = []

    def make_turn() -> threading.Event:
        made.append(threading.Event())
        return made[-1]

    ledger: Books = bounded(1, max_connections=1)
    entry = ledger.acquire("a", make_turn=make_turn)
    assert isinstance(entry, Entry)
    assert made == []
    wait = ledger.acquire("a", make_turn=make_turn)
    assert isinstance(wait, Wait)
    ledger.failed(entry)
    assert made == [wait.turn]
    assert not made[0].is_set()


def test_a_reclaimed_connection_is_closed_by_the_next_step() -> None:
    """What a finaliser brought back counts as in use until the next step closes it; nobody gets it."""
    ledger: Books = Ledger(2)
    entry = borrow(ledger, "a")
    ledger.reclaimed(entry)
    assert ledger.stats().in_use == 1
    again = granted(ledger, "a")
    assert again is not entry
    assert list(again.close) == [entry]
    assert (ledger.stats().in_use, ledger.stats().closing, ledger.stats().reclaimed) == (0, 1, 1)


def test_a_waiter_closes_what_was_reclaimed_and_takes_its_place() -> None:
    """A caller that has to wait is handed the lost connection to close, which makes room for it."""
    ledger: Books = bounded(1, max_connections=1)
    entry = borrow(ledger, "a")
    ledger.reclaimed(entry)
    wait = queued(ledger, "b")
    assert list(wait.close) == [entry]
    assert list(ledger.closed(entry).wake) == [wait]


def test_discarding_a_key_closes_its_idle_connections_now_and_the_others_on_return() -> None:
    """Another key's connections are untouched by it."""
    ledger: Books = Ledger(4)
    idle, kept = make_idle(ledger, "a", "b")
    entry = granted(ledger, "a")
    assert entry is idle
    other = borrow(ledger, "a")
    ledger.release(other)
    assert list(ledger.discard("a").close) == [other]
    assert list(ledger.release(entry).close) == [entry]
    assert idle_in(ledger) == [kept]


def test_discarding_reaches_a_connection_that_is_being_opened() -> None:
    """A connect that was under way when its key was discarded does not leave an idle connection behind."""
    ledger: Books = Ledger(2)
    permit = granted(ledger, "a")
    ledger.discard("a")
    ledger.opened(permit, "connection")
    assert list(ledger.release(permit).close) == [permit]


def test_a_connection_opened_after_a_discard_is_kept() -> None:
    """A discard is of what is there, not of what comes later."""
    ledger: Books = Ledger(2)
    ledger.discard("a")
    ledger.discard()
    (entry,) = make_idle(ledger, "a")
    assert idle_in(ledger) == [entry]


def test_a_disposed_ledger_keeps_nothing() -> None:
    """Idle ones go at once, what is in use or being opened on return."""
    ledger: Books = Ledger(4)
    (idle,) = make_idle(ledger, "a")
    in_use, permit = borrow(ledger, "b"), granted(ledger, "c")
    assert list(ledger.dispose().close) == [idle]
    ledger.opened(permit, "connection")
    for entry in (in_use, permit):
        assert list(ledger.release(entry).close) == [entry]


def test_what_is_granted_after_the_disposal_is_not_kept() -> None:
    """A caller that was past the pool's own check is served, and its connection closed on return."""
    ledger: Books = Ledger(4)
    ledger.dispose()
    entry = borrow(ledger, "a")
    assert list(ledger.release(entry).close) == [entry]


def test_a_forked_child_starts_empty() -> None:
    """It is given the parent's connections to leave alone, and what it returns of them changes nothing."""
    ledger: Books = bounded(4, max_connections=4)
    make_idle(ledger, "a")
    in_use, lost = borrow(ledger, "b"), borrow(ledger, "c")
    ledger.reclaimed(lost)
    assert sorted(ledger.abandon()) == ["connection to a", "connection to b", "connection to c"]
    ledger.reclaimed(lost)
    assert ledger.release(in_use) is NOTHING
    assert ledger.sweep() is NOTHING
    books = ledger.stats()
    assert (books.attempts, books.idle, books.in_use, books.closing, books.reclaimed) == (0, 0, 0, 0, 0)


def test_a_child_forked_under_the_lock_is_not_blocked_by_it() -> None:
    """Another thread may hold the lock at the moment of a fork: the child's lock is a new one."""
    ledger: Books = Ledger(1)
    ledger._lock.acquire()
    assert in_time(lambda: (ledger.abandon(), ledger.stats().attempts)[1]) == 0


# Health


class Clocked:
    """A ledger whose time is moved by hand, with lifetimes that miss half of the tenth that may be missing."""

    def __init__(
        self, pool_size: int = 9, max_connecting: int | None = None, bounds: Bounds = UNBOUNDED, **ages: float
    ) -> None:
        self.now = 0.0
        self.ledger: Books = Ledger(
            pool_size, bounds, Ages(**ages), max_connecting, object, clock=lambda: self.now, jitter=lambda: 0.5
        )

    def refuse(self, key: str, verdict: Verdict = Verdict.REFUSED, server: str = "server") -> None:
        """Let a connect fail."""
        self.ledger.failed(granted(self.ledger, key, server=server), verdict, "why")


def closed_by(step: Steps) -> list[tuple[str, str | None]]:
    """What a step closes, and why."""
    return [(entry.key, entry.reason) for entry in step.close]


def test_what_nobody_uses_is_closed() -> None:
    """An idle connection is closed when it has been idle for long enough, and not before."""
    clocked = Clocked(idle_timeout=10)
    make_idle(clocked.ledger, "a")
    clocked.now = 5
    make_idle(clocked.ledger, "b")
    clocked.now = 9.9
    assert clocked.ledger.sweep() is NOTHING
    clocked.now = 10
    assert closed_by(clocked.ledger.sweep()) == [("a", "idle_timeout")]


def test_what_is_old_is_closed() -> None:
    """An idle connection is closed at the end of its life, however lately it was used."""
    clocked = Clocked(max_lifetime=100)
    (entry,) = make_idle(clocked.ledger, "a")
    clocked.now = 94.9
    give_back(clocked.ledger, granted(clocked.ledger, "a"))
    assert clocked.ledger.sweep() is NOTHING
    clocked.now = 95
    assert clocked.ledger.sweep().close == [entry]
    assert entry.reason == "max_lifetime"


def test_what_grows_old_in_use_is_closed_on_return() -> None:
    """A borrower keeps its connection, the next one does not get it."""
    clocked = Clocked(max_lifetime=100)
    entry = borrow(clocked.ledger, "a")
    clocked.now = 95
    assert clocked.ledger.sweep() is NOTHING
    assert closed_by(clocked.ledger.release(entry)) == [("a", "max_lifetime")]


def test_what_has_been_idle_is_suspect() -> None:
    """A connection that nobody used for longer than `check_after` is to be tested; until it was, also by the next."""
    clocked = Clocked(check_after=30)
    (entry,) = make_idle(clocked.ledger, "a")
    clocked.now = 30
    assert not granted(clocked.ledger, "a").suspect
    give_back(clocked.ledger, entry)
    clocked.now = 61
    assert granted(clocked.ledger, "a").suspect
    give_back(clocked.ledger, entry)
    assert granted(clocked.ledger, "a").suspect


def test_a_dead_connection_has_its_siblings_closed_and_its_server_doubted() -> None:
    """The idle ones of its key go; the others of its server are tested, also those in use; other servers are not."""
    ledger: Books = Ledger(9)
    entries: dict[str, list[Slot]] = {}
    for name, server in (("dead", "one"), ("dead", "one"), ("sibling", "one"), ("used", "one"), ("far", "other")):
        entry = granted(ledger, name, server=server)
        ledger.opened(entry, "connection")
        entries.setdefault(name, []).append(entry)
    for name in ("sibling", "far"):
        give_back(ledger, entries[name][0])
    dead, idle = entries["dead"]
    give_back(ledger, idle)
    assert closed_by(ledger.found_dead(dead)) == [("dead", "sibling")]
    assert closed_by(ledger.release(dead, reusable=False)) == [("dead", "broken")]
    assert [entries[name][0].suspect for name in ("sibling", "used", "far")] == [True, True, False]


def test_a_connection_that_is_opened_later_is_not_suspect() -> None:
    """What is opened after another has died is not in doubt."""
    ledger: Books = Ledger(9)
    dead = borrow(ledger, "a")
    permit = granted(ledger, "b")
    ledger.found_dead(dead)
    ledger.opened(permit, "connection")
    assert not permit.suspect


def test_doubt_closes_nothing() -> None:
    """A server that did not answer in time may only be slow."""
    ledger: Books = Ledger(9)
    (entry,) = make_idle(ledger, "a")
    ledger.doubt(entry.server)
    assert entry.suspect
    assert idle_in(ledger) == [entry]


def test_a_full_server_costs_its_oldest_idle_connection() -> None:
    """One of that server; nothing when there is none."""
    ledger: Books = Ledger(9)
    for key, server in (("far", "other"), ("a", "one"), ("b", "one")):
        entry = granted(ledger, key, server=server)
        ledger.opened(entry, "connection")
        give_back(ledger, entry)
    assert closed_by(ledger.evict("one")) == [("a", "server full")]
    assert ledger.stats().evictions == 1
    assert ledger.evict("unknown") is NOTHING


def test_every_closing_has_a_reason() -> None:
    """What is closed says why."""
    ledger: Books = Ledger(2, Bounds(max_per_database=2))
    first, second = (borrow(ledger, "a") for _ in range(2))
    give_back(ledger, first)
    assert closed_by(ledger.release(second, reusable=False)) == [("a", "broken")]
    ledger.closed(second)
    make_idle(ledger, "b")
    assert [entry.reason for entry in granted(ledger, "c").close] == ["target"]
    lost = borrow(ledger, "d")
    ledger.reclaimed(lost)
    assert ("d", "reclaimed") in closed_by(ledger.sweep())
    assert closed_by(ledger.release(borrow(ledger, "e", Kind.TRANSIENT))) == [("e", "transient")]
    kept = borrow(ledger, "f")
    ledger.discard("f")
    assert closed_by(ledger.release(kept)) == [("f", "disconnected")]


def test_what_makes_room_under_a_bound_says_so() -> None:
    """An eviction for a bound has that for a reason."""
    ledger = bounded(9, max_connections=1)
    make_idle(ledger, "a")
    assert [entry.reason for entry in granted(ledger, "b").close] == ["bound"]


def test_who_has_to_connect_to_a_server_that_is_down_fails_at_once() -> None:
    """The answer is the outage; nothing is evicted for it, and other servers are not concerned."""
    clocked = Clocked(pool_size=1)
    (idle,) = make_idle(clocked.ledger, "a")
    clocked.ledger.discard("a")
    clocked.ledger.closed(idle)
    clocked.refuse("a", server="down")
    (kept,) = make_idle(clocked.ledger, "b")
    wait = queued(clocked.ledger, "a", server="down")
    assert wait.outage is not None
    assert (wait.outage.cause, wait.outage.retry_at) == ("why", 0.1)
    assert clocked.ledger.stats().waiting == 0
    assert idle_in(clocked.ledger) == [kept]
    assert clocked.ledger.give_up(wait) is None
    assert granted(clocked.ledger, "c", server="other").state is State.CONNECTING


def test_an_idle_connection_to_a_server_that_is_down_is_lent() -> None:
    """Whoever has one may find that it answers."""
    clocked = Clocked()
    (entry,) = make_idle(clocked.ledger, "a")
    clocked.refuse("b")
    assert granted(clocked.ledger, "a") is entry


def test_those_who_wait_hear_of_an_outage_at_once() -> None:
    """A connect that is refused ends the waits of all who would have come after it."""
    clocked = Clocked(max_connecting=1)
    permit = granted(clocked.ledger, "a")
    waits = [queued(clocked.ledger, key) for key in "bcd"]
    step = clocked.ledger.failed(permit, Verdict.REFUSED, "why")
    assert list(step.wake) == waits
    assert all(wait.grant is None and wait.outage is not None for wait in waits)
    assert clocked.ledger.stats().waiting == 0


def test_whoever_insists_while_another_probes_has_left_the_queue() -> None:
    """The wait for a bound ends when the server is found to be down still."""
    clocked = Clocked(bounds=Bounds(max_per_database=1))
    borrow(clocked.ledger, "a")
    clocked.refuse("b")
    clocked.now = 0.1
    wait = queued(clocked.ledger, "a")
    assert wait.outage is None
    granted(clocked.ledger, "b")
    assert clocked.ledger.insist(wait) is None
    assert wait.outage is not None
    assert clocked.ledger.stats().waiting == 0


def test_a_probe_ends_an_outage() -> None:
    """When it is due, one may connect; when that has worked, all may."""
    clocked = Clocked()
    clocked.refuse("a")
    clocked.now = 0.1
    probe = granted(clocked.ledger, "a")
    assert queued(clocked.ledger, "b").outage is not None
    clocked.ledger.opened(probe, "connection")
    assert granted(clocked.ledger, "b").state is State.CONNECTING


def test_a_probe_that_fails_is_followed_by_another() -> None:
    """Each is due after twice the time."""
    clocked = Clocked()
    clocked.refuse("a")
    clocked.now = 0.1
    clocked.refuse("a")
    clocked.now = 0.29
    assert queued(clocked.ledger, "a").outage is not None
    clocked.now = 0.31
    assert granted(clocked.ledger, "a").state is State.CONNECTING


def test_a_forked_child_knows_of_no_outage() -> None:
    """It finds out by itself."""
    clocked = Clocked()
    clocked.refuse("a")
    clocked.ledger.abandon()
    assert granted(clocked.ledger, "a").state is State.CONNECTING


def test_how_long_the_busy_have_exceeded_the_target() -> None:
    """From the moment at which one more than the target is busy until there are no more than that."""
    clocked = Clocked(pool_size=1)
    first = borrow(clocked.ledger, "a")
    clocked.now = 1
    assert clocked.ledger.stats().over_target == 0
    second = borrow(clocked.ledger, "b")
    clocked.now = 3
    third = borrow(clocked.ledger, "c")
    clocked.now = 4
    assert clocked.ledger.stats().over_target == 3
    give_back(clocked.ledger, second)
    assert clocked.ledger.stats().over_target == 3
    give_back(clocked.ledger, third)
    assert clocked.ledger.stats().over_target == 0
    give_back(clocked.ledger, first)


def test_loans_are_listed_longest_first() -> None:
    """Each with the seconds for which it has been held."""
    clocked = Clocked()
    (again,) = make_idle(clocked.ledger, "a")
    first = borrow(clocked.ledger, "b")
    clocked.now = 2
    assert granted(clocked.ledger, "a") is again
    clocked.now = 5
    assert clocked.ledger.loans() == [(first, 5), (again, 3)]


# The model


class Down:
    """A server that is down, in the model."""

    def __init__(self, retry_at: float) -> None:
        self.retry_at = retry_at
        self.delay = 0.1
        self.probe: Slot | None = None


class Model:
    """Plain lists of what is where, and the rules of the design written out slowly."""

    def __init__(self, pool_size: int, bounds: Bounds, ages: Ages, at_a_time: int | None) -> None:
        self.pool_size = pool_size
        self.bounds = bounds
        self.ages = ages
        self.at_a_time = at_a_time
        self.since: dict[Slot, int] = {}
        self.born: dict[Slot, int] = {}
        self.suspects: set[Slot] = set()
        self.outages: dict[str, Down] = {}
        self.timeouts: dict[str, int] = {}
        self.over_since: int | None = None
        self.idle: list[Slot] = []
        self.in_use: list[Slot] = []
        self.connecting: list[Slot] = []
        self.closing: list[Slot] = []
        self.given_up: dict[Slot, list[Scope]] = {}
        self.borrowers: dict[Slot, int] = {}
        self.overtaken: dict[Place, int] = {}
        self.lost: list[Slot] = []
        self.retired: list[Slot] = []
        self.waiting: list[Place] = []
        self.insistent: list[Place] = []
        self.kinds: dict[Slot, Kind] = {}
        self.ever: list[Slot] = []
        self.disposed = False
        self.attempts = self.failed = self.closed = self.hits = self.evictions = self.reclaimed = 0

    @property
    def counted(self) -> int:
        """What counts towards the target."""
        busy = [entry for entry in self.in_use + self.connecting if self.kinds[entry] is not Kind.TRANSIENT]
        return len(self.idle) + len(busy)

    def limit(self, scope: Scope) -> int | None:
        limit: int | None = getattr(self.bounds, scope[0])
        return limit

    def full(self, key: str) -> list[Scope]:
        """The scopes in which there is no place for one more connection to *key*, the narrowest first."""
        return [scope for scope in scopes_of(key) if self.places(scope) >= (self.limit(scope) or 99)]

    def places(self, scope: Scope) -> int:
        """The places taken in a scope; a permit and the victim that is closed before it have one together."""
        here = [e for e in self.idle + self.in_use + self.connecting + self.closing if scope in scopes_of(e.key)]
        return sum(scope not in self.given_up.get(entry, ()) for entry in here)

    def sockets(self, scope: Scope) -> int:
        """The connections that a server may see in a scope: a permit connects when its victims are closed."""
        begun = [permit for permit in self.connecting if not any(victim in self.closing for victim in permit.close)]
        return sum(scope in scopes_of(entry.key) for entry in self.idle + self.in_use + begun + self.closing)

    def has_room(self, key: str) -> bool:
        return all(any(scope in scopes_of(entry.key) for entry in self.idle) for scope in self.full(key))

    def is_hopeless(self, key: str, borrower: int) -> bool:
        """Whether a wait would never end: everybody else finishes, then who can go on, and it still has no place."""
        waiting = {wait.borrower: wait.key for wait in self.waiting} | {borrower: key}
        left = [entry for entry in self.in_use if self.borrowers[entry] in waiting]
        if not any(self.borrowers[entry] == borrower for entry in left):
            return False
        while borrower in waiting:
            gone = [who for who, wanted in waiting.items() if not self.would_be_full(wanted, left)]
            if not gone:
                return True
            waiting = {who: wanted for who, wanted in waiting.items() if who not in gone}
            left = [entry for entry in left if self.borrowers[entry] in waiting]
        return False

    def would_be_full(self, key: str, left: list[Slot]) -> bool:
        """Whether there would be no place for *key* with nothing but what is *left*."""
        return any(
            sum(scope in scopes_of(entry.key) for entry in left) >= (self.limit(scope) or 99)
            for scope in scopes_of(key)
        )

    def is_refused(self, key: str, kind: Kind, now: int) -> bool:
        """Whether a caller is told that the server is down: it would have to connect, and is not the probe."""
        if kind is not Kind.TRANSIENT and any(entry.key == key for entry in self.idle):
            return False
        down = self.outages.get(server_of(key))
        return down is not None and (down.probe is not None or now < down.retry_at)

    def ended(self, permit: Slot, verdict: Verdict, now: int) -> None:
        """Note what a connect that has ended says about its server."""
        server = server_of(permit.key)
        down = self.outages.get(server)
        was_probe = down is not None and down.probe is permit
        if verdict is Verdict.ANSWERED:
            self.outages.pop(server, None)
            self.timeouts[server] = 0
        elif down is not None:
            if was_probe:
                down.probe = None
                if verdict is not Verdict.UNKNOWN:
                    down.delay = min(down.delay * 2, 2)
                    down.retry_at = now + down.delay
        elif verdict is not Verdict.UNKNOWN:
            self.timeouts[server] = self.timeouts.get(server, 0) + 1
            if verdict is Verdict.REFUSED or self.timeouts[server] == 3:
                self.outages[server] = Down(now + 0.1)
                self.timeouts[server] = 0

    def is_old(self, entry: Slot, now: int) -> bool:
        return now - self.born[entry] >= self.ages.max_lifetime * 0.95

    def may_have(self, key: str, kind: Kind, insistent: bool = False) -> bool:
        """Whether a caller is served, rather than made to wait; apart from outages."""
        if kind is not Kind.TRANSIENT and any(entry.key == key for entry in self.idle):
            return True
        connecting = sum(entry.server == server_of(key) for entry in self.connecting)
        return self.has_room(key) and (insistent or self.at_a_time is None or connecting < self.at_a_time)

    def take_over_lost(self) -> list[Slot]:
        lost, self.lost = self.lost, []
        for entry in lost:
            self.in_use.remove(entry)
        self.reclaimed += len(lost)
        self.closing += lost
        return lost

    def grant(self, key: str, kind: Kind, entry: Slot, borrower: int, now: int, lost: Sequence[Slot] = ()) -> None:
        """Check that *entry* is the one that had to be granted, with all that has to be closed before."""
        self.borrowers[entry] = borrower
        own = [idle for idle in self.idle if idle.key == key]
        self.kinds[entry] = kind
        if own and kind is not Kind.TRANSIENT:
            assert entry is own[-1]
            assert entry.kind is kind
            assert list(entry.close) == list(lost)
            if now - self.since[entry] > self.ages.check_after:
                self.suspects.add(entry)
            assert entry.suspect is (entry in self.suspects)
            self.since[entry] = now
            self.idle.remove(entry)
            self.in_use.append(entry)
            self.hits += 1
            return
        assert entry not in self.ever
        assert not self.is_refused(key, kind, now)
        if server_of(key) in self.outages:
            self.outages[server_of(key)].probe = entry
        assert (entry.key, entry.kind, entry.server) == (key, kind, server_of(key))
        self.ever.append(entry)
        self.attempts += 1
        evicted: list[Slot] = []
        for scope in self.full(key):
            if not any(scope in scopes_of(victim.key) for victim in evicted):
                evicted.append(next(idle for idle in self.idle if scope in scopes_of(idle.key)))
        others = [idle for idle in self.idle if idle not in evicted]
        if kind is not Kind.TRANSIENT:
            evicted += others[: max(0, self.counted + 1 - len(evicted) - self.pool_size)]
        assert list(entry.close) == [*lost, *evicted]
        assert all(victim.reason in ("bound", "target") for victim in evicted)
        self.idle = [idle for idle in self.idle if idle not in evicted]
        self.connecting.append(entry)
        self.closing += evicted
        self.evictions += len(evicted)
        self.share(key, evicted)

    def note_target(self, now: int) -> None:
        """Remember since when there has been more than the target."""
        if self.counted <= self.pool_size:
            self.over_since = None
        elif self.over_since is None:
            self.over_since = now

    def share(self, key: str, evicted: Sequence[Slot]) -> None:
        """Note in which scopes a victim gives its place to the permit for *key*."""
        for scope in scopes_of(key):
            for victim in evicted:
                if scope in scopes_of(victim.key):
                    self.given_up.setdefault(victim, []).append(scope)
                    break

    def settle(self, step: Steps, now: int, close: Sequence[Slot] = (), heir: Place | None = None) -> None:
        """Check what a step closes and whom it wakes."""
        expected = [*close, *self.take_over_lost()]
        self.closing += close
        if heir is not None:
            self.serve(heir, now)
        served = []
        for wait in list(self.waiting):
            if wait is heir:
                served.append(wait)
            elif self.is_refused(wait.key, wait.kind, now):
                assert wait.grant is None
                assert wait.outage is not None
                served.append(wait)
            elif self.may_have(wait.key, wait.kind, wait in self.insistent):
                self.serve(wait, now)
                served.append(wait)
        self.waiting = [wait for wait in self.waiting if wait not in served]
        assert list(step.wake) == served
        while self.idle and self.counted > self.pool_size:
            expected.append(self.idle.pop(0))
            self.closing.append(expected[-1])
            assert expected[-1].reason == "target"
        self.note_target(now)
        assert list(step.close) == expected

    def serve(self, wait: Place, now: int) -> None:
        assert wait.grant is not None
        assert isinstance(wait.borrower, int)
        self.grant(wait.key, wait.kind, wait.grant, wait.borrower, now)

    def heir_of(self, entry: Slot, now: int) -> Place | None:
        """Who is lent an entry that was just returned, past those who need its place; None if nobody is."""
        own = [wait for wait in self.waiting if wait.key == entry.key and wait.kind is not Kind.TRANSIENT]
        if not own:
            return None
        older = self.waiting[: self.waiting.index(own[0])]
        overtaken = [wait for wait in older if any(scope in scopes_of(entry.key) for scope in self.full(wait.key))]
        for wait in overtaken:
            self.overtaken.setdefault(wait, now)
        overdue = [wait for wait in overtaken if now - self.overtaken[wait] >= self.bounds.max_overtake]
        return None if overdue else own[0]


def server_of(key: str) -> str:
    """Three of the machine's keys are on one server, two on another."""
    return "one" if key in "abc" else "other"


def scopes_of(key: str) -> list[Scope]:
    """The scopes that a connection to *key* is in, the narrowest first."""
    return [("max_per_database", key), ("max_per_server", server_of(key)), ("max_connections", None)]


def pick(entries: Sequence[Any], number: int) -> Any:
    return entries[number % len(entries)]


keys = st.sampled_from("abcde")
numbers = st.integers(0, 20)
borrowers = st.integers(0, 1)
limits = st.sampled_from([None, None, 1, 2, 3])
spans = st.sampled_from([math.inf, 2, 5, 9])
verdicts = st.sampled_from([*Verdict, Verdict.UNKNOWN, Verdict.TIMED_OUT])


class LedgerAgainstModel(RuleBasedStateMachine):
    """Any history of steps: the ledger decides what the model does, and its books stay right."""

    @initialize(
        pool_size=st.integers(1, 4),
        bounds=st.builds(Bounds, limits, limits, limits, st.just(2)),
        ages=st.builds(Ages, spans, spans, spans),
        at_a_time=st.sampled_from([None, 1, 2]),
        full=st.booleans(),
    )
    def begin(self, pool_size: int, bounds: Bounds, ages: Ages, at_a_time: int | None, full: bool) -> None:
        self.now = self.borrower = 0
        self.ledger: Books = Ledger(
            pool_size,
            bounds,
            ages,
            max_connecting=at_a_time,
            borrower=lambda: self.borrower,
            clock=lambda: self.now,
            jitter=lambda: 0.5,
        )
        self.model = Model(pool_size, bounds, ages, at_a_time)
        self.gone: list[Slot] = []
        for key in "abcd"[: pool_size * full]:
            if self.model.may_have(key, Kind.PINNED):
                self.acquire(key, Kind.PINNED, 9)
        self.settle_down(0)

    @rule(key=keys, kind=st.sampled_from([Kind.KEPT, Kind.KEPT, Kind.KEPT, Kind.TRANSIENT, Kind.PINNED]), who=borrowers)
    def acquire(self, key: str, kind: Kind, who: int) -> None:
        model = self.model
        while any(wait.borrower == who for wait in model.waiting):
            who += 1
        self.borrower = who
        answer = self.ledger.acquire(key, kind, server_of(key))
        lost = model.take_over_lost()
        refused = model.is_refused(key, kind, self.now)
        assert isinstance(answer, Entry) is (not refused and model.may_have(key, kind))
        if isinstance(answer, Entry):
            model.grant(key, kind, answer, who, self.now, lost)
            model.note_target(self.now)
            return
        model.note_target(self.now)
        assert list(answer.close) == lost
        assert (answer.outage is not None) is refused
        if refused:
            assert not answer.held
            return
        assert bool(answer.held) is model.is_hopeless(key, who)
        if answer.held:
            assert set(answer.held) == {entry for entry in model.in_use if model.borrowers[entry] == who}
        else:
            model.waiting.append(answer)

    @rule(seconds=st.integers(1, 3))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(burst=st.lists(keys, min_size=2, max_size=4))
    def acquire_at_once(self, burst: list[str]) -> None:
        for who, key in enumerate(burst):
            self.acquire(key, Kind.KEPT, who)

    @rule(number=numbers)
    def settle_down(self, number: int) -> None:
        """Close what is closing, open what may be opened, and return most of it."""
        while self.model.closing:
            self.closed(number)
        while self.ready:
            self.opened(number)
        for _ in range(len(self.borrowed) * 3 // 4):
            self.release(number, reusable=True)

    @property
    def ready(self) -> list[Slot]:
        """The permits whose victims are closed."""
        return [p for p in self.model.connecting if not any(v in self.model.closing for v in p.close)]

    @precondition(lambda self: self.ready)
    @rule(number=numbers)
    def opened(self, number: int) -> None:
        permit = pick(self.ready, number)
        step = self.ledger.opened(permit, f"connection {len(self.model.ever)}")
        self.model.connecting.remove(permit)
        self.model.in_use.append(permit)
        self.model.born[permit] = self.model.since[permit] = self.now
        self.model.ended(permit, Verdict.ANSWERED, self.now)
        if self.model.disposed:
            self.model.retired.append(permit)
        self.model.settle(step, self.now)

    @precondition(lambda self: self.ready)
    @rule(number=numbers, verdict=verdicts)
    def failed(self, number: int, verdict: Verdict) -> None:
        permit = pick(self.ready, number)
        step = self.ledger.failed(permit, verdict)
        self.model.connecting.remove(permit)
        self.model.ended(permit, verdict, self.now)
        self.model.failed += 1
        self.gone.append(permit)
        self.model.settle(step, self.now)

    @property
    def borrowed(self) -> list[Slot]:
        return [entry for entry in self.model.in_use if entry not in self.model.lost]

    @precondition(lambda self: self.borrowed)
    @rule(number=numbers, reusable=st.sampled_from([True, True, True, False]))
    def release(self, number: int, reusable: bool) -> None:
        model = self.model
        entry = pick(self.borrowed, number)
        why_not = {
            "broken": not reusable,
            "disconnected": entry in model.retired,
            "transient": model.kinds[entry] is Kind.TRANSIENT,
            "max_lifetime": model.is_old(entry, self.now),
        }
        reason = next((reason for reason, applies in why_not.items() if applies), None)
        step = self.ledger.release(entry, reusable)
        model.in_use.remove(entry)
        model.since[entry] = self.now
        if reason is None:
            model.idle.append(entry)
            model.settle(step, self.now, (), model.heir_of(entry, self.now))
        else:
            model.settle(step, self.now, (entry,))
            assert entry.reason == reason

    @precondition(lambda self: self.borrowed)
    @rule(number=numbers)
    def found_dead(self, number: int) -> None:
        model = self.model
        entry = pick(self.borrowed, number)
        step = self.ledger.found_dead(entry)
        model.suspects |= {other for other in model.idle + model.in_use if other.server == entry.server}
        siblings = [other for other in model.idle if other.key == entry.key]
        model.idle = [other for other in model.idle if other not in siblings]
        model.settle(step, self.now, siblings)
        assert all(sibling.reason == "sibling" for sibling in siblings)

    @rule(key=keys)
    def doubt(self, key: str) -> None:
        self.ledger.doubt(server_of(key))
        model = self.model
        model.suspects |= {entry for entry in model.idle + model.in_use if entry.server == server_of(key)}

    @precondition(lambda self: any(entry in self.model.suspects for entry in self.borrowed))
    @rule(number=numbers)
    def tested(self, number: int) -> None:
        entry = pick([entry for entry in self.borrowed if entry in self.model.suspects], number)
        entry.suspect = False
        self.model.suspects.remove(entry)

    @rule(key=keys)
    def evict(self, key: str) -> None:
        model = self.model
        victims = [entry for entry in model.idle if entry.server == server_of(key)][:1]
        step = self.ledger.evict(server_of(key))
        model.idle = [entry for entry in model.idle if entry not in victims]
        model.evictions += len(victims)
        model.settle(step, self.now, victims)
        assert all(victim.reason == "server full" for victim in victims)

    @precondition(lambda self: self.borrowed)
    @rule(number=numbers)
    def reclaimed(self, number: int) -> None:
        entry = pick(self.borrowed, number)
        self.ledger.reclaimed(entry)
        self.model.lost.append(entry)

    @precondition(lambda self: self.model.closing)
    @rule(number=numbers)
    def closed(self, number: int) -> None:
        entry = pick(self.model.closing, number)
        step = self.ledger.closed(entry)
        self.model.closing.remove(entry)
        self.model.closed += 1
        self.gone.append(entry)
        self.model.settle(step, self.now)

    @rule(key=keys)
    def discard(self, key: str | None) -> None:
        self.check_discard(key, self.ledger.discard(key))

    @precondition(lambda self: len(self.model.ever) > 8)
    @rule(what=st.sampled_from(["fork", "dispose", "discard all"]), chance=st.integers(0, 9))
    def upheaval(self, what: str, chance: int) -> None:
        if chance == 9 and what == "fork":
            self.fork()
        elif chance == 9 and what == "dispose":
            self.model.disposed = True
            self.check_discard(None, self.ledger.dispose())
        elif chance >= 8:
            self.check_discard(None, self.ledger.discard())

    def check_discard(self, key: str | None, step: Steps) -> None:
        model = self.model
        model.retired += [e for e in model.in_use + model.connecting if key in (None, e.key)]
        close = [entry for entry in model.idle if key in (None, entry.key)]
        model.idle = [entry for entry in model.idle if entry not in close]
        model.settle(step, self.now, close)

    @rule()
    def sweep(self) -> None:
        model = self.model
        step = self.ledger.sweep()
        unused = [entry for entry in model.idle if self.now - model.since[entry] >= model.ages.idle_timeout]
        old = [entry for entry in model.idle if entry not in unused and model.is_old(entry, self.now)]
        model.idle = [entry for entry in model.idle if entry not in unused + old]
        model.settle(step, self.now, unused + old)
        assert [entry.reason for entry in unused + old] == ["idle_timeout"] * len(unused) + ["max_lifetime"] * len(old)

    @precondition(lambda self: self.model.waiting)
    @rule(number=numbers)
    def give_up(self, number: int) -> None:
        wait = pick(self.model.waiting, number)
        assert self.ledger.give_up(wait) is None
        self.model.waiting.remove(wait)

    @precondition(lambda self: self.model.waiting)
    @rule(number=numbers)
    def insist(self, number: int) -> None:
        wait = pick(self.model.waiting, number)
        grant = self.ledger.insist(wait)
        assert grant is wait.grant
        refused = self.model.is_refused(wait.key, wait.kind, self.now)
        assert (wait.outage is not None) is refused
        assert (grant is not None) is (not refused and self.model.may_have(wait.key, wait.kind, insistent=True))
        self.model.insistent.append(wait)
        if wait.is_over:
            self.model.waiting.remove(wait)
        if grant is not None:
            self.model.serve(wait, self.now)
            self.model.note_target(self.now)

    def fork(self) -> None:
        model = self.model
        theirs = [*model.idle, *model.in_use]
        assert sorted(self.ledger.abandon()) == sorted(str(entry.connection) for entry in theirs)
        self.model = Model(model.pool_size, model.bounds, model.ages, model.at_a_time)
        for entry in theirs:
            self.ledger.reclaimed(entry)
            assert self.ledger.release(entry) is NOTHING

    @invariant()
    def books_are_right(self) -> None:
        model, books = self.model, self.ledger.stats()
        assert books.idle == len(model.idle)
        assert books.in_use == len(model.in_use)
        assert books.connecting == len(model.connecting)
        assert books.closing == len(model.closing)
        assert books.waiting == len(model.waiting)
        busy = model.in_use + model.connecting
        over = model.over_since
        assert books.over_target == (0 if over is None else self.now - over)
        assert books.transient == sum(model.kinds[entry] is Kind.TRANSIENT for entry in busy)
        assert (books.attempts, books.failed, books.closed) == (model.attempts, model.failed, model.closed)
        assert (books.hits, books.evictions, books.reclaimed) == (model.hits, model.evictions, model.reclaimed)
        there = books.in_use + books.idle + books.connecting + books.closing
        assert books.attempts - books.failed - books.closed == there

    @invariant()
    def above_the_target_nothing_idle_is_kept(self) -> None:
        model, books = self.model, self.ledger.stats()
        busy = books.in_use + books.connecting - books.transient
        assert books.idle + busy <= max(model.pool_size, busy)

    @invariant()
    def the_bound_holds_and_nobody_waits_who_could_be_served(self) -> None:
        model = self.model
        for scope in {scope for key in "abcde" for scope in scopes_of(key)}:
            assert model.sockets(scope) <= (model.limit(scope) or 99)
        assert not any(model.may_have(wait.key, wait.kind, wait in model.insistent) for wait in model.waiting)
        # Who waits for a bound hears of a probe that another has begun with the next step, of its failure at once.
        down = [wait for wait in model.waiting if model.is_refused(wait.key, wait.kind, self.now)]
        assert all(model.outages[server_of(wait.key)].probe for wait in down)

    @invariant()
    def the_idle_ones_are_in_order(self) -> None:
        assert idle_in(self.ledger) == self.model.idle

    @invariant()
    def every_connection_is_in_one_place(self) -> None:
        model = self.model
        places = {
            State.IDLE: model.idle,
            State.IN_USE: model.in_use,
            State.CONNECTING: model.connecting,
            State.CLOSING: model.closing,
            State.GONE: self.gone,
        }
        everything = [entry for entries in places.values() for entry in entries]
        assert len(everything) == len(set(everything))
        for state, entries in places.items():
            assert all(entry.state is state for entry in entries)

    def teardown(self) -> None:
        """Whatever the history, it can be brought to an end, and then nothing is left."""
        if not hasattr(self, "model"):
            return
        model = self.model
        for _ in range(1000):
            if not (model.waiting or model.in_use or model.connecting or model.closing):
                break
            if model.closing:
                self.closed(0)
            elif self.ready:
                self.opened(0)
            elif self.borrowed:
                self.release(0, reusable=False)
            else:
                self.sweep()
            self.books_are_right()
        self.check_discard(None, self.ledger.discard())
        while model.closing:
            self.closed(0)
        books = self.ledger.stats()
        assert books.attempts == books.failed + books.closed


LedgerAgainstModel.TestCase.settings = settings(
    max_examples=HISTORIES,
    stateful_step_count=50,
    deadline=None,
    database=None,
    report_multiple_bugs=False,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow],
)


class TestLedgerAgainstModel(LedgerAgainstModel.TestCase):  # type: ignore[misc,valid-type]  # made by hypothesis
    """Any history of steps: the ledger decides what the model does, and its books stay right."""


@pytest.mark.parametrize("seed", [1, 2, 3, None])
def test_long_random_histories(seed: int | None) -> None:
    """The same comparison over long walks, in which full caches and queues last longer."""
    seed = seed or random.getrandbits(32)
    chance = random.Random(seed)
    machine = LedgerAgainstModel()
    for _ in range(HISTORIES):
        per_server, per_key, total = (chance.choice([None, None, number]) for number in (2, 1, chance.randint(1, 3)))
        bounds = Bounds(total, per_server, per_key, max_overtake=2)
        ages = Ages(*(chance.choice([math.inf, span]) for span in (6, 20, 4)))
        machine.begin(chance.randint(1, 4), bounds, ages, chance.choice([None, 1]), full=True)
        for _ in range(50):
            step = chance.choice(WALK)
            if step(machine, chance) is None:
                check(machine)
        machine.teardown()


WALK: list[Callable[[LedgerAgainstModel, random.Random], Any]] = [
    *[lambda machine, chance: machine.acquire(chance.choice("abcde"), Kind.KEPT, chance.randrange(2))] * 5,
    lambda machine, chance: machine.acquire(chance.choice("abcde"), chance.choice([*Kind]), chance.randrange(2)),
    lambda machine, chance: machine.time_passes(1),
    *[lambda machine, chance: machine.ready and machine.opened(chance.randrange(9))] * 3,
    *[lambda machine, chance: machine.borrowed and machine.release(chance.randrange(9), reusable=True)] * 4,
    lambda machine, chance: machine.borrowed and machine.release(chance.randrange(9), reusable=False),
    *[lambda machine, chance: machine.model.closing and machine.closed(chance.randrange(9))] * 3,
    lambda machine, chance: machine.ready and machine.failed(chance.randrange(9), chance.choice([*Verdict])),
    lambda machine, chance: machine.borrowed and machine.found_dead(chance.randrange(9)),
    lambda machine, chance: machine.doubt(chance.choice("abcde")),
    lambda machine, chance: machine.evict(chance.choice("abcde")),
    lambda machine, chance: machine.borrowed and machine.reclaimed(chance.randrange(9)),
    lambda machine, chance: machine.model.waiting and machine.give_up(chance.randrange(9)),
    lambda machine, chance: machine.model.waiting and machine.insist(chance.randrange(9)),
    lambda machine, chance: machine.settle_down(chance.randrange(9)),
    lambda machine, chance: machine.discard(chance.choice("abcde")),
    lambda machine, chance: machine.sweep(),
]


def check(machine: LedgerAgainstModel) -> None:
    """All invariants, as hypothesis checks them after each step."""
    machine.books_are_right()
    machine.above_the_target_nothing_idle_is_kept()
    machine.the_bound_holds_and_nobody_waits_who_could_be_served()
    machine.the_idle_ones_are_in_order()
    machine.every_connection_is_in_one_place()


# Collectors and threads


def in_time(function: Callable[[], Any]) -> Any:
    """Call *function* in a thread, to fail instead of hanging if it takes a lock that it holds."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()), daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive(), "deadlock"
    (result,) = results
    return result


def interrupted(step: Callable[[], object], line: int, interrupt: Callable[[], None]) -> tuple[bool, object]:
    """Run a step of the ledger and *interrupt* it before its *line*-th line, if it has so many; and its result."""
    left = line

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename != LEDGER:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                interrupt()
        return trace

    sys.settrace(trace)
    try:
        result = step()
    finally:
        sys.settrace(None)
    return left <= 0, result


class Borrower:
    """Holds a connection, and itself, so that only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def young_garbage() -> Iterator[None]:
    """No collection but those that the test asks for, so that its garbage stays in the youngest generation."""
    gc.disable()
    yield
    gc.enable()


STEPS: dict[str, Callable[[Books], object]] = {
    "miss": lambda ledger: ledger.acquire("new"),
    "hit": lambda ledger: ledger.acquire("idle"),
    "wait": lambda ledger: [ledger.acquire(f"new{number}") for number in range(3)],
    "opened": lambda ledger: ledger.opened(PARTS[ledger]["connecting"], "connection"),
    "failed": lambda ledger: ledger.failed(PARTS[ledger]["connecting"]),
    "release": lambda ledger: ledger.release(PARTS[ledger]["in use"]),
    "release to be closed": lambda ledger: ledger.release(PARTS[ledger]["in use"], reusable=False),
    "closed": lambda ledger: ledger.closed(PARTS[ledger]["closing"]),
    "discard": lambda ledger: ledger.discard(),
    "sweep": lambda ledger: ledger.sweep(),
    "give up": lambda ledger: ledger.give_up(served(ledger)),
    "insist": lambda ledger: ledger.insist(served(ledger)),
    "stats": lambda ledger: ledger.stats(),
    "dispose": lambda ledger: ledger.dispose(),
}


def served(ledger: Books) -> Place:
    return Wait("waiting", Kind.KEPT, "server", 0, grant=granted(ledger, "x"))


PARTS: weakref.WeakKeyDictionary[Books, dict[str, Slot]] = weakref.WeakKeyDictionary()


def busy_ledger() -> Books:
    """A ledger with a connection in each state."""
    ledger: Books = bounded(4, max_connections=6, max_connecting=2)
    in_use, closing = borrow(ledger, "in use"), borrow(ledger, "closing")
    make_idle(ledger, "idle")
    ledger.release(closing, reusable=False)
    PARTS[ledger] = {"in use": in_use, "closing": closing, "connecting": granted(ledger, "connecting")}
    return ledger


def check_interrupted(step: str, entangle: Callable[[Books, Slot], None]) -> None:
    """Collect what *entangle* has made garbage of before each line of a step, and look at the books."""
    line = 0
    reached = True
    while reached:
        line += 1
        ledger = busy_ledger()
        lost = borrow(ledger, "idle")
        make_idle(ledger, "idle")

        def interrupt(ledger: Books = ledger, lost: Slot = lost) -> None:
            entangle(ledger, lost)
            gc.collect(0)

        reached, result = in_time(partial(interrupted, partial(STEPS[step], ledger), line, interrupt))
        if reached:
            ledger.sweep()
            returned = lost in idle_in(ledger) or lost.state in (State.CLOSING, State.GONE)
            assert returned or lost is result  # interrupted before it had begun, it may have lent what came back
            assert balanced(ledger)
            assert ledger.stats().idle == len(idle_in(ledger)) <= ledger.pool_size
    assert line > 3


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("young_garbage")
def test_a_finaliser_may_run_at_any_line_of_a_step(step: str) -> None:
    """A borrower that is collected while a step holds the lock loses nothing, and blocks nothing."""

    def entangle(ledger: Books, lost: Slot) -> None:
        weakref.finalize(Borrower(), ledger.reclaimed, lost)

    check_interrupted(step, entangle)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.usefixtures("young_garbage")
def test_a_generator_may_be_closed_at_any_line_of_a_step(step: str) -> None:
    """A block suspended in a collected generator returns its connection by `release`, even there."""

    def block(ledger: Books, held: Slot, itself: list[object]) -> Iterator[None]:
        try:
            yield
        finally:
            for entry in ledger.release(held).close:
                ledger.closed(entry)

    def entangle(ledger: Books, held: Slot) -> None:
        itself: list[object] = []
        generator = block(ledger, held, itself)
        itself.append(generator)
        next(generator)

    check_interrupted(step, entangle)


class WatchedLock:
    """Counts how often it is taken."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.taken = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)

    def acquire(self) -> None:
        self._lock.acquire()
        self.taken += 1

    __enter__ = acquire

    def __exit__(self, *exc_info: object) -> None:
        self._lock.release()


@pytest.mark.parametrize("step", STEPS)
def test_every_step_takes_the_lock(step: str) -> None:
    """The interpreter changes threads too seldom to show each lock that is missing."""
    ledger = busy_ledger()
    ledger._lock = lock = WatchedLock(ledger._lock)  # type: ignore[assignment]  # stands in for it
    STEPS[step](ledger)
    assert lock.taken > 0


class InterruptedLock:
    """Is taken, or not, when a signal comes."""

    def __init__(self, lock: Any, *, taken: bool) -> None:
        self._lock = lock
        self._taken = taken

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)

    def acquire(self) -> None:
        if self._taken:
            self._lock.acquire()
        raise KeyboardInterrupt


@pytest.mark.parametrize("taken", [False, True], ids=["while it waits", "once it is taken"])
@pytest.mark.parametrize("step", ["acquire", "release"])
def test_a_signal_leaves_the_lock_free(step: str, taken: bool) -> None:
    """Ctrl-C while a step waits for the lock, or as soon as it has it, leaves it free and is what the caller gets."""
    ledger: Books = Ledger(2)
    entry = borrow(ledger, "a")
    free = ledger._lock
    ledger._lock = InterruptedLock(free, taken=taken)  # type: ignore[assignment]  # stands in for it
    with pytest.raises(KeyboardInterrupt):
        ledger.acquire("b") if step == "acquire" else ledger.release(entry)
    assert not ledger._in_step()


def test_a_finaliser_that_asks_for_a_connection_is_refused() -> None:
    """Inside a step it would have to wait for the thread that it interrupts: it gets an error instead."""
    ledger: Books = Ledger(2)
    with ledger._lock, pytest.raises(RuntimeError, match="finaliser"):
        ledger.acquire("a")
    assert ledger.stats().attempts == 0


def work(ledger: Books, seed: int, steps: int, errors: list[BaseException]) -> None:
    """Borrow and return at random, as a pool does, holding one connection at a time."""
    chance = random.Random(seed)
    try:
        for _ in range(steps):
            number = chance.random()
            if number < 0.02:
                finish(ledger, ledger.discard(f"key{chance.randrange(2)}{chance.randrange(5)}"))
                continue
            server = chance.randrange(2)
            grant = ledger.acquire(f"key{server}{chance.randrange(5)}", chance.choice(list(Kind)), server)
            if isinstance(grant, Wait):
                for entry in grant.close:
                    finish(ledger, ledger.closed(entry))
                assert isinstance(grant.turn, threading.Event)
                if number < 0.5 and ledger.give_up(grant) is None:
                    continue
                if number > 0.8:
                    ledger.insist(grant)
                assert grant.grant is not None or grant.turn.wait(30)
                assert grant.grant is not None
                grant = grant.grant
            use(ledger, grant, number)
    except BaseException as error:
        errors.append(error)


def use(ledger: Books, entry: Slot, number: float) -> None:
    for victim in entry.close:
        finish(ledger, ledger.closed(victim))
    if entry.state is State.CONNECTING:
        if number < 0.1:
            finish(ledger, ledger.failed(entry))
            return
        finish(ledger, ledger.opened(entry, entry.key))
    assert entry.connection == entry.key
    if number > 0.95:
        ledger.reclaimed(entry)
        finish(ledger, ledger.sweep())
    else:
        finish(ledger, ledger.release(entry, reusable=number < 0.9))


def finish(ledger: Books, step: Steps) -> None:
    for wait in step.wake:
        wait.turn.set()
    for entry in step.close:
        finish(ledger, ledger.closed(entry))


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads change places as often as the interpreter lets them."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(("bound", "at_a_time"), [(None, None), (5, None), (None, 1), (5, 2)])
@pytest.mark.usefixtures("eager_switches")
def test_threads_leave_the_books_right(bound: int | None, at_a_time: int | None) -> None:
    """Eight threads at once lose no connection, leave nobody waiting and end with what is idle."""
    ledger: Books = Ledger(4, Bounds(bound), max_connecting=at_a_time)
    errors: list[BaseException] = []
    threads = [threading.Thread(target=work, args=(ledger, seed, 500, errors), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    finish(ledger, ledger.sweep())
    books = ledger.stats()
    assert (books.in_use, books.connecting, books.closing, books.waiting, books.transient) == (0, 0, 0, 0, 0)
    assert books.idle == len(idle_in(ledger)) <= 4
    assert books.attempts - books.failed - books.closed == books.idle
    assert books.hits > 0
    assert books.evictions > 0


# What it costs


def calls_of(function: Callable[[], object]) -> int:
    """How many functions, Python's and C's, are called by *function*."""
    calls = 0

    def count(frame: object, event: str, arg: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    gc.disable()  # what it frees may call
    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls


@pytest.mark.parametrize("kept", [10, 10_000])
def test_a_hit_costs_the_same_calls_whatever_is_known(kept: int) -> None:
    """Taking and returning a cached connection is as many calls with 10 keys idle as with 10,000."""
    assert hit_calls(kept) == hit_calls(2)


def hit_calls(kept: int) -> int:
    ledger: Books = Ledger(kept)
    make_idle(ledger, *(f"key{number}" for number in range(kept)))
    return calls_of(lambda: ledger.release(granted(ledger, "key1")))


def test_a_miss_costs_the_same_calls_whatever_is_known() -> None:
    """A permit with its victim is as many calls with 10 keys idle as with 10,000."""
    ledgers: list[Books] = [Ledger(10), Ledger(10_000)]
    for ledger in ledgers:
        make_idle(ledger, *(f"key{number}" for number in range(ledger.pool_size)))
    few, many = (calls_of(partial(borrow, ledger, "new")) for ledger in ledgers)
    assert few == many


def test_nothing_grows_with_the_keys_visited() -> None:
    """After 10,000 keys the books hold what they hold after 100, the idle ones."""
    sizes = []
    for visited in (100, 10_000):
        ledger: Books = Ledger(20)
        for number in range(visited):
            give_back(ledger, borrow(ledger, f"key{number}"))
        assert [entry.key for entry in idle_in(ledger)] == [f"key{n}" for n in range(visited - 20, visited)]
        held = [part for part in vars(ledger).values() if hasattr(part, "__len__")]
        assert all(len(part) <= 20 for part in held)
        sizes.append(sum(sys.getsizeof(part) for part in held))
    assert sizes[1] <= 2 * sizes[0]
