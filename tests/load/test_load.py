"""The main job under load: many threads, many databases, one target, as the servers see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # has no stubs of its own
import pytest
from sqlalchemy.engine import URL

from shardrepo import event
from shardrepo.demo.drivers import RepoDriver
from shardrepo.demo.fleet import audit
from shardrepo.demo.load import Load, Plan, trace
from shardrepo.demo.models import Customer
from shardrepo.demo.record import Record, Recorder, samples_over
from shardrepo.demo.sampler import INTERVAL, Interval, Sample, Sampler
from shardrepo.entries import Entry, Kind, Wait
from shardrepo.ledger import Ledger
from shardrepo.stats import Stats
from shardrepo.testing.servers import Servers

from ..conftest import LONG

OPERATIONS = 100_000 if LONG else 20_000
POOL_SIZE = 20
# The long run draws a database for each operation, and thereby misses three times as often.
PLAN = Plan(threads=8, think=0.005, seconds=None, operations=OPERATIONS, visit=1 if LONG else 5)

pytestmark = pytest.mark.timeout(1200 if LONG else 240)

Checkout = tuple[str, Entry[Any, Any]]


@dataclass(frozen=True)
class Run:
    """One load, as its threads, the cache's books and the servers saw it."""

    load: Load
    stats: Stats
    record: Record
    samples: Sequence[Sample]
    checkouts: Sequence[Checkout]
    audit: Sequence[tuple[str, int, int]]


@pytest.fixture(scope="module")
def run(servers: Servers, urls: list[URL]) -> Run:
    """The load, run once for all tests of this module."""
    driver = RepoDriver("load", POOL_SIZE)
    load = Load(driver, urls, PLAN)
    with Recorder(driver.ledger) as recorder, Sampler([server.url() for server in servers], "load") as sampler:
        checkouts = listen(driver.ledger)
        load.start()
        while not load.wait(0.1):
            sampler.drain()
        sampler.drain_after(load.ended + 0.5)
        stats = driver.stats()
        # Before the repo is disposed: everything must be found by others while its connections are open.
        audited = list(audit(urls))
        driver.dispose()
    run = Run(load, stats, recorder.record, sampler.samples, checkouts, audited)
    print(summary(run))
    return run


def listen(ledger: Ledger[Any, Any]) -> list[Checkout]:
    """Record every checkout and every return, in the order in which they happen; a wait when it is granted."""
    events: list[Checkout] = []
    acquire, give_up, release = ledger.acquire, ledger.give_up, ledger.release

    def heard_acquire(key: Any, kind: Kind = Kind.KEPT, *more: Any) -> Any:
        entry = acquire(key, kind, *more)
        if isinstance(entry, Entry):
            events.append(("acquire", entry))
        return entry

    def heard_give_up(wait: Wait[Any, Any]) -> Any:
        entry = give_up(wait)
        if entry is not None:
            events.append(("acquire", entry))
        return entry

    def heard_release(entry: Entry[Any, Any], reusable: bool = True) -> Any:
        events.append(("release", entry))
        return release(entry, reusable)

    ledger.acquire, ledger.release = heard_acquire, heard_release  # type: ignore[assignment, method-assign]
    ledger.give_up = heard_give_up  # type: ignore[method-assign]
    return events


def offline_hit_rate(checkouts: Sequence[Checkout], size: int) -> float:
    """The hit rate of a textbook LRU of *size* on the same checkouts and returns, nothing in use evicted."""
    idle: OrderedDict[int, Any] = OrderedDict()
    numbers = count()
    hits = in_use = total = 0
    for what, entry in checkouts:
        if what == "acquire":
            total, in_use = total + 1, in_use + 1
            found = next((number for number, key in reversed(idle.items()) if key == entry.key), None)
            if found is not None:
                hits += 1
                del idle[found]
        else:
            in_use -= 1
            idle[next(numbers)] = entry.key
        while idle and len(idle) + in_use > size:
            idle.popitem(last=False)
    return hits / total


def summary(run: Run) -> str:
    """The figures of a run, for the record."""
    interval = Interval.of(run.samples)
    seconds = run.load.ended - run.load.started
    closing = sum(bool(run.record.lingering(sample)) for sample in run.samples)
    return (
        f"{run.load.operations} operations in {seconds:.1f} s ({run.load.operations / seconds:.0f}/s), "
        f"{sum(tally.rows for tally in run.load.tallies)} rows checked; "
        f"{len(run.samples)} samples, one every {interval.median * 1000:.1f} ms, {interval.longest * 1000:.0f} ms at "
        f"most: peak {max(sample.total for sample in run.samples)}, at rest {run.samples[-1].total}, {closing} with "
        f"connections that were being closed, {len(samples_over(run.record, run.samples))} over; "
        f"hit rate {run.stats.hit_rate:.4f}, offline {offline_hit_rate(run.checkouts, POOL_SIZE):.4f}; "
        f"{run.stats.evictions} evictions, "
        f"mean busy {run.record.mean_busy(run.load.started, run.load.ended):.1f}"
    )


def test_no_sample_shows_more_than_the_books_allow(run: Run) -> None:
    """Whenever the servers are asked, they list no connection above the target that is not in use."""
    assert [(sample, run.record.excess(sample)) for sample in samples_over(run.record, run.samples)] == []


def test_the_sampler_was_not_late(run: Run) -> None:
    """The samples are many, and no other than those that the interval says."""
    during = [sample for sample in run.samples if sample.start < run.load.ended]
    assert len(during) > (run.load.ended - run.load.started) / INTERVAL / 4
    assert sum(sample.total for sample in during) / len(during) > POOL_SIZE / 2


def test_a_sample_above_the_bound_is_seen(run: Run) -> None:
    """The comparison finds one connection too many, and one that stays after it was closed."""
    record = Record(POOL_SIZE)
    for column, value in ((record.busy, 1), (record.idle, POOL_SIZE - 1), (record.doomed, 0), (record.pids, 1)):
        column.append(value)
    record.at.append(0.0)
    record.closed_at.append(9.9)
    listed = tuple((pid, "shard001") for pid in range(1, POOL_SIZE + 2))
    assert samples_over(record, [Sample(10.0, 10.01, (listed,))]) == []
    assert len(samples_over(record, [Sample(9.0, 9.01, (listed,)), Sample(19.0, 19.01, (listed,))])) == 2


def test_at_rest_there_is_the_target(run: Run) -> None:
    """After the load the servers list as many connections as the pool's size, and no more."""
    assert run.samples[-1].total == run.stats.idle == POOL_SIZE
    assert run.samples[-1].start > run.load.ended


def test_hit_rate_is_that_of_an_lru(run: Run) -> None:
    """Concurrency costs no hits: a textbook LRU of the same size has as many on the same trace."""
    assert abs(run.stats.hit_rate - offline_hit_rate(run.checkouts, POOL_SIZE)) <= 0.02


def test_no_row_is_wrong(run: Run) -> None:
    """Every row that was read or written is in the database that was meant, by the server's own word."""
    assert run.load.errors() == Counter()
    assert run.load.operations == OPERATIONS
    assert sum(tally.wrong for tally in run.load.tallies) == 0
    assert sum(tally.rows for tally in run.load.tallies) >= OPERATIONS
    assert {name: strays for name, strays, _ in run.audit if strays} == {}


def test_no_write_is_lost(run: Run) -> None:
    """What was inserted is in the database that it was inserted into, every row once."""
    assert {name: added for name, _, added in run.audit if added} == dict(run.load.inserted())


def test_the_same_seed_is_the_same_load(run: Run, urls: list[URL]) -> None:
    """A thread's trace depends on plan, databases and thread alone."""
    first, again, other = (trace(urls, PLAN, thread) for thread in (3, 3, 4))
    steps = [next(first) for _ in range(100)]
    assert steps == [next(again) for _ in range(100)]
    assert steps != [next(other) for _ in range(100)]


@dataclass(frozen=True)
class Swept:
    """The load while all databases are swept over, again and again.

    Attributes:
        checkouts: The load's own.
        counted: How often each database was counted, by name.
        evictors: How many evictions each thread has caused, by its name.
    """

    load: Load
    stats: Stats
    checkouts: Sequence[Checkout]
    counted: Counter[str]
    evictors: Counter[str]
    audit: Sequence[tuple[str, int, int]]


@pytest.fixture(scope="module")
def swept(run: Run, urls: list[URL]) -> Swept:
    """The first half of the same load again, while the main thread does nothing but sweep."""
    driver = RepoDriver("swept", POOL_SIZE)
    load = Load(driver, urls, replace(PLAN, operations=OPERATIONS // 2))
    counted, evictors = Counter[str](), Counter[str]()

    @event.listens_for(driver.repo, "evict")
    def note(_: event.Event) -> None:
        evictors[threading.current_thread().name] += 1

    checkouts = listen(driver.ledger)
    load.start()
    while not load.wait(0):
        counted.update(driver.repo.across(urls).count(Customer).collect().keys())
    kept = [checkout for checkout in checkouts if checkout[1].kind is not Kind.TRANSIENT]
    swept = Swept(load, driver.stats(), kept, counted, evictors, list(audit(urls)))
    driver.dispose()
    print(
        f"hit rate {swept.stats.hit_rate:.4f} while {counted.total() / (load.ended - load.started):.0f} databases per "
        f"second are swept over, {run.stats.hit_rate:.4f} without"
    )
    return swept


def test_a_sweep_costs_few_hits(run: Run, swept: Swept) -> None:
    """Less than five points, though every database is connected to all the time; the cache is the LRU that it was."""
    assert len(swept.counted) == len(swept.audit)
    assert min(swept.counted.values()) >= 2
    assert swept.stats.hit_rate > run.stats.hit_rate - 0.05
    assert abs(swept.stats.hit_rate - offline_hit_rate(swept.checkouts, POOL_SIZE)) <= 0.02


def test_a_sweep_evicts_nothing(swept: Swept) -> None:
    """What was evicted the load itself has evicted; at rest the cache is as full as without."""
    assert swept.evictors.total() == swept.stats.evictions > 0
    assert [name for name in swept.evictors if "across" in name] == []
    assert (swept.stats.idle, swept.stats.in_use, swept.stats.transient) == (POOL_SIZE, 0, 0)


def test_a_sweep_leads_nothing_astray(swept: Swept) -> None:
    """No operation fails beside it, no row is wrong, none is lost."""
    assert (swept.load.errors(), swept.load.operations) == (Counter(), OPERATIONS // 2)
    assert sum(tally.wrong for tally in swept.load.tallies) == 0
    assert {name: strays for name, strays, _ in swept.audit if strays} == {}
    assert {name: added for name, _, added in swept.audit if added} == dict(swept.load.inserted())


DEMO = ("--servers", "2", "--databases", "6", "--threads", "4", "--seconds", "2", "--json")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path, set[int]]:
    """The demo, run as a user would; what it did, where, and which of its processes are left."""
    folder = tmp_path_factory.mktemp("demo")
    mark = f"SHARDREPO_DEMO_TEST={folder}"
    environment = {**os.environ, "SHARDREPO_DEMO_TEST": str(folder)}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "shardrepo", "demo", *DEMO]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    return done, folder, set(processes_with(mark))


def processes_with(variable: str) -> Iterator[int]:
    """The processes that have an environment variable: those of a command, and all that they started."""
    name, value = variable.split("=", 1)
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value:
                yield process.pid
        except (psutil.AccessDenied, psutil.NoSuchProcess, psutil.ZombieProcess):
            continue


def test_the_demo_writes_one_json_object(demo: tuple[subprocess.CompletedProcess[str], Path, set[int]]) -> None:
    """`--json`: one object with both loads, nothing else on stdout, and exit code 0."""
    done, _, _ = demo
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert report["settings"]["databases"] == 6
    for way in ("repo", "by_hand"):
        assert report[way]["operations"] > 0
        assert report[way]["wrong_rows"] == 0
    assert report["repo"]["samples"]["over"] == 0
    assert report["repo"]["connections"]["rest"] <= 20


def test_the_demo_draws_a_picture(demo: tuple[subprocess.CompletedProcess[str], Path, set[int]]) -> None:
    """The PNG is where the report says."""
    done, folder, _ = demo
    picture = Path(json.loads(done.stdout)["picture"])
    assert picture.parent == folder
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_demo_leaves_nothing_running(demo: tuple[subprocess.CompletedProcess[str], Path, set[int]]) -> None:
    """No process that it started outlives it, and no file but the picture."""
    _, folder, left = demo
    assert left == set()
    assert [path.name for path in folder.iterdir()] == ["shardrepo-demo.png"]
