"""From annotations and picture files to splits, with every picture looked at first.

A picture that is missing or does not decode is an error. `allow_missing_images` lets a run go on
without up to so many: queries that need one of them are dropped, the gallery does without it, and
every result says how many of both.
"""

from __future__ import annotations

import difflib
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from cirloop.artifacts import schema
from cirloop.artifacts.store import fingerprint, write_sealed
from cirloop.data import locations
from cirloop.data.image_check import WORKERS, unreadable_images
from cirloop.data.images import NOT_THERE, FileImages, ImageFile, file_signature
from cirloop.data.names import NameMatcher
from cirloop.types import (
    EvalSplit,
    Gallery,
    ImageId,
    LabeledQueries,
    QueryId,
    TrainSplit,
    Triplet,
    UserError,
)
from cirloop.validation import Problems

logger = logging.getLogger(__name__)
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
Files = Mapping[ImageId, ImageFile]


@dataclass(frozen=True, slots=True)
class DataPaths:
    """Where a data set's files are, where what was found out about them is kept, and how progress
    is shown.

    `train_directory` is for a benchmark without a training split, which takes it from another data
    set.
    """

    directory: Path | None
    cache: Path
    progress: Progress
    train_directory: Path | None = None

    def require_dir(self, data_set: str) -> Path:
        """The data directory. Raises UserError without one."""
        if self.directory is None:
            raise UserError(
                f"The data set {data_set} needs --data_dir, the directory of its files. They are in"
                f" none of the usual places either: {locations.describe_default_dirs(data_set)}."
            )
        if self.directory.is_file():
            raise UserError(
                f"--data_dir {self.directory} is a file. Give the directory that holds it:"
                f" {self.directory.parent}."
            )
        if not self.directory.is_dir():
            raise UserError(
                f"--data_dir {self.directory}: there is no such directory{self._near()}"
            )
        return self.directory

    def _near(self) -> str:
        """Where a directory that is not there was looked for, and what is called like it there."""
        assert self.directory is not None
        place = self.directory.absolute()
        looked = "" if self.directory.is_absolute() else f" ({place})"
        above = next(folder for folder in place.parents if folder.is_dir())
        inner = [path.name for path in above.iterdir() if path.is_dir()]
        close = difflib.get_close_matches(place.relative_to(above).parts[0], inner, 1, 0.6)
        return f"{looked}; did you mean {str(above / close[0])!r}?" if close else f"{looked}."

    def for_training(self) -> DataPaths:
        """The same for the data set that a benchmark without a training split is trained on."""
        return replace(self, directory=self.train_directory or self.directory, train_directory=None)

    def unreadable_images(self, name: str, files: Files) -> dict[ImageId, str]:
        """What is wrong with which picture; looked at once, and again when a file's size or time
        changes."""
        signatures = [[image, *file_signature(picture)] for image, picture in sorted(files.items())]
        record = self.cache / "images" / f"{fingerprint(signatures)[:24]}.json"
        if record.is_file():
            try:
                found = schema.read(record, "pictures")["bad"]
                return {ImageId(image): what for image, what in found.items()}
            except UserError as error:
                logger.warning(
                    "looking at the pictures again, since what is known of them is of no use: %s",
                    error,
                )
        began = time.monotonic()
        found = unreadable_images(
            files, WORKERS, lambda images: self.progress(images, f"look at {name}")
        )
        seconds = time.monotonic() - began
        rate = len(files) / max(seconds, 1e-9)
        logger.info(
            "%s: looked at %d pictures in %.1f s, %.0f a second, %d threads",
            name,
            len(files),
            seconds,
            rate,
            WORKERS,
        )
        write_sealed(record, "pictures", {"name": name, "images": len(files), "bad": found})
        if found:
            logger.warning(
                "%s: %d of %d pictures cannot be used; listed in %s",
                name,
                len(found),
                len(files),
                record,
            )
        return found


def official_size_warning(part: LabeledQueries) -> str:
    """How a part's counts differ from the benchmark's; empty where they do not, or where none are
    known."""
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


def warn_blank_texts(path: Path, blanks: Sequence[str]) -> None:
    """Say once that an official file has blank texts, whose queries are like any other."""
    if blanks:
        first = f"{', '.join(blanks[:3])}{', ..' if blanks[3:] else ''}"
        _warn_once(
            f"{path}: blank texts: {len(blanks):,} ({first}); their queries are kept like any other"
        )


@cache
def _warn_once(note: str) -> None:
    if note:
        logger.warning("%s", note)


def build_eval_splits(
    parts: Sequence[tuple[LabeledQueries, Files]],
    allow: int,
    data_paths: DataPaths,
    problems: Problems,
) -> tuple[EvalSplit, ...]:
    """Judged queries with their pictures. Raises ProblemsFound with what `problems` held and every
    picture's."""
    if not parts and not problems.rows:
        problems.add("data", "the split holds no row that can be used")
    bad = [_check_images(part.gallery, files, allow, data_paths, problems) for part, files in parts]
    kept = [_drop_queries(part, gone) for (part, _), gone in zip(parts, bad, strict=True)]
    for part in kept:
        if not part.queries and not problems.rows:
            problems.add(part.name, "every query needs a picture that cannot be used")
    problems.stop()
    for part, _ in parts:
        _warn_once(official_size_warning(part))
    out = []
    for (part, files), gone, left in zip(parts, bad, kept, strict=True):
        assert part.gallery is not None
        gallery = Gallery(
            part.gallery.name, tuple(image for image in part.gallery.ids if image not in gone)
        )
        dropped = len(part.queries) - len(left.queries)
        out.append(EvalSplit(left, gallery, FileImages(files), len(gone), dropped))
    return tuple(out)


def _check_images(
    gallery: Gallery | None, files: Files, allow: int, data_paths: DataPaths, problems: Problems
) -> set[ImageId]:
    """The pictures that cannot be used. They are problems if they are more than `allow`."""
    if gallery is None or not gallery.ids:
        return set()
    found = data_paths.unreadable_images(
        gallery.name, {image: files[image] for image in gallery.ids}
    )
    if len(found) > allow:
        absent = [files[image] for image, what in found.items() if what == NOT_THERE]
        _suggest_location(absent[0] if absent else None, data_paths, problems)
        alike = NameMatcher(image for image in gallery.ids if image not in found)
        for image, what in found.items():
            meant = alike.suggest(image) if what == NOT_THERE else None
            problems.add(
                files[image],
                what if meant is None else f"{what}; did you mean {meant!r}?",
                f"{gallery.name}: {len(found)} of {len(gallery.ids)} pictures cannot be used. Put"
                f" them right, or go on without them by --allow_missing_images {len(found)}:"
                " queries that need them are dropped, and every result says so.",
            )
    return set(found)


def _suggest_location(picture: ImageFile | None, data_paths: DataPaths, problems: Problems) -> None:
    """Where else below the data directory a file has the name of a picture that is not there, as a
    way out."""
    if not isinstance(picture, Path) or data_paths.directory is None:
        return
    for place, _, names in os.walk(data_paths.directory):
        if picture.name in names and Path(place, picture.name).is_file():
            problems.ways.append(f"A file {picture.name!r} is not at {picture} but in {place}.")
            return


def _drop_queries(part: LabeledQueries, bad: set[ImageId]) -> LabeledQueries:
    """Without the queries that need a picture that cannot be used."""
    return replace(
        part, queries=tuple(query for query in part.queries if bad.isdisjoint(part.needs(query)))
    )


def build_train_split(
    parts: Sequence[tuple[LabeledQueries, Files]],
    allow: int,
    data_paths: DataPaths,
    problems: Problems,
) -> TrainSplit:
    """The triplets of all parts over one gallery. Raises ProblemsFound like `build_eval_splits`."""
    if not parts:
        if not problems.rows:
            problems.add("data", "the training split holds no row that can be used")
        problems.stop()
    name = f"{parts[0][0].benchmark}/train"
    files = {image: picture for _, rows in parts for image, picture in rows.items()}
    gallery = Gallery(
        name,
        tuple(sorted({image for part, _ in parts if part.gallery for image in part.gallery.ids})),
    )
    bad = _check_images(gallery, files, allow, data_paths, problems)
    triplets = []
    for part, _ in parts:
        targets = part.relevance.targets if part.relevance else {}
        for query in part.queries:
            if query.id in targets and bad.isdisjoint((query.reference, targets[query.id])):
                triplets.append(Triplet(query, targets[query.id]))
    if not triplets and not problems.rows:
        problems.add(name, "every triplet needs a picture that cannot be used")
    problems.stop()
    for part, _ in parts:
        _warn_once(official_size_warning(part))
    dropped = sum(len(part.queries) for part, _ in parts) - len(triplets)
    if bad:
        logger.warning("%s: %d triplets dropped, %d images left out", name, dropped, len(bad))
    ids = tuple(image for image in gallery.ids if image not in bad)
    groups = {query: images for part, _ in parts for query, images in part.groups.items()}
    categories = {
        i: p.category for p, _ in parts if p.category and p.gallery for i in p.gallery.ids
    }
    named = _named_positives(parts, triplets, frozenset(ids))
    return TrainSplit(
        name,
        tuple(triplets),
        Gallery(name, ids),
        FileImages(files),
        None,
        groups,
        categories,
        named,
    )


def _named_positives(
    parts: Sequence[tuple[LabeledQueries, Files]],
    triplets: Sequence[Triplet],
    gallery: frozenset[ImageId],
) -> dict[QueryId, frozenset[ImageId]]:
    """What training lines name as right beside the target, of the queries and images that are
    left."""
    lines = {
        query: images
        for part, _ in parts
        if part.relevance
        for query, images in part.relevance.positives.items()
    }
    left = {t.query.id: lines.get(t.query.id, frozenset()) & gallery - {t.target} for t in triplets}
    return {query: images for query, images in left.items() if images}
