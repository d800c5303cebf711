"""CLIP with a combiner of image and text (CLIP4Cir: Baldrati et al., ACM TOMM 2023, arXiv
2308.11485), by open_clip, or any pair of towers in its form.

Gallery image = CLIP's image feature, with `project_images` its trained projection; query = the
combiner's vector of the reference's feature and the text's; both of unit norm. With CLIP frozen,
`encode_images` returns the image features, kept on disk: the feature (1, D), and for
`attention_fusion` the patches' tokens after it (1 + T, D). With `train_clip` it returns the resized
pixels (H W, 3) in bytes, and the tower runs inside `module`. CLIP stays in evaluation mode also
while it is trained, as CLIP4Cir trains it: the batch norms of its ResNets keep their statistics,
and an embedding never depends on the batch it is in.

Texts of a frozen text tower of transformers, and with `cache_texts` of any frozen one, are encoded
one by one without padding and kept in memory, so that a text's feature depends on nothing else, to
the last bit.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch.distributed.tensor import DTensor
from torchvision.transforms import Compose, Normalize

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.adapter import TrainableWeights, any_of
from cirloop.backbones.base import EmbedInput, Grid, ImageFeatures, TuningSettings, deduplicate
from cirloop.backbones.clip_module import ClipModule, require_tokens, tower_dims
from cirloop.backbones.clip_source import find_checkpoint
from cirloop.backbones.clip_text import (
    TOWER,
    build_tokenizer,
    count_tokens,
    cut_padding,
    padding_id,
)
from cirloop.backbones.combiners import combiner
from cirloop.backbones.target_pad import target_pad
from cirloop.backbones.transfer import to_device
from cirloop.backbones.vision import tower_digest
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.backbones.config import ClipCombinerSettings

logger = logging.getLogger(__name__)
TEXT_TOWER = r"clip\.(?!visual\.)"
MAX_TEXTS = 1 << 16
"""Texts whose features are kept in memory, the last ones; 384 dimensions make 100 MB of them."""


class ClipCombiner(TrainableWeights):
    """The CLIP4Cir family as an embedder.

    Trained weights are named `combiner...`, and with `train_clip` also `clip...`.
    """

    default_finetuning = "full"

    def __init__(self, settings: ClipCombinerSettings, adapter: Path | None = None) -> None:
        self.settings = settings
        self.checkpoint = find_checkpoint(settings.clip, settings.path)
        self.base_digest = self.checkpoint.digest(settings.random_seed)
        self.base_path = f"{settings.clip} {settings.path}"
        self.module = self._build_module()
        self.root_module = self.module
        has_weights = any(True for _ in self.module.combiner.parameters())
        self.default_trainable_patterns = ("combiner",) * has_weights
        self.default_trainable_patterns += ("clip",) * settings.train_clip
        self.resize = _resize_transform(self.checkpoint.preprocess)
        self.tokenizer = build_tokenizer(self.checkpoint.text)
        self._has_own_text_tower = not self.checkpoint.text.get(TOWER)
        self._warned_of_cut_text = False
        self._text_feature = lru_cache(MAX_TEXTS)(self._encode_text_alone)
        if adapter is not None:
            self.load_adapter(adapter)
        # After the adapter, whose weights are float32.
        self.module.clip.to(getattr(torch, settings.dtype))
        self._text_feature.cache_clear()

    def _build_module(self) -> ClipModule:
        settings = self.settings
        clip = self.checkpoint.build(settings.random_seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.random_seed + 1)
            network = combiner(
                settings.combiner,
                tower_dims(clip, self.checkpoint.model, self.checkpoint.preprocess),
                settings.combiner_width,
                settings.dropout,
                settings.project_images,
            )
        if network.needs_tokens:
            require_tokens(clip, settings.clip)
        module = ClipModule(
            clip,
            network.requires_grad_(False),
            self.checkpoint.preprocess,
            pixels_in=settings.train_clip,
        )
        return module.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def device(self) -> torch.device:
        return self.module.mean.device

    @property
    def fingerprint(self) -> str:
        settings = self.settings.model_dump(mode="json", exclude={"path", "clip"})
        return fingerprint([self.base_digest, self.adapter_digest, settings])

    @cached_property
    def vision_key(self) -> str:
        pixels = [asdict(self.checkpoint.preprocess), self.settings.pad_ratio]
        if self.settings.train_clip:
            return fingerprint(["pixels", pixels])
        tower = tower_digest(sorted(self.module.clip.visual.state_dict().items()))
        architecture = [
            self.checkpoint.model["vision_cfg"],
            bool(self.checkpoint.model.get("quick_gelu")),
            self.settings.dtype,
        ]
        return fingerprint([tower, architecture, self.module.combiner.needs_tokens, pixels])

    def vision_is_frozen(self) -> bool:
        """Return whether what is kept of images stays the same; pixels always do."""
        visual = self.module.clip.visual
        return self.settings.train_clip or not any(p.requires_grad for p in visual.parameters())

    def prepare_images(self, images: Sequence[Image.Image]) -> torch.Tensor:
        """Return resized pixels (B, height, width, 3) in bytes."""
        padded = [target_pad(image, self.settings.pad_ratio) for image in images]
        pixels = [np.asarray(self.resize(image), dtype=np.uint8) for image in padded]
        return torch.from_numpy(np.stack(pixels))

    @torch.no_grad()
    def encode_images(
        self, images: Sequence[Image.Image], prepared: torch.Tensor | None = None
    ) -> list[ImageFeatures]:
        """Compute image features; return pixels where CLIP is trained."""
        assert self.vision_is_frozen(), "the image tower is trained: its output may not be kept"
        pixels_BHWC = self.prepare_images(images) if prepared is None else prepared
        if self.settings.train_clip:
            height, width = pixels_BHWC.shape[1:3]
            return [ImageFeatures(row.flatten(0, 1), (1, height, width)) for row in pixels_BHWC]
        features = self.module.encode_pixels(to_device(pixels_BHWC, self.device))
        return [ImageFeatures(row, (1, 1, len(row))) for row in features]

    def inputs(
        self, items: Sequence[EmbedInput], vision: Sequence[ImageFeatures]
    ) -> dict[str, torch.Tensor]:
        """Return the module's inputs, each image once; `image_of` is an item's image's index.

        So the trained part of CLIP encodes an image once per call.
        """
        images, image_of = deduplicate([EmbedInput(item.image) for item in items])
        tokens = {item.image: row.tokens for item, row in zip(items, vision, strict=True)}
        features = to_device(torch.stack([tokens[image.image] for image in images]), self.device)
        if self.settings.train_clip:
            features = features.unflatten(1, vision[0].grid[1:])
        inputs = {"images": features, "image_of": to_device(torch.tensor(image_of), self.device)}
        texts = [item.text for item in items if item.text is not None]
        assert len(texts) in (0, len(items)), "queries and gallery images in one call"
        return inputs | (self.text_inputs(texts) if texts else {})

    def text_inputs(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return the inputs of texts alone, cut to CLIP's context by its tokenizer.

        They are ids (B, T), or features (B, D) where those are kept.
        """
        if self.keeps_texts():
            return {"text": torch.stack([self._text_feature(text) for text in texts])}
        return {"text": self._text_ids(texts)}

    def keeps_texts(self) -> bool:
        """Return whether texts' features are kept: asked for, and the text tower frozen and whole.

        A tower whose weights are sharded over processes can only be called inside `module`.
        """
        keeps = self.settings.cache_texts
        if keeps is None:
            keeps = not self._has_own_text_tower
        return keeps and not any(
            weight.requires_grad or isinstance(weight, DTensor) or hasattr(weight, "ds_id")
            for name, weight in self.module.named_parameters()
            if re.match(TEXT_TOWER, name)
        )

    def _encode_text_alone(self, text: str) -> torch.Tensor:
        """Return the text feature (D), float32; training may use it, wherever it is computed."""
        with torch.inference_mode(False), torch.no_grad():
            return self.module.encode_text(self._text_ids([text])).pooled[0]

    def _text_ids(self, texts: Sequence[str]) -> torch.Tensor:
        ids_BT: torch.Tensor = self.tokenizer(list(texts))
        if not self._warned_of_cut_text:
            self._warn_of_cut_text(texts, ids_BT)
        if not self._has_own_text_tower:
            ids_BT = cut_padding(ids_BT, padding_id(self.tokenizer))
        return to_device(ids_BT, self.device)

    def _warn_of_cut_text(self, texts: Sequence[str], ids_BT: torch.Tensor) -> None:
        """Warn of the first text that is longer than CLIP's context, once."""
        context_length = self.tokenizer.context_length
        is_full_B = ids_BT[:, -1] != padding_id(self.tokenizer)
        for row in is_full_B.nonzero()[:, 0].tolist():
            num_tokens = count_tokens(self.tokenizer, texts[row])
            if num_tokens > context_length:
                logger.warning(
                    "texts of more than %d tokens are cut; the first has %d: %r",
                    context_length,
                    num_tokens,
                    texts[row],
                )
                self._warned_of_cut_text = True
                return

    def sequence_length(self, item: EmbedInput, grid: Grid) -> int:
        """Return 0 for an image and CLIP's context for a query: all have one size."""
        return 0 if item.text is None else int(self.tokenizer.context_length)

    def make_trainable(self, tuning: TuningSettings, seed: int) -> None:
        """Free the combiner, and with `train_clip` CLIP.

        Raises UserError for a LoRA, and where nothing is left to train.
        """
        self.settings.check_training(tuning)
        patterns = (
            tuning.trainable_patterns or self.trainable_patterns or self.default_trainable_patterns
        )
        pattern = any_of(patterns)
        names = [name for name, _ in self.root_module.named_parameters() if pattern.match(name)]
        if not self.settings.train_clip and any(name.startswith("clip.visual.") for name in names):
            raise UserError(
                f"training.trainable_patterns {', '.join(patterns)} would train CLIP's image tower,"
                " whose features are kept on disk. Set model.train_clip, or name other parts."
            )
        if self.settings.dtype != "float32" and any(name.startswith("clip.") for name in names):
            raise UserError(
                f"model.dtype {self.settings.dtype}: CLIP is trained in float32 only; set it to"
                " float32."
            )
        if self.settings.cache_texts and any(re.match(TEXT_TOWER, name) for name in names):
            raise UserError(
                f"training.trainable_patterns {', '.join(patterns)} would train the text tower,"
                " whose features are kept in memory. Leave model.cache_texts out."
            )
        super().make_trainable(tuning, seed)
        self._text_feature.cache_clear()

    def probe_output(self) -> torch.Tensor:
        """Embed a query of a synthetic image and a text."""
        size = self.checkpoint.preprocess.size
        height, width = (size, size) if isinstance(size, int) else size
        ramp = torch.arange(height * width * 3, device=self.device) % 251
        images = ramp.reshape(1, height, width, 3).to(torch.uint8)
        if not self.settings.train_clip:
            images = self.module.encode_pixels(images)
        image_of = torch.zeros(1, dtype=torch.long, device=self.device)
        ids_BT = self._text_ids(["is red and has long sleeves"])  # not kept: weights are loaded
        inputs = {"images": images, "image_of": image_of, "text": ids_BT}
        vector: torch.Tensor = self.module(inputs)
        return vector


def _resize_transform(preprocess: PreprocessCfg) -> Compose:
    """Return open_clip's transform for inference up to its RGB image.

    `ClipModule.encode_pixels` does the rest of it.
    """
    steps = image_transform_v2(preprocess, is_train=False).transforms
    assert isinstance(steps[-1], Normalize) and len(steps) > 2
    return Compose(steps[:-2])
