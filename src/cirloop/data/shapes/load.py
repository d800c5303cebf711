"""`shapes` as a data set, and its oracle, which accounts for captions and negatives."""

from __future__ import annotations

from functools import cached_property, partial
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from cirloop.data.dataset import Dataset, DatasetSettings
from cirloop.data.images import DrawnImages
from cirloop.data.paths import DataPaths
from cirloop.data.shapes.catalogue import SceneCatalogue
from cirloop.data.shapes.language import read
from cirloop.data.shapes.scene import Scene, SeededRandom, differences, results
from cirloop.data.shapes.splits import (
    FAMILY_SIZE,
    Scenes,
    ShapesQuery,
    image_id,
    row_of,
    scenes_of,
    split_name,
)
from cirloop.types import (
    EvalProtocol,
    EvalSplit,
    Gallery,
    ImageId,
    LabeledQueries,
    Query,
    QueryId,
    Relevance,
    TrainSplit,
    Triplet,
    UserError,
)

MAX_TRAIN_FAMILIES = 276
MAX_TRAIN_TRIPLETS = 4400
MAX_EVAL_FAMILIES = 182
PROTOCOL = EvalProtocol(
    "shapes: gallery of the split's images, reference removed, annotated target; any correct image"
    " beside it",
    primary_metric="recall@1",
    reported=("recall@1", "recall@5", "recall@10", "recall@50"),
    any_correct_cutoffs=(1, 5),
    mean_average_precision=False,
)


class ShapesSettings(DatasetSettings):
    """The embedded data set; the numbers take a subset of it."""

    type: Literal["shapes"] = "shapes"
    protocol: ClassVar[EvalProtocol] = PROTOCOL
    train_families: int = Field(MAX_TRAIN_FAMILIES, ge=2, le=MAX_TRAIN_FAMILIES)
    """Families of 11 images in the train gallery."""
    train_triplets: int = Field(MAX_TRAIN_TRIPLETS, ge=1, le=MAX_TRAIN_TRIPLETS)
    """Human triplets, drawn by `subset_seed` from those of the families."""
    eval_families: int = Field(MAX_EVAL_FAMILIES, ge=2, le=MAX_EVAL_FAMILIES)
    """Families of 11 images in the val and the test gallery, with all their queries."""
    subset_seed: int = 0
    """Draws the triplets of a subset."""
    variant: int = Field(1, ge=1, le=2)
    """Variant 2 has other scenes, another look and other sentences; no setting was chosen on it."""

    def split(self, name: str) -> Scenes:
        return scenes_of(split_name(name, self.variant))

    def build(self, data_paths: DataPaths | None = None) -> Dataset:
        if data_paths is not None and data_paths.directory is not None:
            raise UserError(
                "--data_dir: the data set `shapes` is drawn and reads no files. Leave the flag out."
            )
        return load(self)


class ShapesOracle:
    """Exact knowledge of right answers, from the scenes themselves."""

    def __init__(self, scenes: Scenes, num_images: int) -> None:
        self._scenes = scenes
        self._num = num_images

    @cached_property
    def _by_scene(self) -> dict[Scene, list[int]]:
        out: dict[Scene, list[int]] = {}
        for row in range(self._num):
            out.setdefault(self._scenes.scenes[row], []).append(row)
        return out

    def _results(self, reference: ImageId, text: str) -> set[Scene]:
        changes = read(text)
        return results(self._scenes.scenes[row_of(reference)], changes) if changes else set()

    def positives(self, query: Query) -> frozenset[ImageId]:
        scenes = self._results(query.reference, query.text)
        return frozenset(
            image_id(self._scenes.split, row)
            for scene in scenes
            for row in self._by_scene.get(scene, ())
        )

    def text_is_true(self, reference: ImageId, text: str, image: ImageId) -> bool:
        return self._scenes.scenes[row_of(image)] in self._results(reference, text)

    def distance(self, reference: ImageId, image: ImageId) -> int:
        return len(
            differences(self._scenes.scenes[row_of(reference)], self._scenes.scenes[row_of(image)])
        )


def _pixels(scenes: Scenes, image: ImageId) -> npt.NDArray[np.uint8]:
    return scenes.pixels(row_of(image))


def _gallery(scenes: Scenes, num: int) -> Gallery:
    return Gallery(
        f"shapes/{scenes.split}", tuple(image_id(scenes.split, row) for row in range(num))
    )


def _triplets(scenes: Scenes, num_images: int) -> list[Triplet]:
    return [
        Triplet(_query(scenes.split, number, query), image_id(scenes.split, query.target))
        for number, query in enumerate(scenes.queries)
        if query.reference < num_images and query.target < num_images
    ]


def _query(split: str, number: int, query: ShapesQuery) -> Query:
    return Query(QueryId(f"{split}-{number:05d}"), image_id(split, query.reference), query.text)


def load(settings: ShapesSettings) -> Dataset:
    """Build train, val and test, cut to the sizes of `settings`. Raises UserError for more than
    exist."""
    train = _train(settings)
    num = settings.eval_families * FAMILY_SIZE
    evals = {name: partial(_eval, settings.split(name), num) for name in ("val", "test")}
    return Dataset("shapes", lambda: train, evals)


def _train(settings: ShapesSettings) -> TrainSplit:
    scenes = settings.split("train")
    num = settings.train_families * FAMILY_SIZE
    triplets = _triplets(scenes, num)
    if len(triplets) < settings.train_triplets:
        raise UserError(
            f"data.train_triplets is {settings.train_triplets}, but {settings.train_families}"
            f" families have {len(triplets)}. Ask for fewer triplets or more data.train_families."
        )
    if settings.train_triplets < len(triplets):
        kept = SeededRandom("subset", settings.subset_seed).shuffled(triplets)[
            : settings.train_triplets
        ]
        triplets = sorted(kept, key=lambda t: t.query.id)
    return TrainSplit(
        f"shapes/{scenes.split}",
        tuple(triplets),
        _gallery(scenes, num),
        DrawnImages(partial(_pixels, scenes)),
        ShapesOracle(scenes, num),
        catalogue=SceneCatalogue(),
    )


def _eval(scenes: Scenes, num: int) -> tuple[EvalSplit]:
    triplets = _triplets(scenes, num)
    oracle = ShapesOracle(scenes, num)
    relevance = Relevance(
        {t.query.id: t.target for t in triplets},
        {t.query.id: oracle.positives(t.query) for t in triplets},
    )
    gallery = _gallery(scenes, num)
    labeled = LabeledQueries(
        f"shapes_{scenes.split}", tuple(t.query for t in triplets), relevance, gallery, PROTOCOL
    )
    return (EvalSplit(labeled, gallery, DrawnImages(partial(_pixels, scenes))),)
