"""Faults between writes: exceptions, a lack of memory, a loss that is no number, signals. A run
goes on after each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cirloop.artifacts import run_lock
from tests.faults.fault_case import REFUSED, goes_on
from tests.faults.harness import Harness
from tests.tiers import one_in

STOPPED = 75
INTERRUPTED = 130

STAGES = {
    "training.gradient_engine:GradientEngine.backward": "checkpoint_iter_1",
    "training.trainer:Trainer._save": "checkpoint_iter_1",
    "backbones.features:VisionCache.compute": "evaluation_base.json",
    "stages.context:embed": "hard_negatives_iter_0.json",
    "captioning.batched_captioner:BatchedCaptioner.generate": "augmented_samples_iter_1.json",
    "stages.mine:mine_split": "hard_negatives_iter_0.json",
    "evaluation.protocols:metrics": "evaluation_iter_1.json",
    "distributed.launcher:run_training": "checkpoint_iter_0",
}
"""Functions of stages, and the stage that meets them."""
STEP = "training.gradient_engine:GradientEngine.backward"


def stopped(harness: Harness, site: str, kind: str, nth: int = 1) -> tuple[Path, Any, str | None]:
    stages, stage = harness.stages(), STAGES[site]
    ends = None if stage == "evaluation_iter_1.json" else stages[stages.index(stage) + 1]
    directory = harness.case(stage)
    ended = harness.child(directory, "run", ends, call={"site": site, "kind": kind, "nth": nth})
    assert ended.fired, ended.said
    return directory, ended, ends


@pytest.mark.parametrize(("site", "kind"), one_in(20, STAGES, ["RuntimeError", "MemoryError"]))
def test_an_exception_in_a_stage(site: str, kind: str, harness: Harness) -> None:
    directory, ended, ends = stopped(harness, site, kind)
    assert (
        ended.code in ((1, REFUSED) if kind == "MemoryError" else (1,)) and "injected" in ended.said
    ), ended.said
    goes_on(harness, directory, "run", ends)


@pytest.mark.parametrize(
    "site",
    one_in(
        3,
        [
            "stages.context:embed",
            "backbones.features:VisionCache.compute",
            "captioning.batched_captioner:BatchedCaptioner.generate",
        ],
    ),
)
def test_out_of_memory_in_inference(site: str, harness: Harness) -> None:
    """Ends the run, or is overcome by smaller batches; the files are the same."""
    directory, ended, ends = stopped(harness, site, "OutOfMemoryError")
    assert ended.code in (0, 1, REFUSED), ended.said
    goes_on(harness, directory, "run", ends)


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "nth"),
    one_in(8, ["RuntimeError", "OutOfMemoryError", "KeyboardInterrupt", "SIGKILL"], [1, 4]),
)
def test_in_a_step_before_and_after_a_step_checkpoint(
    kind: str, nth: int, harness: Harness
) -> None:
    directory, ended, ends = stopped(harness, STEP, kind, nth)
    expected = {
        "KeyboardInterrupt": {INTERRUPTED},
        "SIGKILL": {-9},
        "OutOfMemoryError": {1, REFUSED},
    }
    assert ended.code in expected.get(kind, {1}), ended.said
    steps = sorted(path.name for path in (directory / "run/.work/checkpoint_iter_1").glob("step_*"))
    assert steps == (["step_000002"] if nth > 2 else [])
    goes_on(harness, directory, "run", ends)


@pytest.mark.parametrize("nth", one_in(2, [1, 4]))
def test_a_loss_that_is_no_number(nth: int, harness: Harness) -> None:
    STAGES["training.losses:info_nce"] = "checkpoint_iter_1"
    directory, ended, ends = stopped(harness, "training.losses:info_nce", "NaN", nth)
    assert ended.code in (1, REFUSED) and "nan" in ended.said, ended.said
    bad = directory / "run" / "bad_batch.json"
    assert bad.exists()
    goes_on(harness, directory, "run", ends)


@pytest.mark.parametrize("site", one_in(20, STAGES))
def test_asked_to_stop(site: str, harness: Harness) -> None:
    directory, ended, ends = stopped(harness, site, "SIGTERM")
    assert ended.code in (STOPPED, 0) and "Traceback" not in ended.said, ended.said
    assert ended.code == 0 or "--auto_resume" in ended.said
    if site == STEP:
        assert ended.code == STOPPED
        assert [*(directory / "run/.work/checkpoint_iter_1").glob("step_000001")]
    goes_on(harness, directory, "run", ends)


def test_a_second_run_is_refused_and_a_killed_ones_lock_hinders_nobody(harness: Harness) -> None:
    directory, _, ends = stopped(harness, STEP, "SIGKILL")
    left = {directory / "run" / name for name in (run_lock.FILE, run_lock.OWNER)}
    assert all(path.exists() for path in left)
    with run_lock.run_lock(directory / "run"):
        refused = harness.child(directory, "run", ends)
    assert refused.code == REFUSED and "a run works in" in refused.said
    goes_on(harness, directory, "run", ends)
    assert not any(path.exists() for path in left)
