"""Vectors of images and of texts, a batch at a time. What a batch gives depends on nothing but the
batch.

An encoder of texts gives unit-norm vectors (B, E); `cut` counts texts too long for it, of which the
end is not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from cirloop.backbones import EmbedInput
from cirloop.backbones.similarity import mean_pool
from cirloop.backbones.weights import weights_digest
from cirloop.retrieval.arrays import Floats
from cirloop.types import ImageId, UserError


def image_vectors(backbone: Any, images: Sequence[Image.Image], prepared: Any = None) -> Floats:
    """Unit-norm vectors (B, D) of images as gallery images, without a cache, which would change
    batches.

    `prepared` is what the backbone's `prepare_images` made of them, where that was called before.
    """
    items = [EmbedInput(ImageId(str(number))) for number in range(len(images))]
    with torch.inference_mode():
        inputs = backbone.inputs(items, backbone.encode_images(images, prepared))
        found: Floats = mean_pool(backbone.module(inputs).cpu().numpy())
    return found


class EmbedderOnTexts:
    """The embedder on a text alone, without a prompt or an image: its last token's vector."""

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self.cut = 0
        self.fingerprint: str = backbone.fingerprint

    def vectors(self, texts: Sequence[str]) -> Floats:
        with torch.inference_mode():
            found: Floats = self._backbone.module(self._backbone.text_inputs(texts)).cpu().numpy()
        return found


class SentenceEncoder:
    """A transformers encoder: the mean of its last hidden states over a text's tokens, of unit
    norm."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModel, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        self._model: Any = AutoModel.from_pretrained(
            directory, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        ).eval()
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")
        longest = getattr(self._model.config, "max_position_embeddings", None) or 1 << 20
        self._longest = min(longest, self._tokenizer.model_max_length)
        self.fingerprint = weights_digest(directory)
        self.cut = 0

    def vectors(self, texts: Sequence[str]) -> Floats:
        whole = self._tokenizer(list(texts))["input_ids"]
        self.cut += sum(len(ids) > self._longest for ids in whole)
        batch = self._tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=self._longest,
            return_tensors="pt",
        ).to(self._model.device)
        with torch.inference_mode():
            hidden = self._model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][:, :, None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            found: Floats = F.normalize(mean, dim=-1).cpu().numpy()
        return found


def finite(vectors: Floats, names: Sequence[str]) -> Floats:
    """Return the vectors, if they are finite. Raises UserError with the first that is not."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise UserError(
            f"the vector of {names[bad[0]]!r} is not finite ({len(bad)} of {len(names)} in its"
            " batch). Try --dtype float32."
        )
    return vectors
