"""Settings of a foundation model that a server elsewhere runs, behind an OpenAI-compatible
address."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, field_validator

from cirloop.artifacts.store import fingerprint
from cirloop.captioning.foundation_base import Foundation

if TYPE_CHECKING:
    from cirloop.captioning.batched_captioner import CaptionClient, Progress
    from cirloop.captioning.journal import Journal
    from cirloop.types import Images, TrainSplit

KEY_VARIABLE = "CIRLOOP_API_KEY"
"""The environment variable of the server's key. Not OPENAI_API_KEY: that one is for OpenAI's own
address, and this may be another's."""


class ServerFoundation(Foundation):
    """Any model with images behind an OpenAI-compatible chat address (vLLM, SGLang, LMDeploy,
    Ollama, hosted ones), asked by the `openai` client. A key is read from CIRLOOP_API_KEY."""

    is_timed: ClassVar[bool] = False
    resultless: ClassVar[frozenset[str]] = frozenset(
        {"url", "max_in_flight", "timeout_s", "time_limit_s", "token_limit"}
    )
    type: Literal["server"] = "server"
    path: str = Field(min_length=1)
    """The model's name at the server."""
    url: tuple[str, ...] = Field(min_length=1)
    """Addresses of servers of this model, up to and with the /v1, such as http://127.0.0.1:8000/v1;
    questions are shared out among them."""
    image_format: Literal["png", "jpeg"] = "png"
    """How images are sent: without loss, or smaller."""
    max_side: int = Field(672, ge=28)
    """Longest side of an image, in pixels; a larger one is scaled down before it is sent."""
    yes_no: Literal["logprobs", "text"] = "logprobs"
    """What tells the probability of "yes": the probabilities of the answer's first word, which not
    every server gives; or the written word, which is 1 or 0."""
    max_in_flight: int = Field(32, ge=1, le=4096)
    """Most requests at once, over all addresses."""
    timeout_s: float = Field(120, gt=0)
    """Seconds after which a request without an answer is given up and made again."""
    time_limit_s: float = Field(900, gt=0)
    """Seconds for a question with all its requests, after which the run ends."""
    token_limit: int | None = Field(None, ge=1)
    """Most tokens, read and written, of all questions of the run; None = no limit."""
    extra: dict[str, JsonValue] = Field({})
    """Further fields of a request as the server documents them, such as {"top_k": -1} for vLLM."""

    @field_validator("url", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("url")
    @classmethod
    def _addresses(cls, urls: tuple[str, ...]) -> tuple[str, ...]:
        urls = tuple(url.strip() for url in urls)
        for url in urls:
            if not _is_address(url):
                raise ValueError(
                    f"{url!r} is no address such as http://127.0.0.1:8000/v1: http or https, a"
                    " host, a path, and nothing else. A key is read from the environment variable"
                    f" {KEY_VARIABLE}"
                )
        return tuple(url.rstrip("/") for url in urls)

    @field_validator("extra")
    @classmethod
    def _further_fields(cls, extra: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
        own = {"model", "messages", "max_tokens", "temperature", "seed", "stream", "n"}
        own |= {"logprobs", "top_logprobs", "top_p"}
        taken = sorted(own & {*extra})
        if taken:
            raise ValueError(f"{', '.join(taken)}: set by the program for every question")
        return extra

    def resolve_dir(self) -> Path:
        """Return this package's directory: the weights are elsewhere."""
        return Path(str(files("cirloop.captioning")))

    def weights_digest(self) -> str:
        """Return a digest of the model's name, in place of weights that are not seen."""
        return fingerprint(["server", self.path])

    def check_data(self, train: TrainSplit) -> None:
        """Raise UserError where no server is there, refuses the key, or does not have the model."""
        from cirloop.captioning.backends.endpoints import check_servers

        check_servers(self)

    def client(self, images: Images, journal: Journal, progress: Progress) -> CaptionClient:
        """Return what asks the servers about `images` and keeps the answers in `journal`."""
        from cirloop.captioning.backends.server import ServerCaptioner

        return ServerCaptioner(self, images, journal, progress)


def _is_address(url: str) -> bool:
    """Tell whether `url` is http or https, a host that can be asked, a path, and nothing else."""
    from httpx2 import URL, InvalidURL  # here, since most programs that read settings ask nobody

    try:
        parts = urlsplit(url)
        may_be_asked = parts.hostname and parts.port != 0 and URL(url).host
    except (ValueError, InvalidURL):  # such as a port above 65535, or a host of no possible name
        return False
    more = parts.query or parts.fragment or parts.username or parts.password
    return bool(
        parts.scheme in ("http", "https")
        and may_be_asked
        and not more
        and not re.search(r"\s", url)
    )
