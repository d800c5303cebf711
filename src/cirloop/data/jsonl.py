"""A user's own data: JSON lines and a folder of images.

`train.jsonl`, `val.jsonl` and `test.jsonl` hold one object a line (see `triplets.py`). Images are
paths relative to the image folder, in any spelling; files of equal bytes are one image. The gallery
is every image of the folder and all that the lines name, or the images of a list, one a line.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import ClassVar, Literal

from cirloop.data import own, triplets
from cirloop.data.folder import scan_folder
from cirloop.data.images import ImageFile, escapes_root
from cirloop.data.names import normalize_name
from cirloop.data.paths import DataPaths
from cirloop.data.splits import FileSettings, QueryFiles, ReadSplit
from cirloop.types import EvalProtocol, ImageId, UserError
from cirloop.validation import ValidationReport


class JsonlSettings(FileSettings):
    """Your own triplets as JSON lines, with a folder of images."""

    type: Literal["jsonl"] = "jsonl"
    protocol: ClassVar[EvalProtocol] = triplets.PROTOCOL
    train: str = "train.jsonl"
    """Files under --data_dir."""
    val: str = "val.jsonl"
    """Evaluated after each iteration."""
    test: str = "test.jsonl"
    """Evaluated on request."""
    images: str = "images"
    """The folder of images; images are named by their path in it."""
    gallery: str | None = None
    """A file with one image a line; by default the gallery is every image of the folder."""
    allow_symlinks: bool = False
    """Follow links to folders among the images; links to files are always followed."""

    def reader(self, data_paths: DataPaths) -> ReadSplit:
        try:
            return super().reader(data_paths)
        except UserError as error:
            misspelt = data_paths.directory is not None and not data_paths.directory.exists()
            raise UserError(str(error) if misspelt else f"{error} {own.TABLE}") from None

    def read(self, directory: Path, split: str) -> tuple[QueryFiles, ValidationReport]:
        """Read the queries of `split`, by category if its lines have one, and its image files."""
        problems = ValidationReport(
            f"Put {split} right under --data_dir {directory} (docs/datasets.md). cirloop import"
            " makes it from a table, and finds images under other spellings (docs/own-data.md)."
        )
        files = gallery_files(directory, self, problems)
        path = own.path_on_disk(directory / getattr(self, split))
        folder = own.path_on_disk(directory / self.images)
        if not os.path.lexists(path):
            own.report_missing_file(path, f"data.{split}", problems)
            return [], problems
        entries = own.normalize_names(problems.json_lines(path), folder)
        if self.gallery is None and files:
            files = own.with_named_images(files, folder, entries)
        unique = own.deduplicate(files, folder)
        parts = triplets.load_queries(
            entries, unique.files, "jsonl", split, path, problems, unique.copy_of
        )
        return [(part, unique.files) for part in parts], problems


def gallery_files(
    directory: Path, settings: JsonlSettings, problems: ValidationReport
) -> dict[ImageId, ImageFile]:
    """Return the gallery's images and their files."""
    folder = own.path_on_disk(directory / settings.images)
    if settings.gallery is None or not folder.is_dir():
        return own.images_in_folder(folder, settings.allow_symlinks, problems)
    listed = own.path_on_disk(directory / settings.gallery)
    names = [normalize_name(name, folder) for name in problems.lines(listed) if name]
    if not names:
        problems.add(listed, "names no images")
    for name, count in sorted(Counter(names).items()):
        if count > 1:
            problems.add(listed, f"{name!r} is there more than once")
        if escapes_root(name):
            problems.add(listed, f"{name!r} is not inside the image folder")
    # The scan has names as the disk spells them, which may be NFD.
    files = scan_folder(folder, settings.allow_symlinks, ValidationReport()).files
    inside = [ImageId(name) for name in names if not escapes_root(name)]
    return {image: files.get(image, folder / image) for image in inside}
