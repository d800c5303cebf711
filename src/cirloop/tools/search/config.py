"""The flags that `search` and `demo` share: which models, and which images."""

from __future__ import annotations

from pathlib import Path

from pydantic import AliasChoices, Field, ValidationInfo, field_validator
from pydantic_settings import SettingsConfigDict

from cirloop.cli.iterations import BEST
from cirloop.config import cli

MAX_K = 1000
"""Results of a query, at most."""


class SearchOptions(cli.Flags):
    """Which model searches which images: one of a run, or one that no run has trained."""

    model_config = SettingsConfigDict(cli_implicit_flags=True)

    experiment_dir: Path | None = None
    """The run directory; the run may still be going on."""
    model: str | None = None
    """Instead of a run, a model as it was published: a directory, a hub name, open_clip's
    ARCHITECTURE:TAG, a recipe (.yaml) for its settings, or `tiny`. It needs --images."""
    gallery: Path | None = Field(None, validation_alias=AliasChoices("gallery", "images"))
    """A folder of images, with all below it; by default the gallery that the run evaluates on."""
    iteration: str = BEST
    """Whose model: `best` by the run's evaluations, a finished iteration's number, `last` or
    `base`."""
    allow_missing_images: int = Field(0, ge=0)
    """Images of the folder that may be unreadable; they are left out."""
    allow_symlinks: bool = False
    """Follow links to folders in the folder; links to files are always followed."""
    cache_dir: Path | None = None
    """Where vectors of images are kept; by default the run's cache, with --model
    experiments/cache."""
    k: int = Field(10, ge=1, le=MAX_K, validation_alias=AliasChoices("top_k", "k"))
    """Results of a query."""

    @field_validator("model")
    @classmethod
    def _one_source(cls, model: str | None, info: ValidationInfo) -> str | None:
        run = info.data.get("experiment_dir")
        if (model is None) == (run is None) and "experiment_dir" in info.data:
            raise ValueError("give --experiment_dir RUN or --model NAME, and not both")
        return model

    @field_validator("gallery")
    @classmethod
    def _needs_images(cls, gallery: Path | None, info: ValidationInfo) -> Path | None:
        if gallery is None and info.data.get("model") is not None:
            raise ValueError("a model without a run has no gallery: give --images FOLDER")
        return gallery

    @field_validator("iteration")
    @classmethod
    def _of_a_run(cls, iteration: str, info: ValidationInfo) -> str:
        if iteration != BEST and info.data.get("model") is not None:  # defaults are validated too
            raise ValueError("a model without a run has no iterations: leave --iteration out")
        return iteration
