"""What a run has set out to do and what has become of it, on disk: a line of JSON for each fact, none ever changed.

One is written before a task is begun and one after it has ended, so that a run that was killed can be taken up again.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from ..across import Outcome
from ..errors import ConfigError
from .lines import line
from .outcomes import Failure, Migration
from .plan import Part, Task

_SUFFIX: Final = ".jsonl"

# In place of a part's number, of what could not be planned.
_UNPLANNED: Final = -1


@dataclass(slots=True)
class Account:
    """What a journal tells of a run.

    Attributes:
        head: What it was asked for.
        parts: What it set out to do.
        outcomes: The last outcome of each task, by the number of its part and its name, the newest last. What could
            not even be planned, and has not been since, has -1 for a part.
        is_planned: Whether it came as far as to have a plan.
    """

    head: Mapping[str, Any]
    parts: list[Part] = field(default_factory=list)
    outcomes: dict[tuple[int, str], Outcome[Migration]] = field(default_factory=dict)
    is_planned: bool = False
    _drafts: list[tuple[Mapping[str, Any], list[Task]]] = field(default_factory=list)

    def take(self, fact: Mapping[str, Any]) -> None:
        """Take note of a line, the next one.

        Raises:
            KeyError, IndexError, TypeError, ValueError: It is none that a journal has.
        """
        match fact:
            case {"part": Mapping() as part}:
                self._drafts.append((part, []))
            case {"task": task}:
                self._drafts[-1][1].append(Task(**task))
            case {"planned": _}:
                self._accept_drafts()
            case {"resumed": _}:
                # What was being planned when the run was killed, nothing of which was begun.
                self._drafts = []
            case {"begun": _}:
                pass
            case {"ended": name, "part": number}:
                self.outcomes.pop((number, name), None)
                self.outcomes[number, name] = _outcome(fact)
            case _:
                raise KeyError(*fact)

    def _accept_drafts(self) -> None:
        self.is_planned = True
        for facts, tasks in self._drafts:
            self.parts.append(Part(tasks, **facts))
            for task in tasks:
                self.outcomes.pop((_UNPLANNED, task.name), None)
        self._drafts = []

    def left(self) -> list[Part]:
        """What is still to be done: what has failed, what was begun and never ended, and what was not begun.

        As many parts as there were, so that they keep their numbers.

        Raises:
            ConfigError: The run has no plan.
        """
        if not self.is_planned:
            raise ConfigError("the run ended before it had a plan, and has done nothing: begin a new one")
        return [
            replace(part, tasks=[task for task in part.tasks if not self._is_done(number, task)])
            for number, part in enumerate(self.parts)
        ]

    def _is_done(self, part: int, task: Task) -> bool:
        outcome = self.outcomes.get((part, task.name))
        return outcome is not None and outcome.ok

    @property
    def names(self) -> set[str]:
        """The members that it has planned for, or tried to."""
        planned = {task.name for part in self.parts for task in part.tasks if task.template is None}
        return planned | set(self.refused)

    @property
    def refused(self) -> list[str]:
        """The members that could not be planned for."""
        return [name for number, name in self.outcomes if number == _UNPLANNED]

    @property
    def failed(self) -> list[str]:
        """The members whose last outcome is a failure."""
        last = {name: outcome for (_, name), outcome in self.outcomes.items()}
        templates = {task.name for part in self.parts for task in part.tasks if task.template is not None}
        return [name for name, outcome in last.items() if not outcome.ok and name not in templates]


class Journal:
    """The journal of one run, which only one process at a time writes.

    Attributes:
        run: What the run is called, and its file is.
        is_empty: Whether it tells of nothing that was to be done, and will be removed.
    """

    def __init__(self, path: Path, file: IO[str], *, is_new: bool = True) -> None:
        self.run = path.name.removesuffix(_SUFFIX)
        self._path = path
        self._file = file
        self.is_empty = is_new

    @classmethod
    def begin(cls, folder: Path, work: str, head: Mapping[str, Any]) -> Self:
        """Begin a new one in *folder*, which is made. Its name begins with the time, in UTC, as `runs` sorts by it.

        Raises:
            ConfigError: It cannot be written there.
        """
        path = folder / f"{datetime.now(UTC):%Y%m%d-%H%M%S-%f}-{work}-{secrets.token_hex(2)}{_SUFFIX}"
        try:
            _make(folder)
            # Its owner's alone: what a server says of a row that it refuses has its values, and -x may be a secret.
            path.touch(mode=0o600, exist_ok=False)
            journal = cls(path, _locked(path))
            journal._first(head=dict(head))
        except OSError as error:
            raise ConfigError(
                f"no journal can be written to {folder}: {error.strerror or error}; nothing was done. Name another "
                "folder"
            ) from error
        return journal

    @classmethod
    def go_on(cls, folder: Path, run: str) -> Self:
        """Go on with that of *run*.

        Raises:
            ConfigError: There is none, it cannot be written, or the run is still under way.
        """
        path = _path(folder, run)
        try:
            journal = cls(path, _locked(path), is_new=False)
            journal._first(resumed=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}")
        except BlockingIOError as error:
            raise ConfigError(f"run {path.stem} is under way in another process: let it end, or stop it") from error
        except OSError as error:
            raise ConfigError(f"the journal {path} cannot be written: {error.strerror or error}") from error
        return journal

    def _first(self, **facts: Any) -> None:
        """Note the first fact of this process; the journal is closed when that fails."""
        try:
            # What another process was writing when it was killed may have no end.
            self._file.write("" if self.is_empty or _ends_with_a_line(self._path) else "\n")
            self._write(facts)
        except OSError:
            self.close()
            raise

    def _write(self, *facts: Mapping[str, Any]) -> None:
        self._file.writelines(json.dumps(fact, separators=(",", ":")) + "\n" for fact in facts)
        self._file.flush()

    def _note(self, **facts: Any) -> None:
        self.is_empty = False
        self._write(facts)

    def plan(self, parts: Sequence[Part]) -> None:
        """Note what is to be done, beside what is noted already. It counts when this returns, and not in part.

        Raises:
            OSError, ValueError: It cannot be written, or the journal is closed; so with everything that is noted.
        """
        self.is_empty = self.is_empty and not parts
        for part in parts:
            facts = {"max_failures": part.max_failures, "pause": part.pause, "title": part.title}
            self._write({"part": facts}, *({"task": task.as_dict()} for task in part.tasks))
        self._write({"planned": len(parts)})

    def begun(self, part: int, task: Task) -> None:
        """Note that a task is begun; it is out of this process when this returns, whatever becomes of that."""
        self._note(begun=task.name, part=part)

    def ended(self, part: int, outcome: Outcome[Migration]) -> None:
        """Note what has become of one."""
        facts: dict[str, Any] = {"home": outcome.home, "seconds": round(outcome.seconds, 4)}
        if outcome.error is not None:
            facts["error"] = Failure.of(outcome.error).as_dict()
        else:
            facts |= asdict(outcome.result())
        self._note(ended=outcome.name, part=part, **facts)

    def refused(self, outcome: Outcome[Migration]) -> None:
        """Note a database that cannot be planned for, and why."""
        self.ended(_UNPLANNED, outcome)

    def close(self) -> None:
        """Let others have it; one that tells of nothing is removed."""
        # What could not be written was told when it was noted.
        with suppress(OSError):
            self._file.close()
        if self.is_empty:
            with suppress(OSError):
                self._path.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read(folder: Path, run: str) -> Account:
    """What the journal of *run* tells, or of the newest, where that is "last".

    Raises:
        ConfigError: There is none, or it is none.
    """
    path = _path(folder, run)
    facts = _facts(path)
    try:
        account = Account(next(facts)["head"])
    except (StopIteration, KeyError):
        raise ConfigError(f"{path} is no journal of a run: name one of {folder}") from None
    for fact in facts:
        try:
            account.take(fact)
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ConfigError(f"{path} has a line that is not understood, {line(fact, 80)}: {error!r}") from error
    return account


def runs(folder: Path) -> list[str]:
    """The names of all runs, the newest last; none where there is no such folder."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []


def _make(folder: Path) -> None:
    """Make *folder* unless it is there, as one that is not for version control."""
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".gitignore").write_text("*\n", encoding="utf-8")


def _path(folder: Path, run: str) -> Path:
    known = runs(folder)
    found = known[-1] if run == "last" and known else run
    if found not in known:
        last = f"; the last one is {known[-1]}" if known else ": there are none"
        raise ConfigError(f"no run {run!r} in {folder}{last}")
    return folder / f"{found}{_SUFFIX}"


def _locked(path: Path) -> IO[str]:
    file: IO[str] = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def _ends_with_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _facts(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for text in file:
                fact = _fact(text)
                if fact is not None:
                    yield fact
    except OSError as error:
        raise ConfigError(f"the journal {path} cannot be read: {error.strerror or error}") from error


def _fact(text: str) -> dict[str, Any] | None:
    """What a line says; None for the beginning of one that was being written when its process was killed."""
    try:
        fact = json.loads(text)
    except ValueError:
        return None
    return fact if isinstance(fact, dict) else None


def _outcome(fact: Mapping[str, Any]) -> Outcome[Migration]:
    error = value = None
    if "error" in fact:
        error = Failure.from_dict(fact["error"])
    else:
        value = Migration(tuple(fact["before"]), tuple(fact["after"]), fact["attempts"], tuple(fact["drift"]))
    return Outcome(fact["ended"], fact["home"], fact["seconds"], value, error)
