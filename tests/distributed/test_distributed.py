"""Training stages in real processes under `accelerate launch`: DDP and DeepSpeed ZeRO-2 on two CPU
processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cirloop.artifacts.store import Artifact
from cirloop.config.run import save
from cirloop.monitoring.costs import Costs
from cirloop.stages.train import train
from cirloop.types import UserError
from tests.conftest import STEADY
from tests.stages.copies import CHECKPOINT, NEGATIVES, SAMPLES, context, copied

ROOT = Path(__file__).parents[2]
ADAPTER = "checkpoint_iter_1/adapter_model.safetensors"


def trained_again(
    steady: Path, directory: Path, small: Any, runtime: dict[str, Any], dtype: str = "float32"
) -> Artifact:
    """The training stage of iteration 1 with other `runtime` settings, from the artifacts it
    had."""
    training = {**STEADY, "lora": {"dropout": 0.0, "dtype": dtype}}
    config = small(directory, training=training, runtime=runtime)
    run = context(config)
    save(config, directory / "config.json")
    first, negatives, samples = copied(run, steady, CHECKPOINT, NEGATIVES, SAMPLES)
    return train(run, 1, first, [samples], negatives)


CPU_2 = {"accelerate_config": ROOT / "configs/accelerate/cpu_2.yaml"}
ZERO_2 = {"num_processes": 2, "deepspeed": ROOT / "configs/deepspeed/zero2.json"}


@pytest.mark.parametrize(
    ("runtime", "tolerance", "dtype"),
    [
        pytest.param(CPU_2, 1e-5, "float32", id="ddp"),
        pytest.param(CPU_2, 1e-5, "base", id="ddp with copies", marks=pytest.mark.full),
        pytest.param(ZERO_2, 1e-3, "float32", id="zero2", marks=pytest.mark.full),
    ],
)
def test_two_processes_train_what_one_trains(
    runtime: dict[str, Any], tolerance: float, dtype: str, steady: Path, small: Any, tmp_path: Path
) -> None:
    found = trained_again(steady, tmp_path / "run", small, runtime, dtype)
    (spent,) = [
        row for row in Costs(tmp_path / "run").read() if row["stage"] == "checkpoint_iter_1"
    ]
    assert spent["processes"] == 2
    one, two = load_file(steady / ADAPTER), load_file(found.path / "adapter_model.safetensors")
    assert two.keys() == one.keys()
    start = load_file(steady / "checkpoint_iter_0/adapter_model.safetensors")
    moved, other = (
        torch.cat([(state[k] - start[k]).flatten() for k in sorted(one)]) for state in (one, two)
    )
    assert float(moved.norm()) > 0
    assert float(torch.cosine_similarity(moved, other, dim=0)) > 0.95
    losses = [
        [row["loss"] for row in json.loads((checkpoint / "training_log.json").read_text())["rows"]]
        for checkpoint in (steady / "checkpoint_iter_1", found.path)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)


@pytest.mark.full
def test_a_child_that_fails_ends_the_stage_with_the_way_out(
    steady: Path, small: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"zero_optimization": {"stage": 9}}')
    with pytest.raises(UserError, match="--auto_resume"):
        trained_again(steady, tmp_path / "run", small, {"num_processes": 2, "deepspeed": broken})
    assert (tmp_path / "run" / "checkpoint_iter_0").is_dir()
    assert not (tmp_path / "run" / "checkpoint_iter_1").exists()
