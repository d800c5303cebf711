"""Training stages in real processes under `accelerate launch`: DDP and DeepSpeed ZeRO-2 on two CPU processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cirloop import experiment
from cirloop.types import UserError

ROOT = Path(__file__).parent.parent
NO_DROPOUT = {"lora": {"dropout": 0.0}, "learning_rate": 1e-5}
"""Processes draw different dropout; without it two processes must do what one does. Small steps: Adam turns rounding
of near-zero gradients into full steps of either sign, which would drown what is compared."""
ADAPTER = "checkpoint_iter_1/adapter_model.safetensors"


@pytest.fixture(scope="module")
def alone(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("alone") / "run"
    experiment.run(small(directory, training=NO_DROPOUT))
    return directory


def one_round(alone: Path, directory: Path, small: Any, runtime: dict[str, Any]) -> list[dict[str, Any]]:
    """Iteration 1 made anew by two processes, after the same warm-up."""
    shutil.copytree(alone, directory)
    return experiment.run(small(directory, training=NO_DROPOUT, runtime=runtime, resume_from_iteration=1))


@pytest.mark.parametrize(
    "runtime",
    [
        {"num_processes": 2, "accelerate_config": ROOT / "configs/accelerate/cpu_2.yaml"},
        {"num_processes": 2},
        {"num_processes": 2, "deepspeed": ROOT / "configs/deepspeed/zero2.json"},
    ],
    ids=["ddp-config", "ddp", "zero2"],
)
def test_two_processes_train_what_one_trains(
    runtime: dict[str, Any], alone: Path, small: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = one_round(alone, tmp_path / "run", small, runtime)
    kind = "DEEPSPEED" if "deepspeed" in runtime else "MULTI_CPU"
    assert f"training in 2 processes, {kind}" in capfd.readouterr().err
    one, two = load_file(alone / ADAPTER), load_file(tmp_path / "run" / ADAPTER)
    assert two.keys() == one.keys()
    start = load_file(alone / "checkpoint_iter_0/adapter_model.safetensors")
    moved, other = (torch.cat([(state[k] - start[k]).flatten() for k in sorted(one)]) for state in (one, two))
    assert float(moved.norm()) > 0
    assert float(torch.cosine_similarity(moved, other, dim=0)) > 0.95
    losses = [
        [row["loss"] for row in json.loads((d / "checkpoint_iter_1/training_log.json").read_text())["rows"]]
        for d in (alone, tmp_path / "run")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert results[-1]["iteration"] == "1" and results[-1]["metrics"]["recall@50"] > 0


def test_a_child_that_fails_ends_the_stage_with_the_way_out(alone: Path, small: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text('{"zero_optimization": {"stage": 9}}')
    with pytest.raises(UserError, match="--auto_resume"):
        one_round(alone, tmp_path / "run", small, {"num_processes": 2, "deepspeed": broken})
    assert (tmp_path / "run" / "checkpoint_iter_0").is_dir()
    assert not (tmp_path / "run" / "checkpoint_iter_1").exists()
