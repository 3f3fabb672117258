"""What a process waits for before its first row: the import and the first `get`, against the same by hand.

Processes that take turns: `import shardrepo` in one, `import sqlalchemy.orm` in the other, timed inside, so without the
interpreter's own start. Then, in the same processes and for the same model, a Repo is defined and asked for one row, or
an engine is made and a session asked for it: both load the driver, connect and compile their first statement. All files
are in the system's memory, as after the first start of a day.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Final

from .ground import Ground
from .measure import Figure, MissingError, Spread, Timings

REPO, HAND = "shardrepo", "sqlalchemy.orm"
IMPORT, FIRST, BOTH = "import {}", "first get with {}", "import of {} to first row"

_ROUNDS: Final = 15

_PROGRAM: Final = """
import json, sys
from time import perf_counter

begun = perf_counter()
import {module}
imported = perf_counter()

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

class Base(DeclarativeBase):
    pass

class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str]
    age: Mapped[int]
    city: Mapped[str]
    note: Mapped[str | None]

url = sys.argv[1]
ready = perf_counter()
{first}
ended = perf_counter()
assert found.id == 1
print(json.dumps([imported - begun, ended - ready, ended - begun]))
"""

_FIRST: Final = {
    REPO: """
class FirstRepo(shardrepo.Repo, config={"url": url}):
    pass

found = FirstRepo.get(User, 1)
""",
    HAND: """
with sqlalchemy.orm.Session(sqlalchemy.create_engine(url)) as session:
    found = session.get(User, 1)
""",
}


def run(ground: Ground) -> Iterator[Figure]:
    seconds: dict[str, list[float]] = {what.format(way): [] for what in (IMPORT, FIRST, BOTH) for way in _FIRST}
    with ground.databases(1) as (database,):
        url = ground.url(database).render_as_string(hide_password=False)
        for number in range(-1, _ROUNDS):
            for way in list(_FIRST)[:: 1 if number % 2 else -1]:
                for what, taken in zip((IMPORT, FIRST, BOTH), _start(way, url), strict=True):
                    if number >= 0:
                        seconds[what.format(way)].append(taken)
    timings = Timings(seconds)
    for what in (IMPORT, FIRST, BOTH):
        repo, hand = what.format(REPO), what.format(HAND)
        yield timings.ratio(f"{repo}, over {hand}", repo, hand)
    for subject, values in seconds.items():
        yield Figure(subject, Spread.of(values) * 1e3, "ms")


def _start(way: str, url: str) -> list[float]:
    """Seconds for the import, for the first row, and for both with the model between them."""
    command = [sys.executable, "-c", _PROGRAM.format(module=way, first=_FIRST[way]), url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise MissingError(f"a process that finds its row: {done.stderr.strip().splitlines()[-1:]}")
    taken: list[float] = json.loads(done.stdout)
    return taken
