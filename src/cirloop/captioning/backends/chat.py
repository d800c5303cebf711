"""The form of questions to an OpenAI-compatible chat server, and of its answers."""

from __future__ import annotations

import base64
import io
import math
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from cirloop.captioning import journal
from cirloop.captioning.backends.hf_captioner import shrink_to
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.prompts import Prompt
from cirloop.captioning.server_settings import ServerFoundation
from cirloop.monitoring import profiling
from cirloop.types import ImageId, Images, UserError

NUM_LOGPROBS = 20
"""Words whose probability is asked for: the most that servers give."""
YES_NO_TOKENS = 8
"""Most tokens of a written yes or no."""
WORD_MARKS = f"{string.whitespace}▁Ġ"
"""What tokens of some servers have before a word instead of the space."""
MAX_LOGPROB = 0.01
"""Highest logarithm of a probability, which rounding may lift above 0."""
MAX_TOKENS = 10**9
"""Most tokens of a question and its answer that are taken for a count."""
MAX_CHARACTERS = 64
"""Most characters of an answer for each of its tokens; longer ones are no answers."""
SIGNS = re.compile(r"(<)(?=[|/!\w])|(\[)(?=/?[A-Z_]+\])")
"""Beginnings of what chat templates of any model may read as a sign: <|im_end|>, <image>, [INST].
Which of them a server's model reads is not known here."""
NO_LOGPROBS = (
    "the server gives no logprobs, which tell the probability of yes. Ways out:"
    " --foundation.yes_no text, which reads the written word; captioning.min_verify_probability 0,"
    " which does not ask; or a server with logprobs"
)


class _Logprob(BaseModel):
    token: str
    logprob: float = Field(le=MAX_LOGPROB)


class _Position(BaseModel):
    top_logprobs: list[_Logprob]


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Message(BaseModel):
    content: str | None = None


class Choice(BaseModel):
    message: _Message
    finish_reason: str
    logprobs: _Logprobs | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0, le=MAX_TOKENS)
    completion_tokens: int = Field(ge=0, le=MAX_TOKENS)


class ChatAnswer(BaseModel):
    """What is read of a server's answer; servers add fields of their own."""

    choices: list[Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """A question as it is asked: for one text, or one probability of yes."""

    kind: Literal["generate", "yes_probability"]
    prompt: Prompt
    request: CaptionRequest
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0

    def key(self, model: str, images: Images) -> str:
        """Return the key of its answer by `model`, a fingerprint."""
        options = (self.kind, self.max_tokens, self.temperature, self.seed)
        return journal.key(model, self.prompt, [self.request], images, *options)


def request_fields(
    settings: ServerFoundation, question: Question, seed: int, data_url: Callable[[ImageId], str]
) -> dict[str, Any]:
    """Return the fields of a chat request; `data_url` gives an image as it is sent."""
    request = question.request
    images = iter([request.reference, request.image])
    text = SIGNS.sub(r"\1\2 ", request.text)
    content: list[dict[str, object]] = []
    for part in question.prompt.messages(text)[0]["content"]:
        if part["type"] == "image":
            content.append({"type": "image_url", "image_url": {"url": data_url(next(images))}})
        else:
            content.append(dict(part))
    fields: dict[str, Any] = {
        "model": settings.path,
        "messages": [{"role": "user", "content": content}],
        "max_tokens": question.max_tokens,
        "temperature": question.temperature,
        **settings.extra,
    }
    if question.temperature:
        fields |= {"top_p": 1.0, "seed": seed}
    if question.kind == "yes_probability" and settings.yes_no == "logprobs":
        fields |= {"logprobs": True, "top_logprobs": NUM_LOGPROBS}
    return fields


def image_data_url(settings: ServerFoundation, images: Images, image: ImageId) -> str:
    """Return an image's pixels, and nothing else of its file, as a data URL."""
    with profiling.data_wait():
        pixels = shrink_to(images.load(image), settings.max_side)
    profiling.add(images_encoded=1)
    pixels.info = {}  # such as a colour profile, or a comment
    file = io.BytesIO()
    if settings.image_format == "png":
        pixels.save(file, "PNG", compress_level=1)
    else:
        pixels.save(file, "JPEG", quality=92)
    code = base64.b64encode(file.getbuffer()).decode()
    return f"data:image/{settings.image_format};base64,{code}"


def written_text(choice: Choice, max_tokens: int) -> tuple[str, bool]:
    """Return the text of an answer, and whether it ended."""
    text = (choice.message.content or "").strip()
    limit = MAX_CHARACTERS * max_tokens
    return text[:limit], choice.finish_reason != "length" and len(text) <= limit


def yes_share(choice: Choice, settings: ServerFoundation) -> float | None:
    """Return the probability of yes against no; None where the answer says neither.

    Raises UserError where the server gives no probabilities.
    """
    weights = {"yes": 0.0, "no": 0.0}
    if settings.yes_no == "text":
        words = re.findall(r"\w+", (choice.message.content or "").casefold())
        if words and words[0] in weights:
            weights[words[0]] = 1.0
    else:
        positions = choice.logprobs and choice.logprobs.content
        if not positions or not positions[0].top_logprobs:
            raise UserError(f"foundation.yes_no logprobs: {NO_LOGPROBS}")
        for entry in positions[0].top_logprobs:
            word = entry.token.strip(WORD_MARKS).casefold()
            if word in weights:
                weights[word] += math.exp(entry.logprob)
    total = sum(weights.values())
    return round(weights["yes"] / total, 6) if total else None
