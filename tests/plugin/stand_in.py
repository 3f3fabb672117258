"""Stands for what others are writing meanwhile: `Repo.sandbox` and `shardrepo.testing.migrations`. To be removed."""

from __future__ import annotations

import importlib.util
import sys
import types
from contextlib import contextmanager
from typing import Any

import psycopg

from shardrepo import Repo, ShardRepoError
from shardrepo.database import choose


def address_of(database: Any) -> dict[str, Any]:
    password = database.password.reveal()
    names = {"host": database.host, "port": database.port, "user": database.username, "dbname": database.name}
    return {**names, "password": password}


class _Sandbox:
    def __init__(self) -> None:
        self.databases: list[Any] = []


@contextmanager
def _sandbox(cls: Any, *, databases: Any = None, shared: bool = False, check_deferred: bool = False) -> Any:
    resolve = cls._router.databases.resolve
    allowed = None if databases is None else {resolve(choose(each, {})).home for each in databases}
    cache, sandbox = cls._router.cache, _Sandbox()
    made = cache.engine
    locks: list[psycopg.Connection] = []

    def engine(database: Any) -> Any:
        if allowed is not None and database.home not in allowed:
            raise ShardRepoError(f"{database.home} is not in this sandbox")
        if database not in sandbox.databases:
            locks.append(psycopg.connect(**address_of(database), autocommit=True))
            locks[-1].execute("SELECT pg_advisory_lock(1)")
            sandbox.databases.append(database)
        return made(database)

    cache.engine = engine
    try:
        yield sandbox
    finally:
        del cache.engine
        for database in sandbox.databases:
            with made(database).begin() as connection:
                if connection.exec_driver_sql("SELECT to_regclass('notes')").scalar_one():
                    connection.exec_driver_sql("DELETE FROM notes")
        for lock in locks:
            lock.close()


def _migrate(repo: Any, database: Any, revision: str = "head", *, source: Any = None) -> None:
    assert source is not None or repo._router.databases.config.script_location
    with psycopg.connect(**address_of(database)) as connection:
        connection.execute("CREATE TABLE notes (id int primary key, text text)")


if not hasattr(Repo, "sandbox"):
    Repo.sandbox = classmethod(_sandbox)  # type: ignore[attr-defined]
if importlib.util.find_spec("shardrepo.testing.migrations") is None:
    module: Any = types.ModuleType("shardrepo.testing.migrations")
    module.migrate = _migrate
    sys.modules[module.__name__] = module
