"""The README's files of tests, run by pytest as they stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ..fleet.conftest import SCRIPT, USERS
from .conftest import Project

pytestmark = pytest.mark.testing

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCK = re.compile(r"^```(?:python|ini)\n# (\S+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
FILES = dict(BLOCK.findall(README.partition("\n## Tests\n")[2]))
MODELS = re.findall(
    r"^```python\n(from sqlalchemy.orm import DeclarativeBase.*?)^```", README, re.DOTALL | re.MULTILINE
)
ENV = "from shop import Base, MyRepo\nfrom shardrepo.fleet import env\nenv.run(MyRepo, Base.metadata)\n"
TRIM = 'op.execute("UPDATE users SET name = btrim(name)")'


def script(revision: str, down: str | None, upgrade: str, downgrade: str) -> str:
    return SCRIPT.format(
        message=revision, revision=revision, down=down, depends_on=None, upgrade=upgrade, downgrade=downgrade
    )


@pytest.fixture
def shop(project: Project) -> Path:
    """The README's project, with its models and two revisions."""
    root = project.pytester.path
    files = {
        **FILES,
        "shop.py": f"from shardrepo import Repo\n{MODELS[0]}\n{FILES['shop.py']}",
        "migrations/env.py": ENV,
        "migrations/versions/users.py": script("0001", None, USERS.replace("\n", "\n    "), 'op.drop_table("users")'),
        "migrations/versions/trim.py": script("a1b2c3", "0001", TRIM, "pass"),
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_readmes_tests_pass(shop: Path, project: Project) -> None:
    """In a project that has these files and no other, on the outer servers."""
    assert sorted(FILES) == ["pytest.ini", "shop.py", "test_migrations.py", "test_shop.py"]
    result = project.pytester.runpytest_subprocess(
        *("-p", "no:randomly", "-p", "no:pytest_alembic", "-W", "error", "--strict-markers"),
        *("-o", "pythonpath=.", f"--shardrepo-url={project.url}", "test_shop.py", "test_migrations.py"),
    )
    result.assert_outcomes(passed=4)
