"""100,000 rows of six columns into an empty table, against SQLAlchemy's executemany and psycopg's COPY.

One database, one thread; each side takes the same dictionaries, and empties the table before its time begins. The
reference for `insert_all` is what SQLAlchemy documents for many rows, `connection.execute(insert(table), rows)`, in one
transaction, which psycopg sends as a pipeline; that for `via="copy"` is psycopg's own `Copy.write_row`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from time import perf_counter
from typing import Any

from sqlalchemy import create_engine, insert

from .ground import Ground, User
from .measure import Figure, Goal, MissingError, Spread

MANY, EXECUTEMANY = "Repo.insert_all", "Core executemany"
COPY, WRITE_ROW = 'Repo.insert_all, via="copy"', "psycopg's COPY"

_ROWS = 100_000
_ROUNDS = 9


def run(ground: Ground) -> Iterator[Figure]:
    rows: list[dict[str, Any]] = [
        {"name": f"name {n}", "email": f"{n}@example.com", "age": n % 90, "city": f"city {n % 100}", "note": None}
        for n in range(_ROWS)
    ]
    with ground.databases(1) as (database,):
        users: Any = User.__table__
        repo = ground.repo(database, pool_size=20)
        engine = create_engine(ground.url(database))

        def executemany() -> None:
            with engine.begin() as connection:
                connection.execute(insert(users), rows)

        def write_row() -> None:
            names = list(rows[0])
            with closing(engine.raw_connection()) as connection:
                with connection.cursor().copy(f"COPY users ({', '.join(names)}) FROM STDIN") as copy:
                    for row in rows:
                        copy.write_row([row[name] for name in names])
                connection.commit()

        subjects: dict[str, Callable[[], object]] = {
            MANY: lambda: repo.insert_all(User, rows),
            EXECUTEMANY: executemany,
            COPY: lambda: repo.insert_all(User, rows, via="copy"),
            WRITE_ROW: write_row,
        }
        seconds: dict[str, list[float]] = {name: [] for name in subjects}
        for number in range(-1, _ROUNDS):
            for name in [*subjects][number % 4 :] + [*subjects][: number % 4]:
                taken = _filled(repo, name, subjects[name])
                if number >= 0:
                    seconds[name].append(taken)
        engine.dispose()
    yield _ratio(
        f"{EXECUTEMANY}, over {MANY}: how many times as fast", seconds[EXECUTEMANY], seconds[MANY], Goal("≥", 1.0)
    )
    yield _ratio(f"{COPY}, over {WRITE_ROW}", seconds[COPY], seconds[WRITE_ROW], Goal("≤", 1.25))
    for name in subjects:
        yield Figure(name, Spread.of(seconds[name]) * 1e3, "ms")


def _filled(repo: Any, name: str, subject: Callable[[], object]) -> float:
    """Seconds for filling the empty table."""
    repo.execute("TRUNCATE users")
    begun = perf_counter()
    subject()
    taken = perf_counter() - begun
    if (found := repo.count(User)) != _ROWS:
        raise MissingError(f"equal work: {name} stored {found} rows")
    return taken


def _ratio(what: str, over: list[float], under: list[float], goal: Goal) -> Figure:
    return Figure(what, Spread.of([one / other for one, other in zip(over, under, strict=True)]), "x", goal)
