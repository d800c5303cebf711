"""A foundation model behind OpenAI-compatible addresses as the captioner.

An answer depends on its question alone: sampled ones get a seed from the question, not from its
place. So questions are asked in any order, many at once, and equal ones once; the answers come back
in the order of the requests. Each goes to the journal as it comes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

from cirloop.artifacts.store import fingerprint
from cirloop.captioning.backends.chat import (
    YES_NO_TOKENS,
    ChatAnswer,
    Question,
    image_data_url,
    request_fields,
    written_text,
    yes_share,
)
from cirloop.captioning.backends.endpoints import Endpoints, Interrupted, run
from cirloop.captioning.base import Answer, CaptionRequest
from cirloop.captioning.batched_captioner import Progress
from cirloop.captioning.journal import Journal
from cirloop.captioning.prompts import Prompt
from cirloop.captioning.server_settings import ServerFoundation
from cirloop.monitoring import profiling
from cirloop.monitoring.events import CountedBatches
from cirloop.types import Images, UserError

logger = logging.getLogger(__name__)
KEPT_IMAGES = 128
"""Images that are kept in the form in which they are sent."""


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
        self._data_url = lru_cache(KEPT_IMAGES)(partial(image_data_url, settings, images))
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
            Question(
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
            Question("yes_probability", prompt, request, num_tokens) for request in requests
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

    def _answers(self, questions: Sequence[Question], title: str) -> list[Any]:
        """Return the answers in order: the journal's, and the servers' to what it does not have."""
        model = self.fingerprint
        names = [question.key(model, self._images) for question in questions]
        missing = {
            name: question
            for name, question in zip(names, questions, strict=True)
            if name not in self._journal
        }
        if missing:
            run(self._ask_all([*missing.items()], title))
        return [self._journal[name] for name in names]

    async def _ask_all(self, missing: Sequence[tuple[str, Question]], title: str) -> None:
        """Ask, so many at once as the settings say. What fails lets the others end first, so that
        no answer is lost."""
        endpoints = Endpoints(self._settings)
        source = self._questions(missing, title, endpoints)
        num = min(self._settings.max_in_flight, len(missing))
        workers = [self._work(source, endpoints) for _ in range(num)]
        try:
            ended = await asyncio.gather(*workers, return_exceptions=True)
        finally:
            await endpoints.close()
        failed = [error for error in ended if error and not isinstance(error, Interrupted)]
        if failed:
            answered = sum(name in self._journal for name, _ in missing)
            raise _grouped(failed, f"{answered:,} of {len(missing):,}")

    def _questions(
        self, missing: Sequence[tuple[str, Question]], title: str, endpoints: Endpoints
    ) -> Iterator[tuple[str, Question]]:
        """Yield the questions until one has failed, for all workers together."""
        counted = CountedBatches(missing, [1] * len(missing), "texts/s")
        for item in self._progress(counted, title):
            if endpoints.stopped:
                return
            self._check_tokens()
            yield item

    async def _work(self, source: Iterator[tuple[str, Question]], endpoints: Endpoints) -> None:
        """Ask one question after another; where one fails, or a stop was asked for, no worker
        begins another."""
        ended_well = False
        try:
            for name, question in source:
                await self._ask(endpoints, name, question)
            ended_well = True
        finally:
            if not ended_well:
                endpoints.stop()

    def _check_tokens(self) -> None:
        limit = self._settings.token_limit
        if limit is not None and self._journal.tokens >= limit:
            raise UserError(
                f"foundation.token_limit {limit:,}: {self._journal.tokens:,} tokens were read and"
                " written for this run. Raise it, or leave it out"
            )

    async def _ask(self, endpoints: Endpoints, name: str, question: Question) -> None:
        """Ask one question, and put the answer into the journal."""
        seed = int(name[:8], 16) >> 1  # 31 bits, which every server takes
        fields = request_fields(self._settings, question, seed, self._data_url)
        answer = await endpoints.ask(fields, ChatAnswer)
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
            text = written_text(choice, question.max_tokens)
            self._journal.add(name, [*text], read + written)
            profiling.add(texts=1)
        else:
            share = yes_share(choice, self._settings)
            self._num_without_word += share is None
            self._journal.add(name, share or 0.0, read + written)


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
