"""How a run is carried out: what no result depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from cirloop.config.base import Settings


class Runtime(Settings):
    """Settings that cannot change results; outside every fingerprint."""

    vision_batch_size: int = Field(8, ge=1)
    """Images in the vision tower at once."""
    embed_batch_size: int = Field(64, ge=1)
    """Rows embedded at once, at most: rows of one length are."""
    max_tokens_per_batch: int = Field(0, ge=0)
    """So many tokens embedded at once, instead of a number of rows; 0 = `embed_batch_size`."""
    num_workers: int = Field(2, ge=0)
    """Threads that decode and preprocess images ahead of the vision tower; 0 = none."""
    num_processes: int = Field(1, ge=1)
    """Processes of each stage; more than one are children under `accelerate launch`."""
    hang_timeout_minutes: float = Field(30, gt=0)
    """Minutes that the processes of a stage wait for each other before they end, and the run with
    them."""
    accelerate_config: Path | None = None
    """An `accelerate launch --config_file`."""
    deepspeed: Path | None = None
    """A DeepSpeed JSON; training runs under DeepSpeed."""
    cache_dir: Path | None = None
    """Where vision features are kept; by default `cache/` beside the run directory."""
    answers_dir: Path | None = None
    """Where the foundation model's answers are kept, so that other runs that ask the same do not
    ask again (docs/servers.md); by default in the run directory, until the run is done."""
    feature_cache_max_gb: float = Field(0, ge=0)
    """Size that vision features may take there, in 10^9 bytes, before those not used for longest
    are deleted; what this run has used stays. 0 = no limit."""
    checkpoint_every_steps: int = Field(50, ge=0)
    """Steps between step checkpoints; 0 = none."""
    report: bool = True
    """Write `report.html` anew after each iteration and at the end."""
    report_examples: int | None = Field(None, ge=1)
    """Examples of each kind in `report.html`; by default 4 queries won and 4 lost, 6 queries with
    mined images, 4 texts."""
    compare_with: Path | None = None
    """Another run directory, whose recalls `report.html` draws beside this run's."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Where losses, recalls and costs go while the run works, such as tensorboard,wandb; nowhere by
    default (docs/watching.md)."""
    profile: bool = False
    """Write torch profiler traces of a few batches into `profile/` of the run directory, and count
    floating-point operations for each stage's cost (docs/costs.md)."""
