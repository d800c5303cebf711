"""The flags of `python -m cirloop.export`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic_settings import SettingsConfigDict

from cirloop.cli.iterations import BEST
from cirloop.config import cli
from cirloop.tools.installed import missing
from cirloop.types import UserError

SENTENCE_TRANSFORMERS = "sentence-transformers"
REQUIREMENTS = {SENTENCE_TRANSFORMERS: "sentence-transformers>=6.0"}
"""Format -> the package that writes it, and that nothing else needs."""


class ExportConfig(cli.Flags):
    """Which model is exported, how and where to. With --vectors its vectors are, by flags of their
    own."""

    model_config = SettingsConfigDict(cli_implicit_flags=True)

    experiment_dir: Path
    """The run directory."""
    iteration: str = BEST
    """Whose model: `best` by the run's evaluations, a finished iteration's number (0 is the
    warm-up), or `last`."""
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


def require_package(options: ExportConfig) -> None:
    """Raise UserError where a package that the format needs is not installed."""
    requirement = REQUIREMENTS.get(options.format)
    lacks = missing([requirement]) if requirement else []
    if lacks:
        raise UserError(
            f"--format {options.format} needs the package {lacks[0]}: pip install"
            f" '{requirement}'. Nothing was loaded or written. --format merged has the same"
            " weights and needs no further package."
        )
