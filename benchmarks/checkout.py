"""Taking a connection out of the cache and giving it back, against a `QueuePool`; and with many databases known.

`engine.pool.connect().close()` on an idle connection, nothing sent: the Repo's engine against a plain one with
`pool_reset_on_return=None`. Then the same through `ConnectionCache.engine`, in turn on ten databases with
connections, in caches that have made engines for 10, 1,000 and 10,000 databases. Last, the ledger alone,
`acquire` and `release` of keys in turn, with as many idle connections in its books at once (placeholders:
no server has 10,000). psycopg's own pool, which checks less and knows no events, is there for scale.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import create_engine

from shardrepo import Database
from shardrepo.config import Config
from shardrepo.engines import ConnectionCache
from shardrepo.entries import Entry
from shardrepo.ledger import Ledger
from shardrepo.listeners import Listeners

from .ground import Ground
from .measure import Figure, Goal, Skipped, Timings, interleave

REPO, QUEUE, DRIVER = "the cache", "QueuePool", "psycopg_pool"
KNOWN = (10, 1_000, 10_000)

_ROUNDS, _CALLS = 1_000, 100
_USED = 10


def run(ground: Ground) -> Iterator[Figure | Skipped]:
    with ground.databases(_USED) as databases:
        yield from _against_pools(ground, databases[0])
        caches = [ConnectionCache(Config.of(ground.url(databases[0])), Listeners()) for _ in KNOWN]
        used = [Database.from_url(ground.url(name)) for name in databases]
        for cache, known in zip(caches, KNOWN, strict=True):
            _make_known(cache, used, [Database.from_url(ground.url(f"known{n:05d}")) for n in range(known - _USED)])
        subjects = {
            f"{known:,} databases known": _checkout(cache, used) for cache, known in zip(caches, KNOWN, strict=True)
        }
        yield from _flat(interleave(subjects, rounds=_ROUNDS, calls=_CALLS))
        for cache in caches:
            cache.dispose()
    subjects = {f"the ledger alone, {idle:,} idle": _ledger_of(idle) for idle in KNOWN}
    yield from _flat(interleave(subjects, rounds=_ROUNDS, calls=_CALLS))


def _against_pools(ground: Ground, database: str) -> Iterator[Figure | Skipped]:
    repo = ground.repo(database, pool_size=20)
    plain = create_engine(ground.url(database), pool_reset_on_return=None)
    ours, theirs = repo.engine().pool, plain.pool
    subjects = {REPO: lambda: ours.connect().close(), QUEUE: lambda: theirs.connect().close()}
    timings = interleave(subjects, rounds=_ROUNDS, calls=_CALLS)
    plain.dispose()
    yield timings.ratio(f"{REPO} over a {QUEUE}", REPO, QUEUE, Goal("≤", 1.0))
    yield from map(timings.time, subjects)
    yield _psycopg_pool(ground, database)


def _psycopg_pool(ground: Ground, database: str) -> Figure | Skipped:
    try:
        pools: Any = importlib.import_module("psycopg_pool")
    except ImportError:
        return Skipped(DRIVER, "the peer: psycopg-pool is in the dependency group `bench`")
    conninfo = ground.url(database).set(drivername="postgresql").render_as_string(hide_password=False)
    with pools.ConnectionPool(conninfo, min_size=1, max_size=1, open=True) as pool:
        pool.wait()
        return interleave({DRIVER: lambda: pool.putconn(pool.getconn())}, rounds=_ROUNDS, calls=_CALLS).time(DRIVER)


def _make_known(cache: ConnectionCache, used: list[Database], others: list[Database]) -> None:
    """Have the cache make an engine for every database, and open a connection to those that are used."""
    for database in others:
        cache.engine(database)
    for database in used:
        cache.engine(database).pool.connect().close()


def _checkout(cache: ConnectionCache, databases: list[Database]) -> Callable[[], object]:
    turn = itertools.cycle(databases).__next__
    return lambda: cache.engine(turn()).pool.connect().close()


def _ledger_of(idle: int) -> Callable[[], object]:
    """A ledger with *idle* idle connections, each of another key."""
    ledger: Ledger[str, object] = Ledger(pool_size=idle)
    keys = [f"127.0.0.1:5432/known{number:05d}" for number in range(idle)]
    for key in keys:
        entry = ledger.acquire(key)
        assert isinstance(entry, Entry)
        ledger.opened(entry, object())
        ledger.release(entry)
    turn = itertools.cycle(keys).__next__

    def checkout() -> None:
        entry = ledger.acquire(turn())
        assert isinstance(entry, Entry)
        ledger.release(entry)

    return checkout


def _flat(timings: Timings) -> Iterator[Figure]:
    few, *more = timings.seconds
    for many in more:
        yield timings.ratio(f"{many}, over {few.split(', ')[-1]}", many, few)
    yield from map(timings.time, timings.seconds)
