"""What the commands print: results on the standard output, for people or as JSON, and how far they are on the other."""

from __future__ import annotations

import csv
import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from time import monotonic
from types import FrameType
from typing import Any, Final, Literal, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..across import Outcome
from ..errors import ConfigError
from ..fleet import Control, Failure, Made, Migration
from ..fleet.runner import Progress as FleetProgress

Format: TypeAlias = Literal["table", "csv", "json"]

# Columns of text for a table that goes into a file.
_WIDE: Final = 200

# Seconds between two lines where nobody looks on.
INTERVAL: Final = 10.0


def print_json(facts: Mapping[str, Any]) -> None:
    """One line of JSON."""
    print(json.dumps(facts, default=str), flush=True)


def print_lines(lines: Iterable[str]) -> None:
    """Lines, as they come."""
    for line in lines:
        print(line, flush=True)


def print_rows(rows: Iterable[Mapping[str, Any]], form: Format) -> None:
    """Rows: a table at the end, in which each column of any row has its place; or CSV or JSON, row by row as they come.

    Raises:
        ConfigError: Rows of CSV have other columns than the first one.
    """
    if form == "json":
        for row in rows:
            print_json(row)
    elif form == "csv":
        _print_csv(rows)
    elif found := list(rows):
        columns = list(dict.fromkeys(column for row in found for column in row))
        table = Table(*columns)
        for row in found:
            table.add_row(*(_shown(row.get(column)) for column in columns))
        console = Console()
        # Where nobody looks on, no row is broken to fit a terminal that is not there.
        console.print(table, width=None if console.is_terminal else _WIDE)


def _print_csv(rows: Iterable[Mapping[str, Any]]) -> None:
    writer = csv.writer(sys.stdout)
    columns: list[str] = []
    for row in rows:
        if not columns:
            columns = list(row)
            writer.writerow(columns)
        if list(row) != columns:
            raise ConfigError(
                f"{row['database']} has the columns {', '.join(row)}, and those before have {', '.join(columns)}: name "
                "the columns that are wanted, or take --format json"
            )
        writer.writerow(row.values())
        sys.stdout.flush()


def _shown(value: object) -> Text:
    # As it is: what stands in brackets is no markup.
    return Text("" if value is None else str(value))


def apart(columns: Sequence[str]) -> list[str]:
    """Names for *columns*, each another one, and none that of the column with the database."""
    names = ["database"]
    for column in columns:
        again = (name for number in count(2) if (name := f"{column}_{number}") not in names)
        names.append(column if column not in names else next(again))
    return names[1:]


def is_agreed(question: str) -> bool:
    """Ask somebody, on the output that no program reads; nobody there is a no."""
    print(question, "[y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


class Watcher:
    """Shows how far a migration is: a bar on a terminal, else a line every ten seconds; or every outcome, as JSON."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json
        self._told_at = monotonic()
        self._bar: Progress | None = None
        self._task: Any = None

    def __enter__(self) -> Callable[[FleetProgress], None]:
        if not self._as_json and sys.stderr.isatty():
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            console = Console(stderr=True)
            self._bar = Progress(*columns, TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=console)
            self._task = self._bar.add_task("", total=None, note="")
            self._bar.start()
        return self._tell

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _tell(self, progress: FleetProgress) -> None:
        if self._as_json:
            if progress.outcome is not None:
                print_json(facts_of(progress.outcome))
            return
        ended = progress.done + progress.failed
        failed = f"{progress.failed} failed" if progress.failed else ""
        if self._bar is not None:
            self._bar.update(self._task, completed=ended, total=progress.total, description=progress.part, note=failed)
        elif monotonic() - self._told_at >= INTERVAL:
            self._told_at = monotonic()
            print(f"{progress.part}: {ended} of {progress.total} {failed}".rstrip(), file=sys.stderr, flush=True)


def facts_of(outcome: Outcome[Any]) -> dict[str, Any]:
    """What became of one database, for JSON."""
    facts: dict[str, Any] = {
        "database": outcome.name,
        "home": outcome.home,
        "ok": outcome.ok,
        "seconds": round(outcome.seconds, 4),
    }
    if isinstance(outcome.value, Migration):
        facts |= {"before": outcome.value.before, "after": outcome.value.after}
        if outcome.value.drift:
            facts["drift"] = outcome.value.drift
    if isinstance(outcome.value, Made):
        facts |= {"template": outcome.value.template, "revisions": outcome.value.revisions}
    if outcome.error is not None:
        facts["error"] = Failure.of(outcome.error).as_dict()
    return facts


@contextmanager
def interrupts(control: Control) -> Iterator[None]:
    """Have Ctrl-C, or a SIGTERM, end a run as *control* does: once to let what runs end, twice to stop it."""
    said = ("finishing what is under way; once more to stop it between two statements", "stopping between statements")

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  # a handler's
        told = said[control.is_draining]
        control.interrupt()
        print(f"shardrepo: {told}", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
