"""What the demo shows while it runs: a live view on a terminal, plain lines anywhere else, and the table at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from time import monotonic
from typing import IO, Final, Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from . import fleet
from .drivers import Way
from .report import Outcome, Report, Settings
from .sampler import Interval, Sample
from .worker import Running

# Seconds over which the live figure of operations per second is taken.
_RECENT: Final = 1.0

# Seconds between two plain lines.
_LINE_EVERY: Final = 1.0

_TITLES: Final[dict[Way, str]] = {"repo": "one Repo", "by hand": "an engine per database"}


@dataclass(slots=True)
class View:
    """The present state of a running load."""

    way: Way
    settings: Settings
    sample: Sample | None = None
    reports: list[Running] = field(default_factory=list)
    on_report: Callable[[], None] = lambda: None

    def take(self, report: Running) -> None:
        """Take over a report of the load's process."""
        self.reports.append(report)
        self.on_report()

    @property
    def title(self) -> str:
        return _TITLES[self.way]

    @property
    def connections(self) -> tuple[int, ...]:
        """What each server lists."""
        return self.sample.per_server if self.sample else (0,) * self.settings.servers

    @property
    def operations_per_second(self) -> float:
        if len(self.reports) < 2:
            return 0.0
        last = self.reports[-1]
        first = next(report for report in self.reports if last.at - report.at <= _RECENT)
        return (last.operations - first.operations) / (last.at - first.at) if last.at > first.at else 0.0

    @property
    def mean_busy(self) -> float:
        """Connections in use or connecting, on average over the reports."""
        busy = [report.stats.in_use + report.stats.connecting for report in self.reports if report.stats]
        return sum(busy) / len(busy) if busy else 0.0

    @property
    def elapsed(self) -> float:
        return self.reports[-1].at - self.reports[0].at if self.reports else 0.0

    def figures(self) -> list[str]:
        """The figures beside the connections, each with its name."""
        if not self.reports:
            return ["starting"]
        last = self.reports[-1]
        figures = [f"{self.operations_per_second:.0f} operations/s"]
        if last.stats is not None:
            figures.append(f"hit rate {last.stats.hit_rate:.0%}")
            figures.append(f"{last.stats.evictions} evictions")
            figures.append(f"mean busy {self.mean_busy:.1f}")
        return [*figures, f"{last.errors} errors", f"{last.wrong} wrong rows"]


class Show(Protocol):
    """Where the demo's progress goes."""

    def say(self, text: str) -> None: ...
    def building(self, databases: int) -> AbstractContextManager[fleet.Progress]: ...
    def watching(self, view: View) -> AbstractContextManager[None]: ...


def make_show(stream: IO[str]) -> Show:
    """A live view if *stream* is a terminal, else lines."""
    return LiveShow(Console(file=stream)) if stream.isatty() else PlainShow(stream)


class LiveShow:
    """Shows progress on a terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False)

    @contextmanager
    def building(self, databases: int) -> Iterator[fleet.Progress]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console) as progress:
            tasks = {
                "created": progress.add_task("Databases created from the template", total=databases),
                "filled": progress.add_task("Databases filled with rows", total=databases),
            }
            yield lambda stage: progress.advance(tasks[stage])

    @contextmanager
    def watching(self, view: View) -> Iterator[None]:
        def picture() -> Group:
            return _live(view)

        with Live(get_renderable=picture, console=self._console, refresh_per_second=8):
            yield


class PlainShow:
    """Writes a line now and then."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    @contextmanager
    def building(self, databases: int) -> Iterator[fleet.Progress]:
        counts = {"created": 0, "filled": 0}
        # The servers' threads report at the same time.
        lock = Lock()

        def progress(stage: fleet.Stage) -> None:
            with lock:
                counts[stage] += 1
                if counts[stage] % max(1, databases // 4) == 0 or counts[stage] == databases:
                    self.say(f"{counts[stage]} of {databases} databases {stage}")

        yield progress

    @contextmanager
    def watching(self, view: View) -> Iterator[None]:
        self.say(f"{view.title}: {view.settings.seconds:g} s of load")
        view.on_report = self._line(view)
        yield

    def _line(self, view: View) -> Callable[[], None]:
        last = monotonic()

        def line() -> None:
            nonlocal last
            if monotonic() - last >= _LINE_EVERY:
                last = monotonic()
                counts = " + ".join(map(str, view.connections))
                connections = f"{counts} = {sum(view.connections)} connections (target {view.settings.pool_size})"
                self.say(f"{view.elapsed:4.0f} s  {connections}, {', '.join(view.figures())}")

        return line


def _live(view: View) -> Group:
    """The live picture of a load: a bar per server and one for all of them, and the figures below."""
    target = view.settings.pool_size
    total = sum(view.connections)
    table = Table.grid(padding=(0, 1))
    for number, count in enumerate(view.connections, 1):
        table.add_row(f"server {number}", _bar(count, max(total, target)), f"{count}")
    style = "bold green" if total <= target else "bold yellow"
    table.add_row(
        Text("all", style="bold"),
        _bar(total, max(total, target)),
        Text(f"{total} of a target of {target}", style=style),
    )
    title = Text.assemble((view.title, "bold"), f"  {view.elapsed:.0f} of {view.settings.seconds:.0f} s", style="cyan")
    return Group(title, table, Text("  ".join(view.figures())))


def _bar(count: int, full: int) -> ProgressBar:
    return ProgressBar(total=full, completed=count, width=40, finished_style="bar.complete")


def print_report(report: Report, stream: IO[str]) -> None:
    """Write the table, where the picture is, and what went wrong if anything did."""
    # A file is as wide as the table needs; its width is no terminal's.
    console = Console(file=stream, highlight=False, width=None if stream.isatty() else 120)
    console.print(_table(report))
    console.print(f"Connections over time: {report.picture}", soft_wrap=True)
    if not report.passed:
        console.print("FAILED: a wrong row, an error of the Repo's, or a sample above its bound", style="bold red")


def _table(report: Report) -> Table:
    """Both ways side by side."""
    settings = report.settings
    result = Table(
        title=f"{settings.threads} threads, {settings.databases} databases, {settings.servers} servers, "
        f"{settings.think_ms:g} ms of thinking between operations",
        title_justify="left",
    )
    result.add_column("")
    for way in report.outcomes:
        result.add_column(_TITLES[way], justify="right")
    columns = [_column(outcome) for outcome in report.outcomes.values()]
    for name in columns[0]:
        result.add_row(name, *(column[name] for column in columns))
    return result


def _column(outcome: Outcome) -> dict[str, str]:
    stats = outcome.load.stats
    interval = Interval.of(outcome.samples)
    return {
        "connections at peak": _spread(outcome.peak),
        "connections at rest": _spread(outcome.rest),
        "samples above the bound": "" if outcome.over is None else f"{outcome.over} of {len(outcome.samples)}",
        "a sample every": f"{interval.median * 1000:.0f} ms, {interval.longest * 1000:.0f} at most",
        "operations per second": f"{outcome.throughput:.0f}",
        "latency p50": f"{outcome.load.p50 * 1000:.1f} ms",
        "latency p99": f"{outcome.load.p99 * 1000:.1f} ms",
        "hit rate": "" if stats is None else f"{stats.hit_rate:.0%}",
        "evictions": "" if stats is None else f"{stats.evictions}",
        "mean busy": "" if outcome.mean_busy is None else f"{outcome.mean_busy:.1f}",
        "memory growth": f"{outcome.growth / 2**20:.1f} MiB",
        "errors": _errors(outcome),
        "wrong rows": f"{outcome.wrong} of {outcome.load.rows}",
    }


def _spread(sample: Sample) -> str:
    return f"{sample.total} ({' + '.join(map(str, sample.per_server))})"


def _errors(outcome: Outcome) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(outcome.load.errors.items())) or "0"
