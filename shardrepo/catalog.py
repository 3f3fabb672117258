"""What a server is told and asked about its databases, as plain functions of a connection to another of them.

None of them knows a repo, chooses a server or opens a connection: one in autocommit mode comes in, as no such
statement runs in a transaction. The driver quotes every name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, LiteralString

from sqlalchemy import text
from sqlalchemy.engine import Connection
from sqlalchemy.exc import DBAPIError

from .database import checked_name
from .errors import sqlstate_of

# https://www.postgresql.org/docs/current/errcodes-appendix.html. Of two who make the same database at once, the server
# stops one at its look-up, or at the unique index of pg_database.
_EXISTS: Final = ("42P04", "23505")
_MISSING: Final = "3D000"
_IN_USE: Final = "55006"


@dataclass(frozen=True, slots=True)
class Blueprint:
    """How a database is made; None leaves it to the server.

    Attributes:
        template: The database on the same server that it is a copy of.
        encoding: Its character set.
        owner: The role that it belongs to.

    Raises:
        ConfigError: One of them is nothing that PostgreSQL could take as a name.
    """

    template: str | None = None
    encoding: str | None = None
    owner: str | None = None

    def __post_init__(self) -> None:
        for kind in self.__slots__:
            if (name := getattr(self, kind)) is not None:
                checked_name(kind, name)


def create(connection: Connection, name: str, blueprint: Blueprint, *, if_not_exists: bool) -> bool:
    """Make a database; False if it is there already, and may be."""
    try:
        with _remedy("nobody may be connected to a template while it is copied: end what is, or name another"):
            _run(
                connection,
                "CREATE DATABASE {name} TEMPLATE {template} ENCODING {} OWNER {owner}",
                blueprint.encoding,
                name=name,
                template=blueprint.template,
                owner=blueprint.owner,
            )
    except DBAPIError as error:
        if not if_not_exists or sqlstate_of(error) not in _EXISTS:
            raise
        return False
    return True


def drop(connection: Connection, name: str, *, force: bool, if_exists: bool) -> bool:
    """Drop a database, with *force* while others are connected to it; False if it is not there, and need not be."""
    try:
        with _remedy("end what is connected to it, or drop it with force=True, which does that"):
            _run(connection, "DROP DATABASE {name} WITH (FORCE)" if force else "DROP DATABASE {name}", name=name)
    except DBAPIError as error:
        if not if_exists or sqlstate_of(error) != _MISSING:
            raise
        return False
    return True


def rename(connection: Connection, name: str, new_name: str) -> None:
    """Give a database another name."""
    with _remedy("end what is connected to it: a database is renamed while nobody is"):
        _run(connection, "ALTER DATABASE {name} RENAME TO {new_name}", name=name, new_name=new_name)


def exists(connection: Connection, name: str) -> bool:
    """Whether the server has a database of that name."""
    query = text("SELECT EXISTS (SELECT FROM pg_catalog.pg_database WHERE datname = :name)")
    return bool(connection.execute(query, {"name": name}).scalar_one())


def _run(connection: Connection, statement: LiteralString, *texts: str | None, **names: str | None) -> None:
    """Run a statement in which ``{}`` stands for a text and ``{key}`` for a name, or for DEFAULT where that is None."""
    from psycopg.sql import SQL, Identifier, Literal  # here, so that `import shardrepo` loads no driver

    literals = [SQL("DEFAULT") if each is None else Literal(each) for each in texts]
    identifiers = {key: SQL("DEFAULT") if name is None else Identifier(name) for key, name in names.items()}
    composed = SQL(statement).format(*literals, **identifiers).as_string(connection.connection.driver_connection)
    # Without parameters, a % in a name is no placeholder.
    connection.exec_driver_sql(composed, execution_options={"no_parameters": True})


@contextmanager
def _remedy(remedy: str) -> Iterator[None]:
    """Say what to do when the server finds a database in use; its own message says by how many."""
    try:
        yield
    except DBAPIError as error:
        if sqlstate_of(error) == _IN_USE:
            error.add_note(remedy)
        raise
