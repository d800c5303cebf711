"""From annotations and picture files to splits, with every picture looked at first.

A picture that is missing or does not decode is an error. `allow_missing_images` lets a run go on without up to so many:
queries that need one of them are dropped, the gallery does without it, and every result says how many of both.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cirloop.artifacts import fingerprint, write_json
from cirloop.data.images import FileImages
from cirloop.data.verify import WORKERS, bad_images
from cirloop.problems import Problems
from cirloop.types import EvalSplit, Gallery, ImageId, Judged, Relevance, TrainSplit, Triplet, UserError

logger = logging.getLogger(__name__)
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a data set's files are, where what was found out about them is kept, and how progress is shown."""

    directory: Path | None
    cache: Path
    progress: Progress

    def root(self, data_set: str) -> Path:
        """The data directory. Raises UserError without one."""
        if self.directory is None:
            raise UserError(f"The data set {data_set} needs --data_dir, the directory of its files.")
        if not self.directory.is_dir():
            raise UserError(f"--data_dir {self.directory}: there is no such directory.")
        return self.directory

    def bad(self, name: str, files: Mapping[ImageId, Path]) -> dict[ImageId, str]:
        """What is wrong with which picture; looked at once, and again when a file's size or time changes."""
        record = self.cache / "images" / f"{fingerprint([name, *_stats(files)])[:24]}.json"
        if record.is_file():
            return {ImageId(image): what for image, what in json.loads(record.read_text("utf-8"))["bad"].items()}
        logger.info("%s: looking at %d pictures", name, len(files))
        found = bad_images(files, WORKERS, lambda images: self.progress(images, f"look at {name}"))
        write_json(record, {"schema": 1, "name": name, "images": len(files), "bad": found})
        if found:
            logger.warning("%s: %d of %d pictures cannot be used; listed in %s", name, len(found), len(files), record)
        return found


def _stats(files: Mapping[ImageId, Path]) -> list[list[object]]:
    out: list[list[object]] = []
    for image, path in sorted(files.items()):
        stat = path.stat() if path.exists() else None
        out.append([image, str(path), stat and stat.st_size, stat and stat.st_mtime_ns])
    return out


def allowed(found: Mapping[ImageId, str], files: Mapping[ImageId, Path], allow: int, name: str) -> None:
    """Raises UserError with all pictures that cannot be used, if they are more than `allow`."""
    if len(found) <= allow:
        return
    problems = Problems()
    for image, what in found.items():
        problems.add(files[image], what)
    problems.stop(
        f"{name}: {len(found)} of {len(files)} pictures cannot be used. Put them right, or go on without them by "
        f"--allow_missing_images {len(found)}: queries that need them are dropped, and every result says so."
    )


def eval_split(judged: Judged, files: Mapping[ImageId, Path], allow: int, sources: Sources) -> EvalSplit:
    """Judged queries with their pictures."""
    assert judged.gallery is not None
    bad = sources.bad(judged.gallery.name, {image: files[image] for image in judged.gallery.ids})
    allowed(bad, files, allow, judged.gallery.name)
    kept = _without(judged, bad)
    gallery = Gallery(judged.gallery.name, tuple(image for image in judged.gallery.ids if image not in bad))
    dropped = len(judged.queries) - len(kept.queries)
    return EvalSplit(kept, gallery, FileImages(files), len(bad), dropped)


def _without(judged: Judged, bad: Mapping[ImageId, str]) -> Judged:
    """Without the queries whose reference, right answers or group hold a picture that cannot be used."""
    if not bad:
        return judged

    def needed(query: Any) -> set[ImageId]:
        images = {query.reference, *judged.groups.get(query.id, ())}
        if judged.relevance is not None:
            images |= {judged.relevance.targets[query.id], *judged.relevance.positives.get(query.id, ())}
        return images

    queries = tuple(query for query in judged.queries if bad.keys().isdisjoint(needed(query)))
    if not queries:
        raise UserError(f"{judged.name}: every query needs a picture that cannot be used.")
    return replace(judged, queries=queries)


def train_split(parts: Sequence[Judged], files: Mapping[ImageId, Path], allow: int, sources: Sources) -> TrainSplit:
    """The triplets of all parts over one gallery."""
    name = parts[0].name.replace("_", "/")
    ids = sorted({image for part in parts if part.gallery for image in part.gallery.ids})
    bad = sources.bad(name, {image: files[image] for image in ids})
    allowed(bad, files, allow, name)
    triplets = []
    for part in parts:
        relevance = part.relevance or Relevance({})
        for query in part.queries:
            if query.reference not in bad and relevance.targets[query.id] not in bad:
                triplets.append(Triplet(query, relevance.targets[query.id]))
    if not triplets:
        raise UserError(f"{name}: every triplet needs a picture that cannot be used.")
    gallery = Gallery(name, tuple(image for image in ids if image not in bad))
    dropped = sum(len(part.queries) for part in parts) - len(triplets)
    if bad:
        logger.warning("%s: %d triplets dropped, %d images left out", name, dropped, len(bad))
    return TrainSplit(name, tuple(triplets), gallery, FileImages(files))
