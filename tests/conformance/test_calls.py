"""What the hot verbs cost in function calls, on a connection that is warm: the cause of what the benchmarks time."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import pytest
from sqlalchemy import select

from shardrepo import Repo

from ..models import Tag

pytestmark = pytest.mark.verbs

# A verb, made ready: what is called is its cost alone.
Case = Callable[[type[Repo]], Callable[[], object]]

ONE: Final = select(Tag).where(Tag.id == 1)

# Statements are compiled at the first call, and psycopg prepares them at the sixth.
WARM: Final = 8


def inserting(repo: type[Repo]) -> Callable[[], object]:
    new = (Tag(label=f"new {number}") for number in itertools.count())
    ready = list(itertools.islice(new, WARM + 1))
    return lambda: repo.insert(ready.pop())


def updating(repo: type[Repo]) -> Callable[[], object]:
    tag = repo.get_one(Tag, 1)
    labels = (f"label {number}" for number in itertools.count())
    return lambda: repo.update(tag, label=next(labels))


def deleting(repo: type[Repo]) -> Callable[[], object]:
    ready = [repo.insert(Tag(label=f"old {number}")) for number in range(WARM + 1)]
    return lambda: repo.delete(ready.pop())


def checking_out(repo: type[Repo]) -> Callable[[], object]:
    pool = repo.engine().pool
    return lambda: pool.connect().close()


def in_a_transaction(repo: type[Repo]) -> Callable[[], object]:
    def get() -> None:
        with repo.transaction():
            repo.get(Tag, 1)

    return get


def using_it(repo: type[Repo]) -> Callable[[], object]:
    database = repo.get_database()

    def get() -> None:
        with repo.using(database):
            repo.get(Tag, 1)

    return get


def streaming(repo: type[Repo]) -> Callable[[], object]:
    repo.insert_all(Tag, [{"label": f"tag {number}"} for number in range(99)])

    def stream() -> None:
        with repo.stream(Tag, batch=50) as tags:
            assert len(list(tags)) == 100

    return stream


# Functions of this library and of SQLAlchemy, and those in C that they call. Those that the driver and the standard
# library call differ by version; these differ by 4 % between SQLAlchemy 2.1.7 on Python 3.11 and 2.1.9 on 3.13.
CALLS: Final[dict[str, tuple[int, Case]]] = {
    "checkout and checkin": (34, checking_out),
    "get": (179, lambda repo: lambda: repo.get(Tag, 1)),
    "get using a database": (206, using_it),
    "get in a transaction": (262, in_a_transaction),
    "get_by": (481, lambda repo: lambda: repo.get_by(Tag, id=1)),
    "one": (394, lambda repo: lambda: repo.one(ONE)),
    "all": (357, lambda repo: lambda: repo.all(ONE)),
    "stream of 100 rows": (2317, streaming),
    "count": (400, lambda repo: lambda: repo.count(ONE)),
    "exists": (349, lambda repo: lambda: repo.exists(ONE)),
    "insert": (604, inserting),
    "update": (596, updating),
    "delete": (752, deleting),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_hot_verb_makes_as_many_calls_as_before(repo: type[Repo], name: str) -> None:
    """Ten in a hundred more or fewer fail: what a verb costs does not creep up, and what was saved is kept."""
    expected, case = CALLS[name]
    repo.insert(Tag(label="one"))
    verb = case(repo)
    for _ in range(WARM):
        verb()
    made = calls_of(verb)
    assert abs(made - expected) <= expected / 10, (
        f"{name} makes {made} calls, where {expected} stand in this test: if there are more, find out what for "
        "(python -m benchmarks verbs, cProfile), and undo it; if they are worth it, or there are fewer, write "
        f"{made} here, and the reason into the commit's message"
    )


def calls_of(verb: Callable[[], object]) -> int:
    """How many functions are called by this library's and SQLAlchemy's code, or belong to it."""
    calls = 0

    def count(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        if event in ("call", "c_call") and str(frame.f_globals.get("__name__")).startswith(
            ("shardrepo.", "sqlalchemy.")
        ):
            calls += 1

    gc.disable()  # what it frees may call
    sys.setprofile(count)
    try:
        verb()
    finally:
        sys.setprofile(None)
        gc.enable()
    return calls
