"""The results, as a table to look at, as JSON, and as the page docs/figures.md."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from psycopg import pq

from .measure import Figure, Skipped

FIGURES = Path(__file__).parents[1] / "docs" / "figures.md"

Results: TypeAlias = Mapping[str, "Section"]

_HEAD = """# Figures

Written by `make bench` (`python -m benchmarks --write`); do not edit. Every ratio is taken within a round, between
subjects that take turns, and is the median of all rounds; in brackets are the quartiles. The times are of this
machine and this day; the ratios are what to compare.

"""


@dataclass(frozen=True, slots=True)
class Section:
    """What one benchmark measured; *about* is its docstring."""

    about: str
    lines: Sequence[Figure | Skipped]


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
        for line in section.lines
        if isinstance(line, Figure)
    ]
    return {"figures": figures, "skipped": [asdict(line) for line in section.lines if isinstance(line, Skipped)]}


def as_table(results: Results) -> Iterator[str]:
    """Lines for a terminal."""
    for name, section in results.items():
        yield ""
        yield f"{name}: {section.about.splitlines()[0]}"
        for what, value, goal in map(_cells, section.lines):
            yield f"  {what:<64} {value:<36} {goal}".rstrip()


def as_page(results: Results, about: Mapping[str, str]) -> str:
    """The page docs/figures.md."""
    page = _HEAD + "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in about.items())
    for name, section in results.items():
        page += f"\n## {name}\n\n{section.about.strip()}\n\n| | measured | to reach |\n|---|---|---|\n"
        page += "".join(f"| {' | '.join(_cells(line))} |\n" for line in section.lines)
    return page


def _cells(line: Figure | Skipped) -> tuple[str, str, str]:
    if isinstance(line, Skipped):
        return line.what, f"skipped, for want of {line.lacks}", ""
    spread, digits = line.value, 1 if line.unit == "µs" else 2
    value = f"{spread.median:.{digits}f} {line.unit} [{spread.low:.{digits}f}, {spread.high:.{digits}f}]"
    return line.what, value, _goal(line) if line.reached is not False else f"{_goal(line)}, missed"


def _goal(line: Figure) -> str:
    return "" if line.goal is None else str(line.goal)
