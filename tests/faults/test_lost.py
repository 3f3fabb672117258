"""Borrowers that vanish: threads that die, generators that nobody resumes, cycles that only the collector finds."""

from __future__ import annotations

import contextvars
import gc
import os
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import text

from shardrepo import CheckoutTimeoutError, Repo
from shardrepo.testing.servers import Server

from ..conftest import TEMPLATE, await_, books_balance, connections_of, run_sql
from ..models import Account, Tag
from ..proxy import Proxy

pytestmark = pytest.mark.cache

COUNT = 4
THREADS = 4
ROUNDS = 40

# A setting that outlives a ROLLBACK, then a transaction with a row of its own and a lock on the account of this round.
MARK = (
    "SELECT set_config('my.lost', 'yes', false)",
    "COMMIT",
    "INSERT INTO tags (label) VALUES ('lost {0}')",
    "UPDATE accounts SET balance = balance + 1 WHERE id = {0}",
)
# What there may be to see of whoever had the connection before, and what there is to see if all is well.
SEEN = """
    SELECT pg_backend_pid(), coalesce(current_setting('my.lost', true), ''), pg_current_xact_id_if_assigned() IS NULL,
        (SELECT count(*) FROM tags WHERE label LIKE 'lost %'),
        (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND mode = 'RowExclusiveLock')
"""
NOTHING = ["", True, 0, 0]


def seen(repo: type[Repo]) -> tuple[int, list[Any]]:
    """The server process that a borrower gets, and what it sees there of others."""
    pid, *left = tuple(repo.execute(SEEN).one())
    return pid, left


class Losses:
    """Ways to lose a connection, and the server processes behind those that were lost."""

    def __init__(self, repo: type[Repo]) -> None:
        self.repo = repo
        self.pids: set[int] = set()
        self.generators = 0
        self.ways: list[Callable[[int], object]] = [
            self.dropped,
            self.in_a_cycle,
            self.in_a_traceback,
            self.with_its_result,
            self.raw,
            self.session,
            self.dead_thread,
            self.generator,
            self.cyclic_generator,
        ]

    def _connection(self, number: int) -> Any:
        connection = self.repo.engine().raw_connection()
        self._mark(connection, number)
        return connection

    def _mark(self, raw: Any, number: int) -> None:
        for statement in MARK:
            raw.driver_connection.execute(statement.format(number))
        self.pids.add(raw.driver_connection.info.backend_pid)

    def dropped(self, number: int) -> None:
        connection = self.repo.engine().connect()
        self._mark(connection.connection, number)

    def in_a_cycle(self, number: int) -> None:
        connection = self.repo.engine().connect()
        self._mark(connection.connection, number)
        cycle: list[object] = [connection]
        cycle.append(cycle)

    def in_a_traceback(self, number: int) -> None:
        connection = self.repo.engine().connect()
        self._mark(connection.connection, number)
        try:
            raise ZeroDivisionError
        except ZeroDivisionError as error:
            _kept = error  # which holds this frame, which holds it

    def with_its_result(self, number: int) -> None:
        connection = self.repo.engine().connect()
        self._mark(connection.connection, number)
        result: Any = connection.execute(text("SELECT generate_series(1, 9)"))
        next(result)
        result.itself = result

    def raw(self, number: int) -> None:
        cycle = [self._connection(number)]
        cycle.append(cycle)

    def session(self, number: int) -> None:
        session = self.repo.session()
        self._mark(session.connection().connection, number)
        session.add(Tag(label=f"lost {number} too"))
        session.flush()
        session.info["itself"] = session

    def dead_thread(self, number: int) -> None:
        def work() -> None:
            _connection = self._connection(number)
            raise ZeroDivisionError

        thread = threading.Thread(target=self.repo.carry(work))
        thread.start()
        thread.join()

    def generator(self, number: int) -> None:
        """Abandoned in a transaction: whoever ends it leaves its blocks in order, which need be no loss."""
        contextvars.copy_context().run(next, self._block(number))

    def cyclic_generator(self, number: int) -> None:
        block = self._block(number)
        contextvars.copy_context().run(next, block)
        block.send([block])

    def _block(self, number: int) -> Generator[None, object]:
        self.generators += 1
        with self.repo.transaction():
            for statement in MARK[2:]:
                self.repo.execute(statement.format(number))
            _itself = yield
            yield


@pytest.fixture
def many(server: Server) -> Iterator[list[str]]:
    """Databases with an account for each round of each thread."""
    names = [f"lossy{number}" for number in range(COUNT)]
    server.create_databases(names, template=TEMPLATE)
    for name in names:
        run_sql(server, name, f"INSERT INTO accounts SELECT n, 0, 1 FROM generate_series(1, {THREADS * ROUNDS}) n")
    yield names
    for name in names:
        server.drop_database(name)


@pytest.fixture
def collector() -> Iterator[None]:
    """A collector that has nothing to look at but what the test makes, so that it may run all the time."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    yield
    gc.set_threshold(*before)
    gc.unfreeze()


@pytest.fixture
def careful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let threads die in silence."""
    monkeypatch.setattr(threading, "excepthook", lambda args: None)


@pytest.mark.usefixtures("careful", "collector")
def test_whatever_is_lost_whenever_it_is_collected(
    make_repo: Callable[..., type[Repo]], server: Server, many: list[str]
) -> None:
    """Threads lose connections in every way while the collector runs at random: none is reused, none is forgotten."""
    repo = make_repo(pool_size=6, application_name="lossy")
    losses = Losses(repo)
    seed = random.random()

    def work(thread: int) -> int:
        chance = random.Random(seed + thread)
        kept = 0
        for number in range(thread * ROUNDS + 1, (thread + 1) * ROUNDS + 1):
            gc.set_threshold(chance.choice([1, 10, 100, 1000]))
            with repo.using(chance.choice(many)):
                if chance.random() < 0.6:
                    chance.choice(losses.ways)(number)
                if chance.random() < 0.1:
                    gc.collect()
            with repo.using(chance.choice(many)):
                pid, left = seen(repo)
                assert pid not in losses.pids
                assert left == NOTHING
                repo.insert(Tag(label=f"kept {number}"))
                kept += 1
        return kept

    with ThreadPoolExecutor(THREADS) as pool:
        kept = sum(pool.map(work, range(THREADS)))
    gc.collect()
    stats = repo.stats()
    assert (stats.in_use, stats.connecting, stats.closing, books_balance(repo)) == (0, 0, 0, True)
    assert 20 < len(losses.pids) <= stats.reclaimed <= len(losses.pids) + losses.generators
    assert 0 < stats.idle <= 6
    await_(lambda: len(connections_of(server, "lossy")) == stats.idle)
    assert not losses.pids & {pid for pid, _ in connections_of(server, "lossy")}
    for name in many:
        run_sql(server, name, "SELECT 1 FROM accounts FOR UPDATE NOWAIT")
        assert run_sql(server, name, "SELECT sum(balance) FROM accounts") == [(0,)]
        assert run_sql(server, name, "SELECT label FROM tags WHERE label NOT LIKE 'kept %'") == []
        kept -= run_sql(server, name, "SELECT count(*) FROM tags")[0][0]
    assert kept == 0


@pytest.fixture
def repo(make_repo: Callable[..., type[Repo]], server: Server, two_databases: tuple[str, str]) -> type[Repo]:
    """A repo whose default database has two accounts."""
    run_sql(server, two_databases[0], "INSERT INTO accounts VALUES (1, 0, 1), (2, 0, 1)")
    return make_repo(two_databases[0], application_name="lossy")


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What is in a cycle stays there until the test collects it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("way", range(9), ids=lambda way: Losses(Repo).ways[way].__name__)
@pytest.mark.usefixtures("careful", "no_collector")
def test_each_way_alone(repo: type[Repo], server: Server, way: int) -> None:
    """What is lost is in use, and its row locked, until it is found; then it is as if it had never been."""
    losses = Losses(repo)
    losses.ways[way](1)
    held = repo.stats()
    assert held.in_use + held.idle + held.reclaimed == 1
    free = "SELECT id FROM accounts ORDER BY id FOR UPDATE SKIP LOCKED"
    wanted = [(2,)] if held.in_use else [(1,), (2,)]
    await_(lambda: run_sql(server, repo.get_database().name, free) == wanted)
    gc.collect()
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)
    assert seen(repo)[1] == NOTHING
    repo.update(repo.get_one(Account, 1), balance=5)
    await_(lambda: len(connections_of(server, "lossy")) == repo.stats().idle == 1)


# Somebody else finds it


@pytest.mark.usefixtures("no_collector")
def test_a_generator_that_another_thread_collects(repo: type[Repo]) -> None:
    """Whoever abandoned a generator in a transaction can go on when that has been ended, whoever did it."""

    def block() -> Generator[None, object]:
        with repo.transaction():
            repo.execute("SELECT 1")
            _itself = yield
            yield

    running = block()
    next(running)
    running.send([running])
    del running
    in_a_thread(gc.collect)
    assert repo.stats().in_use == 0
    assert not repo.in_transaction()
    assert repo.count(Tag) == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("no_collector")
def test_a_connection_has_one_owner_while_it_is_collected(
    make_repo: Callable[..., type[Repo]], server: Server, database: str
) -> None:
    """A generator that ends its transaction in the collector does not share its connection with who closes it.

    The collector announces the death of the connection before it ends the generator: from then on the next step
    of any thread may close it, while the generator is still waiting for the answer to its ROLLBACK.
    """
    run_sql(server, database, "INSERT INTO accounts VALUES (1, 0, 1)")
    with Proxy(server) as proxy:
        repo = make_repo(database, on=proxy)
        Losses(repo).cyclic_generator(1)
        (entry,) = repo._router.cache.ledger._in_use()
        assert entry.connection is not None
        driver: Any = entry.connection.dbapi_connection
        number = driver.fileno()
        proxy.deafen()
        collecting = threading.Thread(target=gc.collect)
        collecting.start()
        await_(lambda: driver.lock.locked() or not collecting.is_alive())
        await_(lambda: repo.stats().closed == 1)
        silence = os.pipe()
        os.dup2(silence[0], number)  # as the next file or socket does that anybody opens
        proxy.restore()
        collecting.join(3)
        stuck = collecting.is_alive()
        for end in {number, *silence}:
            os.close(end)
        collecting.join(30)
        assert not stuck
        assert seen(repo)[1] == NOTHING


FINALISER = """
import faulthandler, gc, sys
from shardrepo import CheckoutTimeoutError, Repo
from shardrepo import engines

faulthandler.dump_traceback_later(3, exit=True)
build = engines.create_engine

def collect_and_build(*args, **kwargs):
    gc.collect()
    return build(*args, **kwargs)

engines.create_engine = collect_and_build

class MyRepo(Repo, config=sys.argv[1]):
    pass

def last_words():
    try:
        itself = yield
        yield
    finally:
        try:
            print(MyRepo.execute("SELECT 1").scalar_one())
        except RuntimeError as error:
            print(error)

gc.disable()
running = last_words()
next(running)
running.send([running])
del running
MyRepo.engine()
MyRepo.dispose()
"""


def test_a_finaliser_that_uses_a_verb(server: Server) -> None:
    """It is served, or told that it cannot be, but never waits for the thread that it interrupts."""
    url = server.url().render_as_string(hide_password=False)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FINALISER, url], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


# Somebody waits for it


def in_a_thread(work: Callable[[], object]) -> int:
    """Run *work* in a thread of its own, which ends; returns what the thread was known by."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert thread.ident is not None
    return thread.ident


@pytest.mark.usefixtures("no_collector")
def test_what_is_found_serves_who_waits(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """Whoever waits for a bound gets the place of a connection that is collected meanwhile."""
    repo = make_repo(database, max_connections=1, checkout_timeout=2)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(Losses(repo).in_a_cycle, 1).result()
        waiting = other.submit(repo.execute, "SELECT 1")
        await_(lambda: repo.stats().waiting == 1)
        gc.collect()
        assert waiting.result().scalar_one() == 1


@pytest.mark.usefixtures("no_collector")
def test_nobody_is_taken_for_the_dead(make_repo: Callable[..., type[Repo]], database: str) -> None:
    """A thread does not hold what one before it with the same identifier has lost: it waits, like anybody."""
    repo = make_repo(database, max_connections=1, checkout_timeout=0.2)
    caught: list[BaseException] = []

    def ask() -> None:
        try:
            repo.execute("SELECT 1")
        except CheckoutTimeoutError as error:
            caught.append(error)

    dead = in_a_thread(lambda: Losses(repo).in_a_cycle(1))
    for _ in range(20):  # on Linux the next one has the same, unless the system chooses otherwise
        if in_a_thread(ask) == dead:
            break
    else:
        pytest.fail("no thread had the identifier of the dead one")
    assert all(isinstance(error, CheckoutTimeoutError) and error.held == () for error in caught)
