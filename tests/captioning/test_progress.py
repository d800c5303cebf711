"""Captioning tells how many texts a second it writes, in its bar, and in what its stage cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import TemplateFoundation
from cirloop.captioning.prompts import REWRITE
from cirloop.data.images import DrawnImages
from cirloop.monitoring import events, profiling
from cirloop.monitoring.console import progress
from cirloop.monitoring.costs import describe, format_cells
from cirloop.monitoring.events import CountedBatches
from cirloop.types import ImageId


def test_a_rate_is_what_the_batches_so_far_hold_by_their_seconds() -> None:
    batches = CountedBatches(["a", "b", "c"], [10, 30, 5], "texts/s")
    assert (batches.rate(0, 1.0), batches.rate(2, 4.0), batches.rate(3, 0.5)) == (
        "",
        "10 texts/s",
        "90 texts/s",
    )
    assert len(batches) == 3 and [*batches] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("share", "unit"), [((0, 1), "texts/s"), ((0, 2), "texts/s in each of 2 processes")]
)
def test_bars_of_captioning_have_a_rate_and_the_stage_too(
    share: tuple[int, int], unit: str, tmp_path: Path
) -> None:
    def undrawn(image: ImageId) -> Any:
        raise AssertionError("the template looks at no image")

    eyes = BatchedCaptioner(
        TemplateFoundation().build(), DrawnImages(undrawn), tmp_path, 2, progress, share=share
    )
    requests = [CaptionRequest(ImageId(str(n)), ImageId("x"), "make it red") for n in range(8)]
    news: list[dict[str, Any]] = []
    with profiling.metering() as spent, events.subscribe(lambda kind, what: news.append(what)):
        eyes.generate(
            REWRITE, requests, CaptioningSettings().max_new_tokens, [0.0, 0.7], 0, "captions"
        )
    rates = [what["rate"] for what in news]
    assert rates[0] == rates[-1] == ""
    assert all(re.fullmatch(rf"[\d.e+]+ {unit}", rate) for rate in rates[1:-1])
    assert len(rates) == 1 + 4 // share[1]
    assert spent.texts == 16 / share[1] and spent.writing > 0
    row = {**spent.to_json(), "seconds": 10.0}
    shown = format_cells(row)["texts/s"]
    assert float(shown) == pytest.approx(spent.texts / spent.writing, rel=0.01)
    assert f"{shown} texts/s" in describe(row)
