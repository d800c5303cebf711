"""ZeRO-3 and FSDP2 in two real processes: trained as one process trains, and saved whole."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cirloop.backbones import LoraSettings, Qwen2VLSettings
from cirloop.config.runtime import Runtime
from cirloop.distributed import launcher
from tests.distributed.sharded import items
from tests.training.test_trainer import trainer_of

ROOT = Path(__file__).resolve().parents[2]
RUNTIMES = {
    "zero3": Runtime(num_processes=2, deepspeed=ROOT / "configs/deepspeed/zero3.json"),
    "fsdp2": Runtime(accelerate_config=ROOT / "configs/accelerate/cpu_2_fsdp2.yaml"),
}


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", RUNTIMES)
def test_weights_in_pieces_are_trained_and_saved_whole(
    kind: str, dtype: str, cache: Path, tmp_path: Path
) -> None:
    """Adapters in float32, of a base in either."""
    lora, model = LoraSettings(dropout=0.0), {"dtype": dtype}
    alone = trainer_of(tmp_path / "alone", cache, lora=lora, model=model)
    start = {name: value.clone() for name, value in alone.backbone.adapter_state().items()}
    log = alone.run(lambda steps: steps)
    one = alone.backbone.adapter_state()
    words = [str(ROOT / "tests/distributed/sharded.py"), str(cache), str(tmp_path), dtype]
    command = [*launcher.launch_command(RUNTIMES[kind]), *words]
    environment = launcher.worker_environment(RUNTIMES[kind].deepspeed) | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    done = subprocess.run(
        command, env=environment, timeout=300, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2)]
    # what is uneven is padded
    assert all(row["share"] < 0.6 for row in rows), "the weights were not in pieces"
    assert {row["kind"] for row in rows} == {{"zero3": "DEEPSPEED", "fsdp2": "FSDP"}[kind]}
    for row in rows:
        assert [r["loss"] for r in row["log"]] == pytest.approx([r["loss"] for r in log], rel=1e-2)
    two = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert {k: v.shape for k, v in two.items()} == {k: v.shape for k, v in one.items()}
    moved, other = (
        torch.cat([(state[k] - start[k]).flatten() for k in sorted(one)]) for state in (one, two)
    )
    assert float(moved.norm()) > 0 and float(torch.cosine_similarity(moved, other, dim=0)) > 0.9
    # one process loads the adapter and scores as the training processes did
    backbone = Qwen2VLSettings(dtype=dtype).build(tmp_path / "adapter")
    backbone.module.eval()
    with torch.inference_mode():
        rows_ = [backbone.module(alone.engine._inputs_of([item])) for item in items(alone)]
    found = torch.cat(rows_).numpy()
    # ZeRO-3 has a product of its own, which rounds bfloat16 otherwise
    apart = 5e-3 if dtype == "bfloat16" else 1e-5
    assert np.abs(found - np.load(tmp_path / "vectors.npy")).max() < apart
