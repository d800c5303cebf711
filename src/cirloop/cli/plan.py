"""Minutes of a run by stage on a device and a number of them, from rates measured there.

    cirloop plan --config cirr_qwen2_vl --data_dir data/cirr --device H100 --num_devices 8
    cirloop plan --config shop.yaml --measure --rates rates.json

No GPU is needed: a table has what such a device does in a second (docs/costs.md). `--measure` plans
for this machine by what the run's own model and data take here, a minute or two.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from pydantic import Field
from pydantic_settings import SettingsConfigDict

from cirloop.config import cli, recipes, run
from cirloop.config.run import RunConfig
from cirloop.data.paths import DataPaths
from cirloop.monitoring.console import progress, table
from cirloop.types import UserError

logger = logging.getLogger(__name__)
PROGRAM = "cirloop plan"


class PlanConfig(cli.Flags):
    """Prints the minutes of a run by stage, on a device and a number of them, from rates that were
    measured on such a device. All flags of cirloop train are flags here too."""

    model_config = SettingsConfigDict(cli_implicit_flags=True)

    device: str | None = None
    """The device, or a part of its name, such as H100; by default this machine's."""
    num_devices: int = Field(1, ge=1)
    """So many of them, each with a process of its own."""
    failed_share: float = Field(1.0, gt=0, le=1)
    """Share of the training queries whose target is not ranked first, where images are mined for
    these alone; 1 plans for all."""
    rates: Path | None = None
    """A table of rates that goes before the package's own; --measure extends it."""
    measure: bool = False
    """Measure the rates here and now, with the run's model and data."""


def main(argv: Sequence[str]) -> None:
    """Print the plan. Raises UserError for wrong flags, missing data, or a device without rates."""
    own, rest = _split(argv)
    options = cli.parse_flags(PlanConfig, own, PROGRAM)
    settings = run.load(rest, recipes.CONFIGS / "shapes.yaml")
    if options.measure and options.device is not None:
        raise UserError("--measure measures this machine: leave --device out, or --measure.")
    processes = settings.runtime.model_copy(update={"num_processes": options.num_devices})
    settings = settings.model_copy(update={"runtime": processes})
    show(options, settings)


def show(options: PlanConfig, config: RunConfig) -> None:
    """Plan a run and print its table."""
    # torch and transformers load here, after the flags are known to be right
    from cirloop.stages import estimate, preflight
    from cirloop.stages import rates as rates_
    from cirloop.stages.lengths import lengths_of
    from cirloop.stages.plan import plan
    from cirloop.stages.work import counts_of

    rates_.vision_language_model(config)  # or an error, before anything is read
    if options.measure:
        data = preflight.check(config)
        lengths = lengths_of(config, data)
        rates = rates_.rates_of(config, lengths, estimate.measure_here(config, data))
        if options.rates is not None:
            rates_.extend(options.rates, rates)
    else:
        device = options.device or rates_.device_name()
        rates = rates_.choose(rates_.read(options.rates), device, config)
        paths = DataPaths(config.data_dir, config.cache, progress, config.train_dir)
        data = config.open_data(paths)
        lengths = lengths_of(config, data)
    lengths = rates_.with_texts(lengths, rates)
    counts = counts_of(config, data, options.failed_share)
    planned = plan(config, counts, lengths, rates_.costs_of(rates, config, lengths))
    title = f"{options.num_devices} x {rates.device}: minutes by stage, of {config.num_iterations}"
    title += f" rounds; rates of {rates.model} ({rates.weights / 1e6:,.0f} M) in {rates.dtype}"
    table(title, ("stage", "a round", "in all"), planned.rows())
    for warning in rates_.warnings(rates, config):
        logger.warning("%s", warning)


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into this command's flags and those of a run."""
    own: list[str] = []
    rest: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, has_value, _ = cli.underscored([word])[0].partition("=")
        if word in ("--help", "-h"):
            return [word], []
        if name.removeprefix("--") not in PlanConfig.model_fields or not name.startswith("--"):
            rest.append(word)
            continue
        own.append(word)
        if not has_value and name != "--measure" and words:
            own.append(words.pop(0))
    return own, rest
