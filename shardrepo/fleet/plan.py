"""What is to be done in which order, decided without I/O: stages of tasks, and how many of them may fail."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from itertools import zip_longest
from math import floor, inf
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
        if not 0 <= number < inf or (percent and number > 100) or (not percent and number != int(number)):
            raise ConfigError(
                f"{name} must be a number of databases, like 5, or a part of them, like 2%, not {given!r}"
            )
        return cls(number, percent)

    def out_of(self, total: int) -> int:
        """How many that is of *total*; a part is rounded down."""
        # Exactly: 0.57 % of 10,000 is 57, and by floating point 56.
        return floor(total * Fraction(str(self.number)) / 100) if self.is_percent else int(self.number)

    def __str__(self) -> str:
        return f"{self.number:g}{'%' if self.is_percent else ''}"


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the databases that is done before the next part is begun.

    Attributes:
        size: How many of those that it may take, one where a percentage comes to less; None for all that are left.
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
        facts: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"size": given}
        for name in facts:
            if name not in cls.__slots__:
                raise ConfigError(unknown("attribute of a stage", str(name), cls.__slots__))
        allowed, pause = facts.get("max_failures"), facts.get("pause", 0)
        if not isinstance(pause, int | float) or isinstance(pause, bool) or not 0 <= pause < inf:
            raise ConfigError(f"a stage's pause is a number of seconds, not {pause!r}")
        for name in ("match", "tag"):
            if not isinstance(facts.get(name, "-"), str) or facts.get(name) == "":
                raise ConfigError(f"a stage's {name} is a text, not {facts[name]!r}")
        return cls(
            size=_size(facts.get("size", "rest")),
            max_failures=None if allowed is None else Share.of("max_failures", allowed),
            match=facts.get("match"),
            tag=facts.get("tag"),
            pause=float(pause),
        )

    def admits(self, name: str, tags: frozenset[str]) -> bool:
        """Whether it takes a database of this name with these tags."""
        return (self.match is None or fnmatchcase(name, self.match)) and (self.tag is None or self.tag in tags)


def canary(size: object) -> Stage:
    """A first stage that is to show whether the rest is safe: none of it may fail.

    Raises:
        ConfigError: *size* is none.
    """
    return Stage(size=_size(size), max_failures=Share(0))


def _size(given: object) -> Share | None:
    if given == "rest":
        return None
    size = Share.of("the size of a stage", given)
    if not size.number:
        raise ConfigError(f"a stage of {given!r} has no database: give it one, or leave it out")
    return size


@dataclass(frozen=True, slots=True)
class Task:
    """One database, and where its schema is to go.

    Attributes:
        name: What it is called in reports and journals; no two of a run have the same.
        home: Its home, which what a worker finds by the name has to have too.
        server: Its server, as ``host:port``.
        target: The revision that it is to go to, or several with spaces between them: never a relative one, nor a head
            by that name, so that it means the same the second time, and to whoever has other scripts.
        template: The database's own name if it is a server's template, and no member of the fleet.
        near: The member by which a template's server is found.
        address: Where it was when it was planned, if its home is an id, which it would keep elsewhere.
        tags: What a stage takes it by.
    """

    name: str
    home: str
    server: str
    target: str
    template: str | None = None
    near: str | None = None
    tags: frozenset[str] = field(default=frozenset(), compare=False)
    address: str | None = None

    @property
    def place(self) -> str:
        """Where it is to be done, as ``host:port/name``: nowhere else."""
        return self.address or self.home

    def as_dict(self) -> dict[str, str]:
        """As it stands in a journal."""
        facts = {
            name: getattr(self, name) for name in ("name", "home", "server", "target", "template", "near", "address")
        }
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


class Queue:
    """Tasks that wait for their turn, in their order, and how many of each server have had it and are not done.

    One look at each server finds the next, however many wait.
    """

    def __init__(self, tasks: Iterable[Task], per_server: int) -> None:
        self._per_server = per_server
        self._waiting: dict[str, deque[tuple[int, Task]]] = {}
        self._busy: Counter[str] = Counter()
        for number, task in enumerate(tasks):
            self._waiting.setdefault(task.server, deque()).append((number, task))

    def __bool__(self) -> bool:
        """Whether any wait."""
        return bool(self._waiting)

    def take(self) -> Task | None:
        """The first whose server has a place, which it has from now on; None while no server has one."""
        free = [tasks for server, tasks in self._waiting.items() if self._busy[server] < self._per_server]
        if not free:
            return None
        _, task = min(free, key=lambda tasks: tasks[0][0]).popleft()
        if not self._waiting[task.server]:
            del self._waiting[task.server]
        self._busy[task.server] += 1
        return task

    def leave(self, task: Task) -> None:
        """One that was taken gives its place back."""
        self._busy[task.server] -= 1


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
        purges: Whether it does not matter where a database is that is to be stamped.

    Raises:
        ConfigError: There is no such revision.

    Attributes:
        target: The revisions that it comes to; None for a relative one.
    """

    def __init__(self, scripts: Scripts, move: Work, target: str, *, purges: bool = False) -> None:
        self._scripts = scripts
        self._purges = purges and move == "stamp"
        self._move: Work = move
        self._target = target
        self.target: Revisions | None = None if is_relative(target) else scripts.resolve(target)
        # By name, what a head is: other scripts, a worker's or those of a later day, have others. Not for the way back,
        # where a name may say on which branch.
        self._aim = " ".join(self.target) if self.target and move in ("upgrade", "stamp") else target
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
        if move == "downgrade" and standing == "behind" and scripts.missing(heads, found):
            here = " ".join(found)
            return Verdict(standing, problem=f"it is at {here}, from where no way back leads to {self._target}")
        # A table of versions that is to be emptied may have more in it than where the database is.
        is_due = standing in _DUE[move] or (self._purges and set(found) != set(heads))
        return Verdict(standing, self._aim if is_due else None)


# How a database stands to the target of a work that has something to do there.
_DUE: Final[Mapping[Work, tuple[Standing, ...]]] = {
    "upgrade": ("behind",),
    "downgrade": ("ahead",),
    "stamp": ("behind", "ahead", "unknown"),
    "check": ("at",),
}


def in_rounds(scripts: Scripts, found: Iterable[tuple[Task, Revisions]]) -> list[tuple[str, list[Task]]]:
    """A round for each revision, in the order in which they are run: the tasks of those that are to run it.

    Args:
        scripts: The revision graph.
        found: Tasks of an upgrade, and the revisions that their databases are at.
    """
    rounds: dict[str, list[Task]] = {step.revision.revision: [] for step in scripts.steps("upgrade", "heads", ())}
    # The same few ways, for any number of databases.
    ways: dict[tuple[str, Revisions], list[str]] = {}
    for task, at in found:
        way = ways.get((task.target, at))
        if way is None:
            steps = scripts.steps("upgrade", task.target, at)
            way = ways[task.target, at] = [step.revision.revision for step in steps]
        for revision in way:
            rounds[revision].append(replace(task, target=revision))
    return [(revision, tasks) for revision, tasks in rounds.items() if tasks]
