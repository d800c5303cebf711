"""The search page as a person uses it: the real server in a process of its own, and Chromium."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.conftest import serious
from tests.commands import ROOT, command

pytestmark = pytest.mark.full
ONE = "shapes:val:00003"
TEXT = "the red square is now blue"
SHOWN = re.compile(r"the page is at (http://127\.0\.0\.1:\d+)")


def started(log: Path, *flags: object) -> Iterator[str]:
    """The address of a page whose process ends with the test."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    words = [sys.executable, "-m", "cirloop.demo", "--port", "0", *map(str, flags)]
    with (
        log.open("w") as out,
        subprocess.Popen(
            words, stderr=subprocess.PIPE, stdout=out, text=True, env=environment, cwd=log.parent
        ) as server,
    ):
        assert server.stderr is not None
        said = ""
        for line in server.stderr:
            said += line
            found = SHOWN.search(line)
            if found:
                yield found[1]
                break
        else:
            raise AssertionError(f"no page: {said}")
        with socket.create_connection(
            ("127.0.0.1", int(found[1].rpartition(":")[2]))
        ) as listener:  # an open page
            listener.sendall(b"GET /gradio_api/heartbeat/x HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            assert b" 200 " in listener.recv(100)
            server.send_signal(signal.SIGINT)
            rest = server.stderr.read()
        assert server.wait(20) == 0
        assert "Traceback" not in said + rest and "rror" not in rest, said + rest


@pytest.fixture(scope="module")
def url(browser: Any, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from started(tmp_path_factory.mktemp("demo") / "out.txt", "--experiment_dir", finished)


@pytest.fixture
def page(opened: Callable[..., Page], url: str) -> Page:
    return opened(url, viewport={"width": 1360, "height": 900})


def ask(page: Page, text: str) -> None:
    page.get_by_label("What should be different").fill(text)
    page.get_by_label("What should be different").press("Enter")


def choose(page: Page, image: str) -> None:
    """Make a picture of the gallery the reference, by its name."""
    page.get_by_label("Pictures whose name contains").fill(image)
    expect(page.locator(".strip button")).to_have_count(1)
    page.locator(".strip button").click()
    expect(page.locator(".reference .name")).to_have_text(image)


def results(page: Page, title: str) -> list[tuple[str, str, str]]:
    """Image, rank and score of a column."""
    column = page.get_by_role("region", name=f"Results of {title}")
    expect(column.locator("li").first).to_be_visible(timeout=30_000)
    return [
        (button.get_attribute("data-image") or "", *button.inner_text().split()[:2])  # type: ignore[misc]
        for button in column.get_by_role("button").all()
    ]


def by_command(finished: Path, iteration: str, *flags: str) -> list[tuple[str, str, str]]:
    where = ("--experiment_dir", finished, "--iteration", iteration)
    done = command("src/cirloop/tools/search/__main__.py", *where, "--json", *flags)
    return [
        (r["image"], str(r["rank"]), f"{r['score']:.4f}")
        for r in json.loads(done.stdout)["results"]
    ]


def test_a_query_returns_what_the_command_returns(page: Page, finished: Path) -> None:
    choose(page, ONE)
    ask(page, TEXT)
    found = results(page, "iteration 1")
    assert found == by_command(finished, "1", "--reference", ONE, "--text", TEXT)
    assert len(found) == 10 and ONE not in [image for image, _, _ in found]
    expect(
        page.get_by_role("region", name="Results of iteration 1").locator(".about")
    ).to_have_text(re.compile(r"^\d+ ms"))
    page.get_by_label("Beside it").click()
    page.get_by_role("option", name="base").click()
    assert results(page, "base model") == by_command(
        finished, "base", "--reference", ONE, "--text", TEXT
    )
    assert results(page, "iteration 1") == found
    assert serious(page) == []


def test_a_result_becomes_the_reference_and_back_leads_back(page: Page) -> None:
    choose(page, ONE)
    ask(page, TEXT)
    first = results(page, "iteration 1")
    page.locator(".results button").nth(1).click()
    expect(page.locator(".reference .name")).to_have_text(first[1][0])
    expect(page.get_by_label("What should be different")).to_have_value("")
    ask(page, "remove the circle")
    expect(page.locator(".results button").first).not_to_have_attribute("data-image", first[0][0])
    assert first[1][0] not in [image for image, _, _ in results(page, "iteration 1")]
    page.get_by_role("button", name="Back").click()
    expect(page.locator(".reference .name")).to_have_text(ONE)
    expect(page.get_by_label("What should be different")).to_have_value(TEXT)
    expect(page.locator(".results button").first).to_have_attribute("data-image", first[0][0])


def test_an_example_marks_the_right_picture(page: Page, engine: Any) -> None:
    page.locator(".examples button").first.click()
    found = results(page, "iteration 1")
    query = engine.gallery.queries[0]
    expect(page.get_by_label("What should be different")).to_have_value(query.text)
    right = engine.gallery.right[query.reference, query.text]
    marked = [button.get_attribute("data-image") for button in page.locator(".hit button").all()]
    assert marked == [image for image, _, _ in found if image in right]
    told = page.locator(".about", has_text="The right picture is not among these 10").count()
    assert bool(marked) != bool(told)


def test_uploads_good_and_bad(page: Page, finished: Path, engine: Any, tmp_path: Path) -> None:
    good, rubbish = tmp_path / "good.png", tmp_path / "rubbish.png"
    Image.new("RGB", (120, 90), "red").save(good)
    rubbish.write_bytes(b"<script>alert(1)</script>")
    page.locator("input[type=file]").set_input_files(rubbish)
    expect(page.get_by_role("alert")).to_have_text(re.compile("not a picture of a known kind"))
    page.locator("input[type=file]").set_input_files(good)
    expect(page.locator(".reference .name")).to_have_text("an uploaded picture")
    expect(page.get_by_role("alert")).to_have_count(0)
    ask(page, TEXT)
    assert results(page, "iteration 1") == by_command(
        finished, "1", "--reference", str(good), "--text", TEXT
    )


def test_nothing_asked_is_a_message_and_text_stays_text(page: Page, finished: Path) -> None:
    ask(page, " ")
    expect(page.get_by_role("alert")).to_have_text(re.compile("the text is empty"))
    page.get_by_role("button", name="Back").click()
    expect(page.get_by_role("alert")).to_have_text("There is no earlier search.")
    hostile = "<img src=x onerror=alert(1)> ${1+1} {{2}}"
    ask(page, hostile)
    assert results(page, "iteration 1") == by_command(finished, "1", "--text", hostile)
    expect(page.locator("img[src='x']")).to_have_count(0)


def test_the_gallery_is_paged(page: Page) -> None:
    about = page.locator(".strip + .about")
    expect(about).to_have_text("1 to 24 of 66")
    page.get_by_role("button", name="Later").click()
    expect(about).to_have_text("25 to 48 of 66")
    page.get_by_role("button", name="Later").click()
    expect(about).to_have_text("49 to 66 of 66")
    page.get_by_role("button", name="Later").click()
    expect(about).to_have_text("49 to 66 of 66")
    page.get_by_role("button", name="Earlier").click()
    expect(about).to_have_text("25 to 48 of 66")
    page.get_by_label("Pictures whose name contains").fill("<b>none</b>")
    expect(page.get_by_text("No picture has such a name.")).to_be_visible()


def test_it_fits_a_phone_and_the_dark(opened: Callable[..., Page], url: str) -> None:
    phone = opened(url, viewport={"width": 390, "height": 844}, color_scheme="dark")
    choose(phone, ONE)
    ask(phone, TEXT)
    assert len(results(phone, "iteration 1")) == 10
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert serious(phone) == []


NAME = "<img src=x onerror=alert(1)>\x1b'\".png"


@pytest.fixture
def hostile(browser: Any, finished: Path, tmp_path: Path) -> Iterator[str]:
    """A page over a folder whose names hold markup."""
    folder = tmp_path / "<b>photos"
    folder.mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (84, 84), color).save(folder / f"{number}{NAME}")
    yield from started(tmp_path / "out.txt", "--experiment_dir", finished, "--gallery", folder)


def test_names_with_markup_are_text(hostile: str, opened: Callable[..., Page]) -> None:
    page = opened(hostile)
    page.locator(".strip button").first.click()
    expect(page.locator(".reference .name")).to_have_text("0" + NAME.replace("\x1b", "\\x1b"))
    ask(page, "blue")
    assert len(results(page, "iteration 1")) == 2
    expect(page.locator("img[src='x']")).to_have_count(0)
    expect(page.locator("h1")).to_contain_text("<b>photos")


def test_the_example_of_the_documents(url: str, finished: Path) -> None:
    (code,) = re.findall(
        r"^```python\n(.*?)^```",
        (ROOT / "docs/search.md").read_text("utf-8"),
        re.DOTALL | re.MULTILINE,
    )
    assert code.count("http://127.0.0.1:7860") == 1
    example = [sys.executable, "-c", code.replace("http://127.0.0.1:7860", url)]
    said = subprocess.run(example, capture_output=True, text=True, timeout=300, check=False)
    assert said.returncode == 0, said.stderr
    asked = ["--reference", ONE, "--text", "make it red", "--top_k", "3", "--json"]
    found = json.loads(
        command("src/cirloop/tools/search/__main__.py", "--experiment_dir", finished, *asked).stdout
    )["results"]
    assert len(found) == 3 and all(each["image"] in said.stdout for each in found), said.stdout
