"""fastapi-tenancy, the nearest rival: an LRU cache of engines, in one event loop.

From its README, "Database isolation", and `make_tenant_db_dependency`, which does what is done here: a manager's
`isolation_provider.get_session(tenant)` for each request. What FastAPI itself would cost, and finding the tenant that
a request names, is left out. The driver is asyncpg, as in all of its documentation; or psycopg, as all others have
it here, which connects several times as fast.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractAsyncContextManager
from time import monotonic
from typing import Any, TypeVar

from fastapi_tenancy import IsolationStrategy, TenancyConfig, TenancyManager, Tenant
from fastapi_tenancy.storage.memory import InMemoryTenantStore
from sqlalchemy import event
from sqlalchemy.engine import URL, Dialect, Engine
from sqlalchemy.ext.asyncio import AsyncSession

from shardrepo.demo.drivers import select_few
from shardrepo.demo.load import Plan, Step, Tally, Users, new_customer
from shardrepo.demo.models import Customer

T = TypeVar("T")


class TenancyDriver:
    """A `TenancyManager` in an event loop of its own, which runs in a thread.

    Its template knows one server; an address as the tenant's id makes it know several.

    Args:
        options: Settings of the `TenancyConfig` that are not left at what they are.
    """

    def __init__(self, application_name: str, urls: Sequence[URL], driver: str = "asyncpg", **options: Any) -> None:
        _name_connections(application_name)
        config = TenancyConfig(
            database_url=f"postgresql+{driver}://{_address(urls[0])}",
            database_url_template=f"postgresql+{driver}://{{tenant_id}}",
            isolation_strategy=IsolationStrategy.DATABASE,
            **options,
        )
        self._manager = TenancyManager(config, InMemoryTenantStore())
        self._tenants = {
            url: Tenant(id=_address(url), identifier=str(url.database), name=str(url.database)) for url in urls
        }
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def session(self, url: URL) -> AbstractAsyncContextManager[AsyncSession]:
        """A session on that database, to be closed at the end of the block."""
        session: AbstractAsyncContextManager[AsyncSession]
        session = self._manager.isolation_provider.get_session(self._tenants[url])
        return session

    async def get(self, url: URL, key: int) -> Customer | None:
        async with self.session(url) as session:
            return await session.get(Customer, key)

    async def few(self, url: URL, first: int) -> list[Customer]:
        async with self.session(url) as session:
            return list(await session.scalars(select_few(first)))

    async def insert(self, url: URL, customer: Customer) -> None:
        async with self.session(url) as session:
            session.add(customer)
            await session.commit()

    async def update(self, url: URL, key: int) -> Customer:
        async with self.session(url) as session:
            customer = await session.get_one(Customer, key)
            customer.visits += 1
            await session.commit()
            return customer

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run *work* in the loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stats(self) -> None:
        return None

    def dispose(self) -> None:
        self.submit(self._manager.close()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)


class TenancyLoad(Users):
    """Users in tasks of one event loop."""

    def __init__(self, driver: TenancyDriver, urls: Sequence[URL], plan: Plan) -> None:
        super().__init__(driver, urls, plan)
        self._driver = driver
        self._tasks: list[Future[None]] = []

    def start(self) -> None:
        self.started = monotonic()
        self._tasks = [self._driver.submit(self._run(number)) for number in range(self._plan.threads)]

    def wait(self, timeout: float) -> bool:
        done, running = wait(self._tasks, timeout)
        for task in done:
            task.result()
        if running:
            return False
        self.ended = self.ended or monotonic()
        return True

    async def _run(self, number: int) -> None:
        tally = self.tallies[number]
        await asyncio.sleep(self._delay(number))
        for step in self._steps(number):
            with tally.timed():
                await self._perform(step, tally)
            await asyncio.sleep(step.pause)

    async def _perform(self, step: Step, tally: Tally) -> None:
        """What `perform` does, awaited."""
        url, key = step.url, step.key
        if step.verb == "get":
            tally.check(url, [await self._driver.get(url, key)])
        elif step.verb == "few":
            tally.check(url, await self._driver.few(url, key) or [None])
        elif step.verb == "update":
            tally.check(url, [await self._driver.update(url, key)])
        else:
            customer = new_customer(step)
            await self._driver.insert(url, customer)
            tally.check_new(url, customer)


def _name_connections(application_name: str) -> None:
    """Have the servers list connections under that name, for which the configuration has no place."""

    @event.listens_for(Engine, "do_connect")
    def name(dialect: Dialect, _record: object, _arguments: object, parameters: dict[str, Any]) -> None:
        name = {"application_name": application_name}
        parameters.update({"server_settings": name} if dialect.driver == "asyncpg" else name)


def _address(url: URL) -> str:
    return url.render_as_string(hide_password=False).partition("://")[2]
