"""No model: vectors drawn from a seed, for trying everything around a model in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from cirloop.artifacts.store import fingerprint

if TYPE_CHECKING:
    from cirloop.backbones.base import Item
    from cirloop.backbones.config import SimulatedSettings

DIMENSIONS = 64


class SimulatedRetrieval:
    """Stands where an embedder stands. It looks at no picture: an item's vector follows from the
    seed and its names."""

    def __init__(self, settings: SimulatedSettings) -> None:
        self.settings, self.fingerprint = settings, fingerprint(settings.content())

    def vectors(self, items: Sequence[Item]) -> npt.NDArray[np.float32]:
        """Of unit norm (N, D), float32."""
        out = np.empty((len(items), DIMENSIONS), np.float32)
        for row, item in enumerate(items):
            name = fingerprint([self.settings.seed, item.image, item.text])
            out[row] = np.random.default_rng(int(name[:16], 16)).standard_normal(DIMENSIONS)
        out /= np.linalg.norm(out, axis=1, keepdims=True)
        return out
