"""The two ways to reach many databases that the demo compares: a Repo, and an engine per database.

Others derive from these: the benchmark `load` compares more ways, which differ in where a session comes from.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Final, Literal, Protocol, TypeAlias

from sqlalchemy import Select, create_engine, select
from sqlalchemy.engine import URL, Engine
from sqlalchemy.orm import Session

from ..database import Options
from ..ledger import Ledger
from ..repo import Repo
from ..stats import Stats
from .models import Customer

Way: TypeAlias = Literal["repo", "by hand"]

# How many rows "a small all" asks for.
FEW: Final = 5


class Disposable(Protocol):
    """What holds connections until it is disposed of."""

    def stats(self) -> Stats | None: ...
    def dispose(self) -> None: ...


class Driver(Disposable, Protocol):
    """A way to read and write customers in any of many databases. Every method may be called from any thread."""

    def get(self, url: URL, key: int) -> Customer | None: ...
    def few(self, url: URL, first: int) -> list[Customer]: ...
    def insert(self, url: URL, customer: Customer) -> None: ...
    def update(self, url: URL, key: int) -> Customer: ...


class RepoDriver:
    """Everything through one Repo."""

    def __init__(self, application_name: str, pool_size: int) -> None:
        config = {"application_name": application_name, "pool_size": pool_size}
        self.repo: type[Repo] = type("DemoRepo", (Repo,), {}, config=config)

    def get(self, url: URL, key: int) -> Customer | None:
        with self.repo.using(**_options(url)):
            return self.repo.get(Customer, key)

    def few(self, url: URL, first: int) -> list[Customer]:
        with self.repo.using(**_options(url)):
            return self.repo.all(select_few(first))

    def insert(self, url: URL, customer: Customer) -> None:
        with self.repo.using(**_options(url)):
            self.repo.insert(customer)

    def update(self, url: URL, key: int) -> Customer:
        with self.repo.using(**_options(url)):
            customer = self.repo.get_one(Customer, key)
            return self.repo.update(customer, visits=customer.visits + 1)

    def stats(self) -> Stats:
        return self.repo.stats()

    @property
    def ledger(self) -> Ledger[object, object]:
        """The books of the repo's cache, for those who want to watch every step of them."""
        ledger: Ledger[object, object] = self.repo._router.cache.ledger  # type: ignore[assignment]  # whatever it holds
        return ledger

    def dispose(self) -> None:
        self.repo.dispose()


class SessionDriver(ABC):
    """Everything through SQLAlchemy's own sessions, one for each operation."""

    @abstractmethod
    def session(self, url: URL) -> AbstractContextManager[Session]:
        """A session on that database, to be closed at the end of the block."""

    def get(self, url: URL, key: int) -> Customer | None:
        with self.session(url) as session:
            return session.get(Customer, key)

    def few(self, url: URL, first: int) -> list[Customer]:
        with self.session(url) as session:
            return list(session.scalars(select_few(first)))

    def insert(self, url: URL, customer: Customer) -> None:
        with self.session(url) as session:
            session.add(customer)
            session.commit()

    def update(self, url: URL, key: int) -> Customer:
        with self.session(url) as session:
            customer = session.get_one(Customer, key)
            customer.visits += 1
            session.commit()
            return customer

    def stats(self) -> None:
        return None


class ByHandDriver(SessionDriver):
    """What one writes without a library: an engine per database, made at its first use and kept.

    Args:
        options: What else `create_engine` is told.
    """

    def __init__(self, application_name: str, **options: Any) -> None:
        self._options = {"connect_args": {"application_name": application_name}, **options}
        self._engines: dict[URL, Engine] = {}
        # Guards the engines, so that no database gets two.
        self._lock = threading.Lock()

    def session(self, url: URL) -> Session:
        return Session(self._engine(url), expire_on_commit=False)

    def dispose(self) -> None:
        for engine in self._engines.values():
            engine.dispose()

    def _engine(self, url: URL) -> Engine:
        with self._lock:
            if url not in self._engines:
                self._engines[url] = create_engine(url, **self._options)
            return self._engines[url]


def make_driver(way: Way, application_name: str, pool_size: int) -> Driver:
    """Make the driver of *way*, which opens nothing yet."""
    makers: Mapping[Way, Callable[[], Driver]] = {
        "repo": lambda: RepoDriver(application_name, pool_size),
        "by hand": lambda: ByHandDriver(application_name),
    }
    return makers[way]()


def _options(url: URL) -> Options:
    assert url.host
    assert url.port
    assert url.database
    assert url.username
    return {
        "host": url.host,
        "port": url.port,
        "database": url.database,
        "username": url.username,
        "password": str(url.password),
    }


def select_few(first: int) -> Select[Customer]:
    """The next few customers from a key on."""
    return select(Customer).where(Customer.id >= first).order_by(Customer.id).limit(FEW)
