"""Servers that tests are given, by URL, and the repo that is held to the servers of its tests."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..database import Database, Secret, database_from
from ..errors import ConfigError, ConnectError
from ..repo import Repo
from .address import ServerAt

_MAY_CREATE: Final = "SELECT rolcreatedb OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user"


def server_at(database: Database) -> ServerAt:
    """The server of *database*, which answers and lets its user create databases.

    Raises:
        ConfigError: It does not answer, is no PostgreSQL, refuses the user, or lets the user create no databases.
    """
    password = database.password
    server = ServerAt(
        database.host,
        database.port,
        database.username,
        password.reveal() if isinstance(password, Secret) else None,
        maintenance_database=database.name,
        parameters=dict(database.query),
    )
    _check(server)
    return server


def _check(server: ServerAt) -> None:
    class Given(Repo, config={"url": server.url(), "application_name": "shardrepo-tests"}):
        pass

    try:
        if not Given.execute(_MAY_CREATE).scalar_one():
            raise ConfigError(
                f"user {server.username} may not create databases on {server.host}:{server.port}: "
                "ALTER ROLE … CREATEDB, or name another user in the URL of the server"
            )
    except ConnectError as error:
        raise ConfigError(
            f"{error}. This server was given to the tests by --shardrepo-url, $SHARDREPO_URL or shardrepo_url"
        ) from error
    finally:
        Given.dispose()


def confine(repo: type[Repo], servers: Iterable[ServerAt]) -> None:
    """Let *repo* connect to *servers* alone, for good, whatever is chosen and whatever a directory says.

    Raises:
        ConfigError: Its config names another one. A verb that would lead to one raises it too, and sends nothing.
    """
    databases = repo._router.databases
    allowed = {Database.from_url(server.url()).server for server in servers}

    def check(database: Database) -> None:
        if database.server not in allowed:
            raise ConfigError(
                f"{database.server} is none of the tests' servers ({', '.join(sorted(allowed))}), and tests reach no "
                f"other: make the config of {repo.__name__} a callable that reads the environment variable of the "
                "option url_variable, or override the fixture shardrepo_repo"
            )

    address = databases.config.address
    if "host" in address:
        check(database_from({"database": "postgres", **address}))
    repo._router.cache.confine(check)
