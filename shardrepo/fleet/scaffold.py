"""The files by which a new project is migrated."""

from __future__ import annotations

import tomllib
from pathlib import Path
from string import Template
from typing import Final

from sqlalchemy import MetaData

from ..errors import ConfigError
from .settings import PROJECT
from .worker import object_of, repo_of

_ENV: Final = Template('''"""Run by Alembic, and by `shardrepo` in every database."""

$imports
from shardrepo.fleet import env

env.run($repo, $metadata)
''')

_SCRIPT: Final = '''"""${message}

Revision ID: ${up_revision}
Revises: ${down_revision | comma,n}
"""

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}

revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = ${repr(branch_labels)}
depends_on = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
'''

_PROJECT: Final = Template("""
[tool.shardrepo]
repo = "$repo"
script_location = "migrations"
""")

# For `alembic` by itself.
_ALEMBIC: Final = """
[tool.alembic]
script_location = "%(here)s/migrations"
prepend_sys_path = ["."]
"""


def init(root: Path, repo: str, models: str) -> list[Path]:
    """Write ``migrations/`` and the sections of ``pyproject.toml`` into *root*; returns what was written.

    Args:
        root: The project's folder.
        repo: Its repo, as ``module:Class``.
        models: Whose tables its databases have: a declarative base, or a ``MetaData``, as ``module:name``.

    Raises:
        ConfigError: One of them is not there, or something of what would be written is. Nothing was written then.
    """
    repo_of(repo)
    metadata = _metadata_of(models)
    folder, project = root / "migrations", root / PROJECT
    before = project.read_text(encoding="utf-8") if project.is_file() else ""
    tools = tomllib.loads(before).get("tool", {})
    there = [str(path) for path in (folder / "env.py", folder / "script.py.mako") if path.exists()]
    there += [f"[tool.shardrepo] in {project}"] if "shardrepo" in tools else []
    if there:
        raise ConfigError(
            f"{' and '.join(there)} is there already: nothing was written over; take it away, or go on with it"
        )
    (folder / "versions").mkdir(parents=True, exist_ok=True)
    sections = _PROJECT.substitute(repo=repo) + ("" if "alembic" in tools else _ALEMBIC)
    files = {
        folder / "env.py": _ENV.substitute(imports=_imports(repo, models), repo=_name(repo), metadata=metadata),
        folder / "script.py.mako": _SCRIPT,
        project: f"{before.rstrip()}\n{sections}" if before.strip() else sections.lstrip(),
    }
    for path, text in files.items():
        path.write_text(text, encoding="utf-8")
    return list(files)


def _imports(*paths: str) -> str:
    named: dict[str, set[str]] = {}
    for path in paths:
        module, _, name = path.partition(":")
        named.setdefault(module, set()).add(name.split(".")[0])
    return "\n".join(f"from {module} import {', '.join(sorted(named[module]))}" for module in sorted(named))


def _name(path: str) -> str:
    return path.partition(":")[2]


def _metadata_of(models: str) -> str:
    """How an env.py that has imported *models* names their metadata."""
    found = object_of(models, "the models", "app.models:Base")
    if isinstance(found, MetaData):
        return _name(models)
    if isinstance(getattr(found, "metadata", None), MetaData):
        return f"{_name(models)}.metadata"
    raise ConfigError(f"{models!r} has no tables: name a declarative base, or a MetaData")
