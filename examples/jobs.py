"""Jobs of six tenants, worked through by one pool of threads. Run it: python examples/jobs.py"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardrepo import Repo
from shardrepo.testing.servers import start_servers

P = ParamSpec("P")
T = TypeVar("T")

TENANTS = ["acme", "bolt", "crux", "dune", "echo", "flux"]


class Base(DeclarativeBase):
    pass


class Account(Base):
    __tablename__ = "accounts"

    id: Mapped[int] = mapped_column(primary_key=True)
    balance: Mapped[int]


class OverdrawnError(Exception):
    pass


with start_servers(1) as (server,):
    server.create_databases(TENANTS)

    # Nothing is current unless a tenant was chosen: a job that lost its tenant fails, and writes nothing.
    class MyRepo(Repo, config={"url": server.url("postgres"), "pool_size": 4, "require_database": True}):
        pass

    def book(key: int, amount: int) -> int:
        """A job: add to an account of the tenant for whom it runs, which only the repo knows."""
        with MyRepo.transaction():
            # Locked, as another thread may be at work on the same account.
            account = MyRepo.one(select(Account).where(Account.id == key).with_for_update())
            MyRepo.update(account, balance=account.balance + amount)
            if account.balance < 0:
                raise OverdrawnError(f"account {key} lacks {-account.balance}")
        return account.balance

    def submit(tenant: str, job: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Have a thread do a job for a tenant. `carry` takes the choice along; a thread has none of its own."""
        with MyRepo.using(tenant):
            return threads.submit(MyRepo.carry(job), *args, **kwargs)

    for tenant in TENANTS:
        with MyRepo.using(tenant):
            Base.metadata.create_all(MyRepo.engine())
            MyRepo.insert(Account(id=1, balance=0))

    with ThreadPoolExecutor(max_workers=4) as threads:
        booked = [submit(tenant, book, 1, n) for _ in range(10) for n, tenant in enumerate(TENANTS, 1)]
    print(sum(job.exception() is None for job in booked), "jobs done by 4 threads")

    with ThreadPoolExecutor(max_workers=4) as threads:
        withdrawn = {tenant: submit(tenant, book, 1, -25) for tenant in TENANTS}
    for tenant, job in withdrawn.items():
        error = job.exception()
        if error is not None:
            print(f"{tenant}: {type(error).__name__}: {error}")

    for tenant in TENANTS:
        with MyRepo.using(tenant):
            print(f"{tenant}: account 1 has {MyRepo.get_one(Account, 1).balance}")

    stats = MyRepo.stats()
    print(f"{len(TENANTS)} databases, {stats.idle} connections kept, of at most {stats.pool_size}")
    MyRepo.dispose()
