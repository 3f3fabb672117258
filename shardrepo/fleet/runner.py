"""How the tasks of a plan are carried out: part after part, so many at a time, until too many have failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Final, Literal, TypeAlias

from ..across import Outcome
from .crew import Crew
from .journal import Journal
from .lines import line
from .outcomes import Failure, Migration
from .plan import Part, Queue, Task
from .worker import Manner

Ending: TypeAlias = Literal["complete", "budget", "interrupted", "journal"]

# Seconds between two looks at whether somebody wants it to end, and two reports of progress while nothing ends.
_TICK: Final = 0.2

# How often a task is begun anew when the process that had it has died.
_LIVES: Final = 2


class Control:
    """How a run is told to end early, from another thread or a signal's handler."""

    def __init__(self) -> None:
        # No event, which has a lock that a handler would find held by the thread that it interrupts.
        self._said = 0
        self._woken: SimpleQueue[None] = SimpleQueue()
        self._abort: Callable[[], object] = lambda: None

    def interrupt(self) -> None:
        """Begin nothing more; said twice: have what runs end between two statements too."""
        self._said += 1
        if self._said > 1:
            self._abort()
        self._woken.put(None)

    def on_abort(self, abort: Callable[[], object]) -> None:
        """Call *abort* as soon as what runs is to end."""
        self._abort = abort
        if self._said > 1:
            abort()

    @property
    def is_draining(self) -> bool:
        """Whether nothing more is to be begun."""
        return self._said > 0

    def pause(self, seconds: float) -> None:
        """Wait, unless it is told to end, before or meanwhile."""
        if not self.is_draining:
            with suppress(Empty):
                self._woken.get(timeout=seconds)


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

    Each task that is begun ends in one outcome, unless its executor drops it when the run ends early. Nothing is begun
    that is not in the journal, nor after the end was decided on.

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
        # With how many lives each task has begun; and how many tasks each database still has before it.
        self._running: dict[Future[Outcome[Migration]], tuple[Task, int]] = {}
        self._open: Counter[str] = Counter()
        self._failed: set[str] = set()
        self._total = self._done = 0
        self._failures_of_part = 0
        self._number = 0
        self._part = Part(())
        self._queue = Queue((), per_server)
        self._problem: Exception | None = None
        self.ending: Ending = "complete"

    @property
    def left(self) -> int:
        """How many databases have a task that was not begun, or not to an end; those where one failed not counted."""
        return len(self._open)

    @property
    def problem(self) -> str | None:
        """Why the journal could not be written."""
        return None if self._problem is None else str(self._problem)

    def run(self, parts: Sequence[Part], first: int = 0) -> None:
        """Carry out *parts*, which the journal numbers from *first* on; after one that fails, none.

        A database where a task has failed has no further one.
        """
        names = [task.name for part in parts for task in part.tasks if task.name not in self._failed]
        self._open.update(names)
        self._total += len(names)
        pause = 0.0
        for number, part in enumerate(parts, first):
            tasks = [task for task in part.tasks if task.name not in self._failed]
            if not tasks:
                continue
            self._control.pause(pause)
            self._number, self._part, self._failures_of_part = number, part, 0
            self._queue = Queue(tasks, self._per_server)
            self._carry_out()
            if self.ending != "complete":
                return
            pause = part.pause

    def _carry_out(self) -> None:
        while self._queue or self._running:
            self._look_at_control()
            if self.ending == "complete":
                self._begin_what_can_be()
            elif not self._running:
                return
            ended, _ = wait(self._running, timeout=_TICK, return_when=FIRST_COMPLETED)
            for future in ended:
                self._end(future)
            if not ended:
                self._tell(None)

    def _look_at_control(self) -> None:
        if self._control.is_draining and self.ending == "complete":
            self.ending = "interrupted"

    def _begin_what_can_be(self) -> None:
        """Begin tasks, in their order but for those whose server has no place, until nobody is free."""
        while self.ending == "complete" and len(self._running) < self._crew.width:
            task = self._queue.take()
            if task is None:
                return
            self._begin(task, 1)

    def _begin(self, task: Task, life: int) -> None:
        """Begin *task*, once that is in the journal."""
        if not self.note(lambda journal: journal.begun(self._number, task)):
            return
        try:
            future = self._crew.submit(self._manner, task)
        except Exception as error:  # of an executor that takes nothing any more
            self._settle(task, _lost(task, error, life))
            return
        self._running[future] = task, life

    def _end(self, future: Future[Outcome[Migration]]) -> None:
        task, life = self._running.pop(future)
        self._crew.free(future)
        error = CancelledError() if future.cancelled() else future.exception()
        if error is None:
            self._settle(task, future.result())
        elif self.ending == "complete" and life < _LIVES:
            # Nobody knows how far it came; whoever has it next finds out, under its lock.
            self._begin(task, life + 1)
        elif self.ending == "complete" or not future.cancelled():
            self._settle(task, _lost(task, error, life))

    def _settle(self, task: Task, outcome: Outcome[Migration]) -> None:
        self._queue.leave(task)
        self._count(task, outcome)
        self.note(lambda journal: journal.ended(self._number, outcome))
        self._settled(task, outcome)
        self._tell(outcome)

    def _count(self, task: Task, outcome: Outcome[Migration]) -> None:
        if outcome.ok:
            self._done += 1
            self._open[task.name] -= 1
            if not self._open[task.name]:
                del self._open[task.name]
            return
        self._failed.add(task.name)
        # What else was to be done there will not be.
        self._total -= self._open.pop(task.name) - 1
        if isinstance(outcome.error, Failure) and outcome.error.kind == "interrupted":
            return
        self._failures_of_part += 1
        if self.ending == "complete" and self._too_many_failed():
            self.ending = "budget"

    def _too_many_failed(self) -> bool:
        of_part, of_all = self._part.max_failures, self._allowed
        return (of_part is not None and self._failures_of_part > of_part) or (
            of_all is not None and len(self._failed) > of_all
        )

    def note(self, write: Callable[[Journal], object]) -> bool:
        """Write into the journal; when that fails, end, as what is not in it would be done without a record."""
        if self._journal is None:
            return True
        try:
            write(self._journal)
        except (OSError, ValueError) as error:
            self._problem = self._problem or error
            self.ending = "journal"
            return False
        return True

    def _tell(self, outcome: Outcome[Migration] | None) -> None:
        running = tuple(task.name for task, _ in self._running.values())
        seconds = monotonic() - self._begun
        self._observe(Progress(self._part.title, self._total, self._done, len(self._failed), running, seconds, outcome))


def _lost(task: Task, error: BaseException, life: int) -> Outcome[Migration]:
    failure = Failure(
        f"who had it was lost, {life} time{'s' if life > 1 else ''}: {line(repr(error))}; what was begun there is "
        "rolled back to its last revision, but for what a script has committed itself",
        kind="lost",
    )
    return Outcome(task.name, task.home, 0.0, None, failure)
