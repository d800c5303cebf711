"""Settings of the data sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from cirloop.settings import Settings, default_type
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.data.dataset import Dataset
    from cirloop.data.sources import Sources

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

    def build(self, sources: Sources | None = None) -> Dataset:
        from cirloop.data.shapes.load import load

        if sources is not None and sources.directory is not None:
            raise UserError("--data_dir: the data set `shapes` is drawn and reads no files. Leave the flag out.")
        return load(self)


CATEGORIES: tuple[Literal["dress", "shirt", "toptee"], ...] = ("dress", "shirt", "toptee")


class FileSettings(Settings):
    """What the data sets from files share."""

    allow_missing_images: int = Field(0, ge=0)
    """Pictures of a split that may be missing or damaged. Queries that need one are dropped, every result says so."""


class CirrSettings(FileSettings):
    """CIRR in its official layout."""

    type: Literal["cirr"] = "cirr"

    def build(self, sources: Sources) -> Dataset:
        from cirloop.data.cirr import load

        return load(self.allow_missing_images, sources)


class FashionIQSettings(FileSettings):
    """FashionIQ in its official layout."""

    type: Literal["fashioniq"] = "fashioniq"
    categories: tuple[Literal["dress", "shirt", "toptee"], ...] = CATEGORIES
    """Trained on together, evaluated one by one."""
    gallery: Literal["original", "union"] = "original"
    """What is ranked at evaluation: every image of the split, or the references and targets of the queries."""

    def build(self, sources: Sources) -> Dataset:
        from cirloop.data.fashioniq import load

        return load(self.categories, self.gallery, self.allow_missing_images, sources)


class CircoSettings(FileSettings):
    """CIRCO in its official layout; evaluation only."""

    type: Literal["circo"] = "circo"

    def build(self, sources: Sources) -> Dataset:
        from cirloop.data.circo import load

        return load(self.allow_missing_images, sources)


class JsonlSettings(FileSettings):
    """Your own triplets as JSON lines, with a folder of pictures."""

    type: Literal["jsonl"] = "jsonl"
    train: str = "train.jsonl"
    """Files under --data_dir."""
    val: str = "val.jsonl"
    test: str = "test.jsonl"
    images: str = "images"
    """The folder of pictures; images are named by their path in it."""
    gallery: str | None = None
    """A file with one image a line; by default the gallery is every picture of the folder."""

    def build(self, sources: Sources) -> Dataset:
        from cirloop.data.jsonl import load

        return load(self, sources)


# ShapesSettings last: `--help` shows the last one's name and defaults.
DataConfig = Annotated[
    CirrSettings | FashionIQSettings | CircoSettings | JsonlSettings | ShapesSettings,
    Field(discriminator="type"),
    BeforeValidator(default_type("shapes")),
]


def evaluated(
    name: str, gallery: Literal["original", "union"], allow_missing_images: int = 0
) -> tuple[DataConfig, str] | None:
    """Settings and split of an evaluation name such as `cirr_val` or `fashioniq_val:dress`; None for no such name."""
    kind, _, rest = name.partition("_")
    split, _, category = rest.partition(":")
    allow = allow_missing_images
    plain: dict[str, DataConfig] = {
        "cirr": CirrSettings(allow_missing_images=allow),
        "circo": CircoSettings(allow_missing_images=allow),
        "shapes": ShapesSettings(),
    }
    if split not in ("val", "test") or (category and kind != "fashioniq"):
        return None
    if kind != "fashioniq":
        return (plain[kind], split) if kind in plain else None
    chosen = tuple(c for c in CATEGORIES if category in ("", c))
    settings = FashionIQSettings(categories=chosen, gallery=gallery, allow_missing_images=allow)
    return (settings, split) if chosen else None
