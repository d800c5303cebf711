"""What DeepSpeed and FSDP do not allow, from the files that configure them."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cirloop.config.run import RunConfig
from cirloop.config.runtime import Runtime
from cirloop.io import parse
from cirloop.types import UserError
from cirloop.validation import ValidationReport


def check_sharding(config: RunConfig, problems: ValidationReport) -> None:
    """Check the DeepSpeed JSON, and the settings of a run that trains under DeepSpeed or FSDP."""
    runtime = config.runtime
    if runtime.deepspeed is not None:
        _check_deepspeed(runtime.deepspeed, problems)
    kind, zero_stage = strategy_of(runtime)
    if kind == "FSDP" or zero_stage == 3:
        config.model.check_sharded(problems)
    if config.training.lora.dtype == "base" and kind in ("DEEPSPEED", "FSDP"):
        problems.add(
            "training.lora.dtype base",
            "is not available under DeepSpeed or FSDP; set it to float32",
        )
    for name in ("grad_cache_chunk_size", "max_skipped_batches"):
        if kind == "DEEPSPEED" and getattr(config.training, name):
            problems.add(f"training.{name}", "is not available under DeepSpeed; set it to 0")


def strategy_of(runtime: Runtime) -> tuple[object, object]:
    """Return accelerate's `distributed_type` and the stage of ZeRO, as the files say them.

    None is what they do not say, or what cannot be read, which ends the launch.
    """
    if runtime.deepspeed is not None:
        return "DEEPSPEED", _zero_stage(runtime.deepspeed)
    launch = _mapping(runtime.accelerate_config, parse.read_yaml)
    kind = launch.get("distributed_type")
    deepspeed = launch.get("deepspeed_config")
    if kind != "DEEPSPEED" or not isinstance(deepspeed, dict):
        return kind, None
    file = deepspeed.get("deepspeed_config_file")
    return kind, deepspeed.get("zero_stage") if file is None else _zero_stage(Path(str(file)))


def _zero_stage(file: Path) -> object:
    content = _mapping(file, lambda path: parse.parse_json(parse.read_text(path)))
    zero = content.get("zero_optimization")
    return zero.get("stage") if isinstance(zero, dict) else None


def _mapping(file: Path | None, read: Callable[[Path], Any]) -> dict[str, Any]:
    """Return what a file holds; nothing where it cannot be read or holds something else."""
    try:
        content = read(file) if file is not None and file.is_file() else None
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}


def _check_deepspeed(file: Path, problems: ValidationReport) -> None:
    """Check that the package is installed, and that step checkpoints can be kept with `file`."""
    if find_spec("deepspeed") is None:
        problems.add(
            "--deepspeed",
            "needs the package deepspeed (pip install 'cirloop[train]'); or leave it out",
        )
    if not file.is_file():
        return
    name = f"--deepspeed {file}"
    try:
        content = parse.parse_json(parse.read_text(file))
    except UserError as error:
        problems.add(name, f"{error}; give a file such as those of configs/deepspeed/")
        return
    zero = content.get("zero_optimization") if isinstance(content, dict) else None
    zero = zero if isinstance(zero, dict) else {}
    if zero.get("stage") not in (1, 2, 3):
        problems.add(
            name,
            f"zero_optimization.stage is {zero.get('stage')!r}; set it to 2 or 3, or leave"
            " --deepspeed out, where weights are whole (--num_processes N alone is DDP)",
        )
    offload = zero.get("offload_optimizer")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        problems.add(
            name,
            "zero_optimization.offload_optimizer.device is nvme, from which there are no step"
            " checkpoints; set it to cpu or none",
        )
