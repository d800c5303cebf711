"""The search page as a person uses it: the real server in a process of its own, and Chromium."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import serious
from tests.commands import ROOT, command

pytestmark = pytest.mark.full
ONE = "shapes:val:00003"
TEXT = "the red square is now blue"
SHOWN = re.compile(r"the page is at (http://[\w.]+:\d+)")
ID = "Id of an image of the gallery"
CAPTION = re.compile(r"(\d+): (-?[\d.]+), (.*?)(, right)?")


def started(log: Path, *flags: object) -> Iterator[str]:
    """The address of a page whose process ends with the test."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT / 'src'}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TMPDIR": str(log.parent),
    }
    words = [sys.executable, "-m", "cirloop.demo", *map(str, flags)]
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
        server.send_signal(signal.SIGINT)
        rest = server.stderr.read()
        assert server.wait(20) == 0
        assert "Traceback" not in said + rest, said + rest
        assert ("no password" in said) == ("--host" in flags)
        assert [*log.parent.glob("cirloop-demo-*")] == []  # uploads and thumbnails


@pytest.fixture(scope="module")
def url(browser: Any, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from started(tmp_path_factory.mktemp("demo") / "out.txt", "--experiment_dir", finished)


@pytest.fixture
def page(opened: Callable[..., Page], url: str) -> Page:
    return opened(url, viewport={"width": 1360, "height": 900})


def ask(page: Page, text: str, image: str | None = None) -> None:
    if image is not None:
        page.get_by_label(ID).fill(image)
    page.get_by_label("What should be different").fill(text)
    page.get_by_label("What should be different").press("Enter")


def block(page: Page, title: str) -> Locator:
    """The gallery whose title begins so."""
    return page.locator(".block:has(> .gallery-container)").filter(
        has=page.get_by_test_id("block-label").get_by_text(re.compile(rf"^\s*{title}"))
    )


def captions(page: Page, title: str) -> list[str]:
    gallery = block(page, title)
    expect(gallery.locator(".caption-label").first).to_be_visible(timeout=30_000)
    return [each.strip() for each in gallery.locator(".caption-label").all_inner_texts()]


def results(page: Page, title: str) -> list[tuple[str, str, str]]:
    """Image, rank and score of each image of a gallery."""
    found = [CAPTION.fullmatch(each) for each in captions(page, title)]
    assert None not in found, captions(page, title)
    return [(each[3], each[1], each[2]) for each in found if each is not None]


def by_command(finished: Path, iteration: str, *flags: str) -> list[tuple[str, str, str]]:
    where = ("--experiment_dir", finished, "--iteration", iteration)
    done = command("cirloop.search", *where, "--json", *flags)
    return [
        (r["image"], str(r["rank"]), f"{r['score']:.4f}")
        for r in json.loads(done.stdout)["results"]
    ]


def test_a_query_returns_what_the_command_returns(page: Page, finished: Path) -> None:
    ask(page, TEXT, ONE)
    found = results(page, "Iteration 1")
    assert found == by_command(finished, "1", "--reference", ONE, "--text", TEXT)
    assert len(found) == 10 and ONE not in [image for image, _, _ in found]
    page.get_by_role("group").filter(has_text="Beside it").get_by_label("base").check()
    assert results(page, "Base model") == by_command(
        finished, "base", "--reference", ONE, "--text", TEXT
    )
    assert results(page, "Iteration 1") == found
    assert serious(page) == []


def test_a_result_becomes_the_reference_by_the_keyboard(page: Page, finished: Path) -> None:
    ask(page, TEXT, ONE)
    second = results(page, "Iteration 1")[1][0]
    page.get_by_role("button", name="Thumbnail 2 of 10").press("Enter")
    expect(page.get_by_label(ID)).to_have_value(second)
    expect(block(page, "Reference").locator(".caption-label")).to_have_text(second)
    expect(block(page, "Iteration 1")).not_to_contain_text(second)  # searched at once
    found = results(page, "Iteration 1")
    assert found == by_command(finished, "1", "--reference", second, "--text", TEXT)
    page.get_by_label("What should be different").focus()
    for _ in range(3):  # past the two buttons, to the iterations
        page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert len(results(page, "Base model")) == 10
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


def test_back_undoes_clicks_one_by_one(page: Page, tmp_path: Path) -> None:
    """An upload and words not yet searched for come back too; the radios stay."""
    back = page.get_by_role("button", name="Back")
    expect(back).to_be_disabled()
    Image.new("RGB", (120, 90), "red").save(tmp_path / "my photo.png")
    page.locator("input[type=file]").set_input_files(tmp_path / "my photo.png")
    expect(block(page, "Reference").locator(".caption-label")).to_have_text("my photo.png")
    ask(page, TEXT)
    of_upload = results(page, "Iteration 1")
    page.get_by_label("What should be different").fill("make it red")
    names = []
    for number in (2, 3):
        before = captions(page, "Iteration 1")
        names.append(CAPTION.fullmatch(before[number - 1])[3])  # type: ignore[index]
        page.get_by_role("button", name=f"Thumbnail {number} of 10").click()
        expect(page.get_by_label(ID)).to_have_value(names[-1])
        expect(block(page, "Iteration 1")).not_to_contain_text(names[-1])
    back.click()
    expect(page.get_by_label(ID)).to_have_value(names[0])
    assert captions(page, "Iteration 1") == before
    back.click()
    expect(page.get_by_label(ID)).to_have_value("")
    expect(block(page, "Reference").locator(".caption-label")).to_have_text("my photo.png")
    expect(page.get_by_text("my photo", exact=False).first).to_be_visible()
    expect(page.get_by_label("What should be different")).to_have_value("make it red")
    expect(block(page, "Iteration 1").locator(".caption-label").first).to_contain_text(
        of_upload[0][0]
    )
    assert results(page, "Iteration 1") == of_upload
    expect(back).to_be_disabled()
    page.get_by_label("What should be different").press("Enter")  # the upload is there to search
    expect(page.get_by_test_id("toast-body")).to_have_count(0)


def test_a_result_is_enlarged_over_the_page(page: Page) -> None:
    ask(page, TEXT, ONE)
    second = results(page, "Iteration 1")[1][0]
    page.get_by_label("enlarges it").check()
    page.get_by_role("button", name="Thumbnail 2 of 10").click()
    enlarged = block(page, "Enlarged")
    expect(enlarged.locator(".caption-label")).to_have_text(second)
    assert serious(page) == []
    page.get_by_role("button", name="Close").click()
    expect(enlarged).to_have_count(0)
    expect(page.get_by_label(ID)).to_have_value(ONE)
    expect(page.get_by_role("button", name="Back")).to_be_disabled()


def test_an_example_marks_the_right_image(page: Page, engine: Any) -> None:
    query = engine.gallery.queries[0]
    page.get_by_role("button", name=query.text[:40]).press("Enter")
    found = results(page, "Iteration 1")
    expect(page.get_by_label(ID)).to_have_value(query.reference)
    expect(page.get_by_label("What should be different")).to_have_value(query.text)
    right = {image for image, _, _ in found} & engine.gallery.right[query.reference, query.text]
    assert sum(each.endswith(", right") for each in captions(page, "Iteration 1")) == len(right)
    assert page.get_by_text("the right image is not among these 10").count() == (not right)


def test_uploads_good_and_bad(page: Page, finished: Path, tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    Image.new("RGB", (120, 90), "red").save(good)
    rubbish = tmp_path / "rubbish.png"
    rubbish.write_bytes(b"<script>alert(1)</script>")
    page.get_by_label(ID).fill(ONE)
    page.locator("input[type=file]").set_input_files(rubbish)
    expect(page.get_by_test_id("toast-text")).to_have_text(
        "rubbish.png is not an image of a known kind. Give another image."
    )
    page.get_by_role("button", name="Clear").last.click()
    page.locator("input[type=file]").set_input_files(good)
    expect(block(page, "Reference").locator(".caption-label")).to_have_text("good.png")
    expect(page.get_by_label(ID)).to_have_value("")
    ask(page, TEXT)
    assert results(page, "Iteration 1") == by_command(
        finished, "1", "--reference", str(good), "--text", TEXT
    )


def test_nothing_asked_is_a_message_and_text_stays_text(page: Page, finished: Path) -> None:
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.get_by_text("nothing to search for: give a reference image")).to_be_visible()
    ask(page, " ")
    expect(page.get_by_text("the text is empty")).to_be_visible()
    hostile = "<img src=x onerror=alert(1)> ${1+1} {{2}}"
    ask(page, hostile)
    assert results(page, "Iteration 1") == by_command(finished, "1", "--text", hostile)
    ask(page, TEXT, hostile)
    expect(page.get_by_text(f"reference {hostile!r} is no image of shapes val")).to_be_visible()
    expect(page.locator("img[src='x']")).to_have_count(0)


def test_the_gallery_is_paged(page: Page) -> None:
    page.get_by_role("button", name="Images of the gallery").click()
    images = block(page, "Page").locator(".caption-label")
    expect(images).to_have_count(24)
    page.get_by_label("Page", exact=True).fill("9")
    expect(images).to_have_count(18)
    expect(page.get_by_label("Page", exact=True)).to_have_value("3")
    page.get_by_label("Images whose name contains").fill(ONE)
    expect(images).to_have_text([ONE])
    block(page, "Page 1 of 1: 1 of 1 images").get_by_role("button").click()
    expect(page.get_by_label(ID)).to_have_value(ONE)
    expect(block(page, "Reference").locator(".caption-label")).to_have_text(ONE)
    page.get_by_label("Images whose name contains").fill("<b>none</b>")
    expect(page.get_by_text("Page 1 of 1: 0 of 0 images")).to_be_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone(scheme: Any, opened: Callable[..., Page], url: str) -> None:
    phone = opened(url, viewport={"width": 390, "height": 844}, color_scheme=scheme)
    boxes = [phone.get_by_label("What should be different"), phone.get_by_label(ID)]
    text, image = (box.bounding_box()["y"] for box in boxes)  # type: ignore[index]
    assert text < image and text < 844
    ask(phone, TEXT, ONE)
    found = results(phone, "Iteration 1")
    assert len(found) == 10 and phone.evaluate("scrollY") == 0
    last = phone.get_by_role("button", name="Thumbnail 9 of 10")
    last.scroll_into_view_if_needed()
    before = phone.evaluate("scrollY")
    last.click()
    expect(phone.get_by_label(ID)).to_have_value(found[8][0])
    expect(block(phone, "Iteration 1")).not_to_contain_text(found[8][0])
    assert before > 0 and phone.evaluate("scrollY") == before
    assert phone.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert phone.evaluate(
        """[...document.querySelectorAll('.caption-label, .grid-wrap')].every(each =>
            each.scrollWidth <= each.clientWidth && each.scrollHeight <= each.clientHeight)"""
    )  # captions and results are there whole
    assert serious(phone) == []


def test_a_page_without_a_run(browser: Any, tmp_path: Path, opened: Callable[..., Page]) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for color in ("red", "green", "blue"):
        Image.new("RGB", (84, 84), color).save(photos / f"{color}.png")
    flags = ("--model", "tiny", "--images", photos, "--host", "0.0.0.0")
    for url in started(tmp_path / "out.txt", *flags):
        page = opened(url.replace("localhost", "127.0.0.1"))
        expect(page.locator("body")).to_contain_text("drawn shapes only")
        expect(page.locator("h1")).to_have_text("Search photos")
        ask(page, "green", "blue.png")
        assert {image for image, _, _ in results(page, "Base model")} == {"red.png", "green.png"}
        expect(page.get_by_text("Beside it")).to_have_count(0)
        assert serious(page) == []


NAME = "<img src=x onerror=alert(1)>\x1b'\".png"


@pytest.fixture
def hostile(browser: Any, finished: Path, tmp_path: Path) -> Iterator[str]:
    """A page over a folder whose names hold markup."""
    folder = tmp_path / "<b>photos ${1+1} {{2}}"
    folder.mkdir()
    for number, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (84, 84), color).save(folder / f"{number}{NAME}")
    yield from started(tmp_path / "out.txt", "--experiment_dir", finished, "--gallery", folder)


def test_names_with_markup_are_text(hostile: str, opened: Callable[..., Page]) -> None:
    page = opened(hostile)
    expect(page.locator("h1")).to_contain_text("<b>photos ${1+1} {{2}}")
    ask(page, "blue", "0" + NAME)
    found = [image for image, _, _ in results(page, "Iteration 1")]
    assert sorted(found) == [f"{number}{NAME}".replace("\x1b", "\\x1b") for number in (1, 2)]
    expect(page.locator("img[src='x']")).to_have_count(0)


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
    found = json.loads(command("cirloop.search", "--experiment_dir", finished, *asked).stdout)[
        "results"
    ]
    assert len(found) == 3 and all(each["image"] in said.stdout for each in found), said.stdout
