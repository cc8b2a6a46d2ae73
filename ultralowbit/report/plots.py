"""The pictures of a comparison, each as PNG, as SVG, and as SVG for a page whose colours follow the reader's theme."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ultralowbit.checkpoint.storage import write_atomic
from ultralowbit.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {  # name -> on light, on dark; the series can be told apart by people who are colour-blind
    "paper": ("#fefefe", "#14171c"),
    "ink": ("#1c2127", "#e8eaed"),
    "muted": ("#667080", "#9aa3ae"),
    "grid": ("#e4e7eb", "#2b3038"),
    "accent": ("#0a63c2", "#6db3ff"),
    "s1": ("#0072b2", "#4aa8e0"),
    "s2": ("#d55e00", "#ff8c4d"),
    "s3": ("#009e73", "#33c69d"),
    "s4": ("#c566a0", "#e79fca"),
    "s5": ("#dd9900", "#f3b93f"),
    "s6": ("#4fb0e8", "#98d5f7"),
    "s7": ("#6f4b9b", "#b193d9"),
    "s8": ("#7d858f", "#a9b0b8"),
}
LIGHT = {name: pair[0] for name, pair in COLOURS.items()}
SERIES = tuple(LIGHT[f"s{i}"] for i in range(1, 9))
WIDE, NARROW = 760, 360
"""Widths in CSS pixels of the two drawings of a picture: a phone shows the narrow one."""

_PIXELS = 72  # matplotlib's SVG has 72 units an inch, and is shown with one a pixel
_STYLE = {
    "svg.fonttype": "none",  # text stays text
    "font.family": "DejaVu Sans",  # in every install of matplotlib; wider than what a page shows, so labels have room
    "font.size": 11,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.labelsize": 10.5,
    "axes.titlesize": 11,
    "axes.titlecolor": LIGHT["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "figure.facecolor": LIGHT["paper"],
    "axes.facecolor": "none",
    "savefig.facecolor": LIGHT["paper"],
}


@dataclass(frozen=True)
class Plot:
    """One picture: `draw(width)` makes it, some `width` CSS pixels wide, on a phone as on a desk."""

    name: str
    title: str
    caption: str
    draw: Callable[[int], Figure]


class Point(NamedTuple):
    """A run on a scatter plot; `low` and `high` are the extremes over seeds. One that is "beyond" what is drawn stands
    at the upper edge, whatever its y."""

    label: str
    x: float
    y: float
    low: float
    high: float
    front: bool
    kind: Literal["run", "reference", "beyond"] = "run"


def require() -> None:
    """Raise `InputError` where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise InputError("plots need the package matplotlib: run `pip install 'ultralowbit[report]'`") from e


def save(plot: Plot, folder: Path) -> dict[str, str]:
    """Write NAME.png and NAME.svg; returns the picture's drawings for a page, "wide" and "narrow"."""
    import matplotlib

    pages = {}
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": plot.name}):
        for size, width in (("wide", WIDE), ("narrow", NARROW)):
            figure = plot.draw(width)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # or each file would lay it out again
            svg = io.StringIO()
            figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None}, transparent=size != "wide")
            if size == "wide":
                png = io.BytesIO()
                figure.savefig(png, format="png", dpi=2 * _PIXELS, metadata={"Software": None})
                write_atomic(folder / f"{plot.name}.png", png.getvalue())
                write_atomic(folder / f"{plot.name}.svg", svg.getvalue().encode())
            pages[size] = _inline(svg.getvalue(), f"{plot.name}-{size}", plot.title)
    return pages


def _inline(svg: str, name: str, title: str) -> str:
    """An SVG to stand inside a page: its colours are the page's variables, its ids its own, its text the page's."""
    body = svg[svg.index("<svg") :]
    box = re.search(r'viewBox="[^"]*"', body)[0]
    body = body[body.index(">", body.index("<svg")) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="patch_1">.*?</g>', "", body, count=1, flags=re.DOTALL)  # the paper
    body = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"font: ([^;\"']*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--font)", body)
    for colour, value in LIGHT.items():
        body = body.replace(value, f"var(--{colour})")
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box} role="img" aria-label="{label}">{body}'


def _figure(width: int, height: int, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """A figure of so many CSS pixels, and its axes row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _PIXELS, height / _PIXELS), dpi=_PIXELS, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=5 / _PIXELS, h_pad=5 / _PIXELS)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)


def short(name: str, most: int) -> str:
    """A name of at most `most` letters: of a longer one the beginning and the end."""
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[-(most - 1 - head) :]}"


def _room(width: float) -> int:
    """Letters of a name that a figure has room for."""
    return max(16, int(width) // 27)


# --- quality against size --------------------------------------------------------------------------------------------


def scatter(
    panels: Sequence[tuple[str, Sequence[Point]]], y_label: str, level: tuple[str, float] | None, percent: bool = False
) -> Callable[[int], Figure]:
    """`draw` of quality against one kind of size a panel (its label, its points); `level` is the original's line."""

    def draw(width: int) -> Figure:
        beside = width > 500
        shape = (1, len(panels)) if beside else (len(panels), 1)
        figure, axes = _figure(width, 360 if beside else 330 * len(panels), *shape, sharey=beside)
        placed = []
        for i, (ax, (x_label, points)) in enumerate(zip(axes, panels, strict=True)):
            values = [v for p in points if p.kind != "beyond" for v in (p.low, p.high)] + ([level[1]] if level else [])
            _scale(ax.yaxis, values, log=not percent)
            _scale(ax.xaxis, [p.x for p in points], log=True)
            if percent:
                as_percent(ax.yaxis)
            edge = ax.get_ylim()[1]
            placed.append([p._replace(y=edge, low=edge, high=edge) if p.kind == "beyond" else p for p in points])
            _points(ax, placed[-1])
            ax.set_xlabel(x_label)
            if i == 0 or not beside:
                ax.set_ylabel(y_label)
            if level:
                ax.axhline(level[1], color=LIGHT["muted"], linewidth=1.2, linestyle=(0, (4, 3)), zorder=1)
        figure.draw_without_rendering()  # lays the axes out: names are placed in pixels
        figure.set_layout_engine("none")
        for ax, points in zip(axes, placed, strict=True):
            place_labels(ax, points, level)
        return figure

    return draw


def _points(ax: Axes, points: Sequence[Point]) -> None:
    front = sorted((p.x, p.y) for p in points if p.front)
    if len(front) > 1:
        ax.step(*zip(*front, strict=True), where="post", color=LIGHT["accent"], linewidth=1.4, zorder=2)
    for p in points:
        colour = LIGHT["accent"] if p.front else LIGHT["muted"]
        if p.high > p.low:
            ax.plot([p.x, p.x], [p.low, p.high], color=colour, linewidth=1.2, zorder=2, solid_capstyle="butt")
        face = colour if p.front else LIGHT["paper"]
        marker = {"run": "o", "reference": "D", "beyond": "^"}[p.kind]
        ax.plot(
            p.x, p.y, marker, color=colour, markerfacecolor=face, markersize=7, markeredgewidth=1.6, zorder=3,
            clip_on=False,
        )  # fmt: skip


def _scale(axis: Any, values: Sequence[float], log: bool) -> None:
    """A logarithmic axis where the values span more than a factor of 2.5, with ticks that people count in."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    values = [value for value in values if math.isfinite(value)]
    low, high = min(values), max(values)
    set_limits = axis.axes.set_ylim if axis.axis_name == "y" else axis.axes.set_xlim
    if log and low > 0 and high / low > 2.5:
        (axis.axes.set_yscale if axis.axis_name == "y" else axis.axes.set_xscale)("log")
        room = (high / low) ** 0.09
        set_limits(low / room, high * room)
        axis.set_major_locator(FixedLocator(nice_ticks(low / room, high * room)))
        axis.set_minor_locator(NullLocator())
    else:
        room = (high - low) * 0.1 or abs(high) * 0.1 or 1
        set_limits(low - room, high + room)
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers for a logarithmic axis: as many as can be read, never more than `most`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        found = [step * 10**d for d in decades for step in steps if low <= step * 10**d <= high]
        if len(found) <= most:
            break
    return found[:: -(-len(found) // most)] if len(found) > most else found


def place_labels(ax: Axes, points: Sequence[Point], level: tuple[str, float] | None) -> None:
    """Name the points, and the line at `level`, where the names cover least: each other, marks and lines.

    Every name tries the same places around its point, the nearest first, and moves again while that helps; one that
    ends far away gets a line to its point.
    """
    to, back = ax.transData.transform, ax.transData.inverted().transform
    colours = [LIGHT["ink"] if p.front else LIGHT["muted"] for p in points] + [LIGHT["muted"]] * bool(level)
    room = _room(ax.figure.bbox.width)
    names = [short(p.label, room) for p in points] + ([level[0]] if level else [])
    texts = [ax.text(0, 0, name, fontsize=10, color=c, zorder=4) for name, c in zip(names, colours, strict=True)]
    boxes = [text.get_window_extent(ax.figure.canvas.get_renderer()) for text in texts]
    sizes = [(box.width, box.height) for box in boxes]
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
        text.set(position=back((box[0], (box[1] + box[3]) / 2)), va="center_baseline", ha="left")
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
    found = []
    for gap in (8, 12, 18, 26, 36, 50, 68):
        for k in range(16):
            dx, dy = math.cos(math.pi * k / 8), math.sin(math.pi * k / 8)
            cx, cy = x + dx * (gap + w / 2), y + dy * (gap + h / 2)
            found.append(((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), gap - 8 + 2 * abs(dy)))
    return found


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


# --- errors ----------------------------------------------------------------------------------------------------------


def lines(
    series: Sequence[tuple[str, Sequence[float]]], x_label: str, y_label: str, *, percent: bool = False
) -> Callable[[int], Figure]:
    """`draw` of one line a run over the blocks, named at its right end."""

    def draw(width: int) -> Figure:
        figure, (ax,) = _figure(width, 340 if width > 500 else 360)
        values = [v for _, ys in series for v in ys]
        depth = max(len(ys) for _, ys in series)
        for i, (_, ys) in enumerate(series):
            dashes = ("-", (0, (5, 2)), (0, (1.5, 1.5)))[i // len(SERIES) % 3]
            marker = "o" if depth <= 12 else None
            ax.plot(range(len(ys)), ys, color=SERIES[i % len(SERIES)], linestyle=dashes, marker=marker, markersize=4)
        _scale(ax.yaxis, values, log=True)
        if percent:
            as_percent(ax.yaxis)
        ax.set_xlim(-0.03 * depth, (depth - 1) * 1.02 or 1)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.set_xlabel(x_label)
        ax.set_ylabel(y_label)
        ends = [next(y for y in reversed(ys) if math.isfinite(y)) for _, ys in series]
        texts = [
            ax.annotate(
                short(label, _room(width)), (1, end), xycoords=("axes fraction", "data"), xytext=(20, 0),
                textcoords="offset points", color=line.get_color(), fontsize=10, va="center",
                arrowprops={
                    "arrowstyle": "-", "color": line.get_color(), "linestyle": line.get_linestyle(), "relpos": (0, 0.5),
                    "shrinkA": 2, "shrinkB": 2,
                },
            )
            for (label, _), end, line in zip(series, ends, list(ax.get_lines()), strict=True)
        ]  # fmt: skip
        figure.draw_without_rendering()
        heights = [ax.transData.transform((0, end))[1] for end in ends]
        for text, before, after in zip(texts, heights, spread(heights, 14), strict=True):
            text.set_position((20, after - before))
        return figure

    return draw


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
    found = [0.0] * len(heights)
    for total, count, first in clusters:
        for j in range(int(count)):
            found[order[int(first) + j]] = total / count + apart * j
    return found


def dots(rows: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str], x_label: str) -> Callable[[int], Figure]:
    """`draw` of one row a kind of Linear with a dot for each run."""

    def draw(width: int) -> Figure:
        names = [short(label, 2 * _room(width)) for label in labels]
        figure, (ax,) = _figure(width, 90 + 26 * len(rows) + _legend_height(names, width))
        for i, label in enumerate(names):
            xs = [values[i] for _, values in rows]
            marker = ("o", "s", "^")[i // len(SERIES) % 3]
            ax.plot(xs, range(len(rows)), marker, color=SERIES[i % len(SERIES)], markersize=6.5, label=label)
        _scale(ax.xaxis, [v for _, values in rows for v in values], log=True)
        as_percent(ax.xaxis)
        _names(ax, [name for name, _ in rows])
        ax.set_xlabel(x_label)
        _legend(figure, ax.get_lines(), width)
        return figure

    return draw


def as_percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))


# --- bars ------------------------------------------------------------------------------------------------------------


def stacked(
    panels: Sequence[tuple[str, Sequence[tuple[str, dict[str, float]]]]], kinds: Sequence[str], digits: str
) -> Callable[[int], Figure]:
    """`draw` of a stacked bar a run in each panel: (its label, [(run, kind -> amount)]); a kind has the colour of its
    place in `kinds`, whether others are there or not."""

    def draw(width: int) -> Figure:
        from matplotlib.patches import Patch

        beside = width > 500
        rows = max(len(bars) for _, bars in panels)
        shape = (1, len(panels)) if beside else (len(panels), 1)
        height = 66 + 25 * rows
        used = [kind for kind in kinds if any(amounts.get(kind) for _, bars in panels for _, amounts in bars)]
        legend = _legend_height(used, width)
        figure, axes = _figure(width, legend + (height if beside else height * len(panels)), *shape)
        for p, (ax, (x_label, bars)) in enumerate(zip(axes, panels, strict=True)):
            for y, (_, amounts) in enumerate(bars):
                left = 0.0
                for i, kind in enumerate(kinds):
                    amount = amounts.get(kind, 0.0)
                    if amount:
                        ax.barh(
                            y, amount, left=left, color=SERIES[i], edgecolor=LIGHT["paper"], height=0.66, linewidth=0.8
                        )  # fmt: skip
                    left += amount
                _beside(ax, digits.format(left), left, y)
            _names(ax, [name for name, _ in bars] if p == 0 or not beside else [""] * len(bars))
            ax.set_xlim(0, 1.17 * max(sum(amounts.values()) for _, amounts in bars))
            ax.set_xlabel(x_label)
        patches = [Patch(color=SERIES[kinds.index(kind)], label=kind) for kind in used]
        _legend(figure, patches, width)
        return figure

    return draw


def bars(panels: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> Callable[[int], Figure]:
    """`draw` of a bar a run in each panel: (its label, [(run, amount, the amount in words)])."""

    def draw(width: int) -> Figure:
        beside = width > 500
        shape = (1, len(panels)) if beside else (len(panels), 1)
        height = 66 + 25 * max(len(rows) for _, rows in panels)
        figure, axes = _figure(width, height if beside else height * len(panels), *shape)
        for p, (ax, (x_label, rows)) in enumerate(zip(axes, panels, strict=True)):
            for y, (_, amount, words) in enumerate(rows):
                ax.barh(y, amount, color=LIGHT["s1"], height=0.6)
                _beside(ax, words, amount, y)
            _names(ax, [name for name, _, _ in rows] if p == 0 or not beside else [""] * len(rows))
            ax.set_xlim(0, 1.25 * max(amount for _, amount, _ in rows) or 1)
            ax.set_xlabel(x_label)
        return figure

    return draw


def _beside(ax: Axes, words: str, x: float, y: float) -> None:
    """What a bar that ends at x amounts to."""
    ax.annotate(words, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=10)


def _names(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows, the first on top."""
    room = _room(ax.figure.bbox.width)
    ax.set_yticks(range(len(names)), [short(name, room) for name in names], color=LIGHT["ink"])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)


def _legend_columns(labels: Sequence[str], width: int) -> int:
    """As many as fit: names fill one column after the other, the first ones of which may hold one more."""
    for columns in range(len(labels), 1, -1):
        rows, longer = divmod(len(labels), columns)
        rest = iter(labels)
        sizes = [rows + (i < longer) for i in range(columns)]
        longest = [max(len(label) for label in itertools.islice(rest, size)) for size in sizes]
        if sum(6.6 * n + 36 for n in longest) < width - 10:
            return columns
    return 1


def _legend_height(labels: Sequence[str], width: int) -> int:
    return 19 * -(-len(labels) // _legend_columns(labels, width))


def _legend(figure: Figure, handles: Sequence[Any], width: int) -> None:
    labels = [handle.get_label() for handle in handles]
    figure.legend(
        handles=list(handles), loc="outside upper left", ncols=_legend_columns(labels, width), frameon=False,
        fontsize=10, handlelength=1, handleheight=0.9, handletextpad=0.5, columnspacing=1.4, borderpad=0.1,
    )  # fmt: skip
