"""The kinds of pictures: points, lines, dots and bars. Each function returns `draw(width)`, which makes the figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ultralowbit.report.labels import Point, add_legend, legend_height, letters, place_labels, short, spread
from ultralowbit.report.style import LIGHT, SERIES, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def scatter(
    panels: Sequence[tuple[str, Sequence[Point]]], y_label: str, level: tuple[str, float] | None, percent: bool = False
) -> Callable[[int], Figure]:
    """`draw` of quality against one kind of size a panel (its label, its points); `level` is the original's line."""

    def draw(width: int) -> Figure:
        beside = width > 500
        shape = (1, len(panels)) if beside else (len(panels), 1)
        figure, axes = new_figure(width, 360 if beside else 330 * len(panels), *shape, sharey=beside)
        placed = []
        drawn = [p for _, points in panels for p in points if p.kind != "beyond"]  # one scale for all panels
        values = [v for p in drawn for v in (p.low, p.high)] + ([level[1]] if level else [])
        for i, (ax, (x_label, points)) in enumerate(zip(axes, panels, strict=True)):
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
        marker = {"run": "o", "reference": "D", "told": "s", "beyond": "^"}[p.kind]
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
    ticks: list[float] = []
    for steps in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10**d for d in decades for step in steps if low <= step * 10**d <= high]
        if len(ticks) <= most:
            break
    return ticks[:: -(-len(ticks) // most)] if len(ticks) > most else ticks


def lines(
    series: Sequence[tuple[str, Sequence[float]]], x_label: str, y_label: str, *, percent: bool = False
) -> Callable[[int], Figure]:
    """`draw` of one line a run over the blocks, named at its right end."""

    def draw(width: int) -> Figure:
        figure, (ax,) = new_figure(width, 340 if width > 500 else 360)
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
                short(label, letters(width)), (1, end), xycoords=("axes fraction", "data"), xytext=(20, 0),
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


def dots(
    rows: Sequence[tuple[str, Sequence[float]]], labels: Sequence[str], x_label: str, *, percent: bool = True
) -> Callable[[int], Figure]:
    """`draw` of one row a kind of Linear with a dot for each run."""

    def draw(width: int) -> Figure:
        names = [short(label, 2 * letters(width)) for label in labels]
        figure, (ax,) = new_figure(width, 90 + 26 * len(rows) + legend_height(names, width))
        for i, label in enumerate(names):
            xs = [values[i] for _, values in rows]
            marker = ("o", "s", "^")[i // len(SERIES) % 3]
            ax.plot(xs, range(len(rows)), marker, color=SERIES[i % len(SERIES)], markersize=6.5, label=label)
        _scale(ax.xaxis, [v for _, values in rows for v in values], log=True)
        if percent:
            as_percent(ax.xaxis)
        _names(ax, [name for name, _ in rows])
        ax.set_xlabel(x_label)
        add_legend(figure, ax.get_lines(), width)
        return figure

    return draw


def as_percent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))


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
        legend = legend_height(used, width)
        figure, axes = new_figure(width, legend + (height if beside else height * len(panels)), *shape)
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
        add_legend(figure, patches, width)
        return figure

    return draw


def bars(panels: Sequence[tuple[str, Sequence[tuple[str, float, str]]]]) -> Callable[[int], Figure]:
    """`draw` of a bar a run in each panel: (its label, [(run, amount, the amount in words)])."""

    def draw(width: int) -> Figure:
        beside = width > 500
        shape = (1, len(panels)) if beside else (len(panels), 1)
        height = 66 + 25 * max(len(rows) for _, rows in panels)
        figure, axes = new_figure(width, height if beside else height * len(panels), *shape)
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
    room = letters(ax.figure.bbox.width)
    ax.set_yticks(range(len(names)), [short(name, room) for name in names], color=LIGHT["ink"])
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
