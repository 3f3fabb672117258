"""Migrate a database of the demo's: `DATABASE_URL=… alembic -c migrations/alembic.ini upgrade head`."""

import os

from shardrepo import Repo
from shardrepo.demo.models import Base
from shardrepo.fleet import env


def config() -> str:
    """The database that the environment names."""
    if "DATABASE_URL" not in os.environ:
        raise SystemExit("which database? Set DATABASE_URL=postgresql+psycopg://user:password@host/name")
    return os.environ["DATABASE_URL"]


class DemoRepo(Repo, config=config):
    """The demo's databases."""


env.run(DemoRepo, Base.metadata)
