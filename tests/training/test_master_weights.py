"""Adapters in the base's dtype: float32 copies take the steps, add up the gradients, and are what
is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cirloop.backbones import LoraSettings, Qwen2VLSettings
from cirloop.backbones.config import Blip2Settings, ClipCombinerSettings
from cirloop.training import TrainingSettings
from cirloop.training.master_weights import MasterWeights
from cirloop.types import UserError
from tests.training.test_trainer import train, trainer_of

BASE = LoraSettings(dtype="base", dropout=0.1)
HALF = {"dtype": "bfloat16"}


def test_steps_too_small_for_half_precision_add_up_in_the_copies() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    master_weights = MasterWeights({"weight": layer.weight}, torch.bfloat16)
    optimizer = torch.optim.SGD(master_weights.copies.values(), lr=1.0)
    for _ in range(40):
        (layer(torch.ones(1, 1, dtype=torch.bfloat16)) * 1e-3).sum().backward()
        assert layer.weight.grad is None and layer.weight.dtype == torch.bfloat16
        optimizer.step()
        optimizer.zero_grad()
        master_weights.copy_to_model()
    assert master_weights.copies["weight"].item() == pytest.approx(0.96, abs=1e-4)
    assert layer.weight.item() == master_weights.copies["weight"].bfloat16().item() < 1.0


def test_gradients_of_chunks_add_up_in_float32() -> None:
    layer = nn.Linear(1, 1, bias=False)
    master_weights = MasterWeights({"weight": layer.weight}, torch.bfloat16)
    for value in (1.0, *[2.0**-9] * 64):  # each of the small ones is lost beside 1 in bfloat16
        layer(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert master_weights.copies["weight"].grad is not None
    assert master_weights.copies["weight"].grad.item() == 1 + 64 * 2.0**-9


@pytest.mark.full
@pytest.mark.parametrize("chunk_size", [0, 3])
def test_around_a_float32_base_nothing_changes(
    chunk_size: int, tmp_path: Path, cache: Path
) -> None:
    states = []
    for dtype in ("float32", "base"):
        lora = LoraSettings(dtype=dtype)
        trainer = trainer_of(tmp_path / dtype, cache, lora=lora, grad_cache_chunk_size=chunk_size)
        trainer.run(lambda steps: steps)
        trainer.save_adapter(tmp_path / dtype)
        states.append(load_file(tmp_path / dtype / "adapter_model.safetensors"))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.full
def test_the_file_holds_the_copies_and_the_model_their_rounding(
    tmp_path: Path, cache: Path
) -> None:
    trainer = trainer_of(tmp_path, cache, model=HALF, lora=BASE)
    log = trainer.run(lambda steps: steps)
    trainer.save_adapter(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    used = trainer.backbone.adapter_state()
    assert {value.dtype for value in saved.values()} == {torch.float32}
    assert {value.dtype for value in used.values()} == {torch.bfloat16}
    assert all(torch.equal(saved[name].bfloat16(), used[name]) for name in saved)
    assert any(not torch.equal(saved[name], used[name].float()) for name in saved)
    trained = Qwen2VLSettings(dtype="bfloat16").build(tmp_path / "adapter")
    assert all(torch.equal(value, saved[name]) for name, value in trained.adapter_state().items())
    plain = trainer_of(tmp_path / "plain", cache, model=HALF, lora=LoraSettings(dtype="float32"))
    theirs = plain.run(lambda steps: steps)
    assert [row["loss"] for row in log] == pytest.approx([row["loss"] for row in theirs], rel=0.1)


@pytest.mark.full
def test_a_stopped_stage_goes_on_to_the_same_bytes(tmp_path: Path, cache: Path) -> None:
    how: dict[str, Any] = {
        "checkpoint_every_steps": 1,
        "model": HALF,
        "lora": BASE,
        "grad_cache_chunk_size": 3,
    }
    whole, log = train(tmp_path / "a", cache, **how)
    train(tmp_path / "b", cache, steps_run=2, **how)
    resumed, resumed_log = train(tmp_path / "b", cache, **how)
    assert resumed_log == log
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("settings", "tuning", "words"),
    [
        (Qwen2VLSettings(), {"finetuning": "dora"}, "training.finetuning dora"),
        (Qwen2VLSettings(), {"finetuning": "full"}, "training.finetuning full"),
        (Qwen2VLSettings(dtype="float16"), {}, "set model.dtype bfloat16"),
        (Blip2Settings(), {}, "not for blip2"),
        (ClipCombinerSettings(), {}, "not for clip_combiner"),
    ],
    ids=["dora", "full", "float16", "blip2", "clip"],
)
def test_what_cannot_be_is_refused(settings: Any, tuning: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=r"training\.lora\.dtype") as error:
        settings.check_training(TrainingSettings(lora=BASE, **tuning))
    assert words.lower() in str(error.value).lower() and "float32" in str(error.value)
