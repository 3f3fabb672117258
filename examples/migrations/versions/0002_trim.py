"""Notes without the blanks around them, as clients send them from now on."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("UPDATE notes SET text = btrim(text) WHERE text <> btrim(text)")


def downgrade() -> None:
    """Nothing: what has been cut off is not missed."""
