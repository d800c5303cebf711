"""A run's configuration from Python: a recipe, a file of settings or a mapping, and changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cirloop.captioning.foundation import match_dtype
from cirloop.config import recipes
from cirloop.config.errors import format_errors
from cirloop.config.run import RunConfig, complete
from cirloop.negatives import below_strategy
from cirloop.types import UserError

FOR_COMMANDS = ("config", "dry_run", "report_only")
"""Settings that only a command line has a use for."""
ALL_SETTINGS = "cirloop train --help_all"
"""The command that lists every setting, for messages."""


def configuration(
    settings: str | Path | Mapping[str, Any], changes: Mapping[str, Any]
) -> RunConfig:
    """Return the configuration of a run: settings, with `changes` laid over them group by group.

    Raises UserError with every problem.
    """
    names = {*(settings if isinstance(settings, Mapping) else ()), *changes}
    refused = [name for name in FOR_COMMANDS if name in names]
    if refused:
        raise UserError(
            f"{', '.join(refused)}: is for the command `cirloop train`, not for Python. Leave it"
            " out."
        )
    content = recipes.merge(
        _content(settings, fast_mode=bool(changes.get("fast_mode"))), dict(changes)
    )
    content.pop("fast_mode", None)
    if isinstance(content.get("mining"), dict):
        content["mining"] = below_strategy(content["mining"])
    try:
        config = RunConfig.model_validate(content)
    except ValidationError as error:
        raise UserError(format_errors(error, RunConfig, ALL_SETTINGS)) from None
    foundation = match_dtype(config.foundation, config.model, by_flag=False)
    return complete(config.model_copy(update={"foundation": foundation}))


def _content(settings: str | Path | Mapping[str, Any], *, fast_mode: bool) -> dict[str, Any]:
    """Return the settings of a mapping, or of a file or recipe."""
    if isinstance(settings, Mapping):
        if fast_mode or settings.get("fast_mode"):
            raise UserError("fast_mode goes with a recipe or a file of settings, such as shapes.")
        return dict(settings)
    source = recipes.CommandLine(
        config=Path(settings),
        fast_mode=fast_mode,
        experiment_dir=None,
        goes_on=False,
        simulated=False,
        types={},
        paths={},
    )
    return recipes.load_settings(source, recipes.CONFIGS / "shapes.yaml")
