"""FashionIQ (Wu et al., CVPR 2021, arXiv 1905.12794) in its official layout.

captions/cap.<category>.<split>.json and image_splits/split.<category>.<split>.json (a list of image
ids). An entry: candidate (the reference), target (test: none), two captions, some of them empty, in
which case the text may be too. Two galleries are in use and never mixed: `original`, every image of
the split file, and `union`, the references and targets of the queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from cirloop.data.images import escapes_root
from cirloop.data.splits import FileSettings, QueryFiles, warn_blank_texts
from cirloop.types import (
    EvalProtocol,
    Gallery,
    ImageId,
    LabeledQueries,
    Query,
    QueryId,
    Relevance,
)
from cirloop.validation import ValidationReport

Category = Literal["dress", "shirt", "toptee"]
CATEGORIES: tuple[Category, ...] = ("dress", "shirt", "toptee")
OFFICIAL = {
    "train": {"dress": (5985, 11452), "shirt": (5988, 19036), "toptee": (6027, 16121)},
    "val": {"dress": (2017, 3817), "shirt": (2038, 6346), "toptee": (1961, 5373)},
    "test": {"dress": (2024, 3818), "shirt": (2038, 6346), "toptee": (2056, 5374)},
}
"""Queries, and images of the original gallery."""
UNION = {"dress": 2628, "shirt": 3089, "toptee": 2902}
"""Images of the union gallery of val."""
GalleryKind = Literal["original", "union"]
PROTOCOL = EvalProtocol(
    "FashionIQ: {gallery} gallery, reference kept; unweighted mean over categories",
    primary_metric="recall@10",
    reported=("recall@10", "recall@50", "mean of recall@10 and recall@50"),
    cutoffs=(10, 50),
    keep_reference=True,
    without_reference_too=True,
    mean_recall=(10, 50),
)


class FashionIQSettings(FileSettings):
    """FashionIQ in its official layout."""

    type: Literal["fashioniq"] = "fashioniq"
    protocol: ClassVar[EvalProtocol] = PROTOCOL
    categories: tuple[Category, ...] = CATEGORIES
    """Trained on together, evaluated one by one."""
    gallery: GalleryKind = "original"
    """What is ranked at evaluation: every image of the split, or the references and targets of the
    queries."""

    def read(self, directory: Path, split: str) -> tuple[QueryFiles, ValidationReport]:
        problems = ValidationReport(
            f"Put FashionIQ's annotations under --data_dir {directory}; docs/datasets.md has the"
            " layout."
        )
        kind = self.gallery if split != "train" else "original"
        parts = load_queries(directory, split, problems, self.categories, kind)
        return [(part, _gallery_files(directory, part)) for part in parts], problems


def join_captions(captions: Sequence[str]) -> str:
    """Join the captions to one text, as CLIP4Cir, SPRC and QuRe do at evaluation; empty ones are
    left out."""
    parts = [part for part in (caption.strip(".?, ") for caption in captions) if part]
    return " and ".join([parts[0].capitalize(), *parts[1:]]) if parts else ""


def load_queries(
    directory: Path,
    split: str,
    problems: ValidationReport,
    categories: Sequence[str] = CATEGORIES,
    kind: GalleryKind = "original",
) -> list[LabeledQueries]:
    """Read the queries and targets of `split` by category; what is wrong is added to `problems`."""
    return [_category(directory, split, category, problems, kind) for category in categories]


def _category(
    directory: Path, split: str, category: str, problems: ValidationReport, kind: GalleryKind
) -> LabeledQueries:
    list_path = directory / "image_splits" / f"split.{category}.{split}.json"
    images = _image_names(list_path, problems)
    path = directory / "captions" / f"cap.{category}.{split}.json"
    queries: list[Query] = []
    targets: dict[QueryId, ImageId] = {}
    blanks: list[str] = []
    for number, (where, entry) in enumerate(problems.entries(path)):
        reference = entry.get("candidate", str)
        captions = entry.list_of("captions", str)
        target = entry.get("target", str, optional=split == "test")
        for role, image in (("candidate", reference), ("target", target)):
            if image is not None and (escapes_root(image) or "/" in image):
                problems.add(where, f"{role} {image!r} is no name of a file")
            elif image is not None and images and image not in images:
                problems.add(where, f"{role} {image!r} is not in {list_path.name}")
        if captions == []:
            problems.add(where, "'captions' holds none")
        if reference is None or not captions:
            continue
        text = join_captions(captions)
        query = QueryId(f"{category}/{number}")
        blanks += [] if text else [f"entry {number}"]
        queries.append(Query(query, ImageId(reference), text, category))
        if target is not None:
            targets[query] = ImageId(target)
    if targets and len(targets) < len(queries):
        problems.add(
            path, f"{len(queries) - len(targets)} of {len(queries)} entries have no target"
        )
    warn_blank_texts(path, blanks)
    if kind == "union":
        images = {query.reference for query in queries} | set(targets.values())
    ids = tuple(ImageId(name) for name in sorted(images))
    return LabeledQueries(
        f"fashioniq_{split}",
        tuple(queries),
        Relevance(targets) if targets else None,
        Gallery(f"fashioniq/{category}/{split}/{kind}", ids),
        PROTOCOL,
        category,
        official=_official_size(split, category, kind),
    )


def _image_names(path: Path, problems: ValidationReport) -> set[str]:
    """Read the images of a category's split; empty where the list cannot be used."""
    names = problems.json(path)
    if names is None:
        return set()
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.add(path, "must be a list of image ids")
        return set()
    wrong = [name for name in names if escapes_root(name) or "/" in name]
    if wrong:
        problems.add(path, f"{len(wrong)} image ids are no names of files, the first: {wrong[0]!r}")
        return set()
    if not names:
        problems.add(path, "holds no image ids")
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if repeated:
        problems.add(
            path, f"{len(repeated)} images are there more than once, the first: {repeated[0]!r}"
        )
    return set(names)


def _official_size(split: str, category: str, kind: GalleryKind) -> tuple[int, int] | None:
    num_queries, num_images = OFFICIAL[split][category]
    if kind == "original":
        return num_queries, num_images
    return (num_queries, UNION[category]) if split == "val" else None


def image_paths(directory: Path, images: Iterable[ImageId], category: str) -> dict[ImageId, Path]:
    """Find each image's file: images/<id>.png, .jpg or .jpeg, or the same in images/<category>/."""
    by_stem: dict[str, Path] = {}
    for folder in (directory / "images" / category, directory / "images"):
        for path in sorted(folder.glob("*.*")) if folder.is_dir() else ():
            if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
                by_stem[path.stem] = path
    return {image: by_stem.get(image, directory / "images" / f"{image}.png") for image in images}


def _gallery_files(directory: Path, part: LabeledQueries) -> dict[ImageId, Path]:
    return image_paths(directory, part.gallery.ids if part.gallery else (), part.category)
