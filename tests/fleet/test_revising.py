"""Writing revisions: what is compared with what, and that nothing else is left behind."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from shardrepo import ConfigError, UnknownDatabaseError, fleet
from shardrepo.fleet.making import SCRATCH
from shardrepo.fleet.scaffold import init
from shardrepo.testing.servers import Servers

from .conftest import USERS, Project

pytestmark = pytest.mark.fleet

ENV = """
from {module} import Base, MyRepo
from shardrepo.fleet import env

{before}
env.run(MyRepo, Base.metadata{options})
"""


@pytest.fixture
def fresh(make_project: Callable[..., Project]) -> Project:
    """A project whose files are those that `init` writes, with no revision and no database."""
    project = make_project()
    (project.root / "migrations" / "env.py").unlink()
    init(project.root, project.path, f"{project.module}:Base")
    return project


@pytest.fixture
def begun(fresh: Project) -> Project:
    """The same with a first revision that makes the table of its models."""
    fresh.revise("0001", None, USERS, 'op.drop_table("users")')
    return fresh


def write_env(project: Project, before: str = "", options: str = "") -> None:
    """Give the project an env.py that runs *before*, and passes *options*."""
    project.write_env(ENV.format(module=project.module, before=before, options=options))


def revise(project: Project, **options: object) -> Path:
    """Write one by comparing; returns where."""
    (path,) = fleet.revision(project.repo, "next", autogenerate=True, source=project.source, **options)
    return path


def steps(path: Path) -> str:
    """What its upgrade does, in a line."""
    text = path.read_text().partition("def upgrade()")[2].partition("def downgrade()")[0]
    return " ".join(line.strip() for line in text.splitlines()[1:] if not line.strip().startswith("#")).strip()


def scratches(servers: Servers) -> list[str]:
    return [name for server in servers for name in server.databases() if name.startswith(SCRATCH)]


def ruff(project: Project, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", "--no-cache", "migrations"]
    return subprocess.run(command, cwd=project.root, capture_output=True, text=True, check=False)


def test_a_first_one_has_what_the_models_have(fresh: Project, servers: Servers) -> None:
    """With no database at all; upgrading to it makes just that, and nothing is left of what it was compared with."""
    path = revise(fresh)
    assert path.parent == fresh.root / "migrations" / "versions"
    assert steps(path).replace('"', "'").startswith("op.create_table( 'users', sa.Column('id'")
    assert scratches(servers) == []
    fresh.add(1)
    assert fleet.upgrade(fresh.repo, source=fresh.source).changed == 1
    assert fleet.check(fresh.repo, source=fresh.source).exit_code == 0


def test_a_second_one_has_what_the_first_has_not(begun: Project) -> None:
    """It is compared with the revisions so far, not with what somebody has done to a database by hand."""
    (name,) = begun.add(1)
    begun.sql(name, "CREATE TABLE by_hand (id int)")
    assert steps(revise(begun)) == "pass"
    second = fleet.heads(begun.repo, source=begun.source)[0]
    assert (second.down, second.message) == (("0001",), "next")


def test_a_member_can_be_compared_with(begun: Project, servers: Servers) -> None:
    """By its name; then it is that one's tables that count, and no other database is made. It has to be at head."""
    (name,) = begun.add(1)
    with pytest.raises(ConfigError, match="no revision was written: Target database is not up to date"):
        revise(begun, database=name)
    fleet.upgrade(begun.repo, source=begun.source)
    begun.sql(name, "CREATE TABLE by_hand (id int)")
    before = [server.databases() for server in servers]
    assert "op.drop_table" in steps(revise(begun, database=name))
    assert [server.databases() for server in servers] == before
    with pytest.raises(UnknownDatabaseError, match="'nobody'"):
        revise(begun, database="nobody")


def test_one_can_be_written_without_comparing(begun: Project) -> None:
    """It does nothing yet, follows the head, and connects to nothing."""
    (path,) = fleet.revision(begun.repo, "by hand", source=begun.source, rev_id="0002")
    assert path.name == "0002_by_hand.py"
    assert steps(path) == "pass"
    assert [each.id for each in fleet.history(begun.repo, source=begun.source)] == ["0002", "0001"]
    assert begun.repo.stats().attempts == 0


def test_where_there_are_several_heads_one_is_named(begun: Project) -> None:
    """Without that nothing is written, and the error says so; a merge is a revision that follows both."""
    begun.revise("0002", "0001")
    begun.revise("0003", "0001")
    for autogenerate in (False, True):
        with pytest.raises(ConfigError, match="no revision was written: Multiple heads are present"):
            fleet.revision(begun.repo, "next", autogenerate=autogenerate, source=begun.source)
    fleet.revision(begun.repo, "next", source=begun.source, head="0002", rev_id="0004")
    assert sorted(each.id for each in fleet.heads(begun.repo, source=begun.source)) == ["0003", "0004"]
    assert steps(revise(begun, head="0004")) == "pass"


@pytest.mark.parametrize("fault", ["migration", "env", "interrupt"])
def test_what_it_was_compared_with_is_dropped_whatever_happens(begun: Project, servers: Servers, fault: str) -> None:
    """Also when a migration or env.py fails in it; no script is written then."""
    if fault == "migration":
        begun.revise("0002", "0001", 'op.execute("SELECT 1/0")')
    elif fault == "env":
        write_env(begun, options=", include_object=lambda *_: 1 / 0")
    else:
        begun.revise("0002", "0001", "raise KeyboardInterrupt")
    expected = {"migration": fleet.Failure, "env": ZeroDivisionError, "interrupt": KeyboardInterrupt}[fault]
    before = sorted((begun.root / "migrations" / "versions").glob("*.py"))
    with pytest.raises(expected):
        revise(begun)
    assert scratches(servers) == []
    assert sorted((begun.root / "migrations" / "versions").glob("*.py")) == before


def test_env_says_what_is_compared(fresh: Project) -> None:
    """Alembic's own options are passed on by env.run()."""
    write_env(fresh, options=", include_object=lambda _, name, kind, *rest: (kind, name) != ('table', 'users')")
    assert steps(revise(fresh)) == "pass"


def test_env_may_leave_nothing_to_write(fresh: Project) -> None:
    """The usual directive that drops an empty revision is no error: nothing is written."""
    write_env(
        fresh,
        before="def none(context, revision, directives): directives[:] = []",
        options=", process_revision_directives=none",
    )
    assert fleet.revision(fresh.repo, "next", autogenerate=True, source=fresh.source) == []
    assert list((fresh.root / "migrations" / "versions").glob("*.py")) == []


def test_options_that_are_the_repos_are_no_business_of_env(fresh: Project) -> None:
    """It is told where they belong."""
    write_env(fresh, options=", version_table='versions'")
    with pytest.raises(fleet.Failure, match=r"env.run\(\) takes no version_table: it is the repo's own"):
        revise(fresh)


def test_what_is_written_is_laid_out(fresh: Project) -> None:
    """As ruff has it by default, with nothing imported that is not used or else excused."""
    revise(fresh)
    revise(fresh)
    fleet.revision(fresh.repo, 'by hand: "quoted"', source=fresh.source)
    assert len(list((fresh.root / "migrations" / "versions").glob("*.py"))) == 3
    for arguments in (("format", "--check"), ("check",)):
        done = ruff(fresh, *arguments)
        assert done.returncode == 0, done.stdout
