"""Why migrations run in processes: 48 databases upgraded by Alembic itself in threads of one process.

Eight threads call `alembic.command.upgrade`, each with a database of its own, an engine of its own and an env.py as
`alembic init` writes it, but for the URL. Whatever raised nothing has "said that it is done"; whether it is, its
database says. In a process of its own, which is ended after a minute: some of it may wait for itself.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from .fleet import PLAIN_ENV, REVISION, TABLE
from .ground import Ground
from .measure import Figure, Spread

_DATABASES: Final = 48
_ROUNDS: Final = 3
_SECONDS: Final = 60

_PROGRAM: Final = """
import json, sys, threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor

from alembic import command
from alembic.config import Config

turn = threading.Lock()

def upgrade(url):
    config = Config("alembic.ini", cmd_opts=Namespace(x=[f"url={url}"]))
    try:
        command.upgrade(config, "head")
    except BaseException as error:
        say(url, type(error).__name__)
    else:
        say(url, None)


def say(*told):
    with turn:
        print(json.dumps(told), flush=True)


with ThreadPoolExecutor(8) as threads:
    list(threads.map(upgrade, json.loads(sys.argv[1])))
"""


def run(ground: Ground) -> Iterator[Figure]:
    rounds = [_round(ground) for _ in range(_ROUNDS)]
    for what, number in (("raised an error", 0), ("never ended", 1), ("said that they are done", 2), ("are done", 3)):
        yield Figure(
            f"of {_DATABASES} upgrades in threads, {what}", Spread.of([each[number] for each in rounds]), "databases"
        )


def _round(ground: Ground) -> tuple[int, int, int, int]:
    with ground.databases(_DATABASES) as names, TemporaryDirectory() as folder:
        _write_project(Path(folder))
        said = _run(Path(folder), [ground.url(name).render_as_string(hide_password=False) for name in names])
        errors = sum(error is not None for error in said.values())
        done = sum(_is_done(ground, name) for name in names)
    return errors, _DATABASES - len(said), len(said) - errors, done


def _write_project(root: Path) -> None:
    (root / "alembic.ini").write_text("[alembic]\nscript_location = migrations\npath_separator = os\n")
    (root / "migrations" / "versions").mkdir(parents=True)
    (root / "migrations" / "env.py").write_text(PLAIN_ENV)
    for number in range(3):
        upgrade = TABLE.replace('"users"', f'"made{number}"')
        text = REVISION.format(number=number, down=f"{number - 1:04}" if number else None, upgrade=upgrade)
        (root / "migrations" / "versions" / f"{number:04}.py").write_text(text)


def _run(root: Path, urls: list[str]) -> dict[str, str | None]:
    command = [sys.executable, "-c", _PROGRAM, json.dumps(urls)]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=_SECONDS)
        printed: str | bytes = done.stdout
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
    lines = (printed.decode() if isinstance(printed, bytes) else printed).splitlines()
    return dict(json.loads(line) for line in lines)


def _is_done(ground: Ground, name: str) -> bool:
    with ground.server.connect(name) as connection:
        found = "SELECT count(*) FROM pg_tables WHERE tablename LIKE 'made%'"
        tables = connection.execute(found).fetchone()
        if tables != (3,):
            return False
        return connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0002",)]
