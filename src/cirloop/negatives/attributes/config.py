"""Settings of attributes: where what a text asks for, and what an image shows, come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, Self

from pydantic import Field, model_validator

from cirloop.config.base import Settings

if TYPE_CHECKING:
    from cirloop.negatives.attributes.lexicon import Lexicon


class Extractor(Protocol):
    """Attributes of texts, {attribute: value} each; values as `attributes.values` writes them."""

    @property
    def lexicon(self) -> Lexicon: ...

    def parse_request(self, texts: Sequence[str]) -> list[dict[str, str]]:
        """Extract what modification texts ask for."""

    def parse_caption(self, captions: Sequence[str]) -> list[dict[str, str]]:
        """Extract what captions say of their images."""


class AttributeSettings(Settings):
    """Attributes of texts and images."""

    domain: Literal["fashion", "everyday", "shapes"] = "fashion"
    """The lexicon: attributes, their values, and words for them."""
    extractor: Literal["lexicon", "zero_shot", "token_classifier"] = "lexicon"
    """What finds values in a text: rules over the lexicon, or a transformers pipeline."""
    model: str | None = None
    """Model directory or hub name of a classifier; none for `lexicon`."""
    threshold: float = Field(0.5, ge=0, le=1)
    """Least score of a value that a classifier finds; the lexicon has no scores."""
    image_source: Literal["metadata", "captions", "vlm"] = "metadata"
    """Where attributes of images come from: a file of them, a file of captions, or the foundation
    model's captions."""
    file: Path | None = None
    """JSON of `metadata` ({image: {attribute: value}}) or `captions` ({image: caption}); none for
    `vlm`."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.extractor == "lexicon" and self.model is not None:
            raise ValueError(
                f"model {self.model!r} is not used by the extractor 'lexicon': "
                "set extractor to 'zero_shot' or 'token_classifier', or leave model out"
            )
        if self.extractor != "lexicon" and not self.model:
            raise ValueError(
                f"the extractor {self.extractor!r} needs model, a model directory or hub name: "
                "set it, or set extractor to 'lexicon', which needs none"
            )
        if self.image_source == "vlm" and self.file is not None:
            raise ValueError(
                f"file {str(self.file)!r} is not read for image_source 'vlm': "
                "set image_source to 'metadata' or 'captions', or leave file out"
            )
        if self.image_source != "vlm" and self.file is None:
            form = (
                "{image: {attribute: value}}"
                if self.image_source == "metadata"
                else "{image: caption}"
            )
            raise ValueError(
                f"image_source {self.image_source!r} need file, a JSON file {form}: set it, or set"
                " image_source to 'vlm'"
            )
        return self

    def build(self) -> Extractor:
        """Build the extractor. A classifier's model is loaded on first use."""
        from cirloop.negatives.attributes.extract import Rules
        from cirloop.negatives.attributes.lexicon import load

        lexicon = load(self.domain)
        if self.extractor == "lexicon":
            return Rules(lexicon)
        from cirloop.negatives.attributes.classify import TokenClassifier, ZeroShot

        assert self.model is not None
        kind = ZeroShot if self.extractor == "zero_shot" else TokenClassifier
        return kind(self.model, lexicon, self.threshold)
