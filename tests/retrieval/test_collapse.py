"""Collapsed embeddings are measured as a naive count would, and warned of where a run uses them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cirloop.artifacts.store import Store
from cirloop.data.dataset import with_grey_images
from cirloop.data.paths import DataPaths
from cirloop.retrieval.collapse import SAMPLED, mean_cosine
from cirloop.stages.context import RunContext


def unit(*shape: int, shift: float = 0.0) -> Any:
    made = np.random.default_rng(3).standard_normal(shape) + shift
    return (made / np.linalg.norm(made, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_the_mean_cosine_is_that_of_all_pairs(shift: float) -> None:
    vectors = unit(40, 8, shift=shift)
    cosines = vectors @ vectors.T
    assert mean_cosine(vectors, 0) == pytest.approx(
        cosines[~np.eye(40, dtype=bool)].mean(), abs=1e-6
    )


def test_at_most_a_thousand_rows_are_looked_at_and_several_vectors_are_pooled() -> None:
    many = unit(3 * SAMPLED, 4, shift=1.0)
    assert mean_cosine(many, 0) == mean_cosine(many, 0) != mean_cosine(many, 1)
    assert mean_cosine(many, 0) == pytest.approx(mean_cosine(many, 1), abs=0.05)
    several = np.repeat(unit(20, 1, 8), 3, axis=1)
    assert mean_cosine(several, 0) == pytest.approx(mean_cosine(several[:, 0], 0), abs=1e-6)
    assert mean_cosine(many[:1], 0) is None


def test_a_run_warns_of_collapsed_embeddings_once_and_keeps_it(
    small: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small(tmp_path / "run")
    run = RunContext(
        config,
        Store(tmp_path / "run"),
        config.data.build(DataPaths(None, config.cache, lambda items, _: items)),
    )
    part = run.data.eval_splits("val")[0]
    with caplog.at_level(logging.WARNING), run.costs.stage("a", False):
        run.gallery_embeddings(run.embedder(None), part)
        assert not caplog.records
        for _ in range(2):
            run.gallery_embeddings(
                run.embedder(None), with_grey_images(part)
            )  # every image the same
    (said,) = [record.getMessage() for record in caplog.records]
    assert "a cosine of 1.0000 on average" in said
    with run.costs.stage("b", False):
        pass
    rows = json.loads((tmp_path / "run" / "costs.json").read_text())["stages"]
    assert [len(row.get("warnings", [])) for row in rows] == [1, 0]
