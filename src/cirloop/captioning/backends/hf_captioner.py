"""Foundation models that are shown pictures through their own processor: any of transformers', and
LLaVA."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from cirloop.artifacts.store import fingerprint
from cirloop.captioning.base import (
    Answer,
    Ask,
    Sees,
    chat_text,
    end_signs,
    probability,
    sampling,
    signs,
    without_padding,
    yes_and_no,
)
from cirloop.captioning.prompts import Prompt
from cirloop.captioning.weight_sharing import base_of, lends
from cirloop.monitoring import profiling
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.captioning.config import GenericFoundation, LlavaFoundation

WHITE = (255, 255, 255)
MAX_RATIO = 200
"""Of a picture's sides: the image processors of Qwen's families take no more."""
GAP = 1 / 32
"""Width of the white between two pictures, of the taller one's height."""


def within(picture: Image.Image, max_side: int) -> Image.Image:
    """`picture`, scaled down where a side is longer than `max_side`; the other one is not rounded
    below the ratio of sides that image processors take."""
    scale = max_side / max(picture.size)
    if scale >= 1:
        return picture
    least = -(-max_side // MAX_RATIO)
    width, height = (max(least, round(side * scale)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def side_by_side(left: Image.Image, right: Image.Image, square: bool) -> Image.Image:
    """Both pictures at their own size on white, the lower one in the middle of the other's height,
    a gap between them. `square`: with as much white above and below as makes a square, for
    processors that crop."""
    height = max(left.height, right.height)
    gap = max(1, round(height * GAP))
    width = left.width + gap + right.width
    whole = Image.new("RGB", (width, max(width, height) if square else height), WHITE)
    for picture, x in ((left, 0), (right, left.width + gap)):
        whole.paste(picture, (x, (whole.height - picture.height) // 2))
    return whole


@contextmanager
def readable(path: str) -> Iterator[None]:
    """What transformers says of a model that it cannot load, as an error of the user's."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, ImportError) as error:
        raise UserError(
            f"foundation.path {path!r} cannot be loaded: {error}\nGive an image-text-to-text model"
            " that transformers knows, or restore its files."
        ) from None


def chat_processor(path: str, directory: Any) -> Any:
    """The processor of a model directory. Raises UserError without a chat template."""
    with readable(path):
        processor: Any = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"foundation.path {path!r} has no chat template, so how to ask it is not known. Use an"
            " instruction-tuned model, or put its chat_template.jinja into the directory."
        )
    return processor


class PictureCaptioner:
    """Two pictures in one turn of the model's chat template; batched generation with left
    padding."""

    sees: Sees = "pictures"

    def __init__(
        self, settings: GenericFoundation | LlavaFoundation, shared: Any | None = None
    ) -> None:
        self.settings, self.name = settings, settings.path
        self.lender = shared if shared is not None and lends(shared, settings) else None
        directory = settings.find()
        self.processor = chat_processor(settings.path, directory)
        self.base_digest = settings.weights()
        self.vlm = self.lender.vlm if self.lender is not None else self._load(directory)
        self.signs = signs(self.processor)
        self._ends = end_signs(self.vlm, self.name)
        self._yes, self._no = yes_and_no(self.processor.tokenizer)

    def _load(self, directory: Any) -> Any:
        with readable(self.name):
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                directory,
                dtype=getattr(torch, self.settings.dtype),
                attn_implementation=self.settings.attention,
                output_loading_info=True,
                trust_remote_code=False,
                use_safetensors=True,
            )
        model, info = loaded
        missing = sorted(info["missing_keys"])
        if missing:
            raise UserError(
                f"foundation.path {self.name!r} lacks weights: {', '.join(missing[:5])}"
                f" ({len(missing)})."
            )
        if model.config.is_encoder_decoder:
            raise UserError(
                f"foundation.path {self.name!r} is an encoder-decoder model; a decoder with a chat"
                " is needed."
            )
        model.requires_grad_(False)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @property
    def fingerprint(self) -> str:
        return fingerprint(
            [self.base_digest, self.settings.model_dump(mode="json", exclude={"path"})]
        )

    def show(self, first: Image.Image, second: Image.Image) -> list[Image.Image]:
        """The pictures of one question."""
        return [first, second]

    def turn(self, prompt: Prompt, text: str) -> str:
        """The conversation as the model reads it, each image as one sign."""
        return chat_text(self.processor, self.signs, prompt, text)

    def inputs(self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[Image.Image]) -> Any:
        """The processor's tensors of the questions, left-padded, with no sign of padding
        (`without_padding`)."""
        profiling.add(images_encoded=len(vision))
        pictures = [within(picture, self.settings.max_side) for picture in vision]
        shown = [self.show(*pair) for pair in zip(pictures[::2], pictures[1::2], strict=True)]
        assert all(len(each) == prompt.num_images for each in shown), (
            "the prompt is for another number of images"
        )
        made = self.processor(
            text=[self.turn(prompt, ask.text) for ask in asks],
            images=shown,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        made["input_ids"] = without_padding(made["input_ids"], made["attention_mask"])
        return made.to(self.vlm.device, self.vlm.dtype)

    def _generate(self, inputs: Any, max_new_tokens: int, **how: Any) -> Any:
        with base_of(self.lender):
            return self.vlm.generate(
                **inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **how
            )

    def write(
        self,
        prompt: Prompt,
        asks: Sequence[Ask],
        vision: Sequence[Image.Image],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """An answer per temperature and question; 0 is greedy. `vision` holds two pictures per
        question, in order."""
        inputs, turns = self.inputs(prompt, asks, vision), []
        length = inputs["input_ids"].shape[1]
        for turn, temperature in enumerate(temperatures):
            torch.manual_seed(seed + turn)
            out = self._generate(inputs, max_new_tokens, **sampling(temperature)).sequences
            assert torch.equal(out[:, :length], inputs["input_ids"]), (
                "generate() did not return the prompt first"
            )
            written = out[:, length:]
            profiling.add_tokens(inputs)
            profiling.add(
                tokens_written=int(written.ne(self.processor.tokenizer.pad_token_id).sum())
            )
            texts = self.processor.tokenizer.batch_decode(written, skip_special_tokens=True)
            ended = (
                torch.isin(written, torch.tensor(self._ends, device=written.device)).any(1).tolist()
            )
            turns.append(
                [Answer(text.strip(), end) for text, end in zip(texts, ended, strict=True)]
            )
        return [list(answers) for answers in zip(*turns, strict=True)]

    def yes(
        self, prompt: Prompt, asks: Sequence[Ask], vision: Sequence[Image.Image]
    ) -> list[float]:
        """Probability of "yes" against "no" as the first word of the answer. By `generate`, which
        knows each model's positions under left padding; the logits are those before any
        processing."""
        inputs = self.inputs(prompt, asks, vision)
        made = self._generate(inputs, 1, do_sample=False, output_logits=True)
        profiling.add_tokens(inputs)
        return probability(made.logits[0], self._yes, self._no)


class LlavaCaptioner(PictureCaptioner):
    """LLaVA, which has learned from one picture a turn: it is shown both side by side in one."""

    def show(self, first: Image.Image, second: Image.Image) -> list[Image.Image]:
        crops = bool(getattr(self.processor.image_processor, "do_center_crop", False))
        return [side_by_side(first, second, square=crops)]
