"""Tables of Hugging Face `datasets`: a hub name, a directory of `save_to_disk`, or files that
`load_dataset` reads."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, cast

from cirloop.data.paths import DataPaths
from cirloop.io import parse
from cirloop.types import UserError
from cirloop.validation import ValidationReport

if TYPE_CHECKING:
    from cirloop.data.huggingface import HuggingFaceSettings

logger = logging.getLogger(__name__)
COLUMNS = (
    "Say which column is what by --data.columns.reference, --data.columns.text and"
    " --data.columns.target, such as --data.columns.text caption."
)


class ImageCell(TypedDict):
    """A cell of an image column that is not decoded: the image's bytes, or the file it is in."""

    bytes: bytes | None
    path: str | None


class Table(Protocol):
    """What is used of a `datasets.Dataset`; a row maps column names to values."""

    features: Mapping[str, object]
    column_names: list[str]

    def __len__(self) -> int: ...
    def __getitem__(self, row: int) -> dict[str, Any]: ...
    def __iter__(self) -> Iterator[dict[str, Any]]: ...
    def select_columns(self, column_names: list[str]) -> Table: ...
    def cast_column(self, column: str, feature: object) -> Table: ...


class Tables:
    """The splits of one published or local data set, loaded on first use."""

    def __init__(self, settings: HuggingFaceSettings, data_paths: DataPaths) -> None:
        self._settings = settings
        self._directory = data_paths.require_dir("huggingface") if settings.path is None else None
        self.name = settings.path or str(self._directory)
        self._loaded = cache(self._load)

    def _load(self, configuration: str | None) -> Table | dict[str, Table]:
        import datasets
        from datasets.exceptions import DatasetsError

        datasets.disable_progress_bars()
        directory = self._directory
        try:
            loaded: Any
            if directory is not None and _is_saved(directory):
                loaded = datasets.load_from_disk(str(directory))
            else:
                if directory is not None:
                    _check_files(directory)
                revision = self._settings.revision
                loaded = datasets.load_dataset(self.name, configuration, revision=revision)
            return cast("Table | dict[str, Table]", loaded)
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError, StopIteration, DatasetsError) as error:
            # what `datasets` raises for names, files and versions it cannot read
            suffix = f" ({configuration})" if configuration else ""
            raise UserError(
                f"{self.name}{suffix} cannot be loaded by `datasets`: {error}"
            ) from None

    def split(
        self, split: str, problems: ValidationReport, configuration: str | None = None
    ) -> Table | None:
        """Return the table of a split with its images not decoded.

        None, with the problem reported, where there is none.
        """
        import datasets

        loaded = self._loaded(configuration)
        if not isinstance(loaded, dict):
            problems.add(
                self.name,
                "is one table and has no splits; save a DatasetDict with train and validation",
            )
            return None
        if split not in loaded:
            names = ", ".join(map(str, loaded))
            remedy = "Name the splits by --data.train, --data.val and --data.test."
            problems.add(self.name, f"has no split {split!r}; there are: {names}", remedy)
            return None
        table = loaded[split]
        if not len(table):
            problems.add(f"{self.name} {split}", "holds no rows")
            return None
        for column, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
        return table


def _is_saved(directory: Path) -> bool:
    """Return whether a directory was written by `save_to_disk`."""
    return any((directory / name).exists() for name in ("dataset_dict.json", "state.json"))


def _check_files(directory: Path) -> None:
    """Raise UserError for files of a folder that `datasets` would misread or crash on."""
    for path in sorted(directory.rglob("*")):
        if path.suffix in (".json", ".jsonl"):
            _check_rows(path)
        elif path.suffix == ".csv" and path.is_file():
            _check_commas(path)


def _check_commas(path: Path) -> None:
    """Raise UserError for a CSV file that is not UTF-8 or has other separators than commas."""
    try:
        head = parse.read_text(path).partition("\n")[0]
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if head.count(sign) > head.count(","):
            raise UserError(
                f"{path} is separated by {name}: {head[:100]!r}. Save it with commas, from a"
                ' spreadsheet as "CSV (comma separated)", or as JSON lines'
            )


def _check_rows(path: Path) -> None:
    """Raise UserError for a JSON file without objects: Arrow's reader crashes on some values."""
    if not path.is_file():
        raise UserError(f"{path} is no regular file")
    with path.open("rb") as file:
        start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] != b"{" and not (start[:1] == b"[" and start[1:].lstrip()[:1] == b"{"):
        raise UserError(f"{path} holds no objects, one a line or in a list, but {start[:40]!r}")
