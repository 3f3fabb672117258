"""The demo's customers, each of whom knows which database it was written in."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "customers",
        sa.Column("id", sa.Integer(), primary_key=True),
        sa.Column("name", sa.String(100), nullable=False),
        sa.Column("email", sa.String(200)),
        sa.Column("city", sa.String(100), nullable=False, server_default=""),
        sa.Column("visits", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("database", sa.String(63), nullable=False, server_default=sa.func.current_database()),
    )


def downgrade() -> None:
    op.drop_table("customers")
