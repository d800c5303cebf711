"""`report.html` of a run directory: one page with everything in it, written anew after each stage."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from cirloop.artifacts import write_text
from cirloop.report.html import pictures
from cirloop.report.html.captions import captions
from cirloop.report.html.changes import changes
from cirloop.report.html.growth import growth
from cirloop.report.html.mined import negatives
from cirloop.report.html.pictures import Shelf, Thumbnails
from cirloop.report.html.recalls import Recalls, recalls
from cirloop.report.html.source import Source, clean
from cirloop.report.html.spent import spent
from cirloop.report.html.surroundings import environment, settings

logger = logging.getLogger(__name__)
FILE = "report.html"
HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Headline:
    """A metric of the last evaluation, and what it gained on the first, in points."""

    metric: str
    value: str
    se: str
    gain: str


def expected(settings: Mapping[str, Any]) -> list[str]:
    """The artifacts of a finished run, in the order in which they are made. Accounting is not expected: whether the
    data set knows the truth is not said by the settings."""
    names = ["evaluation_base.json"] if settings["evaluation"]["base"] else []
    names += ["checkpoint_iter_0", "evaluation_iter_0.json"]
    for t in range(1, settings["num_iterations"] + 1):
        texts = [f"augmented_samples_iter_{t}.json"] if settings["captioning"]["enabled"] else []
        names += [f"hard_negatives_iter_{t - 1}.json", *texts, f"checkpoint_iter_{t}", f"evaluation_iter_{t}.json"]
    return names


def render(source: Source, thumbnails: Thumbnails) -> str:
    """The page. Raises UserError for an artifact that cannot be read."""
    clean.cache_clear()
    shelf = Shelf(thumbnails, pictures.MAX_BYTES)
    found = recalls(source)
    changed = changes(source, found.evaluations, shelf)
    hard, texts = negatives(source, shelf), captions(source, shelf)
    missing = [name for name in expected(source.settings) if name not in source.names]
    return _template().render(
        name=source.directory.resolve().name, source=source, missing=missing, recalls=found,
        headlines=_headlines(found), changes=changed, negatives=hard, captions=texts,
        growth=growth(source, hard.iterations, texts.iterations), spent=spent(source), settings=settings(source),
        environment=environment(), shelf=shelf, side=pictures.SIDE, limit=pictures.MAX_BYTES,
        written=time.strftime("%Y-%m-%d %H:%M %Z"),
    )  # fmt: skip


def write(source: Source, thumbnails: Thumbnails) -> Path:
    """Write `report.html`; returns its path. Raises UserError as `render` does, OSError where the disk refuses."""
    began, path = time.monotonic(), source.directory / FILE
    text = render(source, thumbnails)
    write_text(path, text)
    logger.debug("%s: %.1f MB in %.1f s", path, len(text) / 1e6, time.monotonic() - began)
    return path


def _headlines(found: Recalls) -> list[Headline]:
    if not found.evaluations:
        return []
    first, last = found.evaluations[0], found.evaluations[-1]
    out = []
    for metric in found.headline:
        if metric in last.result["metrics"]:
            value, se = last.percent(metric).split(" ± ")
            before = first.result["metrics"].get(metric)
            gain = 0.0 if before is None else 100 * (last.result["metrics"][metric] - before)
            out.append(Headline(metric, value, se, f"{gain:+.1f} on {first.label}" if first is not last else ""))
    return out


def _shown(value: Any) -> Any:
    """Whatever stands in the page is without secrets and control characters, and then escaped."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else clean(value)


@cache
def _template() -> jinja2.Template:
    loader = jinja2.FileSystemLoader(HERE)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.globals["style"] = Markup((HERE / "style.css").read_text("utf-8"))  # our own file
    return environment.get_template("page.html.j2")
