"""The page of `cirloop compare` as a person opens it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page

from cirloop.tools.compare.command import main
from tests.browser.conftest import serious
from tests.tools.test_compare import made_up

pytestmark = pytest.mark.full
Opened = Callable[..., Page]


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run against another and a group; names and texts hold scripts."""
    home = tmp_path_factory.mktemp("compared")
    runs = [made_up(home, name, seed) for seed, name in enumerate("abcd")]
    group = [f"<script>planted()</script>={run}" for run in runs[2:]]
    page = home / "comparison.html"
    main([*map(str, runs[:2]), *group, "--iterations", "best,0", "--html", str(page)])
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(scheme: Any, comparison: Path, opened: Opened) -> None:
    page = opened(comparison.as_uri(), color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert serious(page) == []


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen(width: int, comparison: Path, opened: Opened) -> None:
    page = opened(comparison.as_uri(), viewport={"width": width, "height": 844})
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("article.card img").count() > 20
    assert page.locator("#metrics svg text", has_text="recall@1, points").is_visible()
    assert page.evaluate("window.planted") is None
