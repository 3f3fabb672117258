"""What the library leans on in psycopg, libpq, SQLAlchemy and Alembic without a promise, a test for each."""

from __future__ import annotations

import ast
import gc
import inspect
import textwrap
import threading
import traceback
import weakref
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from time import monotonic
from typing import Any

import psycopg
import pytest
from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.script import ScriptDirectory
from psycopg import pq
from psycopg.adapt import AdaptersMap, Loader
from sqlalchemy import create_engine, event, func, insert, select, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.inspection import inspect as inspect_mapped
from sqlalchemy.orm import (
    InstanceState,
    LoaderCriteriaOption,
    RelationshipProperty,
    Session,
    joinedload,
    selectinload,
    with_loader_criteria,
    with_parent,
)
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy.orm.base import DEFAULT_STATE_ATTR
from sqlalchemy.orm.loading import merge_frozen_result
from sqlalchemy.pool import ConnectionPoolEntry, NullPool, Pool
from sqlalchemy.pool.base import _ConnectionFairy, _ConnectionRecord
from sqlalchemy.sql import operators

from shardrepo import AuthenticationError, ConnectError, Database, UnknownDatabaseError
from shardrepo.config import Config
from shardrepo.connection import DriverConnection, NoAnswer
from shardrepo.diagnosis import Trace
from shardrepo.driver import Target, connect
from shardrepo.engines import SharedDialect
from shardrepo.ledger import Ledger
from shardrepo.pool import _IDLE, _IN_TRANSACTION
from shardrepo.session import Snapshot
from shardrepo.testing.servers import Server

from .migrations import write_script
from .models import Post, Tag, User

# psycopg and libpq


def conninfo(server: Server, database: str = "postgres") -> bytes:
    url = server.url(database)
    return psycopg.conninfo.make_conninfo(
        host=url.host, port=url.port, user=url.username, password=url.password, dbname=database
    ).encode()


@pytest.fixture
def pgconn(server: Server) -> Iterator[pq.abc.PGconn]:
    """libpq's own connection."""
    pgconn = pq.PGconn.connect(conninfo(server))
    assert pgconn.status == pq.ConnStatus.OK
    pgconn.nonblocking = 1
    yield pgconn
    pgconn.finish()


@pytest.fixture
def connection(pgconn: pq.abc.PGconn) -> Iterator[DriverConnection]:
    """The library's connection, around it."""
    with closing(DriverConnection(pgconn)) as connection:
        yield connection


def test_a_connection_can_be_made_of_libpqs(pgconn: pq.abc.PGconn) -> None:
    """`psycopg.Connection(pgconn)` is a whole connection: it runs statements and transactions (driver.connect)."""
    connection: psycopg.Connection[Any] = psycopg.Connection(pgconn)
    assert connection.execute("SELECT 1").fetchone() == (1,)
    assert pgconn.transaction_status == pq.TransactionStatus.INTRANS
    connection.commit()
    with connection.transaction():
        assert connection.execute("SELECT %s::text", ("x",)).fetchone() == ("x",)
    connection.close()
    assert connection.closed


def test_a_connection_takes_its_adapters_from_an_attribute(connection: DriverConnection) -> None:
    """What is set as `_adapters` is what cursors load by, and is not shared with the map it was made of."""

    class Shouting(Loader):
        def load(self, data: Any) -> str:
            return bytes(data).decode().upper()

    assert isinstance(connection._adapters, AdaptersMap | None)
    connection._adapters = own = AdaptersMap(psycopg.adapters)
    own.register_loader("text", Shouting)
    assert connection.adapters is own
    assert connection.execute("SELECT 'x'::text").fetchone() == ("X",)
    assert psycopg.adapters.get_loader(25, pq.Format.TEXT) is not Shouting


@pytest.mark.parametrize("mode", [True, False])
def test_a_connection_takes_its_autocommit_mode_from_an_attribute(connection: DriverConnection, mode: bool) -> None:
    """With `_autocommit` a statement leaves no transaction open, without it leaves one."""
    connection.autocommit = not mode
    connection._autocommit = mode
    connection.execute("SELECT 1")
    assert connection.autocommit is mode
    assert (connection.info.transaction_status == pq.TransactionStatus.IDLE) is mode
    connection.rollback()


@pytest.mark.parametrize("exchange", ["execute", "commit", "rollback", "prepared", "stream"])
def test_every_exchange_goes_through_wait(connection: DriverConnection, exchange: str) -> None:
    """A connection that was used is known by its method `wait`, without which nothing reaches the server."""
    if exchange in ("commit", "rollback"):
        connection.execute("SELECT 1")
    connection.used = False
    match exchange:
        case "execute":
            connection.execute("SELECT 1")
        case "prepared":
            connection.execute("SELECT 1", prepare=True)
        case "stream":
            list(connection.cursor().stream("SELECT 1"))
        case _:
            getattr(connection, exchange)()
    assert connection.used


def test_the_numbers_of_transaction_states(pgconn: pq.abc.PGconn) -> None:
    """The pool compares `pgconn.transaction_status` with numbers, to load no driver."""
    states = pq.TransactionStatus
    assert (states.IDLE, (states.INTRANS, states.INERROR)) == (_IDLE, _IN_TRANSACTION)
    assert pgconn.transaction_status == _IDLE


@pytest.mark.parametrize(
    ("options", "kind", "sqlstate"),
    [
        ({"password": "wrong"}, AuthenticationError, "28P01"),
        ({"name": "no such database"}, UnknownDatabaseError, "3D000"),
    ],
)
def test_libpqs_trace_tells_the_sqlstate(
    server: Server, options: dict[str, str], kind: type[ConnectError], sqlstate: str | None
) -> None:
    """A failed connect has its SQLSTATE in the trace alone: without it no cause could be told."""
    url = server.url()
    given = {"name": "postgres", "password": str(url.password), **options}
    assert url.host is not None
    assert url.port is not None
    database = Database(url.host, url.port, given["name"], url.username, (), given["password"])
    if kind is AuthenticationError and pq.version() < 180000:
        # Before 18 libpq traces nothing that the server says until authentication is over.
        sqlstate = None
    with pytest.raises(kind) as caught:
        connect(Target.of(database, Config(address={}, connect_timeout=30.0)), None)
    assert type(caught.value) is kind
    assert caught.value.sqlstate == sqlstate
    shown = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    assert "SASL" not in "".join(shown.format())


def test_libpq_traces_into_a_memory_file(server: Server) -> None:
    """`PGconn.trace` takes a file's number, writes what the server says, and `untrace` flushes it."""
    pgconn = pq.PGconn.connect_start(conninfo(server, "no such database"))
    with Trace(pgconn) as trace:
        while (polled := pgconn.connect_poll()) not in (pq.PollingStatus.OK, pq.PollingStatus.FAILED):
            assert polled in (pq.PollingStatus.READING, pq.PollingStatus.WRITING)
        written = trace.read()
        assert b"\tErrorResponse\t" in written
        assert b' C "3D000"' in written
    pgconn.finish()


def test_what_is_prepared_is_known_and_can_be_forgotten(connection: DriverConnection) -> None:
    """`_prepared` has the names of prepared statements; once cleared, the server forgets them with the next."""
    connection.autocommit = True
    listed = "SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE '%seven%'"
    connection.execute("SELECT 7 AS seven", prepare=True)
    assert len(connection._prepared._names) == 1
    assert connection.execute(listed, prepare=False).fetchone() == (1,)
    connection.forget_statements()
    assert len(connection._prepared._names) == 0
    connection.execute("SELECT 1")
    assert connection.execute(listed, prepare=False).fetchone() == (0,)


def test_a_connection_begins_in_a_method_of_its_own(
    connection: DriverConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a sandbox begins a savepoint in its place: whatever is executed asks for it first."""
    asked: list[str] = []

    def start_query(self: DriverConnection) -> Iterator[Any]:
        asked.append("begin")
        yield from ()

    monkeypatch.setattr(DriverConnection, "_start_query", start_query)
    connection.set_autocommit_mode(False)
    connection.execute(b"SELECT 1")
    connection.cursor().executemany(b"SELECT %s", [(1,), (2,)])
    with connection.cursor().copy(b"COPY (SELECT 1) TO STDOUT") as copy:
        list(copy.rows())
    assert len(asked) >= 3
    assert connection.pgconn.transaction_status == pq.TransactionStatus.IDLE


def test_a_connection_sends_its_own_savepoints_by_a_method(
    connection: DriverConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a sandbox sends those that it has in their place."""
    sent: list[bytes] = []
    send = DriverConnection._exec_command

    def exec_command(self: DriverConnection, command: bytes, *args: Any) -> Iterator[Any]:
        sent.append(command)
        return (yield from send(self, command, *args))  # type: ignore[misc]  # psycopg's types

    monkeypatch.setattr(DriverConnection, "_exec_command", exec_command)
    with connection.transaction(), pytest.raises(ZeroDivisionError):
        with connection.transaction():
            pass
        with connection.transaction():
            1 / 0  # noqa: B018
    marks = [command for command in sent if command.split()[0] not in (b"BEGIN", b"COMMIT")]
    assert marks == [
        b'SAVEPOINT "_pg3_2"',
        b'RELEASE "_pg3_2"',
        b'SAVEPOINT "_pg3_2"',
        b'ROLLBACK TO "_pg3_2"',
        b'RELEASE "_pg3_2"',
    ]


def test_a_connection_counts_its_own_blocks(connection: DriverConnection) -> None:
    """In an attribute: a statement that stands by itself ends with them."""
    assert connection._num_transactions == 0
    with connection.transaction(), connection.transaction():
        assert connection._num_transactions == 2
    assert connection._num_transactions == 0


@pytest.mark.parametrize("setting", ["autocommit", "isolation_level", "read_only", "deferrable"])
def test_a_setting_is_changed_by_a_generator(connection: DriverConnection, setting: str) -> None:
    """Which asks another one whether it may, in a transaction; a sandbox has one that does not mind."""
    change = getattr(connection, f"_set_{setting}_gen")
    with connection.transaction(), pytest.raises(psycopg.ProgrammingError, match=setting):
        connection.wait(change(None))

    class Careless(DriverConnection):
        def _check_intrans_gen(self, attribute: str) -> Iterator[Any]:  # type: ignore[override]
            yield from ()

    careless = Careless(connection.pgconn)
    with connection.transaction():
        careless.wait(getattr(careless, f"_set_{setting}_gen")(None))
    assert getattr(careless, f"_{setting}") in (None, False)
    del careless.pgconn  # which is not its to close, nor to warn of


def test_an_exchange_yields_what_it_waits_for(connection: DriverConnection) -> None:
    """It is sent which of these has come, as `selectors` has them; so that anybody can wait in psycopg's place."""
    connection.limit(monotonic() + 30)
    rows = connection.execute("SELECT n, repeat('x', 1000) FROM generate_series(1, %s) n", (5000,)).fetchall()
    assert len(rows) == 5000
    connection.limit(monotonic() + 0.25)
    begun = monotonic()
    with pytest.raises(NoAnswer):
        connection.execute("SELECT pg_sleep(30)")
    assert 0.25 <= monotonic() - begun < 5
    assert connection.closed


# SQLAlchemy's pool


class Record(_ConnectionRecord):
    """Notes how it comes back."""

    def __init__(self, pool: Probe) -> None:
        self.events = pool.events
        super().__init__(pool)

    def checkin(self, _fairy_was_created: bool = True) -> None:
        alive = None if self.fairy_ref is None else self.fairy_ref() is not None
        self.events.append(("checkin", _fairy_was_created, alive))
        super().checkin(_fairy_was_created)


class Probe(Pool):
    """A pool that does what `LedgerPool` does, and notes what it is asked."""

    def __init__(self, creator: Any, **kwargs: Any) -> None:
        super().__init__(creator, reset_on_return=None, **kwargs)
        self.events: list[object] = []

    def _do_get(self) -> ConnectionPoolEntry:
        self.events.append("get")
        return Record(self)

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        self.events.append("return")
        record.close()

    def dispose(self) -> None: ...


@pytest.fixture
def probe(server: Server) -> Probe:
    return Probe(lambda: psycopg.connect(conninfo(server).decode()))


def test_a_pool_is_asked_by_two_methods(probe: Probe) -> None:
    """`_do_get` yields a record, `_do_return_conn` gets it back, and both are called once."""
    fairy = probe.connect()
    assert probe.events == ["get"]
    assert fairy.cursor().execute("SELECT 1").fetchone() == (1,)
    fairy.close()
    assert probe.events == ["get", ("checkin", True, True), "return"]


def test_a_record_knows_its_borrower(probe: Probe) -> None:
    """A normal return is known by a `fairy_ref` that is alive; afterwards it is None."""
    fairy = probe.connect()
    assert isinstance(fairy, _ConnectionFairy)
    record = fairy._connection_record
    assert isinstance(record, Record)
    assert record.fairy_ref is not None
    assert record.fairy_ref() is fairy
    assert len(record.finalize_callback) == 0
    fairy.close()
    assert record.fairy_ref is None


@pytest.mark.parametrize("cycle", [False, True])
def test_a_record_knows_that_its_borrower_was_lost(probe: Probe, cycle: bool) -> None:
    """A return by a finaliser is known by a `fairy_ref` that is dead, also when it is the collector's."""
    fairy = probe.connect()
    if cycle:
        itself = [fairy]
        itself.append(itself)  # type: ignore[arg-type]  # what makes it garbage for the collector alone
        del itself
    del fairy
    gc.collect()
    assert probe.events == ["get", ("checkin", True, False), "return"]


def test_a_failed_first_use_comes_back_without_a_borrower(probe: Probe) -> None:
    """What fails before there is a borrower is checked in with `_fairy_was_created` False."""

    class Dead(Record):
        def get_connection(self) -> Any:
            raise RuntimeError("dead")

    probe._do_get = lambda: Dead(probe)  # type: ignore[method-assign]  # stands in for a connection that died
    with pytest.raises(RuntimeError, match="dead"):
        probe.connect()
    assert probe.events == [("checkin", False, None), "return"]


def test_a_record_is_asked_for_its_connection(probe: Probe) -> None:
    """`get_connection` is where SQLAlchemy compares times of the wall clock; what it returns is what is lent."""

    class Kept(Record):
        def get_connection(self) -> Any:
            probe.events.append("asked")
            return self.dbapi_connection

    probe._do_get = lambda: Kept(probe)  # type: ignore[method-assign]  # a record of ours
    fairy = probe.connect()
    assert probe.events == ["asked"]
    assert fairy.cursor().execute("SELECT 1").fetchone() == (1,)
    fairy.close()


def test_a_pool_hears_that_a_connection_was_lost(server: Server) -> None:
    """An engine calls `_invalidate` of its pool with the connection, its record in it, and the driver's error."""
    heard: list[tuple[type, BaseException | None]] = []

    class Hearing(Probe):
        def _invalidate(self, connection: Any, exception: BaseException | None = None, _checkin: bool = True) -> None:
            heard.append((type(connection._connection_record), exception))
            connection.invalidate(exception)

    engine = create_engine(server.url(), poolclass=Hearing)
    with engine.connect() as connection:
        pid = connection.scalar(select(func.pg_backend_pid()))
        with server.connect() as other:
            other.execute("SELECT pg_terminate_backend(%s, 30000)", (pid,))
        with pytest.raises(OperationalError):
            connection.execute(text("SELECT 1"))
    ((record, error),) = heard
    assert record is Record
    assert isinstance(error, psycopg.OperationalError)


def test_sqlalchemys_checkin_is_what_ours_takes_the_place_of() -> None:
    """`CachedConnection.checkin` leaves out what has no effect without listeners: this is all there is to it."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(_ConnectionRecord.checkin)))
    assert [ast.unparse(statement) for statement in tree.body[0].body] == [  # type: ignore[attr-defined]  # a def
        "if self.fairy_ref is None and _fairy_was_created:\n"
        "    util.warn('Double checkin attempted on %s' % self)\n"
        "    return",
        "self.fairy_ref = None",
        "connection = self.dbapi_connection",
        "pool = self.__pool",
        "while self.finalize_callback:\n"
        "    finalizer = self.finalize_callback.pop()\n"
        "    if connection is not None:\n"
        "        finalizer(connection)",
        "if pool.dispatch.checkin:\n    pool.dispatch.checkin(connection, self)",
        "pool._return_conn(self)",
    ]


def test_a_connection_leads_to_its_record(server: Server) -> None:
    """From an SQLAlchemy connection the pool's record is found by `_connection_record` (pool.record_of)."""
    engine = create_engine(server.url(), poolclass=NullPool)
    with engine.connect() as connection:
        assert isinstance(connection, Connection)
        record = getattr(connection.connection, "_connection_record", None)
        assert isinstance(record, _ConnectionRecord)
        assert record.dbapi_connection is connection.connection.dbapi_connection


# SQLAlchemy's dialects, results and statements


def test_create_engine_makes_its_dialect_by_calling_the_class() -> None:
    """What `__new__` returns for `shared=` is the engine's dialect: one for many engines."""
    url = "postgresql+shardrepo://db01/app"
    first = create_engine(url)
    assert isinstance(first.dialect, SharedDialect)
    second = create_engine(url.replace("app", "other"), shared=first.dialect)
    assert second.dialect is first.dialect
    assert create_engine(url).dialect is not first.dialect
    assert second.pool._dialect is first.dialect


@pytest.fixture
def engine(server: Server, database: str) -> Iterator[Engine]:
    """A plain engine on a fresh database."""
    engine = create_engine(server.url(database))
    yield engine
    engine.dispose()


def test_a_result_is_marked_when_its_rows_repeat(engine: Engine) -> None:
    """`_unique_filter_state` is set just by joined eager loading of collections (reading.unique)."""
    with Session(engine) as session:
        session.add(User(name="Ada", posts=[Post(title="one"), Post(title="two")]))
        session.flush()
        repeating = session.execute(select(User).options(joinedload(User.posts)))
        assert repeating._unique_filter_state is not None
        assert len(repeating.unique().scalars().all()) == 1
        for statement in (select(User), select(Post).options(joinedload(Post.author)), select(User.name)):
            assert session.execute(statement)._unique_filter_state is None
        assert session.execute(text("SELECT 1"))._unique_filter_state is None


def test_a_session_lets_go_of_all_that_it_has_loaded(engine: Engine) -> None:
    """`_expunge_states` detaches objects and leaves the session what it was, for its results to go on (reading)."""
    with Session(engine) as session:
        session.add(User(name="Ada", posts=[Post(title="one")]))
        session.flush()
        session.expunge_all()
        user = session.execute(select(User).options(joinedload(User.posts))).unique().scalar_one()
        before = session.identity_map
        session._expunge_states(session.identity_map.all_states())
        assert (list(session), session.identity_map is before) == ([], True)
        assert (inspect_mapped(user).detached, inspect_mapped(user.posts[0]).detached) == (True, True)


def test_a_statement_tells_its_limit_and_groups() -> None:
    """`_limit_clause` and its like are how a select is asked whether it has any, and in which order (reading)."""
    plain = select(User.name)
    assert (plain._offset_clause, plain._distinct, plain._order_by_clauses) == (None, False, ())
    assert plain.offset(3)._offset_clause is not None
    assert plain.distinct()._distinct
    assert [each.modifier for each in plain.order_by(User.name.desc())._order_by_clauses] == [operators.desc_op]
    assert plain._limit_clause is None
    assert plain.limit(3)._limit_clause is not None
    assert not plain._group_by_clauses
    assert plain.group_by(User.name)._group_by_clauses
    assert not select(func.count())._group_by_clauses


def test_a_statement_tells_its_options() -> None:
    """`_with_options` has them, in their order, so that those about a class hold around it too (reading)."""
    loader, criteria = selectinload(User.posts), with_loader_criteria(Post, Post.title == "x")
    assert select(User)._with_options == ()
    assert select(User).options(loader, criteria)._with_options == (loader, criteria)
    assert isinstance(criteria, LoaderCriteriaOption)
    assert not isinstance(loader, LoaderCriteriaOption)


def test_a_plain_select_is_told_from_any_other() -> None:
    """`compare` sees every part that a select may have, options and locks among them (bulk)."""
    criterion = User.name == "x"
    plain = select(User).where(criterion)
    assert select(User).where(criterion).compare(plain)
    others = (
        plain.limit(1), plain.offset(1), plain.distinct(), plain.order_by(User.id), plain.group_by(User.id),
        plain.join(User.posts), plain.with_for_update(), plain.options(with_loader_criteria(User, User.id > 1)),
        plain.where(User.id == 1), plain.add_cte(select(Tag).cte()), plain.having(User.id > 1), select(User),
    )  # fmt: skip
    assert not any(plain.compare(other) for other in others)


def test_execution_options_can_be_put_back(engine: Engine) -> None:
    """`_execution_options` is all that a connection keeps of them (pool)."""
    with engine.connect() as connection:
        before = connection.get_execution_options()
        connection.execution_options(mine=1)
        connection._execution_options = before
        assert connection.get_execution_options() is before
        assert "mine" not in connection.execute(text("SELECT 1")).context.execution_options


def test_a_loader_tells_its_path_and_criteria() -> None:
    """`context` has an element for each step, with its path from the root and its filter (reloading)."""
    criterion = Post.title == "x"
    loader: Any = selectinload(User.posts.and_(criterion)).selectinload(Post.tags)
    first, second = loader.context
    assert [part for part in second.path.path if isinstance(part, RelationshipProperty)] == [
        User.posts.property,
        Post.tags.property,
    ]
    assert first.path.path[1] is User.posts.property
    assert (len(first._extra_criteria), len(second._extra_criteria)) == (1, 0)
    assert len(User.posts.and_(criterion)._extra_criteria) == 1  # type: ignore[attr-defined]


# The state of mapped objects


def picture(state: InstanceState[Any]) -> dict[str, Any]:
    """All that there is of an object: its attributes and the state that SQLAlchemy keeps of it."""
    slots = {
        name: getattr(state, name) for name in ("class_", "manager", "obj", "committed_state", "expired_attributes")
    }
    kept = {name: dict(value) if isinstance(value, dict) else value for name, value in state.__dict__.items()}
    return {
        "attributes": dict(state.dict),
        "state": kept,
        **slots,
        "committed_state": dict(state.committed_state),
        "expired_attributes": set(state.expired_attributes),
    }


def test_a_state_keeps_all_it_has_in_known_places() -> None:
    """`Snapshot` saves `__dict__`, `committed_state` and `expired_attributes`; the other slots never change."""
    slots = {slot for base in InstanceState.__mro__ for slot in getattr(base, "__slots__", ()) if slot != "__weakref__"}
    assert slots == {"__dict__", "class_", "manager", "obj", "committed_state", "expired_attributes"}


def test_an_object_has_its_state_where_inspect_finds_it() -> None:
    """`DEFAULT_STATE_ATTR` names the attribute, which classes and what is not mapped lack (session.state_of)."""
    user = User(name="Ada")
    assert getattr(user, DEFAULT_STATE_ATTR) is inspect_mapped(user)
    assert not hasattr(User, DEFAULT_STATE_ATTR)


def test_a_failed_flush_changes_nothing_that_a_snapshot_does_not_save(engine: Engine) -> None:
    """Put back, new and stored objects are what they were, though the flush left keys and defaults behind."""
    with Session(engine, expire_on_commit=False) as session:
        session.add_all([User(id=1, name="Ada", email="a@b"), stored := User(id=2, name="Eve"), tag := Tag(label="x")])
        session.commit()
        session.expunge_all()
    stored.name = "Eva"
    new = User(name="Bob", email="a@b", posts=[post := Post(title="one", tags=[tag])])
    states = [instance_state(obj) for obj in (stored, new, post, tag)]
    before = [picture(state) for state in states]
    snapshot = Snapshot(states)
    with Session(engine) as session:
        session.add_all([stored, post, new])
        with pytest.raises(IntegrityError):
            session.flush()
        session.rollback()
        session.expunge_all()
    assert [picture(state) for state in states] != before
    snapshot.restore()
    assert [picture(state) for state in states] == before
    assert new.id is None
    assert (stored.name, new.posts, post.tags) == ("Eva", [post], [tag])


def test_a_criterion_keeps_the_object_that_it_asks_by(engine: Engine) -> None:
    """The parameter's callable has its state in a cell, and a statement's context has its parameters (session)."""
    user, post = User(id=1, name="Ada"), Post(id=1, title="x")
    for criterion, asked_by in (
        (Post.author == user, user),
        (Post.author != user, user),
        (with_parent(user, User.posts), user),
        (User.posts.contains(post), post),
        (Post.tags.contains(tag := Tag(id=1, label="x")), tag),
    ):
        (parameter,) = [one for one in criterion._generate_cache_key()[1] if one.callable is not None]
        cells = [cell.cell_contents for cell in parameter.callable.__closure__]
        assert [cell.obj() for cell in cells if isinstance(cell, InstanceState)] == [asked_by]
    seen: list[Any] = []
    event.listen(engine, "before_cursor_execute", lambda *args: seen.append(args[4]))
    with Session(engine) as session:
        for statement in (select(Post).where(Post.author == user), insert(Post).values([{"title": "x"}] * 2)):
            session.execute(statement)
    cached, uncached = seen
    assert [one.callable is not None for one in cached.extracted_parameters] == [True]
    assert uncached.extracted_parameters is None
    assert len(uncached.compiled.binds) == 2


def test_a_class_has_its_listeners_in_its_manager() -> None:
    """Where an upsert tells them that an object was refreshed, as a session does."""
    told: list[Any] = []
    user = User(name="Ada")

    def listen(target: object, _: object, names: object) -> None:
        told.append((target, names))

    event.listen(User, "refresh", listen)
    try:
        state = instance_state(user)
        state.manager.dispatch.refresh(state, None, {"name"})
    finally:
        event.remove(User, "refresh", listen)
    assert told == [(user, {"name"})]


def test_a_frozen_result_comes_in_by_merge(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Session._merge` is called with the state of each of its objects, and by `merge` (session)."""
    merged: list[Any] = []
    whole = Session._merge
    monkeypatch.setattr(
        Session,
        "_merge",
        lambda self, state, *args, **kwargs: merged.append(state) or whole(self, state, *args, **kwargs),
    )
    with Session(engine) as session:
        session.add(User(name="Ada"))
        session.flush()
        frozen = session.execute(select(User)).freeze()
        state = instance_state(frozen.data[0])
        for load in (True, False):
            merge_frozen_result(session, select(User), frozen, load=load)()
        session.merge(state.obj())
    assert merged == [state] * 3


# Alembic


@pytest.fixture
def directory(tmp_path: Path) -> ScriptDirectory:
    """Three revisions, of which the last merges the other two."""
    write_script(tmp_path, "left")
    write_script(tmp_path, "right")
    write_script(tmp_path, "both", "left", "right")
    config = AlembicConfig()
    config.set_main_option("script_location", str(tmp_path))
    return ScriptDirectory.from_config(config)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_upgrade_revs", ["destination", "current_rev"]),
        ("_downgrade_revs", ["destination", "current_rev"]),
        ("_stamp_revs", ["revision", "heads"]),
    ],
)
def test_the_steps_of_a_move_are_asked_for(method: str, parameters: list[str]) -> None:
    """`ScriptDirectory` has a method for each, of a target and where a database is (scripts.steps)."""
    assert list(inspect.signature(getattr(ScriptDirectory, method)).parameters) == ["self", *parameters]


def test_a_database_may_be_at_several_revisions(directory: ScriptDirectory) -> None:
    """Each takes them as a tuple, though some say otherwise; a step tells what it runs and where it ends."""
    at: Any = ("left", "right")
    (up,) = directory._upgrade_revs("heads", at)
    (down,) = directory._downgrade_revs("left", ("both",))  # type: ignore[arg-type]
    assert [step.revision.revision for step in (up, down)] == ["both", "both"]
    assert (up.to_revisions_no_deps, set(down.to_revisions_no_deps)) == (("both",), {"left", "right"})
    (stamp,) = directory._stamp_revs("both", at)
    assert stamp.to_revisions_no_deps == ("both",)
    nothing: Any = ()
    assert [step.revision.revision for step in directory._upgrade_revs("heads", nothing)][-1] == "both"


def test_alembics_commands_run_those_steps() -> None:
    """They are what `upgrade`, `downgrade` and `stamp` hand to a migration, so that ours run the same."""
    for run, method in (
        (command.upgrade, "_upgrade_revs"),
        (command.downgrade, "_downgrade_revs"),
        (command.stamp, "_stamp_revs"),
    ):
        assert f"return script.{method}(" in inspect.getsource(run)


# The interpreter


def test_a_reentrant_lock_tells_whether_this_thread_has_it() -> None:
    """`RLock._is_owned` is how the ledger sees that a finaliser runs inside one of its steps."""
    lock: Any = threading.RLock()
    assert not lock._is_owned()
    with lock:
        assert lock._is_owned()
        seen: list[bool] = []
        thread = threading.Thread(target=lambda: seen.append(lock._is_owned()))
        thread.start()
        thread.join()
        assert seen == [False]
    assert isinstance(Ledger(1)._lock, type(lock))


def test_a_dead_weak_reference_is_seen_by_a_finaliser() -> None:
    """When a finaliser runs, weak references to its object are dead already: `fairy_ref()` is None then."""

    class Thing: ...

    thing = Thing()
    seen: list[object] = []
    reference = weakref.ref(thing)
    weakref.finalize(thing, lambda: seen.append(reference()))
    del thing
    gc.collect()
    assert seen == [None]
