"""A process that visits databases and says how much memory it has: `python -m benchmarks.visitor repo|engines`.

Reads the URL of a database a line, does the same work there, and after an empty line prints its memory in
bytes: what the system has given it, and what Python has allocated if it was started with `-X tracemalloc`.
"""

from __future__ import annotations

import gc
import resource
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import Engine, create_engine, select
from sqlalchemy.engine import make_url
from sqlalchemy.orm import Session

from shardrepo import Repo

from .ground import User

# A process's memory in pages; the second number is what is resident (proc(5)).
STATM = Path("/proc/self/statm")

# Small, so that what stays of a visit is not its connection.
_POOL_SIZE = 5


def repo() -> Callable[[str], None]:
    """Visit with one Repo, which evicts what it visited before."""
    made: list[type[Repo]] = []

    def visit(url: str) -> None:
        if not made:
            made.append(type("BenchRepo", (Repo,), {}, config={"url": url, "pool_size": _POOL_SIZE}))
        (repo,) = made
        with repo.using(make_url(url).database):
            repo.get(User, 1)
            repo.get_by(User, name="user 2")
            repo.all(select(User).where(User.age > 90).order_by(User.name))
            ada = repo.insert(User(name="Ada", email="ada@example.com", age=36, city="London"))
            repo.update(ada, age=37)
            repo.delete(ada)

    return visit


def engines() -> Callable[[str], None]:
    """Visit with an engine per database; it is kept, its connection is not."""
    kept: list[Engine] = []

    def visit(url: str) -> None:
        kept.append(create_engine(url))
        with Session(kept[-1]) as session:
            session.get(User, 1)
            session.scalars(select(User).where(User.name == "user 2")).one()
            session.scalars(select(User).where(User.age > 90).order_by(User.name)).all()
            ada = User(name="Ada", email="ada@example.com", age=36, city="London")
            session.add(ada)
            session.commit()
            ada.age = 37
            session.commit()
            session.delete(ada)
            session.commit()
        kept[-1].dispose()

    return visit


def main(kind: str) -> None:
    visit = {"repo": repo, "engines": engines}[kind]()
    for line in sys.stdin:
        if url := line.strip():
            visit(url)
            continue
        gc.collect()
        resident = int(STATM.read_text().split()[1]) * resource.getpagesize()
        print(resident, tracemalloc.get_traced_memory()[0], flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
