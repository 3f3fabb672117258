"""The README's section on fleets, run as it is written: its files and its commands, in an empty folder."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardrepo.testing.servers import Server, Servers

from ..conftest import run_sql

README = Path(__file__).parents[2] / "README.md"

# A file by its name, a change to the last one, or a command.
STEP = re.compile(
    r"^```python\n# (\S+)\n(.*?)^```|^```diff\n(.*?)^```|^    (shardrepo [^#\n]*)", re.DOTALL | re.MULTILINE
)

MEMBERS = {"db01": ["shard001", "shard002"], "db02": ["shard201"]}
TEMPLATE = "template_shop"


@pytest.fixture
def hosts(servers: Servers) -> Iterator[dict[str, Server]]:
    """The README's hosts, the first of which has the default database."""
    hosts = dict(zip(MEMBERS, servers, strict=False))
    hosts["db01"].create_database("app")
    yield hosts
    for host, server in hosts.items():
        for name in {"app", TEMPLATE, *MEMBERS[host]} & set(server.databases()):
            server.drop_database(name, force=True)


def located(text: str, hosts: dict[str, Server]) -> str:
    """Put the addresses of real servers where the README has example hosts."""
    text = text.replace(
        "postgresql+psycopg://app@db01/app", hosts["db01"].url("app").render_as_string(hide_password=False)
    )
    options = [{"host": each.host, "port": each.port, "password": each.password} for each in hosts.values()]
    text = text.replace('["db01", "db02"]', repr(options))
    return re.sub(r"--server (\w+)", lambda found: f"--server {hosts[found[1]].host}:{hosts[found[1]].port}", text)


def run(command: str, folder: Path) -> tuple[int, str]:
    """Run a command of the section; what it exits with, and says."""
    program, *arguments = shlex.split(command)
    path = Path(sys.executable).with_name(program)
    done = subprocess.run([str(path), *arguments], cwd=folder, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_the_section_on_fleets_runs(hosts: dict[str, Server], tmp_path: Path) -> None:
    """From nothing to a fleet at head, twice; then Alembic by itself, and the env.py of somebody who has one."""
    (section,) = re.findall(r"^## The fleet\n(.*?)^## ", README.read_text(), re.DOTALL | re.MULTILINE)
    said = []
    for name, text, change, command in STEP.findall(section):
        if name:
            (tmp_path / name).write_text(located(text, hosts))
        elif change:
            before, after = (line[1:] for line in change.splitlines())
            module = tmp_path / "shop.py"
            assert before in module.read_text()
            module.write_text(module.read_text().replace(before, f"{before}\n{after}"))
        else:
            code, out = run(located(command, hosts), tmp_path)
            assert code == 0, f"{command}\n{out}"
            said.append((command.split()[1], out))
    assert [name for name, _ in said] == [
        *("init", "revision", "create", "create", "status"),
        *("revision", "upgrade", "status"),
    ]
    assert "3 databases, 3 at" in said[4][1]
    assert "5 changed" in said[6][1]  # the templates too
    for host, names in MEMBERS.items():
        for name in (*names, TEMPLATE):
            assert run_sql(hosts[host], name, "SELECT id, name, email FROM users") == []
    for command in re.findall(r"`(alembic [^`]*(?:head|NAME))`", section.replace("\n", " ")):
        code, out = run(command, tmp_path)
        assert code == 0, out
    assert run_sql(hosts["db01"], "app", "SELECT count(*) FROM users") == [(0,)]


def test_the_settings_of_the_section_are_settings(hosts: dict[str, Server], tmp_path: Path) -> None:
    """Its pyproject.toml is read, and there is no setting that it does not name."""
    from shardrepo.fleet.settings import _NAMES, Settings

    section = README.read_text().partition("## The fleet\n")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```toml\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    (tmp_path / "pyproject.toml").write_text(block)
    first, second = Settings.load({}, tmp_path, {}).stages
    assert (first.tag, first.pause, str(second.size)) == ("canary", 60, "10%")
    assert all(f"`{name}`" in section for name in _NAMES)
