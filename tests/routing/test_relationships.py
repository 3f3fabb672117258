"""Nothing of another database comes in by any kind of relationship, nor by a statement that asks by an object."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import ForeignKey, create_engine, delete, exists, insert, inspect, select, update
from sqlalchemy.exc import InvalidRequestError, SAWarning
from sqlalchemy.ext.associationproxy import AssociationProxy, association_proxy
from sqlalchemy.orm import (
    DeclarativeBase,
    DynamicMapped,
    Mapped,
    Session,
    WriteOnlyMapped,
    attribute_keyed_dict,
    make_transient,
    make_transient_to_detached,
    mapped_column,
    relationship,
    with_parent,
)
from sqlalchemy.orm.exc import DetachedInstanceError
from sqlalchemy.orm.loading import merge_frozen_result
from sqlalchemy.pool import NullPool

from shardrepo import Repo, WrongDatabaseError
from shardrepo.testing.servers import Server, count_statements

from ..conftest import run_sql
from .conftest import Pair

pytestmark = pytest.mark.routing


class Base(DeclarativeBase):
    """Root of this module's models."""


class Owner(Base):
    """Has a collection of every kind."""

    __tablename__ = "owners"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    listed: Mapped[list[Thing]] = relationship(back_populates="lister", foreign_keys="Thing.lister_id")
    written: WriteOnlyMapped[Thing] = relationship(foreign_keys="Thing.writer_id", passive_deletes=True)
    watched: DynamicMapped[Thing] = relationship(foreign_keys="Thing.watcher_id")
    named: Mapped[dict[str, Thing]] = relationship(
        collection_class=attribute_keyed_dict("name"), foreign_keys="Thing.namer_id"
    )
    links: Mapped[list[Link]] = relationship()
    linked: AssociationProxy[list[Thing]] = association_proxy("links", "thing", creator=lambda thing: Link(thing=thing))


class Thing(Base):
    __tablename__ = "things"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    lister_id: Mapped[int | None] = mapped_column(ForeignKey("owners.id"))
    writer_id: Mapped[int | None] = mapped_column(ForeignKey("owners.id"))
    watcher_id: Mapped[int | None] = mapped_column(ForeignKey("owners.id"))
    namer_id: Mapped[int | None] = mapped_column(ForeignKey("owners.id"))
    lister: Mapped[Owner | None] = relationship(back_populates="listed", foreign_keys=lister_id)


class Link(Base):
    __tablename__ = "links"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int | None] = mapped_column(ForeignKey("owners.id"))
    thing_id: Mapped[int | None] = mapped_column(ForeignKey("things.id"))
    thing: Mapped[Thing | None] = relationship()


ROWS = """
    TRUNCATE owners, things, links RESTART IDENTITY;
    INSERT INTO owners (name) VALUES ('owner of {0}');
    INSERT INTO things (name, lister_id, writer_id, watcher_id, namer_id) VALUES ('thing of {0}', 1, 1, 1, 1);
    INSERT INTO links (owner_id, thing_id) VALUES (1, 1)
"""


class Both(Pair):
    """The same, with this module's tables."""

    def contents(self) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        everything = " UNION ALL ".join(f"SELECT '{name}', {name}::text FROM {name}" for name in Base.metadata.tables)
        one, other = (self.sql(name, f"{everything} ORDER BY 1, 2") for name in (self.a, self.b))
        return one, other


@pytest.fixture(scope="module")
def names(server: Server) -> Iterator[tuple[str, str]]:
    names = ("related1", "related2")
    server.create_databases(names)
    for name in names:
        Base.metadata.create_all(create_engine(server.url(name), poolclass=NullPool))
    yield names
    for name in names:
        server.drop_database(name, force=True)


@pytest.fixture
def pair(server: Server, names: tuple[str, str]) -> Both:
    """Two databases with the same keys in every table, whose texts say which one they are in."""
    for label, name in zip("AB", names, strict=True):
        run_sql(server, name, ROWS.format(label))
    return Both(server, *names)


def in_session(repo: type[Repo], work: Callable[[Session, Owner], object]) -> None:
    """Work with the owner that is stored here."""
    with repo.session() as session:
        owner = session.get_one(Owner, 1)
        work(session, owner)
        session.commit()


def with_owner(repo: type[Repo], work: Callable[[Owner], object]) -> None:
    """Change the owner that is stored here, and update it."""
    owner = repo.preload(repo.get_one(Owner, 1), Owner.listed, Owner.named, Owner.links)
    work(owner)
    repo.update(owner)


def as_new(thing: Thing, key: int) -> Thing:
    make_transient(thing)
    thing.id = key
    return thing


def as_stored(thing: Thing) -> Thing:
    make_transient(thing)
    make_transient_to_detached(thing)
    return thing


def merged_frozen(repo: type[Repo], session: Session, foreign: str, *, load: bool) -> None:
    """What was read in another database and kept, as a cache does whose keys forget the database."""
    with repo.using(foreign), repo.session() as elsewhere:
        kept = elsewhere.execute(select(Thing)).freeze()
    merge_frozen_result(session, select(Thing), kept, load=load)()


# A thing or an owner of B, brought into A, where the same keys are other rows.
WRITES: dict[str, Callable[[type[Repo], Thing, Owner, str], object]] = {
    "list, verb": lambda repo, thing, *_: with_owner(repo, lambda owner: owner.listed.append(thing)),
    "list, session": lambda repo, thing, *_: in_session(repo, lambda _, owner: owner.listed.append(thing)),
    "list, without autoflush": lambda repo, thing, *_: in_session(
        repo, lambda session, owner: assign_unflushed(session, owner, thing)
    ),
    "backref, verb": lambda repo, thing, *_: with_owner(repo, lambda owner: setattr(thing, "lister", owner)),
    "owner of the other side": lambda repo, thing, *_: repo.update(thing, lister=repo.get_one(Owner, 1)),
    "dict, insert": lambda repo, thing, *_: repo.insert(Owner(name="new", named={thing.name: thing})),
    "dict, update": lambda repo, thing, *_: repo.update(
        repo.preload(repo.get_one(Owner, 1), Owner.named), named={thing.name: thing}
    ),
    "dict, session": lambda repo, thing, *_: in_session(
        repo, lambda _, owner: owner.named.__setitem__(thing.name, thing)
    ),
    "write-only, insert": lambda repo, thing, *_: repo.insert(Owner(name="new", written=[thing])),
    "write-only, verb": lambda repo, thing, *_: with_owner(repo, lambda owner: owner.written.add(thing)),
    "write-only, removal": lambda repo, thing, *_: with_owner(repo, lambda owner: owner.written.remove(thing)),
    "write-only, session": lambda repo, thing, *_: in_session(repo, lambda _, owner: owner.written.add(thing)),
    "dynamic, verb": lambda repo, thing, *_: with_owner(repo, lambda owner: owner.watched.append(thing)),
    "dynamic, removal": lambda repo, thing, *_: with_owner(repo, lambda owner: owner.watched.remove(thing)),
    "dynamic, session": lambda repo, thing, *_: in_session(repo, lambda _, owner: owner.watched.append(thing)),
    "proxy, insert": lambda repo, thing, *_: repo.insert(Owner(name="new", linked=[thing])),
    "proxy, verb": lambda repo, thing, *_: with_owner(repo, lambda owner: owner.linked.append(thing)),
    "proxy, session": lambda repo, thing, *_: in_session(repo, lambda _, owner: owner.linked.append(thing)),
    "cascade of a delete": lambda repo, thing, *_: in_session(
        repo, lambda session, owner: delete_with(session, owner, thing)
    ),
    "made transient, add": lambda repo, thing, *_: in_session(repo, lambda session, _: session.add(as_new(thing, 77))),
    "made transient, merge": lambda repo, thing, *_: in_session(
        repo, lambda session, _: session.merge(as_new(thing, 77))
    ),
    "made transient, bulk": lambda repo, thing, *_: in_session(
        repo, lambda session, _: session.bulk_save_objects([as_new(thing, 77)])
    ),
    "made transient and detached": lambda repo, thing, *_: repo.update(as_stored(thing), name="changed"),
    "deep copy": lambda repo, thing, *_: repo.update(copy.deepcopy(thing), name="changed"),
    "frozen result": lambda repo, _thing, _owner, foreign: in_session(
        repo, lambda session, _: merged_frozen(repo, session, foreign, load=True)
    ),
    "frozen result, not loaded": lambda repo, _thing, _owner, foreign: in_session(
        repo, lambda session, _: merged_frozen(repo, session, foreign, load=False)
    ),
    "update_all": lambda repo, _, owner, *__: repo.update_all(
        select(Thing).where(Thing.lister == owner), {"name": "changed"}
    ),
    "delete_all": lambda repo, _, owner, *__: repo.delete_all(select(Thing).where(with_parent(owner, Owner.listed))),
    "update by an object": lambda repo, _, owner, *__: repo.execute(
        update(Thing).where(Thing.lister == owner).values(name="changed")
    ),
    "delete by an object": lambda repo, thing, *_: repo.execute(delete(Owner).where(Owner.written.contains(thing))),
    "update of a collection": lambda repo, _, owner, *__: repo.execute(owner.written.update().values(name="changed")),
    "delete of a collection": lambda repo, _, owner, *__: repo.execute(owner.written.delete()),
    "insert from what an object has": lambda repo, _, owner, *__: repo.execute(
        insert(Thing).from_select(["name"], select(Thing.name).where(Thing.lister == owner))
    ),
    "update by an object, session": lambda repo, _, owner, *__: in_session(
        repo, lambda session, _: session.execute(update(Thing).where(Thing.lister == owner).values(name="changed"))
    ),
    "update by an object, query": lambda repo, _, owner, *__: in_session(
        repo, lambda session, _: session.query(Thing).filter(Thing.lister == owner).update({"name": "changed"})
    ),
    "update by an object, engine": lambda repo, _, owner, *__: on_engine(
        repo, update(Thing).where(Thing.lister == owner).values(name="changed")
    ),
}


def assign_unflushed(session: Session, owner: Owner, thing: Thing) -> None:
    with session.no_autoflush:
        owner.listed = [thing]


def delete_with(session: Session, owner: Owner, thing: Thing) -> None:
    with session.no_autoflush:
        session.delete(owner)
        owner.listed.append(thing)


def on_engine(repo: type[Repo], statement: Any) -> None:
    with repo.engine().begin() as connection:
        connection.execute(statement)


@pytest.mark.parametrize("way", WRITES)
def test_no_way_in_for_what_another_database_has(repo: type[Repo], pair: Both, way: str) -> None:
    """An object of B is neither written into A nor has anything written there in its name, and stays what it was."""
    with repo.using(pair.b):
        thing, owner = repo.get_one(Thing, 1), repo.get_one(Owner, 1)
    before = pair.contents()
    with pytest.raises(WrongDatabaseError) as caught:
        WRITES[way](repo, thing, owner, pair.b)
    homes = {pair.home(pair.a), pair.home(pair.b)}
    assert {caught.value.expected, caught.value.found} == homes
    assert pair.contents() == before
    assert repo.home(thing) == repo.home(owner) == pair.home(pair.b)


def test_every_kind_of_collection_is_written_at_home(repo: type[Repo], pair: Both) -> None:
    """What is refused elsewhere is what works here, by the same calls."""
    things = [repo.insert(Thing(name=name)) for name in ("listed", "written", "watched", "linked", "named")]
    with_owner(repo, lambda owner: owner.listed.append(things[0]))
    with_owner(repo, lambda owner: owner.written.add(things[1]))
    with_owner(repo, lambda owner: owner.watched.append(things[2]))
    with_owner(repo, lambda owner: owner.linked.append(things[3]))
    repo.update(repo.preload(repo.get_one(Owner, 1), Owner.named), named={"named": things[4]})
    assert pair.sql(pair.a, "SELECT name, lister_id, writer_id, watcher_id, namer_id FROM things ORDER BY id") == [
        ("thing of A", 1, 1, 1, None),
        ("listed", 1, None, None, None),
        ("written", None, 1, None, None),
        ("watched", None, None, 1, None),
        ("linked", None, None, None, None),
        ("named", None, None, None, 1),
    ]
    assert pair.sql(pair.a, "SELECT owner_id, thing_id FROM links ORDER BY id") == [(1, 1), (1, things[3].id)]


READS: dict[str, Callable[[type[Repo], Thing, Owner], object]] = {
    "all": lambda repo, _, owner: repo.all(select(Thing).where(Thing.lister == owner)),
    "count": lambda repo, _, owner: repo.count(select(Thing).where(with_parent(owner, Owner.named))),
    "exists": lambda repo, _, owner: repo.exists(select(Thing).where(Thing.lister != owner)),
    "one, in a subquery": lambda repo, _, owner: repo.one(select(Owner).where(exists().where(Thing.lister == owner))),
    "first, contains": lambda repo, thing, _: repo.first(select(Owner).where(Owner.listed.contains(thing))),
    "write-only": lambda repo, _, owner: repo.all(owner.written.select()),
    "stream": lambda repo, _, owner: streamed(repo, owner.written.select()),
    "session": lambda repo, _, owner: in_session(repo, lambda session, _: session.scalars(owner.written.select())),
    "query": lambda repo, _, owner: in_session(
        repo, lambda session, _: session.query(Thing).filter(Thing.lister == owner).all()
    ),
}


def streamed(repo: type[Repo], query: Any) -> list[Any]:
    with repo.stream(query) as found:
        return list(found)


@pytest.mark.parametrize("way", READS)
def test_no_answer_for_what_another_database_has(repo: type[Repo], pair: Both, way: str) -> None:
    """A query that asks by an object of B is not sent to A, and is answered at home, also when both were compiled."""
    with repo.using(pair.b):
        thing, owner = repo.get_one(Thing, 1), repo.get_one(Owner, 1)
        READS[way](repo, thing, owner)
    with count_statements(pair.server, database=pair.a) as sent:
        with pytest.raises(WrongDatabaseError) as caught:
            READS[way](repo, thing, owner)
    assert (caught.value.expected, caught.value.found) == (pair.home(pair.a), pair.home(pair.b))
    assert not [one.sql for one in sent.statements if "things" in one.sql]
    READS[way](repo, repo.get_one(Thing, 1), repo.get_one(Owner, 1))


def test_a_new_object_may_be_asked_by(repo: type[Repo], pair: Both) -> None:
    """One that is stored nowhere, or was loaded past every repo, belongs to no other database."""
    assert repo.all(select(Thing.name).where(Thing.lister == Owner(id=1))) == ["thing of A"]
    with Session(repo.engine()) as session:
        owner = session.get_one(Owner, 1)
        assert session.scalars(select(Thing.name).where(Thing.lister == owner)).all() == ["thing of A"]
        assert session.scalars(owner.written.select()).one().name == "thing of A"


def test_a_refused_statement_leaves_a_transaction_as_it_was(repo: type[Repo], pair: Both) -> None:
    """It was not sent, so that the transaction goes on."""
    with repo.using(pair.b):
        owner = repo.get_one(Owner, 1)
    with repo.transaction():
        repo.insert(Thing(name="before"))
        with pytest.raises(WrongDatabaseError):
            repo.all(select(Thing).where(Thing.lister == owner))
        repo.insert(Thing(name="after"))
    assert pair.sql(pair.a, "SELECT name FROM things WHERE id > 1 ORDER BY id") == [("before",), ("after",)]


IGNORED: dict[str, Callable[[type[Repo], Thing], object]] = {
    "backref, session": lambda repo, thing: in_session(repo, lambda _, owner: setattr(thing, "lister", owner)),
    "backref, not loaded": lambda repo, thing: refer_to(repo, thing, repo.get_one(Owner, 1)),
    "write-only, session": lambda repo, thing: in_session(repo, lambda _, owner: owner.written.remove(thing)),
    "dynamic, session": lambda repo, thing: in_session(repo, lambda _, owner: owner.watched.remove(thing)),
}


def refer_to(repo: type[Repo], thing: Thing, owner: Owner) -> None:
    thing.lister = owner
    repo.update(owner)


@pytest.mark.parametrize("way", IGNORED)
def test_what_a_session_never_takes_in_is_not_written(repo: type[Repo], pair: Both, way: str) -> None:
    """Where SQLAlchemy itself leaves an object out and warns of it, one of B is left out too."""
    with repo.using(pair.b):
        thing = repo.get_one(Thing, 1)
    before = pair.contents()
    with pytest.warns(SAWarning, match="not in session"):
        IGNORED[way](repo, thing)
    assert pair.contents() == before
    assert inspect(thing).session is None


def test_what_a_session_does_not_hold_it_does_not_load(repo: type[Repo], pair: Both) -> None:
    """`refresh` and `expire` take no object of B; what a detached one has not loaded is loaded from nowhere."""
    with repo.using(pair.b):
        owner = repo.get_one(Owner, 1)
    for work in (Session.refresh, Session.expire):
        with pytest.raises(InvalidRequestError, match="not persistent"):
            in_session(repo, lambda session, _, work=work: work(session, owner))
    for name in ("listed", "named", "links", "linked"):
        with pytest.raises(DetachedInstanceError):
            list(getattr(owner, name))
    with pytest.warns(SAWarning, match="detached"):
        assert owner.watched.all() == []


def test_values_belong_to_nobody(repo: type[Repo], pair: Both) -> None:
    """Keys and values that are passed as such are written where they are passed to, and nowhere else."""
    with repo.using(pair.b):
        thing, owner = repo.get_one(Thing, 1), repo.get_one(Owner, 1)
    before = pair.contents()
    with repo.session() as session:
        session.bulk_insert_mappings(inspect(Thing), [{"name": "bulk", "lister_id": owner.id}])
        session.bulk_update_mappings(inspect(Owner), [{"id": owner.id, "name": "bulk"}])
        session.bulk_save_objects([Thing(name="reference", lister=owner)])
        session.execute(update(Thing).where(Thing.id == thing.id).values(name="by key"))
        session.commit()
    repo.update(repo.get_one(Thing, 1), watcher_id=owner.id)
    repo.execute(insert(Thing), [{"name": "many", "namer_id": owner.id}])
    assert pair.sql(pair.a, "SELECT name, lister_id, watcher_id, namer_id FROM things ORDER BY id") == [
        ("by key", 1, 1, 1),
        ("bulk", 1, None, None),
        ("reference", None, None, None),
        ("many", None, None, 1),
    ]
    assert pair.sql(pair.a, "SELECT name FROM owners") == [("bulk",)]
    assert pair.contents()[1] == before[1]
    with pytest.raises(ValueError, match="unknown column 'lister'"):
        repo.insert_all(Thing, [{"name": "x", "lister": owner}])
