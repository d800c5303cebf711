"""What is searched: the images of a folder, or the gallery that a run evaluates on, with what is
known to be right.

A folder's images and their names are those of `data/folder.py`, as in a run on one's own data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from cirloop.artifacts.store import fingerprint
from cirloop.config.run import RunConfig
from cirloop.data.folder import image_suffixes, scan_folder
from cirloop.data.images import FileImages
from cirloop.data.paths import DataPaths
from cirloop.monitoring.console import progress
from cirloop.types import EvalSplit, ImageId, Images, Query
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SearchGallery:
    """Images to search: sorted `ids`, their pixels, a `key` that stands for the place in names of
    indexes.

    `queries` are the run's own, `right` the right answers of those that have any, by reference and
    text.
    """

    name: str
    key: str
    ids: tuple[ImageId, ...]
    images: Images
    queries: tuple[Query, ...] = ()
    right: Mapping[tuple[str, str], frozenset[ImageId]] | None = None


class MultiPartImages:
    """The images of several parts of a split, as one."""

    def __init__(self, parts: Sequence[EvalSplit]) -> None:
        self._of = {image: part.images for part in parts for image in part.gallery.ids}

    def load(self, image: ImageId) -> Image.Image:
        return self._of[image].load(image)

    def digest(self, image: ImageId) -> str:
        return self._of[image].digest(image)


def of_run(config: RunConfig) -> SearchGallery:
    """Return the gallery that the run evaluates on, its categories together, and its queries."""
    data = config.open_data(DataPaths(config.data_dir, config.cache, progress, config.train_dir))
    parts = data.eval_splits(config.evaluation.split)
    ids = tuple(sorted({image for part in parts for image in part.gallery.ids}))
    right: dict[tuple[str, str], frozenset[ImageId]] = {}
    for part in parts:
        for query in part.queries if part.relevance is not None else ():
            assert part.relevance is not None
            target = part.relevance.targets.get(query.id)
            images = part.relevance.positives.get(query.id, frozenset()) | (
                {target} if target else set()
            )
            right[query.reference, query.text] = (
                right.get((query.reference, query.text), frozenset()) | images
            )
    queries = tuple(query for part in parts for query in part.queries)
    name = f"{config.data.type} {config.evaluation.split}"
    return SearchGallery(
        name, fingerprint([name, ids]), ids, MultiPartImages(parts), queries, right
    )


def of_folder(
    directory: Path, cache: Path, allow_missing: int, allow_symlinks: bool
) -> SearchGallery:
    """Return the images below `directory`; what is known of them is kept in `cache`. Raises
    UserError with every one that cannot be used."""
    problems = ValidationReport()
    if not directory.is_dir():
        problems.add(
            f"--gallery {directory}", "there is no such directory", "Give a folder of images."
        )
        problems.raise_if_any()
    folder = scan_folder(directory, allow_symlinks, problems)
    files = folder.files
    if folder.num_skipped:
        logger.info(
            "%s: passed over, no images by their names or hidden: %s",
            directory,
            folder.skipped(),
        )
    bad = DataPaths(directory, cache, progress).unreadable_images(directory.name, files)
    if len(bad) > allow_missing:
        for image, error in bad.items():
            way = (
                f"{len(bad)} of {len(files)} images cannot be used. Replace them, or go on"
                " without them by "
            )
            problems.add(files[image], error, f"{way}--allow_missing_images {len(bad)}.")
    if not files.keys() - bad.keys() and not problems.rows:
        kinds = " ".join(sorted(image_suffixes()))
        problems.add(
            f"--gallery {directory}",
            "holds no images",
            f"An image's name ends in one of: {kinds}",
        )
    problems.raise_if_any()
    if bad:
        logger.warning("%s: searched without %d images that cannot be used", directory, len(bad))
    ids = tuple(sorted(files.keys() - bad.keys()))
    return SearchGallery(
        directory.absolute().name,
        os.path.realpath(directory),
        ids,
        FileImages({image: files[image] for image in ids}),
    )
