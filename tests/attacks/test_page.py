"""What the served page lets a request do: nothing off this machine, no file named, no upload
without bounds."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from cirloop.tools.demo import server
from cirloop.tools.demo.image_registry import UPLOADS, Desk
from cirloop.tools.demo.page import blocks
from cirloop.tools.demo.server import application, listening
from cirloop.types import UserError

BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def desk(engine: Any) -> Desk:
    return Desk(engine)


@pytest.fixture(scope="module")
def client(engine: Any, desk: Desk) -> Iterator[TestClient]:
    app = application(blocks(engine, desk, "1", 10), desk)
    with TestClient(app, base_url="http://127.0.0.1:7860") as made:
        yield made


def asked(client: TestClient, *values: Any) -> tuple[int, str]:
    """The status and body of the API's `search`."""
    said = client.post("/gradio_api/run/search", json={"data": values})
    return said.status_code, said.text


def test_the_page_and_its_pictures_are_served(client: TestClient, engine: Any, desk: Desk) -> None:
    assert "gradio" in client.get("/").text
    image = engine.gallery.ids[0]
    found = client.get(f"/picture/{desk.digests[image]}")
    assert found.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(found.content)).size == (84, 84)


def test_the_api_answers_as_the_engine_does(client: TestClient, engine: Any) -> None:
    image = engine.gallery.ids[3]
    status, body = asked(client, image, "make it red", "1", 3)
    found = json.loads(body)["data"][0]["results"]
    assert status == 200
    hits = engine.search("1", image, "make it red", 3).hits
    assert [(r["image"], r["rank"]) for r in found] == [(hit.image, hit.rank) for hit in hits]


def test_no_request_names_a_file(client: TestClient, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    names = [
        secret,
        "/etc/passwd",
        f"/../../../..{secret}",
        "src/cirloop/__init__.py",
        "http://127.0.0.1:1/x",
    ]
    for name in names:
        for way in (
            "/gradio_api/file={}",
            "/file={}",
            "/gradio_api/file/{}",
            "/gradio_api/proxy={}",
            "/picture/{}",
            "/gradio_api/%66ile={}",
            "/gradio_api/stream/{}",
            "/static/{}",
            "/assets/{}",
        ):
            found = client.get(way.format(name))
            assert found.status_code in (403, 404), (way, name)
        status, body = asked(client, str(name), "red", "1", 1)
        assert status == 500 and "is no picture of shapes val" in body
    assert client.post("/gradio_api/upload", files={"files": b"x"}).status_code == 404


def test_uploads_are_pictures_of_bounded_size(
    client: TestClient, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        "octet-stream"
        in client.post("/picture", content=b"x", headers={"Content-Type": "text/plain"}).text
    )
    for content in (b"", b"rubbish", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        assert client.post("/picture", content=content, headers=BINARY).json().keys() == {"problem"}
    monkeypatch.setattr(server, "MAX_FILE", 1000)
    sent = []

    def endless() -> Iterator[bytes]:
        for _ in range(10_000):
            sent.append(1)
            yield b"x" * 600

    assert (
        "more than 1,000 bytes"
        in client.post("/picture", content=endless(), headers=BINARY).json()["problem"]
    )
    monkeypatch.undo()
    keys = []
    for number in range(UPLOADS + 1):
        out = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(out, "PNG")
        keys.append(client.post("/picture", content=out.getvalue(), headers=BINARY).json()["key"])
    assert client.get(f"/picture/{keys[-1]}").status_code == 200
    with pytest.raises(UserError, match="not here any more"):
        desk.reference(keys[0])


def test_it_listens_on_loopback_for_its_own_names_only(client: TestClient) -> None:
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    with listening(0) as one:
        host, port = one.getsockname()
        assert host == "127.0.0.1"
        with pytest.raises(UserError, match=f"--port {port}"):
            listening(port)
    assert isinstance(one, socket.socket)


def test_nothing_is_sent_home(client: TestClient) -> None:
    page = client.get("/").text
    settings = json.loads(page.split("window.gradio_config = ")[1].split(";</script>")[0])
    assert settings["analytics_enabled"] is False
    styles = client.get("/theme.css").text
    assert "http" not in styles.replace("http://www.w3.org", "")
