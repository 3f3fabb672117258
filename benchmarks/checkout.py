"""Taking a connection out of the cache and giving it back, against a `QueuePool`.

`engine.pool.connect().close()` on an idle connection, nothing sent: the Repo's engine against a plain one with
`pool_reset_on_return=None`. psycopg's own pool, which checks less and knows no events, is there for scale. What many
databases add to it is in `growth`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy import create_engine

from .ground import Ground
from .measure import Figure, Goal, Skipped, interleave

REPO, QUEUE, DRIVER = "the cache", "QueuePool", "psycopg_pool"

_ROUNDS, _CALLS = 1_000, 100


def run(ground: Ground) -> Iterator[Figure | Skipped]:
    with ground.databases(1) as (database,):
        yield from _against_pools(ground, database)


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
