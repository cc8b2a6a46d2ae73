"""How pictures look and how they are saved: as PNG, as SVG, and as SVG for a page whose colours follow the reader's
theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    "text.parse_math": False,  # names are no TeX
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


def new_figure(width: int, height: int, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Figure, list[Axes]]:
    """Make a figure of so many CSS pixels; returns it and its axes row by row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / _PIXELS, height / _PIXELS), dpi=_PIXELS, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=5 / _PIXELS, h_pad=5 / _PIXELS)
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure, list(axes.flat)
