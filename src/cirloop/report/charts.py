"""Charts of a report, drawn by matplotlib: SVG in the page, SVG and PNG as files. Each has a table
of its numbers."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from cycler import cycler
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from cirloop.io.redact import sanitize

INK = "#1c1e21"
PAPER = "#ffffff"
COLORS = ("#1f77b4", "#d4600c", "#2c9a48", "#9467bd", "#a97c00", "#d0457f", "#0e8a9a", "#7f7f7f")
"""Each has a contrast of 3 to 1 at least with the page, light and dark."""
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cirloop",
    "text.parse_math": False,
    "font.size": 11,
    "axes.prop_cycle": cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#80808040",
    "lines.markersize": 5,
    "errorbar.capsize": 3,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
}
INCHES = (4.8, 3.4)
"""Small enough that texts can be read on a phone."""
MAX_LABELS = 10
"""Along an axis."""
MAX_HALF_LINE = 24
"""Characters of a legend's label that fit beside another one."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under column heads; the first cell of a row is its head."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawn chart; `name` is that of its files."""

    name: str
    title: str
    table: Table
    svg: str
    png: bytes

    def inline(self) -> Markup:
        """Return the SVG as part of the page, with the page's background and text colour."""
        drawing = self.svg[self.svg.index("<svg") :]
        drawing = drawing.replace(f"fill: {PAPER}", "fill: none").replace(INK, "currentColor")
        # Such ids are the same in all charts of a page.
        drawing = re.sub(r'<g id="[^"]*"', "<g", drawing)
        return Markup(
            drawing.replace(
                "<svg", f'<svg role="img" aria-label="{escape(sanitize(self.title))}"', 1
            )
        )


def draw(name: str, title: str, table: Table, plot: Callable[[Axes], None]) -> Chart:
    """Draw a chart with `plot`. Equal input gives equal bytes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(INCHES, layout="constrained", facecolor=PAPER)
        axes = figure.subplots()
        axes.set_title(sanitize(title))
        plot(axes)
        handles, labels = axes.get_legend_handles_labels()
        if len(labels) > 1:
            columns = 2 if max(map(len, labels)) <= MAX_HALF_LINE else 1
            figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not at each drawing
        svg = io.StringIO()
        png = io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png", dpi=150)
    return Chart(name, title, table, svg.getvalue(), png.getvalue())


def name_ticks(axes: Axes, labels: Sequence[str]) -> None:
    """Label 0, 1, ... along the x axis, as many as fit."""
    step = math.ceil(len(labels) / MAX_LABELS)
    axes.set_xticks(range(0, len(labels), step), labels[::step])


def percent(axes: Axes) -> None:
    """Format the y axis, of fractions, in percent from 0."""
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(bottom=0)


def stacked_bars(axes: Axes, labels: Sequence[str], parts: Mapping[str, Sequence[float]]) -> None:
    """Draw a bar at each label; `parts` are its pieces from below, none of them negative."""
    bottom: list[Any] = [0.0] * len(labels)
    for name, values in parts.items():
        axes.bar(range(len(labels)), values, 0.7, bottom=bottom, label=sanitize(name))
        bottom = [low + value for low, value in zip(bottom, values, strict=True)]
    axes.grid(axis="x", visible=False)
    name_ticks(axes, labels)
