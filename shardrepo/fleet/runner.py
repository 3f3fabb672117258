"""How the tasks of a plan are carried out: part after part, so many at a time, until too many have failed."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from time import monotonic
from typing import Final, Literal, TypeAlias

from ..across import Outcome
from .crew import Crew
from .journal import Journal
from .outcomes import Failure, Migration
from .plan import Part, Task
from .worker import Manner

Ending: TypeAlias = Literal["complete", "budget", "interrupted", "journal"]

# Seconds between two looks at whether somebody wants it to end, and two reports of progress while nothing ends.
_TICK: Final = 0.2

# How often a task is begun anew when the process that had it has died.
_LIVES: Final = 2


class Control:
    """How a run is told to end early, from another thread or a signal's handler."""

    def __init__(self) -> None:
        self._drains = threading.Event()
        self._aborts = threading.Event()
        self._abort: Callable[[], object] = lambda: None

    def interrupt(self) -> None:
        """Begin nothing more; said twice: have what runs end between two statements too."""
        if self._drains.is_set():
            self._aborts.set()
            self._abort()
        self._drains.set()

    def on_abort(self, abort: Callable[[], object]) -> None:
        """Call *abort* as soon as what runs is to end."""
        self._abort = abort
        if self._aborts.is_set():
            abort()

    @property
    def is_draining(self) -> bool:
        """Whether nothing more is to be begun."""
        return self._drains.is_set()

    def pause(self, seconds: float) -> None:
        """Wait, unless it is told to end meanwhile."""
        self._drains.wait(seconds)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come.

    Attributes:
        part: Which part is under way.
        total: Tasks in all, as far as is known.
        done: Tasks that have ended well.
        failed: Tasks that have not.
        running: The names of those under way.
        seconds: Since it began.
        outcome: What has just ended; None if nothing has.
    """

    part: str
    total: int
    done: int
    failed: int
    running: tuple[str, ...]
    seconds: float
    outcome: Outcome[Migration] | None = None


Observer: TypeAlias = Callable[[Progress], object]


class Runner:
    """Carries out parts, in one thread, and says what became of each task.

    Args:
        crew: Who does it.
        manner: How.
        per_server: How many at a time on one server.
        allowed: How many may fail in all; None for any number.
        control: Tells it to end early.
        journal: Where each beginning and end is noted, None for nowhere.
        observe: Told of every outcome, and of the time that goes by.
        settled: Told of every outcome with its task, when it is in the journal.

    Attributes:
        ending: Why it ended.
    """

    def __init__(
        self,
        crew: Crew,
        manner: Manner,
        *,
        per_server: int,
        allowed: int | None,
        control: Control,
        journal: Journal | None,
        observe: Observer,
        settled: Callable[[Task, Outcome[Migration]], object],
    ) -> None:
        self._crew = crew
        self._manner = manner
        self._per_server = per_server
        self._allowed = allowed
        self._control = control
        self._journal = journal
        self._observe = observe
        self._settled = settled
        control.on_abort(crew.stop)
        self._begun = monotonic()
        self._running: dict[Future[Outcome[Migration]], tuple[Task, int]] = {}
        self._busy: Counter[str] = Counter()
        self._failed: set[str] = set()
        self._total = self._done = self._ended_badly = 0
        self._failures_of_part = 0
        self._number = 0
        self._part = Part(())
        self._problem: OSError | None = None
        self.ending: Ending = "complete"

    def run(self, parts: Sequence[Part], first: int = 0) -> None:
        """Carry out *parts*, which the journal numbers from *first* on; after one that fails, none."""
        self._total += sum(len(part.tasks) for part in parts)
        for number, part in enumerate(parts, first):
            if self.ending != "complete":
                return
            self._number, self._part, self._failures_of_part = number, part, 0
            self._carry_out(part)
            if part.pause and part is not parts[-1] and self.ending == "complete":
                self._control.pause(part.pause)

    def _carry_out(self, part: Part) -> None:
        waiting = deque(task for task in part.tasks if task.name not in self._failed)
        self._total -= len(part.tasks) - len(waiting)
        while waiting or self._running:
            self._look_at_control()
            if self.ending == "complete":
                self._begin_what_can_be(waiting)
            elif not self._running:
                return
            ended, _ = wait(self._running, timeout=_TICK, return_when=FIRST_COMPLETED)
            for future in ended:
                self._end(future, waiting)
            if not ended:
                self._tell(None)

    def _look_at_control(self) -> None:
        if self._control.is_draining and self.ending == "complete":
            self.ending = "interrupted"

    def _begin_what_can_be(self, waiting: deque[Task]) -> None:
        """Begin tasks, in their order but for those whose server has no place, until nobody is free."""
        passed_over = []
        while waiting and len(self._running) < self._crew.width:
            task = waiting.popleft()
            if self._busy[task.server] >= self._per_server:
                passed_over.append(task)
            elif not self._begin(task):
                passed_over.append(task)
                break
        waiting.extendleft(reversed(passed_over))

    def _begin(self, task: Task, lives: int = _LIVES) -> bool:
        """Begin *task*, once that is in the journal; False if it cannot be noted."""
        if not self._note(lambda journal: journal.begun(self._number, task)):
            return False
        self._busy[task.server] += 1
        self._running[self._crew.submit(self._manner, task)] = task, lives - 1
        return True

    def _end(self, future: Future[Outcome[Migration]], waiting: deque[Task]) -> None:
        task, lives = self._running.pop(future)
        self._busy[task.server] -= 1
        self._crew.free(future)
        if future.cancelled():
            waiting.appendleft(task)
            return
        error = future.exception()
        if error is not None and lives > 0 and self.ending == "complete":
            # Nobody knows how far it came; whoever has it next finds out, under its lock.
            self._begin(task, lives)
            return
        outcome = future.result() if error is None else _lost(task, error)
        self._count(outcome)
        self._note(lambda journal: journal.ended(self._number, outcome))
        self._settled(task, outcome)
        self._tell(outcome)

    def _count(self, outcome: Outcome[Migration]) -> None:
        if outcome.ok:
            self._done += 1
            return
        self._failed.add(outcome.name)
        self._ended_badly += 1
        if isinstance(outcome.error, Failure) and outcome.error.kind == "interrupted":
            return
        self._failures_of_part += 1
        part, allowed = self._part.max_failures, self._allowed
        too_many = part is not None and self._failures_of_part > part
        if self.ending == "complete" and (too_many or (allowed is not None and len(self._failed) > allowed)):
            self.ending = "budget"

    def _note(self, write: Callable[[Journal], object]) -> bool:
        """Write into the journal; when that fails, end, as what is not in it would be done without a record."""
        if self._journal is None:
            return True
        try:
            write(self._journal)
        except OSError as error:
            self._problem = self._problem or error
            self.ending = "journal"
            return False
        return True

    @property
    def left(self) -> int:
        """How many tasks were not begun, or not to an end."""
        return self._total - self._done - self._ended_badly

    @property
    def problem(self) -> str | None:
        """Why the journal could not be written."""
        return None if self._problem is None else str(self._problem)

    def _tell(self, outcome: Outcome[Migration] | None) -> None:
        running = tuple(task.name for task, _ in self._running.values())
        self._observe(
            Progress(
                self._part.title,
                self._total,
                self._done,
                len(self._failed),
                running,
                monotonic() - self._begun,
                outcome,
            )
        )


def _lost(task: Task, error: BaseException) -> Outcome[Migration]:
    failure = Failure(
        f"the process that had it died, {_LIVES} times: {error or type(error).__name__}; what it began was rolled back",
        kind="lost",
    )
    return Outcome(task.name, task.home, 0.0, None, failure)
