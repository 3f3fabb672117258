"""The demo's migrations, run as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, inspect
from sqlalchemy.pool import NullPool

from shardrepo.demo.models import Base
from shardrepo.testing.servers import Server

ROOT = Path(__file__).parents[1]


def alembic(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "alembic", "-c", "migrations/alembic.ini", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_migrations_make_what_the_models_say(server: Server) -> None:
    """Upgraded to head, a database differs in nothing from the demo's models; downgraded, nothing is left."""
    server.create_database("migrated")
    url = server.url("migrated")
    engine = create_engine(url, poolclass=NullPool)
    database = f"database={url.render_as_string(hide_password=False)}"
    assert alembic("-x", database, "upgrade", "head").returncode == 0
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
    assert alembic("-x", database, "downgrade", "base").returncode == 0
    assert inspect(engine).get_table_names() == ["alembic_version"]
    server.drop_database("migrated")


def test_a_missing_database_is_asked_for() -> None:
    """Without -x database= nothing is migrated, and the message says how to name one."""
    done = alembic("upgrade", "head")
    assert done.returncode != 0
    assert "-x database=" in done.stderr
