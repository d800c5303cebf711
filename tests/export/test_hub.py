"""Uploading, to a server on this machine that stands where the Hub is. The token is sent there and
shown nowhere."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cirloop.tools.export import hub
from cirloop.types import UserError

TOKEN = "hf_" + "a1B2" * 8
SOURCE = Path(__file__).parents[2] / "src"
PUSH = (
    "import sys; from pathlib import Path; from cirloop.tools.export import hub;"
    " hub.check(sys.argv[2]); "
)
PUSH += "print(hub.push(Path(sys.argv[1]), sys.argv[2], private=True))"


class Hub(ThreadingHTTPServer):
    """Answers what an upload of small files asks for; keeps what it got."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.cards: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuses = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.answer(200, {"sha": "0" * 40, "id": "me/model"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            return self.answer(403, {"error": f"not with {self.headers['Authorization']}"})
        if self.path == "/api/repos/create":
            self.server.made.append(json.loads(body))
            return self.answer(200, {"url": f"{self.server.url}/me/model"})
        if self.path == "/api/validate-yaml":
            self.server.cards.append(json.loads(body)["content"])
            return self.answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            files = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                     for f in json.loads(body)["files"]]  # fmt: skip
            return self.answer(200, {"files": files})
        if "/commit/" in self.path:
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    self.server.files[row["value"]["path"]] = base64.b64decode(
                        row["value"]["content"]
                    )
            return self.answer(
                200,
                {
                    "success": True,
                    "commitOid": "0" * 40,
                    "commitUrl": f"{self.server.url}/me/model/commit/{40 * '0'}",
                },
            )
        self.answer(404, {})

    def answer(self, code: int, content: Any) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def server() -> Iterator[Hub]:
    with Hub() as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield made
        made.shutdown()


def push(server: Hub, directory: Path, name: str = "me/model") -> subprocess.CompletedProcess[str]:
    """In a process of its own: the address of the Hub is read when the library is."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    env |= {
        "HF_ENDPOINT": server.url,
        "HF_TOKEN": TOKEN,
        "PYTHONPATH": str(SOURCE),
        "HF_HOME": str(directory / "home"),
    }
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(directory), name],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
    )


@pytest.mark.full
def test_an_export_is_uploaded(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    contents = {
        "README.md": b"# A card",
        "adapter_model.safetensors": b"\x00\x01",
        "base/config.json": b"{}",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    ended = push(server, tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert {name: server.files[name] for name in contents} == contents
    assert server.made[0]["name"] == "model" and server.made[0]["organization"] == "me"
    assert server.made[0].get("private") or server.made[0].get("visibility") == "private"
    assert server.cards == ["# A card"], "the Hub looks at the card before it takes it"
    assert server.tokens == {f"Bearer {TOKEN}"} and TOKEN not in ended.stdout + ended.stderr
    assert f"{server.url}/me/model" in ended.stdout


@pytest.mark.full
def test_a_refusal_is_one_message_without_the_token(server: Hub, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("a")
    server.refuses = True
    ended = push(server, tmp_path)
    assert (
        "UserError: --push_to_hub me/model: the Hub refused" in ended.stderr
        and "is whole" in ended.stderr
    )
    assert TOKEN not in ended.stdout + ended.stderr


def test_what_can_be_known_before_is_said_before(
    monkeypatch: pytest.MonkeyPatch, run: Path
) -> None:
    from cirloop.tools.export.command import main

    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere/token")
    flags = ["--experiment_dir", str(run), "--iteration", "0", "--format", "merged"]
    with pytest.raises(
        UserError, match=r"3 problems:(.|\n)*OWNER/NAME(.|\n)*no token(.|\n)*HF_HUB_OFFLINE is set"
    ):
        main([*flags, "--push_to_hub", "no-owner"])
    assert not (run / "export" / "iter_0_merged").exists()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(UserError, match="is no name of a repository") as error:
        hub.check("me/a name")
    assert TOKEN not in str(error.value)
