"""Which revision each database is at: one small question to each, several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import Column, MetaData, Select, String, Table, select
from sqlalchemy.engine import Connection
from sqlalchemy.exc import ProgrammingError

from ..across import Outcome, Outcomes, Target, fan_out
from ..errors import sqlstate_of
from ..pool import autocommit, limited, vouch
from ..scripts import Revisions

if TYPE_CHECKING:
    from ..databases import Databases

# Databases of a server that are asked at a time: more of them were no faster.
PER_SERVER: Final = 4

# https://www.postgresql.org/docs/current/errcodes-appendix.html: there is no such table, or no such schema.
_MISSING: Final = ("42P01", "3F000")


def sweep(
    databases: Databases, targets: Sequence[Target | Outcome[Revisions]], per_server: int = PER_SERVER
) -> Outcomes[Revisions]:
    """The revisions that each of *targets* is at, as the answers come; through connections of their own.

    One round trip each, beside the connect, with as much time again as that may take: somebody may have locked the
    table. A server that is down fails those on it, and delays no others.
    """
    config = databases.config

    def ask(target: Target) -> Revisions:
        with databases.cache.transient(target.database) as connection:
            vouch(connection)
            autocommit(connection)
            with limited(connection, monotonic() + config.connect_timeout):
                return read_revisions(connection, config.version_table)

    return fan_out(targets, ask, per_server=per_server)


def read_revisions(connection: Connection, table: str) -> Revisions:
    """The revisions in *table*, ``table`` or ``schema.table``; none where there is no such table."""
    try:
        return tuple(sorted(connection.execute(_query(table)).scalars()))
    except ProgrammingError as error:
        if sqlstate_of(error) not in _MISSING:
            raise
        return ()


@lru_cache(maxsize=16)
def _query(table: str) -> Select[Any]:
    schema, _, name = table.rpartition(".")
    version = Table(name, MetaData(schema=schema or None), Column("version_num", String()))
    return select(version.c.version_num)
