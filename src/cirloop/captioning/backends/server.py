"""A foundation model behind OpenAI-compatible addresses as the captioner.

An answer depends on its question alone: sampled ones get a seed from the question, not from its
place. So questions are asked in any order, many at once, and equal ones once; the answers come back
in the order of the requests. Each goes to the journal as it comes.
"""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

from pydantic import BaseModel, Field

from cirloop.artifacts.store import fingerprint
from cirloop.captioning import journal as journals
from cirloop.captioning.backends.endpoints import Endpoints, Interrupted
from cirloop.captioning.backends.hf_captioner import shrink_to
from cirloop.captioning.base import Answer, CaptionRequest
from cirloop.captioning.batched_captioner import Progress
from cirloop.captioning.journal import Journal
from cirloop.captioning.prompts import Prompt
from cirloop.captioning.server_settings import ServerFoundation
from cirloop.monitoring import profiling
from cirloop.monitoring.events import CountedBatches
from cirloop.types import ImageId, Images, UserError

logger = logging.getLogger(__name__)
NUM_LOGPROBS = 20
"""Words whose probability is asked for: the most that servers give."""
YES_NO_TOKENS = 8
"""Most tokens of a written yes or no."""
KEPT_IMAGES = 128
"""Images that are kept in the form in which they are sent."""
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
    logprob: float


class _Position(BaseModel):
    top_logprobs: list[_Logprob]


class _Logprobs(BaseModel):
    content: list[_Position] | None = None


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str
    logprobs: _Logprobs | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class ChatAnswer(BaseModel):
    """What is read of a server's answer; servers add fields of their own."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class _Question:
    """A question as it is asked: one text, or one probability of yes."""

    kind: Literal["generate", "yes_probability"]
    prompt: Prompt
    request: CaptionRequest
    max_tokens: int
    temperature: float = 0.0
    seed: int = 0

    def key(self, model: str, images: Images) -> str:
        """Return the key of its answer by `model`, a fingerprint."""
        options = (self.kind, self.max_tokens, self.temperature, self.seed)
        return journals.key(model, self.prompt, [self.request], images, *options)


class ServerCaptioner:
    """A `CaptionClient` that keeps `max_in_flight` requests at its servers."""

    def __init__(
        self, settings: ServerFoundation, images: Images, journal: Journal, progress: Progress
    ) -> None:
        self.name = settings.path
        self._settings = settings
        self._images = images
        self._journal = journal
        self._progress = progress
        self._data_url = lru_cache(KEPT_IMAGES)(partial(_data_url, settings, images))
        self._num_without_word = 0

    @property
    def fingerprint(self) -> str:
        """Return the fingerprint of what decides answers, as far as it can be known here."""
        settings = self._settings
        return fingerprint(settings.model_dump(mode="json", exclude={*settings.resultless}))

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
        title: str,
    ) -> list[list[Answer]]:
        """Return per request an answer for each of `temperatures`; 0 is greedy."""
        questions = [
            _Question(
                "generate",
                prompt,
                request,
                max_new_tokens,
                temperature,
                seed + number if temperature else 0,
            )
            for request in requests
            for number, temperature in enumerate(temperatures)
        ]
        with profiling.add_seconds("writing"):
            answers = [Answer(*answer) for answer in self._answers(questions, f"{title}: write")]
        num = len(temperatures)
        return [answers[start : start + num] for start in range(0, len(answers), num)]

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], title: str
    ) -> list[float]:
        """Return the probability of "yes" against "no" as the first word of each answer."""
        num_tokens = 1 if self._settings.yes_no == "logprobs" else YES_NO_TOKENS
        questions = [
            _Question("yes_probability", prompt, request, num_tokens) for request in requests
        ]
        self._num_without_word = 0
        probabilities = self._answers(questions, f"{title}: yes or no")
        if self._num_without_word:
            logger.warning(
                "%s: %d of %d answers say neither yes nor no, and count as no",
                title,
                self._num_without_word,
                len(questions),
            )
        return probabilities

    def _answers(self, questions: Sequence[_Question], title: str) -> list[Any]:
        """Return the answers in order: the journal's, and the servers' to what it does not have."""
        model = self.fingerprint
        names = [question.key(model, self._images) for question in questions]
        missing = {
            name: question
            for name, question in zip(names, questions, strict=True)
            if name not in self._journal
        }
        if missing:
            asyncio.run(self._ask_all([*missing.items()], title))
        return [self._journal[name] for name in names]

    async def _ask_all(self, missing: Sequence[tuple[str, _Question]], title: str) -> None:
        """Ask, so many at once as the settings say. What fails lets the others end first, so that
        no answer is lost."""
        counted = CountedBatches(missing, [1] * len(missing), "texts/s")
        endpoints = Endpoints(self._settings)
        failed: list[BaseException] = []

        def questions() -> Iterator[tuple[str, _Question]]:
            for item in self._progress(counted, title):
                if failed:
                    return
                self._check_tokens()
                yield item

        async def work(source: Iterator[tuple[str, _Question]]) -> None:
            try:
                for name, question in source:
                    await self._ask(endpoints, name, question)
            except Interrupted:
                pass
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # a stop that was asked for, too
                failed.append(error)
                endpoints.stop()

        source = questions()
        num = min(self._settings.max_in_flight, len(missing))
        try:
            await asyncio.gather(*(work(source) for _ in range(num)))
        finally:
            await endpoints.close()
        if failed:
            answered = sum(name in self._journal for name, _ in missing)
            raise _grouped(failed, f"{answered:,} of {len(missing):,}")

    def _check_tokens(self) -> None:
        limit = self._settings.token_limit
        if limit is not None and self._journal.tokens >= limit:
            raise UserError(
                f"foundation.token_limit {limit:,}: {self._journal.tokens:,} tokens were read and"
                " written for this run. Raise it, or leave it out"
            )

    async def _ask(self, endpoints: Endpoints, name: str, question: _Question) -> None:
        """Ask one question, and put the answer into the journal."""
        answer = await endpoints.ask(self._body(name, question), ChatAnswer)
        usage = answer.usage
        if usage is None and self._settings.token_limit is not None:
            raise UserError(
                f"foundation.token_limit {self._settings.token_limit}: the server does not count"
                " tokens (`usage`). Leave it out"
            )
        read, written = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        profiling.add(tokens=read, tokens_written=written)
        choice = answer.choices[0]
        if question.kind == "generate":
            self._journal.add(name, _text(choice, question), read + written)
            profiling.add(texts=1)
        else:
            self._journal.add(name, self._yes(choice), read + written)

    def _body(self, name: str, question: _Question) -> dict[str, Any]:
        """Return the request's fields."""
        request = question.request
        images = iter([request.reference, request.image])
        text = SIGNS.sub(r"\1\2 ", request.text)
        content: list[dict[str, object]] = []
        for part in question.prompt.messages(text)[0]["content"]:
            if part["type"] == "image":
                url = self._data_url(next(images))
                content.append({"type": "image_url", "image_url": {"url": url}})
            else:
                content.append(dict(part))
        body: dict[str, Any] = {
            "model": self._settings.path,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": question.max_tokens,
            "temperature": question.temperature,
            "extra_body": {**self._settings.extra},
        }
        if question.temperature:
            body |= {"top_p": 1.0, "seed": int(name[:8], 16) >> 1}
        if question.kind == "yes_probability" and self._settings.yes_no == "logprobs":
            body |= {"logprobs": True, "top_logprobs": NUM_LOGPROBS}
        return body

    def _yes(self, choice: _Choice) -> float:
        """Return the probability of yes, rounded; 0 where the answer says neither."""
        if self._settings.yes_no == "text":
            words = re.findall(r"\w+", (choice.message.content or "").casefold())
            weights = {word: float(words[:1] == [word]) for word in ("yes", "no")}
        else:
            if choice.logprobs is None or not choice.logprobs.content:
                raise UserError(f"foundation.yes_no logprobs: {NO_LOGPROBS}")
            weights = {"yes": 0.0, "no": 0.0}
            for entry in choice.logprobs.content[0].top_logprobs:
                word = entry.token.strip().casefold()
                if word in weights:
                    weights[word] += math.exp(entry.logprob)
        total = sum(weights.values())
        self._num_without_word += not total
        return round(weights["yes"] / total, 6) if total else 0.0


def _text(choice: _Choice, question: _Question) -> list[object]:
    """Return the text and whether it ended, as `Answer` has them."""
    text = (choice.message.content or "").strip()
    limit = MAX_CHARACTERS * question.max_tokens
    return [text[:limit], choice.finish_reason != "length" and len(text) <= limit]


def _data_url(settings: ServerFoundation, images: Images, image: ImageId) -> str:
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


def _grouped(failed: Sequence[BaseException], answered: str) -> BaseException:
    """Return one error for all that failed: of this program or the system the first, else what the
    user can put right, with what became of the other questions."""
    for error in failed:
        if not isinstance(error, UserError):
            return error
    problems = dict.fromkeys(str(error) for error in failed)
    return UserError(
        f"{'. '.join(problems)}. {answered} questions were answered and are kept: the command again"
        " with --auto_resume asks the rest."
    )
