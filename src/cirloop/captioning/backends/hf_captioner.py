"""Foundation models that are shown images through their own processor.

Any image-text-to-text model of transformers, and LLaVA.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.base import VisionLanguageModel
from cirloop.backbones.special_tokens import Processor, special_tokens
from cirloop.backbones.weights import load_pretrained, loading_errors
from cirloop.captioning.base import (
    Answer,
    CaptionRequest,
    InputKind,
    end_token_ids,
    render_chat,
    sampling_kwargs,
    without_padding,
    yes_no_token_ids,
    yes_probability,
)
from cirloop.captioning.prompts import Prompt
from cirloop.captioning.weight_sharing import adapter_disabled, can_share_weights
from cirloop.monitoring import profiling
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.backbones.vlm import VlmEmbedder
    from cirloop.captioning.foundation import GenericFoundation, LlavaFoundation

WAY_OUT = "Give an image-text-to-text model that transformers knows, or restore its files."
WHITE = (255, 255, 255)
MAX_ASPECT_RATIO = 200
"""Largest ratio of an image's sides: the image processors of Qwen's families take no more."""
GAP = 1 / 32
"""Width of the white gap between two images, as a share of the taller image's height."""


def shrink_to(image: Image.Image, max_side: int) -> Image.Image:
    """Scale `image` down where a side is longer than `max_side`.

    The other side is not rounded below the aspect ratio that image processors take.
    """
    scale = max_side / max(image.size)
    if scale >= 1:
        return image
    min_side = -(-max_side // MAX_ASPECT_RATIO)
    width, height = (max(min_side, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def side_by_side(left: Image.Image, right: Image.Image, square: bool) -> Image.Image:
    """Place both images at their own size on white, with a gap between them.

    The lower image is centred vertically. With `square`, white above and below makes the canvas at
    least as high as it is wide, for processors that crop.
    """
    height = max(left.height, right.height)
    gap = max(1, round(height * GAP))
    width = left.width + gap + right.width
    canvas = Image.new("RGB", (width, max(width, height) if square else height), WHITE)
    for image, x in ((left, 0), (right, left.width + gap)):
        canvas.paste(image, (x, (canvas.height - image.height) // 2))
    return canvas


def chat_processor(path: str, directory: Path) -> Processor:
    """Load the processor of a model directory. Raises UserError without a chat template."""
    with loading_errors(f"foundation.path {path!r}", WAY_OUT):
        processor: Processor = AutoProcessor.from_pretrained(directory, trust_remote_code=False)
    if not getattr(processor, "chat_template", None):
        raise UserError(
            f"foundation.path {path!r} has no chat template, so how to ask it is not known. Use an"
            " instruction-tuned model, or put its chat_template.jinja into the directory."
        )
    return processor


class HFCaptioner:
    """A captioner that shows two images in one turn of the model's chat template.

    Generation is batched, with left padding.
    """

    input_kind: InputKind = "images"

    def __init__(
        self, settings: GenericFoundation | LlavaFoundation, embedder: VlmEmbedder | None = None
    ) -> None:
        self.settings = settings
        self.name = settings.path
        shares = embedder is not None and can_share_weights(embedder, settings)
        self.shared_embedder = embedder if shares else None
        directory = settings.resolve_dir()
        self.processor = chat_processor(settings.path, directory)
        self.base_digest = settings.weights_digest()
        self.vlm: VisionLanguageModel = (
            self._load(directory) if self.shared_embedder is None else self.shared_embedder.vlm
        )
        self.special_tokens = special_tokens(self.processor)
        self.end_ids = end_token_ids(self.vlm, self.name)
        self._yes_ids, self._no_ids = yes_no_token_ids(self.processor)

    def _load(self, directory: Path) -> VisionLanguageModel:
        model = load_pretrained(
            AutoModelForImageTextToText,
            directory,
            f"foundation.path {self.name!r}",
            WAY_OUT,
            dtype=getattr(torch, self.settings.dtype),
            attn_implementation=self.settings.attention,
        )
        if model.config.is_encoder_decoder:
            raise UserError(
                f"foundation.path {self.name!r} is an encoder-decoder model; a decoder with a chat"
                " is needed."
            )
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    @property
    def fingerprint(self) -> str:
        settings = self.settings.model_dump(mode="json", exclude={"path"})
        return fingerprint([self.base_digest, settings])

    def compose_images(self, reference: Image.Image, image: Image.Image) -> list[Image.Image]:
        """Return the images that the model is shown for one request."""
        return [reference, image]

    def render_chat(self, prompt: Prompt, text: str) -> str:
        """Render the conversation as the model reads it, with one placeholder per image."""
        return render_chat(self.processor, self.special_tokens, prompt, text)

    def inputs(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], vision: Sequence[Image.Image]
    ) -> Mapping[str, torch.Tensor]:
        """Return the processor's tensors of the requests, left-padded.

        Padding holds no padding token (`without_padding`).
        """
        profiling.add(images_encoded=len(vision))
        images = [shrink_to(image, self.settings.max_side) for image in vision]
        composed = [
            self.compose_images(*pair) for pair in zip(images[::2], images[1::2], strict=True)
        ]
        assert all(len(images) == prompt.num_images for images in composed), (
            "the prompt is for another number of images"
        )
        batch: Any = self.processor(
            text=[self.render_chat(prompt, request.text) for request in requests],
            images=composed,
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        batch["input_ids"] = without_padding(batch["input_ids"], batch["attention_mask"])
        on_device: Mapping[str, torch.Tensor] = batch.to(self.vlm.device, self.vlm.dtype)
        return on_device

    def _generate(
        self, inputs: Mapping[str, torch.Tensor], max_new_tokens: int, **generate_kwargs: Any
    ) -> Any:
        with adapter_disabled(self.shared_embedder):
            return self.vlm.generate(
                **inputs,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                **generate_kwargs,
            )

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        vision: Sequence[Image.Image],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
    ) -> list[list[Answer]]:
        """Generate an answer per request and temperature; 0 is greedy.

        `vision` holds two images per request, in order.
        """
        inputs = self.inputs(prompt, requests, vision)
        prompt_ids = inputs["input_ids"]
        answers_by_temperature = []
        for number, temperature in enumerate(temperatures):
            torch.manual_seed(seed + number)
            output = self._generate(inputs, max_new_tokens, **sampling_kwargs(temperature))
            ids = output.sequences
            assert torch.equal(ids[:, : prompt_ids.shape[1]], prompt_ids), (
                "generate() did not return the prompt first"
            )
            profiling.add_tokens(inputs)
            answers_by_temperature.append(self._answers(ids[:, prompt_ids.shape[1] :]))
        return [list(answers) for answers in zip(*answers_by_temperature, strict=True)]

    def _answers(self, ids: torch.Tensor) -> list[Answer]:
        """Decode the answers of new token ids (B, T)."""
        tokenizer = self.processor.tokenizer
        profiling.add(tokens_written=int(ids.ne(tokenizer.pad_token_id).sum()))
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        ended = torch.isin(ids, torch.tensor(self.end_ids, device=ids.device)).any(1).tolist()
        return [Answer(text.strip(), end) for text, end in zip(texts, ended, strict=True)]

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], vision: Sequence[Image.Image]
    ) -> list[float]:
        """Return the probability of "yes" against "no" as the first word of each answer.

        Computed by `generate`, which knows each model's positions under left padding; the logits
        are those before any processing.
        """
        inputs = self.inputs(prompt, requests, vision)
        output = self._generate(inputs, 1, do_sample=False, output_logits=True)
        profiling.add_tokens(inputs)
        return yes_probability(output.logits[0], self._yes_ids, self._no_ids)


class LlavaCaptioner(HFCaptioner):
    """LLaVA, which was trained on one image a turn: both images stand side by side in one."""

    def compose_images(self, reference: Image.Image, image: Image.Image) -> list[Image.Image]:
        """Return one image that holds both."""
        crops = bool(getattr(self.processor.image_processor, "do_center_crop", False))
        return [side_by_side(reference, image, square=crops)]
