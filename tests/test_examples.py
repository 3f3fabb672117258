"""Every example runs, and so does every block of the README."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from shardrepo.testing.servers import Server, Servers

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# The README's two hosts are the first two servers; its databases are made on them, with its own schema.
README_DATABASES = {"db01": ["app", "shard02", "shard07"], "db02": ["shard201"]}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    """As a program of its own, in another folder, with warnings as errors."""
    command = [sys.executable, "-W", "error", str(example)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_the_quickstart_says_who_is_where() -> None:
    """What the quickstart prints is what its comments promise."""
    done = subprocess.run([sys.executable, str(EXAMPLES[-1])], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "in shard02, user 1 is Ada",
        "in app, user 1 is Grace",
        "Ada cannot be written to app: she lives in shard02",
        "shard02 now has ['Ada Lovelace', 'Edsger']",
        "2 connections kept, of at most 5",
    ]


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
    """The Python blocks of the README, in their order and in one namespace, on real servers."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 6
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        exec(compile(located(block, readme_servers), "README.md", "exec", dont_inherit=True), namespace)
        if "Base" in namespace and "created" not in namespace:
            namespace["created"] = create_schema(namespace["Base"], readme_servers)
    printed = capsys.readouterr().out
    assert "User belongs to" in printed
    namespace["MyRepo"].dispose()  # type: ignore[attr-defined]  # what the first block defines


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
    return block.replace('host="db02"', f'host="{second.host}", port={second.port}, password="{second.password}"')


def create_schema(base: object, servers: dict[str, Server]) -> bool:
    for host, names in README_DATABASES.items():
        for name in names:
            base.metadata.create_all(create_engine(servers[host].url(name), poolclass=NullPool))  # type: ignore[attr-defined]
    return True
