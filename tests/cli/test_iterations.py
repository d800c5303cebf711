"""Iterations by name: numbers, `base`, `best` and `last`."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from benchmarks.large_report import Made, make_data, settings
from cirloop.artifacts.store import Store
from cirloop.cli.iterations import best_iteration, find_best, select_iteration, select_iterations
from cirloop.config.run_dir import run_directory
from cirloop.types import UserError


def made_up(home: Path, parts: int | None = None) -> Store:
    """A run of two iterations without a model, whose first `parts` artifacts are finished."""
    make_data(home / "data", 12, 9)
    config = settings(home, 2)
    Made(config, 12, 9, 3).run(parts)
    return run_directory(config.directory)[1]


def test_names_and_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = made_up(tmp_path)
    best = best_iteration(store)
    values = [
        store.load(f"evaluation_iter_{t}.json").read()["metrics"]["recall@1"] for t in range(3)
    ]
    assert best.value == max(values) and values.index(best.value) == best.iteration
    assert select_iterations(None, store) == ["base", "0", "1", "2"]
    with caplog.at_level(logging.INFO, "cirloop"):
        assert select_iterations("base,best,last", store) == list(
            dict.fromkeys(["base", str(best.iteration), "2"])
        )
    assert f"{store.directory}: {best.describe()}" in caplog.text
    assert select_iteration("best", store) == str(best.iteration)


def test_unknown_names_are_answered_with_those_there_are(tmp_path: Path) -> None:
    store = made_up(tmp_path)
    with pytest.raises(UserError, match=r"--iterations 1,7,x: no 7, x here\. There are: base, 0,"):
        select_iterations("1,7,x", store)
    with pytest.raises(UserError, match="--iteration 0,1: give one"):
        select_iteration("0,1", store)


def test_the_best_of_a_run_without_evaluations(tmp_path: Path) -> None:
    trained = made_up(tmp_path / "trained", parts=2)  # the base's evaluation and a checkpoint
    assert find_best(trained) is None
    with pytest.raises(UserError, match=r"no iteration is evaluated yet.*last, which is 0; or go"):
        select_iteration("best", trained)
    assert select_iteration("last", trained) == "0"
    new = made_up(tmp_path / "new", parts=1)
    with pytest.raises(UserError, match="Give --iteration base; or go on"):
        select_iteration("best", new)
    with pytest.raises(UserError, match="no last here"):
        select_iteration("last", new)
