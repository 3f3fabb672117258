"""What one would use instead of a Repo, each as its own documentation says, all given the demo's job.

A rival's module is loaded only by the process that runs it, so that each has the memory of its own packages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Final, TypeAlias

from sqlalchemy.engine import URL

from shardrepo.demo.drivers import ByHandDriver, RepoDriver
from shardrepo.demo.load import Load, Plan, Users
from shardrepo.demo.worker import Preparation

from ..measure import MissingError

# Given an application name, a target, the databases and a plan.
Making: TypeAlias = Callable[[str, int, Sequence[URL], Plan], Users]


@dataclass(frozen=True, slots=True)
class Rival:
    """A way to reach many databases.

    Attributes:
        name: What the page calls it.
        make: Makes its load; a function of this module, as another process has to find it.
        packages: What it needs that shardrepo does not.
    """

    name: str
    make: Making
    packages: tuple[str, ...] = ()

    def prepare(self, application_name: str, target: int) -> Preparation:
        """What makes its load, for a `Worker`; *target* is told to those who know one.

        Raises:
            MissingError: A package that it needs is not installed.
        """
        if missing := [package for package in self.packages if find_spec(package) is None]:
            raise MissingError(f"{' and '.join(missing)}: pip install --group bench")
        return partial(self.make, application_name, target)


def _repo(application_name: str, target: int, urls: Sequence[URL], plan: Plan) -> Load:
    return Load(RepoDriver(application_name, target), urls, plan)


def _kept(application_name: str, _target: int, urls: Sequence[URL], plan: Plan) -> Load:
    return Load(ByHandDriver(application_name), urls, plan)


def _per_operation(application_name: str, _target: int, urls: Sequence[URL], plan: Plan) -> Load:
    from .engines import PerOperationDriver

    return Load(PerOperationDriver(application_name), urls, plan)


def _null_pool(application_name: str, _target: int, urls: Sequence[URL], plan: Plan) -> Load:
    from .engines import NullPoolDriver

    return Load(NullPoolDriver(application_name), urls, plan)


def _sharded(application_name: str, _target: int, urls: Sequence[URL], plan: Plan) -> Load:
    from .engines import ShardedDriver

    return Load(ShardedDriver(application_name, urls), urls, plan)


def _pools(application_name: str, _target: int, urls: Sequence[URL], plan: Plan) -> Load:
    from .pools import PoolDriver

    return Load(PoolDriver(application_name), urls, plan)


def _tenancy(application_name: str, _target: int, urls: Sequence[URL], plan: Plan) -> Users:
    from .tenancy import TenancyDriver, TenancyLoad

    return TenancyLoad(TenancyDriver(application_name, urls), urls, plan)


def _tenancy_on_psycopg(application_name: str, _target: int, urls: Sequence[URL], plan: Plan) -> Users:
    from .tenancy import TenancyDriver, TenancyLoad

    return TenancyLoad(TenancyDriver(application_name, urls, "psycopg"), urls, plan)


def _few_engines(application_name: str, target: int, urls: Sequence[URL], plan: Plan) -> Users:
    from .tenancy import TenancyDriver, TenancyLoad

    return TenancyLoad(TenancyDriver(application_name, urls, "psycopg", max_cached_engines=target), urls, plan)


REPO: Final = Rival("a Repo", _repo)
KEPT: Final = Rival("an engine per database, kept", _kept)
SHARDED: Final = Rival("horizontal_shard", _sharded)
POOLS: Final = Rival("psycopg_pool per database", _pools, ("psycopg_pool",))
TENANCY: Final = Rival("fastapi-tenancy", _tenancy, ("fastapi_tenancy", "asyncpg"))
TENANCY_ON_PSYCOPG: Final = Rival("fastapi-tenancy on psycopg", _tenancy_on_psycopg, ("fastapi_tenancy",))
FEW_ENGINES: Final = Rival(
    "fastapi-tenancy on psycopg, as many engines as the target", _few_engines, ("fastapi_tenancy",)
)
NULL_POOL: Final = Rival("NullPool engines", _null_pool)
PER_OPERATION: Final = Rival("an engine per operation", _per_operation)

RIVALS: Final = (REPO, KEPT, SHARDED, POOLS, TENANCY, NULL_POOL, PER_OPERATION)
