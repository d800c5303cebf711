"""The trainer: gradient caching changes nothing, resuming changes nothing, training trains."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from cirloop.backbones import LoraSettings, Qwen2VLSettings
from cirloop.backbones.features import VisionCache
from cirloop.data import ShapesSettings
from cirloop.distributed.worker import create_accelerator
from cirloop.training import TrainingSettings
from cirloop.training.batches import BatchSampler
from cirloop.training.optimization import lr_factor
from cirloop.training.trainer import Trainer
from cirloop.types import UserError
from tests.commands import in_two_processes

STEPS = 4


def trainer_of(
    tmp_path: Path,
    cache: Path,
    key: str = "k",
    checkpoint_every_steps: int = 0,
    model: dict[str, Any] | None = None,
    **settings: Any,
) -> Trainer:
    data = ShapesSettings(train_families=4, train_triplets=24, eval_families=2).build().train
    backbone: Any = Qwen2VLSettings(**{"dtype": "float32", **(model or {})}).build()
    options = TrainingSettings(batch_size=8, **settings)
    backbone.make_trainable(options, seed=3)
    batches = BatchSampler(data.triplets, [], [], 8, 0.0, 1, 5)
    features = VisionCache(backbone, data.images, cache / "vision")
    work = tmp_path / "work"
    trainer = Trainer(
        backbone,
        features,
        batches,
        options,
        STEPS,
        7,
        key,
        work,
        checkpoint_every_steps,
        create_accelerator(),
    )
    trainer.module.train()
    return trainer


def train(
    tmp_path: Path,
    cache: Path,
    steps_run: int = STEPS,
    key: str = "k",
    checkpoint_every_steps: int = 0,
    **settings: Any,
) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Adapter and log after `steps_run` of STEPS steps (fewer: the process is stopped there)."""
    trainer = trainer_of(tmp_path, cache, key, checkpoint_every_steps, **settings)

    class Stop(Exception):
        pass

    def until(steps: Any) -> Any:
        for step in steps:
            if step == steps_run:
                raise Stop
            yield step

    with contextlib.suppress(Stop):
        trainer.run(until)
    return trainer.backbone.adapter_state(), trainer.log


def test_every_lora_b_moves_and_the_loss_falls(tmp_path: Path, cache: Path) -> None:
    trainer = trainer_of(tmp_path, cache)
    log = trainer.run(lambda steps: steps)
    state = trainer.backbone.adapter_state()
    assert all(v.any() for k, v in state.items() if "lora_B" in k)
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    assert trainer.engine.backward(0) < 0.9 * log[0]["loss"]


def test_a_step_without_a_loss_moves_nothing_and_is_no_error(tmp_path: Path, cache: Path) -> None:
    """A hinge may be far enough already, or online mining find no valid negative."""
    trainer = trainer_of(tmp_path, cache, num_hard_candidates=1, hard_candidate_margin=-1.9)
    log = trainer.run(lambda steps: steps)
    assert [row["loss"] for row in log] == [0.0] * STEPS
    assert not any(v.any() for k, v in trainer.backbone.adapter_state().items() if "lora_B" in k)


@pytest.mark.parametrize("chunk_size", [3, 8])
def test_gradient_caching_gives_the_same_gradient(
    tmp_path: Path, cache: Path, chunk_size: int
) -> None:
    made = []
    for size in (0, chunk_size):
        trainer = trainer_of(
            tmp_path, cache, lora=LoraSettings(dropout=0.0), grad_cache_chunk_size=size
        )
        with torch.no_grad():
            for number, (name, parameter) in enumerate(trainer.parameters.items()):
                if "lora_B" in name:
                    parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(number))
        loss = trainer.engine.backward(0)
        made.append(
            (loss, [p.grad.clone() for p in trainer.parameters.values() if p.grad is not None])
        )
    (loss, grads), (cached_loss, cached) = made
    assert cached_loss == pytest.approx(loss, rel=1e-5)
    assert len(cached) == len(grads) == len(trainer.parameters)
    for one, other in zip(grads, cached, strict=True):
        assert float((one - other).norm()) < 1e-3 * float(one.norm())


def test_a_stopped_stage_goes_on_to_the_same_bytes(tmp_path: Path, cache: Path) -> None:
    whole, log = train(tmp_path / "a", cache, checkpoint_every_steps=1)
    train(tmp_path / "b", cache, steps_run=2, checkpoint_every_steps=1)
    resumed, resumed_log = train(tmp_path / "b", cache, checkpoint_every_steps=1)
    assert resumed_log == log
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_step_checkpoint_of_another_stage_is_refused(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, steps_run=2, checkpoint_every_steps=1)
    with pytest.raises(UserError, match="other settings or inputs"):
        train(tmp_path, cache, key="another")


def test_an_altered_step_checkpoint_is_named(tmp_path: Path, cache: Path) -> None:
    train(tmp_path, cache, steps_run=2, checkpoint_every_steps=1)
    (state,) = (tmp_path / "work").rglob("state.safetensors")
    data = bytearray(state.read_bytes())
    data[-5] ^= 1
    state.write_bytes(bytes(data))
    with pytest.raises(UserError, match="altered"):
        train(tmp_path, cache)


@pytest.mark.full
def test_gradient_caching_is_exact_with_dropout_for_every_loss(cache: Path) -> None:
    from tests.training.grad_cache import LOSSES, gradients

    errors = {name: gradients(cache, loss) for name, loss in LOSSES.items()}
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.full
def test_gradient_caching_is_exact_with_dropout_in_two_processes(
    cache: Path, tmp_path: Path
) -> None:
    done = in_two_processes("tests/training/grad_cache.py", cache, tmp_path)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert found.pop("processes") == 2
        assert found and max(found.values()) < 1e-5, found


def test_rates_of_their_own_and_schedules(tmp_path: Path, cache: Path) -> None:
    rates = {"lr_overrides": {r".*layers\.0\.": 1e-5}, "learning_rate": 1e-3}
    trainer = trainer_of(tmp_path, cache, **rates, lr_scheduler="cosine")
    groups = trainer.optimizer.param_groups
    by_rate = {group["top"]: sum(p.numel() for p in group["params"]) for group in groups}
    layers = trainer.backbone.vlm.config.text_config.num_hidden_layers
    assert by_rate.keys() == {1e-3, 1e-5} and by_rate[1e-3] == (layers - 1) * by_rate[1e-5]
    shares = [lr_factor(step, STEPS, trainer.settings) for step in range(STEPS)]
    assert shares[0] == 1.0 and sorted(shares, reverse=True) == shares and shares[-1] > 0
    assert shares[2] == pytest.approx((1 - math.cos(math.pi * 2 / 3)) / 2)
    constant = TrainingSettings(lr_scheduler="constant")
    assert [lr_factor(step, STEPS, constant) for step in range(STEPS)] == [1.0] * STEPS
    with pytest.raises(UserError, match=r"vision fit no trained weight, such as model\."):
        trainer_of(tmp_path, cache, lr_overrides={"vision": 1e-5})
