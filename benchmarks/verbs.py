"""Every verb of the Repo that sends something, against the same thing written by hand on SQLAlchemy.

By hand is what one writes where each database has an engine: a `sessionmaker` with `expire_on_commit=False`, a session
for each unit of work, `begin()` around what writes, and one more engine, of AUTOCOMMIT, to the server's `postgres`.
Both sides return the same objects, and build their statements anew for each call, as applications do. "Times as fast"
is the time by hand in that of the Repo, in turns; the statements are those of a warm call, as the server's log has
them, BEGIN and what resets a connection included. The verbs about databases open a connection for each call, where the
engine by hand keeps its own: nothing that is outside the target stays.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, TypeAlias

from sqlalchemy import create_engine, delete, func, insert, select, text, update
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session, selectinload, sessionmaker

from shardrepo import Repo
from shardrepo.directory import Servers
from shardrepo.testing.statements import count_statements

from . import ground as grounds
from .ground import ROWS, TEMPLATE, Ground, User
from .measure import Spread, Table, Timings, interleave
from .preload import Author, fill

# The same with the Repo and by hand.
Pair: TypeAlias = tuple[Callable[[], object], Callable[[], object]]

_ROUNDS, _CALLS = 60, 5
_SLOW_ROUNDS, _SLOW_CALLS = 20, 1
# Until statements are prepared on both sides, where they can be.
_WARM: Final = 7
_COLUMNS: Final = ("times as fast", "Repo, µs", "by hand, µs", "Repo, statements", "by hand, statements")


def run(ground: Ground) -> Iterator[Table]:
    with grounds.ground(log_statements=True) as logged, _scene(logged) as scene:
        sent = {verb: _sent(scene, pair) for verb, pair in {**_quick(scene), **_slow(scene)}.items()}
    with _scene(ground) as scene:
        timed = {verb: _timed(pair, _ROUNDS, _CALLS) for verb, pair in _quick(scene).items()}
        timed |= {verb: _timed(pair, _SLOW_ROUNDS, _SLOW_CALLS) for verb, pair in _slow(scene).items()}
    yield Table("a call of each verb", _COLUMNS, {verb: [*timed[verb], *sent[verb]] for verb in timed})


@dataclass(frozen=True)
class _Scene:
    """What both sides work with; what is written goes to a database of its own."""

    ground: Ground
    repo: type[Repo]
    writer: type[Repo]
    listing: type[Repo]
    engine: Engine
    writing: Engine
    admin: Engine

    def by_hand(self, work: Callable[[Session], object]) -> Callable[[], object]:
        """A session for *work* that reads."""
        sessions = sessionmaker(self.engine, expire_on_commit=False)

        def run() -> object:
            with sessions() as session:
                return work(session)

        return run

    def written(self, work: Callable[[Session], object]) -> Callable[[], object]:
        """A session for *work* that writes, in a transaction."""
        sessions = sessionmaker(self.writing, expire_on_commit=False)

        def run() -> object:
            with sessions.begin() as session:
                return work(session)

        return run


@contextmanager
def _scene(ground: Ground) -> Iterator[_Scene]:
    with ground.databases(2) as names:
        engines = [create_engine(ground.url(name)) for name in names]
        admin = create_engine(ground.url("postgres"), isolation_level="AUTOCOMMIT")
        directory = Servers([{"host": ground.server.host, "port": ground.server.port}], like="bench%")
        listing = ground.repo(names[0], pool_size=20, directory=directory)
        repo, writer = (ground.repo(name, pool_size=20) for name in names)
        fill(engines[0])
        reading, writing = engines
        yield _Scene(ground, repo, writer, listing, reading, writing, admin)
        for engine in (reading, writing, admin):
            engine.dispose()


def _sent(scene: _Scene, pair: Pair) -> list[str]:
    """How many statements each side sends."""
    counts = []
    for side in pair:
        for _ in range(_WARM):
            side()
        with count_statements(scene.ground.server) as counted:
            side()
        counts.append(str(len(counted)))
    return counts


def _timed(pair: Pair, rounds: int, calls: int) -> list[Spread]:
    """How many times as fast the first side is, and the microseconds of both."""
    repo, by_hand = pair
    timings: Timings = interleave({"repo": repo, "by hand": by_hand}, rounds=rounds, calls=calls)
    ratio = timings.ratio("", "by hand", "repo").value
    return [ratio, timings.time("repo").value, timings.time("by hand").value]


def _quick(scene: _Scene) -> dict[str, Pair]:
    return {**_lookups(scene), **_queries(scene), **_objects(scene), **_rows(scene), **_blocks(scene), **_sql(scene)}


def _lookups(scene: _Scene) -> dict[str, Pair]:
    repo, by_hand, key, email = scene.repo, scene.by_hand, _keys(), _emails()
    return {
        "get": (lambda: repo.get(User, key()), by_hand(lambda session: session.get(User, key()))),
        "get_one": (lambda: repo.get_one(User, key()), by_hand(lambda session: session.get_one(User, key()))),
        "get_by": (
            lambda: repo.get_by(User, email=email()),
            by_hand(lambda session: session.scalars(select(User).filter_by(email=email())).one_or_none()),
        ),
        "get_one_by": (
            lambda: repo.get_one_by(User, email=email()),
            by_hand(lambda session: session.scalars(select(User).filter_by(email=email())).one()),
        ),
        "all_by, 100 rows": (
            lambda: repo.all_by(User, city="London"),
            by_hand(lambda session: session.scalars(select(User).filter_by(city="London")).all()),
        ),
    }


def _queries(scene: _Scene) -> dict[str, Pair]:
    repo, by_hand, email = scene.repo, scene.by_hand, _emails()

    def one() -> Any:
        return select(User).where(User.email == email())

    def streamed() -> list[User]:
        with repo.stream(User, batch=ROWS // 2) as users:
            return list(users)

    def stream(session: Session) -> list[User]:
        return list(session.scalars(select(User).execution_options(yield_per=ROWS // 2)))

    return {
        "one": (lambda: repo.one(one()), by_hand(lambda session: session.scalars(one()).one())),
        "one_or_none": (lambda: repo.one_or_none(one()), by_hand(lambda session: session.scalars(one()).one_or_none())),
        "first": (
            lambda: repo.first(User),
            by_hand(lambda session: session.scalars(select(User).order_by(User.id).limit(1)).first()),
        ),
        "last": (
            lambda: repo.last(User),
            by_hand(lambda session: session.scalars(select(User).order_by(User.id.desc()).limit(1)).first()),
        ),
        "all, 1 row": (lambda: repo.all(one()), by_hand(lambda session: session.scalars(one()).all())),
        "all, 100 rows": (lambda: repo.all(User), by_hand(lambda session: session.scalars(select(User)).all())),
        "stream, 100 rows": (streamed, by_hand(stream)),
        "exists": (lambda: repo.exists(one()), by_hand(lambda session: session.scalar(select(one().exists())))),
        "count": (
            lambda: repo.count(User),
            by_hand(lambda session: session.scalar(select(func.count()).select_from(User))),
        ),
        "aggregate": (
            lambda: repo.aggregate(User, "max", User.age),
            by_hand(lambda session: session.scalar(select(func.max(User.age)))),
        ),
        "preload, 1 object": (
            lambda: repo.preload(repo.get(Author, 1), Author.posts),
            by_hand(lambda session: session.get(Author, 1, options=[selectinload(Author.posts)])),
        ),
    }


def _objects(scene: _Scene) -> dict[str, Pair]:
    repo, written, age = scene.writer, scene.written, _ages()
    ours = repo.get_one(User, 1)
    theirs = scene.written(lambda session: session.get_one(User, 2))()

    def change(session: Session) -> None:
        session.add(theirs)
        theirs.age = age()  # type: ignore[attr-defined]  # a User

    return {
        "reload": (lambda: repo.reload(ours), scene.by_hand(lambda session: session.get(User, 1))),
        "insert": (lambda: repo.insert(_person()), written(lambda session: session.add(_person()))),
        "insert, there already": (
            lambda: repo.insert(_person(id=1), on_conflict="nothing", conflict_target=User.id),
            written(
                lambda session: session.execute(
                    postgresql_insert(User).values(id=1, **_VALUES).on_conflict_do_nothing(index_elements=[User.id])
                )
            ),
        ),
        "insert_or_update": (
            lambda: repo.insert_or_update(_person()),
            written(lambda session: session.add(_person())),
        ),
        "update": (lambda: repo.update(ours, age=age()), written(change)),
        "insert and delete": (
            lambda: repo.delete(repo.insert(_person())),
            _both(written, lambda person, session: session.add(person), lambda person, session: session.delete(person)),
        ),
    }


def _both(
    written: Callable[[Callable[[Session], object]], Callable[[], object]],
    *steps: Callable[[User, Session], object],
) -> Callable[[], None]:
    """Two units of work, one after the other, on one object."""

    def run() -> None:
        person = _person()
        for step in steps:
            written(partial(step, person))()

    return run


def _rows(scene: _Scene) -> dict[str, Pair]:
    repo, written, key = scene.writer, scene.written, _keys()
    rows = [_VALUES] * 100
    return {
        "insert_all, 100 rows": (
            lambda: repo.insert_all(User, rows),
            written(lambda session: session.execute(insert(User), rows)),
        ),
        "update_all": (
            lambda: repo.update_all(select(User).where(User.id == key()), {"age": 7}),
            written(lambda session: session.execute(update(User).where(User.id == key()).values(age=7))),
        ),
        "delete_all": (
            lambda: repo.delete_all(select(User).where(User.id == -key())),
            written(lambda session: session.execute(delete(User).where(User.id == -key()))),
        ),
    }


def _blocks(scene: _Scene) -> dict[str, Pair]:
    repo, written, key, age = scene.writer, scene.written, _keys(), _ages()

    def grow() -> None:
        repo.update(repo.get_one(User, key()), age=age())

    def in_a_transaction() -> None:
        with repo.transaction():
            grow()

    def in_a_savepoint() -> None:
        with repo.transaction(), repo.savepoint():
            grow()

    def grow_by_hand(session: Session) -> None:
        session.get_one(User, key()).age = age()

    def nested(session: Session) -> None:
        with session.begin_nested():
            grow_by_hand(session)

    def on_one_connection() -> None:
        with repo.connection():
            for _ in range(3):
                repo.get(User, key())

    def thrice(session: Session) -> None:
        for _ in range(3):
            session.get(User, key())

    return {
        "transaction: get, update": (in_a_transaction, written(grow_by_hand)),
        "transact: get, update": (lambda: repo.transact(grow), written(grow_by_hand)),
        "savepoint: get, update": (in_a_savepoint, written(nested)),
        "connection: 3 times get": (on_one_connection, scene.by_hand(thrice)),
    }


def _sql(scene: _Scene) -> dict[str, Pair]:
    repo, engine, key = scene.repo, scene.engine, _keys()
    question = "SELECT count(*) FROM users"

    def session_get() -> object:
        with repo.session() as session:
            return session.get(User, key())

    def ask(of: Engine) -> object:
        with of.connect() as connection:
            return connection.execute(text(question)).scalar()

    def explain(session: Session) -> object:
        return session.scalars(text(f"EXPLAIN {select(User).compile(engine)}")).all()

    return {
        "session: get": (session_get, scene.by_hand(lambda session: session.get(User, key()))),
        "engine: execute": (lambda: ask(repo.engine()), lambda: ask(engine)),
        "execute": (lambda: repo.execute(question).scalar(), lambda: ask(engine)),
        "explain": (lambda: repo.explain(User), scene.by_hand(explain)),
    }


def _slow(scene: _Scene) -> dict[str, Pair]:
    """What is about databases: a connect for each call, and files made and removed."""
    repo, admin, number = scene.repo, scene.admin, itertools.count().__next__

    def by_hand(*statements: str, **parameters: Any) -> Any:
        with admin.connect() as connection:
            return [connection.execute(text(statement), parameters) for statement in statements][-1]

    def made() -> None:
        name = f"made{number()}"
        repo.create_database(name, template=TEMPLATE)
        repo.rename_database(name, f"{name}x")
        repo.drop_database(f"{name}x")

    def made_by_hand() -> None:
        name = f"made{number()}"
        by_hand(
            f"CREATE DATABASE {name} TEMPLATE {TEMPLATE}",
            f"ALTER DATABASE {name} RENAME TO {name}x",
            f"DROP DATABASE {name}x",
        )

    return {
        "ping": (repo.ping, lambda: by_hand("SELECT 1")),
        "databases": (
            scene.listing.databases,
            lambda: by_hand("SELECT datname FROM pg_database WHERE datname LIKE 'bench%'"),
        ),
        "database_exists": (
            lambda: repo.database_exists("nowhere"),
            lambda: by_hand("SELECT 1 FROM pg_database WHERE datname = :name", name="nowhere"),
        ),
        "create_, rename_, drop_database": (made, made_by_hand),
    }


_VALUES: Final[Mapping[str, Any]] = {"name": "Ada", "email": "ada@example.com", "age": 36, "city": "London"}


def _person(**more: Any) -> User:
    return User(**_VALUES, **more)


def _keys() -> Callable[[], int]:
    return itertools.cycle(range(1, ROWS + 1)).__next__


def _emails() -> Callable[[], str]:
    return itertools.cycle([f"{number}@example.com" for number in range(ROWS)]).__next__


def _ages() -> Callable[[], int]:
    """Ages that nobody has had: every update is one."""
    return itertools.count(1_000).__next__
