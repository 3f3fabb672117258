"""What is set for a project: in its pyproject.toml, in the environment, by flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from shardrepo.errors import ConfigError
from shardrepo.fleet.plan import Share, Stage
from shardrepo.fleet.settings import Settings

FULL = """
[tool.shardrepo]
repo = "app.repo:MyRepo"
script_location = "app:migrations"
journal = "runs"
jobs = 8
per_server = "2"
max_failures = "2%"
lock_timeout = 2
lock_retries = 0
patience = 1.5
"""


def write(folder: Path, text: str) -> Path:
    """A project with that in its pyproject.toml."""
    (folder / "pyproject.toml").write_text(text)
    return folder


def load(start: Path, environ: Mapping[str, str] = {}, **flags: Any) -> Settings:
    return Settings.load(flags, start, environ)


def refused(start: Path, environ: Mapping[str, str] = {}, **flags: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(start, environ, **flags)
    return str(caught.value)


# Where it stands


def test_all_that_can_be_set(tmp_path: Path) -> None:
    """As the project's file says it."""
    assert load(write(tmp_path, FULL)) == Settings(
        root=tmp_path,
        repo="app.repo:MyRepo",
        script_location="app:migrations",
        journal="runs",
        jobs=8,
        per_server=2,
        max_failures=Share(2, is_percent=True),
        lock_timeout=2.0,
        lock_retries=0,
        patience=1.5,
    )


def test_nothing_is_set(tmp_path: Path) -> None:
    """Without a file, and with one of other tools, all is as it is by default."""
    assert load(tmp_path) == Settings(root=tmp_path)
    assert load(write(tmp_path, "[tool.ruff]\n")) == Settings(root=tmp_path)
    assert load(write(tmp_path, "")) == Settings(root=tmp_path)


def test_who_has_the_last_word(tmp_path: Path) -> None:
    """The environment over the file, flags over both; a flag that is not given says nothing."""
    write(tmp_path, "[tool.shardrepo]\njobs = 1\nper_server = 1\nlock_retries = 1\n")
    environ = {"SHARDREPO_JOBS": "2", "SHARDREPO_PER_SERVER": "2", "SHARDREPO_LONG": "1", "JOBS": "9"}
    found = load(tmp_path, environ, jobs=3, per_server=None, lock_retries=None)
    assert (found.jobs, found.per_server, found.lock_retries) == (3, 2, 1)


def test_from_a_folder_below(tmp_path: Path) -> None:
    """The project is the one around it, and paths are relative to that."""
    below = tmp_path / "app" / "models"
    below.mkdir(parents=True)
    (tmp_path / "migrations").mkdir()
    found = load(write(tmp_path, FULL) and below)
    assert (found.root, found.journals) == (tmp_path, tmp_path / "runs")
    write(tmp_path, "")
    source = load(below).source
    assert source is not None
    assert source.location == str(tmp_path / "migrations")


def test_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is where one begins to look, and the process's own environment is asked."""
    monkeypatch.chdir(write(tmp_path, FULL))
    monkeypatch.setenv("SHARDREPO_JOBS", "3")
    assert (Settings.load({}).root, Settings.load({}).jobs) == (tmp_path, 3)


# Stages


def test_stages_as_tables(tmp_path: Path) -> None:
    """Each with all that a stage has."""
    write(
        tmp_path,
        '[[tool.shardrepo.stages]]\nsize = 1\nmax_failures = 0\n[[tool.shardrepo.stages]]\nmatch = "a*"\npause = 2\n',
    )
    assert load(tmp_path).stages == (Stage(Share(1), Share(0)), Stage(match="a*", pause=2.0))


def test_stages_as_text(tmp_path: Path) -> None:
    """Sizes, in a list or with commas between them; flags bring stages."""
    expected = (Stage(Share(1)), Stage(Share(10, is_percent=True)), Stage())
    assert load(tmp_path, {"SHARDREPO_STAGES": "1, 10% ,rest"}).stages == expected
    assert load(write(tmp_path, '[tool.shardrepo]\nstages = [1, "10%", "rest"]\n')).stages == expected
    assert load(tmp_path, stages=[Stage(Share(1))]).stages == (Stage(Share(1)),)


# Mistakes


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("job = 8", "unknown setting 'job'; did you mean 'jobs'?"),
        ("zzzzzz = 8", "unknown setting 'zzzzzz'; known: jobs, journal"),
        ("jobs = 1.5", "jobs must be an integer, not 1.5"),
        ("jobs = true", "jobs must be an integer, not True"),
        ("jobs = nan", "jobs must be an integer, not nan"),
        ("jobs = inf", "jobs must be an integer, not inf"),
        ("jobs = []", "jobs must be an integer, not []"),
        ('jobs = "many"', "jobs must be an integer, not 'many'"),
        ("patience = true", "patience must be a number, not True"),
        ('patience = "long"', "patience must be a number, not 'long'"),
        ("patience = inf", "patience must be a number, not inf"),
        ("repo = 5", "repo must be a text, not 5"),
        ('repo = ""', "repo must be a text, not ''"),
        ("max_failures = -1", "max_failures must be a number of databases"),
        ("max_failures = true", "max_failures must be a number of databases"),
        ("stages = 1", "stages must be a list of stages, not 1"),
        ('stages = "1,"', "the size of a stage must be a number of databases"),
        ("stages = [{sise = 1}]", "unknown attribute of a stage 'sise'; did you mean 'size'?"),
    ],
)
def test_what_cannot_be_set(tmp_path: Path, line: str, said: str) -> None:
    """The message says where it stands, and what is wrong."""
    message = refused(write(tmp_path, f"[tool.shardrepo]\n{line}\n"))
    assert message.startswith(f"{tmp_path / 'pyproject.toml'}, [tool.shardrepo]: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[tool.shardrepo\n", "pyproject.toml cannot be read: "),
        ("tool = 5\n", "tool is a table, as in [tool.shardrepo], not 5"),
        ("[tool]\nshardrepo = 5\n", "shardrepo is a table, as in [tool.shardrepo], not 5"),
        ("[[tool.shardrepo]]\n", "shardrepo is a table, as in [tool.shardrepo], not [{}]"),
    ],
)
def test_a_file_that_is_wrong(tmp_path: Path, text: str, said: str) -> None:
    """The message names it."""
    message = refused(write(tmp_path, text))
    assert message.startswith(str(tmp_path))
    assert said in message


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    """The message names it."""
    (tmp_path / "pyproject.toml").write_bytes(b"\xff\xfe")
    assert "pyproject.toml cannot be read: " in refused(tmp_path)


def test_mistakes_elsewhere(tmp_path: Path) -> None:
    """A message names the variable; what is wrong is told also where something else has the last word."""
    environ = {"SHARDREPO_JOBS": "many"}
    assert refused(tmp_path, environ, jobs=3) == "the environment: SHARDREPO_JOBS must be an integer, not 'many'"
    assert refused(tmp_path, max_failures="x").startswith("the options: max_failures must be a number")
    assert refused(tmp_path, {}, josb=1).startswith("the options: unknown setting 'josb'; did you mean 'jobs'?")


# What comes of it


def test_a_rollout(tmp_path: Path) -> None:
    """What is set, and by default where nothing is; more goes over it."""
    rollout = load(write(tmp_path, FULL)).rollout(breadth=True, patience=2.0)
    assert (rollout.jobs, rollout.max_failures, rollout.lock_retries) == (8, Share(2, is_percent=True), 0)
    assert (rollout.journal, rollout.breadth, rollout.patience, rollout.stages) == (tmp_path / "runs", True, 2.0, ())
    assert load(tmp_path / "nowhere").rollout(journal=None).journal is None


@pytest.mark.parametrize("line", ["jobs = 0", "per_server = -1", "lock_retries = -1", "lock_timeout = 0"])
def test_a_rollout_that_cannot_be(tmp_path: Path, line: str) -> None:
    """Out of bounds is refused before anything is done."""
    settings = load(write(tmp_path, f"[tool.shardrepo]\n{line}\n"))
    with pytest.raises(ConfigError, match=line.partition(" ")[0]):
        settings.rollout()


def test_where_the_scripts_are(tmp_path: Path) -> None:
    """What is said; else the folder of the usual name; else the repo's own config knows."""
    assert load(tmp_path).source is None
    (tmp_path / "migrations").mkdir()
    assert (found := load(tmp_path).source) is not None
    assert (found.location, found.config_file) == (str(tmp_path / "migrations"), None)
    write(tmp_path, FULL)
    assert (found := load(tmp_path).source) is not None
    assert (found.location, found.config_file) == ("app:migrations", str(tmp_path / "pyproject.toml"))
    (tmp_path / "alembic.ini").touch()
    assert (found := load(tmp_path, script_location="other").source) is not None
    assert (found.location, found.config_file) == (str(tmp_path / "other"), str(tmp_path / "alembic.ini"))
