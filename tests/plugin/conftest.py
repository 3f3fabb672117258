"""A project that tests itself with the plugin, on the servers of the outer run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from textwrap import dedent
from typing import TypeAlias

import pytest

from shardrepo.testing.servers import Server

APP = """
    import os
    from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
    from shardrepo import Repo

    class Base(DeclarativeBase):
        pass

    class Note(Base):
        __tablename__ = "notes"
        id: Mapped[int] = mapped_column(primary_key=True)
        text: Mapped[str]

    class MyRepo(Repo, config=lambda: os.environ["DATABASE_URL"]):
        pass
"""

INI = """
    [pytest]
    pythonpath = .
    addopts =
        -p no:randomly -p no:faker -p no:hypothesispytest -p no:timeout -p no:pytest_alembic
        --strict-markers --strict-config
    filterwarnings = error
    shardrepo_repo = app:MyRepo
    shardrepo_metadata = app:Base.metadata
"""


class Project:
    """A folder with an application, ``app.py``, its ini file, and its tests."""

    def __init__(self, pytester: pytest.Pytester, server: Server) -> None:
        self.pytester = pytester
        self.server = server
        pytester.makepyfile(app=dedent(APP))
        self.configure("")

    def configure(self, ini: str, base: str = INI) -> None:
        """Write the ini file: *base*, and the lines of *ini*."""
        self.pytester.makeini(dedent(base) + dedent(ini))

    def run(self, tests: str, *flags: str, given: bool = True, process: bool = False) -> pytest.RunResult:
        """Run *tests* on the outer servers if *given*, in a process of its own if asked. No password is shown."""
        self.pytester.makepyfile(test_app="import pytest\nfrom app import MyRepo, Note\n" + dedent(tests))
        if given:
            flags = (f"--shardrepo-url={self.url}", *flags)
        run = self.pytester.runpytest_subprocess if process else self.pytester.runpytest_inprocess
        result = run(*flags)
        assert self.server.password not in result.stdout.str() + result.stderr.str()
        return result

    @property
    def url(self) -> str:
        """The URL of the outer server, with its password."""
        return url_of(self.server)


Run: TypeAlias = Callable[..., pytest.RunResult]


def url_of(server: Server) -> str:
    """The server's URL as a text, with its password."""
    return server.url().render_as_string(hide_password=False)


@pytest.fixture
def project(pytester: pytest.Pytester, server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """An application whose tests use the plugin; they leave no database behind."""
    for variable in ("SHARDREPO_URL", "DATABASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    before = server.databases()
    yield Project(pytester, server)
    assert server.databases() == before
