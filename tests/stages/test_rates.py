"""Rates of devices: measured seconds come back from them, other sizes follow the operations, and
a device without any is named with those that there are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cirloop.backbones.weights import resolve
from cirloop.stages import rates, resources
from cirloop.stages.lengths import Lengths, Question
from cirloop.stages.measure import Measured
from cirloop.stages.rates import Rate, Rates
from cirloop.stages.timing import Timing
from cirloop.stages.work import PIECES, Cost
from cirloop.types import UserError

LENGTHS = Lengths(4, (20, 30), (10,), Question(10, 4, 30), Question(10, 4, 40), 12)
MEASURED = Measured(
    {piece: Timing(Cost(0.1, 0.01 * n), 8, 8) for n, piece in enumerate(PIECES, 1)}, 9.0
)


@pytest.fixture
def config(small: Any, tmp_path: Path) -> Any:
    return small(tmp_path / "run")


@pytest.fixture
def table() -> list[Rates]:
    def entry(device: str, weights: int, dtype: str = "float32") -> Rates:
        pieces = {piece: Rate(1e12, 0.001) for piece in PIECES if piece != "load"}
        return Rates(device, "a model", dtype, weights, weights, pieces, 2.0, 0.0, 1.0, "torch")

    return [
        entry("NVIDIA A", 4_000_000),
        entry("NVIDIA A", 2_000_000_000),
        entry("NVIDIA B", 4_000_000),
        entry("NVIDIA B", 2_000_000_000, "bfloat16"),
    ]


def test_operations_of_qwen2_vl_2b() -> None:
    """Against the arithmetic of its layers: 5.11e9 T + 2.62e6 T^2 for an image of T tokens, and
    2.62e9 L + 8.6e4 L^2 for a row of L."""
    sizes = replace(
        resources.model_sizes(resolve("tiny")),
        hidden=1536, layers=28, heads=12, head_width=128,
        language_weights=1_310_000_000, vision_weights=665_000_000,
        vision_layers=32, vision_hidden=1280,
    )  # fmt: skip
    assert sizes.patches_per_token == 4
    for tokens in (64, 188, 256):
        vision = 5.11e9 * tokens + 2.62e6 * tokens**2
        assert resources.vision_flops(sizes, tokens) == pytest.approx(vision, rel=0.05)
        row = 2.62e9 * tokens + 8.6e4 * tokens**2
        assert resources.language_flops(sizes, tokens) == pytest.approx(row, rel=0.01)
    whole = resources.language_flops(sizes, 300)
    parts = resources.language_flops(sizes, 200) + resources.language_flops(sizes, 100, 200)
    assert parts == pytest.approx(whole)


def test_rates_give_back_what_was_measured(config: Any) -> None:
    measured = rates.rates_of(config, LENGTHS, MEASURED)
    costs = rates.costs_of(measured, config, LENGTHS)
    for piece, cost in MEASURED.costs.items():
        if piece != "load":
            assert (costs[piece].call, costs[piece].unit) == pytest.approx((0.1, cost.unit))
    assert costs["load"].unit == MEASURED.costs["load"].unit
    assert measured.device == rates.device_name()
    texts = rates.with_texts(LENGTHS, replace(measured, distinct_share=0.8))
    assert (texts.answer, texts.distinct) == (9, 0.8)
    assert rates.with_texts(LENGTHS, replace(measured, answer_tokens=0.0)) == LENGTHS


def test_costs_follow_images_texts_and_the_model(config: Any, table: list[Rates]) -> None:
    costs = rates.costs_of(table[0], config, LENGTHS)
    larger = rates.costs_of(table[0], config, replace(LENGTHS, image=8.0))
    assert larger["image"].unit > 2 * costs["image"].unit
    longer = rates.costs_of(table[0], config, replace(LENGTHS, queries=(200, 300)))
    assert longer["step"].unit > 5 * costs["step"].unit
    training = config.training.model_copy(update={"grad_cache_chunk_size": 4})
    chunks = rates.costs_of(table[0], config.model_copy(update={"training": training}), LENGTHS)
    assert chunks["step"].unit == pytest.approx(1.5 * costs["step"].unit)
    # a step of decoding reads all weights
    weights = resources.model_sizes(config.model.resolve_dir()).weights
    assert costs["write"].call == pytest.approx(0.001 * weights / 4_000_000)
    assert costs["read"].call == 0.001


def test_the_model_nearest_in_size_is_taken(config: Any, table: list[Rates]) -> None:
    assert rates.choose(table, "nvidia a", config) is table[0]
    assert rates.choose(table, "B", config) is table[2]
    assert rates.warnings(table[0], config) == [
        "texts are planned with captioning.max_new_tokens, the most that they have"
    ]
    assert "2,000 M" in rates.warnings(table[1], config)[0]
    never = replace(table[0], captioner_weights=0)
    assert "no texts were written" in rates.warnings(never, config)[0]


def test_a_device_without_rates_is_told_what_there_is(config: Any, table: list[Rates]) -> None:
    with pytest.raises(UserError, match=r"(?s)has no rates.*NVIDIA B, a model.*gpu_check\.sh"):
        rates.choose(table, "H100", config)
    with pytest.raises(UserError, match="is a part of several names"):
        rates.choose(table, "NVIDIA", config)
    with pytest.raises(UserError, match=r"(?s)There are:\n  none\n.*--measure"):
        rates.choose([], "H100", config)


def test_a_model_without_arithmetic_is_refused(table: list[Rates]) -> None:
    class OtherModel:
        class model:
            type = "clip_combiner"

    other: Any = OtherModel()
    with pytest.raises(UserError, match="no arithmetic is known for clip_combiner"):
        rates.choose(table, "NVIDIA A", other)


def test_a_table_is_extended_and_read_again(config: Any, tmp_path: Path) -> None:
    file = tmp_path / "deep" / "rates.json"
    measured = rates.rates_of(config, LENGTHS, MEASURED)
    rates.extend(file, measured)
    rates.extend(file, replace(measured, device="another"))
    rates.extend(file, replace(measured, load_s=99.0))
    read = rates.read(file)
    assert read[:2] == [replace(measured, device="another"), replace(measured, load_s=99.0)]
    assert read[2:] == rates.read()
    file.write_text('{"schema": 1, "rates": [{"device": "x"}]}', "utf-8")
    with pytest.raises(UserError, match="is no table of rates"):
        rates.read(file)
    with pytest.raises(UserError, match=r"no\.json: there is no such file"):
        rates.read(tmp_path / "no.json")


def test_the_packaged_table_is_of_measured_devices() -> None:
    table = rates.read()
    assert table and all(entry.measured_with.startswith("torch ") for entry in table)
    for entry in table:
        assert {"image", "row", "step", "read", "write"} <= entry.pieces.keys()
        assert all(rate.flops_per_s > 0 and rate.s_per_call >= 0 for rate in entry.pieces.values())
