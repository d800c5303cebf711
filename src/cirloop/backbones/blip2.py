"""BLIP-2 as QuRe uses it (ICML 2025, arXiv 2507.12416), from its image-text retrieval weights
(arXiv 2301.12597).

Query = the Q-Former over reference image and text: mean of the query tokens' outputs through the
text projection. Gallery image = the Q-Former over the image alone: each query token's output
through the vision projection, M vectors. The score is the largest of the M inner products. QuRe's
released code (github.com/jackwaky/QuRe, `blip2_qure.py`) takes the mean after the projection, which
is the same, as the projection is affine. All vectors are of unit norm.

Three things differ from QuRe: the layer norm after the vision tower is part of the tower and frozen
with it; the temperature is the loss's, not learned; and the tower is a ViT-g, while QuRe's settings
take a ViT-L, of which transformers has no retrieval weights.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import ImageOps
from PIL.Image import Resampling
from torch import nn
from transformers import Blip2ForImageTextRetrieval, Blip2Processor

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.adapter import TrainableWeights
from cirloop.backbones.base import EmbedInput, Grid, ImageFeatures
from cirloop.backbones.target_pad import target_pad
from cirloop.backbones.transfer import to_device
from cirloop.backbones.vision import tower_digest
from cirloop.backbones.weights import load_pretrained, weights_digest
from cirloop.types import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from cirloop.backbones.config import Blip2Settings

logger = logging.getLogger(__name__)
PUNCTUATION_TO_SPACE = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
WAY_OUT = "Give BLIP-2's retrieval weights with all their files, as Salesforce/blip2-itm-vit-g."
NOT_TRAINABLE = ("vision_model", "itm_head")
"""Prefixes of weights that may not be trained: the frozen tower, and the matching head, which no
embedding passes."""


def normalize_caption(text: str) -> str:
    """Normalize a text as in BLIP-2's training (`blip_caption` in LAVIS).

    Lower case, some punctuation as spaces, at most 50 words.
    """
    return " ".join(text.lower().translate(PUNCTUATION_TO_SPACE).split()[:50])


class Blip2Module(nn.Module):
    """The trained module: tensors in, unit-norm embeddings out.

    The vision tower stays in evaluation mode.
    """

    def __init__(self, model: Blip2ForImageTextRetrieval) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> Blip2Module:  # torch's signature
        """Set the mode of all but the vision tower."""
        super().train(mode)
        self.model.vision_model.eval()
        return self

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Embed inputs in float32.

        Images with texts become (B, D), images alone (B, M, D), texts alone (B, D): the CLS token,
        projected.
        """
        vision = inputs.get("vision_tokens")
        if vision is None:
            return self._text(inputs)
        queries = self.model.query_tokens.expand(len(vision), -1, -1)
        if "input_ids" in inputs:
            return self._composed(inputs, queries, vision)
        hidden = self.model.qformer(query_embeds=queries, encoder_hidden_states=vision.float())[0]
        return F.normalize(self.model.vision_projection(hidden), dim=-1)

    def _text(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.model.qformer(
            query_embeds=self.model.embeddings(input_ids=inputs["input_ids"]),
            query_length=0,
            attention_mask=inputs["attention_mask"],
        )[0]
        return F.normalize(self.model.text_projection(hidden[:, 0]), dim=-1)

    def _composed(
        self, inputs: dict[str, torch.Tensor], queries: torch.Tensor, vision: torch.Tensor
    ) -> torch.Tensor:
        model = self.model
        num_queries = queries.shape[1]
        query_mask = torch.ones_like(queries[..., 0], dtype=torch.long)
        hidden = model.qformer(
            query_embeds=model.embeddings(input_ids=inputs["input_ids"], query_embeds=queries),
            query_length=num_queries,
            attention_mask=torch.cat([query_mask, inputs["attention_mask"]], dim=1),
            encoder_hidden_states=vision.float(),
        )[0]
        return F.normalize(model.text_projection(hidden[:, :num_queries].mean(1)), dim=-1)


def load_blip2(directory: Path, path: str, dtype: str) -> Blip2ForImageTextRetrieval:
    """Load the model, frozen, its tower in `dtype` and the rest in float32."""
    model = load_pretrained(
        Blip2ForImageTextRetrieval,
        directory,
        f"model path {path!r}",
        WAY_OUT,
        may_lack=("itm_head",),
        dtype=torch.float32,
    )
    if not model.config.qformer_config.use_qformer_text_input:
        raise UserError(
            f"model path {path!r}: the Q-Former takes no text (use_qformer_text_input is false in"
            f" config.json). {WAY_OUT}"
        )
    model.vision_model.to(getattr(torch, dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_device: Blip2ForImageTextRetrieval = model.to(device).eval()
    return on_device


class Blip2(TrainableWeights):
    """The BLIP-2 embedder."""

    default_finetuning = "full"

    def __init__(self, settings: Blip2Settings, adapter: Path | None = None) -> None:
        directory = settings.resolve_dir()
        self.settings = settings
        self.base_path = settings.path
        self.base_digest = weights_digest(directory)
        self.model = load_blip2(directory, settings.path, settings.dtype)
        self.root_module = self.model
        self.processor = Blip2Processor.from_pretrained(directory)
        self._check_image_size()
        self.module = Blip2Module(self.model)
        last = len(self.model.qformer.encoder.layer) - 1
        # The last layer's text states reach no query, so their part of it would get no gradient.
        qformer = rf"qformer\.(?!encoder\.layer\.{last}\.(?:intermediate|output)\.)"
        self.lora_modules = qformer + r".*\.({targets})"
        self.default_trainable_patterns = (
            "query_tokens",
            "embeddings",
            qformer,
            "vision_projection",
            "text_projection",
        )
        if adapter is not None:
            self.load_adapter(adapter)

    def _check_image_size(self) -> None:
        """Raise UserError where processor and tower differ: patches would get wrong positions."""
        side = self.model.vision_model.config.image_size
        size = self.processor.image_processor.size
        if (size["height"], size["width"]) != (side, side):
            raise UserError(
                f"model path {self.base_path!r}: the processor makes images of"
                f" {size['height']}x{size['width']} pixels, config.json's vision tower takes"
                f" {side}x{side}. Make the two agree."
            )

    @property
    def device(self) -> torch.device:
        query_tokens: torch.Tensor = self.model.query_tokens
        return query_tokens.device

    @property
    def fingerprint(self) -> str:
        settings = self.settings.model_dump(mode="json", exclude={"path"})
        return fingerprint([self.base_digest, self.adapter_digest, settings])

    @cached_property
    def vision_key(self) -> str:
        tower = tower_digest(sorted(self.model.vision_model.state_dict().items()))
        image_processor = self.processor.image_processor.to_json_string()
        return fingerprint([tower, image_processor, self.settings.pad_ratio, self.settings.dtype])

    def vision_is_frozen(self) -> bool:
        """Return whether no weight of the vision tower is trained."""
        return not any(p.requires_grad for p in self.model.vision_model.parameters())

    def _check_patterns(self, patterns: tuple[str, ...]) -> None:
        super()._check_patterns(patterns)
        names = [
            name
            for name, _ in self.root_module.named_parameters()
            if name.startswith(NOT_TRAINABLE)
        ]
        reaching = [p for p in patterns if any(re.match(p, name) for name in names)]
        if reaching:
            raise UserError(
                f"training.trainable_patterns: {', '.join(reaching)} match weights of"
                f" {' or '.join(NOT_TRAINABLE)}, which this model does not train. By default it"
                f" trains {', '.join(self.default_trainable_patterns)}."
            )

    def prepare_images(self, images: Sequence[Image]) -> torch.Tensor:
        """Return pixels (B, 3, height, width)."""
        if self.settings.pad_ratio:
            side = self.model.vision_model.config.image_size
            padded = [target_pad(image, self.settings.pad_ratio) for image in images]
            images = [ImageOps.fit(image, (side, side), Resampling.BICUBIC) for image in padded]
        pixels: torch.Tensor = self.processor.image_processor(
            images=list(images), return_tensors="pt"
        )["pixel_values"]
        return pixels

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image], prepared: torch.Tensor | None = None
    ) -> list[ImageFeatures]:
        """Compute the tower's last hidden state after its layer norm, on the device.

        Each is (1 + height * width, D), the CLS token first.
        """
        assert self.vision_is_frozen(), "the vision tower is trained: its output may not be kept"
        vision = self.model.vision_model
        pixels = self.prepare_images(images) if prepared is None else prepared
        height, width = (n // vision.config.patch_size for n in pixels.shape[-2:])
        hidden = vision(pixel_values=to_device(pixels, self.device, vision.dtype)).last_hidden_state
        assert hidden.shape[1] == 1 + height * width
        return [ImageFeatures(tokens, (1, height, width)) for tokens in hidden]

    def inputs(
        self, items: Sequence[EmbedInput], vision: Sequence[ImageFeatures]
    ) -> dict[str, torch.Tensor]:
        """Return the module's inputs of queries, or of gallery images, never both."""
        tokens = {"vision_tokens": to_device(torch.stack([v.tokens for v in vision]), self.device)}
        texts = [item.text for item in items if item.text is not None]
        assert len(texts) in (0, len(items)), "queries and gallery images in one batch"
        return tokens | self.text_inputs(texts) if texts else tokens

    def text_inputs(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the inputs of texts alone, whose special tokens are words."""
        batch = self.processor.tokenizer(
            [normalize_caption(text) for text in texts],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.settings.max_tokens,
            return_tensors="pt",
            split_special_tokens=True,
        )
        return {
            name: to_device(batch[name], self.device) for name in ("input_ids", "attention_mask")
        }

    def sequence_length(self, item: EmbedInput, grid: Grid) -> int:
        """Count the tokens of a query's text; 0 for a gallery image, since all have one size."""
        return 0 if item.text is None else len(self.text_inputs([item.text])["input_ids"][0])

    def probe_output(self) -> torch.Tensor:
        """Embed a query, a gallery image and a text."""
        width = self.model.vision_model.config.hidden_size
        vision = torch.linspace(-9, 9, 4 * width, device=self.device).sin().view(1, 4, width)
        text = self.text_inputs(["is red and has long sleeves"])
        batches = ({"vision_tokens": vision} | text, {"vision_tokens": vision}, text)
        return torch.cat([self.module(batch).flatten() for batch in batches])
