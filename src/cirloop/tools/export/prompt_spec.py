"""What the model reads, as a chat template and processor files: prompts and pixel budget travel
with the weights.

The template is the same for every format. It takes one message of the user with an image, an image
and a text, or a text, and gives what `Backbone.text` and `Backbone.text_inputs` give for those.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cirloop.artifacts.fs import with_filename
from cirloop.backbones import EmbedInput
from cirloop.backbones.model_settings import QwenSettings, VlmSettings
from cirloop.backbones.vlm import VlmEmbedder
from cirloop.tools.export.templates import render
from cirloop.types import ImageId, UserError

MARK = "cirloop-text-goes-here"


@dataclass(frozen=True, slots=True)
class PromptSpec:
    """What an embedder makes of its inputs: `document` for an image alone; the two pieces of
    `composed`, with the text between them, for an image with a text. `special_tokens` in a text are
    broken up into words."""

    document: str
    composed: tuple[str, str]
    special_tokens: tuple[str, ...]
    min_pixels: int | None
    """None where the size of images is the processor's own."""
    max_pixels: int | None
    processor: Any
    sequential: bool = False
    """Image tokens are numbered as text is, which a caller must say to transformers' model."""
    category: str = ""
    """What is written where the run writes the category of a query; empty where it writes none."""

    @property
    def pillow(self) -> bool:
        """Whether the run sized images itself, by Pillow: transformers' default differs in the last
        bit of a pixel."""
        return self.max_pixels is not None

    def template(self) -> str:
        """Return the chat template."""
        broken = _literal([[token, f"{token[0]} {token[1:]}"] for token in self.special_tokens])
        first, last = self.composed
        begins = max(
            (first.rfind(token) + len(token) for token in self.special_tokens if token in first),
            default=0,
        )
        ends = min(
            (last.find(token) for token in self.special_tokens if token in last), default=len(last)
        )
        pieces = {
            "head": first[:begins],
            "before": first[begins:],
            "after": last[:ends],
            "tail": last[ends:],
        }
        literal = {
            name: _literal(piece) for name, piece in {**pieces, "document": self.document}.items()
        }
        return render("chat_template.jinja", broken=broken, **literal)

    def save(self, directory: Path) -> None:
        """Tokenizer, image processor and chat template, as `AutoProcessor.from_pretrained` reads
        them."""
        if self.pillow:
            self.processor.image_processor.size = {
                "shortest_edge": self.min_pixels,
                "longest_edge": self.max_pixels,
            }
        self.processor.tokenizer.padding_side = "right"
        self.processor.chat_template = self.template()
        with with_filename(directory):
            self.processor.save_pretrained(directory)


def _literal(value: object) -> str:
    """As Jinja and Python read it."""
    return json.dumps(value, ensure_ascii=False)


def read_prompt_spec(backbone: VlmEmbedder) -> PromptSpec:
    """Return the prompts of a model. Raises UserError where the model's own chat template changes a
    text, which no other template can follow."""
    image = ImageId("")
    unusual_text = "  Two  spaces, a {brace} and a\nline "
    settings = backbone.settings
    composed = backbone.text(EmbedInput(image, MARK)).split(MARK)
    if len(composed) != 2 or backbone.text(EmbedInput(image, unusual_text)) != unusual_text.join(
        composed
    ):
        raise UserError(
            f"model.prompt_format {settings.prompt_format}: what {settings.path!r} reads does not"
            " hold the text as it is, once, so it cannot be exported. Train with another, such as"
            " instruction."
        )
    return PromptSpec(
        backbone.text(EmbedInput(image)),
        (composed[0], composed[1]),
        tuple(backbone.special_tokens),
        getattr(backbone, "min_pixels", None),
        getattr(backbone, "max_pixels", None),
        backbone.processor,
        numbers_images_as_text(settings),
        backbone.format.category,
    )


def numbers_images_as_text(settings: VlmSettings) -> bool:
    """Whether the run numbers image tokens as text, and the model by itself would not."""
    return (
        isinstance(settings, QwenSettings)
        and settings.load_prompt_format().positions == "sequential"
    )
