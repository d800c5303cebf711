"""`cirloop.train`: a run from Python."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cirloop.api.runs import Run


def train(config: str | Path | Mapping[str, Any], **changes: object) -> Run:
    """Do a run as `cirloop train` does, and return it.

    `config` is a recipe by its name (`shapes`), a YAML of settings, or the settings as a mapping.
    `changes` are laid over it, group by group: `experiment_dir="shop"`, `num_iterations=1`,
    `training={"batch_size": 16}`; `fast_mode=True` and `auto_resume=True` as on the command line. A
    used directory is refused without `auto_resume`. The closing tables are printed, and the stages
    logged: to standard error where the program has set up no logging. Random numbers drawn outside
    go on as if nothing had run. Raises UserError with every problem before work is spent.
    """
    from cirloop.config.from_python import configuration
    from cirloop.distributed import launcher

    settings = configuration(config, changes)
    launcher.refuse_nested_launch(sys.argv)
    import torch

    from cirloop.api.runs import load_run
    from cirloop.cli import runner
    from cirloop.monitoring.console import run_logging
    from cirloop.reproducibility import prepared_process

    devices = range(torch.cuda.device_count())
    with prepared_process(), run_logging(), torch.random.fork_rng(devices):
        runner.run(settings)
    return load_run(settings.directory)
