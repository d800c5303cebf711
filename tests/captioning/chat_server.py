"""An OpenAI-compatible chat server on loopback, which answers as a test says: by a rule, by a
captioner of this process, or badly."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.prompts import Prompt
from cirloop.types import ImageId

MODEL = "some-model"


@dataclass(frozen=True)
class Reply:
    """What is sent: `content` (JSON, or bytes as they are) after `delay` seconds, of it only the
    first `cut` bytes."""

    content: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: int | None = None


Brain = Callable[[dict[str, Any]], Reply]
"""A request's fields -> what is sent."""


def chat(text: str, finish: str = "stop", **more: Any) -> Reply:
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}}
    usage = {"prompt_tokens": 70, "completion_tokens": 5, "total_tokens": 75}
    return Reply(
        {"id": "1", "choices": [{**choice, "finish_reason": finish, **more}], "usage": usage}
    )


def logprobs(**probabilities: float) -> dict[str, Any]:
    """The field `logprobs` of an answer's first word."""
    top = [{"token": word, "logprob": math.log(p)} for word, p in probabilities.items()]
    return {"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}


def sent_text(body: dict[str, Any]) -> str:
    return "".join(part.get("text", "") for part in body["messages"][0]["content"])


def sent_images(body: dict[str, Any]) -> list[Image.Image]:
    urls = [
        part["image_url"]["url"] for part in body["messages"][0]["content"] if "image_url" in part
    ]
    return [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]


def by_rule(body: dict[str, Any]) -> Reply:
    """A text, or a probability, that follows from all that is sent."""
    number = int(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest(), 16)
    if body.get("logprobs"):
        p = (number % 99 + 1) / 100
        return chat("yes", **logprobs(yes=p, no=1 - p))
    return chat(f"has {number % 10**6} more dots")


class ChatServer:
    """A running server: `requests` are the fields of those to its chat, with `headers` of each."""

    def __init__(self, brain: Brain, certificate: tuple[Path, Path] | None = None) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self.models = Reply({"data": [{"id": MODEL}]})
        self._at_once, self._lock, self._brain = 0, threading.Lock(), brain
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
            scheme = "https"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_port}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                assert self.path == "/v1/models", self.path
                self._send(server.models)

            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions", self.path
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with server._lock:
                    server.requests.append(body)
                    server.headers.append({k.lower(): v for k, v in self.headers.items()})
                    server._at_once += 1
                    server.most_at_once = max(server.most_at_once, server._at_once)
                try:
                    self._send(server._brain(body))
                finally:
                    with server._lock:
                        server._at_once -= 1

            def _send(self, reply: Reply) -> None:
                time.sleep(reply.delay)
                content = reply.content
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(reply.status)
                headers = {"content-type": "application/json", **reply.headers}
                for name, value in {**headers, "content-length": str(len(data))}.items():
                    self.send_header(name, value)
                try:
                    self.end_headers()
                    self.wfile.write(data[: reply.cut])
                except OSError:  # who asked is gone
                    self.close_connection = True
                if reply.cut is not None:
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        return Handler


def by_captioner(captioner: Any) -> Brain:
    """The answers of a captioner of this process, which is shown images as they are."""
    lock = threading.Lock()
    request = CaptionRequest(ImageId(""), ImageId(""), "")

    def answer(body: dict[str, Any]) -> Reply:
        parts = body["messages"][0]["content"]
        prompt = Prompt("sent", "".join(part.get("text", "{image}") for part in parts))
        images = sent_images(body)
        with lock:
            if body.get("logprobs"):
                (p,) = captioner.yes_probability(prompt, [request], images)
                return chat("yes", **logprobs(yes=max(p, 1e-9), no=max(1 - p, 1e-9)))
            how = (body["max_tokens"], [body["temperature"]], body.get("seed", 0))
            ((said,),) = captioner.generate(prompt, [request], images, *how)
        return chat(said.text, "stop" if said.ended else "length")

    return answer


@contextmanager
def serving(brain: Brain = by_rule, **settings: Any) -> Iterator[ChatServer]:
    server = ChatServer(brain, **settings)
    try:
        yield server
    finally:
        server.close()
