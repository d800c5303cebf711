"""`POST /search`: what it answers, and what it refuses before any work is done."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cirloop.tools.demo.api import build_api
from cirloop.tools.demo.limits import FORM
from cirloop.tools.demo.page import build_page
from cirloop.tools.demo.server import Address, is_loopback, served
from cirloop.types import ImageId, UserError

ONE = "shapes:val:00003"


@pytest.fixture(scope="module")
def url(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    address = Address(max_upload_mb=1, max_requests=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        with served(build_page(engine, "1", 10), build_api(engine, "1", 3), address) as at:
            yield at


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as made:
        yield made


def hits(answer: httpx.Response) -> list[tuple[str, int]]:
    assert answer.status_code == 200, answer.text
    return [(each["image"], each["rank"]) for each in answer.json()["results"]]


def by_engine(engine: Any, reference: Any, text: str | None, k: int) -> list[tuple[str, int]]:
    found = engine.search("1", reference, text, k).hits
    return [(hit.image, hit.rank) for hit in found]


def test_an_id_and_a_text_are_answered_as_the_engine_does(
    client: httpx.Client, engine: Any
) -> None:
    answer = client.post("/search", data={"reference": ONE, "text": "make it red", "top_k": 5})
    assert hits(answer) == by_engine(engine, ImageId(ONE), "make it red", 5)
    assert answer.json()["iteration"] == "1" and answer.json()["ms"] > 0
    first = answer.json()["results"][0]
    assert first["name"] == first["image"] and -1 <= first["score"] <= 1
    assert len(hits(client.post("/search", data={"text": "a red circle"}))) == 3


def test_a_file_is_answered_as_its_image(client: httpx.Client, engine: Any) -> None:
    file = io.BytesIO()
    engine.gallery.images.load(ImageId(ONE)).save(file, "PNG")
    answer = client.post(
        "/search", files={"image": ("a.png", file.getvalue())}, data={"text": "make it red"}
    )
    found = engine.search("1", ImageId(ONE), "make it red", 3, keep=True).hits
    assert [image for image, _ in hits(answer)] == [hit.image for hit in found]


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({}, "nothing to search for"),
        ({"reference": "/etc/passwd"}, "is no image of shapes val"),
        ({"text": "red", "top_k": "0"}, "top_k: Input should be greater"),
        ({"text": "red", "top_k": "x"}, "top_k: Input should be a valid integer"),
        ({"text": "red", "iteration": "9"}, "There are: base, 0, 1"),
        ({"text": "x" * 100_000}, "text: String should have at most"),
        ({"text": "  "}, "the text is empty"),
        ({"text": "red", "k": "1", "<b>": ""}, "<b>, k: no such field. There are: image, ref"),
    ],
)
def test_what_is_wrong_is_said(client: httpx.Client, form: dict[str, str], said: str) -> None:
    answer = client.post("/search", data=form)
    assert answer.status_code == 422 and said in answer.json()["detail"]


def test_what_is_no_form_is_refused(client: httpx.Client) -> None:
    answer = client.post("/search", json={"text": "red"})
    assert answer.status_code == 422
    assert "holds application/json. Send its fields as a form" in answer.json()["detail"]


def test_a_file_that_is_no_image_and_a_reference_given_twice(client: httpx.Client) -> None:
    image = {"image": ("<b>.png", b"rubbish")}
    answer = client.post("/search", files=image)
    assert answer.status_code == 422 and "<b>.png is not an image" in answer.json()["detail"]
    twice = client.post("/search", files=image, data={"reference": ONE})
    assert twice.status_code == 422 and "give one of them" in twice.json()["detail"]


def test_a_large_request_is_refused_by_its_length_or_as_it_comes(client: httpx.Client) -> None:
    body = b"x" * ((1 << 20) + FORM + 1)
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    by_length = client.post("/search", content=body, headers=form)
    chunked = client.post("/search", content=iter([head, body]), headers=form)
    uploaded = client.post("/gradio_api/upload", files={"files": ("a.png", body)})
    assert [answer.status_code for answer in (by_length, chunked, uploaded)] == [413] * 3
    assert "--max_upload_mb 1" in by_length.json()["detail"]
    assert chunked.json() == by_length.json()


def test_one_request_too_many_is_refused_and_later_ones_are_not(url: str, engine: Any) -> None:
    """The engine is held, so that requests wait for it whatever the machine does."""

    def ask() -> int:
        answer = httpx.post(f"{url}/search", data={"text": "red"}, timeout=60, trust_env=False)
        assert answer.status_code != 429 or answer.headers["Retry-After"] == "1"
        codes.append(answer.status_code)
        refused.set() if answer.status_code == 429 else None
        return answer.status_code

    codes: list[int] = []
    refused = threading.Event()
    with engine._lock:
        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        assert refused.wait(60)
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200, 200, 429] and ask() == 200


def test_pages_of_other_sites_and_other_names_are_refused(client: httpx.Client, url: str) -> None:
    form = {"text": "red"}
    assert client.post("/search", data=form, headers={"Origin": url}).status_code == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://["):
        answer = client.post("/search", data=form, headers={"Origin": origin})
        assert answer.status_code == 403 and "another site" in answer.json()["detail"]
    rebound = client.post("/search", data=form, headers={"Host": "evil.example"})
    assert rebound.status_code == 400


def test_the_page_about_it_has_every_field_and_fetches_nothing(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    assert list(schema["paths"]) == ["/search"]
    page = client.get("/docs")
    assert page.status_code == 200 and "src=" not in page.text and "<script" not in page.text
    names = ("image", "reference", "text", "iteration", "top_k")
    assert all(f"<code>{name}</code>" in page.text for name in names)
    assert all(f"<td>{status}</td>" in page.text for status in (200, 413, 422, 429))


@pytest.mark.parametrize(
    ("host", "alone"),
    [("127.0.0.1", True), ("127.1.2.3", True), ("localhost", True), ("0.0.0.0", False)],
)
def test_addresses_of_this_machine_alone(host: str, alone: bool) -> None:
    assert is_loopback(host) is alone


def test_an_address_that_is_not_here_is_one_message(engine: Any) -> None:
    for host in ("192.0.2.1", "no.such.host.invalid"):
        page, api = build_page(engine, "1", 1), build_api(engine, "1", 1)
        with pytest.raises(UserError, match=f"--host {host}"), served(page, api, Address(host)):
            pass
