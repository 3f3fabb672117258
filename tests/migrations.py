"""Folders of Alembic scripts, as large as a test needs them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write_script(
    folder: Path,
    revision: str,
    *down: str,
    labels: Sequence[str] = (),
    depends_on: Sequence[str] = (),
    body: str = "",
) -> Path:
    """Write the script of one revision, which comes after *down*; *body* runs when it is loaded."""
    versions = folder / "versions"
    versions.mkdir(parents=True, exist_ok=True)
    script = versions / f"{revision}.py"
    script.write_text(
        f"revision = {revision!r}\n"
        f"down_revision = {down or None!r}\n"
        f"branch_labels = {tuple(labels) or None!r}\n"
        f"depends_on = {tuple(depends_on) or None!r}\n"
        f"{body}\n"
        "def upgrade(): ...\n"
        "def downgrade(): ...\n"
    )
    return script


def write_line(folder: Path, *revisions: str) -> str:
    """Write scripts of which each comes after the one before; returns where they are."""
    for before, revision in zip((None, *revisions), revisions, strict=False):
        write_script(folder, revision, *([before] if before else []))
    return str(folder)
