"""A load with think time over three servers: a Repo with a target of 20, against an engine per database, kept.

`shardrepo demo --json`, three times each with 60 and with 600 databases, another seed each time: 32 threads read and
write for ten seconds, through the Repo and then by hand. The servers run on the same machine. "Samples over" are those
in which the servers showed more connections than the cache's books allow; a wrong row is one of another database.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, TypeAlias

from .ground import Ground
from .measure import Figure, Goal, MissingError, Spread

REPO, ENGINES = "Repo", "an engine per database"
DATABASES = (60, 600)

_SEEDS = (1, 2, 3)

Run: TypeAlias = dict[str, Any]


def run(_: Ground) -> Iterator[Figure]:
    for databases in DATABASES:
        runs = [_demo(databases, seed) for seed in _SEEDS]
        yield from _figures(runs, f"{databases} databases")


def _demo(databases: int, seed: int) -> Run:
    command = [sys.executable, "-m", "shardrepo", "demo", "--json", "--databases", str(databases), "--seed", str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingError(f"a demo that succeeds: {done.stderr.strip().splitlines()[-1:]}")
    result: Run = json.loads(done.stdout)
    return result


def _figures(runs: list[Run], where: str) -> Iterator[Figure]:
    def figure(what: str, unit: str, *path: str, goal: Goal | None = None) -> Figure:
        return Figure(f"{where}: {what}", Spread.of([_at(run, *path) for run in runs]), unit, goal)

    rates = [run["repo"]["operations_per_second"] / run["by_hand"]["operations_per_second"] for run in runs]
    yield Figure(f"{where}: {REPO}'s operations per second over {ENGINES}'s", Spread.of(rates), "x")
    for name, way in ((REPO, "repo"), (ENGINES, "by_hand")):
        yield figure(f"{name}, operations", "per second", way, "operations_per_second")
        yield figure(f"{name}, median operation", "ms", way, "p50_ms")
        yield figure(f"{name}, 99th percentile", "ms", way, "p99_ms")
        yield figure(f"{name}, at peak", "connections", way, "connections", "peak")
    yield figure(f"{REPO}, hit rate", "of checkouts", "repo", "hit_rate")
    yield figure(f"{REPO}, samples over", "samples", "repo", "samples", "over", goal=Goal("≤", 0))
    yield figure(f"{REPO}, wrong rows", "rows", "repo", "wrong_rows", goal=Goal("≤", 0))


def _at(run: Any, *path: str) -> float:
    for key in path:
        run = run[key]
    return float(run)
