"""Settings of the data sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from cirloop.settings import Settings

if TYPE_CHECKING:
    from cirloop.data.dataset import Dataset

MAX_TRAIN_FAMILIES = 276
MAX_TRAIN_TRIPLETS = 4400
MAX_EVAL_FAMILIES = 182


class ShapesSettings(Settings):
    """The embedded data set; the numbers take a subset of it."""

    type: Literal["shapes"] = "shapes"
    train_families: int = Field(MAX_TRAIN_FAMILIES, ge=2, le=MAX_TRAIN_FAMILIES)
    """Families of 11 images in the train gallery."""
    train_triplets: int = Field(MAX_TRAIN_TRIPLETS, ge=1, le=MAX_TRAIN_TRIPLETS)
    """Human triplets, drawn by `subset_seed` from those of the families."""
    eval_families: int = Field(MAX_EVAL_FAMILIES, ge=2, le=MAX_EVAL_FAMILIES)
    """Families of 11 images in the val and the test gallery, with all their queries."""
    subset_seed: int = 0

    def build(self) -> Dataset:
        from cirloop.data.shapes.load import load

        return load(self)


DataConfig = ShapesSettings
