"""The flags that `search` and `demo` share: which run, which model of it, which images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import AliasChoices, Field, ValidationError
from pydantic_settings import SettingsConfigDict

from cirloop.cli.iterations import BEST
from cirloop.config import cli
from cirloop.config.run import format_validation_error
from cirloop.types import UserError

MAX_K = 1000
"""Results of a query, at most."""


class SearchOptions(cli.Flags):
    """Which run's model searches which images."""

    model_config = SettingsConfigDict(cli_implicit_flags=True)

    experiment_dir: Path
    """The run directory; the run may still be going on."""
    gallery: Path | None = None
    """A folder of images, with all below it; by default the gallery that the run evaluates on."""
    iteration: str = BEST
    """Whose model: `best` by the run's evaluations, a finished iteration's number, `last` or
    `base`."""
    allow_missing_images: int = Field(0, ge=0)
    """Images of the folder that may be unreadable; they are left out."""
    allow_symlinks: bool = False
    """Follow links to folders in the folder; links to files are always followed."""
    k: int = Field(10, ge=1, le=MAX_K, validation_alias=AliasChoices("top_k", "k"))
    """Results of a query."""


S = TypeVar("S", bound=SearchOptions)


def parse(model: type[S], argv: Sequence[str], program: str) -> S:
    """Return the flags. Raises UserError with all that is wrong."""
    try:
        return cli.parse(model, argv, program)
    except ValidationError as error:
        raise UserError(format_validation_error(error, program)) from None
