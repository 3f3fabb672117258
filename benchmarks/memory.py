"""What stays in memory of a database that was visited and evicted, against an engine per database, kept.

Three processes visit the same databases, cloned in batches and dropped after them: a Repo with a target of 5, the
same under tracemalloc, which counts what Python allocates to the byte, and one that keeps an engine for each
database and disposes its pool. Each visit is six operations: three reads, an insert, an update and a delete.

A figure is the slope of a straight line through the readings, in brackets are the quartiles of the steps between them:
what is freed is freed at times, and most steps go up. The Repo's are taken twice: while its bounded caches (256
engines, 1,024 resolved choices) fill, and after, where nothing may grow any more.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from statistics import linear_regression, quantiles

from .ground import Ground
from .measure import Figure, Goal, MissingError, Spread
from .visitor import STATM

REPO, ENGINES = "Repo", "an engine per database"

_BATCH = 50
_VISITS = 2_600
_FILLING, _FULL, _OF_ENGINES = (300, 600), (1_100, _VISITS), (50, 200)


class _Visitor:
    """A process that visits, and the readings of its memory: bytes by number of visits."""

    def __init__(self, kind: str, *options: str) -> None:
        command = [sys.executable, *options, "-m", "benchmarks.visitor", kind]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        self._visits = 0
        self.resident: dict[int, int] = {}
        self.traced: dict[int, int] = {}

    def __enter__(self) -> _Visitor:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def visit(self, urls: Sequence[str]) -> None:
        """Have these visited, in the background; `read` waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write("".join(f"{url}\n" for url in urls) + "\n")
        self._visits += len(urls)

    def read(self) -> None:
        """Wait for the end of the visits, and note the process's memory."""
        assert self._process.stdout is not None
        resident, traced = map(int, self._process.stdout.readline().split())
        self.resident[self._visits] = resident
        self.traced[self._visits] = traced


def run(ground: Ground) -> Iterator[Figure]:
    if not STATM.exists():
        raise MissingError(f"{STATM}: how much memory a process has is read from there")
    with ExitStack() as stack:
        repo = stack.enter_context(_Visitor("repo"))
        traced = stack.enter_context(_Visitor("repo", "-X", "tracemalloc"))
        engines = stack.enter_context(_Visitor("engines"))
        for visits in range(0, _VISITS, _BATCH):
            visitors = (repo, traced, engines) if visits < _OF_ENGINES[1] else (repo, traced)
            with ground.databases(_BATCH) as names:
                urls = [ground.url(name).render_as_string(hide_password=False) for name in names]
                for visitor in visitors:
                    visitor.visit(urls)
                for visitor in visitors:
                    visitor.read()
    yield _slope(f"{REPO}, allocated by Python", traced.traced, _FULL, Goal("<", 0.2))
    yield _slope(f"{REPO}, resident", repo.resident, _FULL, Goal("<", 0.2))
    yield _slope(f"{REPO}, allocated by Python, while its caches fill", traced.traced, _FILLING)
    yield _slope(f"{REPO}, resident, while its caches fill", repo.resident, _FILLING)
    yield _slope(f"{ENGINES}, resident", engines.resident, _OF_ENGINES)


def _slope(what: str, readings: dict[int, int], between: tuple[int, int], goal: Goal | None = None) -> Figure:
    """KiB per database: the slope over all readings; as its spread, the quartiles of the single steps."""
    first, last = between
    taken = {visits: amount for visits, amount in readings.items() if first <= visits <= last}
    visits, amounts = list(taken), list(taken.values())
    steps = [(after - before) / _BATCH / 1024 for before, after in pairwise(amounts)]
    low, _, high = quantiles(steps, n=4, method="inclusive")
    slope = linear_regression(visits, amounts).slope / 1024
    return Figure(f"{what}, visits {first:,} to {last:,}", Spread(slope, low, high), "KiB per database", goal)
