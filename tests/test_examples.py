"""Every example runs, and so does every block of the README."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from shardrepo import NoDatabaseError, Repo
from shardrepo.testing.servers import Server, Servers

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "examples" / "test_app.py"
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {TESTS})

# The README's two hosts are the first two servers; its databases are made on them, with its own schema.
README_DATABASES = {"db01": ["app", "shard02", "shard07"], "db02": ["shard201"]}


PRINTED = {
    "jobs.py": [
        "60 jobs done by 4 threads",
        "acme: OverdrawnError: account 1 lacks 15",
        "bolt: OverdrawnError: account 1 lacks 5",
        "acme: account 1 has 10",
        "bolt: account 1 has 20",
        "crux: account 1 has 5",
        "dune: account 1 has 15",
        "echo: account 1 has 25",
        "flux: account 1 has 35",
        "6 databases, 4 connections kept, of at most 4",
    ],
    "quickstart.py": [
        "in shard02, user 1 is Ada",
        "in app, user 1 is Grace",
        "Ada cannot be written to app: she lives in shard02",
        "shard02 now has ['Ada Lovelace', 'Edsger']",
        "2 connections kept, of at most 5",
    ],
    "web_app.py": [
        'POST acme.example.com/notes: 201 {"id": 1, "text": "Buy rockets"}',
        'POST bolt.example.com/notes: 201 {"id": 1, "text": "Sell shoes"}',
        'GET acme.example.com/notes/1: 200 {"id": 1, "text": "Buy rockets"}',
        'GET bolt.example.com/notes/1: 200 {"id": 1, "text": "Sell shoes"}',
        'GET acme.example.com/notes: 200 ["Buy rockets"]',
        'GET bolt.example.com/notes/2: 404 {"error": "no such note"}',
        'GET crux.example.com/notes: 404 {"error": "no such tenant"}',
        'GET nobody.example.com/notes: 404 {"error": "no such tenant"}',
        'GET acme.example.net/notes: 404 {"error": "no such tenant"}',
    ],
}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    """As a program of its own, in another folder, with warnings as errors; it prints what it is to show."""
    command = [sys.executable, "-W", "error", str(example)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == PRINTED[example.name]


@pytest.mark.parametrize("flags", [(), ("-n", "2")], ids=["in one process", "in two"])
def test_the_tests_of_an_example_run(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Whoever runs them from anywhere, in random order, starts servers and has nothing to set up."""
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", str(TESTS), *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert re.search(r"\b8 passed\b", done.stdout)
    assert "skipped" not in done.stdout


class WebApp:
    """The application of examples/web_app.py with ten tenants, in each of which note 1 says who that is."""

    tenants = [f"tenant{number}" for number in range(10)]

    def __init__(self, names: Sequence[str]) -> None:
        self.module = SimpleNamespace(**runpy.run_path(str(ROOT / "examples" / "web_app.py")))
        self.repo: type[Repo] = self.module.MyRepo
        databases = dict(zip(self.tenants, names, strict=True))
        self.app = self.module.Tenants(self.module.notes, {**databases, "leaving": "dropped_already"})
        for tenant, name in databases.items():
            with self.repo.using(name):
                self.module.Base.metadata.create_all(self.repo.engine())
                self.repo.insert(self.module.Note(text=tenant))

    async def ask(self, method: str, tenant: str, path: str, arrived: asyncio.Barrier | None = None) -> tuple[int, Any]:
        """One request, whose body is the tenant's name and comes when as many as *arrived* wants are waiting for
        theirs; and its reply."""
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if arrived is not None:
                await arrived.wait()
            return {"type": "http.request", "body": tenant.encode()}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"host", f"{tenant}.example.com:8000".encode())]
        await self.app({"type": "http", "method": method, "path": path, "headers": headers}, receive, send)
        start, end = sent
        return start["status"], json.loads(end["body"])


@pytest.fixture
def web_app(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebApp]:
    monkeypatch.setenv("DATABASE_URL", server.url("postgres").render_as_string(hide_password=False))
    names = [f"web_{tenant}" for tenant in WebApp.tenants]
    server.create_databases(names)
    web_app = WebApp(names)
    yield web_app
    assert web_app.repo.stats().in_use == 0
    web_app.repo.dispose()
    for name in names:
        server.drop_database(name, force=True)


def test_requests_of_several_tenants_never_mix(web_app: WebApp) -> None:
    """Fifty requests that are all under way at once, each within its tenant's choice, write and see their own rows."""

    async def serve() -> None:
        tenants = web_app.tenants * 5
        arrived = asyncio.Barrier(len(tenants))
        posted = await asyncio.gather(*(web_app.ask("POST", tenant, "/notes", arrived) for tenant in tenants))
        assert [(status, note["text"]) for status, note in posted] == [(201, tenant) for tenant in tenants]
        asked = (web_app.ask("GET", tenant, path) for tenant in web_app.tenants for path in ("/notes/1", "/notes"))
        for number, (status, found) in enumerate(await asyncio.gather(*asked)):
            own = web_app.tenants[number // 2]
            assert (status, found) == (200, [own] * 6 if number % 2 else {"id": 1, "text": own})

    asyncio.run(serve())


def test_an_unknown_tenant_is_not_found(web_app: WebApp) -> None:
    """One that the application does not know is refused before anything is asked; one whose database is gone, too."""
    before = web_app.repo.stats()
    for tenant in ("nobody", "", "postgres", "tenant0.tenant1", "tenant0.example.com"):
        assert asyncio.run(web_app.ask("GET", tenant, "/notes")) == web_app.module.NO_TENANT
    assert web_app.repo.stats() == before
    assert asyncio.run(web_app.ask("GET", "leaving", "/notes")) == web_app.module.NO_TENANT


def test_outside_of_the_middleware_nothing_is_asked(web_app: WebApp) -> None:
    """A handler that no tenant was chosen for fails closed, also after requests that had one."""

    async def serve() -> None:
        assert await web_app.ask("GET", "tenant0", "/notes") == (200, ["tenant0"])
        before = web_app.repo.stats()
        for handler in (web_app.module.list_notes(), web_app.module.add_note("lost"), web_app.module.show_note(1)):
            with pytest.raises(NoDatabaseError):
                await handler
        assert web_app.repo.stats() == before

    asyncio.run(serve())


@pytest.fixture
def readme_servers(servers: Servers) -> Iterator[dict[str, Server]]:
    """The README's hosts, with the databases that it names."""
    named = dict(zip(README_DATABASES, servers, strict=False))
    for host, names in README_DATABASES.items():
        named[host].create_databases(names)
    yield named
    for host, names in README_DATABASES.items():
        for name in names:
            named[host].drop_database(name, force=True)


def test_the_readme_runs(readme_servers: dict[str, Server], capsys: pytest.CaptureFixture[str]) -> None:
    """The Python blocks of the README, in their order and in one namespace, on real servers; those that are files run
    elsewhere."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    blocks = [block for block in blocks if not re.match(r"# \S+\.py\n", block)]
    assert len(blocks) >= 6
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(located(block, readme_servers), "README.md", "exec", dont_inherit=True), namespace)
        if "Base" in namespace and "created" not in namespace:
            namespace["created"] = create_schema(namespace["Base"], readme_servers)
    printed = capsys.readouterr().out
    assert "User belongs to" in printed
    sharded: Any = namespace["Sharded"]
    with sharded.using("shard201"):
        assert sharded.get_database().port == readme_servers["db02"].port
    assert [each.name for each in sharded.databases()] == ["shard02", "shard07", "shard201"]
    for repo in ("MyRepo", "Sharded"):
        namespace[repo].dispose()  # type: ignore[attr-defined]  # what the blocks define


def test_the_commands_that_the_pages_name_exist() -> None:
    """Each `make` target and each `shardrepo` command in README and CONTRIBUTING is one."""
    pages = "".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md"))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {
        target for line in re.findall(r"(?:^    |`)make ([a-z -]+)", pages, re.MULTILINE) for target in line.split()
    }
    assert named
    assert named <= targets
    for command in set(re.findall(r"(?:^    (?:\$ )?|`|python -m )shardrepo ([a-z]+)", pages, flags=re.MULTILINE)):
        asked = [sys.executable, "-m", "shardrepo", command, "--help"]
        assert subprocess.run(asked, capture_output=True, text=True, check=False).returncode == 0, command


def located(block: str, servers: dict[str, Server]) -> str:
    """Put the addresses of real servers where the README has example hosts."""
    first, second = servers["db01"], servers["db02"]
    url = first.url("app").render_as_string(hide_password=False)
    block = block.replace("postgresql+psycopg://app@db01/app", url)
    addresses = [{"host": each.host, "port": each.port, "password": each.password} for each in (first, second)]
    block = block.replace('["db01", "db02"]', repr(addresses))
    return block.replace('host="db02"', f'host="{second.host}", port={second.port}, password="{second.password}"')


def create_schema(base: object, servers: dict[str, Server]) -> bool:
    for host, names in README_DATABASES.items():
        for name in names:
            base.metadata.create_all(create_engine(servers[host].url(name), poolclass=NullPool))  # type: ignore[attr-defined]
    return True
