"""A test in a sandbox, against the same test that empties its tables afterwards.

The test writes a row into each of ten tables, by one statement, and counts them. The reference then sends one TRUNCATE
of all ten, as test suites do: its server makes a new file for each table and index, and waits for none of them to be on
a disk. Each has a database of its own: after a TRUNCATE every session there has to look at its tables anew. Then a test
that writes a row by `insert` into each of twenty databases, all of which are rolled back at its end.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import text

from shardrepo import Repo

from .ground import Ground, User
from .measure import Figure, Goal, interleave

SANDBOX, TRUNCATE, MANY = "in a sandbox", "with a TRUNCATE", "twenty databases in a sandbox"

_ROUNDS, _DATABASES = 300, 20

_TABLES = [f"things{number}" for number in range(10)]
_CREATE = "; ".join(
    f"CREATE TABLE {table} (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text)" for table in _TABLES
)
_FILL = text(
    f"WITH {', '.join(f'in_{table} AS (INSERT INTO {table} (name) VALUES (:name))' for table in _TABLES)} SELECT 1"
)
_COUNT = text(f"SELECT {' + '.join(f'(SELECT count(*) FROM {table})' for table in _TABLES)}")
_EMPTY = text(f"TRUNCATE {', '.join(_TABLES)}")


def run(ground: Ground) -> Iterator[Figure]:
    with ground.databases(_DATABASES) as names:
        repo = ground.repo(names[0], pool_size=_DATABASES)
        for name in names[:2]:
            with repo.using(name):
                repo.execute(_CREATE)

        def test() -> None:
            repo.execute(_FILL, {"name": "Ada"})
            assert repo.execute(_COUNT).scalar_one() == len(_TABLES)

        def sandboxed() -> None:
            with repo.sandbox():
                test()

        def truncated() -> None:
            with repo.using(names[1]):
                test()
                repo.execute(_EMPTY)

        def many() -> None:
            with repo.sandbox():
                _insert_into_each(repo, names)

        timings = interleave({SANDBOX: sandboxed, TRUNCATE: truncated, MANY: many}, rounds=_ROUNDS, calls=1)
        yield timings.ratio("a TRUNCATE over a sandbox: how many times as fast", TRUNCATE, SANDBOX, Goal("≥", 5.0))
        yield from map(timings.time, (SANDBOX, TRUNCATE, MANY))


def _insert_into_each(repo: type[Repo], names: list[str]) -> None:
    for name in names:
        with repo.using(name):
            repo.insert(User(name="Ada", email="ada@example.com", age=36, city="London"))
