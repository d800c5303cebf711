"""A captioner of servers, and what it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cirloop.captioning.backends.server import ServerCaptioner
from cirloop.captioning.base import Answer, CaptionRequest
from cirloop.captioning.foundation import ServerFoundation
from cirloop.captioning.journal import Journal
from cirloop.captioning.prompts import REWRITE, VERIFY
from cirloop.data.images import DrawnImages
from cirloop.monitoring.console import progress
from cirloop.types import ImageId
from tests.captioning.chat_server import MODEL, ChatServer

REQUESTS = [CaptionRequest(ImageId("0"), ImageId(str(n)), f"with {n} dots") for n in range(1, 9)]
TEMPERATURES = (0.0, 0.7, 0.7)


def draw(image: ImageId) -> Any:
    return np.full((24, 40, 3), (25 * int(image), 80, 30), np.uint8)


class Asked:
    """A captioner of servers, with its journal in `directory`."""

    def __init__(self, directory: Path, *servers: ChatServer | str, **settings: Any) -> None:
        urls = [server if isinstance(server, str) else server.url for server in servers]
        quick = {"timeout_s": 5.0, "time_limit_s": 20.0, "max_in_flight": 4}
        self.settings = ServerFoundation(path=MODEL, url=tuple(urls), **(quick | settings))
        self.images = DrawnImages(draw)
        self.directory = directory

    def captioner(self) -> ServerCaptioner:
        return ServerCaptioner(self.settings, self.images, Journal(self.directory), progress)

    def generate(self, requests: Any = REQUESTS, seed: int = 5) -> list[list[Answer]]:
        return self.captioner().generate(REWRITE, requests, 12, TEMPERATURES, seed, "test")

    def yes(self) -> list[float]:
        return self.captioner().yes_probability(VERIFY, REQUESTS, "test")
