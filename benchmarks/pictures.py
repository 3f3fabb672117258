"""What the benchmark `load` draws, in the demo's manner: each rival has one colour."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Final, TypeAlias

from shardrepo.demo.report import Measured

from .measure import Picture
from .rivals import KEPT, NULL_POOL, PER_OPERATION, POOLS, REPO, SHARDED, TENANCY, TENANCY_ON_PSYCOPG

if TYPE_CHECKING:  # matplotlib is loaded by what draws
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Final[Mapping[str, str]] = {
    REPO.name: "#1668b8",
    KEPT.name: "#d1495b",
    SHARDED.name: "#a5527f",
    POOLS.name: "#2e7d5b",
    TENANCY.name: "#c98300",
    TENANCY_ON_PSYCOPG.name: "#8f5200",
    NULL_POOL.name: "#6f5fb0",
    PER_OPERATION.name: "#7a7a7a",
}

# Connections at peak, and operations per second.
Point: TypeAlias = tuple[float, float]

# Of a point, in points.
_SIZE: Final = 8.0

# How much higher than its point a name may stand, in points: what is tried until nothing else is there.
_LIFTS: Final = (0, 6, 11, 16, 22, -6, -11, -16, -22, 33)


def connections(loads: Mapping[str, Measured], where: str, target: int, seconds: float) -> Picture:
    """Connections over time, a line for each."""
    peaks = ", ".join(f"{name} {load.peak.total}" for name, load in loads.items())
    caption = f"Connections over time, as the servers count them, in {where}. At peak: {peaks}."
    return Picture("load-connections", caption, partial(_draw_connections, loads, where, target, seconds))


def throughput(databases: int, cases: Mapping[str, Mapping[str, Point]]) -> Picture:
    """Operations per second against connections at peak, a point for each; a pane for each case."""
    found = "; ".join(
        f"{where}: " + ", ".join(f"{name} {rate:.0f} with {count:.0f}" for name, (count, rate) in points.items())
        for where, points in cases.items()
    )
    caption = f"Operations per second against connections at peak, in {databases} databases. {found}."
    return Picture("load-throughput", caption, partial(_draw_throughput, databases, cases))


def _draw_connections(loads: Mapping[str, Measured], where: str, target: int, seconds: float) -> Figure:
    from shardrepo.demo.picture import Line, draw_connections

    lines = [Line.of(load, name, COLOURS[name]) for name, load in loads.items()]
    return draw_connections(lines, where, target=target, seconds=seconds)


def _draw_throughput(databases: int, cases: Mapping[str, Mapping[str, Point]]) -> Figure:
    from shardrepo.demo.picture import panels

    figure, panes = panels(f"What connections are good for, in {databases} databases", list(cases))
    for axes, points in zip(panes, cases.values(), strict=True):
        axes.set_xlabel("connections at peak, as the servers count them")
        axes.set_xlim(0, max(count for count, _ in points.values()) * 1.2)
        axes.set_ylim(0, max(rate for _, rate in points.values()) * 1.15)
        for name, point in points.items():
            axes.plot(*point, "o", color=COLOURS[name], markersize=_SIZE, markeredgecolor="white")
        _name_points(axes, points)
    panes[0].set_ylabel("operations per second")
    return figure


def _name_points(axes: Axes, points: Mapping[str, Point]) -> None:
    """Write each point's name beside it, the lowest first: of those that meet it stays so."""
    from matplotlib.transforms import Bbox

    reach = _SIZE / 2 * axes.figure.dpi / 72
    taken = [Bbox([place - reach, place + reach]) for place in axes.transData.transform(list(points.values()))]
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        for lift, side in product(_LIFTS, (1, -1)):
            text = axes.annotate(
                name,
                point,
                (side * _SIZE, lift),
                textcoords="offset points",
                color=COLOURS[name],
                fontsize=9,
                ha="left" if side > 0 else "right",
                va="center",
            )
            box = text.get_window_extent()
            if axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and not box.count_overlaps(taken):
                break
            if (lift, side) != (_LIFTS[-1], -1):
                text.remove()
        taken.append(box)
