"""Beginning a project: what is written, and what never is."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Project

FILES = ["migrations/env.py", "migrations/script.py.mako", "pyproject.toml"]


@pytest.fixture
def bare(make_project: Callable[..., Project]) -> Project:
    """A project with its module, and no file of ours."""
    project = make_project()
    (project.root / "migrations" / "env.py").unlink()
    (project.root / "migrations" / "versions").rmdir()
    (project.root / "migrations").rmdir()
    return project


def contents(root: Path) -> dict[str, bytes]:
    """The files of a project, by name."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def refused(project: Project, *arguments: str) -> str:
    """Run `init`, which is to write nothing; returns what it says."""
    before = contents(project.root)
    done = project.run("init", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert contents(project.root) == before
    return done.stderr


def test_the_files_of_a_project_are_written(bare: Project) -> None:
    """Each is named; the command and Alembic by itself need nothing more."""
    done = bare.run("init", bare.path, f"{bare.module}:Base")
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"wrote {name}" for name in FILES])
    tools = tomllib.loads((bare.root / "pyproject.toml").read_text())["tool"]
    assert tools["shardrepo"] == {"repo": bare.path, "script_location": "migrations"}
    assert tools["alembic"]["script_location"] == "%(here)s/migrations"
    assert bare.run("history").returncode == 0
    assert "env.run(MyRepo, Base.metadata)\n" in (bare.root / "migrations" / "env.py").read_text()


def test_nothing_is_written_twice(bare: Project) -> None:
    """The second time is an error that names what is there; so is one where a part of it is."""
    arguments = (bare.path, f"{bare.module}:Base")
    bare.run("init", *arguments)
    told = refused(bare, *arguments)
    assert all(name in told for name in FILES)
    assert "are there already: nothing was written" in told
    (bare.root / "pyproject.toml").unlink()
    (bare.root / "migrations" / "script.py.mako").unlink()
    assert "env.py is there already: nothing was written" in refused(bare, *arguments)
    (bare.root / "migrations" / "env.py").unlink()
    bare.configure()
    assert "[tool.shardrepo] in " in refused(bare, *arguments)


@pytest.mark.parametrize("before", [b"[project]\r\nname = 'x'  \r\n\r\n\r\n", b"# \xc3\xa9, and no line's end"])
def test_what_is_in_pyproject_stays_byte_for_byte(bare: Project, before: bytes) -> None:
    """The sections come after it."""
    (bare.root / "pyproject.toml").write_bytes(before)
    assert bare.run("init", bare.path, f"{bare.module}:Base").returncode == 0
    after = (bare.root / "pyproject.toml").read_bytes()
    assert after.startswith(before)
    assert set(tomllib.loads(after.decode())["tool"]) == {"shardrepo", "alembic"}


def test_alembics_own_section_is_left_alone(bare: Project) -> None:
    """A project that has one keeps it."""
    (bare.root / "pyproject.toml").write_text('[tool.alembic]\nscript_location = "elsewhere"\n')
    assert bare.run("init", bare.path, f"{bare.module}:Base").returncode == 0
    tools = tomllib.loads((bare.root / "pyproject.toml").read_text())["tool"]
    assert tools["alembic"] == {"script_location": "elsewhere"}


def test_what_is_named_has_to_be_there(bare: Project) -> None:
    """A repo that is none, models without tables, a module that there is not."""
    base = f"{bare.module}:Base"
    for arguments, said in [
        ((base, base), "not a repo"),
        (("nowhere:MyRepo", base), "No module named 'nowhere'"),
        ((bare.path, bare.path), "has no tables: name a declarative base, or a MetaData"),
        ((bare.path, bare.module), "the models is named as module:name"),
        ((bare.path, f"{bare.module}:Bass"), "has no attribute 'Bass'"),
    ]:
        assert said in refused(bare, *arguments)


def test_metadata_can_be_named_itself(bare: Project) -> None:
    """In place of the declarative base that has it."""
    assert bare.run("init", bare.path, f"{bare.module}:Base.metadata").returncode == 0
    assert "env.run(MyRepo, Base.metadata)\n" in (bare.root / "migrations" / "env.py").read_text()


def test_what_cannot_be_written_leaves_nothing(bare: Project) -> None:
    """A file in the way of a folder, or the other way round; a pyproject.toml that is no TOML."""
    arguments = (bare.path, f"{bare.module}:Base")
    (bare.root / "pyproject.toml").write_text("[tool")
    assert "is no TOML, and nothing was written" in refused(bare, *arguments)
    (bare.root / "pyproject.toml").unlink()
    (bare.root / "pyproject.toml").mkdir()
    assert "pyproject.toml cannot be read" in refused(bare, *arguments)
    (bare.root / "pyproject.toml").rmdir()
    (bare.root / "migrations").write_text("")
    assert "versions cannot be written: Not a directory; nothing was written" in refused(bare, *arguments)
