"""The demo's load on three servers: a Repo, and what one would use instead of it.

Users read and write in databases that a Zipf distribution chooses, one to five operations in each, and check every row:
it says which database it is of. Each user is a thread, for fastapi-tenancy a task of one event loop. They think for 50
ms between two operations, or not at all. Only the Repo has a target, and where that is said fastapi-tenancy, as the
number of engines that it keeps; by itself it keeps 100.

Each round is a process of its own, for four seconds from its start, so that every first connect is in it. Longer ones
are kinder to those who keep what they opened: after 25 seconds with 600 databases an engine per database was a tenth
faster than the Repo where users think, with 25 times its connections. Rivals take turns; in brackets are the quartiles
of three rounds, whose seeds differ. "Of the Repo's" is taken within a round. Connections are counted by the servers,
every 20 ms; at rest is half a second after the load. Memory is what the process has then, its packages included. Errors
are those of all rounds. Servers and clients share one machine. The Repo's books are recorded meanwhile, at its own
cost; "samples over" are those in which the servers showed more connections than the books allow.

All rivals meet in 60 and in 600 databases with 32 users, thinking and not. Other numbers of users and other targets are
tried in 600 databases, for the Repo and for who is nearest to it in that: all of it with all of them would take hours.
Left out is a target of 5 for fastapi-tenancy, whose cache takes ten engines at least.

Where others are better: psycopg_pool, which has raw SQL and maps no objects, does most, with many times the
connections: a little more than the Repo where users think, up to 2.4 times as much where they do not. Engines that are
kept do as much as the Repo where users think, and more where its target is too small for them, as 20 is for 64.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from statistics import median
from time import monotonic
from typing import Final, NamedTuple, TypeAlias

from sqlalchemy.engine import URL

from shardrepo.demo.fleet import audit, create
from shardrepo.demo.load import Plan
from shardrepo.demo.report import Measured
from shardrepo.demo.sampler import Sampler
from shardrepo.demo.worker import Message, Preparation, Rested, Worker
from shardrepo.testing.servers import ServerStartError, start_servers

from .ground import Ground, room_for
from .measure import Figure, Goal, MissingError, Picture, Result, Skipped, Spread, Table
from .pictures import COLOURS, connections, throughput
from .rivals import FEW_ENGINES, KEPT, REPO, RIVALS, TENANCY_ON_PSYCOPG, Rival

THINK: Final = 0.05
SERVERS: Final = 3
ROUNDS: Final = 3
SECONDS: Final = 4.0

# Seconds after the end of a load until its connections are counted at rest, and after which it is not waited for.
_SETTLE: Final = 0.5
_OVERDUE: Final = 60.0

_RAMP: Final = 0.5
_COLUMNS: Final = (
    *("operations/s", "of the Repo's", "p50, ms", "p99, ms"),
    *("connections at peak", "at rest", "memory, MiB", "errors", "wrong rows"),
)


class Case(NamedTuple):
    """What all rivals of a comparison are given."""

    databases: int
    users: int = 32
    think: float = THINK
    target: int = 20

    @property
    def load(self) -> str:
        """Who uses them."""
        return f"{self.users} users " + (f"thinking for {self.think * 1000:g} ms" if self.think else "who do not think")

    def __str__(self) -> str:
        return f"{self.databases} databases, {self.load}, a target of {self.target}"


# None for a round whose process did not live to its end.
Rounds: TypeAlias = Mapping[Rival, Sequence[Measured | None]]

CASES: Final[Mapping[Case, Sequence[Rival]]] = {
    Case(60): RIVALS,
    Case(60, think=0.0): RIVALS,
    Case(600): (*RIVALS, TENANCY_ON_PSYCOPG, FEW_ENGINES),
    Case(600, think=0.0): (*RIVALS, TENANCY_ON_PSYCOPG),
    Case(600, users=8): (REPO, KEPT),
    Case(600, users=64): (REPO, KEPT),
    Case(600, target=5): (REPO,),
    Case(600, target=80): (REPO, FEW_ENGINES),
    Case(600, target=80, think=0.0): (REPO,),
}


def run(_: Ground) -> Iterator[Result]:
    yield from compare(CASES, ROUNDS, SECONDS)


def compare(cases: Mapping[Case, Sequence[Rival]], rounds: int, seconds: float) -> Iterator[Result]:
    """Measure each case, with those rivals that are installed, and look through all databases in the end."""
    missing = dict(_missing(cases))
    yield from (Skipped(rival.name, lacks) for rival, lacks in missing.items())
    measured: dict[Case, Rounds] = {}
    with _servers(max(case.databases for case in cases)) as (doors, urls):
        for case, rivals in cases.items():
            plans = [Plan(case.users, case.think, seconds, seed=number, ramp=_RAMP) for number in range(1, rounds + 1)]
            there = [rival for rival in rivals if rival not in missing]
            measured[case] = _measured(case, plans, there, doors, urls[:: len(urls) // case.databases])
            yield from _lost_rounds(case, measured[case])
            yield _table(case, measured[case])
        misplaced = _misplaced(urls, [load for found in measured.values() for load in _lived(*found.values())])
    yield from _of_the_repo({case: _lived(found[REPO]) for case, found in measured.items()})
    yield Figure("all of them: rows lost, or in another database", Spread.exactly(misplaced), "rows", Goal("≤", 0))
    yield from _pictures(measured, seconds)


def _missing(cases: Mapping[Case, Sequence[Rival]]) -> Iterator[tuple[Rival, str]]:
    for rival in dict.fromkeys(rival for rivals in cases.values() for rival in rivals):
        try:
            rival.prepare("", 0)
        except MissingError as error:
            yield rival, str(error)


@contextmanager
def _servers(databases: int) -> Iterator[tuple[list[URL], list[URL]]]:
    """A door to each of the servers, and as many databases over them."""
    try:
        servers = start_servers(SERVERS, directory=room_for(databases))
    except ServerStartError as error:
        raise MissingError(f"servers: {error}") from error
    with servers:
        yield [server.url() for server in servers], create(servers, databases, lambda _: None)


def _measured(
    case: Case, plans: Sequence[Plan], rivals: Sequence[Rival], doors: Sequence[URL], urls: Sequence[URL]
) -> Rounds:
    """A round of each rival for each plan; each time another one begins."""
    measured: dict[Rival, list[Measured | None]] = {rival: [] for rival in rivals}
    for plan in plans:
        start = plan.seed % len(rivals)
        for rival in (*rivals[start:], *rivals[:start]):
            print(f"  {case}: {rival.name}, round {plan.seed}", file=sys.stderr, flush=True)
            prepared = rival.prepare(rival.name, case.target)
            measured[rival].append(sampled(prepared, rival.name, doors, urls, plan))
    return measured


def sampled(prepared: Preparation, name: str, doors: Sequence[URL], urls: Sequence[URL], plan: Plan) -> Measured | None:
    """Run one load in a process of its own, while another samples the servers; None if it does not live to its end."""
    with Sampler(doors, name) as sampler, Worker(prepared, urls, plan) as worker:
        load = _rested(worker, sampler, monotonic() + (plan.seconds or 0) + _OVERDUE)
        if load is None:
            return None
        sampler.drain_after(load.ended + _SETTLE)
    return Measured(load, [sample for sample in sampler.samples if sample.start >= load.started])


def _rested(worker: Worker, sampler: Sampler, deadline: float) -> Rested | None:
    """Wait for the end of the load."""
    while monotonic() < deadline:
        ready = wait([worker.pipe, sampler.pipe])
        sampler.drain()
        if worker.pipe in ready:
            try:
                message: Message = worker.pipe.recv()
            except EOFError:
                return None
            if isinstance(message, Rested):
                return message
    return None


def _lived(*rounds: Sequence[Measured | None]) -> list[Measured]:
    return [load for loads in rounds for load in loads if load is not None]


def _lost_rounds(case: Case, rounds: Rounds) -> Iterator[Skipped]:
    for rival, loads in rounds.items():
        if lost := loads.count(None):
            yield Skipped(f"{case}: {rival.name}, {lost} of {len(loads)} rounds", "a process that lives to its end")


def _table(case: Case, rounds: Rounds) -> Table:
    rows = {rival.name: _row(loads, rounds[REPO]) for rival, loads in rounds.items() if _lived(loads)}
    return Table(str(case), _COLUMNS, rows)


def _row(rounds: Sequence[Measured | None], repos: Sequence[Measured | None]) -> Sequence[Spread | str]:
    loads = _lived(rounds)
    shares = [one.throughput / repo.throughput for one, repo in zip(rounds, repos, strict=True) if one and repo]
    errors = sum((Counter(load.load.errors) for load in loads), Counter[str]())
    return (
        Spread.of([load.throughput for load in loads]),
        Spread.of(shares) if shares else "",
        Spread.of([load.load.p50 * 1000 for load in loads]),
        Spread.of([load.load.p99 * 1000 for load in loads]),
        Spread.of([load.peak.total for load in loads]),
        Spread.of([load.rest.total for load in loads]),
        Spread.of([load.load.memory_after / 2**20 for load in loads]),
        ", ".join(f"{count} {name}" for name, count in errors.most_common()) or "0",
        str(sum(load.load.wrong for load in loads)),
    )


def _misplaced(urls: Sequence[URL], loads: Sequence[Measured]) -> int:
    """Rows in a database that they were not meant for, and those that were inserted and are not there."""
    strays, lost = 0, sum((Counter(load.load.inserted) for load in loads), Counter[str]())
    for name, found, added in audit(urls):
        strays += found
        lost[name] -= added
    return strays + sum((+lost).values())


def _of_the_repo(measured: Mapping[Case, Sequence[Measured]]) -> Iterator[Figure]:
    """How much of what it was asked for it had, and what may never be."""
    for case, loads in measured.items():
        if rates := [load.load.stats.hit_rate for load in loads if load.load.stats]:
            yield Figure(f"{case}: {REPO.name}, hit rate", Spread.of(rates), "of checkouts")
    every = [load for loads in measured.values() for load in loads]
    if not every:
        return
    yield Figure(f"{REPO.name}: samples", Spread.exactly(sum(len(load.samples) for load in every)), "samples")
    over = Spread.exactly(sum(load.over or 0 for load in every))
    yield Figure(f"{REPO.name}: samples over", over, "samples", Goal("≤", 0))
    yield Figure(f"{REPO.name}: rows checked", Spread.exactly(sum(load.load.rows for load in every)), "rows")
    wrong = Spread.exactly(sum(load.load.wrong for load in every))
    yield Figure(f"{REPO.name}: wrong rows", wrong, "rows", Goal("≤", 0))


def _pictures(measured: Mapping[Case, Rounds], seconds: float) -> Iterator[Picture]:
    """The most databases and the usual target, with all rivals that were measured."""
    most = max(case.databases for case in measured)
    thinking, busy = Case(most), Case(most, think=0.0)
    if thinking in measured:
        yield connections(_typical(measured[thinking]), str(thinking), thinking.target, seconds)
    if thinking in measured and busy in measured:
        yield throughput(most, {case.load: _points(measured[case]) for case in (thinking, busy)})


def _shown(rounds: Rounds) -> dict[Rival, list[Measured]]:
    return {rival: loads for rival in rounds if rival.name in COLOURS and (loads := _lived(rounds[rival]))}


def _typical(rounds: Rounds) -> dict[str, Measured]:
    """Of each rival the round with the median of connections at peak."""
    return {
        rival.name: sorted(loads, key=lambda load: load.peak.total)[len(loads) // 2]
        for rival, loads in _shown(rounds).items()
    }


def _points(rounds: Rounds) -> dict[str, tuple[float, float]]:
    """Of each rival its connections at peak and its operations per second, the medians."""
    return {
        rival.name: (median(load.peak.total for load in loads), median(load.throughput for load in loads))
        for rival, loads in _shown(rounds).items()
    }
