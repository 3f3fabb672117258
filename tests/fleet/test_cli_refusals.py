"""The command refuses what cannot be: what it says, what it exits with, and that nothing was done."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest

from shardrepo.testing.servers import Servers

from .conftest import AGE, Project


def test_no_repo_is_configured(project: Project) -> None:
    """It says the three places where one can be named; each of them does."""
    assert 'write repo = "app.repo:MyRepo" under [tool.shardrepo]' in project.refused("status")
    assert project.run("history", "--repo", project.path).returncode == 0
    assert project.run("history", SHARDREPO_REPO=project.path).returncode == 0
    project.configure()
    assert project.run("history").returncode == 0


def test_a_flag_is_stronger_than_the_environment_and_that_than_the_file(project: Project) -> None:
    """In that order, for each setting by itself; paths are relative to the folder of pyproject.toml, from anywhere."""
    project.configure(script_location="of_the_file")
    assert "of_the_file" in project.refused("history")
    assert "of_the_environment" in project.refused("history", SHARDREPO_SCRIPT_LOCATION="of_the_environment")
    told = project.refused(
        "history", "--script-location", "of_the_flag", SHARDREPO_SCRIPT_LOCATION="of_the_environment"
    )
    assert str(project.root / "of_the_flag") in told


def test_the_repos_own_scripts_are_used(make_project: Callable[..., Project]) -> None:
    """Where only the repo's config says where they are, a folder of the usual name is not taken for them."""
    project = make_project(script_location="elsewhere")
    project.configure()
    assert str(project.root / "elsewhere") in project.refused("history")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("{module}", "a repo is named as module:name, like app.repo:MyRepo"),
        ("nowhere:MyRepo", "cannot be imported: No module named 'nowhere'"),
        ("{module}:Nothing", "has no attribute 'Nothing'"),
        ("{module}:Base", "not a repo"),
        ("shardrepo:Repo", "name a subclass of Repo that has a config"),
    ],
)
def test_what_is_named_is_no_repo(project: Project, path: str, said: str) -> None:
    """It says what that is instead, or why it cannot be imported."""
    assert said in project.refused("status", "--repo", path.format(module=project.module))


def test_settings_that_there_are_not(project: Project) -> None:
    """A misspelt one is named with its file and the one that was meant; so is one of the wrong kind."""
    project.configure(max_failure=3)
    told = project.refused("status")
    assert "did you mean 'max_failures'?" in told
    assert str(project.root / "pyproject.toml") in told
    project.configure(jobs="many")
    assert "jobs must be an integer" in project.refused("upgrade")
    (project.root / "pyproject.toml").write_text("[tool.shardrepo")
    assert "pyproject.toml cannot be read" in project.refused("status")


def test_nothing_is_selected(configured: Project) -> None:
    """A name, pattern, server, run or list that selects nothing is an error that says so; nothing is done."""
    server = configured.servers[0]
    for flags, said in [
        (["-d", "nobody"], "the directory knows no database 'nobody'"),
        (["-d", configured.names[0], "-d", "nobody"], "the directory knows no database 'nobody'"),
        (["--match", "x*"], "match=x* selects none of 6 databases"),
        (["--server", "127.0.0.2"], "did you mean '127.0.0.1'?"),
        (["--failed", "last"], "no run 'last'"),
        (["--from", "missing.txt"], "--from missing.txt: "),
        (["--from", "-"], "--from - names no database"),
        (["--resume", "20010101"], "no run '20010101'"),
        (["--resume", "last", "--server", server.host], "it takes no selection"),
        (["--resume", "last", "--plan"], "it takes no selection, --plan or --sql"),
    ]:
        assert said in configured.refused("upgrade", *flags)
    assert not any(configured.revisions().values())


def test_a_wrong_number_is_refused(configured: Project) -> None:
    """Of databases in a stage, of failures, of seconds."""
    for flags, said in [
        (["--canary", "few"], "the size of a stage must be a number of databases"),
        (["--then", "120%"], "the size of a stage must be"),
        (["--max-failures", "-1"], "max_failures must be"),
        (["--lock-timeout", "0"], "lock_timeout must be a positive number of seconds"),
        (["--executor", "spark://host"], "an executor is named as dask://host:port"),
    ]:
        assert said in configured.refused("upgrade", *flags)
    assert configured.run("upgrade", "--jobs", "0").returncode == 2
    assert configured.run("upgrade", "--nonsense").returncode == 2
    assert not any(configured.revisions().values())


def test_a_revision_that_there_is_not(configured: Project) -> None:
    """It is refused before any database is asked; where there are several heads, those are named."""
    assert "'0009' names no revision of these migrations" in configured.refused("upgrade", "0009")
    configured.revise("0002", "0001")
    configured.revise("0003", "0001", AGE)
    assert "(heads: 0002, 0003); name one, or `heads`" in configured.refused("upgrade")
    assert not any(configured.revisions().values())
    assert configured.run("upgrade", "heads").returncode == 0
    assert configured.revisions() == {name: ["0002", "0003"] for name in configured.names}


def test_a_database_at_a_revision_without_a_script(configured: Project) -> None:
    """It fails by itself and stays as it is, the others are done; the status counts it."""
    configured.run("upgrade", "-d", configured.names[3])
    configured.sql(configured.names[3], "UPDATE alembic_version SET version_num = 'ffff'")
    done = configured.run("upgrade")
    assert done.returncode == 1
    assert "5 changed, 1 failed" in done.stdout
    assert "it is at revision ffff, of which these migrations have no script" in done.stdout
    assert configured.revision(configured.names[3]) == ["ffff"]
    status = configured.run("status")
    assert status.returncode == 1
    assert f"unknown: {configured.names[3]}" in status.stdout


def test_scripts_that_cannot_be_loaded(configured: Project) -> None:
    """The script's own error is told, and nothing is connected to."""
    configured.revise("0002", "0001")
    (configured.root / "migrations" / "versions" / "0002.py").write_text("revision = '0002'\nimport nothing_such\n")
    assert "cannot be loaded: ModuleNotFoundError: No module named 'nothing_such'" in configured.refused("upgrade")


def test_a_server_that_is_not_reached(configured: Project, servers: Servers) -> None:
    """It is told once, the databases of the others are done, and the exit code is 1."""
    gone, module = servers[2].port, configured.root / f"{configured.module}.py"
    module.write_text(module.read_text().replace(f"'port': {gone}", "'port': 1"))
    done = configured.run("upgrade")
    assert done.returncode == 1
    assert done.stdout.startswith("upgrade head: 4 changed")
    assert done.stdout.count("127.0.0.1:1") >= 1
    assert "could not be listed, and are left out" in done.stdout
    assert len(done.stdout.splitlines()) < 10
    reached = [name for name in configured.names if configured.where[name].port != gone]
    assert {name for name, revision in configured.revisions().items() if revision} == set(reached)
    status = configured.run("status")
    assert (status.returncode, "could not be listed" in status.stdout) == (1, True)
    for command in (["ping"], ["current"], ["databases"], ["exec", "SELECT 1"]):
        listed = configured.run(*command)
        assert listed.returncode == 1
        assert all(name in listed.stdout for name in reached)
        assert "127.0.0.1:1" in listed.stderr
    behind = configured.run("upgrade", "--behind")
    assert (behind.returncode, behind.stdout) == (1, "")
    assert "nobody knows which databases of 127.0.0.1:1 are behind" in behind.stderr


def test_a_directory_that_lies(make_project: Callable[..., Project], servers: Servers) -> None:
    """A name that it puts on a server without such a database fails there, by name."""
    server = servers[0]
    project = make_project(directory={"gone": {"host": server.host, "port": server.port, "password": server.password}})
    project.revise("0001", None)
    project.configure()
    done = project.run("upgrade")
    assert done.returncode == 1
    assert "1 x UnknownDatabaseError" in done.stdout
    assert "gone" in done.stdout


def test_a_journal_that_cannot_be_written(configured: Project) -> None:
    """Nothing is done without a record: it says which folder, and no database is touched."""
    (configured.root / "taken").write_text("")
    told = configured.refused("upgrade", "--journal", "taken")
    assert str(configured.root / "taken") in told
    assert "nothing was done" in told
    assert not any(configured.revisions().values())


def test_a_repo_that_only_reads(make_project: Callable[..., Project]) -> None:
    """It looks at its databases, and migrates none."""
    project = make_project(1, read_only=True)
    project.revise("0001", None)
    project.configure()
    assert project.run("status").returncode == 1
    for command in (["upgrade"], ["create", "x", "--server", "127.0.0.1"]):
        assert "read_only=True" in project.refused(*command)


def test_without_the_extra_it_says_what_to_install() -> None:
    """The library is installed without what the command is made of."""
    program = "import sys; sys.modules['typer'] = None; from shardrepo.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, "status"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "shardrepo: the command needs typer, which is not installed: pip install 'shardrepo[cli]'\n"
