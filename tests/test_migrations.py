"""The demo's migrations, run as a user runs them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect
from sqlalchemy.pool import NullPool

from shardrepo.demo.models import Base
from shardrepo.testing.servers import Server

ROOT = Path(__file__).parents[1]


def alembic(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "alembic", "-c", "migrations/alembic.ini", *arguments]
    others = {name: value for name, value in os.environ.items() if name != "DATABASE_URL"}
    return subprocess.run(command, cwd=ROOT, env={**others, **environ}, capture_output=True, text=True, check=False)


@pytest.fixture
def database(server: Server) -> Iterator[str]:
    """An empty database: not a clone of the template, which has tables."""
    server.create_database("migrated")
    yield "migrated"
    server.drop_database("migrated", force=True)


def test_the_migrations_make_what_the_models_say(server: Server, database: str) -> None:
    """Upgraded to head, a database differs in nothing from the demo's models; downgraded, nothing is left."""
    url = server.url(database)
    engine = create_engine(url, poolclass=NullPool)
    named = url.render_as_string(hide_password=False)
    upgraded = alembic("upgrade", "head", DATABASE_URL=named)
    assert upgraded.returncode == 0, upgraded.stderr
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
    assert alembic("check", DATABASE_URL=named).returncode == 0
    assert alembic("downgrade", "base", DATABASE_URL=named).returncode == 0
    assert inspect(engine).get_table_names() == ["alembic_version"]


def test_a_missing_database_is_asked_for() -> None:
    """Without DATABASE_URL nothing is migrated, and the message says how to name one."""
    done = alembic("upgrade", "head")
    assert done.returncode != 0
    assert "Set DATABASE_URL=" in done.stderr
