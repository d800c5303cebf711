"""Tables of Hugging Face `datasets`: a hub name, a directory of `save_to_disk`, or files that
`load_dataset` reads."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cirloop.data.paths import DataPaths
from cirloop.io import parse
from cirloop.types import UserError
from cirloop.validation import Problems

if TYPE_CHECKING:
    from cirloop.data.huggingface import HuggingFaceSettings

logger = logging.getLogger(__name__)
COLUMNS = (
    "Say which column is what by --data.columns.reference, --data.columns.text and"
    " --data.columns.target, such as --data.columns.text caption."
)


class Tables:
    """The splits of one published or local data set, loaded when asked for."""

    def __init__(self, settings: HuggingFaceSettings, data_paths: DataPaths) -> None:
        self._settings = settings
        self._directory = data_paths.require_dir("huggingface") if settings.path is None else None
        self.name = settings.path or str(self._directory)
        self._loaded = cache(self._load)

    def _load(self, configuration: str | None) -> Any:
        import datasets
        from datasets.exceptions import DatasetsError

        datasets.disable_progress_bars()
        directory = self._directory
        try:
            if directory is not None and any(
                (directory / n).exists() for n in ("dataset_dict.json", "state.json")
            ):
                return datasets.load_from_disk(str(directory))
            if directory is not None:
                _check_files(directory)
            return datasets.load_dataset(self.name, configuration, revision=self._settings.revision)
        except UserError:
            raise
        except (OSError, ValueError, LookupError, TypeError, StopIteration, DatasetsError) as error:
            # what `datasets` raises for names, files and versions it cannot read
            raise UserError(
                f"{self.name}{f' ({configuration})' if configuration else ''} cannot be loaded by"
                f" `datasets`: {error}"
            ) from None

    def split(self, split: str, problems: Problems, configuration: str | None = None) -> Any:
        """The table of a split, its pictures not decoded; None, with the problem noted, where there
        is none."""
        import datasets

        made = self._loaded(configuration)
        if not isinstance(made, dict):
            problems.add(
                self.name,
                "is one table and has no splits; save a DatasetDict with train and validation",
            )
            return None
        if split not in made:
            there = ", ".join(map(str, made))
            way = "Name the splits by --data.train, --data.val and --data.test."
            problems.add(self.name, f"has no split {split!r}; there are: {there}", way)
            return None
        table = made[split]
        if not len(table):
            problems.add(f"{self.name} {split}", "holds no rows")
            return None
        for column, feature in table.features.items():
            if isinstance(feature, datasets.Image):
                table = table.cast_column(column, datasets.Image(decode=False))
        return table


def _check_files(directory: Path) -> None:
    """Raises UserError for files of a folder that `datasets` would misread or die of."""
    for path in sorted(directory.rglob("*")):
        if path.suffix in (".json", ".jsonl"):
            _check_rows(path)
        elif path.suffix == ".csv" and path.is_file():
            _check_commas(path)


def _check_commas(path: Path) -> None:
    """Raises UserError for a CSV file that is no UTF-8 text or that other signs than commas
    separate."""
    try:
        head = parse.text(path).partition("\n")[0]
    except UserError as error:
        raise UserError(f"{path} {error}") from None
    for sign, name in ((";", "semicolons"), ("\t", "tabs")):
        if head.count(sign) > head.count(","):
            raise UserError(
                f"{path} is separated by {name}: {head[:100]!r}. Save it with commas, from a"
                ' spreadsheet as "CSV (comma separated)", or as JSON lines'
            )


def _check_rows(path: Path) -> None:
    """Raises UserError for a JSON file that holds no objects: Arrow's reader dies of some values,
    without an error."""
    if not path.is_file():
        raise UserError(f"{path} is no regular file")
    with path.open("rb") as file:
        start = file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] != b"{" and not (start[:1] == b"[" and start[1:].lstrip()[:1] == b"{"):
        raise UserError(f"{path} holds no objects, one a line or in a list, but {start[:40]!r}")
