"""What a sweep over all databases, without end, does to the cache of those who work in some of them.

Sixteen threads read and write in 60 databases of one server, drawn from a Zipf distribution, with think time, through
a Repo with a target of 20: for five seconds, and five more while one thread counts a table across all databases, again
and again. Three times, another seed each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy.engine import URL

from shardrepo.demo.drivers import RepoDriver
from shardrepo.demo.fleet import TEMPLATE, create
from shardrepo.demo.load import Load, Plan, percentile
from shardrepo.demo.models import Customer

from .ground import Ground
from .measure import Figure, Goal, Spread

_DATABASES, _POOL_SIZE, _SECONDS = 60, 20, 5.0
_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class _Run:
    """One load: its hits, its median operation, and how many databases a second were swept over beside it."""

    hit_rate: float
    median: float
    visits: float


def run(ground: Ground) -> Iterator[Figure]:
    with _databases(ground) as urls:
        rounds = [(_run(urls, seed, sweep=False), _run(urls, seed, sweep=True)) for seed in _SEEDS]
    without, beside = zip(*rounds, strict=True)
    yield Figure("hit rate, without a sweep", Spread.of([run.hit_rate for run in without]), "of checkouts")
    yield Figure("hit rate, beside one", Spread.of([run.hit_rate for run in beside]), "of checkouts")
    cost = Spread.of([one.hit_rate - other.hit_rate for one, other in rounds]) * 100
    yield Figure("what the sweep costs of it", cost, "points", Goal("<", 5))
    yield Figure("median operation, without a sweep", Spread.of([run.median for run in without]) * 1e3, "ms")
    yield Figure("median operation, beside one", Spread.of([run.median for run in beside]) * 1e3, "ms")
    yield Figure("databases swept over", Spread.of([run.visits for run in beside]), "per second")


@contextmanager
def _databases(ground: Ground) -> Iterator[list[URL]]:
    urls = create([ground.server], _DATABASES, lambda _: None)
    try:
        yield urls
    finally:
        for name in [*(str(url.database) for url in urls), TEMPLATE]:
            ground.server.drop_database(name, force=True)


def _run(urls: Sequence[URL], seed: int, *, sweep: bool) -> _Run:
    driver = RepoDriver("sweep", _POOL_SIZE)
    load = Load(driver, urls, Plan(threads=16, think=0.05, seconds=_SECONDS, seed=seed))
    visits = 0
    load.start()
    while not load.wait(0.0 if sweep else 0.1):
        visits += len(driver.repo.across(urls).count(Customer).collect()) if sweep else 0
    latencies = sorted(latency for tally in load.tallies for latency in tally.latencies)
    hit_rate = driver.stats().hit_rate
    driver.dispose()
    return _Run(hit_rate, percentile(latencies, 0.5), visits / (load.ended - load.started))
