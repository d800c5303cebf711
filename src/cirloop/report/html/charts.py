"""Charts as SVG in the page: text is text, colours are the page's variables, the numbers stand in a table beside.

Drawn here and not by a plotting library: a report is written anew after every stage, so a chart may take a millisecond,
not a tenth of a second, and the page's colours change with light and dark, which a finished picture does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as xml

from markupsafe import Markup

from cirloop.report.html.source import clean

WIDTH, HEIGHT = 460, 260
LEFT, TOP, BOTTOM = 64, 12, 36
COLORS = 8
"""Of series, `--s0` to `--s7` of the style sheet."""
MAX_LABELS = 10
"""Along an axis."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line or the parts of bars: `ys[i]` at `xs[i]`, None leaves a gap; `errors` half the length of error bars."""

    name: str
    xs: tuple[float, ...]
    ys: tuple[float | None, ...]
    errors: tuple[float, ...] = ()
    color: int = 0
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under column heads; the first cell of a row is its head."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure of the page. `legend` names colours, and whether the line is dashed; empty where lines are labelled."""

    title: str
    svg: Markup
    table: Table
    legend: tuple[tuple[str, int, bool], ...] = ()


class _Canvas:
    """Axes with a grid; what is drawn in the data's units lands in place."""

    def __init__(
        self, title: str, description: str, x: tuple[float, float], y: tuple[float, float], right: int
    ) -> None:
        self.x, self.y, self.right = x, y, WIDTH - right
        self.svg = xml.Element("svg", {"viewBox": f"0 0 {WIDTH} {HEIGHT}", "role": "img", "class": "chart"})
        xml.SubElement(self.svg, "title").text = clean(title)
        xml.SubElement(self.svg, "desc").text = clean(description)

    def at(self, x: float, y: float) -> tuple[float, float]:
        (x0, x1), (y0, y1) = self.x, self.y
        across = LEFT + (x - x0) / (x1 - x0) * (self.right - LEFT)
        return round(across, 1), round(HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - BOTTOM - TOP), 1)

    def draw(self, kind: str, style: str, text: str | None = None, **numbers: float | str) -> None:
        attributes = {name.replace("_", "-"): str(value) for name, value in numbers.items()}
        xml.SubElement(self.svg, kind, {"class": style, **attributes}).text = None if text is None else clean(text)

    def axes(self, x_labels: Sequence[tuple[float, str]], x_title: str, y_title: str, percent: bool = False) -> None:
        ticks = nice(*self.y)
        for tick in ticks:
            _, y = self.at(self.x[0], tick)
            self.draw("line", "grid", x1=LEFT, x2=self.right, y1=y, y2=y)
            self.draw("text", "tick end", _number(100 * tick if percent else tick), x=LEFT - 6, y=y + 4)
        step = math.ceil(len(x_labels) / MAX_LABELS)
        for place, label in x_labels[::step] if x_labels else ():
            self.draw("text", "tick mid", label, x=self.at(place, self.y[0])[0], y=HEIGHT - BOTTOM + 16)
        _, y = self.at(self.x[0], self.y[0])
        self.draw("line", "axis", x1=LEFT, x2=self.right, y1=y, y2=y)
        self.draw("text", "tick mid name", x_title, x=(LEFT + self.right) / 2, y=HEIGHT - 4)
        middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
        self.draw("text", "tick mid name", y_title, x=12, y=middle, transform=f"rotate(-90 12 {middle})")

    def done(self) -> Markup:
        return Markup(xml.tostring(self.svg, encoding="unicode", short_empty_elements=True))  # escaped by the library


def nice(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, about so many."""
    raw = (high - low) / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def lines(
    title: str, description: str, table: Table, series: Sequence[Series], x_labels: Sequence[tuple[float, str]],
    titles: tuple[str, str], percent: bool = False, from_zero: bool = True, marks: bool = True,
) -> Chart:  # fmt: skip
    """Lines with error bars, each named at its right end, a dashed one by the legend; with `percent` of fractions."""
    xs = [x for each in series for x in each.xs]
    tops = [y + (s.errors[i] if s.errors else 0) for s in series for i, y in enumerate(s.ys) if y is not None]
    lows = [y for s in series for y in s.ys if y is not None]
    low, high = (0.0 if from_zero else min(lows)), max(tops)
    room = 0.05 * (high - low) or 0.5
    span = (low if from_zero else low - room, min(1.0, high + room) if percent else high + room)
    pad = 0.0 if len(set(xs)) < 2 else 0.03 * (max(xs) - min(xs))
    wide = (min(xs) - (pad or 0.5), max(xs) + (pad or 0.5))
    canvas = _Canvas(title, description, wide, span, 92 if marks else 12)
    canvas.axes(x_labels, *titles, percent=percent)
    for each in series:
        _line(canvas, each, marks)
    if marks:
        _names(canvas, [s for s in series if not s.dashed])
    named = tuple((s.name, s.color, s.dashed) for s in series if s.dashed)
    return Chart(title, canvas.done(), table, named)


def _line(canvas: _Canvas, series: Series, marks: bool) -> None:
    style = f"s{series.color % COLORS}" + (" dashed" if series.dashed else "")
    there = [(i, x, y) for i, (x, y) in enumerate(zip(series.xs, series.ys, strict=True)) if y is not None]
    points = " ".join("{},{}".format(*canvas.at(x, y)) for _, x, y in there)
    canvas.draw("polyline", f"line {style}", points=points)
    for i, x, y in there if marks else ():
        across, up = canvas.at(x, y)
        if series.errors:
            _, top = canvas.at(x, y + series.errors[i])
            _, end = canvas.at(x, y - series.errors[i])
            path = f"M{across},{top}V{end}M{across - 3},{top}h6M{across - 3},{end}h6"
            canvas.draw("path", f"error {style}", d=path)
        canvas.draw("circle", f"dot {style}", cx=across, cy=up, r=2.5 if series.dashed else 3)


def _names(canvas: _Canvas, series: Sequence[Series]) -> None:
    """At the lines' ends, pushed apart where they would overlap."""
    ends = []
    for each in series:
        last = [(x, y) for x, y in zip(each.xs, each.ys, strict=True) if y is not None]
        if last:
            ends.append((canvas.at(*last[-1])[1] + 4, each))
    ends.sort(key=lambda end: end[0])
    floor = HEIGHT - BOTTOM - 13.0 * len(ends)
    below = 0.0
    for i, (y, each) in enumerate(ends):
        y = max(min(y, floor + 13 * (i + 1)), below + 13)
        below = y
        name = each.name if len(each.name) <= 14 else each.name[:13] + "…"
        canvas.draw("text", f"label s{each.color % COLORS}", name, x=canvas.right + 6, y=round(y, 1))


def bars(
    title: str, description: str, table: Table, parts: Sequence[Series], x_labels: Sequence[tuple[float, str]],
    titles: tuple[str, str],
) -> Chart:  # fmt: skip
    """Stacked bars: the parts of a bar are the series' values at its place, none of them negative."""
    places = [x for x, _ in x_labels]
    sums = {x: sum(y or 0 for s in parts for at, y in zip(s.xs, s.ys, strict=True) if at == x) for x in places}
    canvas = _Canvas(
        title, description, (min(places) - 0.6, max(places) + 0.6), (0, 1.05 * max(sums.values()) or 1), 12
    )
    canvas.axes(x_labels, *titles)
    below = dict.fromkeys(places, 0.0)
    slot = canvas.at(1, 0)[0] - canvas.at(0, 0)[0]
    width = round(min(46.0, 0.72 * slot), 1)
    for each in parts:
        for x, y in zip(each.xs, each.ys, strict=True):
            if y:
                (across, top), (_, end) = canvas.at(x, below[x] + y), canvas.at(x, below[x])
                style = f"bar s{each.color % COLORS}"
                canvas.draw(
                    "rect", style, x=round(across - width / 2, 1), y=top, width=width, height=round(end - top, 1)
                )
                below[x] += y
    return Chart(title, canvas.done(), table, tuple((s.name, s.color, False) for s in parts))


def areas(
    title: str, description: str, table: Table, edges: Sequence[float], series: Sequence[Series],
    titles: tuple[str, str],
) -> Chart:  # fmt: skip
    """Histograms over one another: `series[i].ys[b]` is the share between `edges[b]` and `edges[b + 1]`."""
    high = max(y or 0 for s in series for y in s.ys) or 1.0
    canvas = _Canvas(title, description, (edges[0], edges[-1]), (0, 1.08 * high), 12)
    canvas.axes([(tick, _number(tick)) for tick in nice(edges[0], edges[-1], 6)], *titles, percent=True)
    for each in series:
        corners = [canvas.at(edges[0], 0)]
        for b, y in enumerate(each.ys):
            corners += [canvas.at(edges[b], y or 0), canvas.at(edges[b + 1], y or 0)]
        corners.append(canvas.at(edges[-1], 0))
        style = f"area s{each.color % COLORS}" + (" dashed" if each.dashed else "")
        canvas.draw("polygon", style, points=" ".join(f"{x},{y}" for x, y in corners))
    return Chart(title, canvas.done(), table, tuple((s.name, s.color, s.dashed) for s in series))
