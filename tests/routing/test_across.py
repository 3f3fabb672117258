"""`across`: verbs in many databases at a time, an outcome for each, and everything else left as it was."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import pytest
from psycopg import pq
from sqlalchemy import select, text
from sqlalchemy.exc import OperationalError, ProgrammingError

from shardrepo import (
    ConfigError,
    ConnectError,
    Database,
    DatabaseStateError,
    NoDatabaseError,
    Outcome,
    ReadOnlyError,
    Repo,
    ServerUnavailableError,
    TransactionDoomedError,
    UnknownDatabaseError,
    across,
    event,
)
from shardrepo.across import Target, fan_out
from shardrepo.directory import Static
from shardrepo.testing.servers import Server

from ..conftest import await_, await_connections, books_balance, connections_of, run_sql
from ..models import Post, Tag, User
from ..proxy import Proxy

pytestmark = pytest.mark.routing

THREADS = "shardrepo-across"


def address(on: Server | Proxy) -> dict[str, Any]:
    """What leads to a server, as the options of a directory."""
    url = on.url("postgres")
    return {"host": url.host, "port": url.port, "username": url.username, "password": url.password}


def running() -> list[str]:
    """The threads of fan-outs that there are."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREADS)]


@contextmanager
def locked(server: Server, name: str) -> Iterator[None]:
    """Let nobody read the users of a database, for the block."""
    with server.connect(name) as connection, connection.transaction():
        connection.execute("LOCK TABLE users")
        yield


def waiting_for_locks(server: Server, name: str) -> int:
    asked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = %s"
    return int(run_sql(server, "postgres", asked, (name,))[0][0])


@pytest.fixture(autouse=True)
def _nothing_runs() -> Iterator[None]:
    """The threads of iterators that a test has dropped end by themselves, before another test counts its own."""
    yield
    await_(lambda: running() == [])


@pytest.fixture
def names(make_databases: Callable[..., list[str]], server: Server) -> list[str]:
    """Four databases on one server, each with one tag that says which it is."""
    names = make_databases(4)
    for name in names:
        run_sql(server, name, "INSERT INTO tags (label) VALUES (current_database())")
    return names


@pytest.fixture
def repo(make_repo: Callable[..., type[Repo]], names: Sequence[str], server: Server) -> type[Repo]:
    """A repo with a directory of the four."""
    return make_repo("postgres", directory={name: address(server) for name in names}, application_name="swept")


# What comes back


def test_every_database_has_its_outcome(repo: type[Repo], names: list[str]) -> None:
    """Rows of each, detached and at home, by name in the order in which the databases were named."""
    found = repo.across(names).all(select(Tag)).collect()
    assert list(found) == names
    for name, (tag,) in found.items():
        assert tag.label == name
        assert str(repo.home(tag)).endswith(f"/{name}")
    assert repo.across().count(Tag).collect() == dict.fromkeys(names, 1)
    backwards = repo.across(reversed(names)).execute("SELECT current_database()").collect()
    assert [(name, result.scalar_one()) for name, result in backwards.items()] == [(n, n) for n in reversed(names)]


def test_an_outcome_says_where_and_for_how_long(repo: type[Repo], names: list[str], server: Server) -> None:
    """A value, no error, the home that objects have, and seconds."""
    outcomes = {outcome.name: outcome for outcome in repo.across(names).count(Tag)}
    assert outcomes.keys() == set(names)
    for name, outcome in outcomes.items():
        assert (outcome.ok, outcome.value, outcome.result(), outcome.error) == (True, 1, 1, None)
        assert outcome.home == f"127.0.0.1:{server.port}/{name}"
        assert outcome.seconds > 0


def test_outcomes_are_streamed(repo: type[Repo], names: list[str], server: Server) -> None:
    """The others' arrive while one database is still blocked by a lock."""
    with locked(server, names[0]):
        outcomes = repo.across(names).count(User)
        assert {next(outcomes).name for _ in names[1:]} == set(names[1:])
    assert [outcome.name for outcome in outcomes] == [names[0]]


def test_one_failure_hides_no_result(repo: type[Repo], names: list[str], server: Server) -> None:
    """It is one outcome among others; `collect` raises all failures at once, each naming its database, once."""
    for name in names[1:3]:
        run_sql(server, name, "DROP TABLE post_tags, tags")
    outcomes = {outcome.name: outcome for outcome in repo.across(names).count(Tag)}
    assert [outcomes[name].ok for name in names] == [True, False, False, True]
    with pytest.raises(ProgrammingError, match='"tags" does not exist'):
        outcomes[names[1]].result()
    with pytest.raises(ExceptionGroup, match="2 of 4 databases failed") as caught:
        repo.across(names).count(Tag).collect()
    assert [error.__notes__ for error in caught.value.exceptions] == [
        [f"database: 127.0.0.1:{server.port}/{name}"] for name in names[1:3]
    ]


def test_an_error_of_the_functions_own_names_its_database(repo: type[Repo], names: list[str]) -> None:
    """Any exception is an outcome, with a note, and leaves no connection."""

    def fail() -> None:
        repo.count(Tag)
        raise LookupError(repo.get_database().name)

    for outcome in repo.across(names).map(fail):
        assert isinstance(outcome.error, LookupError)
        assert outcome.error.args == (outcome.name,)
        assert outcome.error.__notes__ == [f"database: {outcome.home}"]
    assert (repo.stats().in_use, repo.stats().idle) == (0, 0)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt])
def test_what_is_no_exception_ends_the_iteration(
    repo: type[Repo], names: list[str], error: type[BaseException]
) -> None:
    """It is raised where the outcomes are taken, not turned into one."""

    def leave() -> None:
        raise error

    with pytest.raises(error), repo.across(names).map(leave) as outcomes:
        next(outcomes)
    assert running() == []


def test_databases_that_cannot_be_located(repo: type[Repo], names: list[str]) -> None:
    """An unknown name is an outcome, without a home, that comes first; nothing is connected to for it."""
    outcomes = list(repo.across([names[0], "nope"]).count(Tag))
    assert [(outcome.name, outcome.ok) for outcome in outcomes] == [("nope", False), (names[0], True)]
    assert isinstance(outcomes[0].error, UnknownDatabaseError)
    assert (outcomes[0].home, outcomes[0].error.__notes__) == (None, ["database: nope"])
    assert repo.stats().attempts == 1


@pytest.mark.parametrize("state", ["suspended", "migrating"])
def test_a_state_that_keeps_everybody_out(
    make_repo: Callable[..., type[Repo]], names: list[str], server: Server, state: str
) -> None:
    """An outcome before any socket is opened; whoever says that the database is active gets in."""
    repo = make_repo("postgres", directory={names[0]: {**address(server), "state": state}})
    (outcome,) = repo.across().count(Tag)
    assert isinstance(outcome.error, DatabaseStateError)
    assert (outcome.name, outcome.error.state, outcome.home) == (names[0], state, outcome.error.database.home)
    assert repo.stats().attempts == 0
    with repo.using(names[0]), pytest.raises(DatabaseStateError):
        repo.ping()
    active = Database.from_url(server.url(names[0]))
    for _ in range(2):
        assert [outcome.value for outcome in repo.across([active]).count(Tag)] == [1]
        assert not next(repo.across([names[0]]).count(Tag)).ok


# Which databases


def test_what_may_be_named(repo: type[Repo], names: list[str], server: Server) -> None:
    """Whatever `set_database` takes and `databases` returns, each of them once, by its name or else its home."""
    one, two, three, four = names
    listed = next(location for location in repo.databases() if location.name == one)
    complete = Database.from_url(server.url(two))
    named = [one, listed, one, complete, server.url(two), {"database": three}, {"database": four, **address(server)}]
    expected = [one, complete.home, three, f"127.0.0.1:{server.port}/{four}"]
    assert list(repo.across(named).count(Tag).collect()) == expected
    assert list(repo.across(name for name in names[:2]).count(Tag).collect()) == names[:2]
    assert repo.across([]).count(Tag).collect() == {}


def test_a_name_that_means_two_databases(repo: type[Repo], names: list[str]) -> None:
    """Their outcomes could not be told apart: refused before anything is done."""
    with pytest.raises(ConfigError, match="is named twice"):
        repo.across([names[0], {"database": names[0], "username": "somebody"}]).count(Tag)
    assert repo.stats().attempts == 0


BAD_CALLS: dict[str, tuple[Callable[[type[Repo]], object], str]] = {
    "a name": (lambda repo: repo.across("db01"), "takes a list of databases, not one str"),
    "a mapping": (lambda repo: repo.across({"database": "x"}), "takes a list of databases, not one dict"),  # type: ignore[arg-type]
    "a number": (lambda repo: repo.across(7), "takes a list of databases, not one int"),  # type: ignore[arg-type]
    "numbers": (lambda repo: repo.across([7]), "cannot choose a database by int 7"),  # type: ignore[list-item]
    "an unknown option": (lambda repo: repo.across([{"databse": "x"}]), "did you mean 'database'"),
    "nobody at a time": (lambda repo: repo.across([], per_server=0), "per_server=0 visits nothing"),
    "some at a time": (lambda repo: repo.across([], per_server="4"), "per_server must be an integer"),  # type: ignore[arg-type]
    "no time": (lambda repo: repo.across([], timeout=0), "timeout=0 cannot be kept"),
    "no directory": (lambda repo: repo.across(), "or give a directory in the config"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_a_wrong_call_is_refused_where_it_is_made(make_repo: Callable[..., type[Repo]], case: str) -> None:
    """Before anything is done."""
    call, message = BAD_CALLS[case]
    with pytest.raises(ConfigError, match=message):
        call(make_repo("postgres"))


def test_what_runs_later_is_no_function_to_map(repo: type[Repo]) -> None:
    """An async function and a generator would run when the visit is over."""

    async def later() -> None: ...

    def lazily() -> Iterator[int]:
        yield 1

    for function in (later, lazily):
        with pytest.raises(TypeError, match="do all of its work before it returns"):
            repo.across([]).map(function)


def test_nothing_is_chosen_by_default(make_repo: Callable[..., type[Repo]], names: list[str]) -> None:
    """None among the databases is the default, which there may be none of; what was chosen plays no part."""
    repo = make_repo(names[0])
    with repo.using(names[1]):
        (outcome,) = repo.across([None]).execute("SELECT current_database()")
        assert outcome.result().scalar_one() == names[0]
    strict = make_repo(names[0], require_database=True)
    (outcome,) = strict.across([None]).count(Tag)
    assert isinstance(outcome.error, NoDatabaseError)


# How many at a time


def test_so_many_on_a_server_and_no_more(repo: type[Repo], names: list[str], server: Server) -> None:
    """As its server sees it: two of four are connected to while nobody gets on, and the others not before."""
    go_on = threading.Event()
    begun = threading.Semaphore(0)

    def wait() -> None:
        repo.count(Tag)
        begun.release()
        assert go_on.wait(30)

    outcomes = repo.across(names, per_server=2).map(wait)
    consumer = threading.Thread(target=outcomes.collect)
    consumer.start()
    for _ in range(2):
        assert begun.acquire(timeout=30)
    assert len(connections_of(server, "swept")) == 2
    assert len(running()) == 2
    go_on.set()
    consumer.join(30)
    await_connections(server, "swept", [])


def test_a_slow_consumer_slows_the_work(repo: type[Repo], names: list[str]) -> None:
    """A database is visited when an outcome was taken, so that no more wait than the bound lets run."""
    visited = Counter[str]()
    ended = threading.Semaphore(0)

    def visit() -> None:
        visited[repo.get_database().name] += 1
        ended.release()

    outcomes = repo.across(names, per_server=1).map(visit)
    assert visited.total() == 0
    for taken in range(1, len(names) + 1):
        next(outcomes)
        if taken < len(names):
            assert ended.acquire(timeout=30)
            assert ended.acquire(timeout=30)
            ended.release()
        assert visited.total() <= taken + 1
    assert list(outcomes) == []
    assert set(visited.values()) == {1}


def targets(servers: int, databases: int) -> list[Target]:
    return [
        Target(f"{server}/{number}", Database(f"db{server}", 5432, f"shard{number}"))
        for server in range(servers)
        for number in range(databases)
    ]


def test_ten_thousand_databases_take_no_more_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do more results wait than there are places, however slowly they are taken."""
    monkeypatch.setattr(across, "MAX_THREADS", 10)
    done = Counter[str]()
    threads = set()

    def work(target: Target) -> str:
        done[target.name] += 1
        threads.add(threading.get_ident())
        return target.name

    taken = 0
    for outcome in fan_out(targets(5, 2_000), work, per_server=4):
        taken += 1
        assert done.total() - taken <= 10
        assert outcome.value == outcome.name
    assert (taken, set(done.values())) == (10_000, {1})
    assert len(threads) <= 10
    assert running() == []


def test_a_server_that_hangs_leaves_the_others_their_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where one server could have all threads: those with fewer busy come first."""
    monkeypatch.setattr(across, "MAX_THREADS", 4)
    go_on = threading.Event()

    def work(target: Target) -> None:
        assert target.database.host != "db0" or go_on.wait(30)

    outcomes = fan_out(targets(3, 50), work, per_server=50)
    assert Counter(next(outcomes).name[0] for _ in range(100)) == {"1": 50, "2": 50}
    go_on.set()
    assert len(list(outcomes)) == 50


# Leaving early


def test_closing_starts_nothing_more_and_waits(repo: type[Repo], names: list[str], server: Server) -> None:
    """When the block is left, nothing runs, and no connection is left."""
    visited = Counter[str]()

    def visit() -> None:
        visited[repo.get_database().name] += 1
        repo.count(Tag)

    with repo.across(names, per_server=1).map(visit) as outcomes:
        next(outcomes)
    assert 1 <= visited.total() <= 2
    assert running() == []
    assert repo.stats().in_use == repo.stats().connecting == 0
    await_connections(server, "swept", [])
    assert list(outcomes) == []


@pytest.mark.parametrize("way", ["break", "exception", "cycle"])
def test_dropping_the_iterator_starts_nothing_more(
    repo: type[Repo], names: list[str], server: Server, way: str
) -> None:
    """What runs ends by itself, and its connection with it; nobody waits for it."""
    visited = Counter[str]()

    def visit() -> None:
        visited[repo.get_database().name] += 1
        repo.count(User)

    def leave() -> None:
        outcomes = repo.across(names, per_server=2).map(visit)
        holder: list[object] = [outcomes]
        for _ in outcomes:
            if way == "exception":
                raise LookupError
            if way == "cycle":
                holder.append(holder)
            break

    with locked(server, names[0]):
        with suppress(LookupError):
            leave()
        gc.collect()
        await_(lambda: waiting_for_locks(server, names[0]) == 1)
    await_(lambda: running() == [])
    assert visited.total() <= 3
    await_connections(server, "swept", [])
    assert (repo.stats().in_use, books_balance(repo)) == (0, True)


def test_an_interrupted_consumer_goes_on_at_once(repo: type[Repo], names: list[str], server: Server) -> None:
    """What it raises is not turned into anything, and iterating is over."""
    with pytest.raises(KeyboardInterrupt):
        for _ in repo.across(names).count(Tag):
            raise KeyboardInterrupt
    await_(lambda: running() == [])
    await_connections(server, "swept", [])


def test_what_was_never_iterated_over_has_done_nothing(repo: type[Repo], names: list[str], server: Server) -> None:
    """Neither a thread nor a statement."""
    outcomes = repo.across(names).execute("DELETE FROM tags")
    assert running() == []
    outcomes.close()
    assert list(outcomes) == []
    assert [run_sql(server, name, "SELECT count(*) FROM tags") for name in names] == [[(1,)]] * 4


# Time


def test_a_database_that_takes_too_long(repo: type[Repo], names: list[str], server: Server) -> None:
    """Its statement is given up, and its connection; the others have their results."""
    with locked(server, names[0]):
        outcomes = {outcome.name: outcome for outcome in repo.across(names, timeout=1.0).count(User)}
    assert [outcomes[name].ok for name in names] == [False, True, True, True]
    assert isinstance(outcomes[names[0]].error, OperationalError)
    await_connections(server, "swept", [])


def lengthy(repo: type[Repo]) -> Iterator[Callable[[], object]]:
    """Ways to take longer than one is given, each of whose calls has more time, or none of its own."""

    def by_options() -> None:
        with repo.call_options(timeout=60.0):
            repo.execute("SELECT pg_sleep(60)")

    def in_a_transaction() -> None:
        with repo.transaction(timeout=60.0):
            repo.execute("SELECT pg_sleep(60)")

    def by_hand() -> None:
        with repo.connection() as connection:
            connection.execute(text("SELECT pg_sleep(60)"))

    def with_what_is_left() -> None:
        for _ in range(600):
            repo.execute("SELECT pg_sleep(0.1)")

    def in_silence() -> None:
        with pytest.raises(OperationalError):
            repo.execute("SELECT pg_sleep(60)")

    yield from (by_options, in_a_transaction, by_hand, with_what_is_left, in_silence)


@pytest.mark.parametrize("number", range(5))
def test_the_time_is_that_of_the_whole_visit(repo: type[Repo], names: list[str], server: Server, number: int) -> None:
    """Whatever is called in it, and however much time that would have by itself."""
    work = list(lengthy(repo))[number]
    (outcome,) = repo.across(names[:1], timeout=0.3).map(work)
    assert isinstance(outcome.error, OperationalError | TransactionDoomedError)
    if pq.version() >= 170000:  # an older one cannot ask the server to stop, which goes on until it is done
        await_connections(server, "swept", [])
    assert repo.stats().in_use == 0


def test_connecting_takes_of_the_same_time(
    make_repo: Callable[..., type[Repo]], names: list[str], proxy: Proxy
) -> None:
    """A network that is silent is given up after the visit's time, long before that of a connect."""
    repo = make_repo("postgres", connect_timeout=60.0)
    proxy.deafen()
    (outcome,) = repo.across([proxy.url(names[0])], timeout=0.3).count(Tag)
    assert isinstance(outcome.error, ServerUnavailableError)
    assert outcome.error.reason == "deadline"


def test_a_dead_server_holds_up_nobody(
    make_repo: Callable[..., type[Repo]], names: list[str], server: Server, proxy: Proxy
) -> None:
    """The outcomes of all others are there while its own are still awaited; then they are failures."""
    dead = {f"dead{number}": {**address(proxy), "database": name} for number, name in enumerate(names)}
    alive = {name: address(server) for name in names}
    repo = make_repo("postgres", directory=Static({**dead, **alive}), connect_timeout=60.0)
    proxy.deafen()
    with repo.across(per_server=2).count(Tag) as outcomes:
        assert {next(outcomes).name for _ in names} == set(names)
        proxy.cut()
        failed = list(outcomes)
    assert {outcome.name for outcome in failed} == set(dead)
    assert {type(outcome.error) for outcome in failed} <= {ConnectError, ServerUnavailableError}


# What stays as it was


def test_cached_connections_are_neither_used_nor_closed(
    make_repo: Callable[..., type[Repo]], names: list[str], server: Server
) -> None:
    """Those that were there are there afterwards, and no other, whatever the functions do."""
    repo = make_repo("postgres", pool_size=2, application_name="kept")
    for name in names[:2]:
        with repo.using(name):
            repo.count(Tag)
    before = connections_of(server, "kept")
    evicted: list[event.Event] = []
    event.listen(repo, "evict", evicted.append)

    def visit() -> set[int]:
        used = {pid() for _ in range(2)}
        with repo.transaction():
            used.add(pid())
        with repo.connection() as connection:
            used.add(connection.execute(text("SELECT pg_backend_pid()")).scalar_one())
        assert len(used) == 1
        with repo.stream(select(Tag)) as tags, repo.session() as session:
            assert [tag.label for tag in tags] == list(session.scalars(select(Tag.label)))
        return used

    def pid() -> int:
        return int(repo.execute("SELECT pg_backend_pid()").scalar_one())

    found = repo.across(names).map(visit).collect()
    assert len(set.union(*found.values())) == len(names)
    assert set.union(*found.values()).isdisjoint(pid for pid, _ in before)
    assert (evicted, repo.stats().evictions, repo.stats().idle) == ([], 0, 2)
    await_connections(server, "kept", names[:2])
    assert connections_of(server, "kept") == before
    assert (repo.stats().hits, repo.stats().misses, repo.stats().hit_rate) == (0, 2, 0.0)


def test_a_hard_bound_holds(make_repo: Callable[..., type[Repo]], names: list[str], server: Server) -> None:
    """Visits count for it, wait for it, and evict where it leaves no other room."""
    repo = make_repo("postgres", max_per_server=2, application_name="bound")
    for name in names[:2]:
        with repo.using(name):
            repo.count(Tag)
    assert repo.across(names, per_server=4).count(Tag).collect() == dict.fromkeys(names, 1)
    assert repo.stats().evictions == 2
    await_connections(server, "bound", [])


def test_the_callers_transaction_is_untouched(repo: type[Repo], names: list[str], server: Server) -> None:
    """It is neither seen nor doomed, and goes on afterwards; visits of its own database are apart from it."""
    with repo.using(names[0]), repo.transaction():
        repo.insert(Tag(label="mine"))
        run_sql(server, names[1], "DROP TABLE post_tags, tags")
        counted = {outcome.name: outcome.value for outcome in repo.across(names).count(Tag)}
        assert counted == {names[0]: 1, names[1]: None, names[2]: 1, names[3]: 1}
        assert not any(repo.across(names).map(repo.in_transaction).collect().values())
        assert repo.in_transaction()
        assert repo.count(Tag) == 2
        assert repo.get_database().name == names[0]
    assert run_sql(server, names[0], "SELECT count(*) FROM tags") == [(2,)]


REQUEST: ContextVar[str] = ContextVar("request")


def test_the_context_of_the_call_is_carried(repo: type[Repo], names: list[str]) -> None:
    """Context variables, tags and call options are those of where the verb was called; changes stay in their visit."""
    seen: list[event.Event] = []
    event.listen(repo, "query", seen.append)

    def visit() -> str:
        repo.execute("SELECT 1")
        found = REQUEST.get()
        REQUEST.set("changed")
        repo.set_database("elsewhere")
        return found

    before = REQUEST.set("request 7")
    with repo.call_options(tags={"request": 7}, timeout=30.0):
        outcomes = repo.across(names).map(visit)
    REQUEST.reset(before)
    assert outcomes.collect() == dict.fromkeys(names, "request 7")
    assert [(dict(each.tags), each.database.name in names) for each in seen] == [({"request": 7}, True)] * len(names)


# What is done there


def test_a_transaction_in_each(repo: type[Repo], names: list[str], server: Server) -> None:
    """All or nothing by database: those that fail have nothing, the others everything."""

    def write() -> User:
        with repo.transaction(isolation="serializable"):
            user = repo.insert(User(name=repo.get_database().name, posts=[Post(title="x")]))
            repo.insert_all(Tag, [{"label": "more"}])
            if repo.get_database().name == names[1]:
                raise ValueError("not here")
        return user

    outcomes = {outcome.name: outcome for outcome in repo.across(names).map(write)}
    assert [name for name in names if not outcomes[name].ok] == [names[1]]
    for name, outcome in outcomes.items():
        rows = [(name,)] if outcome.ok else []
        assert run_sql(server, name, "SELECT name FROM users") == rows
        assert run_sql(server, name, "SELECT count(*) FROM tags") == [(1 + outcome.ok,)]
    written = outcomes[names[0]].result()
    assert repo.home(written) == outcomes[names[0]].home
    with repo.using(names[0]):
        repo.update(written, name="changed")
    assert repo.reload(written) is not None


def test_objects_are_reloaded_from_where_they_were_found(repo: type[Repo], names: list[str]) -> None:
    """Without choosing their databases again."""
    for outcome in repo.across(names).all(Tag):
        (tag,) = outcome.result()
        found = repo.reload(tag)
        assert found is not None
        assert found.label == outcome.name


def test_visits_on_other_databases_are_apart(repo: type[Repo], names: list[str]) -> None:
    """`using` in a function leads elsewhere and back, by the cache."""
    other = names[3]

    def visit() -> tuple[str, str]:
        with repo.using(other):
            there = repo.one(select(Tag.label))
        return there, repo.one(select(Tag.label))

    assert repo.across(names[:3]).map(visit).collect() == {name: (other, name) for name in names[:3]}
    with repo.using(other):
        repo.count(Tag)
    assert repo.stats().hits >= 1


def test_what_a_function_leaves_open_is_its_failure(repo: type[Repo], names: list[str], server: Server) -> None:
    """A BEGIN by hand is rolled back, not committed, and said."""

    def visit() -> None:
        repo.execute("BEGIN")
        repo.execute("DELETE FROM tags")

    (outcome,) = repo.across(names[:1]).map(visit)
    assert isinstance(outcome.error, TransactionDoomedError)
    assert run_sql(server, names[0], "SELECT count(*) FROM tags") == [(1,)]


def test_hooks_and_modes_apply(make_repo: Callable[..., type[Repo]], names: list[str], server: Server) -> None:
    """`prepare_query`, `default_options` and read_only are those of the repo."""
    operations = set()

    class Careful(make_repo("postgres", read_only=True)):  # type: ignore[misc]  # made by a function
        @classmethod
        def prepare_query(cls, operation: str, query: Any) -> Any:
            operations.add(operation)
            return query.where(Tag.label != names[0])

        @classmethod
        def default_options(cls, operation: str) -> Any:
            operations.add(f"options of {operation}")
            return {"timeout": 30.0}

    urls = [server.url(name) for name in names[:2]]
    assert [outcome.value for outcome in sorted(Careful.across(urls).count(Tag), key=home_of)] == [0, 1]
    assert operations == {"count", "options of count", "options of across"}
    for outcome in Careful.across(urls).map(lambda: Careful.insert(Tag(label="x"))):
        assert isinstance(outcome.error, ReadOnlyError)


def home_of(outcome: Outcome[Any]) -> str:
    return str(outcome.home)
