"""The picture: connections over time, as the servers count them, for both ways; and what such pictures are made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from .drivers import Way
from .report import Measured, Outcome, Settings

INK: Final = "#222222"
QUIET: Final = "#6b6b6b"
ACCENT: Final = "#1668b8"
_COLOURS: Final[Mapping[Way, str]] = {"repo": ACCENT, "by hand": "#d1495b"}
_NAMES: Final[Mapping[Way, str]] = {"repo": "one Repo", "by hand": "an engine per database"}

# The least distance between the names of two lines, as a share of the axis: each has two lines of text.
_APART: Final = 0.14


@dataclass(frozen=True, slots=True)
class Line:
    """Connections over time; *name* stands at its end."""

    name: str
    colour: str
    times: Sequence[float]
    totals: Sequence[int]

    @classmethod
    def of(cls, measured: Measured, name: str, colour: str) -> Line:
        """What the servers listed during a load, and at rest after it."""
        times = [sample.start - measured.load.started for sample in measured.samples]
        return cls(name, colour, times, [sample.total for sample in measured.samples])


def draw(settings: Settings, outcomes: Mapping[Way, Outcome], path: Path) -> Path:
    """Draw both loads into a PNG at *path*."""
    lines = [Line.of(outcome, _NAMES[way], _COLOURS[way]) for way, outcome in outcomes.items()]
    subtitle = (
        f"{settings.threads} threads over {settings.databases} databases on {settings.servers} servers, "
        f"thinking {settings.think_ms:g} ms between operations"
    )
    draw_connections(lines, subtitle, target=settings.pool_size, seconds=settings.seconds).savefig(path)
    return path


def draw_connections(lines: Sequence[Line], subtitle: str, *, target: int, seconds: float) -> Figure:
    """Draw the lines of loads that ended after so many seconds, the first on top of the others."""
    figure, axes = canvas("Open connections, as the servers count them", subtitle)
    for line in reversed(lines):
        axes.plot(line.times, line.totals, color=line.colour, linewidth=1.6, drawstyle="steps-post")
    axes.set_xlim(0, min(line.times[-1] for line in lines))
    # With room for a word above the lines.
    axes.set_ylim(0, max(target, *(max(line.totals) for line in lines)) * 1.15)
    axes.set_xlabel("seconds since the load began")
    axes.set_ylabel("connections")
    _draw_target(axes, target)
    _draw_end(axes, seconds)
    _name(axes, lines)
    return figure


def canvas(title: str, subtitle: str) -> tuple[Figure, Axes]:
    """An empty picture on a ground of its own, with room for names at the right."""
    figure, (axes,) = panels(title, [subtitle])
    figure.subplots_adjust(right=0.745)
    return figure, axes


def panels(title: str, subtitles: Sequence[str]) -> tuple[Figure, Sequence[Axes]]:
    """An empty picture on a ground of its own, with a pane under each subtitle."""
    figure = Figure(figsize=(9, 5), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    panes = figure.subplots(1, len(subtitles), squeeze=False)[0]
    figure.subplots_adjust(left=0.08, right=0.97, top=0.84, bottom=0.12, wspace=0.16)
    panes[0].set_title(title, loc="left", pad=26, fontsize=14, fontweight="bold", color=INK)
    for axes, subtitle in zip(panes, subtitles, strict=True):
        axes.annotate(subtitle, (0, 1), (0, 10), xycoords="axes fraction", textcoords="offset points", color=QUIET)
        _dress(axes)
    return figure, panes


def _dress(axes: Axes) -> None:
    """Take away what says nothing."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#b0b0b0")
    axes.tick_params(color="#b0b0b0", labelcolor=QUIET)
    axes.xaxis.label.set_color(QUIET)
    axes.yaxis.label.set_color(QUIET)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_target(axes: Axes, target: int) -> None:
    axes.axhline(target, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"target: {target}",
        # At the end, where the lines are at rest.
        (1, target),
        (-2, 4),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color=INK,
        fontsize=9,
        # Readable on top of lines, too.
        path_effects=[withStroke(linewidth=3, foreground="white")],
    )


def _draw_end(axes: Axes, seconds: float) -> None:
    """Mark where the load ends, after which the connections are at rest."""
    axes.axvline(seconds, color=QUIET, linewidth=0.8, linestyle=":")
    axes.annotate(
        "load ends",
        (seconds, 1),
        (-6, -10),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        color=QUIET,
        fontsize=9,
    )


def _name(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's name at its end, apart from the others."""
    top = axes.get_ylim()[1]
    ordered = sorted(lines, key=lambda line: line.totals[-1])
    heights = spread([line.totals[-1] / top for line in ordered], min(_APART, 1 / len(ordered)))
    for line, height in zip(ordered, heights, strict=True):
        axes.annotate(
            f"{line.name}\npeak {max(line.totals)}, at rest {line.totals[-1]}",
            (1, height),
            (8, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            va="center",
            color=line.colour,
        )


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """Move ascending *heights* in [0, 1] until each is *apart* from the next: those that meet, around their middle."""
    # Less what stands below, heights that are far enough apart ascend, and those that meet are to be one.
    meeting: list[list[float]] = []
    for number, height in enumerate(heights):
        meeting.append([height - number * apart])
        while len(meeting) > 1 and fmean(meeting[-2]) > fmean(meeting[-1]):
            meeting[-2:] = [meeting[-2] + meeting[-1]]
    highest = 1 - (len(heights) - 1) * apart
    places = [max(0.0, min(fmean(group), highest)) for group in meeting for _ in group]
    return [place + number * apart for number, place in enumerate(places)]
