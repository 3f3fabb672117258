"""Interleaved rounds, and what is made of them: medians, quartiles, and ratios taken within a round."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import quantiles
from time import perf_counter
from typing import TYPE_CHECKING, Literal, Self, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing


class MissingError(Exception):
    """A benchmark cannot run here; the message names what it lacks."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        if len(values) == 1:
            return cls.exactly(values[0])
        low, median, high = quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def exactly(cls, value: float) -> Self:
        return cls(value, value, value)

    def __mul__(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure is to reach: at least or at most so much."""

    sign: Literal["≥", "≤", "<"]
    limit: float

    def reached(self, value: float) -> bool:
        if self.sign == "≥":
            return value >= self.limit
        return value < self.limit or (self.sign == "≤" and value == self.limit)

    def __str__(self) -> str:
        return f"{self.sign} {self.limit:g}"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of a benchmark's table. *what* says of what against what."""

    what: str
    value: Spread
    unit: str
    goal: Goal | None = None

    @property
    def reached(self) -> bool | None:
        """Whether the median reaches the goal; None without one."""
        return None if self.goal is None else self.goal.reached(self.value.median)


@dataclass(frozen=True, slots=True)
class Skipped:
    """What could not be measured, and what was lacking."""

    what: str
    lacks: str


@dataclass(frozen=True, slots=True)
class Table:
    """Many figures of several subjects, side by side: a row for each subject, a cell for each column."""

    what: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Spread | str]]


@dataclass(frozen=True, slots=True)
class Picture:
    """What is drawn when the page is written, and not before.

    Attributes:
        name: Of its files.
        caption: What there is to see, for those who do not see it too.
    """

    name: str
    caption: str
    draw: Callable[[], Drawing]


Result: TypeAlias = Figure | Skipped | Table | Picture


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds per call of each subject, a value for each round."""

    seconds: Mapping[str, Sequence[float]]

    def time(self, subject: str) -> Figure:
        """How long a call of *subject* takes, in microseconds."""
        return Figure(subject, Spread.of(self.seconds[subject]) * 1e6, "µs")

    def ratio(self, what: str, over: str, under: str, goal: Goal | None = None) -> Figure:
        """The time of *over* in that of *under*: taken in each round, so that what slows a round slows both."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return Figure(what, Spread.of([one / other for one, other in pairs]), "x", goal)


def interleave(subjects: Mapping[str, Callable[[], object]], *, rounds: int, calls: int) -> Timings:
    """Time *calls* calls of each subject in each of *rounds* rounds, after a tenth as many unmeasured rounds.

    Many short rounds rather than few long ones: what else the machine does then meets few of them, or both sides
    of a ratio. Every round starts with another subject, so that none always finds the caches cold. The garbage
    collector runs between the rounds, not in them, as `timeit` has it.
    """
    names = list(subjects)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warm_up = -(rounds // 10 or 1)
    gc.collect()
    gc.freeze()
    try:
        for number in range(warm_up, rounds):
            start = number % len(names)
            gc.collect()
            gc.disable()
            for name in names[start:] + names[:start]:
                taken = _time(subjects[name], calls)
                if number >= 0:
                    seconds[name].append(taken / calls)
            gc.enable()
    finally:
        gc.enable()
        gc.unfreeze()
    return Timings(seconds)


def _time(subject: Callable[[], object], calls: int) -> float:
    begun = perf_counter()
    for _ in range(calls):
        subject()
    return perf_counter() - begun
