"""Vectors drawn from a seed in place of a model, to try everything around a model in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cirloop.artifacts.store import fingerprint

if TYPE_CHECKING:
    from cirloop.backbones.base import EmbedInput
    from cirloop.backbones.config import SimulatedSettings

DIMENSIONS = 64


class SimulatedRetrieval:
    """A stand-in for an embedder that looks at no image.

    An item's vector follows from the seed, its image's id and its text.
    """

    def __init__(self, settings: SimulatedSettings) -> None:
        self.settings = settings
        self.fingerprint = fingerprint(settings.path_digests())

    def vectors(self, items: Sequence[EmbedInput]) -> npt.NDArray[np.float32]:
        """Return vectors (N, D) of unit norm, float32."""
        vectors_ND = np.empty((len(items), DIMENSIONS), np.float32)
        for row, item in enumerate(items):
            name = fingerprint([self.settings.seed, item.image, item.text])
            random = np.random.default_rng(int(name[:16], 16))
            vectors_ND[row] = random.standard_normal(DIMENSIONS)
        vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
        return vectors_ND
