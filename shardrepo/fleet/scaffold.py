"""The files by which a new project is migrated."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any, Final

from sqlalchemy import MetaData

from ..errors import ConfigError
from .settings import PROJECT
from .worker import object_of, repo_of

_ENV: Final = Template('''"""Run by Alembic, and by `shardrepo` in every database."""

from shardrepo.fleet import env

$imports

env.run($repo, $metadata)
''')

# As formatters and linters have it, but for what Alembic puts into the two functions.
_SCRIPT: Final = '''"""${message}

Revision ID: ${up_revision}
Revises: ${", ".join(down_revision) if isinstance(down_revision, tuple) else down_revision or "<base>"}
"""

import sqlalchemy as sa${"" if "sa." in (upgrades or "") + (downgrades or "") else "  # noqa: F401"}
from alembic import op${"" if "op." in (upgrades or "") + (downgrades or "") else "  # noqa: F401"}
% if imports:
${imports}
% endif

revision = ${repr(up_revision).replace("'", '"')}
down_revision = ${repr(down_revision).replace("'", '"')}
branch_labels = ${repr(branch_labels).replace("'", '"')}
depends_on = ${repr(depends_on).replace("'", '"')}


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

    What is in ``pyproject.toml`` already stays as it is, byte for byte; the sections are put after it.

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
    before = _read(project)
    tools = _tools(project, before)
    there = [str(path) for path in (folder / "env.py", folder / "script.py.mako") if path.exists()]
    there += [f"[tool.shardrepo] in {project}"] if "shardrepo" in tools else []
    if there:
        raise ConfigError(
            f"{' and '.join(there)} {'is' if len(there) == 1 else 'are'} there already: nothing was written"
        )
    sections = _PROJECT.substitute(repo=repo) + ("" if "alembic" in tools else _ALEMBIC)
    files = {
        folder / "env.py": _ENV.substitute(imports=_imports(repo, models), repo=_name(repo), metadata=metadata),
        folder / "script.py.mako": _SCRIPT,
        project: sections if before else sections.lstrip(),
    }
    _write(folder, files)
    return list(files)


def _write(folder: Path, files: Mapping[Path, str]) -> None:
    """Write *files*, of which the last is there already, perhaps; or none of them."""
    written: list[Path] = []
    try:
        (folder / "versions").mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            with path.open("ab") as file:
                file.write(text.encode())
            written.append(path)
    except OSError as error:
        for path in written:
            path.unlink()
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}; nothing was written") from error


def _read(project: Path) -> bytes:
    try:
        return project.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise ConfigError(f"{project} cannot be read: {error.strerror}; nothing was written") from error


def _tools(project: Path, text: bytes) -> dict[str, Any]:
    try:
        tools: dict[str, Any] = tomllib.loads(text.decode()).get("tool", {})
    except ValueError as error:
        raise ConfigError(f"{project} is no TOML, and nothing was written: {error}") from error
    return tools


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
