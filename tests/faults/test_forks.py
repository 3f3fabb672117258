"""Processes that fork with connections open: a pre-forking web server, and a pool of worker processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from shardrepo.testing.servers import Server

from ..conftest import await_, await_connections, connections_of, run_sql

pytestmark = pytest.mark.cache

ROOT = Path(__file__).parents[2]
WORKERS = 4
REQUESTS = 80


@pytest.fixture
def many(make_databases: Callable[..., list[str]]) -> list[str]:
    return make_databases(4)


# A pre-forking server


class Site:
    """gunicorn with `WORKERS` workers, and what they have answered."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self.process = process
        self._port = port
        self.answers: list[dict[str, Any]] = []

    def get(self, name: str, label: str) -> None:
        """Ask for one page, and check that it is the right one."""
        connection = HTTPConnection("127.0.0.1", self._port, timeout=60)
        try:
            connection.request("GET", f"/{name}/{label}")
            response = connection.getresponse()
            body = response.read()
        finally:
            connection.close()
        assert response.status == 200, body
        answer = json.loads(body)
        assert answer["stored"] == [name, label]
        self.answers.append(answer)

    def backends(self) -> dict[int, set[int]]:
        """The server processes that each worker has met, by the worker's pid."""
        found: dict[int, set[int]] = {}
        for answer in self.answers:
            found.setdefault(answer["worker"], set()).update(answer["backends"])
        return found

    def inherited(self) -> dict[int, set[int]]:
        """The server processes behind what was opened at import, by the pid of who has imported it."""
        return {answer["importer"]: set(answer["inherited"]) for answer in self.answers}


@contextmanager
def serve(server: Server, names: list[str], folder: Path, *options: str) -> Iterator[Site]:
    """Run gunicorn for the block. Its requests wait in the socket until somebody serves them."""
    environment = {
        **os.environ,
        "SERVED_URL": server.url(names[0]).render_as_string(hide_password=False),
        "SERVED_DATABASES": " ".join(names[:2]),
    }
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=256))
        log = stack.enter_context((folder / "log").open("w+b"))
        command = [sys.executable, "-m", "gunicorn", "--no-control-socket", "--chdir", str(ROOT)]
        command += ["--workers", str(WORKERS), "--bind", f"fd://{listener.fileno()}", *options]
        process = subprocess.Popen(
            [*command, "tests.faults.served:application"],
            env=environment,
            pass_fds=[listener.fileno()],
            stdout=log,
            stderr=log,
        )
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        try:
            yield Site(process, listener.getsockname()[1])
        except BaseException as error:
            error.add_note((folder / "log").read_text())
            raise


@pytest.mark.parametrize("options", [["--preload"], []], ids=["preloaded", "loaded by each worker"])
def test_a_preforking_server(server: Server, many: list[str], tmp_path: Path, options: list[str]) -> None:
    """Workers answer with the right rows on connections of their own, come and go, and leave their parent's alone."""
    labels: list[tuple[str, str]] = []

    def ask(count: int) -> None:
        new = [(many[n % 4], f"request-{n}") for n in range(len(labels), len(labels) + count)]
        labels.extend(new)
        for call in [pool.submit(site.get, *one) for one in new]:
            call.result()

    def living() -> set[int]:
        return {pid for pid, _ in connections_of(server, "served")}

    with ThreadPoolExecutor(16) as pool, serve(server, many, tmp_path, *options) as site:

        def everybody_served(but: set[int]) -> bool:
            ask(8)
            return len(site.backends().keys() - but) == WORKERS

        await_(lambda: everybody_served(set()))
        ask(REQUESTS)
        first = site.backends()
        for worker in first:
            os.kill(worker, signal.SIGTERM)
        await_(lambda: everybody_served(set(first)))
        ask(REQUESTS)

        workers, inherited = site.backends(), site.inherited()
        assert set(inherited) == ({site.process.pid} if options else set(workers))
        parents = inherited.get(site.process.pid, set())
        assert len(parents) == (2 if options else 0)
        met = [pid for pids in [parents, *workers.values()] for pid in pids]
        assert len(met) == len(set(met))

        second = workers.keys() - first.keys()
        theirs = set().union(*(workers[worker] | inherited.get(worker, set()) for worker in second))
        await_(lambda: living() <= parents | theirs)
        assert parents <= living()
        site.process.terminate()
        assert site.process.wait(30) == 0
    await_connections(server, "served", [])
    for name in many:
        stored = run_sql(server, name, "SELECT label FROM tags")
        assert sorted(stored) == sorted((label,) for where, label in labels if where == name)


# A pool of processes


FORKING = """
import json, multiprocessing, os, sys, threading
from shardrepo import Repo
from tests.models import Tag

names = sys.argv[2:]

class MyRepo(Repo, config={"url": sys.argv[1], "application_name": "forking", "pool_size": 3, "max_connections": 3}):
    pass

def backend(name):
    with MyRepo.using(name), MyRepo.detached():
        return MyRepo.execute("SELECT pg_backend_pid()").scalar_one()

def work(number):
    stats = MyRepo.stats()
    name = names[number % len(names)]
    with MyRepo.using(name), MyRepo.detached(), MyRepo.transaction():
        MyRepo.insert(Tag(label=f"child {number}"))
        mine = MyRepo.execute("SELECT pg_backend_pid()").scalar_one()
    return os.getpid(), [mine, *(backend(name) for name in names[:2])], stats.waiting

def hold(number):
    with MyRepo.using(names[number]), MyRepo.transaction():
        before = MyRepo.execute("SELECT pg_backend_pid()").scalar_one()
        MyRepo.insert(Tag(label="parent"))
        held.wait()
        assert let_go.wait(60)
        assert MyRepo.execute("SELECT pg_backend_pid()").scalar_one() == before
        held_by.append(before)

def ask():
    with MyRepo.using(names[3]):
        MyRepo.insert(Tag(label="waited"))

# All the places are taken, one by this thread, and somebody waits for one.
held, let_go, held_by = threading.Barrier(3), threading.Event(), []
threads = [threading.Thread(target=hold, args=(number,)) for number in (0, 1)]
threads.append(threading.Thread(target=ask))
with MyRepo.using(names[2]), MyRepo.transaction():
    mine = MyRepo.execute("SELECT pg_backend_pid()").scalar_one()
    for thread in threads[:2]:
        thread.start()
    held.wait()
    threads[2].start()
    while MyRepo.stats().waiting != 1:
        pass
    with multiprocessing.get_context("fork").Pool(4) as pool:
        answers = pool.map(work, range(24), chunksize=1)
        pool.close()
        pool.join()
    assert MyRepo.stats().in_use == 3
    MyRepo.insert(Tag(label="parent"))
    assert MyRepo.execute("SELECT pg_backend_pid()").scalar_one() == mine
let_go.set()
for thread in threads:
    thread.join()
print(json.dumps([[mine, *held_by], answers]))
MyRepo.dispose()
"""


FORKED_MEANWHILE = """
import os, sys, threading
from shardrepo import Repo

asked, answered = threading.Event(), threading.Event()

def config():
    if threading.current_thread() is not threading.main_thread():
        asked.set()
        answered.wait(30)
    return sys.argv[1]

class MyRepo(Repo, config=config): pass

thread = threading.Thread(target=MyRepo.get_database)
thread.start()
assert asked.wait(30)
child = os.fork()
if child == 0:
    os._exit(MyRepo.execute("SELECT 7").scalar_one())
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
answered.set()
thread.join()
"""


def test_a_process_forked_while_a_config_was_asked_for(server: Server) -> None:
    """A child does not wait for a thread that only its parent has."""
    url = server.url().render_as_string(hide_password=False)
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED_MEANWHILE, url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=20)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_processes_forked_at_a_full_bound(server: Server, many: list[str]) -> None:
    """Children have places and connections of their own; their parent's are taken, waited for, and stay intact."""
    url = server.url(many[0]).render_as_string(hide_password=False)
    options = ["-W", "error", "-W", "ignore:This process:DeprecationWarning"]
    done = subprocess.run(
        [sys.executable, *options, "-c", FORKING, url, *many], check=False, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    parents, answers = json.loads(done.stdout)
    children: dict[int, set[int]] = {}
    for child, backends, waiting in answers:
        children.setdefault(child, set()).update(backends)
        assert waiting == 0
    met = [pid for pids in [parents, *children.values()] for pid in pids]
    assert len(parents) == 3
    assert len(met) == len(set(met))
    await_connections(server, "forking", [])
    labels = [[label for (label,) in run_sql(server, name, "SELECT label FROM tags ORDER BY 1")] for name in many]
    assert [sum(label.startswith("child") for label in of) for of in labels] == [6] * 4
    assert [[label for label in of if not label.startswith("child")] for of in labels] == [
        ["parent"],
        ["parent"],
        ["parent"],
        ["waited"],
    ]
