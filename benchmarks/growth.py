"""What a checkout, a `get` and the process cost when 10, 100, 600, 1,000 and 10,000 databases are known.

A process for each number, with a Repo that has read a row in so many databases and keeps 20 connections. Up to 600
they are real. 1,000 and 10,000 are names that a double of the driver takes to one real database: each is chosen,
connected to and evicted as any other. Then, in turns, `engine().pool.connect().close()`, and `using` with a `get`, on
the ten that were visited last, whose connections are kept. Last, the ledger alone, `acquire` and `release` of keys in
turn, with as many idle connections in its books at once: placeholders, as no server has 10,000.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

from sqlalchemy.engine import URL

from shardrepo.entries import Entry
from shardrepo.ledger import Ledger

from . import ground as grounds
from .ground import TEMPLATE, Ground, room_for
from .measure import Figure, MissingError, Result, Spread, Table, Timings, interleave
from .visitor import STATM

REAL, DOUBLED = (10, 100, 600), (1_000, 10_000)
IDLE = (10, 1_000, 10_000)

_ROUNDS = 60
_BATCH = 100
_LEDGER_ROUNDS, _LEDGER_CALLS = 1_000, 100
_COLUMNS = ("checkout, µs", "checkout, over 10 known", "get, µs", "get, over 10 known", "resident, MB")


class _Process:
    """One that knows databases, at the other end of a pipe."""

    def __init__(self, url: URL, *only: str) -> None:
        command = [sys.executable, "-m", "benchmarks.known", url.render_as_string(hide_password=False), *only]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)

    def __enter__(self) -> _Process:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def ask(self, command: str, names: Sequence[str] = ()) -> float:
        """Have it do what *command* says, and wait for its answer."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{' '.join([command, *names])}\n")
        answer = self._process.stdout.readline()
        if not answer:
            raise MissingError(f"a process that answers: it ended during {command!r}")
        return float(answer)


def run(_: Ground) -> Iterator[Result]:
    if not STATM.exists():
        raise MissingError(f"{STATM}: how much memory a process has is read from there")
    names = [f"real{number:05d}" for number in range(REAL[-1])]
    # A server of its own, which goes with all of them: to drop one after the other takes longer than the rest.
    with grounds.ground(directory=room_for(REAL[-1])) as ground, ExitStack() as stack:
        ground.server.create_databases(names, template=TEMPLATE)
        url = ground.url(names[0])
        memory, processes = {}, {}
        for known in (*REAL, *DOUBLED):
            is_real = known in REAL
            process = stack.enter_context(_Process(url) if is_real else _Process(url, names[0]))
            visited = names[:known] if is_real else [f"known{number:05d}" for number in range(known)]
            # A few at a time: what is garbage until the next collection is no cost of what is known.
            for batch in range(0, known, _BATCH):
                memory[known] = process.ask("visit", visited[batch : batch + _BATCH])
            processes[known] = process
        timings = {call: _in_turns(processes, call) for call in ("checkout", "get")}
    yield Table("with so many databases known", _COLUMNS, dict(_rows(memory, timings)))
    yield from _ledgers()


def _in_turns(processes: dict[int, _Process], call: str) -> Timings:
    seconds: dict[str, list[float]] = {str(known): [] for known in processes}
    order = list(processes)
    for number in range(-1, _ROUNDS):
        start = number % len(order)
        for known in order[start:] + order[:start]:
            taken = processes[known].ask(call)
            if number >= 0:
                seconds[str(known)].append(taken)
    return Timings(seconds)


def _rows(memory: dict[int, float], timings: dict[str, Timings]) -> Iterator[tuple[str, list[Spread | str]]]:
    for known, resident in memory.items():
        times: list[Spread | str] = []
        for timing in timings.values():
            times += timing.time(str(known)).value, timing.ratio("", str(known), str(REAL[0])).value
        yield f"{known:,}{'' if known in REAL else ', by a double'}", [*times, Spread.exactly(resident / 2**20)]


def _ledgers() -> Iterator[Figure]:
    few, *more = subjects = {f"the ledger alone, {idle:,} idle": _ledger_of(idle) for idle in IDLE}
    timings = interleave(subjects, rounds=_LEDGER_ROUNDS, calls=_LEDGER_CALLS)
    for many in more:
        yield timings.ratio(f"{many}, over {few.split(', ')[-1]}", many, few)
    yield from map(timings.time, subjects)


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
