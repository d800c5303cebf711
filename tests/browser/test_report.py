"""`report.html` as a person opens it: from disk, in Chromium, light and dark, on a phone, and with
things planted."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from benchmarks.large_report import Made, make_data, settings
from cirloop.report.builder import rebuild
from tests.browser.conftest import serious

pytestmark = pytest.mark.full
EVIL = (
    "<script>window.planted = 1</script>",
    "<img src=x onerror='window.planted = 1'>",
    "<svg onload=window.planted=1>",
    "x" * 900,
    "a text as others are",
)
Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a made-up run of three iterations, whose texts hold scripts."""
    home = tmp_path_factory.mktemp("planted")
    make_data(home / "data", 12, 9, EVIL)
    config = settings(home, 3)
    Made(config, 12, 9, 3).run()
    return rebuild(config)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of thing once or twice: axe looks at each, and is slow."""
    home = tmp_path_factory.mktemp("short")
    make_data(home / "data", 12, 9, EVIL)
    config = settings(home, 1)
    Made(config, 12, 9, 3).run()
    (home / "data" / "images" / "000001.jpg").unlink()
    with pytest.MonkeyPatch.context() as patch:
        for name, few in {
            "query_changes.MAX_QUERIES": 1,
            "negatives_section.MAX_QUERIES": 1,
            "captions_section.MAX_TEXTS": 2,
            "negatives_section.MAX_STRATEGIES": 1,
        }.items():
            patch.setattr(f"cirloop.report.{name}", few)
        return rebuild(config)


def numbers(page: Page, caption: str) -> list[list[str]]:
    """The rows of a table as the page has them."""
    found: list[list[str]] = page.evaluate(
        """caption => {
            const tables = [...document.querySelectorAll('table')];
            const table = tables.find(t => t.caption.textContent === caption);
            return [...table.rows].map(row => [...row.cells].map(cell => cell.textContent));
        }""",
        caption,
    )
    return found


def test_the_chart_has_the_numbers_of_the_results(finished: Path, opened: Opened) -> None:
    page = opened((finished / "report.html").as_uri())
    results = json.loads((finished / "evaluation_results.json").read_text())["results"]
    heads, *rows = numbers(page, "Fractions ± standard errors")
    told = [[float(cell.split(" ± ")[0]) for cell in row[1:]] for row in rows]
    assert told == [[r["metrics"][metric] for metric in heads[1:]] for r in results]
    assert page.locator("#recalls svg text", has_text="recall@50").is_visible()
    assert page.title() == "finished: cirloop report"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme: Any, short: Path, opened: Opened) -> None:
    page = opened(short.as_uri(), color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert serious(page) == []
    headings: list[str] = page.evaluate(
        "[...document.querySelectorAll('h1, h2, h3, h4')].map(each => each.tagName)"
    )
    assert headings.count("H1") == 1
    levels = [int(tag[1]) for tag in headings]
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_planted_scripts_did_not_run(planted: Path, opened: Opened) -> None:
    page = opened(planted.as_uri())
    assert page.evaluate("window.planted") is None
    assert page.locator("p.text", has_text="<script>window.planted = 1</script>").count() > 0


@pytest.mark.parametrize("width", [390, 768, 1240])
def test_nothing_is_wider_than_the_screen(width: int, planted: Path, opened: Opened) -> None:
    page = opened(planted.as_uri(), viewport={"width": width, "height": 844})
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_keyboard_gets_to_the_report_first(planted: Path, opened: Opened) -> None:
    page = opened(planted.as_uri())
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_what_is_folded_is_printed(planted: Path, opened: Opened) -> None:
    page = opened(planted.as_uri())
    hidden = page.locator("details.examples:not([open]) .card").first
    assert not hidden.is_visible()
    page.emulate_media(media="print")
    assert hidden.is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_thumbnails_are_enlarged_one_at_a_time_without_a_script(
    planted: Path, opened: Opened
) -> None:
    page = opened(planted.as_uri(), viewport={"width": 390, "height": 844})
    images = page.locator("details.examples[open] details.zoom img")
    small = images.first.bounding_box()
    images.first.click()
    large = images.first.bounding_box()
    assert small and large and large["width"] > 2.5 * small["width"]
    assert large["x"] >= 0 and large["x"] + large["width"] <= 390
    assert serious(page) == []
    page.mouse.click(5, 5)  # beside it
    closed = images.first.bounding_box()
    assert closed and closed["width"] == small["width"]
    page.locator("details.examples[open] details.zoom summary").nth(1).press("Enter")
    assert page.locator("details.zoom[open]").count() == 1


def test_a_wide_table_shows_that_it_scrolls(planted: Path, opened: Opened) -> None:
    page = opened(planted.as_uri(), viewport={"width": 390, "height": 844})
    wide = page.locator("#recalls .tables .scroll").first
    assert wide.evaluate("each => each.scrollWidth > each.clientWidth")
    assert "radial-gradient" in wide.evaluate("each => getComputedStyle(each).backgroundImage")
