"""The plan of a dry run: every part is there, and what cannot be loaded is planned by
arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cirloop.cli import runner
from cirloop.stages import estimate, measure, preflight
from cirloop.stages.measure import time_rows


def rows(config: Any) -> dict[str, str]:
    return dict(estimate.plan_rows(config, preflight.check(config)))


def test_every_part_of_a_plan(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "BUDGET_S", 0.5)
    found = rows(small(tmp_path / "run", captioning={"batch_size": 4, "max_new_tokens": 6}))
    names = {
        "device",
        "strategy",
        "loss",
        "tuning",
        "captioning",
        "memory: embed",
        "memory: train",
        "memory: caption",
        "disk: vision cache",
        "disk: checkpoints",
        "measured: an image in the tower",
        "measured: an embedding, vision cached",
        "measured: a triplet in a step",
        "measured: an image's texts, written and judged",
        "estimate: train",
        "estimate: all",
    }
    assert names <= found.keys()
    for part in ("weights", "adapters and optimizer", "activations", "working space"):
        assert part in found["memory: train"]
    assert "keys and values" in found["memory: caption"]
    assert "on the embedder's weights" in found["captioning"]
    assert found["estimate: all"].endswith(" h") and not (tmp_path / "run").exists()


def test_a_model_too_large_for_the_machine_is_planned_without_time(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "_device_memory", lambda: (10**6, 10**6))
    found = rows(small(tmp_path / "run"))
    assert "cannot be loaded here" in found["time"] and "0.001 GB are free" in found["time"]
    assert "more than the 0.001 GB of this device" in found["memory: train"]
    assert not [name for name in found if name.startswith(("measured", "estimate"))]


def test_adapters_in_half_precision_take_less(small: Any, tmp_path: Path) -> None:
    def trains(dtype: str) -> int:
        config = small(
            tmp_path / "run", model={"dtype": "bfloat16"}, training={"lora": {"dtype": dtype}}
        )
        return estimate.peak_memory(config, 64)["train"]["activations"]

    assert trains("base") < 0.75 * trains("float32")


def test_timing_grows_to_the_full_batch_or_stops_at_the_budget() -> None:
    sizes: list[int] = []
    assert time_rows(sizes.append, 48).rows == 48
    assert sizes[:2] == [2, 2] and sizes[-1] == 48 and sizes == sorted(sizes)


def test_a_dry_run_compares_with_the_directory(small: Any, finished: Path) -> None:
    from cirloop.types import UserError

    with pytest.raises(UserError, match="other settings"):
        runner.dry_run(small(finished, seed=9, auto_resume=True))
