"""Settings of the data sets."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BeforeValidator, Field

from cirloop.settings import Settings, default_type
from cirloop.types import UserError, benchmark_of

if TYPE_CHECKING:
    from cirloop.data.dataset import Dataset
    from cirloop.data.sources import Sources
    from cirloop.types import TrainSplit

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
    """Draws the triplets of a subset."""

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


class JsonlSettings(FileSettings):
    """Your own triplets as JSON lines, with a folder of pictures."""

    type: Literal["jsonl"] = "jsonl"
    train: str = "train.jsonl"
    """Files under --data_dir."""
    val: str = "val.jsonl"
    """Evaluated after each iteration."""
    test: str = "test.jsonl"
    """Evaluated on request."""
    images: str = "images"
    """The folder of pictures; images are named by their path in it."""
    gallery: str | None = None
    """A file with one image a line; by default the gallery is every picture of the folder."""

    def build(self, sources: Sources) -> Dataset:
        from cirloop.data.jsonl import load

        return load(self, sources)


class Columns(Settings):
    """Which column of a table is what; None = there is none."""

    reference: str = "reference"
    """Pictures, or names of pictures."""
    text: str = "text"
    """A text, or a list of texts."""
    target: str | None = "target"
    """Without targets a split is for prediction only."""
    id: str | None = None
    """A query's id; by default its place in the split."""
    category: str | None = None
    """Metrics are also given per category."""
    subset: str | None = None
    """Images of the query's group; adds `recall_subset@K`."""
    positives: str | None = None
    """Further right answers; adds `map@K`."""


class GalleryTable(Settings):
    """A table of the same data set that holds the pictures."""

    split: str
    """The split that holds the pictures."""
    name: str | None = None
    """Its configuration, where the data set has several."""
    id: str = "id"
    """The column with the names that rows use."""
    image: str = "image"
    """Columns: the name that rows use, and the picture."""


class HuggingFaceSettings(FileSettings):
    """Your own triplets in Hugging Face `datasets`."""

    type: Literal["huggingface"] = "huggingface"
    path: str | None = None
    """A name on the hub; by default --data_dir is a directory of `save_to_disk`, or one that `load_dataset` reads."""
    revision: str | None = None
    """A branch, tag or commit on the hub."""
    train: str = "train"
    """Splits."""
    val: str = "validation"
    """Evaluated after each iteration."""
    test: str = "test"
    """Evaluated on request."""
    columns: Columns = Columns()
    gallery: GalleryTable | None = None
    """Where pictures that rows name are."""
    images: str | None = None
    """Or the folder of them under --data_dir."""

    def build(self, sources: Sources) -> Dataset:
        from cirloop.data.huggingface import load

        return load(self, sources)


TrainedOn = Annotated[
    CirrSettings | FashionIQSettings | HuggingFaceSettings | JsonlSettings, Field(discriminator="type")
]
"""What a benchmark without a training split can be trained on."""


def _train_of(name: str, settings: TrainedOn | None, sources: Sources) -> Callable[[], TrainSplit]:
    def train() -> TrainSplit:
        if settings is None:
            raise UserError(
                f"{name} has no training split. Name the data set to train on by --data.train.type and its files by "
                f"--train_dir, or train on another data set and evaluate that run by eval_iterative.py --eval_dataset "
                f"{name}_val --data_dir DIR."
            )
        return settings.build(sources.for_training()).train

    return train


class CircoSettings(FileSettings):
    """CIRCO in its official layout: evaluation, after training on another data set."""

    type: Literal["circo"] = "circo"
    train: TrainedOn | None = None
    """The data set to train on; its files are under --train_dir."""

    def build(self, sources: Sources) -> Dataset:
        from cirloop.data.circo import load

        return load(self.allow_missing_images, _train_of("circo", self.train, sources), sources)


class HpFashionIQSettings(FileSettings):
    """HP-FashionIQ beside FashionIQ's pictures: evaluation, after training on FashionIQ."""

    type: Literal["hp_fashioniq"] = "hp_fashioniq"
    file: str = "hpfiq.json"
    """The annotations, under --data_dir."""
    train: TrainedOn | None = FashionIQSettings()
    """The data set to train on; its files are under --train_dir, by default --data_dir."""

    def build(self, sources: Sources) -> Dataset:
        from cirloop.data.hp_fashioniq import load

        make_train = _train_of("hp_fashioniq", self.train, sources)
        return load(self.file, self.allow_missing_images, make_train, sources)


# ShapesSettings last: `--help` shows the last one's name and defaults.
DataConfig = Annotated[
    CirrSettings
    | FashionIQSettings
    | CircoSettings
    | HpFashionIQSettings
    | HuggingFaceSettings
    | JsonlSettings
    | ShapesSettings,
    Field(discriminator="type"),
    BeforeValidator(default_type("shapes")),
]


def evaluated(
    name: str, gallery: Literal["original", "union"], allow_missing_images: int = 0
) -> tuple[DataConfig, str] | None:
    """Settings and split of an evaluation name such as `cirr_val` or `fashioniq_val:dress`; None for no such name."""
    kind = benchmark_of(name)
    split, _, category = name.removeprefix(f"{kind}_").partition(":")
    allow = allow_missing_images
    plain: dict[str, DataConfig] = {
        "cirr": CirrSettings(allow_missing_images=allow),
        "circo": CircoSettings(allow_missing_images=allow),
        "hp_fashioniq": HpFashionIQSettings(allow_missing_images=allow),
        "shapes": ShapesSettings(),
    }
    if split not in ("val", "test") or (category and kind != "fashioniq"):
        return None
    if kind != "fashioniq":
        return (plain[kind], split) if kind in plain else None
    chosen = tuple(c for c in CATEGORIES if category in ("", c))
    settings = FashionIQSettings(categories=chosen, gallery=gallery, allow_missing_images=allow)
    return (settings, split) if chosen else None
