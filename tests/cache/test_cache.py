"""The connection cache, counted by the server: how many, to which databases, and which of them goes first."""

from __future__ import annotations

import gc
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, OperationalError

from shardrepo import ConnectError, Database, Repo, TransactionDoomedError
from shardrepo.engines import MAX_ENGINES
from shardrepo.testing.servers import Server

from ..conftest import TEMPLATE, await_, await_connections, books_balance, connections_of, run_sql
from ..models import Tag

pytestmark = pytest.mark.cache

COUNT = 8


@pytest.fixture(scope="module")
def many(server: Server) -> list[str]:
    """Databases that the tests of this module only read, or write tags into."""
    names = [f"cached{number}" for number in range(COUNT)]
    server.create_databases(names, template=TEMPLATE)
    return names


@pytest.fixture
def named(
    make_repo: Callable[..., type[Repo]], request: pytest.FixtureRequest
) -> Callable[..., tuple[type[Repo], str]]:
    """Define a repo and say under which name the server knows its connections."""

    def make(pool_size: int, **config: Any) -> tuple[type[Repo], str]:
        name = f"cache{abs(hash(request.node.nodeid)) % 10**8}-{pool_size}"
        return make_repo(None, pool_size=pool_size, application_name=name, **config), name

    return make


def pid(repo: type[Repo]) -> int:
    found: int = repo.execute("SELECT pg_backend_pid()").scalar_one()
    return found


def visit(repo: type[Repo], name: str) -> int:
    """Use a database once; returns the server's process that answered."""
    with repo.using(name):
        return pid(repo)


def test_the_target_is_kept(named: Any, server: Server, many: list[str]) -> None:
    """However many databases are visited, no more connections are kept than the target says."""
    repo, name = named(3)
    for database in many * 2:
        visit(repo, database)
        assert repo.stats().idle <= 3
        assert books_balance(repo)
    await_connections(server, name, many[-3:])
    assert repo.stats().evictions == 2 * COUNT - 3


def test_a_target_of_one(named: Any, server: Server, many: list[str]) -> None:
    """With a target of one, the last used database is cached."""
    repo, name = named(1)
    visit(repo, many[0])
    first = visit(repo, many[1])
    assert visit(repo, many[1]) == first
    await_connections(server, name, [many[1]])


def test_the_target_itself_evicts_nothing(named: Any, many: list[str]) -> None:
    """As many databases as the target are cached; one more evicts one."""
    repo, _ = named(4)
    pids = [visit(repo, database) for database in many[:4]]
    assert [visit(repo, database) for database in many[:4]] == pids
    assert repo.stats().evictions == 0
    visit(repo, many[4])
    assert repo.stats().evictions == 1


def test_the_least_recently_used_goes_first(named: Any, server: Server, many: list[str]) -> None:
    """Eviction is in the order of last use over all databases, not of opening."""
    repo, name = named(3)
    a, b, c, d, e = many[:5]
    pids = {database: visit(repo, database) for database in (a, b, c)}
    visit(repo, a)
    visit(repo, d)
    await_connections(server, name, [a, c, d])
    assert visit(repo, c) == pids[c]
    visit(repo, e)
    await_connections(server, name, [c, d, e])
    assert visit(repo, c) == pids[c]


def test_the_last_returned_goes_out_first(named: Any, many: list[str]) -> None:
    """Of several connections to one database, the one that was returned last is used next."""
    repo, _ = named(5)
    with repo.using(many[0]):
        with repo.transaction():
            first = pid(repo)
            with repo.detached(), repo.transaction():
                second = pid(repo)
        assert first != second
        assert [pid(repo) for _ in range(3)] == [first] * 3
        with repo.transaction():
            assert pid(repo) == first
            with repo.detached():
                assert pid(repo) == second


def test_the_oldest_of_one_database_is_evicted_first(named: Any, server: Server, many: list[str]) -> None:
    """Of several idle connections to one database, the one that has been idle for longest is evicted."""
    repo, name = named(2)
    with repo.using(many[0]), repo.transaction():
        kept = pid(repo)
        with repo.detached():
            evicted = pid(repo)
    visit(repo, many[1])
    pids = await_connections(server, name, many[:2])
    assert kept in pids
    assert evicted not in pids


def test_a_connection_in_use_is_never_evicted(named: Any, server: Server, many: list[str]) -> None:
    """A borrower keeps its connection while the whole target is turned over many times."""
    repo, name = named(2)
    with repo.using(many[0]), repo.transaction():
        before = pid(repo)
        for database in many[1:] * 2:
            visit(repo, database)
        assert pid(repo) == before
        await_connections(server, name, [many[0], many[-1]])
    assert visit(repo, many[0]) == before


def test_above_the_target_nothing_idle_is_kept(named: Any, server: Server, many: list[str]) -> None:
    """The target bounds nobody: the busy may be more, but what they return above it is closed."""
    repo, name = named(2)
    with ExitStack() as stack:
        for database in many[:5]:
            stack.enter_context(repo.using(database))
            stack.enter_context(repo.transaction())
            repo.count(Tag)
        assert repo.stats().in_use == 5
        assert len(connections_of(server, name)) == 5
        visit(repo, many[5])
        await_connections(server, name, many[:5])
        assert repo.stats().idle == 0
    await_connections(server, name, many[:2])
    assert books_balance(repo)


def test_a_victim_is_closed_before_its_successor_connects(server: Server, many: list[str]) -> None:
    """When a connection is opened in a full cache, its victim is closed already: the server never has one too many."""
    moments: list[tuple[bool, int, int]] = []
    victims: list[Any] = []

    def password() -> str:
        # Asked at every connect, right before it.
        if victims:
            stats = repo.stats()
            moments.append((victims[-1].closed, stats.idle, stats.closing))
        return server.password

    config = {
        "host": server.host,
        "port": server.port,
        "username": server.username,
        "password": password,
        "pool_size": 1,
    }
    repo: type[Repo] = type("Careful", (Repo,), {}, config=config)
    for database in many[:4]:
        with repo.using(database), repo.engine().connect() as connection:
            victims.append(connection.connection.driver_connection)
    assert moments == [(True, 0, 0)] * 3
    repo.dispose()


def test_many_threads_keep_the_target(named: Any, server: Server, many: list[str]) -> None:
    """Threads over all databases at once end with the target's number of connections, and books that add up."""
    repo, name = named(4)
    start = threading.Barrier(6)

    def work(number: int) -> None:
        start.wait(30)
        for step in range(60):
            database = many[(step * (number + 1)) % COUNT]
            with repo.using(database):
                assert repo.execute("SELECT current_database()").scalar_one() == database

    with ThreadPoolExecutor(6) as executor:
        list(executor.map(work, range(6)))
    stats = repo.stats()
    assert (stats.in_use, stats.connecting, stats.closing) == (0, 0, 0)
    assert stats.idle <= 4
    assert books_balance(repo)
    deadline = 200
    while len(connections_of(server, name)) != stats.idle and (deadline := deadline - 1):
        pass
    assert len(connections_of(server, name)) == stats.idle


# Letting go


def test_connects_to_a_server_take_turns(
    make_repo: Callable[..., type[Repo]], server: Server, many: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one caller connects, the others who need that server wait, and all are served."""
    monkeypatch.setattr("shardrepo.pool.PATIENCE", 60)
    asked: list[int] = []

    def password() -> str:
        if not asked:
            await_(lambda: repo.stats().waiting == 3)
        asked.append(repo.stats().connecting)
        return server.password

    def visit(name: str) -> int:
        with repo.using(database=name, password=password):
            return pid(repo)

    repo = make_repo()
    with ThreadPoolExecutor(4) as pool:
        pids = set(pool.map(visit, many[:4]))
    assert len(pids) == 4
    assert asked == [1, 1, 1, 1]
    assert books_balance(repo)


def test_a_slow_connect_does_not_hold_the_next_one_up(make_repo: Callable[..., type[Repo]]) -> None:
    """Whoever has waited a moment for its turn connects although the one before it is not done."""
    repo = make_repo("postgres", connect_timeout=60)

    def ping() -> None:
        with repo.using(port=port), pytest.raises(ConnectError):
            repo.ping()

    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(2) as pool:
        listener.settimeout(30)
        port = listener.getsockname()[1]
        calls = [pool.submit(ping) for _ in range(2)]
        clients = [listener.accept()[0] for _ in calls]
        stats = repo.stats()
        assert (stats.connecting, stats.waiting) == (2, 0)
        listener.close()
        for client in clients:
            client.close()
        for call in calls:
            call.result()
    assert books_balance(repo)


def test_a_database_can_be_dropped_after_disconnect(
    named: Any, server: Server, make_databases: Callable[..., list[str]]
) -> None:
    """A cached connection keeps a database from being dropped; after `disconnect` a plain DROP DATABASE works."""
    repo, _ = named(5)
    (name,) = make_databases(1)
    visit(repo, name)
    repo.disconnect(name)
    server.drop_database(name, force=False)
    server.create_database(name, template=TEMPLATE)  # for the fixture to drop
    assert visit(repo, name)


def test_disconnect_while_in_use_closes_on_return(named: Any, server: Server, many: list[str]) -> None:
    """What is in use when its database is disconnected works to its end and is closed then; others stay."""
    repo, name = named(5)
    visit(repo, many[1])
    with repo.using(many[0]), repo.transaction():
        before = pid(repo)
        repo.disconnect()
        assert pid(repo) == before
        with repo.detached():
            assert pid(repo) != before
    pids = await_connections(server, name, many[:2])
    assert before not in pids
    assert books_balance(repo)


def test_disposing_an_engine_closes_its_idle_connections(named: Any, server: Server, many: list[str]) -> None:
    """SQLAlchemy's `Engine.dispose` closes that database's idle connections, and the repo goes on."""
    repo, name = named(5)
    visit(repo, many[1])
    with repo.using(many[0]):
        before = pid(repo)
        repo.engine().dispose()
        await_connections(server, name, [many[1]])
        assert pid(repo) != before
        with repo.transaction():
            inside = pid(repo)
            repo.engine().dispose()
            assert pid(repo) == inside
    assert books_balance(repo)


def test_dispose_closes_everything(named: Any, server: Server, many: list[str]) -> None:
    """After `dispose` the server has no connection of the repo's."""
    repo, name = named(5)
    for database in many[:4]:
        visit(repo, database)
    assert len(connections_of(server, name)) == 4
    repo.dispose()
    await_connections(server, name, [])
    assert (repo.stats().idle, books_balance(repo)) == (0, True)


def test_a_repo_that_is_forgotten_closes_its_connections(server: Server, many: list[str]) -> None:
    """When nobody holds a repo any more, its idle connections are closed with it."""

    def use() -> None:
        config = {"url": server.url(many[0]), "application_name": "forgotten"}
        repo: type[Repo] = type("Forgotten", (Repo,), {}, config=config)
        visit(repo, many[1])
        pid(repo)
        assert len(connections_of(server, "forgotten")) == 2

    use()
    gc.collect()
    await_connections(server, "forgotten", [])


# What is lost


def drop_connection(repo: type[Repo]) -> None:
    connection = repo.engine().connect()
    connection.execute(text("INSERT INTO tags (label) VALUES ('lost')"))


def drop_in_a_cycle(repo: type[Repo]) -> None:
    connection = repo.engine().connect()
    connection.execute(text("INSERT INTO tags (label) VALUES ('lost')"))
    cycle: list[Any] = [connection]
    cycle.append(cycle)


def drop_session(repo: type[Repo]) -> None:
    session = repo.session()
    session.add(Tag(label="lost"))
    session.flush()


def drop_raw(repo: type[Repo]) -> None:
    raw = repo.engine().raw_connection()
    raw.cursor().execute("INSERT INTO tags (label) VALUES ('lost')")


def drop_entered(repo: type[Repo]) -> None:
    """A transaction whose block is never left, because nobody holds it any more."""

    def block() -> Iterator[None]:
        with repo.engine().begin() as connection:
            connection.execute(text("INSERT INTO tags (label) VALUES ('lost')"))
            yield

    running = block()
    next(running)


def drop_in_a_thread(repo: type[Repo]) -> None:
    kept = threading.local()

    def work() -> None:
        kept.connection = repo.engine().connect()
        kept.connection.execute(text("INSERT INTO tags (label) VALUES ('lost')"))

    thread = threading.Thread(target=repo.carry(work))
    thread.start()
    thread.join()


LOSSES = [drop_connection, drop_in_a_cycle, drop_session, drop_raw, drop_entered, drop_in_a_thread]


@pytest.mark.parametrize("lose", LOSSES, ids=lambda function: function.__name__)
def test_what_is_lost_is_closed_and_not_reused(
    named: Any, server: Server, many: list[str], lose: Callable[[type[Repo]], None]
) -> None:
    """A connection whose borrower is gone is closed, with its transaction undone, and nobody gets it again."""
    repo, name = named(5)
    repo.set_database(many[0])
    before = pid(repo)
    lose(repo)
    gc.collect()
    stats = repo.stats()
    assert (stats.in_use, books_balance(repo)) == (0, True)
    after = pid(repo)
    if lose is not drop_entered:  # closing a generator leaves its blocks in order, which is no loss
        assert stats.reclaimed == 1
        assert after != before
    await_connections(server, name, [many[0]])
    assert run_sql(server, many[0], "SELECT count(*) FROM tags WHERE label = 'lost'") == [(0,)]


def test_what_is_lost_makes_room(named: Any, server: Server, many: list[str]) -> None:
    """What was lost is taken over by the next step, and no connection above the target remains."""
    repo, name = named(1)
    for database in many[:4]:
        with repo.using(database):
            drop_in_a_cycle(repo)
    gc.collect()
    visit(repo, many[5])
    await_connections(server, name, [many[5]])
    assert repo.stats().reclaimed == 4
    assert books_balance(repo)


# What is killed


def kill(server: Server, victim: int) -> None:
    """End a server process, and return when it is gone."""
    run_sql(server, "postgres", "SELECT pg_terminate_backend(%s, 10000)", (victim,))


def test_a_connection_killed_in_a_transaction(named: Any, server: Server, many: list[str]) -> None:
    """A connection that dies in a transaction dooms it, nothing is kept, and it is not used again."""
    repo, name = named(5)
    repo.set_database(many[0])
    with pytest.raises(TransactionDoomedError), repo.transaction():
        repo.insert(Tag(label="killed"))
        victim = pid(repo)
        kill(server, victim)
        with pytest.raises(OperationalError):
            repo.count(Tag)
        with pytest.raises(TransactionDoomedError):
            repo.insert(Tag(label="killed"))
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)
    assert pid(repo) != victim
    await_connections(server, name, [many[0]])
    assert run_sql(server, many[0], "SELECT count(*) FROM tags WHERE label = 'killed'") == [(0,)]


def test_a_connection_killed_before_the_commit(named: Any, server: Server, many: list[str]) -> None:
    """A COMMIT that finds no server raises, and the books are right."""
    repo, _ = named(5)
    repo.set_database(many[0])
    with pytest.raises(DBAPIError), repo.transaction():
        repo.insert(Tag(label="killed"))
        kill(server, pid(repo))
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)
    assert not repo.in_transaction()
    assert run_sql(server, many[0], "SELECT count(*) FROM tags WHERE label = 'killed'") == [(0,)]


@pytest.mark.parametrize("how", ["session", "engine", "returned unused", "verb"])
def test_a_connection_killed_in_use_is_not_reused(named: Any, server: Server, many: list[str], how: str) -> None:
    """However a dead connection comes back, the next borrower gets a live one, and no other database loses its own."""
    repo, name = named(5)
    other = visit(repo, many[1])
    repo.set_database(many[0])
    if how == "session":
        with pytest.raises(OperationalError), repo.session() as session:
            victim = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
            kill(server, victim)
            session.execute(text("SELECT 1"))
    elif how == "verb":
        with pytest.raises(OperationalError):
            victim = -1
            repo.execute("SELECT pg_terminate_backend(pg_backend_pid())")
    else:
        with pytest.raises(OperationalError) if how == "engine" else ExitStack(), repo.engine().connect() as connection:
            victim = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
            connection.commit()
            kill(server, victim)
            if how == "engine":
                connection.execute(text("SELECT 1"))
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)
    assert pid(repo) != victim
    assert visit(repo, many[1]) == other
    await_connections(server, name, many[:2])
    assert books_balance(repo)


def test_an_invalidated_connection_is_replaced(named: Any, server: Server, many: list[str]) -> None:
    """SQLAlchemy's `invalidate` closes the connection, and the books are right afterwards."""
    repo, name = named(5)
    repo.set_database(many[0])
    with repo.engine().connect() as connection:
        before = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        connection.rollback()
        connection.invalidate()
        after = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        assert after != before
        assert books_balance(repo)
    assert books_balance(repo)
    await_connections(server, name, [many[0]] * repo.stats().idle)


def test_a_detached_connection_is_its_borrowers(named: Any, server: Server, many: list[str]) -> None:
    """SQLAlchemy's `detach` takes a connection out of the cache for good: it is neither counted nor reused."""
    repo, name = named(5)
    repo.set_database(many[0])
    with repo.engine().connect() as connection:
        taken = connection.execute(text("SELECT pg_backend_pid()")).scalar_one()
        connection.rollback()
        connection.detach()
        assert (repo.stats().in_use, books_balance(repo)) == (0, True)
        assert pid(repo) != taken
        assert connection.execute(text("SELECT pg_backend_pid()")).scalar_one() == taken
    await_connections(server, name, [many[0]])


# Engines


def test_an_engine_is_the_same_as_long_as_it_is_held(named: Any, many: list[str]) -> None:
    """An engine that somebody holds stays the engine of its database, however many others were used since."""
    repo, _ = named(5)
    repo.set_database(many[0])
    engine = repo.engine()
    for number in range(MAX_ENGINES + 5):
        with repo.using(f"never{number}"):
            repo.engine()
    assert repo.engine() is engine
    assert repo.stats().attempts == 0


def test_an_engine_with_a_connection_out_is_pinned(named: Any, many: list[str]) -> None:
    """A transaction survives the turnover of all engines: its engine, connection and transaction stay the same."""
    repo, _ = named(5)
    repo.set_database(many[0])
    with repo.transaction():
        repo.insert(Tag(label="pinned"))
        before, engine = pid(repo), weakref.ref(repo.engine())
        for number in range(MAX_ENGINES + 5):
            with repo.using(f"never{number}"):
                repo.engine()
        gc.collect()
        assert pid(repo) == before
        assert repo.engine() is engine()
        repo.execute("DELETE FROM tags WHERE label = 'pinned'")


def test_engines_of_databases_gone_by_are_let_go(named: Any) -> None:
    """The engine cache is bounded: what was not used for long is collected."""
    repo, _ = named(5)

    def engines() -> int:
        gc.collect()
        cache = repo._router.cache
        return sum(1 for _ in cache._alive)

    for number in range(MAX_ENGINES + 50):
        with repo.using(f"never{number}"):
            repo.engine()
    assert engines() == MAX_ENGINES


def test_a_cached_connection_outlives_its_engine(named: Any, server: Server, many: list[str]) -> None:
    """An idle connection is found again after its database's engine left the engine cache."""
    repo, _ = named(5)
    before = visit(repo, many[0])
    for number in range(MAX_ENGINES + 5):
        with repo.using(f"never{number}"):
            repo.engine()
    assert visit(repo, many[0]) == before


def test_databases_of_one_address_with_other_options_do_not_share(named: Any, server: Server, many: list[str]) -> None:
    """Options are part of what a connection is: other options, another connection, the same home."""
    repo, _ = named(5)
    with repo.using(many[0]):
        plain, home = pid(repo), repo.get_database().home
    with repo.using(database=many[0], query={"options": "-c search_path=pg_catalog"}):
        assert repo.execute("SHOW search_path").scalar_one() == "pg_catalog"
        assert pid(repo) != plain
        assert repo.get_database().home == home
    assert visit(repo, many[0]) == plain
    assert Database("127.0.0.1", server.port, many[0]).home == home
