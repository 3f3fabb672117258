"""psycopg's own pool, one per database: raw SQL, which maps no objects."""

from __future__ import annotations

import threading
from typing import Any, Final

from psycopg.rows import namedtuple_row
from psycopg_pool import ConnectionPool
from sqlalchemy.engine import URL

from shardrepo.demo.drivers import FEW
from shardrepo.demo.models import Customer

# Connections that a QueuePool may have at most: so many the pool may have, too.
_MAX_SIZE: Final = 15

_COLUMNS: Final = "id, name, email, city, visits, database"
_GET: Final = f"SELECT {_COLUMNS} FROM customers WHERE id = %s"
_FEW: Final = f"SELECT {_COLUMNS} FROM customers WHERE id >= %s ORDER BY id LIMIT {FEW}"
_INSERT: Final = "INSERT INTO customers (name, email, city) VALUES (%s, %s, %s) RETURNING id, visits, database"
_UPDATE: Final = (
    f"UPDATE customers SET visits = visits + 1, database = current_database() WHERE id = %s RETURNING {_COLUMNS}"
)


class PoolDriver:
    """A `ConnectionPool` per database, made at its first use and kept.

    As in psycopg's "Connection pools": `with pool.connection()`, which commits at its end. Kinder than the
    documentation's defaults in one thing: a pool begins empty, where by itself it would open four connections. What
    it returns are named tuples, which have a customer's attributes and are none.
    """

    def __init__(self, application_name: str) -> None:
        self._application_name = application_name
        self._pools: dict[URL, ConnectionPool[Any]] = {}
        # Guards the pools, so that no database gets two.
        self._lock = threading.Lock()

    def get(self, url: URL, key: int) -> Any:
        with self._pool(url).connection() as connection:
            return connection.execute(_GET, (key,)).fetchone()

    def few(self, url: URL, first: int) -> Any:
        with self._pool(url).connection() as connection:
            return connection.execute(_FEW, (first,)).fetchall()

    def insert(self, url: URL, customer: Customer) -> None:
        with self._pool(url).connection() as connection:
            values = (customer.name, customer.email, customer.city)
            row = connection.execute(_INSERT, values).fetchone()
            customer.id, customer.visits, customer.database = row

    def update(self, url: URL, key: int) -> Any:
        with self._pool(url).connection() as connection:
            return connection.execute(_UPDATE, (key,)).fetchone()

    def stats(self) -> None:
        return None

    def dispose(self) -> None:
        for pool in self._pools.values():
            pool.close()

    def _pool(self, url: URL) -> ConnectionPool[Any]:
        with self._lock:
            if url not in self._pools:
                self._pools[url] = ConnectionPool(
                    url.set(drivername="postgresql").render_as_string(hide_password=False),
                    kwargs={"application_name": self._application_name, "row_factory": namedtuple_row},
                    min_size=0,
                    max_size=_MAX_SIZE,
                    open=True,
                )
            return self._pools[url]
