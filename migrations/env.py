"""Migrate a database of the demo's: `DATABASE_URL=… alembic -c migrations/alembic.ini upgrade head`."""

from shardrepo.demo.models import Base, DemoRepo
from shardrepo.fleet import env

env.run(DemoRepo, Base.metadata)
