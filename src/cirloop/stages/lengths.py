"""How long a run's rows are, in tokens, by the processor and a sample of the data: what its time
depends on beside the numbers of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cirloop.backbones.model_settings import VlmSettings
from cirloop.backbones.prompts import IMAGE, PROMPT, filled
from cirloop.backbones.special_tokens import Processor, special_tokens
from cirloop.captioning.base import render_chat
from cirloop.captioning.foundation import Foundation
from cirloop.captioning.prompts import Prompt
from cirloop.config.run import RunConfig
from cirloop.data import Dataset
from cirloop.stages.model_checks import sampled_tokens
from cirloop.types import Query

SAMPLE = 64
"""Queries whose lengths stand for all of them."""
FRAME_TOKENS = 2
"""Around an image's tokens, of Qwen's families."""


@dataclass(frozen=True, slots=True)
class Question:
    """Tokens of a question to the foundation model, by how often they are read."""

    reference: float
    """Up to the second image: once for all images that were mined for a query."""
    pair: float
    """Of the second image: once for all texts about it."""
    text: float
    """Behind it: once for each text."""

    def tokens(self, references: float, pairs: float, texts: float) -> float:
        """Return the tokens that are read for so many references, pairs and texts."""
        return references * self.reference + pairs * self.pair + texts * self.text


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of images, embedded rows (a sample each of queries and gallery images), and
    questions."""

    image: float
    queries: tuple[int, ...]
    documents: tuple[int, ...]
    rewrite: Question
    verify: Question
    answer: float = 0.0
    """Of a text that is written."""
    distinct: float = 1.0
    """Share of an image's texts that differ."""

    @property
    def pair(self) -> float:
        """Return the mean tokens of a query and of a gallery image, together."""
        return mean(self.queries) + mean(self.documents)


WITHOUT_MODEL = Lengths(0.0, (1,), (1,), Question(0, 0, 0), Question(0, 0, 0))
"""For embedders whose rows are not counted in tokens: a row is one."""


def lengths_of(config: RunConfig, data: Dataset) -> Lengths:
    """Return the lengths of a run's rows; `WITHOUT_MODEL` where the embedder is no vision-language
    model."""
    model = config.model
    if not isinstance(model, VlmSettings):
        return WITHOUT_MODEL
    split = data.train if config.trains else data.eval_splits(config.evaluation.split)[0]
    queries = data.train.triplets[:SAMPLE] if config.trains else ()
    sample = [t.query for t in queries] or list(split.queries[:SAMPLE])  # type: ignore[union-attr]
    images = sampled_tokens(model, split)
    image = mean(images)
    processor = _processor(config.model.resolve_dir())
    return Lengths(
        image,
        _row_lengths(model, processor, sample, images),
        _row_lengths(model, processor, [None] * len(images), images),
        *_questions(config.foundation, config, image, sample),
        config.captioning.max_new_tokens,
    )


def _processor(directory: Path) -> Processor:
    from transformers import AutoProcessor

    processor: Processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    return processor


def _row_lengths(
    model: VlmSettings, processor: Processor, queries: Sequence[Query | None], images: Sequence[int]
) -> tuple[int, ...]:
    """Return the lengths of queries, or of gallery images where there is None, as `VlmEmbedder`
    makes them."""
    prompts = model.load_prompt_format()
    lengths = []
    for number, query in enumerate(queries):
        frame = prompts.document if query is None else prompts.query
        own = model.document_prompt if query is None else model.query_prompt
        usual = prompts.document_prompt if query is None else prompts.query_prompt
        frame = frame.replace(PROMPT, usual if own is None else own).replace(IMAGE, "")
        text = query.text if query else ""
        category = (query.category if query else None) or prompts.category
        words = filled(frame, text, category)
        if prompts.chat_template:
            content = [{"type": "text", "text": words}]
            turn = {"role": "user", "content": content}
            words = processor.apply_chat_template(
                [turn], add_generation_prompt=True, tokenize=False
            )
        num_words = len(processor.tokenizer(words).input_ids)
        lengths.append(num_words + FRAME_TOKENS + images[number % len(images)])
    return tuple(lengths)


def _questions(
    foundation: Foundation, config: RunConfig, image: float, queries: Sequence[Query]
) -> tuple[Question, Question]:
    """Return a question for a text and one that judges a text; empty without a model of
    transformers here."""
    empty = Question(0, 0, 0)
    if not (config.captioning.enabled and config.num_iterations and foundation.is_timed):
        return empty, empty
    processor = _processor(foundation.resolve_dir())
    prompts = config.captioning.prompts(foundation)
    texts = [query.text for query in queries]
    return (
        _question(processor, prompts.rewrite, texts, image),
        _question(processor, prompts.verify, texts, image),
    )


def _question(processor: Processor, prompt: Prompt, texts: Sequence[str], image: float) -> Question:
    special = special_tokens(processor)
    rendered = [render_chat(processor, special, prompt, text) for text in texts]
    *before, _ = rendered[0].split(processor.image_token)
    counts = [len(processor.tokenizer(part).input_ids) for part in before]
    rest = [text.rpartition(processor.image_token)[2] for text in rendered]
    text = mean([len(processor.tokenizer(each).input_ids) for each in rest])
    if len(counts) == 1:  # both images in one
        return Question(counts[0] + image, 0, text)
    return Question(sum(counts) + image, image, text)


def num_batches(lengths: Sequence[int], num: int, batch_size: int, max_tokens: int) -> float:
    """Return in how many batches `num` rows are embedded whose lengths are spread as `lengths` are:
    a batch has rows of one length."""
    batches = 0.0
    for length, count in Counter(lengths).items():
        size = max(1, max_tokens // length) if max_tokens else batch_size
        batches += -(-num * count // (len(lengths) * size))
    return batches


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / max(1, len(numbers))
