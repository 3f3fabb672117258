"""What is to be done in which order, decided without I/O: stages of tasks, and how many of them may fail."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import zip_longest
from math import floor
from typing import Any, Final, Literal, Self, TypeAlias

from ..errors import ConfigError, unknown
from ..scripts import Move, Revisions, Scripts, Standing, is_relative

# What is done in a database: Alembic's own words.
Work: TypeAlias = Move | Literal["check"]


@dataclass(frozen=True, slots=True)
class Share:
    """A number of databases, or a part of them.

    Attributes:
        number: How many, or how many per cent.
        is_percent: Which of the two.
    """

    number: float
    is_percent: bool = False

    @classmethod
    def of(cls, name: str, given: object) -> Self:
        """Read ``5`` or ``2%``; errors call it by *name*.

        Raises:
            ConfigError: It is neither.
        """
        text = str(given).strip()
        try:
            number = float(text.removesuffix("%"))
        except ValueError:
            number = -1.0
        percent = text.endswith("%")
        if not 0 <= number < float("inf") or (percent and number > 100) or (not percent and number != int(number)):
            raise ConfigError(
                f"{name} must be a number of databases, like 5, or a part of them, like 2%, not {given!r}"
            )
        return cls(number, percent)

    def out_of(self, total: int) -> int:
        """How many that is of *total*; a part is rounded down."""
        return floor(total * self.number / 100) if self.is_percent else int(self.number)

    def __str__(self) -> str:
        return f"{self.number:g}{'%' if self.is_percent else ''}"


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the databases that is done before the next part is begun.

    Attributes:
        size: How many of those that it may take, at least one; None for all that are left.
        max_failures: How many of them may fail; None for what holds of the whole run.
        match: Only those whose names fit this pattern.
        tag: Only those that have this tag.
        pause: Seconds to wait after it.
    """

    size: Share | None = None
    max_failures: Share | None = None
    match: str | None = None
    tag: str | None = None
    pause: float = 0.0

    @classmethod
    def of(cls, given: object) -> Self:
        """Read a size (``1``, ``10%``, ``rest``), or a mapping of attributes as it stands in ``pyproject.toml``.

        Raises:
            ConfigError: It is neither, or one of the attributes is wrong.
        """
        facts: dict[str, Any] = dict(given) if isinstance(given, dict) else {"size": given}
        for name in facts:
            if name not in cls.__slots__:
                raise ConfigError(unknown("attribute of a stage", str(name), cls.__slots__))
        size, allowed, pause = facts.get("size", "rest"), facts.get("max_failures"), facts.get("pause", 0)
        if not isinstance(pause, int | float) or isinstance(pause, bool) or pause < 0:
            raise ConfigError(f"a stage's pause is a number of seconds, not {pause!r}")
        return cls(
            size=None if size == "rest" else Share.of("the size of a stage", size),
            max_failures=None if allowed is None else Share.of("max_failures", allowed),
            match=facts.get("match"),
            tag=facts.get("tag"),
            pause=float(pause),
        )

    def admits(self, name: str, tags: frozenset[str]) -> bool:
        """Whether it takes a database of this name with these tags."""
        return (self.match is None or fnmatchcase(name, self.match)) and (self.tag is None or self.tag in tags)


NONE: Final = Share(0)


def canary(size: object) -> Stage:
    """A first stage that is to show whether the rest is safe: none of it may fail."""
    return Stage(size=Share.of("the canary's size", size), max_failures=NONE)


@dataclass(frozen=True, slots=True)
class Task:
    """One database, and where its schema is to go.

    Attributes:
        name: What it is called in reports and journals; no two of a run have the same.
        home: Its home, which what a worker finds by the name has to have too.
        server: Its server, as ``host:port``.
        target: The revision that it is to go to: never a relative one, so that it means the same the second time.
        template: The database's own name if it is a server's template, and no member of the fleet.
        near: The member by which a template's server is found.
        tags: What a stage takes it by.
    """

    name: str
    home: str
    server: str
    target: str
    template: str | None = None
    near: str | None = None
    tags: frozenset[str] = field(default=frozenset(), compare=False)

    def as_dict(self) -> dict[str, str]:
        """As it stands in a journal."""
        facts = {name: getattr(self, name) for name in ("name", "home", "server", "target", "template", "near")}
        return {name: value for name, value in facts.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Part:
    """The tasks of one stage, and how many of them may fail; None for what holds of the whole run."""

    tasks: Sequence[Task]
    max_failures: int | None = None
    pause: float = 0.0
    title: str = ""


def staged(tasks: Sequence[Task], stages: Sequence[Stage]) -> list[Part]:
    """Deal *tasks* out to *stages*, in their order; what no stage takes is one more at the end. Loses none.

    A percentage is of all tasks. Within a stage, servers take turns.
    """
    left = list(tasks)
    parts = []
    for number, stage in enumerate([*stages, Stage()], 1):
        admitted = [task for task in left if stage.admits(task.name, task.tags)]
        size = len(admitted) if stage.size is None else max(1, stage.size.out_of(len(tasks)))
        taken = by_turns(admitted)[:size]
        if not taken:
            continue
        names = {task.name for task in taken}
        left = [task for task in left if task.name not in names]
        allowed = None if stage.max_failures is None else stage.max_failures.out_of(len(taken))
        parts.append(Part(taken, allowed, stage.pause, f"stage {number}"))
    return parts


def by_turns(tasks: Iterable[Task]) -> list[Task]:
    """*tasks*, one of each server after the other."""
    queues: dict[str, list[Task]] = {}
    for task in tasks:
        queues.setdefault(task.server, []).append(task)
    return [task for turn in zip_longest(*queues.values()) for task in turn if task is not None]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What an operation has to do in one database.

    Attributes:
        standing: How it stands to the target.
        target: The revision that it is to go to; None if there is nothing to do.
        problem: Why nothing can be done.
    """

    standing: Standing
    target: str | None = None
    problem: str | None = None


class Judge:
    """Says what is to be done in a database by the revisions that it is at, which are the same for most.

    Args:
        scripts: The revision graph.
        move: What is to be done.
        target: Where to, as it was asked for.
        purges: Whether it does not matter where a database is.

    Raises:
        ConfigError: There is no such revision.
    """

    def __init__(self, scripts: Scripts, move: Work, target: str, *, purges: bool = False) -> None:
        self._scripts = scripts
        self._purges = purges
        self._move: Work = move
        self._target = target
        self.target: Revisions | None = None if is_relative(target) else scripts.resolve(target)
        self._known: dict[Revisions, Verdict] = {}

    def judge(self, found: Revisions) -> Verdict:
        """What is to be done in a database at *found*."""
        verdict = self._known.get(found)
        if verdict is None:
            verdict = self._known[found] = self._judged(found)
        return verdict

    def _judged(self, found: Revisions) -> Verdict:
        scripts, move = self._scripts, self._move
        heads = self.target if self.target is not None else scripts.heads
        standing = scripts.standing(found, heads)
        if standing == "unknown" and not self._purges:
            missing = ", ".join(each for each in found if not scripts.knows(each))
            return Verdict(standing, problem=f"it is at revision {missing}, of which these migrations have no script")
        if self.target is None and move != "check":
            try:
                return Verdict(standing, scripts.destination(move, self._target, found))
            except ConfigError as error:
                return Verdict(standing, problem=str(error))
        if move == "check" and standing != "at":
            return Verdict(standing, problem="it is not at head, where alone it can be compared with the models")
        return Verdict(standing, self._target if standing in _DUE[move] else None)


# How a database stands to the target of a work that has something to do there.
_DUE: Final[Mapping[Work, tuple[Standing, ...]]] = {
    "upgrade": ("behind",),
    "downgrade": ("ahead",),
    "stamp": ("behind", "ahead", "unknown"),
    "check": ("at",),
}


def in_rounds(scripts: Scripts, target: str, found: Sequence[tuple[Task, Revisions]]) -> list[tuple[str, list[Task]]]:
    """A round for each revision up to *target*, in the order in which they are run: the tasks of those that lack it."""
    rounds = []
    for step in scripts.steps("upgrade", target, ()):
        revision = step.revision.revision
        behind = [replace(task, target=revision) for task, at in found if scripts.missing(at, (revision,))]
        if behind:
            rounds.append((revision, behind))
    return rounds
