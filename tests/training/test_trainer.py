"""The trainer: gradient caching changes nothing, resuming changes nothing, training trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cirloop.backbones import LoraSettings, Qwen2VLSettings
from cirloop.backbones.features import VisionFeatures
from cirloop.data import ShapesSettings
from cirloop.training import TrainingSettings
from cirloop.training.batches import Batches
from cirloop.training.trainer import Trainer
from cirloop.types import UserError
from cirloop.worker import accelerator

STEPS = 4


def train(
    tmp_path: Path, cache: Path, steps_run: int = STEPS, key: str = "k", save_every: int = 0, **settings: Any
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Adapter and log after `steps_run` of STEPS steps (fewer: the process is stopped there)."""
    data = ShapesSettings(train_families=4, train_triplets=24, eval_families=2).build().train
    backbone: Any = Qwen2VLSettings(dtype="float32").build()
    backbone.add_lora(LoraSettings(), seed=3)
    options = TrainingSettings(batch_size=8, **settings)
    batches = Batches(data.triplets, [], [], 8, 0.0, 0, 5)
    features = VisionFeatures(backbone, data.images, cache / "vision")
    trainer = Trainer(
        backbone, features, batches, options, STEPS, 7, key, tmp_path / "work", save_every, accelerator()
    )

    class Stop(Exception):
        pass

    def until(steps: Any) -> Any:
        for step in steps:
            if step == steps_run:
                raise Stop
            yield step

    try:
        trainer.run(until)
    except Stop:
        pass
    return backbone.adapter_state(), trainer.log


def test_every_lora_b_moves_and_the_loss_falls(tmp_path: Path, cache: Path) -> None:
    state, log = train(tmp_path, cache)
    assert all(v.any() for k, v in state.items() if "lora_B" in k)
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("chunk_size", [3, 8])
def test_gradient_caching_gives_the_same_training(tmp_path: Path, cache: Path, chunk_size: int) -> None:
    lora = LoraSettings(dropout=0.0)
    whole, log = train(tmp_path / "a", cache, lora=lora)
    parts, cached_log = train(tmp_path / "b", cache, lora=lora, chunk_size=chunk_size)
    assert [r["loss"] for r in cached_log] == pytest.approx([r["loss"] for r in log], rel=1e-3)
    for key, value in whole.items():
        assert torch.allclose(parts[key], value, atol=2e-4), key


def test_a_stopped_stage_goes_on_to_the_same_bytes(tmp_path: Path, cache: Path) -> None:
    whole, log = train(tmp_path / "a", cache, save_every=1)
    train(tmp_path / "b", cache, steps_run=2, save_every=1)
    resumed, resumed_log = train(tmp_path / "b", cache, save_every=1)
    assert resumed_log == log
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_step_checkpoint_of_another_stage_is_refused(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, steps_run=2, save_every=1)
    with pytest.raises(UserError, match="other settings or inputs"):
        train(tmp_path, cache, key="another")


def test_an_altered_step_checkpoint_is_named(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, steps_run=2, save_every=1)
    (state,) = (tmp_path / "work").rglob("state.safetensors")
    data = bytearray(state.read_bytes())
    data[-5] ^= 1
    state.write_bytes(bytes(data))
    with pytest.raises(UserError, match="altered"):
        train(tmp_path, cache)
