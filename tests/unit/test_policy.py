"""What the benchmark `policy` compares the ledger with: lists of what is kept, and the traces that go through them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random

import pytest

from benchmarks.caches import Cache, belady, lru, s3_fifo, two_queues
from benchmarks.policy import ledger
from benchmarks.traces import DRAWN, FLEETS, LENGTH, SEEDS, Access, connections, drawn, one_at_a_time, recorded

CACHES: list[Cache] = [lru, two_queues, s3_fifo]


def hits(cache: Cache, asked: str, size: int) -> str:
    """The trace as it was asked for, what was not there in capitals."""
    found = cache(asked, size)
    return "".join(item if hit else item.upper() for item, hit in zip(asked, found, strict=True))


@pytest.mark.parametrize(("size", "found"), [(3, "ABCDabEabCDe"), (4, "ABCDabEabcDe")])
def test_the_optimum_of_a_known_trace(size: int, found: str) -> None:
    """Belady's own example of twelve accesses misses seven times with three places, and six times with four."""
    assert hits(belady, "abcdabeabcde", size) == found


@pytest.mark.parametrize(("size", "found"), [(3, "ABCDABEabCDE"), (4, "ABCDabEabCDE")])
def test_the_least_recently_used_of_a_known_trace(size: int, found: str) -> None:
    """An LRU list misses ten times on it with three places, and eight times with four."""
    assert hits(lru, "abcdabeabcde", size) == found


def test_two_queues_keep_what_is_asked_for_again_through_a_scan() -> None:
    """What came back after it had left the queue of the new ones stays, however many are asked for once."""
    assert hits(two_queues, "abcdeabfghijkab", 4) == "ABCDEABFGHIJKab"
    assert hits(lru, "abcdeabfghijkab", 4) == "ABCDEABFGHIJKAB"


def test_two_queues_count_uses_in_a_row_once() -> None:
    """What is used again while it is new does not get into the list: it leaves the queue when its turn comes."""
    assert hits(two_queues, "aaaabcdea", 4) == "AaaaBCDEA"


def test_s3_fifo_keeps_what_is_used_twice_through_a_scan() -> None:
    """What is used twice while it is new moves into the main queue, and the scan goes through the small one."""
    assert hits(s3_fifo, "aaabcdefghia", 4) == "AaaBCDEFGHIa"
    assert hits(lru, "aaabcdefghia", 4) == "AaaBCDEFGHIA"


def test_s3_fifo_lets_go_what_is_used_once() -> None:
    """One use while it is new does not keep it; asked for again soon, it comes back into the main queue and stays."""
    assert hits(s3_fifo, "aabcdeafghija", 4) == "AaBCDEAFGHIJa"


def test_s3_fifo_ages_what_is_in_the_main_queue() -> None:
    """With nothing small left the main queue goes round: the used one stays, and the first unused one goes."""
    assert hits(s3_fifo, "aaabbbcccdbddebc", 3) == "AaaBbbCccDbddEbC"


def test_s3_fifo_gives_new_ones_a_tenth() -> None:
    """However little is in the small queue, a full main one loses nothing to what is new."""
    assert hits(s3_fifo, "aaabbbcccdefabc", 4) == "AaaBbbCccDEFabc"


def test_s3_fifo_counts_three_uses() -> None:
    """What was used much stays for three rounds of the main queue, and goes in the fourth."""
    assert hits(s3_fifo, "aaabcaaaaaccdddeeefffga", 2) == "AaaBCaaaaaccDddEeeFffGA"
    assert hits(s3_fifo, "aaabcaaaaaccdddeeefffa", 2) == "AaaBCaaaaaccDddEeeFffa"


def test_what_is_long_gone_is_new() -> None:
    """Both remember only so many of those that went: who comes back later than that is as good as never seen."""
    assert hits(two_queues, "abcdefgahijka", 4) == "ABCDEFGAHIJKA"
    assert hits(s3_fifo, "abcdefghaijklma", 4) == "ABCDEFGHAIJKLMA"


def most_hits(asked: Sequence[str], size: int) -> int:
    """The best of all ways to drop, tried one by one."""
    best = {frozenset[str](): 0}
    for item in asked:
        after: dict[frozenset[str], int] = {}
        for kept, found in best.items():
            ways = [kept] if item in kept or len(kept) < size else [kept - {gone} for gone in kept]
            for way in ways:
                after[way | {item}] = max(after.get(way | {item}, 0), found + (item in kept))
        best = after
    return max(best.values())


@pytest.mark.parametrize("seed", range(20))
def test_nobody_does_better_than_the_optimum(seed: int) -> None:
    """Belady's choice finds as much as the best of all choices, and every other cache finds at most that."""
    chance = Random(seed)
    asked = chance.choices("abcdefg", (7, 6, 5, 4, 3, 2, 1), k=40)
    size = chance.randint(1, 4)
    best = most_hits(asked, size)
    assert sum(belady(asked, size)) == best
    assert max(sum(cache(asked, size)) for cache in CACHES) <= best


@pytest.mark.parametrize("cache", CACHES, ids=["lru", "two_queues", "s3_fifo"])
def test_what_all_fits_stays(cache: Cache) -> None:
    """While nothing has to go, only the first access to each finds nothing."""
    assert hits(cache, "abcabcabcdabcd", 4) == "ABCabcabcDabcd"


@pytest.mark.parametrize("name", DRAWN)
def test_one_at_a_time_the_ledger_is_an_lru_list(name: str) -> None:
    """Without a second connection in use the ledger finds exactly what an LRU list of its size finds."""
    trace = one_at_a_time(drawn(name, 60, seed=1)[:2000])
    assert list(ledger(trace, 20)) == list(lru(connections(trace), 20))


def test_a_connection_in_use_is_not_found() -> None:
    """Whoever asks for a database whose connection is held gets another one, which is kept as well."""
    trace = [Access(1, held=1), Access(1), Access(1, held=1), Access(1)]
    assert list(ledger(trace, 2)) == [False, False, True, True]
    assert connections(trace) == [(1, 0), (1, 1), (1, 0), (1, 1)]


def test_a_sweep_across_drives_out_nothing() -> None:
    """Swept by `across`, databases are not found and not kept, and those in use otherwise stay."""
    trace = [Access(1), Access(2, swept=True), Access(3, swept=True), Access(2, swept=True), Access(1)]
    assert list(ledger(trace, 1, across=True)) == [False, False, False, False, True]
    assert list(ledger(trace, 1)) == [False] * 5


@pytest.mark.parametrize(("name", "databases"), [*product(DRAWN, FLEETS)])
def test_a_drawn_trace_is_the_same_again(name: str, databases: int) -> None:
    """The same name, databases and seed draw the same accesses, and another seed draws others."""
    trace = drawn(name, databases, seed=1)
    assert trace == drawn(name, databases, seed=1) != drawn(name, databases, seed=2)
    assert len(trace) == LENGTH
    assert {access.database for access in trace} <= set(range(databases))


def test_a_sweep_goes_through_every_database() -> None:
    """The sweep's accesses are those of each database in turn."""
    swept = [access.database for access in drawn("sweep", 60, seed=1) if access.swept]
    assert swept[:120] == [*range(60)] * 2


@pytest.mark.parametrize(("databases", "seed"), [*product(FLEETS, SEEDS)])
def test_the_recorded_traces_are_there(databases: int, seed: int) -> None:
    """Each is of thousands of accesses to its databases, and tells the hit rate that the Repo had."""
    trace, hit_rate = recorded(databases, seed)
    assert len(trace) > 1_000
    assert {access.database for access in trace} <= set(range(databases))
    assert max(access.held for access in trace) > 0
    assert 0 < hit_rate < 1
