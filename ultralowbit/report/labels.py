"""Where names stand in a picture: beside their points and lines, over nothing else."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ultralowbit.report.style import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


APART = 6
"""Pixels between names that stand side by side, at least."""


class Point(NamedTuple):
    """A run on a scatter plot; `low` and `high` are the extremes over seeds. One that is "beyond" what is drawn stands
    at the upper edge, whatever its y."""

    label: str
    x: float
    y: float
    low: float
    high: float
    front: bool
    kind: Literal["run", "reference", "told", "beyond"] = "run"


def short(name: str, most: int) -> str:
    """A name of at most `most` letters: of a longer one the beginning and the end."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[-(most - 1 - head) :]}"


def letters(width: float) -> int:
    """Letters of a name that a figure has room for."""
    return max(16, int(width) // 27)


def place_labels(ax: Axes, points: Sequence[Point], level: tuple[str, float] | None) -> None:
    """Name the points, and the line at `level`, where the names cover least: each other, marks and lines.

    Every name tries the same places around its point, the nearest first, and moves again while that helps; one that
    ends far away gets a line to its point.
    """
    to, back = ax.transData.transform, ax.transData.inverted().transform
    colours = [LIGHT["ink"] if p.front else LIGHT["muted"] for p in points] + [LIGHT["muted"]] * bool(level)
    room = letters(ax.figure.bbox.width)
    names = [short(p.label, room) for p in points] + ([level[0]] if level else [])
    texts = [ax.text(0, 0, name, fontsize=10, color=c, zorder=4) for name, c in zip(names, colours, strict=True)]
    boxes = [text.get_window_extent(ax.figure.canvas.get_renderer()) for text in texts]
    sizes = [(box.width + APART, box.height) for box in boxes]
    at = [tuple(to((p.x, p.y))) for p in points]
    choices = [_around(xy, size) for xy, size in zip(at, sizes, strict=False)]
    if level:
        choices.append(_along(ax, to((1, level[1]))[1], sizes[-1]))
    frame = (ax.bbox.x0 + 1, ax.bbox.y0 + 1, ax.bbox.x1 - 1, ax.bbox.y1 - 1)
    obstacles = _obstacles(ax, points, level)
    chosen: list[Box | None] = [None] * len(texts)

    def cost(i: int, box: Box, away: float) -> float:
        others = sum(_overlap(box, b) for j, b in enumerate(chosen) if b is not None and j != i)
        outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
        return 4 * others + 2 * sum(_overlap(box, b) for b in obstacles) + 8 * outside + 2.5 * away

    for _ in range(12):
        before = list(chosen)
        for i, places in enumerate(choices):
            chosen[i] = min(places, key=lambda place, i=i: cost(i, *place))[0]
        if chosen == before:
            break
    for text, box in zip(texts, chosen, strict=True):
        text.set(position=back((box[0] + APART / 2, (box[1] + box[3]) / 2)), va="center_baseline", ha="left")
    for (x, y), box in zip(at, chosen, strict=False):
        near = (min(max(x, box[0]), box[2]), min(max(y, box[1]), box[3]))
        if math.dist(near, (x, y)) > 14:
            xs, ys = zip(back((x, y)), back(near), strict=True)
            ax.plot(xs, ys, color=LIGHT["muted"], linewidth=0.7, zorder=1.5, scalex=False, scaley=False)


Box = tuple[float, float, float, float]
"""left, bottom, right, top in pixels"""


def _obstacles(ax: Axes, points: Sequence[Point], level: tuple[str, float] | None) -> list[Box]:
    """What no name may cover: marks, whiskers, the front, the level."""
    to = ax.transData.transform
    boxes = []
    for p in points:
        (x, y), low, high = to((p.x, p.y)), to((p.x, p.low))[1], to((p.x, p.high))[1]
        boxes += [(x - 6, y - 6, x + 6, y + 6), (x - 2, low, x + 2, high)]
    front = sorted(tuple(to((p.x, p.y))) for p in points if p.front)
    for (x0, y0), (x1, y1) in itertools.pairwise(front):
        boxes += [(x0, y0 - 2, x1, y0 + 2), (x1 - 2, min(y0, y1), x1 + 2, max(y0, y1))]
    if level:
        y = to((1, level[1]))[1]
        boxes.append((ax.bbox.x0, y - 1, ax.bbox.x1, y + 1))
    return boxes


def _around(at: tuple[float, float], size: tuple[float, float]) -> list[tuple[Box, float]]:
    """Boxes of a size around a point, and how far away each is."""
    (x, y), (w, h) = at, size
    boxes = []
    for gap in (8, 12, 18, 26, 36, 50, 68):
        for k in range(16):
            dx, dy = math.cos(math.pi * k / 8), math.sin(math.pi * k / 8)
            cx, cy = x + dx * (gap + w / 2), y + dy * (gap + h / 2)
            boxes.append(((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), gap - 8 + 2 * abs(dy)))
    return boxes


def _along(ax: Axes, y: float, size: tuple[float, float]) -> list[tuple[Box, float]]:
    """Boxes of a size above and below a line across the axes, at its right end if there is room."""
    w, h = size
    room = ax.bbox.width - w - 4
    return [
        ((left, bottom, left + w, bottom + h), 6 * k + 3 * (bottom < y))
        for k in range(11)
        for left in [ax.bbox.x0 + 2 + room * (10 - k) / 10]
        for bottom in (y + 3, y - h - 3)
    ]


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def spread(heights: Sequence[float], apart: float) -> list[float]:
    """The same heights, moved as little as keeps each pair `apart`: neighbours that touch move together."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    clusters: list[list[float]] = []  # sum of heights wished for the first, members
    for k, i in enumerate(order):
        clusters.append([heights[i], 1, k])
        while len(clusters) > 1:
            (s0, n0, k0), (s1, n1, _) = clusters[-2:]
            if s1 / n1 - s0 / n0 >= apart * n0:
                break
            clusters[-2:] = [[s0 + s1 - apart * n0 * n1, n0 + n1, k0]]
    moved = [0.0] * len(heights)
    for total, count, first in clusters:
        for j in range(int(count)):
            moved[order[int(first) + j]] = total / count + apart * j
    return moved


def legend_columns(labels: Sequence[str], width: int) -> int:
    """As many as fit: names fill one column after the other, the first ones of which may hold one more."""
    for columns in range(len(labels), 1, -1):
        rows, longer = divmod(len(labels), columns)
        rest = iter(labels)
        sizes = [rows + (i < longer) for i in range(columns)]
        longest = [max(len(label) for label in itertools.islice(rest, size)) for size in sizes]
        if sum(6.6 * n + 36 for n in longest) < width - 10:
            return columns
    return 1


def legend_height(labels: Sequence[str], width: int) -> int:
    """The height of a legend in CSS pixels."""
    return 19 * -(-len(labels) // legend_columns(labels, width))


def add_legend(figure: Figure, handles: Sequence[Any], width: int) -> None:
    """Put a legend above the axes."""
    labels = [handle.get_label() for handle in handles]
    figure.legend(
        handles=list(handles), loc="outside upper left", ncols=legend_columns(labels, width), frameon=False,
        fontsize=10, handlelength=1, handleheight=0.9, handletextpad=0.5, columnspacing=1.4, borderpad=0.1,
    )  # fmt: skip
