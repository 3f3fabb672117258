"""The picture: connections over time, as the servers count them, for both ways."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .drivers import Way
from .report import Outcome, Settings

_INK: Final = "#222222"
_QUIET: Final = "#777777"
_COLOURS: Final[Mapping[Way, str]] = {"repo": "#1668b8", "by hand": "#d1495b"}
_NAMES: Final[Mapping[Way, str]] = {"repo": "one Repo", "by hand": "an engine per database"}

# The least distance between the names of two lines, as a share of the axis: each has two lines of text.
_APART: Final = 0.14


def draw(settings: Settings, outcomes: Mapping[Way, Outcome], path: Path) -> Path:
    """Draw both loads into a PNG at *path*."""
    figure = Figure(figsize=(9, 5), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.08, right=0.78, top=0.84, bottom=0.12)
    _dress(axes, settings)
    for outcome in outcomes.values():
        _draw_line(axes, outcome)
    _fit(axes, settings, outcomes)
    _draw_target(axes, settings)
    _draw_end(axes, settings)
    _name_lines(axes, list(outcomes.values()))
    figure.savefig(path)
    return path


def _draw_line(axes: Axes, outcome: Outcome) -> None:
    times = [sample.start - outcome.load.started for sample in outcome.samples]
    totals = [sample.total for sample in outcome.samples]
    axes.plot(times, totals, color=_COLOURS[outcome.way], linewidth=1.6, drawstyle="steps-post")


def _fit(axes: Axes, settings: Settings, outcomes: Mapping[Way, Outcome]) -> None:
    """Let the lines fill the axes, with room for a word above them."""
    highest = max(settings.pool_size, *(outcome.peak.total for outcome in outcomes.values()))
    last = max(outcome.rest.start - outcome.load.started for outcome in outcomes.values())
    axes.set_xlim(0, last)
    axes.set_ylim(0, highest * 1.15)


def _draw_target(axes: Axes, settings: Settings) -> None:
    axes.axhline(settings.pool_size, color=_INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    place = (settings.seconds, settings.pool_size)
    axes.annotate(
        f"target: {settings.pool_size}", place, (-6, 4), textcoords="offset points", ha="right", color=_INK, fontsize=9
    )


def _draw_end(axes: Axes, settings: Settings) -> None:
    """Mark where the load ends, after which the connections are at rest."""
    axes.axvline(settings.seconds, color=_QUIET, linewidth=0.8, linestyle=":")
    axes.annotate(
        "load ends",
        (settings.seconds, 1),
        (-6, -10),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        color=_QUIET,
        fontsize=9,
    )


def _name_lines(axes: Axes, outcomes: list[Outcome]) -> None:
    """Write each line's name at its end, apart from the others."""
    top = axes.get_ylim()[1]
    floor = 0.0
    for outcome in sorted(outcomes, key=lambda outcome: outcome.rest.total):
        height = max(outcome.rest.total / top, floor)
        floor = height + _APART
        text = f"{_NAMES[outcome.way]}\npeak {outcome.peak.total}, at rest {outcome.rest.total}"
        axes.annotate(
            text,
            (1, height),
            (8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=_COLOURS[outcome.way],
        )


def _dress(axes: Axes, settings: Settings) -> None:
    axes.set_title("Open connections, as the servers count them", loc="left", pad=26, fontsize=14, fontweight="bold")
    subtitle = (
        f"{settings.threads} threads over {settings.databases} databases on {settings.servers} servers, "
        f"thinking {settings.think_ms:g} ms between operations"
    )
    axes.annotate(subtitle, (0, 1), (0, 10), xycoords="axes fraction", textcoords="offset points", color=_QUIET)
    axes.set_xlabel("seconds since the load began")
    axes.set_ylabel("connections")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
