"""A training stage of two real processes that was stopped goes on as if it had not been, whatever
holds its weights."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cirloop.config.runtime import Runtime
from cirloop.distributed import launcher
from tests.training.test_trainer import STEPS

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
FSDP2 = Runtime(accelerate_config=CONFIGS / "accelerate/cpu_2_fsdp2.yaml")


def zero(work: Path, stage: int, num_processes: int, **more: Any) -> Runtime:
    settings = json.loads((CONFIGS / f"deepspeed/zero{stage}.json").read_text())
    file = work / "zero.json"
    file.write_text(json.dumps(settings | more))
    return Runtime(num_processes=num_processes, deepspeed=file)


def rows(
    runtime: Runtime, work: Path, cache: Path, dtype: str, *stopped: Path
) -> list[dict[str, Any]]:
    """What each process of tests/distributed/resumed.py found."""
    script = ROOT / "tests/distributed/resumed.py"
    words = [str(script), str(cache), str(work), dtype, *map(str, stopped)]
    environment = launcher.worker_environment(runtime.deepspeed) | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    done = subprocess.run(
        [*launcher.launch_command(runtime), *words],
        env=environment, timeout=600, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(file.read_text()) for file in sorted(work.glob("rank_*.json"))]


def went_on(row: dict[str, Any], taken: int = STEPS) -> None:
    """From the third step, to the same log and bits."""
    assert row["steps"] == [*range(2, STEPS)]
    assert row["equal_log"] and row["differing"] == [] and row["taken"] == taken
    assert row["dtypes"] == ["torch.float32"]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_in_float32_and_under_another_strategy(kind: str, cache: Path, tmp_path: Path) -> None:
    """What ZeRO-2 left, another goes on with: a state is whole, and its key says nothing of who
    held the weights."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    found = rows(zero(first, 2, 2), first, cache, "float32")
    other = zero(second, 3, 2) if kind == "zero3" else FSDP2
    found += rows(other, second, cache, "float32", first / "stopped")
    assert len(found) == 4
    for row in found:
        went_on(row)
    for row in found[2:]:
        assert row["other"] == pytest.approx(row["losses"], rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize(("stage", "num_processes"), [(2, 2), (3, 3)])
def test_in_bfloat16_with_its_float32_weights(
    stage: int, num_processes: int, cache: Path, tmp_path: Path
) -> None:
    """Weights in bfloat16, of which ZeRO has float32 copies; three processes cut them into pieces
    with a rest."""
    runtime = zero(tmp_path, stage, num_processes, bf16={"enabled": True})
    found = rows(runtime, tmp_path, cache, "bfloat16")
    assert len(found) == num_processes
    for row in found:
        went_on(row)


@pytest.mark.full
def test_in_float16_with_its_loss_scale(cache: Path, tmp_path: Path) -> None:
    """The scale is too large for the first step, which is skipped, and then doubles."""
    scale = {"initial_scale_power": 15, "loss_scale_window": 1, "hysteresis": 1}
    runtime = zero(tmp_path, 2, 2, fp16={"enabled": True, **scale})
    for row in rows(runtime, tmp_path, cache, "float16"):
        went_on(row, STEPS - 1)
        assert row["scale"]["loss_scale/cur_scale"] == 2.0**16
        assert row["scale"]["loss_scale/last_overflow_iter"] == 0
