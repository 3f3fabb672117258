"""Values of every type are read as they were written, in databases that number their own types differently."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, TypeAlias
from uuid import UUID

import pytest
from sqlalchemy import (
    BigInteger,
    Boolean,
    Date,
    DateTime,
    Double,
    ForeignKey,
    Integer,
    Interval,
    LargeBinary,
    Numeric,
    String,
    Text,
    Time,
    TypeDecorator,
    Uuid,
    any_,
    create_engine,
    insert,
    select,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, DOMAIN, ENUM, HSTORE, INT8RANGE, JSONB, TSTZRANGE, Range
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship
from sqlalchemy.pool import NullPool

from shardrepo import Repo
from shardrepo.testing.servers import Server

from ..conftest import run_sql

pytestmark = [
    pytest.mark.verbs,
    # SQLAlchemy's, about its own DOMAIN, and in 2.1.7 about its HSTORE, when one is compared.
    pytest.mark.filterwarnings("ignore:Type object:sqlalchemy.exc.SADeprecationWarning"),
]

SANDBOXED = True

Values: TypeAlias = dict[str, Any]

# More often than psycopg executes a statement before it has the server prepare it.
TURNS = 7


class Mood(enum.Enum):
    """Stored by name."""

    SAD = 1
    HAPPY = 2
    SO_SO = 3


class Base(DeclarativeBase):
    """Root of this module's model."""


class Sample(Base):
    """A column of each type; every one may be NULL."""

    __tablename__ = "samples"

    id: Mapped[int] = mapped_column(primary_key=True)
    database: Mapped[str]
    moment: Mapped[Any] = mapped_column(DateTime(timezone=True), nullable=True)
    clock_and_day: Mapped[Any] = mapped_column(DateTime, nullable=True)
    day: Mapped[Any] = mapped_column(Date, nullable=True)
    clock: Mapped[Any] = mapped_column(Time, nullable=True)
    span: Mapped[Any] = mapped_column(Interval, nullable=True)
    amount: Mapped[Any] = mapped_column(Numeric(30, 10), nullable=True)
    uuid: Mapped[Any] = mapped_column(Uuid, nullable=True)
    numbers: Mapped[Any] = mapped_column(ARRAY(BigInteger), nullable=True)
    words: Mapped[Any] = mapped_column(ARRAY(Text), nullable=True)
    document: Mapped[Any] = mapped_column(JSONB(none_as_null=True), nullable=True)
    mood: Mapped[Any] = mapped_column(ENUM(Mood, name="mood"), nullable=True)
    moods: Mapped[Any] = mapped_column(ARRAY(ENUM(Mood, name="mood")), nullable=True)
    labels: Mapped[Any] = mapped_column(HSTORE, nullable=True)
    score: Mapped[Any] = mapped_column(DOMAIN("score", Integer), nullable=True)
    keys: Mapped[Any] = mapped_column(INT8RANGE, nullable=True)
    period: Mapped[Any] = mapped_column(TSTZRANGE, nullable=True)
    raw: Mapped[Any] = mapped_column(LargeBinary, nullable=True)
    flag: Mapped[Any] = mapped_column(Boolean, nullable=True)
    real: Mapped[Any] = mapped_column(Double, nullable=True)
    big: Mapped[Any] = mapped_column(BigInteger, nullable=True)


COLUMNS = [column.key for column in Sample.__table__.columns if column.nullable]

NOON = datetime(2026, 2, 28, 12, 0, 0, 1, UTC)

SAMPLES: dict[str, Values] = {
    "ordinary": {
        "moment": datetime(2026, 2, 28, 23, 59, 59, 999999, timezone(timedelta(hours=5, minutes=45))),
        "clock_and_day": datetime(2026, 2, 28, 23, 59, 59, 123456),
        "day": date(2024, 2, 29),
        "clock": time(23, 59, 59, 999999),
        "span": timedelta(days=400, hours=-1, microseconds=1),
        "amount": Decimal("12345678901234567890.0123456789"),
        "uuid": UUID("12345678-1234-5678-1234-567812345678"),
        "numbers": [1, -2, None, 3],
        "words": ["a", "", None, "NULL", 'quo"te', "back\\slash", "{x,y}", "ü€😀"],
        "document": {"text": "ü€😀", "list": [1, 2.5, None, True], "nested": {"": {}}},
        "mood": Mood.HAPPY,
        "moods": [Mood.SO_SO, None, Mood.SAD],
        "labels": {"a": "b", "none": None, 'quo"te': "x=>y, z"},
        "score": 7,
        "keys": Range(-5, 10),
        "period": Range(NOON, NOON + timedelta(microseconds=1), bounds="[]"),
        "raw": bytes(range(256)),
        "flag": True,
        "real": 0.1,
        "big": 2**53 + 1,
    },
    "extreme": {
        "moment": datetime.max.replace(tzinfo=UTC),
        "clock_and_day": datetime.min,
        "day": date.min,
        "clock": time(0),
        "span": timedelta(days=-99999, microseconds=-1),
        "amount": Decimal("-99999999999999999999.9999999999"),
        "uuid": UUID(int=0),
        "numbers": [[2**63 - 1, -(2**63)], [0, 1]],
        "words": [],
        "document": [],
        "mood": Mood.SAD,
        "moods": [],
        "labels": {},
        "score": -(2**31),
        "keys": Range(empty=True),
        "period": Range(None, NOON, bounds="()"),
        "raw": b"",
        "flag": False,
        "real": float("-inf"),
        "big": -(2**63),
    },
    "null": dict.fromkeys(COLUMNS),
}

TYPES = "SELECT typname, oid::int FROM pg_type WHERE typname IN ('hstore', 'mood', '_mood', 'score')"


@pytest.fixture(scope="module")
def typed(server: Server) -> Iterator[tuple[str, str]]:
    """Two databases with the same table; its types have other numbers in each, as a server never gives one twice."""
    names = ("types1", "types2")
    server.create_databases(names)
    for name in names:
        run_sql(server, name, "CREATE EXTENSION hstore")
        Base.metadata.create_all(create_engine(server.url(name), poolclass=NullPool))
    one, other = (dict(run_sql(server, name, TYPES)) for name in names)
    assert one.keys() == other.keys() == {"hstore", "mood", "_mood", "score"}
    assert not {(name, number) for name, number in one.items()} & set(other.items())
    yield names
    for name in names:
        server.drop_database(name, force=True)


@pytest.fixture
def repo(typed: tuple[str, str], make_repo: Callable[..., type[Repo]]) -> type[Repo]:
    """A repo whose default is the first of both."""
    return make_repo(typed[0])


def inserted(repo: type[Repo], values: Values) -> list[Any]:
    stored = repo.insert(Sample(**values))
    return [stored, repo.get_one(Sample, stored.id), repo.reload(stored)]


def updated(repo: type[Repo], values: Values) -> list[Any]:
    """Over values and over NULLs, by an object and by a statement."""
    full, empty = (repo.insert(Sample(**{**values, **SAMPLES[name]})) for name in ("ordinary", "null"))
    repo.update(full, values)
    repo.execute(update(Sample).where(Sample.id == empty.id).values(values))
    return [full, repo.get_one(Sample, full.id), repo.get_one(Sample, empty.id)]


def inserted_at_once(repo: type[Repo], values: Values) -> list[Any]:
    repo.insert_all(Sample, [values] * 3)
    return repo.all(select(Sample).order_by(Sample.id.desc()).limit(3))


def streamed(repo: type[Repo], values: Values) -> list[Any]:
    repo.insert_all(Sample, [values] * 3)
    with repo.stream(select(Sample).order_by(Sample.id.desc()).limit(3), batch=2) as samples:
        return list(samples)


def executed(repo: type[Repo], values: Values) -> list[Any]:
    """As objects by RETURNING, as the rows of a query, and in a session."""
    stored = repo.execute(insert(Sample).values(values).returning(Sample)).scalar_one()
    query = select(*Sample.__table__.columns).where(Sample.id == stored.id)
    with repo.session() as session:
        return [stored, repo.execute(query).one(), repo.one(query), session.get_one(Sample, stored.id)]


def looked_for(repo: type[Repo], values: Values) -> list[Any]:
    """By every one of its values."""
    key = repo.insert(Sample(**values)).id
    same = [getattr(Sample, name) == value for name, value in values.items()]
    return [repo.one(select(Sample).where(Sample.id == key, *same))]


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("way", [inserted, updated, inserted_at_once, streamed, executed, looked_for])
def test_what_is_read_is_what_was_written(
    repo: type[Repo], typed: tuple[str, str], way: Callable[[type[Repo], Values], list[Any]], sample: str
) -> None:
    """Equal values of the same types, in two databases by turns, whether a statement is prepared or not."""
    for _ in range(TURNS):
        for name in typed:
            written = {"database": name, **SAMPLES[sample]}
            with repo.using(name):
                for found in way(repo, written):
                    read = {name: getattr(found, name) for name in written}
                    assert read == written
                    assert {name: type(value) for name, value in read.items()} == {
                        name: type(value) for name, value in written.items()
                    }


def test_an_enum_in_a_query(repo: type[Repo], typed: tuple[str, str]) -> None:
    """It is compared with one, with several, with an array and within one; and it has the order of its type."""
    for name in typed:
        with repo.using(name):
            repo.execute("DELETE FROM samples")
            moods = [(Mood.HAPPY, [Mood.HAPPY, Mood.SAD]), (Mood.SAD, [Mood.SO_SO]), (None, [])]
            repo.insert_all(Sample, [{"database": name, "mood": mood, "moods": several} for mood, several in moods])
    for _ in range(TURNS):
        for name in typed:
            with repo.using(name):
                for criterion in (
                    Sample.mood == Mood.HAPPY,
                    Sample.mood.in_([Mood.HAPPY, Mood.SO_SO]),
                    Sample.mood == any_(Sample.moods),
                    Sample.mood > Mood.SAD,
                    Sample.moods == [Mood.HAPPY, Mood.SAD],
                    Sample.moods.contains([Mood.SAD]),
                    Sample.moods.overlap([Mood.HAPPY]),
                ):
                    assert repo.all(select(Sample.database, Sample.mood).where(criterion)) == [(name, Mood.HAPPY)]
                assert repo.get_one_by(Sample, mood=Mood.SAD).moods == [Mood.SO_SO]
                assert repo.all_by(Sample, moods=[Mood.SO_SO])[0].mood is Mood.SAD
                assert repo.aggregate(Sample, "max", Sample.mood) is Mood.HAPPY


class Named(TypeDecorator[str]):
    """Stored in another spelling."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: object) -> str | None:
        return None if value is None else value.upper()

    def process_result_value(self, value: str | None, dialect: object) -> str | None:
        return None if value is None else value.lower()


KEYS: dict[str, tuple[Any, list[Any]]] = {
    "integer": (Integer(), [2, 1, 3]),
    "numeric": (Numeric(10, 2), [Decimal("1.50"), Decimal("-2.00")]),
    "text": (String(20), ["b", "", "quo'te", "{x,y}"]),
    "spelling": (Named(), ["b", "a"]),
    "uuid": (Uuid(), [UUID(int=2), UUID(int=1)]),
    "enum": (ENUM(Mood, name="mood", create_type=False), [Mood.SO_SO, Mood.SAD]),
    "bytes": (LargeBinary(), [bytes(range(256)), b""]),
    "moment": (DateTime(timezone=True), [NOON, NOON + timedelta(microseconds=1)]),
    "day": (Date(), [date(2026, 1, 2), date.min]),
    "range": (INT8RANGE(), [Range(1, 3), Range(5, None)]),
}


@pytest.mark.parametrize("kind", KEYS)
def test_keys_of_every_type(repo: type[Repo], typed: tuple[str, str], kind: str) -> None:
    """Objects are loaded anew, and with what refers to them, by keys of any type."""
    key_type, keys = KEYS[kind]
    parent, child = related(key_type)
    for name in typed:
        with repo.using(name):
            parent.metadata.create_all(repo.engine())
            repo.insert_all(parent, [{"key": key} for key in keys])
            repo.insert_all(child, [{"label": f"{name} {n}", "parent_key": key} for n, key in enumerate(keys)])
    for _ in range(TURNS):
        for name in typed:
            with repo.using(name):
                parents = [repo.get_one(parent, key) for key in keys]
                assert [again.key for again in repo.reload(parents)] == keys
                repo.preload(parents, parent.children)
                assert [[each.label for each in one.children] for one in parents] == [
                    [f"{name} {n}"] for n in range(len(keys))
                ]
                children = repo.preload(repo.all(select(child).order_by(child.id)), child.parent)
                assert [each.parent.key for each in children] == keys
    for name in typed:
        with repo.using(name):
            parent.metadata.drop_all(repo.engine())


def related(key_type: Any) -> tuple[Any, Any]:
    """Two mapped classes, the first of which has a key of this type."""

    class Own(DeclarativeBase):
        pass

    class Parent(Own):
        __tablename__ = "parents"

        key: Mapped[Any] = mapped_column(key_type, primary_key=True)
        children: Mapped[list[Any]] = relationship("Child", back_populates="parent")

    class Child(Own):
        __tablename__ = "children"

        id: Mapped[int] = mapped_column(primary_key=True)
        label: Mapped[str]
        parent_key: Mapped[Any] = mapped_column(ForeignKey(Parent.key))
        parent: Mapped[Any] = relationship(Parent, back_populates="children")

    return Parent, Child
