"""Objects, and with `preload` what they refer to, against `selectinload` in a session of SQLAlchemy's own.

One database, one thread, 1,000 users with 5 posts each. The Repo loads the users and then, of objects that are
detached by now, their posts: `Repo.all` and `Repo.preload`. A session does both in one go. Each side sends three
statements, 500 users at a time for the posts, which is checked before anything is timed. The reference that counts is
on an AUTOCOMMIT engine with `skip_autocommit_rollback`, as the Repo reads too; its statement is built once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sqlalchemy import ForeignKey, event, insert, select
from sqlalchemy.engine import Engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship, selectinload

from .ground import Ground
from .measure import Figure, Goal, MissingError, interleave

REPO, AUTOCOMMIT, SESSION = "Repo.all, Repo.preload", "Session, selectinload, AUTOCOMMIT", "Session, selectinload"

_USERS, _POSTS = 1_000, 5
_ROUNDS, _CALLS = 100, 1
_STATEMENTS = 3


class Base(DeclarativeBase):
    """Root of this benchmark's models."""


class Author(Base):
    __tablename__ = "authors"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    posts: Mapped[list[Post]] = relationship()


class Post(Base):
    __tablename__ = "posts"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str]
    author_id: Mapped[int] = mapped_column(ForeignKey(Author.id), index=True)


def run(ground: Ground) -> Iterator[Figure]:
    with ground.databases(1) as (database,), ground.engines(database) as (default, autocommit):
        repo = ground.repo(database, pool_size=20)
        fill(default)
        whole = select(Author).options(selectinload(Author.posts))

        def with_session(engine: Engine) -> list[Author]:
            with Session(engine) as session:
                return list(session.scalars(whole))

        subjects: dict[str, Callable[[], list[Author]]] = {
            REPO: lambda: repo.preload(repo.all(Author), Author.posts),
            AUTOCOMMIT: lambda: with_session(autocommit),
            SESSION: lambda: with_session(default),
        }
        for name, engine in (REPO, repo.engine()), (AUTOCOMMIT, autocommit), (SESSION, default):
            _check(name, engine, subjects[name])
        timings = interleave(subjects, rounds=_ROUNDS, calls=_CALLS)
    yield timings.ratio(f"{AUTOCOMMIT}, over {REPO}: how many times as fast", AUTOCOMMIT, REPO, Goal("≥", 1.0))
    yield timings.ratio(f"{SESSION}, over {REPO}: how many times as fast", SESSION, REPO)
    yield from map(timings.time, subjects)


def fill(engine: Engine) -> None:
    """Make the authors, each with posts."""
    Base.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.execute(insert(Author), [{"name": f"user {n}"} for n in range(_USERS)])
        posts = [{"title": f"post {n}", "author_id": n % _USERS + 1} for n in range(_USERS * _POSTS)]
        connection.execute(insert(Post), posts)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.exec_driver_sql("ANALYZE")


def _check(name: str, engine: Engine, subject: Callable[[], list[Author]]) -> None:
    """Raise if *subject* does not load everything, with so many statements."""
    sent: list[str] = []

    def count(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    event.listen(engine, "before_cursor_execute", count)
    loaded = sum(len(author.posts) for author in subject())
    event.remove(engine, "before_cursor_execute", count)
    if (loaded, len(sent)) != (_USERS * _POSTS, _STATEMENTS):
        raise MissingError(f"equal work: {name} loaded {loaded} posts with {len(sent)} statements")
