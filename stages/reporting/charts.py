"""Geometry of the report's drawings, in the units of an SVG: numbers and names, no markup.

- the template draws them; names pass through it and are escaped there
- numbers are rounded, so that equal runs give equal bytes
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

WIDTH, HEIGHT = 640.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 16.0, 8.0, 24.0  # margins of a line chart
BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 128.0, 46.0, 34.0, 16.0  # of the graph

LARGEST = 10**12
Place = tuple[str, str]  # in a column of the graph: a node, twice, or an edge on its way


@dataclass(frozen=True)
class Series:
    """A curve: y values, evenly spread up to x = `end`."""

    name: str
    values: Sequence[float]
    end: float


@dataclass(frozen=True)
class Line:
    """A curve as it is drawn; `last` is its last value."""

    name: str
    points: str
    last: float


@dataclass(frozen=True)
class LineChart:
    """Lines and the ticks of both axes: (place, label)."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True)
class Box:
    """A node of the graph: its corner, its two lines of text."""

    name: str
    detail: str
    x: float
    y: float


@dataclass(frozen=True)
class Graph:
    """Boxes, and edges as SVG paths."""

    width: float
    height: float
    boxes: tuple[Box, ...]
    edges: tuple[str, ...]


def line_chart(title: str, series: Sequence[Series]) -> LineChart:
    """Curves over one pair of axes."""
    series = [Series(each.name, [_bounded(value) for value in each.values], _bounded(each.end)) for each in series]
    values = [value for each in series for value in each.values]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.5
    low, high = low - room, high + room
    end = max(each.end for each in series)

    def x(value: float) -> float:
        return round(LEFT + value / end * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        return round(TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    for each in series:
        count = len(each.values)
        places = [(number + 1) / count * each.end for number in range(count)]
        points = " ".join(f"{x(place)},{y(value)}" for place, value in zip(places, each.values, strict=True))
        lines.append(Line(each.name, points, each.values[-1]))
    return LineChart(
        title,
        tuple(lines),
        tuple((x(value), f"{value:,.0f}") for value in ticks(0, end) if value),
        tuple((y(value), f"{value:g}") for value in ticks(low, high)),
    )


def _bounded(value: float) -> float:
    """Numbers beyond this are no losses and no steps, and arithmetic on them may not end well."""
    return float(max(-LARGEST, min(LARGEST, value)))


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between `low` and `high`."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 10) for number in range(first, math.floor(high / step + 1e-9) + 1)]


def graph(nodes: Mapping[str, str], inputs: Mapping[str, Sequence[str]]) -> Graph:
    """Boxes in columns, each to the right of what it was made from; edges that others imply are left out.

    nodes: name and second line. inputs: of a node, the nodes it was made from.
    """
    made_from = {name: [start for start in inputs.get(name, ()) if start in nodes and start != name] for name in nodes}
    column = _columns(made_from)
    pairs = [(start, name) for name in nodes for start in made_from[name] if not _implied(start, name, made_from)]
    places: list[list[Place]] = [[] for _ in range(max(column.values(), default=-1) + 1)]
    for name in nodes:
        places[column[name]].append((name, name))
    for start, end in pairs:  # an edge that passes columns gets a place in each, so that it crosses no box
        for passed in range(column[start] + 1, column[end]):
            places[passed].append((start, end))
    _sort(places, pairs)
    tallest = max(map(len, places), default=0)
    corners = {
        (number, place): (
            number * (BOX_WIDTH + GAP_X) + 1,
            (tallest - len(row)) * (BOX_HEIGHT + GAP_Y) / 2 + rank * (BOX_HEIGHT + GAP_Y) + 1,
        )
        for number, row in enumerate(places)
        for rank, place in enumerate(row)
    }
    boxes = [Box(name, nodes[name], *corners[column[name], (name, name)]) for name in nodes]
    edges = []
    for start, end in pairs:
        way = [corners[number, (start, end)] for number in range(column[start] + 1, column[end])]
        edges.append(_path([corners[column[start], (start, start)], *way, corners[column[end], (end, end)]]))
    width = len(places) * (BOX_WIDTH + GAP_X) - GAP_X + 2
    height = tallest * (BOX_HEIGHT + GAP_Y) - GAP_Y + 2
    return Graph(max(width, 2.0), max(height, 2.0), tuple(boxes), tuple(edges))


def _columns(inputs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The longest way to each node; rounds are counted, as manifests may be made to name each other in a circle."""
    column = dict.fromkeys(inputs, 0)
    for _ in range(len(inputs)):
        further = {name: max((1 + column[start] for start in starts), default=0) for name, starts in inputs.items()}
        if further == column:
            break
        column = further
    return column


def _implied(start: str, name: str, inputs: Mapping[str, Sequence[str]]) -> bool:
    """Whether `name` was also made from something that was made from `start`."""
    return any(start in inputs[other] for other in inputs[name] if other != start)


def _sort(columns: list[list[Place]], pairs: Sequence[tuple[str, str]]) -> None:
    """Order each column by where in the one before it its edges come from."""
    for before, column in pairwise(columns):
        rank = {place: (number + 0.5) / len(before) for number, place in enumerate(before)}

        def height(place: Place, rank: Mapping[Place, float] = rank) -> float:
            start, end = place
            starts = [other for other, name in pairs if name == end] if start == end else [start]
            found = [rank[key] for other in starts for key in ((other, other), (other, end)) if key in rank]
            return sum(found) / len(found) if found else 0.5

        column.sort(key=height)


def _path(corners: Sequence[tuple[float, float]]) -> str:
    """A curve from the right of the first box to the left of the last, straight where it passes columns."""
    x, y = corners[0][0] + BOX_WIDTH, corners[0][1] + BOX_HEIGHT / 2
    path = f"M{x:.0f},{y:.0f}"
    for number, (left, top) in enumerate(corners[1:], 2):
        to_x, to_y = left - (5 if number == len(corners) else 0), top + BOX_HEIGHT / 2
        path += f" C{x + GAP_X / 2:.0f},{y:.0f} {to_x - GAP_X / 2:.0f},{to_y:.0f} {to_x:.0f},{to_y:.0f}"
        x, y = left + BOX_WIDTH, to_y
        path += f" L{x:.0f},{y:.0f}" if number < len(corners) else ""
    return path
