"""What a run has set out to do and what has become of it, on disk: a line of JSON for each fact, none ever changed.

One is written before a task is begun and one after it has ended, so that a run that was killed can be taken up again.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

from ..across import Outcome
from ..errors import ConfigError
from .outcomes import Failure, Migration
from .plan import Part, Task

_SUFFIX: Final = ".jsonl"


@dataclass(slots=True)
class Account:
    """What a journal tells of a run.

    Attributes:
        head: What it was asked for.
        parts: What it set out to do.
        outcomes: The last outcome of each task, by the number of its part and its name.
    """

    head: Mapping[str, Any]
    parts: list[Part] = field(default_factory=list)
    outcomes: dict[tuple[int, str], Outcome[Migration]] = field(default_factory=dict)

    def left(self) -> list[Part]:
        """What is still to be done: what has failed, what was begun and never ended, and what was not begun."""
        return [
            Part(
                [task for task in part.tasks if not ((done := self.outcomes.get((number, task.name))) and done.ok)],
                part.max_failures,
                part.pause,
                part.title,
            )
            for number, part in enumerate(self.parts)
        ]

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
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self.run = path.name.removesuffix(_SUFFIX)
        self._path = path
        self._file = file
        self._is_empty = True

    @classmethod
    def begin(cls, folder: Path, work: str, head: Mapping[str, Any]) -> Self:
        """Begin a new one in *folder*, which is made.

        Raises:
            ConfigError: It cannot be written there.
        """
        run = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{work}-{secrets.token_hex(2)}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{run}{_SUFFIX}"
            journal = cls(path, _opened(path, "x"))
            journal.write(head=dict(head))
        except OSError as error:
            raise ConfigError(
                f"no journal can be written to {folder}: {error.strerror}; nothing was done. Name another folder"
            ) from error
        return journal

    @classmethod
    def go_on(cls, folder: Path, run: str) -> Self:
        """Go on with that of *run*.

        Raises:
            ConfigError: There is none, or the run is still under way.
        """
        path = _path(folder, run)
        try:
            journal = cls(path, _opened(path, "a"))
        except BlockingIOError as error:
            raise ConfigError(f"run {path.stem} is under way in another process: let it end, or stop it") from error
        except OSError as error:
            raise ConfigError(f"the journal {path} cannot be written: {error.strerror}") from error
        journal._is_empty = False
        return journal

    def write(self, **facts: Any) -> None:
        """Note a fact; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(facts, separators=(",", ":")) + "\n")
        self._file.flush()
        self._is_empty = self._is_empty and "head" in facts

    def plan(self, parts: Sequence[Part]) -> None:
        """Note what is to be done."""
        for part in parts:
            self.write(part={"max_failures": part.max_failures, "pause": part.pause, "title": part.title})
            self._file.writelines(json.dumps({"task": task.as_dict()}) + "\n" for task in part.tasks)
        self._file.flush()

    def begun(self, part: int, task: Task) -> None:
        """Note that a task is begun."""
        self.write(begun=task.name, part=part)

    def ended(self, part: int, outcome: Outcome[Migration]) -> None:
        """Note what has become of one."""
        facts: dict[str, Any] = {"home": outcome.home, "seconds": round(outcome.seconds, 4)}
        if outcome.value is not None:
            facts |= {"before": outcome.value.before, "after": outcome.value.after, "attempts": outcome.value.attempts}
        if isinstance(outcome.error, Failure):
            facts |= {"error": outcome.error.as_dict()}
        self.write(ended=outcome.name, part=part, **facts)

    def close(self) -> None:
        """Let others have it; one that tells of nothing is removed."""
        if self._is_empty:
            self._path.unlink(missing_ok=True)
        self._file.close()

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
    account: Account | None = None
    for line in _lines(path):
        if "head" in line:
            account = Account(line["head"])
        elif account is None:
            break
        elif "task" in line:
            tasks: Any = account.parts[-1].tasks
            tasks.append(Task(**line["task"]))
        elif "ended" in line:
            account.outcomes[line["part"], line["ended"]] = _outcome(line)
        elif "begun" not in line:
            account.parts.append(Part([], **line["part"]))
    if account is None:
        raise ConfigError(f"{path} is no journal of a run: name one of {folder}")
    return account


def runs(folder: Path) -> list[str]:
    """The names of all runs, the newest last."""
    return sorted(path.name.removesuffix(_SUFFIX) for path in folder.glob(f"*{_SUFFIX}"))


def _path(folder: Path, run: str) -> Path:
    known = runs(folder)
    found = known[-1] if run == "last" and known else run
    if found not in known:
        last = f"; the last one is {known[-1]}" if known else ": there are none"
        raise ConfigError(f"no run {run!r} in {folder}{last}")
    return folder / f"{found}{_SUFFIX}"


def _opened(path: Path, mode: str) -> IO[str]:
    file: IO[str] = path.open(mode, encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    os.set_inheritable(file.fileno(), False)
    return file


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                # The end of a line that was being written when its process was killed.
                continue


def _outcome(line: Mapping[str, Any]) -> Outcome[Migration]:
    error = Failure.from_dict(line["error"]) if "error" in line else None
    value = None
    if error is None:
        value = Migration(tuple(line["before"]), tuple(line["after"]), line["attempts"])
    return Outcome(line["ended"], line["home"], line["seconds"], value, error)
