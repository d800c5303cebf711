"""`report.html` of a run directory: one page with everything in it, and the charts as files in
`figures/`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from cirloop.artifacts.atomic import write_text
from cirloop.artifacts.fs import with_filename
from cirloop.io.redact import sanitize
from cirloop.report import (
    captions_section,
    costs_section,
    environment_section,
    metrics_section,
    negatives_section,
    query_changes,
    report_data,
    training_curves,
)
from cirloop.report.report_data import ReportData, Section, Thumbnails

logger = logging.getLogger(__name__)
FILE = "report.html"
FIGURES = "figures"
HERE = Path(__file__).parent


def write(data: ReportData) -> Path:
    """Write `report.html` and `figures/`; returns the page's path. Raises UserError for an artifact
    that cannot be read, OSError where the disk refuses."""
    began = time.monotonic()
    path = data.directory / FILE
    thumbnails = Thumbnails()
    evaluated = metrics_section.evaluations(data)
    changes = query_changes.section(data, evaluated, thumbnails)
    mined, mined_summaries = negatives_section.section(data, thumbnails)
    texts, text_summaries = captions_section.section(data, thumbnails)
    sections = [
        metrics_section.section(data, evaluated),
        changes,
        mined,
        texts,
        training_curves.section(data, mined_summaries, text_summaries),
        costs_section.section(data),
        environment_section.section(data),
    ]
    write_figures(data.directory / FIGURES, sections)
    name = data.directory.resolve().name
    headlines = _headlines(data, evaluated)
    more = {"name": name, "headlines": headlines, "evaluated": evaluated}
    text = render("page.html.j2", data, sections, thumbnails, more)
    write_text(path, text)
    logger.debug("%s: %.1f MB in %.1f s", path, len(text) / 1e6, time.monotonic() - began)
    return path


def render(
    template: str,
    data: ReportData,
    sections: Sequence[Section],
    thumbnails: Thumbnails,
    more: Mapping[str, object],
) -> str:
    """Return a page of sections, by a template of this directory; `more` is what else it needs."""
    return _template(template).render(
        data=data,
        sections=sections,
        thumbnails=thumbnails,
        side=report_data.SIDE,
        limit=report_data.MAX_BYTES,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
        **more,
    )


def write_figures(directory: Path, sections: Sequence[Section]) -> None:
    """Write each chart as NAME.svg and NAME.png."""
    for chart in (chart for section in sections for chart in section.charts):
        directory.mkdir(exist_ok=True)
        for path, content in (
            (f"{chart.name}.svg", chart.svg.encode()),
            (f"{chart.name}.png", chart.png),
        ):
            with with_filename(directory / path):
                (directory / path).write_bytes(content)


def _headlines(
    data: ReportData, evaluated: Sequence[metrics_section.Evaluation]
) -> list[tuple[str, str, str, str]]:
    """Metrics of the last evaluation: name, percent, standard error, and what was gained on the
    first, in points."""
    if not evaluated:
        return []
    first = evaluated[0]
    last = evaluated[-1]
    before = first.result["metrics"]
    after = last.result["metrics"]
    errors = last.result["standard_errors"]
    rows = []
    for name in data.headline:
        if name in after:
            difference = 100 * (after[name] - before.get(name, after[name]))
            place = f"{last.result['split']}, iteration {last.label}"
            gain = f"{difference:+.1f} over {first.label}, {place}"
            rows.append(
                (
                    name,
                    f"{100 * after[name]:.1f}",
                    f"{100 * errors[name]:.1f}",
                    gain if last != first else "",
                )
            )
    return rows


def _shown(value: object) -> object:
    """Whatever stands in the page is without secrets and control characters, and then escaped."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else sanitize(value)


@cache
def _template(name: str = "page.html.j2") -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["style"] = Markup((HERE / "style.css").read_text("utf-8"))  # our own file
    return environment.get_template(name)
