"""Alembic by itself, in a project as `init` makes it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from shardrepo.fleet.lock import KEY
from shardrepo.testing.servers import Server, Servers

from ..conftest import await_, run_sql
from .conftest import USERS, Project

pytestmark = pytest.mark.fleet


@pytest.fixture
def default(server: Server) -> Iterator[str]:
    """The default database's name, on the first server; it is no member."""
    name = f"default_{secrets.token_hex(4)}"
    server.create_database(name)
    yield name
    server.drop_database(name, force=True)


@pytest.fixture
def alone(make_project: Callable[..., Project], default: str, server: Server) -> Project:
    """A project by `init`, with one revision, a default database, and one more on each server."""
    project = make_project(3)
    module = project.root / f"{project.module}.py"
    module.write_text(module.read_text().replace("/postgres'", f"/{default}'"))
    (project.root / "migrations" / "env.py").unlink()
    assert project.run("init", project.path, f"{project.module}:Base").returncode == 0
    project.revise("0001", None, USERS, 'op.drop_table("users")')
    project.where[default] = server
    return project


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-W", "error", "-m", "alembic", *arguments]


def alembic(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it in the project's folder."""
    return subprocess.run(command(*arguments), cwd=project.root, capture_output=True, text=True, check=False)


def test_it_migrates_the_default_database(alone: Project, default: str) -> None:
    """And no other; it says where that is, compares it, and takes it back."""
    done = alembic(alone, "upgrade", "head")
    assert done.returncode == 0, done.stderr
    assert "Running upgrade  -> 0001" in done.stderr
    assert alone.revision(default) == ["0001"]
    assert not any(alone.revisions().values())
    assert alembic(alone, "current").stdout == "0001 (head)\n"
    assert "No new upgrade operations detected" in alembic(alone, "check").stdout
    alone.sql(default, "ALTER TABLE users DROP COLUMN name")
    assert alembic(alone, "check").returncode != 0
    assert alembic(alone, "downgrade", "base").returncode == 0
    assert alone.revision(default) == []


def test_it_migrates_another_database_by_its_name(alone: Project, default: str) -> None:
    """Wherever the directory says that it is."""
    for name in alone.names:
        assert alembic(alone, "-x", f"database={name}", "upgrade", "+1").returncode == 0
    assert alone.revisions() == {name: ["0001"] for name in alone.names}
    assert alone.revision(default) == []
    assert alembic(alone, "-x", f"database={alone.names[2]}", "stamp", "base").returncode == 0
    assert alembic(alone, "-x", f"database={alone.names[2]}", "current").stdout == ""


def test_an_unknown_database_is_named(alone: Project, default: str) -> None:
    """In a line, and nothing is migrated in its place."""
    for name, said in [("nobody", "the directory knows no database 'nobody'"), ("", "names no database")]:
        done = alembic(alone, "-x", f"database={name}", "upgrade", "head")
        assert done.returncode != 0
        assert said in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
    assert alone.revision(default) == []


def test_it_writes_sql_without_connecting(alone: Project, servers: Servers) -> None:
    """With --sql, though no server can be reached."""
    module = alone.root / f"{alone.module}.py"
    module.write_text(module.read_text().replace(str(servers[0].port), "1"))
    done = alembic(alone, "upgrade", "head", "--sql")
    assert done.returncode == 0, done.stderr
    assert "CREATE TABLE users" in done.stdout


def test_it_writes_revisions(alone: Project, default: str) -> None:
    """Compared with the database that is meant, which has to be at head."""
    assert alembic(alone, "revision", "--autogenerate", "-m", "early").returncode != 0
    alembic(alone, "upgrade", "head")
    alone.sql(default, "ALTER TABLE users DROP COLUMN name")
    done = alembic(alone, "revision", "--autogenerate", "-m", "next", "--rev-id", "0002")
    assert done.returncode == 0, done.stderr
    assert "op.add_column('users'" in (alone.root / "migrations" / "versions" / "0002_next.py").read_text()
    assert alone.run("heads").stdout == "0001 -> 0002 (head), next\n"


def test_it_waits_for_whoever_migrates_the_database(alone: Project) -> None:
    """By the lock that the fleet takes: it is seen to ask for it, does nothing meanwhile, and goes on afterwards."""
    name = alone.names[0]
    server = alone.where[name]
    asking = "SELECT query FROM pg_stat_activity WHERE datname = %s AND application_name = 'alembic'"
    with server.connect(name) as holder:
        holder.execute("SELECT pg_advisory_lock(%s)", (KEY,))
        with subprocess.Popen(
            command("-x", f"database={name}", "upgrade", "head"),
            cwd=alone.root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ,
        ) as waiting:
            await_(lambda: any("pg_try_advisory_lock" in row[0] for row in run_sql(server, "postgres", asking, [name])))
            assert waiting.poll() is None
            assert alone.revision(name) == []
            # What only looks waits for nobody.
            assert alembic(alone, "-x", f"database={name}", "current").returncode == 0
            holder.execute("SELECT pg_advisory_unlock(%s)", (KEY,))
            assert waiting.wait() == 0
    assert alone.revision(name) == ["0001"]
