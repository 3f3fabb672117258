"""A project as its users have it, in a folder of its own: a module with a repo and models, scripts, databases."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from shardrepo import Repo
from shardrepo.scripts import Source, forget
from shardrepo.testing.servers import Server, Servers

from ..conftest import run_sql

MODULE = """
import json
from pathlib import Path

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from shardrepo import Repo
from shardrepo.directory import Servers


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


SERVERS = {servers!r}

WRITTEN = Path(__file__).with_name("directory.json")
DIRECTORY = json.loads(WRITTEN.read_text()) if WRITTEN.exists() else Servers(SERVERS, like={like!r})

CONFIG = {{"url": {url!r}, "directory": DIRECTORY, "application_name": {name!r}, **{config!r}}}


class MyRepo(Repo, config=CONFIG):
    pass
"""

ENV = """
from {module} import Base, MyRepo
from shardrepo.fleet import env

env.run(MyRepo, Base.metadata)
"""

SCRIPT = '''
"""{message}"""
import sqlalchemy as sa
from alembic import op

revision = {revision!r}
down_revision = {down!r}
branch_labels = None
depends_on = {depends_on!r}


def upgrade():
    {upgrade}


def downgrade():
    {downgrade}
'''

USERS = """op.create_table(
    "users",
    sa.Column("id", sa.Integer(), primary_key=True),
    sa.Column("name", sa.String(), nullable=False),
)"""

AGE = 'op.add_column("users", sa.Column("age", sa.Integer()))'

_numbers = itertools.count(1)


@dataclass
class Project:
    """One project; its databases' names begin with its prefix.

    Attributes:
        root: Its folder, which modules can be imported from.
        module: The module with ``Base``, ``User`` and ``MyRepo``.
        names: The databases that it was made with.
        where: On which server each of them is.
    """

    root: Path
    module: str
    prefix: str
    servers: Sequence[Server]
    names: list[str] = field(default_factory=list)
    where: dict[str, Server] = field(default_factory=dict)

    @cached_property
    def repo(self) -> type[Repo]:
        """``MyRepo``, imported when it is first asked for."""
        repo: type[Repo] = importlib.import_module(self.module).MyRepo
        return repo

    def write_directory(self, **facts: dict[str, Any]) -> None:
        """Have the directory written down, in place of asking the servers; *facts* are of databases, by name."""
        places = {
            name: {"host": server.host, "port": server.port, **facts.get(name, {})}
            for name, server in self.where.items()
        }
        (self.root / "directory.json").write_text(json.dumps(places))

    @property
    def source(self) -> Source:
        """Its scripts."""
        return Source(str(self.root / "migrations"))

    @property
    def path(self) -> str:
        """How the command is told of its repo."""
        return f"{self.module}:MyRepo"

    def add(self, count: int, on: Server | None = None) -> list[str]:
        """Make empty databases: on one server, else on all by turns."""
        first = len(self.where)
        names = [f"{self.prefix}{number:04d}" for number in range(first, first + count)]
        for number, name in enumerate(names):
            self.where[name] = on or self.servers[number % len(self.servers)]
        for server in self.servers:
            if mine := [name for name in names if self.where[name] is server]:
                server.create_databases(mine)
        self.names += names
        return names

    def revise(
        self,
        revision: str,
        down: str | tuple[str, ...] | None,
        upgrade: str = "pass",
        downgrade: str = "pass",
        depends_on: str | None = None,
    ) -> None:
        """Write a script; several statements stand on lines of their own."""
        text = SCRIPT.format(
            message=f"revision {revision}",
            revision=revision,
            down=down,
            upgrade=upgrade.replace("\n", "\n    "),
            downgrade=downgrade.replace("\n", "\n    "),
            depends_on=depends_on,
        )
        (self.root / "migrations" / "versions" / f"{revision}.py").write_text(text)
        forget()

    def write_env(self, text: str) -> None:
        """Give it another env.py."""
        (self.root / "migrations" / "env.py").write_text(text)

    def sql(self, name: str, statement: str) -> list[tuple[Any, ...]]:
        """Run SQL in one of its databases, past the repo."""
        return run_sql(self.where[name], name, statement)

    def revision(self, name: str) -> list[str]:
        """Where a database is, by its own word; [] where it never was migrated."""
        if not self.sql(name, "SELECT 1 FROM pg_tables WHERE tablename = 'alembic_version'"):
            return []
        return sorted(each for (each,) in self.sql(name, "SELECT version_num FROM alembic_version"))

    def revisions(self) -> dict[str, list[str]]:
        """Where all of them are."""
        return {name: self.revision(name) for name in self.names}

    def all_at(self, *revisions: str) -> dict[str, list[str]]:
        """What `revisions` gives when all of them are at *revisions*."""
        return {name: list(revisions) for name in self.names}

    def run(self, *arguments: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
        """Run the command in its folder."""
        # But for what old versions of others warn of, new ones of what they use being there.
        warnings = ("-W", "error", "-W", "ignore::DeprecationWarning")
        command = [sys.executable, *warnings, "-m", "shardrepo", *arguments]
        return subprocess.run(
            command,
            cwd=self.root,
            env={**os.environ, **environ},
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    def refused(self, *arguments: str, **environ: str) -> str:
        """What the command says that refuses *arguments*: it exits with 2, and prints nothing else."""
        done = self.run(*arguments, **environ)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert done.stderr.startswith("shardrepo: ")
        return done.stderr

    def configure(self, **settings: Any) -> None:
        """Write its pyproject.toml: the repo, and other settings, none of them a table."""
        lines = [f"{name} = {json.dumps(value)}" for name, value in {"repo": self.path, **settings}.items()]
        (self.root / "pyproject.toml").write_text("\n".join(["[tool.shardrepo]", *lines, ""]))

    def home(self, name: str) -> str:
        """The home of a database."""
        server = self.where[name]
        return f"{server.host}:{server.port}/{name}"


@pytest.fixture
def make_project(
    tmp_path_factory: pytest.TempPathFactory, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Project]]:
    """Make projects; their databases are dropped after the test."""
    made: list[Project] = []

    def make(count: int = 0, on: Sequence[Server] = (), **config: Any) -> Project:
        number = next(_numbers)
        root = tmp_path_factory.mktemp("project")
        used = list(on or servers)
        prefix = f"f{number}x{os.getpid()}x"
        module = f"fleet_app_{number}_{os.getpid()}"
        addresses = [
            {"host": server.host, "port": server.port, "username": server.username, "password": server.password}
            for server in used
        ]
        (root / f"{module}.py").write_text(
            MODULE.format(
                servers=addresses,
                url=used[0].url("postgres").render_as_string(hide_password=False),
                like=f"{prefix}%",
                name=f"fleet{number}",
                config=config,
            )
        )
        (root / "migrations" / "versions").mkdir(parents=True)
        project = Project(root, module, prefix, used)
        project.write_env(ENV.format(module=module))
        monkeypatch.syspath_prepend(str(root))
        project.add(count)
        made.append(project)
        return project

    yield make
    for project in made:
        if "repo" in vars(project):
            project.repo.dispose()
        for server in project.servers:
            for name in server.databases() if server.running else ():
                if name.startswith(project.prefix):
                    server.drop_database(name, force=True)


@pytest.fixture
def project(make_project: Callable[..., Project]) -> Project:
    """A project of six databases on three servers, with a first revision that makes the table of its models."""
    project = make_project(6)
    project.revise("0001", None, USERS, 'op.drop_table("users")')
    return project


@pytest.fixture
def configured(project: Project) -> Project:
    """The project with its pyproject.toml."""
    project.configure()
    return project
