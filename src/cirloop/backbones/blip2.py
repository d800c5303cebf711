"""BLIP-2 as QuRe uses it (ICML 2025, arXiv 2507.12416), from its image-text retrieval weights
(arXiv 2301.12597).

Query = the Q-Former over reference image and text: mean of the query tokens' outputs through the
text projection. Gallery image = the Q-Former over the image alone: each query token's output
through the vision projection, M vectors. The score is the largest of the M inner products. QuRe's
released code (github.com/jackwaky/QuRe, `blip2_qure.py`) takes the mean after the projection: the
same, as the projection is affine. All vectors are of unit norm.

Unlike there, the layer norm after the vision tower counts as part of the tower and is frozen with
it; the temperature is the loss's, not learned; and the tower is a ViT-g where the released settings
take a ViT-L, of which transformers has no retrieval weights.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import ImageOps
from PIL.Image import Resampling
from safetensors import SafetensorError
from torch import nn
from transformers import Blip2ForImageTextRetrieval, Blip2Processor

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.adapter import Adapted
from cirloop.backbones.base import Grid, Item, VisionInput
from cirloop.backbones.target_pad import target_pad
from cirloop.backbones.weights import weights_digest
from cirloop.types import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from cirloop.backbones.config import Blip2Settings

logger = logging.getLogger(__name__)
SPACES = str.maketrans(dict.fromkeys('.!"()*#:;~', " "))
UNUSED = ("vision_model", "itm_head")
"""Weights that may not be trained: the frozen tower, and the matching head, which no embedding goes
through."""


def plain(text: str) -> str:
    """A text as BLIP-2 was trained with it (`blip_caption` in LAVIS): lower case, some signs as
    spaces, 50 words."""
    return " ".join(text.lower().translate(SPACES).split()[:50])


class Embedder(nn.Module):
    """The trained module: tensors in, unit-norm embeddings out. The vision tower stays in
    evaluation mode."""

    def __init__(self, model: Blip2ForImageTextRetrieval) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> Embedder:
        super().train(mode)
        self.model.vision_model.eval()
        return self

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Float32. Images with texts (B, D), images alone (B, M, D), texts alone (B, D): the CLS
        token, projected."""
        model, vision = self.model, inputs.get("vision_tokens")
        if vision is None:
            words = model.embeddings(input_ids=inputs["input_ids"])
            hidden = model.qformer(
                query_embeds=words, query_length=0, attention_mask=inputs["attention_mask"]
            )[0]
            return F.normalize(model.text_projection(hidden[:, 0]), dim=-1)
        tokens = model.query_tokens.expand(len(vision), -1, -1)
        if "input_ids" not in inputs:
            hidden = model.qformer(query_embeds=tokens, encoder_hidden_states=vision.float())[0]
            return F.normalize(model.vision_projection(hidden), dim=-1)
        mask = torch.cat(
            [torch.ones_like(tokens[..., 0], dtype=torch.long), inputs["attention_mask"]], dim=1
        )
        hidden = model.qformer(
            query_embeds=model.embeddings(input_ids=inputs["input_ids"], query_embeds=tokens),
            query_length=tokens.shape[1],
            attention_mask=mask,
            encoder_hidden_states=vision.float(),
        )[0]
        return F.normalize(model.text_projection(hidden[:, : tokens.shape[1]].mean(1)), dim=-1)


def load_blip2(directory: Path, path: str, dtype: str) -> Blip2ForImageTextRetrieval:
    """The model, frozen, its tower in `dtype` and the rest in float32."""
    try:
        loaded: Any = Blip2ForImageTextRetrieval.from_pretrained(
            directory,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            use_safetensors=True,
        )
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"model path {path!r} has weights that cannot be read ({error}). Fetch them again."
        ) from None
    model, info = loaded
    wrong = [
        f"no {name}" for name in sorted(info["missing_keys"]) if not name.startswith("itm_head")
    ]
    wrong += [
        f"{name} {list(there)}, not {list(size)}"
        for name, there, size in sorted(info["mismatched_keys"])
    ]
    if wrong:
        raise UserError(
            f"model path {path!r} is no Blip2ForImageTextRetrieval as in its config.json:"
            f" {len(wrong)} weights are not as expected: {'; '.join(wrong[:5])}. Give BLIP-2's"
            " retrieval weights, as Salesforce/blip2-itm-vit-g."
        )
    if not model.config.qformer_config.use_qformer_text_input:
        raise UserError(
            f"model path {path!r}: the Q-Former takes no text (use_qformer_text_input is false in"
            " config.json). Give BLIP-2's retrieval weights, as Salesforce/blip2-itm-vit-g."
        )
    model.vision_model.to(getattr(torch, dtype))
    model.requires_grad_(False)
    made: Blip2ForImageTextRetrieval = model.to(
        "cuda" if torch.cuda.is_available() else "cpu"
    ).eval()
    return made


class Blip2(Adapted):
    """The BLIP-2 embedder."""

    default_tune = "full"

    def __init__(self, settings: Blip2Settings, adapter: Path | None = None) -> None:
        directory = settings.find()
        self.settings, self.base_path, self.base_digest = (
            settings,
            settings.path,
            weights_digest(directory),
        )
        self.core = self.model = load_blip2(directory, settings.path, settings.dtype)
        self.processor = Blip2Processor.from_pretrained(directory)
        side, size = self.model.vision_model.config.image_size, self.processor.image_processor.size
        if (size["height"], size["width"]) != (
            side,
            side,
        ):  # the tower would take other patches' positions
            raise UserError(
                f"model path {settings.path!r}: the processor makes images of"
                f" {size['height']}x{size['width']} pixels, config.json's vision tower takes"
                f" {side}x{side}. Make the two agree."
            )
        self.module = Embedder(self.model)
        last = len(self.model.qformer.encoder.layer) - 1
        # What the last layer's texts become reaches no query, so that part of it would get no
        # gradient.
        qformer = rf"qformer\.(?!encoder\.layer\.{last}\.(?:intermediate|output)\.)"
        self.lora_modules = qformer + r".*\.({targets})"
        self.parts = ("query_tokens", "embeddings", qformer, "vision_projection", "text_projection")
        if adapter is not None:
            self.load_adapter(adapter)

    @property
    def device(self) -> torch.device:
        query_tokens: torch.Tensor = self.model.query_tokens
        return query_tokens.device

    @property
    def fingerprint(self) -> str:
        decisive = self.settings.model_dump(mode="json", exclude={"path"})
        return fingerprint([self.base_digest, self.adapter_digest, decisive])

    @cached_property
    def vision_key(self) -> str:
        tower = hashlib.sha256()
        for name, weight in sorted(self.model.vision_model.state_dict().items()):
            tower.update(
                name.encode()
                + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            )
        image_processor = self.processor.image_processor.to_json_string()
        return fingerprint(
            [tower.hexdigest(), image_processor, self.settings.pad_ratio, self.settings.dtype]
        )

    def vision_is_frozen(self) -> bool:
        return not any(p.requires_grad for p in self.model.vision_model.parameters())

    def _check_parts(self, parts: tuple[str, ...]) -> None:
        super()._check_parts(parts)
        fixed = [name for name, _ in self.core.named_parameters() if name.startswith(UNUSED)]
        wrong = [part for part in parts if any(re.match(part, name) for name in fixed)]
        if wrong:
            raise UserError(
                f"training.trainable_patterns: {', '.join(wrong)} match weights of"
                f" {' or '.join(UNUSED)}, which this model does not train. By default it trains"
                f" {', '.join(self.parts)}."
            )

    def prepare_images(self, images: Sequence[Image]) -> torch.Tensor:
        """Pixels (B, 3, height, width)."""
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
    ) -> list[VisionInput]:
        """The tower's last hidden state after its layer norm (1 + height * width, D), CLS first, on
        the CPU."""
        assert self.vision_is_frozen(), "the vision tower is trained: its output may not be kept"
        vision = self.model.vision_model
        pixels = self.prepare_images(images) if prepared is None else prepared
        height, width = (n // vision.config.patch_size for n in pixels.shape[-2:])
        hidden = vision(pixel_values=pixels.to(self.device, vision.dtype)).last_hidden_state
        assert hidden.shape[1] == 1 + height * width
        return [VisionInput(tokens.clone(), (1, height, width)) for tokens in hidden.cpu()]

    def inputs(
        self, items: Sequence[Item], vision: Sequence[VisionInput]
    ) -> dict[str, torch.Tensor]:
        """Queries, or gallery images, never both."""
        tokens = {"vision_tokens": torch.stack([v.tokens for v in vision]).to(self.device)}
        texts = [item.text for item in items if item.text is not None]
        assert len(texts) in (0, len(items)), "queries and gallery images in one batch"
        return tokens | self.text_inputs(texts) if texts else tokens

    def text_inputs(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        batch = self.processor.tokenizer(
            [plain(text) for text in texts],
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=self.settings.max_tokens,
            return_tensors="pt",
            split_special_tokens=True,
        )
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def length(self, item: Item, grid: Grid) -> int:
        """Tokens of a query's text; 0 for a gallery image. Pictures have one size."""
        return 0 if item.text is None else len(self.text_inputs([item.text])["input_ids"][0])

    def probe(self) -> torch.Tensor:
        """A query, a gallery image and a text."""
        width = self.model.vision_model.config.hidden_size
        seen = torch.linspace(-9, 9, 4 * width, device=self.device).sin().view(1, 4, width)
        words = self.text_inputs(["is red and has long sleeves"])
        made = [
            self.module(batch)
            for batch in ({"vision_tokens": seen} | words, {"vision_tokens": seen}, words)
        ]
        return torch.cat([vectors.flatten() for vectors in made])
