"""A run's model for others, with a card: for transformers + peft, for transformers, or for
sentence-transformers.

    python -m cirloop.export --experiment_dir DIR --iteration 1 --format sentence-transformers

What is made is opened again and compared with the run's own embedder before it gets its name
(docs/export.md).
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError
from pydantic_settings import SettingsConfigDict

from cirloop.cli import entry
from cirloop.config import cli
from cirloop.config.run import format_validation_error
from cirloop.types import UserError

PROGRAM = "python -m cirloop.export"


class ExportConfig(cli.Flags):
    """Which model is exported, how and where to."""

    model_config = SettingsConfigDict(cli_implicit_flags=True)

    experiment_dir: Path
    """The run directory."""
    iteration: str
    """The number of a finished iteration; 0 is the warm-up."""
    format: Literal["adapter", "merged", "sentence-transformers"]
    """`adapter`: the LoRA for PEFT. `merged`: the whole model. `sentence-transformers`: the whole
    model for that."""
    output: Path | None = None
    """The directory to make; by default export/iter_N_FORMAT in the run directory."""
    overwrite: bool = False
    """Replace an export that is there already."""
    push_to_hub: str | None = None
    """Also upload it to this repository of the Hugging Face Hub, OWNER/NAME, which is made if need
    be."""
    private: bool = False
    """A repository that is made is private."""
    data_license: str | None = None
    """The licence of the training data, for the card; by default the card says that it is not
    stated."""


def main(argv: Sequence[str]) -> None:
    """Export a model. Raises UserError for wrong flags; then nothing is written."""
    try:
        options = cli.parse(ExportConfig, argv, PROGRAM)
    except ValidationError as error:
        raise UserError(format_validation_error(error, PROGRAM)) from None
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from cirloop.tools.export.export import export

    export(
        options.experiment_dir,
        options.iteration,
        options.format,
        options.output,
        options.overwrite,
        options.push_to_hub,
        options.private,
        options.data_license,
    )


if __name__ == "__main__":
    entry.main_wrapper(lambda: main(sys.argv[1:]))
