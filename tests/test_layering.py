"""Imports go downwards, and importing the package loads nothing that only some of its users need."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import shardrepo

PACKAGE = Path(shardrepo.__file__).parent

# From the bottom to the top. What stands on one line does not import each other.
LAYERS = [
    {"errors", "stats", "breaker", "callsite"},
    {"calls", "constraints", "scripts", "levels"},
    {"log"},
    {"entries"},
    {"database", "places"},
    {"transaction", "directory"},
    {"config", "context", "scram", "ledger", "listeners", "connection", "diagnosis"},
    {"checks", "across"},
    {"driver", "boxed"},
    {"pool"},
    {"housekeeper", "pinned", "box"},
    {"sandbox"},
    {"session"},
    {"engines"},
    {"destination"},
    {"conflicts"},
    {"reading", "writing"},
    {"returning"},
    {"reloading", "inserting", "bulk", "plans", "catalog"},
    {"databases"},
    {"router"},
    {"visiting"},
    {"repo"},
    {"event"},
    {"__init__"},
    {"fleet"},
    {"testing"},
    {"demo", "pytest_plugin"},
    {"cli"},
    {"__main__"},
]

# Imports against the order, for annotations only: an error names the type of a fact that it carries.
FOR_TYPES = {("errors", "database"), ("errors", "directory"), ("log", "repo")}

# The modules that may load what stands behind them; nothing else may, at import or later.
OWNERS = {
    "psycopg": {"box", "boxed", "catalog", "connection", "diagnosis", "driver", "testing"},
    "alembic": {"fleet", "scripts"},
    "pytest": {"pytest_plugin", "testing"},
    "factory": {"testing"},
}

LATER = (
    "alembic",
    "pytest",
    "typer",
    "rich",
    "matplotlib",
    "hypothesis",
    "factory",
    "psycopg",
    "psycopg_binary",
    "multiprocessing",
)


def sources() -> dict[str, list[Path]]:
    """The files of each module or subpackage of the package."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).with_suffix("").parts[0], []).append(path)
    return found


def imports(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """The full names of all that a file imports, in functions too; without those for type checking if asked."""
    package = ["shardrepo", *path.relative_to(PACKAGE).parent.parts]
    tree = ast.parse(path.read_text(), path)
    hidden = set() if for_types else {each for block in type_checking(tree) for each in ast.walk(block)}
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += [node.module] if node.module else []
            yield from (".".join([*base, alias.name]) for alias in node.names)


def type_checking(tree: ast.AST) -> Iterator[ast.stmt]:
    """The statements that only a type checker runs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from node.body


def layer_of(module: str) -> int:
    """How high a module stands."""
    (layer,) = (number for number, modules in enumerate(LAYERS) if module in modules)
    return layer


def siblings(module: str, *, for_types: bool = True) -> Iterator[str]:
    """The modules of the package that *module* imports."""
    for path in sources()[module]:
        for name in imports(path, for_types=for_types):
            if name.split(".")[0] == "shardrepo":
                part = name.split(".")[1]
                yield part if part in sources() else "__init__"


@pytest.mark.parametrize("module", sources())
def test_every_module_has_a_layer(module: str) -> None:
    """A new module is given its place before it is merged."""
    assert sum(module in modules for modules in LAYERS) == 1


@pytest.mark.parametrize("module", sources())
def test_imports_go_downwards(module: str) -> None:
    """A module imports what stands below it, nothing beside or above it, also inside its functions."""
    upwards = {other for other in siblings(module) if other != module and layer_of(other) >= layer_of(module)}
    assert {(module, other) for other in upwards} <= FOR_TYPES


@pytest.mark.parametrize(("module", "other"), FOR_TYPES)
def test_an_exception_for_types_is_no_import(module: str, other: str) -> None:
    """What is allowed against the order is there, and for the type checker only."""
    assert other in set(siblings(module))
    assert other not in set(siblings(module, for_types=False))


@pytest.mark.parametrize(("package", "owners"), OWNERS.items())
def test_only_its_owner_knows_a_package(package: str, owners: set[str]) -> None:
    """The driver, the migrations and the test runner are each known to one place."""
    users = {
        module
        for module, paths in sources().items()
        for path in paths
        if any(name.split(".")[0] == package for name in imports(path))
    }
    assert users <= owners


def test_the_imports_are_found() -> None:
    """The test sees what it is about: a relative import, one for type checking, and one in a function."""
    assert {"errors", "config", "ledger", "driver"} <= set(siblings("engines"))
    assert "stats" in set(siblings("ledger"))
    assert {"psycopg.pq", "psycopg"} & set(imports(PACKAGE / "driver.py"))


def test_importing_the_package_loads_nothing_else() -> None:
    """`import shardrepo`, and defining a repo, load no driver, migrations, test runner or terminal library."""
    program = (
        "import sys; from shardrepo import Repo; Repo.__subclasses__(); "
        "App = type('App', (Repo,), {}, config='postgresql://db01/app'); App.set_database('x'); App.get_database(); "
        f"print(*[name for name in {LATER!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr, done.returncode) == ([], "", 0)
