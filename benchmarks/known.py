"""A process that has visited many databases, and says what a call costs it: `python -m benchmarks.known URL [NAME]`.

Reads a command a line, and answers each with one line. `visit NAME …` has a Repo read a row in each of these databases,
and gives the process's memory in bytes; `checkout` and `get` give the seconds that one of them takes, in turn on those
that were visited last, whose connections are kept. Given NAME, every connection leads to that one database, whatever it
is asked for: a double of the driver, for more databases than there are.
"""

from __future__ import annotations

import gc
import itertools
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import Any

from psycopg.conninfo import make_conninfo
from sqlalchemy.engine import make_url

from shardrepo import Repo, engines
from shardrepo.driver import Target, connect

from .ground import User
from .visitor import STATM

_POOL_SIZE = 20
_USED = 10
_CALLS = {"checkout": 200, "get": 20}


def lead_to(name: str) -> Callable[[Target, Any], Any]:
    """The driver's connect, to one database of the server that is asked for."""

    def lead(target: Target, context: Any) -> Any:
        there = replace(
            target,
            database=target.database.neighbour(name),
            conninfo=make_conninfo(target.conninfo, dbname=name),
            check=None,
        )
        connection = connect(there, context)
        connection.database = target.database
        return connection

    return lead


def calls_on(repo: type[Repo], names: list[str]) -> dict[str, Callable[[], object]]:
    """What can be timed, on those of *names* that were visited last."""
    used = names[-_USED:]
    engine = repo._router.cache.engine
    databases = itertools.cycle([repo._router.databases.named(name, {}) for name in used]).__next__
    choices = itertools.cycle(used).__next__

    def get() -> None:
        with repo.using(choices()):
            repo.get(User, 1)

    return {"checkout": lambda: engine(databases()).pool.connect().close(), "get": get}


def visit(repo: type[Repo], names: list[str]) -> int:
    """Bytes that are resident after reading a row in each."""
    for name in names:
        with repo.using(name):
            repo.get_one(User, 1)
    gc.collect()
    return int(STATM.read_text().split()[1]) * resource.getpagesize()


def seconds(call: Callable[[], object], number: int) -> float:
    """Of one call, of so many."""
    gc.collect()
    gc.disable()
    begun = perf_counter()
    for _ in range(number):
        call()
    taken = perf_counter() - begun
    gc.enable()
    return taken / number


def main(url: str, only: str | None = None) -> None:
    if only is not None:
        setattr(engines, "connect", lead_to(only))  # noqa: B010  # mypy takes it for a name that is only imported
    repo = type("KnownRepo", (Repo,), {}, config={"url": make_url(url), "pool_size": _POOL_SIZE})
    calls: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        command, *names = line.split()
        if command == "visit":
            print(visit(repo, names), flush=True)
            calls = calls_on(repo, names)
        else:
            print(seconds(calls[command], _CALLS[command]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
