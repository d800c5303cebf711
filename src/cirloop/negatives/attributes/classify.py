"""Attributes of texts by a transformers classifier; the model is loaded when it is first used.

`ZeroShot` asks a natural language inference model for each value of the lexicon whether the text
entails "The text asks for the color red." (Yin et al., EMNLP 2019, arXiv 1909.00161).
`TokenClassifier` takes a model that tags words with the lexicon's attributes (COLOR, B-color);
rules then say which of the tagged values are wanted and which removed. Both give what
`extract.Rules` gives. Degenerate cases: an empty text asks for nothing; a text longer than the
model's window is cut for `ZeroShot`, and read in overlapping windows by `TokenClassifier`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from cirloop.negatives.attributes.extract import resolve
from cirloop.negatives.attributes.lexicon import Lexicon, Match, stem, tokens
from cirloop.negatives.attributes.values import ANY
from cirloop.types import UserError

BATCH_SIZE = 32
"""Texts, or pairs of a text and a value, of one batch."""


def load_pipeline(task: str, model: str) -> Any:
    """Load the pipeline, which reads no more than the model's positions hold. Raises UserError
    where the model does not load."""
    import transformers

    try:
        build: Any = transformers.pipeline  # its overloads name every task by a literal
        pipeline = build(
            task,
            model=model,
            batch_size=BATCH_SIZE,
            trust_remote_code=False,
            model_kwargs={"use_safetensors": True},
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"attributes: model {model!r} does not load for {task} ({str(error).splitlines()[0]}). "
            "Give a model directory or hub name with that head, or set extractor to 'lexicon'."
        ) from error
    positions = getattr(pipeline.model.config, "max_position_embeddings", None)
    if positions:
        limit = max(1, positions - 2)  # RoBERTa's first two positions are taken
        pipeline.tokenizer.model_max_length = min(pipeline.tokenizer.model_max_length, limit)
    return pipeline


class ZeroShot:
    """The likeliest value of each attribute, of those with at least `threshold`, ties by the
    lexicon's order."""

    def __init__(self, model: str, lexicon: Lexicon, threshold: float = 0.5) -> None:
        self.model = model
        self.lexicon = lexicon
        self.threshold = threshold

    @cached_property
    def pipeline(self) -> Any:
        pipeline = load_pipeline("zero-shot-classification", self.model)
        if pipeline.entailment_id == -1:
            raise UserError(
                f"attributes: model {self.model!r} has the labels"
                f" {sorted(pipeline.model.config.label2id)}, none of them entailment. zero_shot"
                " needs a natural language inference model."
            )
        return pipeline

    def parse_request(self, texts: Sequence[str]) -> list[dict[str, str]]:
        return self._read(texts, "The text asks for {}.", request=True)

    def parse_caption(self, captions: Sequence[str]) -> list[dict[str, str]]:
        return self._read(captions, "The text describes {}.", request=False)

    def _labels(self, *, request: bool) -> dict[str, tuple[str, str]]:
        labels = {}
        for name, attribute in self.lexicon.attributes.items():
            labels.update({f"the {name} {value}": (name, value) for value in attribute.values})
            if attribute.absent != "none":
                labels[f"no {name}"] = (name, attribute.absent)
            if request:
                labels[f"a different {name}"] = (name, ANY)
        return labels

    def _read(self, texts: Sequence[str], template: str, *, request: bool) -> list[dict[str, str]]:
        out: list[dict[str, str]] = [{} for _ in texts]
        full = [i for i, text in enumerate(texts) if tokens(text)]
        labels = self._labels(request=request)
        if not full:
            return out
        results = self.pipeline(
            [texts[i] for i in full],
            candidate_labels=list(labels),
            hypothesis_template=template,
            multi_label=True,
        )
        for i, result in zip(full, results, strict=True):
            scores = dict(zip(result["labels"], result["scores"], strict=True))
            best: dict[str, float] = {}
            for label, (name, value) in labels.items():
                if scores[label] >= self.threshold and scores[label] > best.get(name, -1):
                    best[name] = scores[label]
                    out[i][name] = value
        return out


class TokenClassifier:
    """Values that a tagging model finds with at least `threshold`, under the lexicon's names where
    it has them."""

    def __init__(self, model: str, lexicon: Lexicon, threshold: float = 0.5) -> None:
        self.model = model
        self.lexicon = lexicon
        self.threshold = threshold

    @cached_property
    def pipeline(self) -> Any:
        pipeline = load_pipeline("token-classification", self.model)
        labels = sorted(pipeline.model.config.label2id)
        if not any(self._attribute(label) for label in labels):
            raise UserError(
                f"attributes: model {self.model!r} tags {labels}, none of them an attribute of the"
                f" lexicon: {sorted(self.lexicon.attributes)}. Give a model whose labels are those"
                " names."
            )
        if not pipeline.tokenizer.is_fast:
            raise UserError(
                f"attributes: model {self.model!r} has no fast tokenizer, which says where its"
                " words are."
            )
        return pipeline

    def parse_request(self, texts: Sequence[str]) -> list[dict[str, str]]:
        return self._read(texts, caption=False)

    def parse_caption(self, captions: Sequence[str]) -> list[dict[str, str]]:
        return self._read(captions, caption=True)

    def _attribute(self, label: str) -> str | None:
        name = self.lexicon.attribute(label[2:] if label[:2].upper() in ("B-", "I-") else label)
        return name if name in self.lexicon.attributes else None

    def _read(self, texts: Sequence[str], *, caption: bool) -> list[dict[str, str]]:
        out: list[dict[str, str]] = [{} for _ in texts]
        full = [i for i, text in enumerate(texts) if tokens(text)]
        if not full:
            return out
        stride = self.pipeline.tokenizer.model_max_length // 4
        tagged = self.pipeline(
            [texts[i] for i in full], aggregation_strategy="first", stride=stride
        )
        for i, entities in zip(full, tagged, strict=True):
            words = tokens(texts[i])
            matches = self._matches(texts[i], len(words), entities)
            out[i] = resolve(words, matches, self.lexicon, caption=caption)
        return out

    def _matches(
        self, text: str, num_words: int, entities: Sequence[dict[str, Any]]
    ) -> list[Match]:
        """Turn the tagged words into matches, left to right; overlapping ones are left out."""
        out = []
        last = 0
        for entity in sorted(entities, key=lambda entity: (entity["start"], -entity["end"])):
            name = self._attribute(entity["entity_group"])
            span = text[entity["start"] : entity["end"]]
            start = len(tokens(text[: entity["start"]]))
            size = len(tokens(span))
            if (
                name is None
                or entity["score"] < self.threshold
                or size == 0
                or start < last
                or start >= num_words
            ):
                continue
            last = min(start + size, num_words)
            known = self.lexicon.phrases.get(tuple(map(stem, tokens(span))))
            value = ANY if known == (name, ANY) else self.lexicon.value(name, span)
            out.append(Match(start, last, name, value))
        return out
