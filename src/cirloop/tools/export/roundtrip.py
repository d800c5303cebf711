"""An export is done when the card's own code, run on its files, gives the vectors that the run's
embedder gives."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from cirloop.backbones import EmbedInput
from cirloop.backbones.vlm import VlmEmbedder
from cirloop.types import ImageId

logger = logging.getLogger(__name__)
EXACT = 1e-5
"""Largest difference of a number in a vector, in float32."""
ALIKE = 0.99
"""Smallest cosine in half precision, where merging rounds the weights."""
SIZES = (97, 61), (300, 200), (640, 90), (56, 56), (61, 97)
"""Width and height of the images: two that keep their sizes, others that are made larger, smaller
and squeezed."""
TEXTS = "is red and has long sleeves", "the same, but\nwith two buttons: not {one}"
Input = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """Between the vectors of an export and those of the run: the largest of a number, the smallest
    cosine."""

    largest: float
    cosine: float
    inputs: int


def inputs(special_tokens: Sequence[str]) -> list[Input]:
    """Images of noise, in which the last bit of sizing shows; those with texts; texts. One text
    holds each of the special tokens, which mean nothing in a text; another lacks but the two ends
    of one."""
    random = np.random.default_rng(0)
    images = [Image.fromarray(random.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SIZES]
    texts = *TEXTS, f"has {' and '.join(special_tokens)} on it", "", special_tokens[0][1:-1]
    composed = [{"image": image, "text": text} for image, text in zip(images, texts, strict=True)]
    return [*({"image": image} for image in images), *composed, *({"text": t} for t in TEXTS)]


@torch.no_grad()
def vectors_of(backbone: VlmEmbedder, inputs: Sequence[Input]) -> torch.Tensor:
    """Vectors (N, D) of the run's embedder, float32, on the CPU."""
    rows = []
    for content in inputs:
        if "image" in content:
            item = EmbedInput(ImageId(""), content.get("text"))
            tensors = backbone.inputs([item], backbone.encode_images([content["image"]]))
        else:
            tensors = backbone.text_inputs([content["text"]])
        rows.append(backbone.module(tensors).float().cpu())
    return torch.cat(rows)


def compare(
    code: str, directory: str, inputs: Sequence[Input], expected: torch.Tensor, dtype: str
) -> Difference:
    """Run the card's `code` with its `where` set, one input at a time and all together. Raises
    AssertionError where the vectors are not the run's."""
    namespace: dict[str, Any] = {}
    line = next(line for line in code.splitlines() if line.startswith("where = "))
    exec(compile(code.replace(line, f"where = {directory!r}"), "README.md", "exec"), namespace)
    embed = namespace["embed"]
    alone = torch.cat([embed(content).float().cpu() for content in inputs])
    with_images = [number for number, content in enumerate(inputs) if "image" in content]
    together = embed(*(inputs[number] for number in with_images)).float().cpu()
    pairs = [(alone, expected), (together, expected[with_images])]
    largest = max(float((actual - original).abs().max()) for actual, original in pairs)
    cosine = min(float((actual * original).sum(-1).min()) for actual, original in pairs)
    difference = Difference(largest, cosine, len(inputs))
    enough = largest <= EXACT if dtype == "float32" else cosine >= ALIKE
    assert enough, f"the export in {directory} gives other vectors than the run: {difference}"
    logger.info(
        "vectors of %d inputs agree with the run's: largest difference %.1e", len(inputs), largest
    )
    return difference
