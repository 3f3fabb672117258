"""The revisions of a schema: Alembic's scripts, read once in a process.

Leans on three methods of Alembic's `ScriptDirectory` that only its own commands call, ``_upgrade_revs``,
``_downgrade_revs`` and ``_stamp_revs``: public are just those commands, which read all scripts anew for each database.
``tests/test_private_api.py`` fails when they change.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError

from .errors import ConfigError

Move: TypeAlias = Literal["upgrade", "downgrade", "stamp"]
Standing: TypeAlias = Literal["at", "behind", "ahead", "unknown"]
Revisions: TypeAlias = tuple[str, ...]
AlembicConfig: TypeAlias = Config

# Revisions by which a database may be behind the application's own, so that neither has to change first.
TOLERATED: Final = 1


_RELATIVE: Final = re.compile(r"[+-]\d+$")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a schema's scripts are, as any process can find them.

    Attributes:
        location: A folder, or a package's as ``package:folder``.
        config_file: The ``alembic.ini`` or ``pyproject.toml`` with Alembic's own settings; None for its defaults.
    """

    location: str
    config_file: str | None = None

    def config(self) -> AlembicConfig:
        """A configuration of Alembic's, each time a new one."""
        toml = self.config_file is not None and self.config_file.endswith(".toml")
        config = AlembicConfig(None if toml else self.config_file, self.config_file if toml else None)
        # Its own file may say where they are too; a % would be an interpolation.
        config.set_main_option("script_location", self.location.replace("%", "%%"))
        return config


class Scripts:
    """The revision graph of one source, with all of its scripts loaded. Read-only; pure, but for loading it.

    Raises:
        ConfigError: There are no scripts, or one of them cannot be loaded.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        try:
            self.config = source.config()
            self.directory = ScriptDirectory.from_config(self.config)
            self.heads: Revisions = tuple(sorted(self.directory.get_heads()))
            self._all = self._up_to(self.heads)
        except CommandError as error:
            raise ConfigError(f"no migrations in {source.location!r}: {error}; `shardrepo init` makes some") from error
        except Exception as error:
            raise ConfigError(
                f"a migration in {source.location!r} cannot be loaded: {type(error).__name__}: {error}"
            ) from error
        self.missing = lru_cache(maxsize=1024)(self._missing)

    @classmethod
    def of(cls, source: Source) -> Scripts:
        """Those of *source*, loaded at the first call in this process, whichever thread's that is."""
        with _loading:
            return _loaded(source)

    def resolve(self, target: str) -> Revisions:
        """The revisions that *target* names: ``head``, ``heads``, ``base`` or one, also by its first characters.

        Raises:
            ConfigError: There is none of that name, or several heads where one is meant.
        """
        if not target:
            raise ConfigError("the revision is empty: name one, or `head`")
        if _RELATIVE.search(target):
            raise ConfigError(f"{target!r} is relative to where a database is: name a revision, or `head`")
        try:
            found = self.directory.get_revisions(target)
        except CommandError as error:
            raise ConfigError(
                f"{target!r} names no revision of these migrations: {error}{self._hint(target)}"
            ) from error
        return tuple(sorted(script.revision for script in found if script is not None))

    def _hint(self, target: str) -> str:
        if close := get_close_matches(target, self._all, n=1):
            return f"; did you mean {close[0]!r}?"
        return f" (heads: {', '.join(self.heads)}); name one, or `heads`" if len(self.heads) > 1 else ""

    @property
    def order(self) -> Revisions:
        """All of them, each after those that it needs."""
        return tuple(_revisions(self.steps("upgrade", "heads", ())))

    def path(self, revision: str) -> str:
        """Where the script of *revision* is."""
        script = self.directory.get_revision(revision)
        assert script is not None
        return script.path

    def before(self, revision: str) -> Revisions:
        """Where a database is that has all that *revision* needs, and neither that nor anything else."""
        return tuple(self.steps("upgrade", revision, ())[-1].from_revisions)

    def way_back(self, revision: str) -> str:
        """The target of a downgrade that undoes *revision*, with what needs it, and nothing on other branches."""
        down = self.steps("upgrade", revision, ())[-1].from_revisions_no_deps
        return f"{revision}@{down[0] if down else 'base'}"

    def steps(self, move: Move, target: str, heads: Revisions) -> Sequence[Any]:
        """What takes a database from *heads* to *target*, as Alembic runs it; also relative ones such as ``+1``, and
        several, with spaces between them.

        Raises:
            CommandError: Alembic's, where no way leads there.
        """
        meant: Any = several(target)
        given: Any = heads
        if move == "upgrade":
            return self.directory._upgrade_revs(meant, given)
        if move == "downgrade":
            return self.directory._downgrade_revs(meant, given)
        return self.directory._stamp_revs(meant, given)

    def destination(self, move: Move, target: str, heads: Revisions) -> str:
        """*target* for a database at *heads*: a relative one as the revision that it comes to there, so that it means
        the same however often it is asked for.

        Raises:
            ConfigError: No way leads there, or the revision's name alone would lead further, on other branches too.
        """
        if not is_relative(target):
            return target
        begin = " ".join(heads) or "base"
        try:
            steps = self.steps(move, target, heads)
            ends = steps[-1].to_revisions_no_deps if steps else heads
            end = str(ends[0]) if ends else "base"
            # Where there are branches, the way to a revision by its name may be a longer one.
            agrees = len(ends) < 2 and _revisions(steps) == _revisions(self.steps(move, end, heads))
        except CommandError as error:
            raise ConfigError(f"{move} {target!r} leads nowhere from {begin}: {error}") from error
        if not agrees:
            raise ConfigError(
                f"{move} {target!r} leads from {begin} to {', '.join(ends) or 'base'} on one branch of several: name "
                "the revision instead, with its branch, as in branch@revision"
            )
        return end

    def standing(self, found: Revisions, target: Revisions) -> Standing:
        """How a database that is at *found* stands to *target*."""
        if any(not self.knows(revision) for revision in found):
            return "unknown"
        if self.missing(found, target):
            return "behind"
        return "ahead" if self.missing(target, found) else "at"

    def lacking(self, found: Revisions) -> int:
        """How many revisions a database at *found* lacks to be used by the application that has these scripts; 0 for no
        more than `TOLERATED`, and where it is at a newer one that they do not know.
        """
        missing = 0 if self.standing(found, self.heads) == "unknown" else self.missing(found, self.heads)
        return missing if missing > TOLERATED else 0

    def knows(self, revision: str) -> bool:
        """Whether there is a script of exactly that revision."""
        return revision in self._all

    def _missing(self, found: Revisions, target: Revisions) -> int:
        """How many revisions a database at *found* lacks to have all that *target* has."""
        return len(self._up_to(target) - self._up_to(found))

    def _up_to(self, revisions: Revisions) -> set[str]:
        # One by one: Alembic takes no revision beside another that depends on it.
        return {
            script.revision for revision in revisions for script in self.directory.iterate_revisions(revision, "base")
        }


def _revisions(steps: Sequence[Any]) -> list[str]:
    """What *steps* run, in their order."""
    return [step.revision.revision for step in steps]


# Held while scripts are read, which is done once for all who need them. Reentrant because the collector may run a
# finaliser under it that uses a verb.
_loading = threading.RLock()


def _after_fork() -> None:
    # Another thread of the parent's may have held it.
    global _loading
    _loading = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)


def several(target: str) -> str | Revisions:
    """*target* as Alembic takes it: a tuple, where it is several."""
    names = tuple(target.split())
    return names if len(names) > 1 else target


def is_relative(target: str) -> bool:
    """Whether *target* is reckoned from where a database is, as ``+1`` is, or from another revision."""
    return _RELATIVE.search(target) is not None


@lru_cache(maxsize=16)
def _loaded(source: Source) -> Scripts:
    return Scripts(source)


def forget() -> None:
    """Read all scripts anew when they are next asked for: there is a new one."""
    _loaded.cache_clear()


def location_of(given: str) -> str:
    """*given*, a folder as an absolute path, so that it means the same in every process."""
    return given if ":" in given else str(Path(given).absolute())
