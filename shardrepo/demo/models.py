"""What the demo's databases hold, and the repo that `migrations/` migrates them by.

The revisions make the same table, and import nothing of this.
"""

from __future__ import annotations

import os
from typing import Any

from sqlalchemy import String, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from ..repo import Repo


class Base(DeclarativeBase):
    """Root of the demo's models."""


class Customer(Base):
    """Six columns; *database* is where the row was last written, in the server's own words.

    The same keys are in every database, so that only that column tells whose row was met.
    """

    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    email: Mapped[str | None] = mapped_column(String(200))
    city: Mapped[str] = mapped_column(String(100), server_default="")
    visits: Mapped[int] = mapped_column(server_default="0")
    database: Mapped[str] = mapped_column(
        String(63), server_default=func.current_database(), onupdate=func.current_database()
    )

    # An UPDATE returns what the server made of *database*, too, in the same round trip.
    __mapper_args__: Any = {"eager_defaults": True}  # noqa: RUF012  # declared by SQLAlchemy as an attribute


def address() -> str:
    """The database that the environment names."""
    if "DATABASE_URL" not in os.environ:
        raise SystemExit("which database? Set DATABASE_URL=postgresql+psycopg://user:password@host/name")
    return os.environ["DATABASE_URL"]


class DemoRepo(Repo, config=address):
    """One of the demo's databases; they have no directory."""
