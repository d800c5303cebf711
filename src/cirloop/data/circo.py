"""CIRCO (Baldrati et al., ICCV 2023, arXiv 2303.15247) in its official layout.

annotations/<split>.json; the gallery is COCO 2017 unlabeled, 123,403 images, listed in
COCO2017_unlabeled/annotations/image_info_unlabeled2017.json. An entry: id, reference_img_id,
relative_caption, and on val target_img_id, gt_img_ids and semantic_aspects. `shared_concept` is no
part of the query: it says what the images have in common.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from cirloop.data.paths import DataPaths
from cirloop.data.splits import FileSettings, QueryFiles, ReadSplit, warn_blank_texts
from cirloop.data.trained_on import TrainedOn, train_split_of
from cirloop.types import (
    EvalProtocol,
    Gallery,
    ImageId,
    LabeledQueries,
    Query,
    QueryId,
    Relevance,
    TrainSplit,
)
from cirloop.validation import ValidationReport

OFFICIAL = {"val": (220, 123403), "test": (800, 123403)}
"""Queries and images."""
PROTOCOL = EvalProtocol(
    "CIRCO: COCO 2017 unlabeled, reference kept; map@K over all right answers, divided by"
    " min(|GT|, K)",
    primary_metric="map@10",
    reported=("map@5", "map@10", "map@25", "map@50"),
    cutoffs=(5, 10, 25, 50),
    keep_reference=True,
)
LIST = Path("COCO2017_unlabeled") / "annotations" / "image_info_unlabeled2017.json"


class CircoSettings(FileSettings):
    """CIRCO in its official layout: evaluation, after training on another data set."""

    type: Literal["circo"] = "circo"
    protocol: ClassVar[EvalProtocol] = PROTOCOL
    train: TrainedOn | None = None
    """The data set to train on; its files are under --train_dir."""

    def read(self, directory: Path, split: str) -> tuple[QueryFiles, ValidationReport]:
        """Read val or test, with the images of COCO2017_unlabeled/unlabeled2017."""
        problems = ValidationReport(
            f"Put CIRCO and COCO's list of images under --data_dir {directory}; see"
            " docs/datasets.md."
        )
        [part] = load_queries(directory, split, problems)
        if part.gallery is None and not (directory / LIST).exists():
            problems.add(directory / LIST, "there is no such file")
        images = part.gallery.ids if part.gallery else ()
        folder = directory / "COCO2017_unlabeled" / "unlabeled2017"
        return [(part, {image: folder / f"{int(image):012d}.jpg" for image in images})], problems

    def load_train(self, read: ReadSplit, data_paths: DataPaths) -> TrainSplit:
        return train_split_of(self.type, self.train, data_paths)


def gallery(directory: Path, problems: ValidationReport) -> Gallery | None:
    """Read the list of COCO 2017 unlabeled; None where it is missing."""
    path = directory / LIST
    if not path.exists():
        return None
    content = problems.json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list) or not all(
        isinstance(i, dict) and isinstance(i.get("id"), int) for i in images
    ):
        problems.add(
            path, "must be an object with a list `images` of objects with a whole number `id`"
        )
        return None
    return Gallery("circo", tuple(sorted({ImageId(str(image["id"])) for image in images})))


def load_queries(directory: Path, split: str, problems: ValidationReport) -> list[LabeledQueries]:
    """Read the queries and all right answers of `split`; what is wrong is added to `problems`."""
    coco = gallery(directory, problems)
    names = set(coco.ids) if coco else None
    queries: dict[QueryId, Query] = {}
    targets: dict[QueryId, ImageId] = {}
    positives: dict[QueryId, frozenset[ImageId]] = {}
    aspects: dict[QueryId, tuple[str, ...]] = {}
    blanks: list[str] = []
    unlabelled = split == "test"
    path = directory / "annotations" / f"{split}.json"
    for where, entry in problems.entries(path):
        number = entry.get("id", int)
        reference = entry.get("reference_img_id", int)
        text = entry.get("relative_caption", str, blank=True)
        target = entry.get("target_img_id", int, optional=unlabelled)
        right = None if unlabelled else entry.list_of("gt_img_ids", int)
        for image in {i for i in (reference, target, *(right or ())) if i is not None}:
            if names is not None and str(image) not in names:
                problems.add(where, f"image {image} is not in COCO 2017 unlabeled")
        if number is None or reference is None or text is None:
            continue
        query = QueryId(str(number))
        if query in queries:
            problems.add(where, f"id {number} is there more than once")
        queries[query] = Query(query, ImageId(str(reference)), text)
        blanks += [] if text.strip() else [f"id {number}"]
        if target is None or right is None:
            continue
        _check_answers(where, target, right, problems)
        targets[query] = ImageId(str(target))
        positives[query] = frozenset(ImageId(str(image)) for image in right)
        aspects[query] = tuple(entry.list_of("semantic_aspects", str) or ())
    warn_blank_texts(path, blanks)
    relevance = Relevance(targets, positives, aspects=aspects) if targets else None
    return [
        LabeledQueries(
            f"circo_{split}",
            tuple(queries.values()),
            relevance,
            coco,
            PROTOCOL,
            official=OFFICIAL[split],
        )
    ]


def _check_answers(
    where: object, target: int, right: list[int], problems: ValidationReport
) -> None:
    if target not in right:
        problems.add(where, f"target_img_id {target} is not among gt_img_ids")
    if len(set(right)) < len(right):
        problems.add(where, "gt_img_ids holds an image more than once")
