"""The flags of `cirloop import`."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from cirloop.config import cli


class ImportConfig(cli.Flags):
    """Turns a table of triplets and a folder of images into a directory for --dataset_name jsonl.
    Nothing is written where anything is wrong."""

    model_config = SettingsConfigDict(cli_implicit_flags=True)

    table: CliPositionalArg[Path]
    """The table: CSV, .xlsx, Parquet, JSON or JSON lines, a row for each triplet."""
    images: Path
    """The folder of images, with all below it."""
    output: Path
    """The directory to make, which is not there yet or is empty."""
    val: str = "0.2"
    """The share of the rows that is for evaluation, by whole references; or a table of them."""
    reference: str | None = None
    """The column of reference images, where its name is not a usual one."""
    text: str | None = None
    """The column of texts."""
    target: str | None = None
    """The column of target images."""
    id: str | None = None
    """A column of ids of the queries; by default their place in the split."""
    category: str | None = None
    """A column of categories, by which metrics are given too."""
    skip_rows: int = Field(0, ge=0)
    """Rows that may be left out for what is wrong with them; without it one is an error."""
    copy_images: bool = False
    """Copy the images, in place of a link to their folder."""
    allow_symlinks: bool = False
    """Follow links to folders among the images; links to files are always followed."""
    seed: int = Field(0, ge=0)
    """Of the split."""
    sheet: str | None = None
    """The sheet of a workbook; by default the first one."""
    encoding: str | None = None
    """Of a text file; by default UTF-8, UTF-16 or Windows-1252, whichever it is."""
