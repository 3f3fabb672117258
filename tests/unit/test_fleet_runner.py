"""How a run is carried out: a crew that does nothing by itself, whose tasks the test ends one by one."""

from __future__ import annotations

import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import wait as waited
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardrepo.across import Outcome
from shardrepo.fleet import runner as runners
from shardrepo.fleet.journal import Journal, read
from shardrepo.fleet.outcomes import Failure, Migration
from shardrepo.fleet.plan import Part, Task
from shardrepo.fleet.runner import Control, Ending, Progress, Runner
from shardrepo.fleet.worker import Manner
from shardrepo.scripts import Source

Ended: TypeAlias = "Future[Outcome[Migration]]"

MANNER = Manner("app.repo:MyRepo", Source("migrations"), "upgrade")
MIGRATION = Migration((), ("one",))


def task(name: str, server: str = "a") -> Task:
    return Task(name, f"{server}:1/{name}", f"{server}:1", "head")


def tasks(*names: str) -> list[Task]:
    """Tasks whose names begin with the letter of their server."""
    return [task(name, name[0]) for name in names]


class Crew:
    """A crew that is so wide, and ends nothing unless it is told to.

    Attributes:
        begun: The names of all tasks that were begun, in that order.
        running: Those that run.
        stops: How often it was told to stop.
        is_abused: Whether it was given something twice, after the end, or more than it is wide.
    """

    def __init__(self, width: int, ending: Callable[[], Ending]) -> None:
        self.width = width
        self._ending = ending
        self.begun: list[str] = []
        self.running: dict[str, tuple[Task, Ended]] = {}
        self.stops = 0
        self.is_abused = False
        self._out = 0

    def submit(self, manner: Manner, task: Task) -> Ended:
        # Noted, as what is raised here is taken for a fault of the executor.
        self.is_abused |= manner is not MANNER or task.name in self.running
        self.is_abused |= self._ending() != "complete" or self._out == self.width
        future: Ended = Future()
        self.begun.append(task.name)
        self.running[task.name] = task, future
        self._out += 1
        return future

    def free(self, future: Ended) -> None:
        assert future.done()
        self._out -= 1

    def stop(self) -> None:
        self.stops += 1

    def close(self) -> None:
        assert not self._out
        assert not self.is_abused

    def end(self, name: str) -> None:
        """It has gone well."""
        task, future = self.running.pop(name)
        future.set_result(Outcome(name, task.home, 0.0, MIGRATION))

    def fail(self, name: str, kind: str = "X") -> None:
        """It has failed."""
        task, future = self.running.pop(name)
        future.set_result(Outcome(name, task.home, 0.0, None, Failure("no", kind=kind)))

    def lose(self, name: str) -> None:
        """Who had it has died."""
        self.running.pop(name)[1].set_exception(RuntimeError("terminated\nabruptly"))

    def cancel(self, name: str) -> None:
        """It was cancelled before anybody had it, as an executor does it."""
        future = self.running.pop(name)[1]
        assert future.cancel()
        future.set_running_or_notify_cancel()

    def end_all(self) -> None:
        """All that run have gone well."""
        for name in list(self.running):
            self.end(name)


Step: TypeAlias = Callable[[Crew], object]


@dataclass
class Run:
    """A run, and all that is told of it."""

    crew: Crew
    control: Control
    runner: Runner
    outcomes: list[Outcome[Migration]]
    progress: list[Progress]

    def ended(self) -> dict[str, str]:
        """What each task came to: "ok", or the kind of failure."""
        self.crew.close()
        return {each.name: each.error.kind if isinstance(each.error, Failure) else "ok" for each in self.outcomes}

    def said(self, name: str) -> str:
        """What is told of a failure."""
        (error,) = (each.error for each in self.outcomes if each.name == name)
        return str(error)


Begin: TypeAlias = Callable[..., Run]


def prepared(
    monkeypatch: pytest.MonkeyPatch, step: Step, *, width: int = 9, control: Control | None = None, **given: Any
) -> Run:
    """A run in which *step* is taken whenever it waits for what runs; it begins nothing after its end."""
    control = control or Control()
    outcomes: list[Outcome[Migration]] = []
    progress: list[Progress] = []
    facts: dict[str, Any] = {"per_server": 9, "allowed": None, "journal": None, **given}
    crew = Crew(width, lambda: runner.ending)
    runner = Runner(
        crew,
        MANNER,
        control=control,
        observe=progress.append,
        settled=lambda _, outcome: outcomes.append(outcome),
        **facts,
    )

    def wait(futures: Any, *, timeout: float, return_when: str) -> Any:
        assert timeout > 0
        step(crew)
        return waited(futures, timeout=0, return_when=return_when)

    monkeypatch.setattr(runners, "wait", wait)
    return Run(crew, control, runner, outcomes, progress)


@pytest.fixture
def begin(monkeypatch: pytest.MonkeyPatch) -> Begin:
    """Make a run."""
    return partial(prepared, monkeypatch)


def script(*steps: Step) -> Step:
    """A step after the other, then as if nothing were to be said any more: all goes well."""
    left = list(steps)

    def step(crew: Crew) -> None:
        if left:
            left.pop(0)(crew)
        else:
            crew.end_all()

    return step


def each(names: Sequence[str], act: Callable[[Crew, str], object]) -> Step:
    def step(crew: Crew) -> None:
        for name in names:
            act(crew, name)

    return step


def ends(*names: str) -> Step:
    return each(names, Crew.end)


def fails(*names: str, kind: str = "X") -> Step:
    return each(names, lambda crew, name: crew.fail(name, kind))


def loses(*names: str) -> Step:
    return each(names, Crew.lose)


def nothing(crew: Crew) -> None:
    """Time goes by."""


# Order and bounds


def test_all_goes_well(begin: Begin) -> None:
    """Every task is begun once, in order, and ends; nothing is left."""
    run = begin(script(), width=2)
    run.runner.run([Part(tasks("a1", "a2", "b1"))])
    assert (run.crew.begun, run.ended()) == (["a1", "a2", "b1"], dict.fromkeys(["a1", "a2", "b1"], "ok"))
    assert (run.runner.ending, run.runner.left, run.runner.problem) == ("complete", 0, None)


def test_nothing_to_do(begin: Begin) -> None:
    """No parts, and parts without tasks, are done at once."""
    run = begin(script())
    run.runner.run([])
    run.runner.run([Part([]), Part([])])
    assert (run.crew.begun, run.progress, run.runner.ending) == ([], [], "complete")


def test_a_server_has_so_many_at_a_time(begin: Begin) -> None:
    """What waits for its server lets others pass, and is next when there is a place."""
    run = begin(script(ends("b1"), ends("a1"), nothing), per_server=1, width=3)
    run.runner.run([Part(tasks("a1", "a2", "a3", "b1", "b2"))])
    assert run.crew.begun == ["a1", "b1", "b2", "a2", "a3"]


def test_a_crew_is_so_wide(begin: Begin) -> None:
    """The next is begun when somebody is free."""
    seen: list[list[str]] = []

    def step(crew: Crew) -> None:
        seen.append(list(crew.running))
        crew.end(next(iter(crew.running)))

    run = begin(step, width=2)
    run.runner.run([Part(tasks("a1", "b1", "c1"))])
    assert seen == [["a1", "b1"], ["b1", "c1"], ["c1"]]


def test_a_part_is_done_before_the_next_is_begun(begin: Begin) -> None:
    """Also where there is room for more."""
    run = begin(script(ends("a2"), nothing, ends("a1"), ends("a3")))
    run.runner.run([Part(tasks("a1", "a2"), title="one"), Part(tasks("a3"), title="two")])
    assert [(each.part, each.running) for each in run.progress if each.outcome is None] == [("one", ("a1",))]
    assert [each.name for each in run.outcomes] == ["a2", "a1", "a3"]


# Failures


def test_failures_stop_nothing(begin: Begin) -> None:
    """Where any number may fail, the others are carried out."""
    run = begin(script(fails("a1", "a2")), width=2)
    run.runner.run([Part(tasks("a1", "a2", "a3")), Part(tasks("a4"))])
    assert run.ended() == {"a1": "X", "a2": "X", "a3": "ok", "a4": "ok"}
    assert (run.runner.ending, run.runner.left) == ("complete", 0)


@pytest.mark.parametrize(("allowed", "ending", "left"), [(0, "budget", 3), (1, "complete", 0)])
def test_a_canary_that_fails(begin: Begin, allowed: int, ending: Ending, left: int) -> None:
    """After more failures than the part may have, no other part is begun; as many as it may have are none too many."""
    run = begin(script(fails("a1")))
    run.runner.run([Part(tasks("a1", "b1"), allowed), Part(tasks("a2", "a3")), Part(tasks("a4"))])
    assert (run.runner.ending, run.runner.left) == (ending, left)
    assert run.ended() == {"a1": "X", "b1": "ok"} | ({} if left else dict.fromkeys(["a2", "a3", "a4"], "ok"))


def test_failures_of_a_part_are_its_own(begin: Begin) -> None:
    """Each part may have so many."""
    run = begin(script(fails("a1"), fails("a2"), fails("a3", "a4")))
    run.runner.run([Part(tasks("a1"), 1), Part(tasks("a2"), 1), Part(tasks("a3", "a4", "a5"), 1)])
    assert (run.runner.ending, run.ended()["a5"]) == ("budget", "ok")


@pytest.mark.parametrize(("allowed", "ending", "left"), [(1, "budget", 2), (2, "complete", 0)])
def test_a_budget(begin: Begin, allowed: int, ending: Ending, left: int) -> None:
    """After more failures in all nothing is begun; what runs is finished."""
    run = begin(script(fails("a1"), fails("a2"), nothing, ends("a3")), width=2, allowed=allowed)
    run.runner.run([Part(tasks("a1")), Part(tasks("a2", "a3", "a4", "a5"))])
    assert (run.runner.ending, run.runner.left, run.ended()["a3"]) == (ending, left, "ok")


def test_a_database_that_failed_has_no_further_round(begin: Begin) -> None:
    """It is not begun in later parts, nor counted as left; the total is what there still is to do."""
    run = begin(script(fails("a1")))
    run.runner.run([Part(tasks("a1", "a2")), Part(tasks("a1", "a2")), Part(tasks("a1", "a2"))])
    assert run.crew.begun == ["a1", "a2", "a2", "a2"]
    last = run.progress[-1]
    assert (run.runner.left, last.total, last.done, last.failed) == (0, 4, 3, 1)
    run.runner.run([Part(tasks("a1", "a3"))], 3)
    assert (run.crew.begun[4:], run.runner.left, run.progress[-1].total) == (["a3"], 0, 5)


def test_databases_are_left_not_rounds(begin: Begin) -> None:
    """One that has rounds before it is left once, whether it has had one or not; one that failed is not."""
    run = begin(script(fails("a1")), width=2, allowed=0)
    run.runner.run([Part(tasks("a1", "a2", "a3")), Part(tasks("a1", "a2", "a3"))])
    assert (run.ended(), run.runner.left) == ({"a1": "X", "a2": "ok"}, 2)


# Lost


def test_a_lost_worker_s_task_is_done_again(begin: Begin) -> None:
    """Once; whoever has it next finds out how far it came."""
    run = begin(script(loses("a1"), nothing), per_server=1)
    run.runner.run([Part(tasks("a1", "a2"))])
    assert (run.crew.begun, run.ended()) == (["a1", "a1", "a2"], {"a1": "ok", "a2": "ok"})


def test_a_task_whose_workers_are_lost_again(begin: Begin) -> None:
    """It has failed, as one that kills whoever has it."""
    run = begin(script(loses("a1"), loses("a1")), allowed=0)
    run.runner.run([Part(tasks("a1")), Part(tasks("a2"))])
    assert (run.crew.begun, run.ended(), run.runner.ending) == (["a1", "a1"], {"a1": "lost"}, "budget")
    assert "lost, 2 times: RuntimeError('terminated" in run.said("a1")
    assert "\n" not in run.said("a1")


def test_a_lost_worker_at_the_end(begin: Begin) -> None:
    """When nothing is to be begun any more, its task has failed."""
    control = Control()
    run = begin(script(lambda _: control.interrupt(), loses("a1")), control=control)
    run.runner.run([Part(tasks("a1"))])
    assert (run.crew.begun, run.ended()) == (["a1"], {"a1": "lost"})
    assert "lost, 1 time:" in run.said("a1")


def test_an_executor_that_cancels(begin: Begin) -> None:
    """What it has dropped by itself is given to it once more, and not for ever."""
    run = begin(lambda crew: crew.cancel("a1"))
    run.runner.run([Part(tasks("a1"))])
    assert (run.crew.begun, run.ended(), run.runner.left) == (["a1", "a1"], {"a1": "lost"}, 0)


def test_an_executor_that_takes_nothing(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every task has an outcome that says why."""

    def submit(manner: Manner, task: Task) -> Ended:
        raise RuntimeError("cannot schedule new futures after shutdown")

    run = begin(script())
    monkeypatch.setattr(run.crew, "submit", submit)
    run.runner.run([Part(tasks("a1", "a2"))])
    assert run.ended() == {"a1": "lost", "a2": "lost"}
    assert "after shutdown" in run.said("a2")


# Ending early


def test_it_drains(begin: Begin) -> None:
    """Told to end, it begins nothing more, and what runs is finished."""
    control = Control()
    run = begin(script(lambda _: control.interrupt(), ends("a1"), nothing), width=2, control=control)
    run.runner.run([Part(tasks("a1", "a2", "a3")), Part(tasks("a4"))])
    assert (run.crew.begun, run.ended()) == (["a1", "a2"], {"a1": "ok", "a2": "ok"})
    assert (run.runner.ending, run.runner.left, run.crew.stops) == ("interrupted", 2, 0)


def test_it_aborts(begin: Begin) -> None:
    """Told twice, it has what runs end between two statements; that has failed, and breaks no budget."""
    control = Control()

    def abort(_: Crew) -> None:
        control.interrupt()
        control.interrupt()

    run = begin(
        script(abort, lambda crew: crew.cancel("a1"), fails("a2", kind="interrupted")),
        width=2,
        control=control,
        allowed=0,
    )
    run.runner.run([Part(tasks("a1", "a2", "a3"))])
    assert run.crew.stops
    assert (run.ended(), run.runner.ending, run.runner.left) == ({"a2": "interrupted"}, "interrupted", 2)


def test_told_to_end_before_it_begins(begin: Begin) -> None:
    """Nothing is begun, and all is left."""
    control = Control()
    control.interrupt()
    run = begin(script(), control=control)
    run.runner.run([Part(tasks("a1", "a2"))])
    assert (run.crew.begun, run.runner.ending, run.runner.left) == ([], "interrupted", 2)


def test_nothing_is_run_after_the_end(begin: Begin) -> None:
    """What is asked for later, by whoever has not looked, is left."""
    run = begin(script(fails("a1")), allowed=0)
    run.runner.run([Part(tasks("a1"))])
    run.runner.run([Part(tasks("a2"))], 1)
    assert (run.crew.begun, run.runner.left) == (["a1"], 1)


class Pausing(Control):
    """Pauses that take no time."""

    def __init__(self) -> None:
        super().__init__()
        self.pauses: list[float] = []

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)


def test_pauses(begin: Begin) -> None:
    """After a part that was carried out, if there is another to carry out; none after a part that was done before."""
    control = Pausing()
    run = begin(script(), control=control)
    run.runner.run(
        [Part([], pause=1.0), Part(tasks("a1"), pause=2.0), Part([], pause=3.0), Part(tasks("a2"), pause=4.0)]
    )
    assert [each for each in control.pauses if each] == [2.0]
    assert run.crew.begun == ["a1", "a2"]


def test_no_pause_after_the_end(begin: Begin) -> None:
    """A canary that has failed lets nobody wait."""
    control = Pausing()
    run = begin(script(fails("a1")), control=control)
    run.runner.run([Part(tasks("a1"), 0, pause=2.0), Part(tasks("a2"))])
    assert [each for each in control.pauses if each] == []


def test_a_signal_ends_a_pause() -> None:
    """Its handler may come while this thread waits, and is not in its own way."""
    control = Control()
    aborted: list[bool] = []
    control.on_abort(lambda: aborted.append(True))

    def interrupt(*_: object) -> None:
        control.interrupt()
        control.interrupt()

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.01)
        control.pause(100_000)
    finally:
        signal.signal(signal.SIGALRM, before)
    control.pause(100_000)
    assert (control.is_draining, aborted) == (True, [True])


def test_a_pause_that_nobody_ends() -> None:
    """It ends by itself."""
    control = Control()
    control.pause(0.001)
    assert not control.is_draining


# What is noted


def test_a_task_is_begun_when_that_is_noted(begin: Begin, tmp_path: Path) -> None:
    """Whatever kills the run, its journal knows what was begun and what has ended."""
    with Journal.begin(tmp_path, "upgrade", {}) as journal:
        parts = [Part(tasks("a1", "a2")), Part(tasks("a3"))]
        journal.plan(parts)

        def step(crew: Crew) -> None:
            text = (tmp_path / f"{journal.run}.jsonl").read_text()
            assert all(f'{{"begun":"{name}"' in text for name in crew.begun)
            assert all(f'{{"ended":"{outcome.name}"' in text for outcome in run.outcomes)
            crew.end_all() if "a3" in crew.running else crew.fail(next(iter(crew.running)))

        run = begin(step, journal=journal, width=1)
        run.runner.run(parts)
    account = read(tmp_path, journal.run)
    assert {key: outcome.ok for key, outcome in account.outcomes.items()} == {
        (0, "a1"): False,
        (0, "a2"): False,
        (1, "a3"): True,
    }


class Broken(Journal):
    """A journal in which so many lines can be written, and then none.

    Attributes:
        room: How many there still is room for.
    """

    def __init__(self, folder: Path, room: int, error: Exception) -> None:
        super().__init__(folder / "x.jsonl", (folder / "x.jsonl").open("w"))
        self.room = room
        self._error = error

    def _note(self, **facts: Any) -> None:
        self.room -= 1
        if self.room < 0:
            raise self._error
        super()._note(**facts)


@pytest.mark.parametrize(
    ("room", "begun", "ended", "left"),
    [(0, [], [], 3), (1, ["a1"], ["a1"], 2), (2, ["a1", "b1"], ["a1", "b1"], 1), (3, ["a1", "b1"], ["a1", "b1"], 1)],
)
def test_a_journal_that_is_full(
    begin: Begin, tmp_path: Path, room: int, begun: list[str], ended: list[str], left: int
) -> None:
    """The run ends: nothing is begun that is not noted, what runs is finished, and every outcome is told."""
    with Broken(tmp_path, room, OSError(28, "No space left on device")) as journal:
        run = begin(script(nothing, ends(*begun[:1])), journal=journal, width=2)
        run.runner.run([Part(tasks("a1", "b1")), Part(tasks("a2"))])
    assert (run.crew.begun, sorted(run.ended())) == (begun, ended)
    assert (run.runner.ending, run.runner.left) == ("journal", left)
    assert run.runner.problem == "[Errno 28] No space left on device"


def test_a_second_life_that_cannot_be_noted(begin: Begin, tmp_path: Path) -> None:
    """It is not begun: the task is left."""
    with Broken(tmp_path, 1, OSError(28, "full")) as journal:
        run = begin(script(loses("a1")), journal=journal)
        run.runner.run([Part(tasks("a1"))])
    assert (run.crew.begun, run.ended(), run.runner.left, run.runner.ending) == (["a1"], {}, 1, "journal")


def test_a_journal_that_is_closed(begin: Begin, tmp_path: Path) -> None:
    """As one that is full."""
    journal = Journal.begin(tmp_path, "upgrade", {})
    journal.close()
    run = begin(script(), journal=journal)
    run.runner.run([Part(tasks("a1"))])
    assert (run.crew.begun, run.runner.ending, run.runner.left) == ([], "journal", 1)
    assert run.runner.problem == "I/O operation on closed file."


# Progress


def test_progress(begin: Begin) -> None:
    """Every outcome is told, with how far the run has come; and the time that goes by."""
    run = begin(script(nothing, fails("a1"), ends("a2")))
    run.runner.run([Part(tasks("a1", "a2"), title="stage 1")])
    told = [(each.part, each.total, each.done, each.failed, sorted(each.running)) for each in run.progress]
    assert told == [
        ("stage 1", 2, 0, 0, ["a1", "a2"]),
        ("stage 1", 2, 0, 1, ["a2"]),
        ("stage 1", 2, 1, 1, []),
    ]
    assert [each.outcome for each in run.progress] == [None, *run.outcomes]


# Whatever happens


@st.composite
def plans(draw: st.DrawFn) -> list[Part]:
    """Parts of some tasks each, some of them in several, as in rounds."""
    members = [task(f"{server}{number}", server) for number, server in enumerate(draw(st.text("abc", max_size=9)))]
    parts = []
    for _ in range(draw(st.integers(0, 3))):
        chosen = [each for each in members if draw(st.booleans())]
        parts.append(Part(chosen, draw(st.none() | st.integers(0, 2))))
    return parts


@given(
    plans(),
    st.data(),
    st.integers(1, 4),
    st.integers(1, 3),
    st.none() | st.integers(0, 3),
    st.none() | st.integers(0, 30),
)
def test_any_schedule(
    parts: list[Part],
    data: st.DataObject,
    width: int,
    per_server: int,
    allowed: int | None,
    room: int | None,
) -> None:
    """Never more than may be in all or on a server; nothing twice, nothing after the end, nothing unaccounted for."""
    control = Control()
    events = st.sampled_from(["end", "end", "end", "fail", "lose", "cancel", "wait", "interrupt"])

    def step(crew: Crew) -> None:
        busy = Counter(each.server for each, _ in crew.running.values())
        assert len(crew.running) <= width
        assert max(busy.values(), default=0) <= per_server
        happened = data.draw(events) if len(run.progress) < 60 else "end"
        if happened == "interrupt":
            control.interrupt()
        elif happened != "wait" and crew.running:
            getattr(crew, happened)(data.draw(st.sampled_from(sorted(crew.running))))

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        with Broken(Path(folder), 10_000 if room is None else room, OSError("full")) as journal:
            run = prepared(
                patch, step, width=width, per_server=per_server, allowed=allowed, control=control, journal=journal
            )
            run.runner.run(parts)
    run.crew.close()
    begun = Counter(run.crew.begun)
    ended = Counter((each.name, each.ok) for each in run.outcomes)
    planned = Counter(each.name for part in parts for each in part.tasks)
    failed = {name for name, ok in ended if not ok}
    done = {name: count for (name, ok), count in ended.items() if ok}
    assert all(begun[name] <= 2 * count for name, count in planned.items())
    # A failure is the last that happens in a database, and happens once.
    assert all(count == 1 for (_, ok), count in ended.items() if not ok)
    assert all(done.get(name, 0) <= count for name, count in planned.items())
    assert run.runner.left == len([n for n, count in planned.items() if n not in failed and done.get(n, 0) < count])
    if run.runner.ending == "complete":
        assert run.runner.left == 0
        assert all(done.get(name, 0) == count for name, count in planned.items() if name not in failed)
    if run.progress:
        assert run.progress[-1].done == sum(done.values())
        assert run.progress[-1].failed == len(failed)
        assert run.progress[-1].total >= run.progress[-1].done + len(failed)
