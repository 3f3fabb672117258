"""`python -m benchmarks soak [--minutes N | --operations N] [--seed N]`: the demo's load while everything fails.

Threads read and write in 60 databases on three servers, behind a proxy each, while faults come at random: backends are
killed, connections reset, refused, hung and slowed, borrowers lost, columns changed, databases renamed and dropped, the
process forked. Every row is checked, and after it every database is looked through. What was found is added to the
table at the end of docs/figures.md.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import date
from time import monotonic, sleep
from typing import Final, TypeAlias

from psycopg.sql import SQL, Identifier
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError

from shardrepo import Repo, UnknownDatabaseError
from shardrepo.demo.drivers import RepoDriver
from shardrepo.demo.fleet import audit, create, run
from shardrepo.demo.load import Load, Plan
from shardrepo.demo.models import Customer
from shardrepo.testing.servers import Server, Servers, start_servers
from tests.proxy import Proxy

from .report import FIGURES

DATABASES: Final = 60
POOL_SIZE: Final = 20
THREADS: Final = 12

# How often something fails, and for how long: seconds, on average.
PAUSE, LENGTH = 0.4, 0.3

# Seconds in which a server has to be of use again after a fault is over. A probe may be two seconds away.
BACK_WITHIN: Final = 15.0

# What a caller may be told while the network and the servers fail.
EXPECTED: Final = {
    *("OperationalError", "InterfaceError", "ConnectError", "ServerUnavailableError", "ServerFullError"),
    "UnknownDatabaseError",  # while it has another name
}

HEADING: Final = "## soak"
_TABLE: Final = f"""{HEADING}

{__doc__.partition(chr(10) + chr(10))[2].strip()}

| date | seed | minutes | operations | faults | errors | rows checked | wrong rows | lost or doubled |
|---|---|---|---|---|---|---|---|---|
"""


class SoakDriver(RepoDriver):
    """A Repo whose calls take two seconds at most; it remembers which inserts may or may not have been done."""

    def __init__(self) -> None:
        config = {"application_name": "soak", "pool_size": POOL_SIZE, "connect_timeout": 1.0, "check_after": 5.0}
        self.repo: type[Repo] = type("SoakRepo", (Repo,), {}, config=config)
        self.uncertain: Counter[str] = Counter()
        self._counting = threading.Lock()

    def get(self, url: URL, key: int) -> Customer | None:
        with self.repo.call_options(timeout=2.0):
            return super().get(url, key)

    def few(self, url: URL, first: int) -> list[Customer]:
        with self.repo.call_options(timeout=2.0):
            return super().few(url, first)

    def update(self, url: URL, key: int) -> Customer:
        with self.repo.call_options(timeout=2.0):
            return super().update(url, key)

    def insert(self, url: URL, customer: Customer) -> None:
        try:
            with self.repo.call_options(timeout=2.0):
                super().insert(url, customer)
        except Exception:
            with self._counting:
                self.uncertain[str(url.database)] += 1
            raise


@dataclass
class Scene:
    """Where faults happen: one of the servers, its proxy, a database of it, and the repo."""

    server: Server
    proxy: Proxy
    url: URL
    repo: type[Repo]
    chance: random.Random

    def kill(self, limit: str = "") -> None:
        """End the repo's backends on the server, past the proxy."""
        with self.server.connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM (SELECT pid FROM pg_stat_activity "
                f"WHERE application_name = 'soak' ORDER BY random() {limit}) AS chosen".encode()
            )

    def execute(self, statement: str) -> None:
        """Run SQL of the user's own through the repo."""
        with self.repo.using(self.url), self.repo.call_options(timeout=2.0), suppress(SQLAlchemyError):
            self.repo.execute(statement)

    def lose(self) -> None:
        """Let a thread die that has a transaction open, with its session in a cycle."""

        def borrow() -> None:
            with self.repo.using(self.url), suppress(SQLAlchemyError):
                session = self.repo.session()
                session.info["itself"] = session
                session.add(Customer(name="never kept", email=None, city="nowhere"))
                session.flush()

        thread = threading.Thread(target=borrow)
        thread.start()
        thread.join()
        gc.collect()

    def retype(self) -> None:
        """Change the type of a column that every prepared statement returns."""
        wanted = self.chance.choice(["text", "varchar(100)"])
        run(self.server.url(str(self.url.database)), f"ALTER TABLE customers ALTER city TYPE {wanted}")

    def rename(self) -> None:
        """Give the database another name for a moment."""
        name = Identifier(str(self.url.database))
        away = Identifier(f"{self.url.database}_away")
        with self.server.connect() as connection:

            def alter(change: str) -> None:
                connection.execute(SQL("ALTER DATABASE {} ").format(name) + SQL(change).format(away))

            alter("ALLOW_CONNECTIONS false")
            try:
                connection.execute(
                    "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = %s",
                    (self.url.database,),
                )
                alter("RENAME TO {}")
                sleep(self.chance.uniform(0, LENGTH))
                connection.execute(SQL("ALTER DATABASE {} RENAME TO {}").format(away, name))
            finally:
                alter("ALLOW_CONNECTIONS true")

    def drop(self) -> None:
        """Let go of a database of one's own, have it dropped by somebody else, and made again."""
        with self.repo.using(self.url.set(database="dropped")), self.repo.call_options(timeout=5.0):
            for _ in range(2):
                self.server.create_database("dropped")
                found = self.repo.execute("SELECT current_database()").scalar_one()
                self.repo.disconnect()
                self.server.drop_database("dropped", force=False)
                with suppress(UnknownDatabaseError):
                    self.repo.execute("SELECT 1")
                    found = "a database that does not exist"
                if found != "dropped":
                    raise RuntimeError(f"met {found!r}")

    def fork(self) -> None:
        """Have a child read what its parent reads, on a connection of its own."""
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # a process with threads forks
            child = os.fork()
        if child == 0:
            os._exit(self._status_of_child())
        deadline = monotonic() + BACK_WITHIN
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            sleep(0.01)
        if ended[1] != 0:
            raise RuntimeError(f"a forked child ended with status {ended[1]}")

    def _status_of_child(self) -> int:
        with suppress(BaseException), self.repo.using(self.url), self.repo.call_options(timeout=5.0):
            found = self.repo.get_one(Customer, 1).database
            return 0 if found == self.url.database else 2
        return 1


Fault: TypeAlias = Callable[[Scene], object]

FAULTS: Final[dict[str, Fault]] = {
    "one killed": lambda scene: scene.kill("LIMIT 1"),
    "all killed": lambda scene: scene.kill(),
    "reset": lambda scene: scene.proxy.cut(new=False),
    "refused": lambda scene: scene.proxy.cut(live=False),
    "reset and refused": lambda scene: scene.proxy.cut(),
    "accepted and reset": lambda scene: scene.proxy.cut(live=False, refuse=False),
    "silent": lambda scene: scene.proxy.deafen(),
    "silent to new ones": lambda scene: scene.proxy.deafen(live=False),
    "slow to connect": lambda scene: scene.proxy.slow(connect=0.5),
    "slow": lambda scene: scene.proxy.slow(chunk=0.02),
    "disconnected": lambda scene: scene.repo.disconnect_all(),
    "column changed": Scene.retype,
    "renamed": Scene.rename,
    "dropped": Scene.drop,
    "forked": Scene.fork,
    "borrower lost": Scene.lose,
    "setting left": lambda scene: scene.execute("SET search_path TO nowhere"),
    "role left": lambda scene: scene.execute("SET ROLE pg_monitor"),
    "table left": lambda scene: scene.execute("CREATE TEMP TABLE customers AS SELECT 1 AS id, 'nowhere' AS database"),
    "lock left": lambda scene: scene.execute("SELECT pg_advisory_lock(1)"),
}


@dataclass
class Result:
    """What a soak has done and found; it is *clean* if nothing of it should not have been."""

    seed: int
    seconds: float
    operations: int
    rows: int
    wrong: int
    faults: Counter[str]
    errors: Counter[str]
    strays: int
    misplaced: dict[str, tuple[int, int, int]]
    broken: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        unexpected = set(self.errors) - EXPECTED
        return not (self.wrong or self.strays or self.misplaced or self.broken or unexpected)

    def __str__(self) -> str:
        lines = {
            "operations": f"{self.operations} in {self.seconds:.0f} s ({self.operations / self.seconds:.0f}/s)",
            "rows checked": f"{self.rows}, {self.wrong} of another database",
            "left in the databases": f"{self.strays} of another database, lost or doubled: {self.misplaced or 'none'}",
            "faults": f"{self.faults.total()}: {dict(self.faults.most_common())}",
            "errors": f"{self.errors.total()}: {dict(self.errors.most_common())}",
            "broken": "; ".join(self.broken) or "nothing",
        }
        return "\n".join(f"{name:<24}{value}" for name, value in lines.items())

    @property
    def row(self) -> str:
        cells = [date.today(), self.seed, f"{self.seconds / 60:.1f}", self.operations, self.faults.total()]
        cells += [self.errors.total(), self.rows, self.wrong + self.strays, len(self.misplaced)]
        return f"| {' | '.join(map(str, cells))} |\n"


class Soak:
    """The load and the faults, over servers that have the demo's databases."""

    def __init__(self, servers: Servers, urls: Sequence[URL], plan: Plan) -> None:
        self._servers = servers
        self._urls = urls
        self._plan = plan
        self._chance = random.Random(plan.seed)
        self._faults: Counter[str] = Counter()
        self._broken: list[str] = []
        self._end = threading.Event()

    def run(self) -> Result:
        """Run until the plan is done, and look through everything."""
        with ExitStack() as stack:
            self._proxies = {server.port: stack.enter_context(Proxy(server)) for server in self._servers}
            self._driver = SoakDriver()
            stack.callback(self._driver.dispose)
            load = Load(self._driver, [self._behind_proxy(url) for url in self._urls], self._plan)
            failing = threading.Thread(target=self._fail)
            load.start()
            failing.start()
            while not load.wait(1.0):
                print(f"\r{load.operations} operations, {self._faults.total()} faults ", end="", file=sys.stderr)
            self._end.set()
            failing.join()
            self._check_rest()
            return self._result(load)

    def _behind_proxy(self, url: URL) -> URL:
        proxy = self._proxies[url.port or 0]
        return url.set(host=proxy.host, port=proxy.port)

    def _fail(self) -> None:
        """Let one fault after the other happen: every kind once, then at random."""
        kinds = list(FAULTS)
        self._chance.shuffle(kinds)
        while not self._end.wait(self._chance.uniform(0, 2 * PAUSE)):
            kind = kinds.pop() if kinds else self._chance.choice(list(FAULTS))
            server = self._chance.choice(list(self._servers))
            url = self._chance.choice([url for url in self._urls if url.port == server.port])
            proxy = self._proxies[server.port]
            scene = Scene(server, proxy, self._behind_proxy(url), self._driver.repo, self._chance)
            try:
                FAULTS[kind](scene)
                self._end.wait(self._chance.uniform(0, 2 * LENGTH))
            except Exception as error:
                self._broken.append(f"{kind}: {error!r}")
            finally:
                proxy.restore()
            self._faults[kind] += 1
            self._await_service(scene, kind)

    def _await_service(self, scene: Scene, kind: str) -> None:
        deadline = monotonic() + BACK_WITHIN
        while monotonic() < deadline:
            with suppress(SQLAlchemyError):
                self._driver.get(scene.url, 1)
                return
            self._end.wait(0.05)
        self._broken.append(f"no service within {BACK_WITHIN} s after {kind}")

    def _check_rest(self) -> None:
        """After the load nothing is open but what is idle in the books, and nothing at all once that is given up.

        The servers may list less: what a fault has ended while it was idle is found out when it is next used.
        """
        self._await_rest(lambda idle, there: there <= idle <= POOL_SIZE)
        self._driver.repo.disconnect_all()
        self._await_rest(lambda idle, there: there == idle == 0)

    def _await_rest(self, is_as_it_should: Callable[[int, int], bool]) -> None:
        deadline = monotonic() + BACK_WITHIN
        while True:
            gc.collect()
            stats = self._driver.stats()
            there = sum(_connections(server) for server in self._servers)
            if stats.in_use == stats.connecting == stats.closing == 0 and is_as_it_should(stats.idle, there):
                return
            if monotonic() > deadline:
                self._broken.append(f"at rest the servers list {there} connections, the books say {stats}")
                return

    def _result(self, load: Load) -> Result:
        inserted, uncertain = load.inserted(), self._driver.uncertain
        looked_at = list(audit(self._urls))
        return Result(
            seed=self._plan.seed,
            seconds=load.ended - load.started,
            operations=load.operations,
            rows=sum(tally.rows for tally in load.tallies),
            wrong=sum(tally.wrong for tally in load.tallies),
            faults=self._faults,
            errors=load.errors(),
            strays=sum(strays for _, strays, _ in looked_at),
            misplaced={
                name: (found, inserted[name], uncertain[name])
                for name, _, found in looked_at
                if not inserted[name] <= found <= inserted[name] + uncertain[name]
            },
            broken=self._broken,
        )


def _connections(server: Server) -> int:
    with server.connect() as connection:
        row = connection.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'soak'").fetchone()
        return int(row[0]) if row else 0


def kept_section(page: str) -> str:
    """The soaks recorded on *page*, which whoever writes it anew has to keep."""
    return HEADING + page.partition(HEADING)[2] if HEADING in page else ""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long to go on (default: 1)")
    parser.add_argument("--operations", type=int, help="how many operations instead")
    parser.add_argument("--seed", type=int, default=1, help="what the load and the faults are drawn from")
    given = parser.parse_args(arguments)
    seconds = None if given.operations else given.minutes * 60
    with start_servers(3) as servers:
        urls = create(servers, DATABASES, lambda _: None)
        plan = Plan(threads=THREADS, think=0.005, seconds=seconds, operations=given.operations, seed=given.seed)
        result = Soak(servers, urls, plan).run()
    print(f"\n{result}")
    page = FIGURES.read_text(encoding="utf-8")
    FIGURES.write_text(page + ("" if HEADING in page else "\n" + _TABLE) + result.row, encoding="utf-8")
    sys.exit(0 if result.is_clean else 1)
