"""Accesses to databases, in their order: drawn with a fixed seed, or recorded from a load on real servers.

`python -m benchmarks.traces` records anew: the demo's load, in which 32 threads with think time read and write for ten
seconds through a Repo with a target of 20, in 60 and in 600 databases on three servers, three seeds each. Each
`checkout` and its `checkin` are kept in recorded.json.gz beside this file, with the hit rate that the Repo had. They
are what that Repo made of the load: whoever waits less for a connection asks sooner for the next one.
"""

from __future__ import annotations

import gzip
import json
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, islice
from math import inf, log
from operator import attrgetter
from pathlib import Path
from random import Random
from threading import get_ident
from time import monotonic
from typing import Any, Final, NamedTuple

from sqlalchemy.engine import URL

from shardrepo import event
from shardrepo.demo.drivers import RepoDriver
from shardrepo.demo.fleet import create
from shardrepo.demo.load import Load, Plan
from shardrepo.event import Event
from shardrepo.testing.servers import start_servers

from .ground import room_for

FLEETS: Final = (60, 600)
SEEDS: Final = (1, 2, 3)
LENGTH: Final = 10_000

# The k-th most used database is used 1/k**1.0 as often as the first.
_SKEW: Final = 1.0
# A sweep begins after so many accesses per database, and takes turns with the load.
_SWEEP_EVERY: Final = 5
# After so many accesses other databases are the most used.
_DAY: Final = 2_000
_BURST: Final = (5, 50)
_USERS: Final = 32
_VISIT: Final = (1, 3)
# How many others ask before a connection is given back, on average.
_HELD: Final = 2

_RECORDED: Final = Path(__file__).with_name("recorded.json.gz")
_SERVERS: Final = 3
_POOL_SIZE: Final = 20
_PLAN: Final = Plan(threads=32, think=0.05, seconds=10)


class Access(NamedTuple):
    """Somebody takes a connection to *database*, and gives it back when *held* others have been asked for."""

    database: int
    held: int = 0
    swept: bool = False


def drawn(name: str, databases: int, seed: int) -> list[Access]:
    """The trace of that name, the same for the same arguments."""
    chance = Random(f"{name}/{databases}/{seed}")
    # Whenever somebody asks, each of those who hold a connection is as likely to have given it back as before.
    leaving = log(1 + 1 / _HELD)
    accesses = islice(DRAWN[name](chance, databases), LENGTH)
    return [access._replace(held=int(chance.expovariate(leaving))) for access in accesses]


def zipf(chance: Random, databases: int) -> Iterator[Access]:
    """A few databases are asked for most of the time, each time whatever was asked for before."""
    weights = list(accumulate(1 / rank**_SKEW for rank in range(1, databases + 1)))
    while True:
        yield Access(bisect(weights, chance.random() * weights[-1]))


def uniform(chance: Random, databases: int) -> Iterator[Access]:
    """Each database is asked for as often as any other."""
    while True:
        yield Access(chance.randrange(databases))


def sweep(chance: Random, databases: int) -> Iterator[Access]:
    """`zipf`, and now and then somebody who goes through all databases beside it."""
    load = zipf(chance, databases)
    while True:
        yield from islice(load, _SWEEP_EVERY * databases)
        for database in range(databases):
            yield Access(database, swept=True)
            yield next(load)


def shift(chance: Random, databases: int) -> Iterator[Access]:
    """`zipf`, and every day other databases are the most used."""
    load = zipf(chance, databases)
    while True:
        ranked = chance.sample(range(databases), databases)
        for access in islice(load, _DAY):
            yield Access(ranked[access.database])


def bursts(chance: Random, databases: int) -> Iterator[Access]:
    """`zipf`, and whoever asks asks 5 to 50 times in a row."""
    for access in zipf(chance, databases):
        for _ in range(chance.randint(*_BURST)):
            yield access


def visits(chance: Random, databases: int) -> Iterator[Access]:
    """32 users at a time, each of whom asks 1 to 3 times in a database of `zipf` before the next visit."""
    load = zipf(chance, databases)
    left: list[list[Access]] = [[] for _ in range(_USERS)]
    while True:
        user = chance.choice(left)
        if not user:
            user.extend([next(load)] * chance.randint(*_VISIT))
        yield user.pop()


DRAWN: Final[Mapping[str, Callable[[Random, int], Iterator[Access]]]] = {
    draw.__name__: draw for draw in (zipf, uniform, sweep, shift, bursts, visits)
}


def one_at_a_time(trace: Sequence[Access]) -> list[Access]:
    """The same accesses, if each connection were given back before the next is asked for."""
    return [access._replace(held=0) for access in trace]


def connections(trace: Sequence[Access]) -> list[tuple[int, int]]:
    """What each access takes, a connection with its number: the first of its database that nobody has."""
    taken: set[tuple[int, int]] = set()
    returned: dict[int, list[tuple[int, int]]] = {}
    asked = []
    for now, access in enumerate(trace):
        number = next(number for number in count() if (access.database, number) not in taken)
        asked.append((access.database, number))
        taken.add(asked[-1])
        returned.setdefault(now + access.held, []).append(asked[-1])
        taken.difference_update(returned.pop(now, ()))
    return asked


class Recording(NamedTuple):
    """What a load asked for, and how much of it the Repo had in its cache."""

    trace: list[Access]
    hit_rate: float


def recorded(databases: int, seed: int) -> Recording:
    """The load over so many databases, as it was recorded."""
    kept = json.loads(gzip.decompress(_RECORDED.read_bytes()))[f"{databases}/{seed}"]
    return Recording(list(map(Access, kept["databases"], kept["held"])), kept["hit_rate"])


@dataclass(slots=True)
class _Loan:
    database: str
    begun: float
    ended: float = inf


def _record(urls: Sequence[URL], seed: int) -> dict[str, Any]:
    """Run the load, and note what it takes from the cache."""
    driver = RepoDriver("recorded", _POOL_SIZE)
    loans: list[_Loan] = []
    # By thread: each gives back what it has before it takes another.
    running: dict[int, _Loan] = {}

    def checkout(happened: Event) -> None:
        loan = running[get_ident()] = _Loan(happened.database.name, monotonic())
        loans.append(loan)

    def checkin(_: Event) -> None:
        running.pop(get_ident()).ended = monotonic()

    event.listen(driver.repo, "checkout", checkout)
    event.listen(driver.repo, "checkin", checkin)
    load = Load(driver, urls, replace(_PLAN, seed=seed))
    load.start()
    while not load.wait(1.0):
        pass
    hit_rate = driver.stats().hit_rate
    driver.dispose()
    return {"hit_rate": round(hit_rate, 4), **_packed(loans, [str(url.database) for url in urls])}


def _packed(loans: Sequence[_Loan], names: Sequence[str]) -> dict[str, list[int]]:
    numbers = {name: number for number, name in enumerate(names)}
    ordered = sorted(loans, key=attrgetter("begun"))
    begun = [loan.begun for loan in ordered]
    return {
        "databases": [numbers[loan.database] for loan in ordered],
        "held": [bisect(begun, loan.ended) - 1 - position for position, loan in enumerate(ordered)],
    }


def main() -> None:
    kept = {}
    with start_servers(_SERVERS, directory=room_for(max(FLEETS))) as servers:
        urls = create(servers, max(FLEETS), lambda _: None)
        for databases in FLEETS:
            for seed in SEEDS:
                loaded = kept[f"{databases}/{seed}"] = _record(urls[:: len(urls) // databases], seed)
                print(f"{databases} databases, seed {seed}: {len(loaded['held'])} accesses, hits {loaded['hit_rate']}")
    # Without the time of day: the same accesses are the same file.
    _RECORDED.write_bytes(gzip.compress(json.dumps(kept, separators=(",", ":")).encode(), mtime=0))


if __name__ == "__main__":
    main()
