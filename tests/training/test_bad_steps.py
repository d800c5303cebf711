"""Steps that go wrong: no finite loss, too little memory, a checkpoint half removed. And a loss
that does not fall."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from cirloop.backbones import LoraSettings
from cirloop.monitoring import preemption
from cirloop.training.health import NonFiniteBatch, loss_warning
from cirloop.training.trainer import Trainer
from cirloop.types import UserError
from tests.commands import in_two_processes
from tests.training.test_trainer import STEPS, train, trainer_of

STEADY: dict[str, Any] = {"lora": LoraSettings(dropout=0.0), "learning_rate": 1e-5}
"""Adam turns rounding of near-zero gradients into full steps of either sign: small ones, and no
dropout."""


class Stop(Exception):
    pass


def until(last: int, seen: Callable[[int], None] = lambda step: None) -> Any:
    """Steps up to `last`, from 0, where the process is killed; `seen` is told each."""

    def steps(numbers: Any) -> Iterator[int]:
        for step in numbers:
            if step == last:
                raise Stop
            seen(step)
            yield step

    return steps


@contextmanager
def poisoned(trainer: Trainer, *bad: int) -> Iterator[Any]:
    """Steps; those in `bad` have embeddings that are not finite."""
    now = [-1]
    hook = trainer.backbone.module.register_forward_hook(
        lambda _module, _inputs, out: out * math.nan if now[0] in bad else out
    )
    yield lambda last=STEPS: until(last, lambda step: now.__setitem__(0, step))
    hook.remove()


def adapter(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.backbone.adapter_state().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_is_not_finite_stops_the_stage_with_the_batch(
    tmp_path: Path, cache: Path
) -> None:
    trainer = trainer_of(tmp_path, cache)
    with poisoned(trainer, 1) as steps, pytest.raises(NonFiniteBatch) as caught:
        trainer.run(steps())
    ids = [query.id for query in trainer.batches[1].queries]
    assert caught.value.row == {"step": 2, "loss": "nan", "grad_norm": "nan", "ids": ids}
    assert ids[0] in str(caught.value)
    assert "--max_skipped_batches 1 --auto_resume" in str(caught.value)
    assert len(trainer.log) == 1


def test_a_gradient_that_is_not_finite_stops_the_stage(tmp_path: Path, cache: Path) -> None:
    trainer = trainer_of(tmp_path, cache)
    weight = next(weight for name, weight in trainer.parameters.items() if "lora_B" in name)
    weight.register_hook(lambda grad: grad + math.inf)
    with pytest.raises(NonFiniteBatch) as caught:
        trainer.run(lambda steps: steps)
    row = caught.value.row
    assert isinstance(row["loss"], float) and row["grad_norm"] in ("inf", "nan")


@pytest.mark.parametrize("bad", [(0,), (2,)])
def test_a_bad_batch_is_left_out_by_choice_and_a_resumed_stage_does_the_same(
    bad: tuple[int], tmp_path: Path, cache: Path
) -> None:
    options = {"checkpoint_every_steps": 1, "max_skipped_batches": 1}
    whole, states = trainer_of(tmp_path / "a", cache, **options), list[Any]()
    with poisoned(whole, *bad) as steps:
        whole.run(until_state(steps(), whole, states))
    assert equal(states[bad[0]], states[bad[0] + 1]), "a step was taken"
    assert [row["step"] for row in whole.log] == [1, 2, 3, 4]
    assert [row["step"] for row in whole.log if "ids" in row] == [bad[0] + 1]
    json.dumps(whole.log, allow_nan=False)
    for _ in range(2):
        part = trainer_of(tmp_path / "b", cache, **options)
        with poisoned(part, *bad) as steps, suppress(Stop):
            part.run(steps(3 if not list((tmp_path / "b").rglob("state.json")) else STEPS))
    assert part.log == whole.log and equal(adapter(part), adapter(whole))


def until_state(steps: Any, trainer: Trainer, states: list[Any]) -> Any:
    """The adapter before each step, and after the last."""

    def watched(numbers: Any) -> Iterator[int]:
        for step in steps(numbers):
            states.append(adapter(trainer))
            yield step
        states.append(adapter(trainer))

    return watched


def test_one_bad_batch_more_than_may_be_left_out_stops_the_stage(
    tmp_path: Path, cache: Path
) -> None:
    trainer = trainer_of(tmp_path, cache, max_skipped_batches=1)
    with (
        poisoned(trainer, 1, 3) as steps,
        pytest.raises(NonFiniteBatch, match=r"step 4 of 4[\s\S]*--max_skipped_batches 2"),
    ):
        trainer.run(steps())


@pytest.mark.full
@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_run_writes_the_bad_batch_and_goes_on_with_a_higher_limit(
    num_processes: int,
    small: Any,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    from cirloop.cli import runner

    # weights overflow
    training = {"learning_rate": 1e30, "lr_warmup_ratio": 0.9, "iteration_0_steps": 8}
    settings = {
        "num_iterations": 0,
        "evaluation": {"evaluate_base": False},
        "training": training,
        "runtime": {"num_processes": num_processes},
    }
    with pytest.raises(UserError, match=r"bad_batch\.json") as caught:
        runner.run(small(tmp_path / "run", **settings))
    found = json.loads((tmp_path / "run" / "bad_batch.json").read_text())
    assert found["schema"] == 1 and found["iteration"] == 0 and found["loss"] == "nan"
    assert len(found["ids"]) == 12
    assert found["ids"][0] in str(caught.value) and not (tmp_path / "run" / "run.lock").exists()
    more = settings | {"training": training | {"max_skipped_batches": 1}, "auto_resume": True}
    # every batch is bad now: one more stops it
    with pytest.raises(UserError, match="--max_skipped_batches 2"):
        runner.run(small(tmp_path / "run", **more))
    said = f"step {found['step']} is left out (bad batch 1 of at most 1)"
    assert said in caplog.text + capfd.readouterr().err


@contextmanager
def narrow(trainer: Trainer, most: int) -> Iterator[list[int]]:
    """An embedder whose memory suffices for `most` rows; the rows of each call."""
    asked = list[int]()

    def look(_module: Any, inputs: Any) -> None:
        asked.append(len(inputs[0]["attention_mask"]))
        if asked[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = trainer.backbone.module.register_forward_pre_hook(look)
    yield asked
    hook.remove()


@pytest.mark.parametrize(
    ("chunk_size", "way_out"),
    [
        (5, "--training.grad_cache_chunk_size 2 "),
        pytest.param(0, "--training.grad_cache_chunk_size 4 ", marks=pytest.mark.full),
    ],
)
def test_a_step_that_runs_out_of_memory_names_the_chunk_size_to_try(
    chunk_size: int, way_out: str, tmp_path: Path, cache: Path
) -> None:
    trainer = trainer_of(tmp_path, cache, grad_cache_chunk_size=chunk_size)
    with (
        narrow(trainer, 4),
        pytest.raises(UserError, match="training step 1: CUDA out of memory") as caught,
    ):
        trainer.run(lambda steps: steps)
    assert way_out in str(caught.value) and "--auto_resume" in str(caught.value)
    trainer = trainer_of(tmp_path, cache, grad_cache_chunk_size=int(way_out.split()[1]))
    with narrow(trainer, 4) as asked:
        trainer.run(lambda steps: steps)
    assert max(asked) <= 4 and len(trainer.log) == STEPS


@pytest.mark.full
def test_a_stage_that_ran_out_of_memory_goes_on_in_smaller_chunks(
    tmp_path: Path, cache: Path
) -> None:
    whole = trainer_of(tmp_path / "a", cache, **STEADY)
    whole.run(lambda steps: steps)
    with suppress(Stop):
        trainer_of(tmp_path / "b", cache, checkpoint_every_steps=1, **STEADY).run(until(2))
    resumed = trainer_of(
        tmp_path / "b", cache, checkpoint_every_steps=1, grad_cache_chunk_size=3, **STEADY
    )
    resumed.run(lambda steps: steps)
    for one, other in zip(resumed.log, whole.log, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_where_one_row_is_too_large_the_error_says_what_else_to_set(
    tmp_path: Path, cache: Path
) -> None:
    trainer = trainer_of(tmp_path, cache, grad_cache_chunk_size=1)
    with narrow(trainer, 0), pytest.raises(UserError, match=r"model\.max_pixels") as caught:
        trainer.run(lambda steps: steps)
    assert "chunk_size" not in str(caught.value)


def test_memory_that_runs_out_in_the_optimizer_is_said(tmp_path: Path, cache: Path) -> None:
    trainer = trainer_of(tmp_path, cache)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    trainer.optimizer.optimizer.register_step_pre_hook(fail)
    with pytest.raises(UserError, match="training step 1: CUDA out of memory") as caught:
        trainer.run(lambda steps: steps)
    assert "training.grad_cache_chunk_size" in str(caught.value)


@pytest.mark.full
@pytest.mark.parametrize(
    "lost", ["state.json", pytest.param("state.safetensors", marks=pytest.mark.full)]
)
def test_a_checkpoint_half_removed_is_passed_over(lost: str, tmp_path: Path, cache: Path) -> None:
    whole, log = train(tmp_path / "a", cache, checkpoint_every_steps=1)
    train(tmp_path / "b", cache, steps_run=3, checkpoint_every_steps=1)
    (newest,) = (tmp_path / "b" / "work").glob("step_*")
    shutil.copytree(newest, older := newest.with_name("step_000001"))
    (older / lost).unlink()
    assert train(tmp_path / "b", cache, checkpoint_every_steps=1)[1] == log  # the newest is whole
    train(tmp_path / "c", cache, steps_run=3, checkpoint_every_steps=1)
    (tmp_path / "c" / "work" / "step_000003" / lost).unlink()
    train(tmp_path / "c", cache, steps_run=2, checkpoint_every_steps=1)
    assert [path.name for path in (tmp_path / "c" / "work").iterdir()] == ["step_000002"]
    resumed, resumed_log = train(tmp_path / "c", cache, checkpoint_every_steps=1)
    assert resumed_log == log and equal(resumed, whole)
    assert [path.name for path in (tmp_path / "c" / "work").iterdir()] == ["step_000003"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"step": 1, "key": "k", "digest": "d"}'])
def test_a_damaged_record_of_a_checkpoint_is_named(
    content: str, tmp_path: Path, cache: Path
) -> None:
    train(tmp_path, cache, steps_run=2, checkpoint_every_steps=1)
    (record,) = (tmp_path / "work").rglob("state.json")
    record.write_text(content)
    with pytest.raises(UserError, match=r"Delete (it|its directory) to train") as caught:
        train(tmp_path, cache)
    assert str(record.parent) in str(caught.value)


@pytest.mark.full
def test_asked_to_stop_it_ends_after_the_step_and_goes_on_to_the_same_bytes(
    tmp_path: Path, cache: Path
) -> None:
    whole, log = train(tmp_path / "a", cache)
    part, order = trainer_of(tmp_path / "b", cache), tmp_path / "stop"
    with preemption.handle_sigterm(order), pytest.raises(preemption.GracefulStop):
        part.run(until(STEPS, lambda step: order.touch() if step == 1 else None))
    assert [path.name for path in (tmp_path / "b" / "work").iterdir()] == ["step_000002"]
    resumed, resumed_log = train(tmp_path / "b", cache)
    assert resumed_log == log and equal(resumed, whole)
    last = trainer_of(tmp_path / "c", cache)
    with preemption.handle_sigterm(order):
        steps = until(STEPS, lambda step: order.touch() if step == 3 else order.unlink(True))
        assert len(last.run(steps)) == STEPS


@pytest.mark.full
def test_two_processes_stop_and_leave_out_together(cache: Path, tmp_path: Path) -> None:
    done = in_two_processes("tests/training/bad_steps.py", cache, tmp_path)
    assert done.returncode != 0, "the last part ends in an error"
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(2))
    assert first == second, done.stderr[-3000:]
    assert first["skipped"] == [2] and first["stopped"] == ["step_000003"]
    said = (tmp_path / "said.txt").read_text()
    assert "training step 1: CUDA out of memory" in said
    assert "--training.grad_cache_chunk_size 2 --auto_resume" in said


def test_a_loss_that_does_not_fall_is_told_from_one_that_does() -> None:
    noise = torch.randn(80, generator=torch.Generator().manual_seed(1)).tolist()
    flat = [2.0 + 0.1 * n for n in noise]
    falling = [loss - 0.01 * i for i, loss in enumerate(flat)]
    rising = [loss + 0.01 * i for i, loss in enumerate(flat)]
    of_flat = loss_warning(flat, 0)
    assert of_flat is not None and of_flat.startswith("the loss did not fall: ")
    assert "first 20 steps" in of_flat and "standard error of 0.0" in of_flat
    assert loss_warning(falling, 0) is None
    assert loss_warning(rising, 0) is not None
    assert loss_warning([2.0] * 31, 0) is None, "too few steps to tell"
    assert loss_warning([2.0] * 32, 0) is not None


def test_a_later_iteration_is_warned_of_where_its_loss_rose() -> None:
    noise = torch.randn(80, generator=torch.Generator().manual_seed(1)).tolist()
    flat = [2.0 + 0.1 * n for n in noise]
    assert loss_warning(flat, 1) is None, "it starts from a trained model"
    of_rising = loss_warning([loss + 0.01 * i for i, loss in enumerate(flat)], 1)
    assert of_rising is not None and of_rising.startswith("the loss rose: ")
    assert "a difference of +0." in of_rising


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
