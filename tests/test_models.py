"""Live models at every stage of a loop: never more than one whole set of base weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cirloop.cli import runner
from tests.census import Census, counted

FILTERS = [{"type": "verify", "threshold": 0.9}, {"type": "agreement", "path": "tiny"}]
OWN = {"attention": "eager"}
"""Of a foundation model that is not the embedder's base."""
LITTLE: dict[str, Any] = {
    "data": {"train_families": 2, "train_triplets": 8, "eval_families": 2},
    "captioning": {"num_candidates": 1, "max_new_tokens": 4, "min_verify_probability": 0.1},
    "training": {
        "iteration_0_steps": 1,
        "steps_per_iteration": 1,
        "batch_size": 4,
        "negatives_in_batch": 1,
    },
}


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Iterator[Census]:
    with counted(monkeypatch) as count:
        yield count


@pytest.mark.full
@pytest.mark.parametrize(
    ("foundation", "filters"),
    [
        pytest.param({}, [], id="shared base"),
        pytest.param(OWN, [], id="a model of its own"),
        pytest.param({}, FILTERS, id="shared base, filters"),
        pytest.param(OWN, FILTERS, id="a model of its own, filters"),
    ],
)
def test_one_set_of_base_weights_at_every_stage(
    census: Census, small: Any, tmp_path: Path, foundation: dict[str, Any], filters: list[Any]
) -> None:
    config = small(
        tmp_path / "run",
        foundation=foundation,
        mining={
            "strategy": {"type": "top_k", "negatives_per_query": 1, "extra_ranks": "all"},
            "filters": filters,
        },
        **LITTLE,
    )
    runner.run(config)
    stages = {
        "judge_iter_1.json",
        "hard_negatives_iter_0.json",
        "augmented_samples_iter_1.json",
        "checkpoint_iter_0",
        "checkpoint_iter_1",
        "evaluation_base.json",
        "evaluation_iter_0.json",
        "evaluation_iter_1.json",
    }
    assert stages <= census.most.keys()
    assert {name: num for name, num in census.most.items() if num > 1} == {}, census.most
    assert census.built >= 5  # base, warm-up, its embedder, training, its embedder


def test_a_released_model_is_gone_with_its_vision_features(census: Census, finished: Path) -> None:
    from cirloop.cli.evaluate import run_directory
    from cirloop.stages.context import RunContext

    config, store = run_directory(finished)
    run = RunContext(config, store, config.data.build(None))
    embedder = run.embedder(None)
    assert census.count() == 0
    features = run.models.vision_cache(embedder, run.data.train)
    assert census.count() == 1 and features is run.models.vision_cache(embedder, run.data.train)
    del features
    run.models.release()
    assert census.count() == 0
