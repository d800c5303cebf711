"""Where a data set's files are, and the check of its images.

The result of a check is kept under the cache directory, so that only changed images are decoded
again.
"""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_checked
from cirloop.artifacts.store import fingerprint
from cirloop.data import locations
from cirloop.data.image_check import WORKERS, unreadable_images
from cirloop.data.images import ImageFile, file_signature
from cirloop.types import ImageId, UserError

logger = logging.getLogger(__name__)
Progress = Callable[[Iterable[Any], str], Iterable[Any]]
Files = Mapping[ImageId, ImageFile]


@dataclass(frozen=True, slots=True)
class DataPaths:
    """Where a data set's files are, where the results of checks are kept, and how progress shows.

    `train_directory` is for a benchmark without a training split, which takes it from another data
    set.
    """

    directory: Path | None
    cache: Path
    progress: Progress
    train_directory: Path | None = None

    def require_dir(self, data_set: str) -> Path:
        """Return the data directory. Raises UserError without one."""
        if self.directory is None:
            raise UserError(
                f"The data set {data_set} needs --data_dir, the directory of its files. They are in"
                " none of the usual places either:"
                f" {locations.describe_default_dirs(data_set)}."
            )
        if self.directory.is_file():
            raise UserError(
                f"--data_dir {self.directory} is a file. Give the directory that holds it:"
                f" {self.directory.parent}."
            )
        if not self.directory.is_dir():
            raise UserError(
                f"--data_dir {self.directory}: there is no such directory{self._suggestion()}"
            )
        return self.directory

    def _suggestion(self) -> str:
        """Say where a missing directory was looked for, and which one there has a similar name."""
        assert self.directory is not None
        absolute = self.directory.absolute()
        searched = "" if self.directory.is_absolute() else f" ({absolute})"
        above = next(folder for folder in absolute.parents if folder.is_dir())
        names = [path.name for path in above.iterdir() if path.is_dir()]
        close = difflib.get_close_matches(absolute.relative_to(above).parts[0], names, 1, 0.6)
        return f"{searched}; did you mean {str(above / close[0])!r}?" if close else f"{searched}."

    def for_training(self) -> DataPaths:
        """Return the paths of the data set that a benchmark without a training split trains on."""
        return replace(self, directory=self.train_directory or self.directory, train_directory=None)

    def unreadable_images(self, name: str, files: Files) -> dict[ImageId, str]:
        """Return what is wrong with each image that cannot be used, checked again only when the
        size or time of a file changes."""
        signatures = [[image, *file_signature(file)] for image, file in sorted(files.items())]
        record = self.cache / "images" / f"{fingerprint(signatures)[:24]}.json"
        if record.is_file():
            try:
                errors = schema.read(record, "images")["bad"]
                return {ImageId(image): error for image, error in errors.items()}
            except UserError as error:
                logger.warning("image check cache is invalid; re-checking images: %s", error)
        return self._check(name, files, record)

    def _check(self, name: str, files: Files, record: Path) -> dict[ImageId, str]:
        """Decode all images and write what is wrong with them to `record`."""
        began = time.monotonic()
        errors = unreadable_images(
            files, WORKERS, lambda images: self.progress(images, f"look at {name}")
        )
        seconds = time.monotonic() - began
        logger.info(
            "%s: looked at %d images in %.1f s, %.0f a second, %d threads",
            name,
            len(files),
            seconds,
            len(files) / max(seconds, 1e-9),
            WORKERS,
        )
        write_checked(record, "images", {"name": name, "images": len(files), "bad": errors})
        if errors:
            logger.warning(
                "%s: %d of %d images cannot be used; listed in %s",
                name,
                len(errors),
                len(files),
                record,
            )
        return errors
