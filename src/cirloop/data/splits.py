"""From annotations and image files to train and evaluation splits, with every image checked first.

An image that is missing or does not decode is an error. `allow_missing_images` lets a run go on
without up to so many: queries that need one of them are dropped, the gallery does without it, and
every result says how many of both.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import ClassVar

from pydantic import Field

from cirloop.data.dataset import Dataset, DatasetSettings
from cirloop.data.images import NOT_THERE, FileImages
from cirloop.data.names import NameMatcher
from cirloop.data.paths import DataPaths, Files
from cirloop.types import EvalSplit, Gallery, ImageId, LabeledQueries, QueryId, TrainSplit, Triplet
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
QueryFiles = Sequence[tuple[LabeledQueries, Files]]
"""The labeled queries of a split, one item per category, each with the files of its gallery."""
ReadSplit = Callable[[str], tuple[QueryFiles, ValidationReport]]
"""Read the annotations of a split by its name; the problems say what is wrong with them."""


class FileSettings(DatasetSettings):
    """Settings that data sets from files share. Each has a `read` for its own layout, or a
    `reader` where more than a directory is read."""

    eval_names: ClassVar[tuple[str, ...]] = ("val", "test")
    """The evaluation splits."""
    allow_missing_images: int = Field(0, ge=0)
    """Images of a split that may be missing or damaged. Queries that need one are dropped, every
    result says so."""

    def build(self, data_paths: DataPaths) -> Dataset:
        read = self.reader(data_paths)
        evals = {name: partial(self.load_eval, read, name, data_paths) for name in self.eval_names}
        return Dataset(self.type, partial(self.load_train, read, data_paths), evals)

    def reader(self, data_paths: DataPaths) -> ReadSplit:
        """Return the reader of the splits. Raises UserError where the files are missing."""
        return partial(self.read, data_paths.require_dir(self.type))

    def read(self, directory: Path, split: str) -> tuple[QueryFiles, ValidationReport]:
        """Read the annotations of a split; the problems say what is wrong with them."""
        raise NotImplementedError

    def load_train(self, read: ReadSplit, data_paths: DataPaths) -> TrainSplit:
        """Load the training split."""
        parts, problems = read("train")
        return build_train_split(parts, self.allow_missing_images, data_paths, problems)

    def load_eval(
        self, read: ReadSplit, split: str, data_paths: DataPaths
    ) -> tuple[EvalSplit, ...]:
        """Load an evaluation split, one part per category."""
        parts, problems = read(split)
        return build_eval_splits(parts, self.allow_missing_images, data_paths, problems)


def official_size_warning(part: LabeledQueries) -> str:
    """Say how the counts differ from the benchmark's; empty where they do not or none are known."""
    if part.official is None:
        return ""
    images = len(part.gallery.ids) if part.gallery else part.official[1]
    if (len(part.queries), images) == part.official:
        return ""
    name = f"{part.name} {part.category}".rstrip()
    return (
        f"{name} has {len(part.queries):,} queries and {images:,} images, officially"
        f" {part.official[0]:,} and {part.official[1]:,}: its numbers are not comparable with"
        " published ones"
    )


def warn_blank_texts(path: Path, names: Sequence[str]) -> None:
    """Warn once that queries of an official file have blank texts; they are used like any other."""
    if names:
        examples = f"{', '.join(names[:3])}{', ..' if names[3:] else ''}"
        warn_once(
            f"{path}: blank texts: {len(names):,} ({examples}); their queries are kept like any"
            " other"
        )


@cache
def warn_once(note: str) -> None:
    """Warn once of a note that is not empty."""
    if note:
        logger.warning("%s", note)


def build_eval_splits(
    parts: QueryFiles, allow: int, data_paths: DataPaths, problems: ValidationReport
) -> tuple[EvalSplit, ...]:
    """Join labeled queries with their images, one split per category.

    Raises ProblemsFound with what `problems` held and with every unusable image.
    """
    if not parts and not problems.rows:
        problems.add("data", "the split holds no row that can be used")
    unusable = [
        _check_images(part.gallery, files, allow, data_paths, problems) for part, files in parts
    ]
    usable = [_drop_queries(part, bad) for (part, _), bad in zip(parts, unusable, strict=True)]
    for part in usable:
        if not part.queries and not problems.rows:
            problems.add(part.name, "every query needs an image that cannot be used")
    problems.raise_if_any()
    for part, _ in parts:
        warn_once(official_size_warning(part))
    splits = []
    for (part, files), bad, rest in zip(parts, unusable, usable, strict=True):
        assert part.gallery is not None
        gallery = _without(part.gallery, bad)
        num_dropped = len(part.queries) - len(rest.queries)
        splits.append(EvalSplit(rest, gallery, FileImages(files), len(bad), num_dropped))
    return tuple(splits)


def _without(gallery: Gallery, bad: set[ImageId]) -> Gallery:
    return Gallery(gallery.name, tuple(image for image in gallery.ids if image not in bad))


def _check_images(
    gallery: Gallery | None,
    files: Files,
    allow: int,
    data_paths: DataPaths,
    problems: ValidationReport,
) -> set[ImageId]:
    """Return the images that cannot be used. They are problems if they are more than `allow`."""
    if gallery is None or not gallery.ids:
        return set()
    errors = data_paths.unreadable_images(
        gallery.name, {image: files[image] for image in gallery.ids}
    )
    if len(errors) > allow:
        _report_unusable(gallery, files, errors, data_paths, problems)
    return set(errors)


def _report_unusable(
    gallery: Gallery,
    files: Files,
    errors: dict[ImageId, str],
    data_paths: DataPaths,
    problems: ValidationReport,
) -> None:
    missing = [image for image, error in errors.items() if error == NOT_THERE]
    first = files[missing[0]] if missing else None
    if isinstance(first, Path) and data_paths.directory is not None:
        _suggest_location(first, data_paths.directory, problems)
    matcher = NameMatcher(image for image in gallery.ids if image not in errors)
    remedy = _remedy(gallery, len(errors), len(missing))
    similar = {image: matcher.suggest(image) for image in missing}
    if any(similar.values()) and gallery.name.startswith("jsonl/"):
        remedy += " cirloop import writes names as the folder has them (docs/own-data.md)."
    for image, error in errors.items():
        hint = f"; did you mean {similar[image]!r}?" if similar.get(image) else ""
        problems.add(files[image], f"{error}{hint}", remedy)


def _remedy(gallery: Gallery, num_unusable: int, num_missing: int) -> str:
    """Return the way out. Going on without images is one only where some can be used."""
    if num_missing == len(gallery.ids):
        return (
            f"{gallery.name}: none of its {num_missing} images is there. Put them where the"
            " messages say, or give the --data_dir that has them (docs/datasets.md)."
        )
    if num_unusable == len(gallery.ids):
        return f"{gallery.name}: none of its {num_unusable} images can be used. Put them right."
    return (
        f"{gallery.name}: {num_unusable} of {len(gallery.ids)} images cannot be used. Put"
        f" them right, or go on without them by --allow_missing_images {num_unusable}:"
        " queries that need them are dropped, and every result says so."
    )


def _suggest_location(missing: Path, directory: Path, problems: ValidationReport) -> None:
    """Add as a remedy where else below the data directory a missing file's name occurs."""
    for folder, _, names in os.walk(directory):
        if missing.name in names and Path(folder, missing.name).is_file():
            problems.remedies.append(
                f"A file {missing.name!r} is not at {missing} but in {folder}."
            )
            return


def _drop_queries(part: LabeledQueries, bad: set[ImageId]) -> LabeledQueries:
    """Drop the queries that need an image that cannot be used."""
    kept = [query for query in part.queries if bad.isdisjoint(part.relevant_images(query))]
    return replace(part, queries=tuple(kept))


def build_train_split(
    parts: QueryFiles, allow: int, data_paths: DataPaths, problems: ValidationReport
) -> TrainSplit:
    """Join the triplets of all categories over one gallery.

    Raises ProblemsFound like `build_eval_splits`.
    """
    if not parts:
        if not problems.rows:
            problems.add("data", "the training split holds no row that can be used")
        problems.raise_if_any()
    name = f"{parts[0][0].benchmark}/train"
    files = {image: file for _, part_files in parts for image, file in part_files.items()}
    ids = {image for part, _ in parts if part.gallery for image in part.gallery.ids}
    gallery = Gallery(name, tuple(sorted(ids)))
    bad = _check_images(gallery, files, allow, data_paths, problems)
    triplets = [triplet for part, _ in parts for triplet in _usable_triplets(part, bad)]
    if not triplets and not problems.rows:
        problems.add(name, "every triplet needs an image that cannot be used")
    problems.raise_if_any()
    for part, _ in parts:
        warn_once(official_size_warning(part))
    num_dropped = sum(len(part.queries) for part, _ in parts) - len(triplets)
    if bad:
        logger.warning("%s: %d triplets dropped, %d images left out", name, num_dropped, len(bad))
    gallery = _without(gallery, bad)
    return TrainSplit(
        name,
        tuple(triplets),
        gallery,
        FileImages(files),
        groups={query: images for part, _ in parts for query, images in part.groups.items()},
        categories={
            image: part.category
            for part, _ in parts
            if part.category and part.gallery
            for image in part.gallery.ids
        },
        positives=_other_positives(parts, triplets, frozenset(gallery.ids)),
    )


def _usable_triplets(part: LabeledQueries, bad: set[ImageId]) -> list[Triplet]:
    targets = part.relevance.targets if part.relevance else {}
    return [
        Triplet(query, targets[query.id])
        for query in part.queries
        if query.id in targets and bad.isdisjoint((query.reference, targets[query.id]))
    ]


def _other_positives(
    parts: QueryFiles, triplets: Sequence[Triplet], gallery: frozenset[ImageId]
) -> dict[QueryId, frozenset[ImageId]]:
    """Return the right answers that training lines name beside the target, of the usable queries
    and images."""
    annotated = {
        query: images
        for part, _ in parts
        if part.relevance
        for query, images in part.relevance.positives.items()
    }
    other_positives: dict[QueryId, frozenset[ImageId]] = {}
    for triplet in triplets:
        query = triplet.query.id
        images = annotated.get(query, frozenset()) & gallery - {triplet.target}
        if images:
            other_positives[query] = images
    return other_positives
