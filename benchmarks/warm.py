"""A `get` on a connection that is in the cache, against the same row read with SQLAlchemy itself.

One database, one thread, keys in turn. The default engine of the first reference begins and rolls back a
transaction around each session, after which psycopg forgets what it prepared: that is its nature, not a
handicap put on it. The others are AUTOCOMMIT engines with `skip_autocommit_rollback`, their statements are
built once, and prepared on the server as the Repo's is, which is checked before anything is timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from sqlalchemy import bindparam, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from .ground import ROWS, Ground, User
from .measure import Figure, Goal, MissingError, interleave

REPO, SESSION, EXECUTE, CORE = "Repo.get", "Session.get", "Session.execute, AUTOCOMMIT", "Core execute, AUTOCOMMIT"

_ROUNDS, _CALLS = 1_000, 10
_PREPARED_AFTER = 5


def run(ground: Ground) -> Iterator[Figure]:
    with ground.databases(1) as (database,), ground.engines(database) as (default, autocommit):
        repo = ground.repo(database, pool_size=20)
        keys = itertools.cycle(range(1, ROWS + 1)).__next__
        users: Any = User.__table__
        objects = select(User).where(User.id == bindparam("key"))
        rows = select(users).where(users.c.id == bindparam("key"))

        def session_get() -> object:
            with Session(default) as session:
                return session.get(User, keys())

        def session_execute() -> object:
            with Session(autocommit) as session:
                return session.execute(objects, {"key": keys()}).scalar_one_or_none()

        def core_execute() -> object:
            with autocommit.connect() as connection:
                return connection.execute(rows, {"key": keys()}).one_or_none()

        subjects = {
            REPO: lambda: repo.get(User, keys()),
            SESSION: session_get,
            EXECUTE: session_execute,
            CORE: core_execute,
        }
        for _ in range(_PREPARED_AFTER + 1):
            for subject in subjects.values():
                subject()
        for name, engine in (REPO, repo.engine()), (CORE, autocommit):
            _check_prepared(name, engine)
        timings = interleave(subjects, rounds=_ROUNDS, calls=_CALLS)
    yield timings.ratio(f"{SESSION} over {REPO}: how many times as fast", SESSION, REPO, Goal("≥", 2.5))
    yield timings.ratio(f"{EXECUTE}, over {REPO}: how many times as fast", EXECUTE, REPO)
    yield timings.ratio(f"{REPO} over {CORE}", REPO, CORE, Goal("≤", 1.6))
    yield from map(timings.time, subjects)


def _check_prepared(name: str, engine: Engine) -> None:
    """Raise if the connection that *engine* hands out has the benchmark's statement not prepared."""
    with closing(engine.raw_connection()) as connection:
        connection.driver_connection.autocommit = True  # type: ignore[union-attr]  # psycopg's
        cursor = connection.cursor()
        cursor.execute("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%users.id = %'")
        if cursor.fetchone() == (0,):
            raise MissingError(f"prepared statements: {name} has none after {_PREPARED_AFTER} executions")
