"""Migrate one database: `alembic -c migrations/alembic.ini -x database=URL upgrade head`."""

from alembic import context
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

database = context.get_x_argument(as_dictionary=True).get("database")
if database is None:
    raise SystemExit(
        "which database? alembic -c migrations/alembic.ini -x database=postgresql+psycopg://… upgrade head"
    )

if context.is_offline_mode():
    context.configure(url=database, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
else:
    with create_engine(database, poolclass=NullPool).connect() as connection:
        context.configure(connection=connection, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
