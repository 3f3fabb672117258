"""The results, as tables to look at, as JSON, and as the page docs/figures.md with its pictures."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias, TypeVar

from psycopg import pq

from .measure import Figure, Picture, Result, Skipped, Spread, Table

FIGURES = Path(__file__).parents[1] / "docs" / "figures.md"

# Beside the page, one for each of a picture's formats.
_FOLDER = "figures"

Results: TypeAlias = Mapping[str, "Section"]

T = TypeVar("T")

_HEAD = """# Figures

Written by `make bench` (`python -m benchmarks --write`); do not edit. Every ratio is taken within a round, between
subjects that take turns, and is the median of all rounds; in brackets are the quartiles. The times are of this
machine and this day; the ratios are what to compare.

"""

_TO_REACH = """What is aimed at, out of all that follows. That no row is one of another database, whatever fails, is the
last table, under [soak](#soak)."""


@dataclass(frozen=True, slots=True)
class Section:
    """What one benchmark measured; *about* is its docstring."""

    about: str
    lines: Sequence[Result]

    def only(self, kind: type[T]) -> list[T]:
        """The lines of one kind, in their order."""
        return [line for line in self.lines if isinstance(line, kind)]


def surroundings(server_version: int | None) -> dict[str, str]:
    """Say on what machine and with which versions this ran."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    known = {
        "date": date.today().isoformat(),
        "machine": f"{os.cpu_count()} cores ({_processor()}), {memory:.0f} GB",
        "load before": f"{os.getloadavg()[0]:.1f}",
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "postgresql": "none" if server_version is None else f"{server_version // 10000}.{server_version % 10000}",
        "libpq": pq.version_pretty(pq.version()),
    }
    return known | {name: version(name) for name in ("shardrepo", "sqlalchemy", "psycopg")}


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.+)", information.read_text()) if information.exists() else None
    return found[1] if found else platform.machine()


def as_json(results: Results, about: Mapping[str, str]) -> str:
    """One object with everything."""
    return json.dumps({**about, "benchmarks": {name: _plain(section) for name, section in results.items()}}, indent=2)


def _plain(section: Section) -> dict[str, Any]:
    figures = [
        {"what": line.what, **asdict(line.value), "unit": line.unit, "goal": _goal(line), "reached": line.reached}
        for line in section.only(Figure)
    ]
    tables = [{"what": table.what, "rows": _plain_rows(table)} for table in section.only(Table)]
    skipped = [asdict(line) for line in section.only(Skipped)]
    return {"figures": figures, "tables": tables, "skipped": skipped}


def _plain_rows(table: Table) -> dict[str, dict[str, Any]]:
    return {
        name: {
            column: asdict(cell) if isinstance(cell, Spread) else cell
            for column, cell in zip(table.columns, cells, strict=True)
        }
        for name, cells in table.rows.items()
    }


def as_table(results: Results) -> Iterator[str]:
    """Lines for a terminal."""
    for name, section in results.items():
        yield ""
        yield f"{name}: {section.about.splitlines()[0]}"
        for table in section.only(Table):
            yield f"  {table.what}"
            for row in (("", *table.columns), *_rows(table)):
                yield f"    {row[0]:<44} {' '.join(f'{cell:>20}' for cell in row[1:])}".rstrip()
        for line in section.lines:
            if isinstance(line, Figure | Skipped):
                what, value, goal = _cells(line)
                yield f"  {what:<64} {value:<36} {goal}".rstrip()


def as_page(results: Results, about: Mapping[str, str], before: str = "") -> str:
    """The page docs/figures.md; *before* is what it said until now."""
    page = _HEAD + "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in about.items())
    page += _to_reach(results, before)
    for name, section in results.items():
        page += f"\n## {name}\n\n{section.about.strip()}\n"
        for picture in section.only(Picture):
            page += f"\n![{picture.caption}]({_FOLDER}/{picture.name}.svg)\n"
        for table in section.only(Table):
            page += f"\n{table.what}:\n\n" + _as_markdown(("", *table.columns), _rows(table))
        if lines := [line for line in section.lines if isinstance(line, Figure | Skipped)]:
            page += "\n" + _as_markdown(("", "measured", "to reach"), map(_cells, lines))
    return page


def _to_reach(results: Results, before: str) -> str:
    """What is aimed at, out of all sections, and beside it what the run before has measured."""
    known = _measured_in(before)
    day = re.search(r"^\| date \| (\S+) \|$", before, re.MULTILINE)
    rows = [
        (f"[{name}](#{name}): {what}", goal, value, known.get((name, what), ""))
        for name, section in results.items()
        for what, value, goal in map(_cells, section.only(Figure))
        if goal
    ]
    if not rows:
        return ""
    head = ("", "to reach", "measured", f"the run before, {day[1]}" if day else "the run before")
    return f"\n## to reach\n\n{_TO_REACH}\n\n{_as_markdown(head, rows)}"


def _measured_in(page: str) -> dict[tuple[str, str], str]:
    """What a page says was measured, by section and line."""
    return {
        (name, what): value
        for name, section in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
        for what, value in re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]*\|$", section, re.MULTILINE)
    }


def _as_markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |".replace("|  |", "| |"), f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def write(page: str, results: Results, path: Path = FIGURES) -> None:
    """Draw the pictures and write the page: all of it is made beside its place, and only then put there."""
    with TemporaryDirectory(dir=path.parent, prefix=".figures-") as made:
        (Path(made) / path.name).write_text(page, encoding="utf-8")
        for picture in (picture for section in results.values() for picture in section.only(Picture)):
            save(picture, Path(made))
        (path.parent / _FOLDER).mkdir(exist_ok=True)
        for file in sorted(Path(made).iterdir(), key=lambda file: file.suffix == path.suffix):
            file.replace((path.parent if file.name == path.name else path.parent / _FOLDER) / file.name)


def save(picture: Picture, folder: Path) -> None:
    """Write it as PNG and as SVG: the same files for the same data, which need no font."""
    from matplotlib import rc_context

    with rc_context({"svg.fonttype": "path", "svg.hashsalt": picture.name}):
        drawing = picture.draw()
        drawing.savefig(folder / f"{picture.name}.png", metadata={"Software": None})
        drawing.savefig(folder / f"{picture.name}.svg", metadata={"Date": None})


def _rows(table: Table) -> Iterator[tuple[str, ...]]:
    for name, cells in table.rows.items():
        yield (name, *(_short(cell) if isinstance(cell, Spread) else cell for cell in cells))


def _short(spread: Spread) -> str:
    """The median, and the quartiles where they are told from it."""
    median, low, high = map(_rounded, (spread.median, spread.low, spread.high))
    return median if low == median == high else f"{median} [{low}, {high}]"


def _rounded(value: float) -> str:
    """Three digits, or all that stand before the point."""
    if value == int(value):
        return f"{value:,.0f}"
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def _cells(line: Figure | Skipped) -> tuple[str, str, str]:
    if isinstance(line, Skipped):
        return line.what, f"skipped, for want of {line.lacks}", ""
    spread, digits = line.value, 1 if line.unit == "µs" else 2
    value = f"{spread.median:.{digits}f} {line.unit} [{spread.low:.{digits}f}, {spread.high:.{digits}f}]"
    return line.what, value, _goal(line) if line.reached is not False else f"{_goal(line)}, missed"


def _goal(line: Figure) -> str:
    return "" if line.goal is None else str(line.goal)
