"""Live models at every stage of a loop: never more than one whole set of base weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2VLForConditionalGeneration

from cirloop.cli import runner
from cirloop.distributed import launcher
from cirloop.monitoring import events

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


class Census:
    """Counts the models that are in memory: whenever one is built, at each step of training, where
    each stage begins and ends, and when processes are launched. Those that no one refers to any
    more, but in a cycle, count too."""

    def __init__(self) -> None:
        gc.collect()
        self._before = {id(each) for each in self._alive()}
        self.stage, self.most, self.at_launch = "the start", dict[str, int](), list[int]()
        self.built = 0

    @staticmethod
    def _alive() -> list[Any]:
        return [each for each in gc.get_objects() if type(each) is Qwen2VLForConditionalGeneration]

    def count(self) -> int:
        num = sum(id(each) not in self._before for each in self._alive())
        self.most[self.stage] = max(num, self.most.get(self.stage, 0))
        return num

    def hear(self, kind: str, what: dict[str, Any]) -> None:
        if kind == "begins":
            self.stage = what["name"]
        if kind in ("begins", "ended", "step"):
            self.count()


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Iterator[Census]:
    made, build, launched = Census(), Qwen2VLForConditionalGeneration.__init__, launcher._run

    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        made.built += 1
        made.count()

    def with_none(*args: Any, **kwargs: Any) -> None:
        made.at_launch.append(made.count())
        launched(*args, **kwargs)

    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "__init__", counted)
    monkeypatch.setattr(launcher, "_run", with_none)
    with events.subscribe(made.hear):
        yield made


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


@pytest.mark.full
def test_the_driver_holds_none_while_processes_work(
    census: Census, small: Any, tmp_path: Path
) -> None:
    config = small(
        tmp_path / "run",
        evaluation={"evaluate_base": False},
        runtime={"num_processes": 2},
        data=LITTLE["data"],
        captioning={**LITTLE["captioning"], "max_round_trip_rank": 0},
        training={**LITTLE["training"], "iteration_0_steps": 0},
    )
    runner.run(config)
    assert census.at_launch and set(census.at_launch) == {0}
    assert max(census.most.values()) == 1


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
