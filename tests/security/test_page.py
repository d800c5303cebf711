"""What the served page lets a request do: nothing off this machine, and no file of the machine
read."""

from __future__ import annotations

import copy
import json
import re
import secrets
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from cirloop.tools.demo.api import build_api
from cirloop.tools.demo.page import about, build_page
from cirloop.tools.demo.server import HOST, Address, served
from cirloop.types import UserError


@pytest.fixture(scope="module")
def url(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        with served(build_page(engine, "1", 10), build_api(engine, "1", 10), Address()) as at:
            yield at


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60, trust_env=False) as made:
        yield made


def asked(client: httpx.Client, *values: Any) -> tuple[int, str]:
    """The status and body of the API's `search`."""
    said = client.post("/gradio_api/run/search", json={"data": values})
    return said.status_code, said.text


def test_the_api_answers_as_the_engine_does(client: httpx.Client, engine: Any) -> None:
    image = engine.gallery.ids[3]
    status, body = asked(client, image, "make it red", "1", 3)
    assert status == 200
    found = json.loads(body)["data"][0]["results"]
    hits = engine.search("1", image, "make it red", 3).hits
    assert [(r["image"], r["rank"]) for r in found] == [(hit.image, hit.rank) for hit in hits]


def test_no_request_reads_a_file(client: httpx.Client, finished: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(secret)
    of_the_run = finished / "config.json"
    names = [
        secret,
        of_the_run,
        "/etc/passwd",
        f"/../../../..{secret}",
        "src/cirloop/types.py",
        "http://127.0.0.1:1",
    ]
    for name in names:
        for way in (
            "/gradio_api/file={} /file={} /gradio_api/file/{} /gradio_api/proxy={} "
            "/gradio_api/%66ile={} /static/{} /assets/{}"
        ).split():
            found = client.get(way.format(name))
            assert found.status_code in (400, 403, 404), (way, name, found.status_code)
        status, body = asked(client, str(name), "red", "1", 1)
        assert status == 500 and "is no image of shapes val" in body


def searched(client: httpx.Client, path: str) -> str:
    """What the page's own search answers to a request that says it uploaded `path`. Each is of a
    session of its own: a stream that ends takes with it what comes next in its session."""
    config = client.get("/config").json()
    events = [each for each in config["dependencies"] if len(each["inputs"]) == 5]
    session = secrets.token_hex(8)
    upload = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = {
        "data": ["", upload, "red", "1", "none"],
        "fn_index": events[0]["id"],
        "session_hash": session,
    }
    assert client.post("/gradio_api/queue/join", json=data).status_code == 200
    with client.stream("GET", f"/gradio_api/queue/data?session_hash={session}") as said:
        return "".join(line for line in said.iter_lines() if "process_completed" in line)


def test_a_path_that_the_page_did_not_take_is_no_upload(
    client: httpx.Client, finished: Path, tmp_path: Path
) -> None:
    """The private events answer to requests too; Gradio refuses files that are not its own."""
    picture = tmp_path / "secret.png"
    Image.new("RGB", (8, 8)).save(picture)
    file = ("a.png", picture.read_bytes())
    sent = client.post("/gradio_api/upload", files={"files": file}).json()
    assert re.search(r'"success": ?true', searched(client, sent[0]))
    with socket.create_server((HOST, 0)) as elsewhere:
        elsewhere.settimeout(0.1)
        address = f"http://{HOST}:{elsewhere.getsockname()[1]}/x.png"
        for path in (str(picture), str(finished / "config.json"), address):
            answer = searched(client, path)
            assert re.search(r'"success": ?false', answer) and "gradio_api/file" not in answer
        assert client.get(f"/gradio_api/file={address}").status_code >= 400
        with pytest.raises(TimeoutError):
            elsewhere.accept()


def test_it_listens_on_loopback_for_its_own_names_only(
    client: httpx.Client, url: str, engine: Any
) -> None:
    assert url.startswith(f"http://{HOST}:")
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    with socket.socket() as one:
        one.bind((HOST, 0))
        one.listen()
        port = one.getsockname()[1]
        page, api = build_page(engine, "1", 10), build_api(engine, "1", 10)
        address = Address(port=port)
        with pytest.raises(UserError, match=f"--port {port} cannot"), served(page, api, address):
            pass


def test_nothing_is_sent_home(client: httpx.Client) -> None:
    assert client.get("/config").json()["analytics_enabled"] is False
    styles = client.get("/theme.css").text
    assert "http" not in styles.replace("http://www.w3.org", "")


def test_the_page_says_first_what_must_be_known_of_its_models(engine: Any) -> None:
    other = copy.copy(engine)
    other.notices = ["`tiny` & <shapes>"]
    assert about(engine).startswith("<h1>Search shapes val</h1>")
    assert about(other) == f"<p><strong>`tiny` &amp; &lt;shapes&gt;</strong></p>{about(engine)}"


def test_no_path_of_this_machine_is_shown(engine: Any, finished: Path) -> None:
    assert finished.name in about(engine) and str(finished.parent) not in about(engine)
