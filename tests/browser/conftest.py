"""A headless Chromium that fails a test for what a person would not see: console errors, requests,
missing images."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; on Debian: apt install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Page]]:
    """`opened(url, **context)` is the loaded page. At the end of the test nothing may have gone
    wrong in any of them: no console error, no uncaught exception, no failed request, no request off
    this machine, no broken image."""
    pages: list[Page] = []
    wrong: list[str] = []

    def asked(request: Any) -> None:
        if not request.url.startswith(
            ("file:", "data:", "blob:", "http://127.0.0.1", "ws://127.0.0.1")
        ):
            wrong.append(f"off this machine: {request.url}")

    def failed(request: Any) -> None:
        # Gradio's client itself ends its streams of events once they have said all.
        stream = re.search(r"/gradio_api/(queue/data|upload_progress)\?", request.url)
        if not (stream and request.failure == "net::ERR_ABORTED"):
            wrong.append(f"failed: {request.url[:200]}")

    def open_page(url: str, **context: Any) -> Page:
        page: Page = browser.new_context(**context).new_page()
        page.on(
            "console",
            lambda said: wrong.append(f"console: {said.text}") if said.type == "error" else None,
        )
        page.on("pageerror", lambda error: wrong.append(f"exception: {error}"))
        page.on("requestfailed", failed)
        page.on("request", asked)
        page.goto(url)
        pages.append(page)
        return page

    yield open_page
    for page in pages:
        wrong += [f"broken image: {url[:200]}" for url in broken_images(page)]
        page.context.close()
    assert wrong == []


def broken_images(page: Page) -> list[str]:
    """Images that are loaded and have no size, by address; what is far below and not loaded yet
    is loaded first."""
    found: list[str] = page.evaluate("""async () => {
            const all = [...document.images];
            for (const image of all) { image.loading = 'eager'; }
            await Promise.all(all.map(image => image.complete ? null : new Promise(done => {
                image.onload = image.onerror = done; })));
            return all.filter(image => image.naturalWidth === 0).map(image => image.src);
        }""")
    return found


def serious(page: Page) -> list[str]:
    """axe's findings of impact `serious` or `critical`: rule, and the first places."""
    found = Axe().run(page).response["violations"]
    return [
        f"{rule['id']}: {rule['help']}: {[node['html'][:120] for node in rule['nodes'][:3]]}"
        for rule in found
        if rule["impact"] in ("serious", "critical")
    ]
