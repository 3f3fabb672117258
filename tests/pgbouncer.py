"""A real PgBouncer in front of a test server, gone whatever becomes of the process that started it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sqlalchemy.engine import URL

from shardrepo.testing.postgres import give_to_user
from shardrepo.testing.servers import Server, _free_port
from shardrepo.testing.watchdog import output_of

from .conftest import await_

# Debian has it where an ordinary user's PATH does not lead.
PROGRAM: Final = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")

MISSING: Final = "no PgBouncer is installed (Debian: apt-get install pgbouncer)"

# Server connections per database: fewer than the tests have threads, so that every client meets all of them.
SERVER_CONNECTIONS: Final = 2

# Becomes PgBouncer, and leaves somebody behind who ends it when our end of the pipe is closed, by us or by our death.
_GUARDED: Final = 'exec 3<&0; (read -r _ <&3; kill -KILL "$$") & exec "$@" 3<&- </dev/null'

_CONFIG: Final = """
[databases]
{aliases}
* = host={server.host} port={server.port}

[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users
pool_mode = transaction
default_pool_size = {SERVER_CONNECTIONS}
admin_users = {server.username}
log_connections = 0
log_disconnections = 0
"""


@contextmanager
def start_pgbouncer(server: Server, folder: Path, aliases: Mapping[str, str] = {}) -> Iterator[URL]:
    """Run PgBouncer in transaction mode in front of *server*; yields the URL that takes the server's place.

    Who asks for a database that is among *aliases* is led to the one that it stands for.
    *folder* is made for its files, where the server's user gets to: PgBouncer refuses to run as root too.
    """
    if PROGRAM is None:
        raise RuntimeError(MISSING)
    port = _free_port()
    _configure(server, folder, port, aliases)
    command = ["/bin/sh", "-c", _GUARDED, "sh", PROGRAM, str(folder / "pgbouncer.ini")]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=log, start_new_session=True)
    with process:  # which closes the pipe, then waits
        await_(lambda: process.poll() is not None or "process up" in (folder / "log").read_text())
        if process.returncode is not None:
            raise RuntimeError(f"PgBouncer did not start; its log:\n{(folder / 'log').read_text()}")
        yield server.url().set(port=port)


def _configure(server: Server, folder: Path, port: int, aliases: Mapping[str, str]) -> None:
    folder.mkdir(mode=0o700)
    (folder / "users").write_text(f'"{server.username}" "{server.password}"\n')
    config = _CONFIG.format(
        server=server,
        port=port,
        folder=folder,
        SERVER_CONNECTIONS=SERVER_CONNECTIONS,
        aliases="\n".join(
            f"{alias} = dbname={name} host={server.host} port={server.port}" for alias, name in aliases.items()
        ),
    )
    give_to_user(folder)
    if os.geteuid() == 0:
        config += f"user = {folder.owner()}\n"
    if _version() >= (1, 21):
        # Before, it kept no books on prepared statements, and did not know the setting.
        config += "max_prepared_statements = 0\n"
    (folder / "pgbouncer.ini").write_text(config)


def _version() -> tuple[int, int]:
    found = re.search(r"(\d+)\.(\d+)", output_of(str(PROGRAM), "--version"))
    assert found is not None
    return int(found[1]), int(found[2])
