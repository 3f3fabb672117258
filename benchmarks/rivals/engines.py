"""SQLAlchemy's own ways to reach many databases, beside the demo's engine per database."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sqlalchemy import create_engine
from sqlalchemy.engine import URL
from sqlalchemy.ext.horizontal_shard import ShardedSession
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.pool import NullPool

from shardrepo.demo.drivers import ByHandDriver, SessionDriver


class PerOperationDriver(SessionDriver):
    """An engine for each operation, disposed of after it.

    "Engine Disposal" in SQLAlchemy's "Working with Engines and Connections" names this as a use of `dispose`:
    multitenancy with many short-lived engines.
    """

    def __init__(self, application_name: str) -> None:
        self._connect_args = {"application_name": application_name}

    @contextmanager
    def session(self, url: URL) -> Iterator[Session]:
        engine = create_engine(url, connect_args=self._connect_args)
        try:
            with Session(engine, expire_on_commit=False) as session:
                yield session
        finally:
            engine.dispose()

    def dispose(self) -> None:
        """Nothing is left of an operation."""


class NullPoolDriver(ByHandDriver):
    """An engine per database, made at its first use and kept, that keeps no connection.

    "Switching Pool Implementations" in SQLAlchemy's "Connection Pooling".
    """

    def __init__(self, application_name: str) -> None:
        super().__init__(application_name, poolclass=NullPool)


class ShardedDriver(SessionDriver):
    """`ShardedSession`, as in SQLAlchemy's example `sharding/separate_databases.py`.

    One sessionmaker knows all shards and their engines from the start. The choosers name the shard that the
    caller has said; as in the example, a chooser is a plain function.
    """

    def __init__(self, application_name: str, urls: Sequence[URL]) -> None:
        connect_args = {"application_name": application_name}
        self._engines = {str(url.database): create_engine(url, connect_args=connect_args) for url in urls}
        self._shard: ContextVar[str] = ContextVar("shard")
        self._session = sessionmaker(
            class_=ShardedSession,
            shards=self._engines,
            shard_chooser=self._choose,
            identity_chooser=self._choose_all,
            execute_chooser=self._choose_all,
            expire_on_commit=False,
        )

    @contextmanager
    def session(self, url: URL) -> Iterator[Session]:
        self._shard.set(str(url.database))
        with self._session() as session:
            yield session

    def dispose(self) -> None:
        for engine in self._engines.values():
            engine.dispose()

    def _choose(self, *_: Any, **__: Any) -> str:
        return self._shard.get()

    def _choose_all(self, *_: Any, **__: Any) -> list[str]:
        return [self._shard.get()]
