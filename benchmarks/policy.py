"""How often the connection that is asked for is there: what the ledger lets go, against the best that could be done.

Traces go through the real ledger, offline, without a server or a thread, and beside it through lists of its size:
Belady's optimum, which knows what will be asked for, an LRU list, and two policies that resist scans, 2Q and S3-FIFO.
Six traces are drawn: `zipf` (s = 1, each access whatever the one before was), `uniform`, `sweep` (`zipf`, and after
every five accesses per database a sweep of all beside it), `shift` (`zipf`, every day of other databases), `bursts`
(`zipf`, 5 to 50 times in a row) and `visits` (`zipf`, of 32 users at a time, each 1 to 3 times before the next).
`recorded` is the demo's load on real servers, whose 32 threads run 1 to 5 operations in a database before they go to
the next. Three seeds each; the first tenth of a trace warms up and is not counted.

A connection is held while others are asked for, two on average in the drawn traces; the lists are then asked for the
n-th connection of a database, n being the first that nobody has. "One at a time", each is given back before the next is
asked for. A target of 80 for 60 databases is left out, as nothing has to go there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Final, TypeAlias

from shardrepo.entries import Entry, Kind, State
from shardrepo.ledger import Ledger

from .caches import Cache, belady, lru, s3_fifo, two_queues
from .ground import Ground
from .measure import Figure, Goal, Spread
from .traces import DRAWN, FLEETS, SEEDS, Access, connections, drawn, one_at_a_time, recorded

TARGETS: Final = (5, 20, 80)
# Where each connection is also given back before the next is asked for: the target of the other benchmarks.
_ALONE: Final = 20

OPTIMUM, LEDGER, LRU, ACROSS = "Belady's optimum", "the ledger", "an LRU list", "the ledger, swept by across"
LISTS: Final[Mapping[str, Cache]] = {OPTIMUM: belady, LRU: lru, "2Q": two_queues, "S3-FIFO": s3_fifo}

# The share of accesses that found a connection, of each subject, for each seed.
Rates: TypeAlias = Mapping[str, Sequence[float]]


def run(_: Ground) -> Iterator[Figure]:
    several: dict[int, list[Rates]] = {target: [] for target in TARGETS}
    alone: list[Rates] = []
    for databases, name in product(FLEETS, (*DRAWN, "recorded")):
        traces = [trace_of(name, databases, seed) for seed in SEEDS]
        for target in (target for target in TARGETS if target < databases):
            where = f"{name} of {databases}, target {target}"
            several[target].append(rates_of(traces, target))
            yield from _figures(where, several[target][-1])
            if target == _ALONE:
                alone.append(rates_of([one_at_a_time(trace) for trace in traces], target))
                yield from _figures(f"{where}, one at a time", alone[-1])
    for databases in FLEETS:
        found = [recorded(databases, seed).hit_rate for seed in SEEDS]
        yield Figure(f"recorded of {databases}, target 20: the Repo, when recorded", Spread.of(found), "of accesses")
    for target in TARGETS:
        yield _below_lru(f"target {target}", several[target])
    yield _below_lru(f"target {_ALONE}, one at a time", alone)


def trace_of(name: str, databases: int, seed: int) -> list[Access]:
    """The drawn trace of that name, or the recorded one."""
    return recorded(databases, seed).trace if name == "recorded" else drawn(name, databases, seed)


def rates_of(traces: Sequence[Sequence[Access]], target: int) -> Rates:
    """What each subject of the size *target* has of these traces."""
    rates = {LEDGER: [_rate(ledger(trace, target)) for trace in traces]}
    if any(access.swept for access in traces[0]):
        rates[ACROSS] = [_rate(ledger(trace, target, across=True)) for trace in traces]
    asked = [connections(trace) for trace in traces]
    return rates | {name: [_rate(cache(items, target)) for items in asked] for name, cache in LISTS.items()}


def ledger(trace: Sequence[Access], target: int, *, across: bool = False) -> Iterator[bool]:
    """Take and return connections as a pool does; with *across* a sweep's are transient, and never found."""
    books: Ledger[int, object] = Ledger(target)
    returned: dict[int, list[Entry[int, object]]] = {}
    for now, access in enumerate(trace):
        entry = books.acquire(access.database, Kind.TRANSIENT if across and access.swept else Kind.KEPT)
        assert isinstance(entry, Entry), "nobody waits where nothing is bounded"
        hit = entry.state is State.IN_USE
        if not hit:
            _close(books, entry.close)
            books.opened(entry, object())
        returned.setdefault(now + access.held, []).append(entry)
        for other in returned.pop(now, ()):
            _close(books, books.release(other).close)
        yield hit


def _close(books: Ledger[int, object], entries: Sequence[Entry[int, object]]) -> None:
    for entry in entries:
        books.closed(entry)


def _rate(hits: Iterable[bool]) -> float:
    counted = list(hits)
    return fmean(counted[len(counted) // 10 :])


def _figures(where: str, rates: Rates) -> Iterator[Figure]:
    """The optimum's hit rate, and what part of it the others reach; an LRU list is the ledger's own equal."""
    yield Figure(f"{where}: {OPTIMUM}", Spread.of(rates[OPTIMUM]), "of accesses")
    for name in rates:
        if name not in (OPTIMUM, LRU):
            parts = [rate / best for rate, best in zip(rates[name], rates[OPTIMUM], strict=True)]
            yield Figure(f"{where}: {name}", Spread.of(parts), "of the optimum")


def _below_lru(where: str, measured: Sequence[Rates]) -> Figure:
    """How far the ledger is below an LRU list, on the trace on which it is furthest below."""
    below = [
        Spread.of([one - other for one, other in zip(rates[LRU], rates[LEDGER], strict=True)]) * 100
        for rates in measured
    ]
    worst = max(below, key=lambda spread: spread.median)
    return Figure(f"{where}: the ledger below {LRU}, at most", worst, "points", Goal("≤", 2))
