"""The plan of a dry run: every part is there, and what cannot be loaded is planned by arithmetic.
Its time is counted work by measured costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cirloop.cli import runner
from cirloop.stages import estimate, plan, preflight, timing, work
from cirloop.stages.lengths import WITHOUT_MODEL, Lengths, Question, lengths_of, num_batches
from cirloop.stages.timing import Point, fit, time_rows
from cirloop.stages.work import Cost, Counts

LENGTHS = Lengths(4, (20, 30), (10,), Question(10, 4, 30), Question(10, 4, 40), 12)
COUNTS = Counts(100, 50, 20, 30, 70, failed=0.5)
"""Queries, images, those of the evaluation, all images."""


def rows(config: Any) -> dict[str, str]:
    return dict(estimate.plan_rows(config, preflight.check(config)))


def test_every_part_of_a_plan(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", 0.5)
    captioning = {"batch_size": 4, "max_new_tokens": 6}
    mining = {"anchors": {"num": 4}}
    found = rows(small(tmp_path / "run", captioning=captioning, mining=mining))
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
        *(f"measured: {unit}" for unit in work.PIECES.values()),
        "estimate: vision",
        "estimate: train",
        "estimate: caption, at most",
        "estimate: all",
    }
    assert names <= found.keys()
    for part in ("weights", "adapters and optimizer", "activations", "working space"):
        assert part in found["memory: train"]
    assert "keys and values" in found["memory: caption"]
    assert found["strategy"].endswith(" a query; 4 anchors, 3 neighbours each")
    assert "on the embedder's weights" in found["captioning"]
    assert found["estimate: all"].endswith(" min in all") and not (tmp_path / "run").exists()


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
    assert time_rows(sizes.append, 48)[-1][0] == 48
    assert sizes[:2] == [2, 2] and sizes[-1] == 48 and sizes == sorted(sizes)


def test_two_points_give_what_a_call_and_a_unit_take() -> None:
    def point(calls: float, units: float) -> Point:
        return Point(calls, units, 0.5 * calls + 0.01 * units)

    cost = fit(point(1, 20), point(1, 200))
    assert (cost.call, cost.unit) == pytest.approx((0.5, 0.01))
    cost = fit(point(10, 640), point(3, 640))  # the same rows in other batches
    assert (cost.call, cost.unit) == pytest.approx((0.5, 0.01))
    noisy = fit(Point(1, 20, 0.1), Point(1, 200, 2.0))  # a call would take less than nothing
    assert (noisy.call, noisy.unit) == pytest.approx((0.0, 0.01))


def test_a_dry_run_compares_with_the_directory(small: Any, finished: Path) -> None:
    from cirloop.types import UserError

    with pytest.raises(UserError, match="other settings"):
        runner.dry_run(small(finished, seed=9, auto_resume=True))


def units(stages: work.Stages, stage: str, piece: str) -> float:
    return sum(each.units for each in stages[stage] if each.piece == piece)


def test_a_round_is_counted(small: Any, tmp_path: Path) -> None:
    config = small(
        tmp_path / "run",
        captioning={"num_candidates": 2, "min_verify_probability": 0.5, "batch_size": 8},
        training={"batch_size": 8, "augmented_fraction": 0.25, "steps_per_iteration": 3},
    )
    stages = work.of_round(config, COUNTS, LENGTHS)
    assert units(stages, "mine", "row") == 100 * 25 + 50 * 10
    assert units(stages, "mine", "search") == 100 * 50
    # two images each for half of the queries, two texts each
    assert units(stages, "caption", "write") == 200 * 12
    reads = 50 * 10 + 100 * 4 + 100 * 30 + 50 * 10 + 100 * 4 + 200 * 40
    assert units(stages, "caption", "read") == reads
    assert units(stages, "caption", "row") == 200 * 25  # the round trip
    fewer = work.of_round(config, COUNTS, replace(LENGTHS, distinct=0.5))
    assert units(fewer, "caption", "row") == 100 * 25
    # an explicit negative for half of the plain half, and for half of those with a text
    assert units(stages, "train", "step") == 3 * (16 + 8 * (0.5 * 0.5 + 0.25 * 0.5)) / 2
    assert units(stages, "evaluate", "load") == 1
    once = work.once(config, COUNTS, LENGTHS)
    assert units(once, "vision", "image") == 70
    assert units(once, "train 0", "step") == 6 * 8
    assert units(once, "evaluate base, 0", "row") == 2 * (20 * 25 + 30 * 10)
    # 50 right pairs, and nine wrong texts for the images of each
    assert units(once, "judge", "read") == 50 * 10 + 50 * 4 + 500 * 40


def test_ranking_for_negatives_reads_the_texts_of_all_rounds_so_far(
    small: Any, tmp_path: Path
) -> None:
    def planned(rows: str) -> work.Stages:
        config = small(
            tmp_path / "run",
            num_iterations=3,
            mining={"num_rounds": 2},
            training={"negatives": {"type": "ranked", "rows": rows}},
        )
        return work.of_round(config, COUNTS, LENGTHS)

    texts = 100 * (1 + 2 + 2) / 3  # two images each for half of the queries
    gallery = round(50 / 3) * 10  # in the round that does not mine, and the 100 queries
    rows = units(planned("all"), "rank negatives", "row")
    assert rows == round(texts + 100 / 3) * 25 + gallery
    assert units(planned("all"), "rank negatives", "rank") == pytest.approx((100 + texts) * 50)
    assert units(planned("human"), "rank negatives", "row") == round(100 / 3) * 25 + gallery
    assert units(planned("human"), "rank negatives", "rank") == 100 * 50


def test_no_more_anchors_are_planned_than_there_are_images(small: Any, tmp_path: Path) -> None:
    def written(num: int) -> float:
        config = small(tmp_path / "run", mining={"anchors": {"num": num}})
        return units(work.of_round(config, COUNTS, LENGTHS), "caption", "write")

    assert written(20) < written(50) == written(999)


CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"captioning": {"enabled": False}}, "caption"),
    ({"captioning": {"enabled": False}}, "judge"),
    ({"captioning": {"min_verify_probability": 0.5, "min_judge_auc": 0}}, "judge"),
    ({"captioning": {"min_verify_probability": 0.5}, "num_iterations": 0}, "judge"),
    ({"num_iterations": 0}, "mine"),
]


@pytest.mark.parametrize(("changes", "stage"), CHANGES)
def test_what_a_run_leaves_out_is_not_planned(
    small: Any, tmp_path: Path, changes: dict[str, Any], stage: str
) -> None:
    config = small(tmp_path / "run", **changes)
    costs = dict.fromkeys(work.PIECES, Cost(0.0, 1.0))
    planned = plan.plan(config, COUNTS, LENGTHS, costs)
    assert stage not in {**planned.once, **planned.round}


def test_devices_share_all_but_loading_and_searching(small: Any, tmp_path: Path) -> None:
    def planned(num: int) -> plan.Plan:
        config = small(tmp_path / "run", num_iterations=3, runtime={"num_processes": num})
        return plan.plan(config, COUNTS, LENGTHS, {**costs, "load": Cost(0.0, 7.0)})

    costs = {**dict.fromkeys(work.PIECES, Cost(0.1, 0.01)), "search": Cost(0.0, 0.0)}
    one, four = planned(1), planned(4)
    assert four.round["mine"] == pytest.approx(one.round["mine"] / 4)
    assert four.round["train"] - 7 == pytest.approx((one.round["train"] - 7) / 4)
    assert one.total == pytest.approx(sum(one.once.values()) + 3 * one.of_round)
    assert one.rows()[-1][0] == "all" and float(one.rows()[-1][2]) > 0


def test_rounds_that_mine_are_counted_and_stages_without_a_cost_named(
    small: Any, tmp_path: Path
) -> None:
    config = small(tmp_path / "run", num_iterations=4, mining={"num_rounds": 1})
    costs = dict.fromkeys(work.PIECES, Cost(0.0, 0.01))
    assert plan.plan(config, COUNTS, LENGTHS, costs).num_rounds == {
        "mine": 1, "caption": 1, "train": 4, "evaluate": 4,
    }  # fmt: skip
    del costs["write"]
    planned = plan.plan(config, COUNTS, LENGTHS, costs)
    assert planned.unknown == ("caption",)
    assert ("caption", "not known", "not known") in planned.rows()


def test_batches_have_rows_of_one_length() -> None:
    assert num_batches((5, 5, 7, 9), 400, 64, 0) == 4 + 2 + 2  # 200, 100 and 100 rows
    assert num_batches((10,), 400, 64, 200) == 20


@pytest.mark.parametrize("prompt_format", ["instruction", "chat"])
def test_lengths_are_the_models_own(small: Any, tmp_path: Path, prompt_format: str) -> None:
    from cirloop.captioning.base import CaptionRequest
    from cirloop.monitoring import profiling
    from cirloop.retrieval.embed import query_items
    from cirloop.stages.models import Models

    config = small(tmp_path / "run", model={"prompt_format": prompt_format})
    data = preflight.check(config)
    lengths = lengths_of(config, data)
    models = Models(config)
    backbone = models.load(models.embedder(None))
    features = models.vision_cache(models.embedder(None), data.train)
    triplets = data.train.triplets
    items = query_items([triplet.query for triplet in triplets])
    features.precompute([item.image for item in items])
    grids = features.grids([item.image for item in items])
    own = [backbone.sequence_length(each, grid) for each, grid in zip(items, grids, strict=True)]
    assert list(lengths.queries) == own[: len(lengths.queries)]
    captioner = models.captioner(models.embedder(None), data.train)
    prompts = config.captioning.prompts(config.foundation)
    requests = [CaptionRequest(t.query.reference, t.target, t.query.text) for t in triplets[:1]]
    images = [image for request in requests for image in (request.reference, request.image)]
    with profiling.metering() as spent:
        captioner.yes_probability(prompts.verify, requests, features.get(images))
    (text,) = [request.text for request in requests]
    assert spent.tokens == pytest.approx(lengths.verify.tokens(1, 1, 1), abs=len(text.split()) + 3)


def test_other_embedders_have_rows_of_one_token(small: Any, tmp_path: Path) -> None:
    class OtherModel:
        model = object()

    other: Any = OtherModel()
    assert lengths_of(other, preflight.check(small(tmp_path / "run"))) == WITHOUT_MODEL


def growing(make: Callable[[float], float]) -> bool:
    values = [make(factor) for factor in (1, 2, 4)]
    return all(math.isfinite(v) for v in values) and values[0] < values[1] < values[2]


def test_longer_rows_take_longer(small: Any, tmp_path: Path) -> None:
    config = small(tmp_path / "run")
    costs = dict.fromkeys(work.PIECES, Cost(0.0, 0.01))

    def mining(factor: float) -> float:
        longer = replace(LENGTHS, queries=tuple(round(factor * n) for n in LENGTHS.queries))
        return plan.plan(config, COUNTS, longer, costs).round["mine"]

    assert growing(mining)
