"""The load: threads that read and write customers in databases drawn from a Zipf distribution, and check each row."""

from __future__ import annotations

import random
import threading
from abc import ABC, abstractmethod
from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from time import monotonic
from typing import Final, Literal, TypeAlias

from sqlalchemy.engine import URL

from .drivers import Disposable, Driver
from .models import Customer

Verb: TypeAlias = Literal["get", "few", "insert", "update"]

# Rows that every database has before the load: keys 1 to this.
SEEDED: Final = 50

# The k-th most used database is used 1/k**1.1 as often as the first.
_SKEW: Final = 1.1

_SHARES: Final[dict[Verb, int]] = {"get": 70, "few": 10, "insert": 10, "update": 10}


@dataclass(frozen=True, slots=True)
class Plan:
    """How much load, and which: the same plan over the same databases is the same sequence in every thread.

    Attributes:
        threads: How many users there are.
        think: Seconds that each of them pauses between two operations, on average.
        ramp: Seconds over which they arrive; all at once, each would find every connection busy.
        seconds: When to end; None for no such end.
        operations: After how many operations in all to end; None for no such end.
        visit: The most operations that a thread runs in one database before it draws the next, as a request
            does; it runs from 1 to so many, each number as often as the others.
        seed: What the choices are drawn from.
    """

    threads: int
    think: float
    seconds: float | None
    operations: int | None = None
    visit: int = 5
    seed: int = 1
    ramp: float = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One operation, and the pause after it."""

    url: URL
    verb: Verb
    key: int
    pause: float


def trace(urls: Sequence[URL], plan: Plan, thread: int) -> Iterator[Step]:
    """What one thread does, without end."""
    ranked = random.Random(plan.seed).sample(urls, len(urls))  # noqa: S311  # a load, no secret
    weights = list(accumulate(1 / rank**_SKEW for rank in range(1, len(ranked) + 1)))
    draw = random.Random(f"{plan.seed}/{thread}")  # noqa: S311  # a load, no secret
    verbs, shares = list(_SHARES), list(_SHARES.values())
    while True:
        url = ranked[bisect(weights, draw.random() * weights[-1])]
        for _ in range(draw.randint(1, plan.visit)):
            verb = draw.choices(verbs, shares)[0]
            yield Step(url, verb, draw.randint(1, SEEDED), plan.think * draw.uniform(0.5, 1.5))


class Tally:
    """What one thread has seen. Written by that thread alone; others may read it at any time."""

    def __init__(self) -> None:
        self.latencies = array("d")
        self.errors: Counter[str] = Counter()
        self.rows = 0
        self.wrong = 0
        self.inserted: Counter[str] = Counter()

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count the operation in the block, with the time it takes or the error that it raises."""
        begun = monotonic()
        try:
            yield
            self.latencies.append(monotonic() - begun)
        except Exception as error:
            self.errors[_name_of(error)] += 1

    def check(self, url: URL, customers: Sequence[Customer | None]) -> None:
        """Count the rows that are missing or come from another database than *url*'s."""
        self.rows += len(customers)
        self.wrong += sum(customer is None or customer.database != url.database for customer in customers)

    def check_new(self, url: URL, customer: Customer) -> None:
        """Count a row that was inserted."""
        self.check(url, [customer])
        self.inserted[str(url.database)] += 1


class Users(ABC):
    """The users of a load, whatever they run in, from `start` until `wait` says so.

    Attributes:
        driver: What they use; whoever made it disposes of it.
        tallies: What each of them has seen so far.
    """

    def __init__(self, driver: Disposable, urls: Sequence[URL], plan: Plan) -> None:
        self.driver = driver
        self.tallies = [Tally() for _ in range(plan.threads)]
        self.started = self.ended = 0.0
        self._urls = urls
        self._plan = plan
        self._stop = threading.Event()

    @abstractmethod
    def start(self) -> None:
        """Let every user begin."""

    @abstractmethod
    def wait(self, timeout: float) -> bool:
        """Wait *timeout* seconds at most for the end; whether the load has ended."""

    def stop(self) -> None:
        """Let every user end after the operation that it is at."""
        self._stop.set()

    @property
    def operations(self) -> int:
        """How many operations have ended well so far."""
        return sum(len(tally.latencies) for tally in self.tallies)

    def errors(self) -> Counter[str]:
        """How many operations have failed so far, by the error's type and the server's reason."""
        return sum((tally.errors for tally in self.tallies), Counter())

    def inserted(self) -> Counter[str]:
        """How many rows were inserted so far, by database."""
        return sum((tally.inserted for tally in self.tallies), Counter())

    def _delay(self, number: int) -> float:
        """Seconds after the start at which a user arrives."""
        return self._plan.ramp * number / self._plan.threads

    def _steps(self, number: int) -> Iterator[Step]:
        """What a user does, until the load is over."""
        for done, step in enumerate(trace(self._urls, self._plan, number)):
            if self._stop.is_set() or self._is_over(done, number):
                return
            yield step

    def _is_over(self, done: int, number: int) -> bool:
        plan = self._plan
        if plan.seconds is not None and monotonic() - self.started >= plan.seconds:
            return True
        # The first users do one more where the division leaves a rest.
        return plan.operations is not None and done >= -(-(plan.operations - number) // plan.threads)


class Load(Users):
    """Users in threads of their own."""

    def __init__(self, driver: Driver, urls: Sequence[URL], plan: Plan) -> None:
        super().__init__(driver, urls, plan)
        self._perform = partial(perform, driver)
        # Daemons: a process whose parent is gone ends without asking them.
        self._threads = [
            threading.Thread(target=self._run, args=(number,), daemon=True) for number in range(plan.threads)
        ]

    def start(self) -> None:
        self.started = monotonic()
        for thread in self._threads:
            thread.start()

    def wait(self, timeout: float) -> bool:
        deadline = monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, deadline - monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            return False
        self.ended = self.ended or monotonic()
        return True

    def _run(self, number: int) -> None:
        tally = self.tallies[number]
        self._stop.wait(self._delay(number))
        for step in self._steps(number):
            with tally.timed():
                self._perform(step, tally)
            self._stop.wait(step.pause)


def perform(driver: Driver, step: Step, tally: Tally) -> None:
    """Run one operation and check every row that it met: the server says in each where it is stored."""
    url, key = step.url, step.key
    if step.verb == "get":
        tally.check(url, [driver.get(url, key)])
    elif step.verb == "few":
        tally.check(url, driver.few(url, key) or [None])
    elif step.verb == "update":
        tally.check(url, [driver.update(url, key)])
    else:
        customer = new_customer(step)
        driver.insert(url, customer)
        tally.check_new(url, customer)


def new_customer(step: Step) -> Customer:
    """What the step inserts, by its name meant for that database."""
    name = step.url.database
    return Customer(name=f"customer of {name}", email=f"{step.key}@{name}.example", city="Paris")


def _name_of(error: Exception) -> str:
    """The error's type, with what the server said where that is the usual end of an engine per database."""
    full = "too many clients" in str(error) or "remaining connection slots" in str(error)
    return type(error).__name__ + (": too many connections" if full else "")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that *share* of the sorted *values* do not exceed; 0.0 if there are none."""
    return values[min(int(len(values) * share), len(values) - 1)] if values else 0.0
