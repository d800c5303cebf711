"""`--early_stopping N`: the run ends and says so, and a run that was cut off ends at the same
round."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from cirloop.cli import runner
from cirloop.config.run import RunConfig
from cirloop.monitoring import events
from cirloop.stages.evaluate import summary
from cirloop.types import UserError
from tests.evaluation.test_best import evaluations
from tests.report.pages import read


@pytest.fixture
def simulated(small: Any, tmp_path: Path) -> Any:
    """Makes runs without a model, whose evaluations are all alike: no round improves."""

    def make(name: str, patience: int, **changes: Any) -> RunConfig:
        return small(  # type: ignore[no-any-return]
            tmp_path / name,
            retrieval="simulated",
            foundation={"type": "template"},
            captioning={"min_verify_probability": 0.0, "max_round_trip_rank": 0},
            data={"train_families": 3, "train_triplets": 12, "eval_families": 3},
            evaluation={"early_stopping": patience},
            **{"num_iterations": 4, **changes},
        )

    return make


def test_a_run_ends_where_rounds_do_not_improve(
    simulated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = simulated("run", 1, num_iterations=3)
    with caplog.at_level(logging.INFO, "cirloop"):
        results = runner.run(config)
    assert [row["iteration"] for row in results] == ["base", "0", "1"]
    assert "the run ends after round 1 of 3, since 1 round has not improved" in caplog.text
    content = json.loads((config.directory / "evaluation_results.json").read_text())
    assert content["stopped_early"] == {"after": 1, "patience": 1}
    assert content["best"]["iteration"] == 0
    page = read((config.directory / "report.html").read_text("utf-8"))
    assert "Stopped early. The run ended after round 1 of 3" in page.text
    assert "Best. Iteration 0, by recall@1" in page.text and "Still missing" not in page.text


def test_a_run_that_was_cut_off_ends_at_the_same_round(simulated: Any) -> None:
    """Interrupted when the deciding evaluation is done, and before it is noted."""
    whole = simulated("whole", 1)
    runner.run(whole)
    broken = simulated("broken", 1, runtime={"report": False})

    def interrupt(kind: str, payload: dict[str, Any]) -> None:
        if kind == "ended" and payload["name"] == "evaluation_iter_1.json":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), events.subscribe(interrupt):
        runner.run(broken)
    results = runner.run(broken.model_copy(update={"auto_resume": True}))
    assert results[-1]["iteration"] == "1"
    for name in ("evaluation_results.json", "manifest.json"):
        assert (broken.directory / name).read_bytes() == (whole.directory / name).read_bytes()
    again = runner.run(broken.model_copy(update={"auto_resume": True}))
    assert len(again) == 3


def test_patience_may_change_and_finished_rounds_stay(simulated: Any, tmp_path: Path) -> None:
    config = simulated("run", 1, runtime={"report": False})
    runner.run(config)
    longer = simulated("run", 2, auto_resume=True, runtime={"report": False})
    assert runner.run(longer)[-1]["iteration"] == "2"
    shutil.copytree(longer.directory, tmp_path / "copy")
    shorter = simulated("copy", 1, auto_resume=True, runtime={"report": False})
    assert runner.run(shorter)[-1]["iteration"] == "2"


def test_a_run_that_did_all_rounds_was_not_stopped(simulated: Any) -> None:
    rows = [
        {**row, "ranks": [["q", 1, row["metrics"]["recall@1"], "r"]]}
        for row in evaluations(0.4, 0.3, 0.2)
    ]
    config = simulated("run", 2, num_iterations=3)
    assert summary(rows, config)["stopped_early"] == {"after": 2, "patience": 2}
    shorter = config.model_copy(update={"num_iterations": 2})
    assert "stopped_early" not in summary(rows, shorter)


def test_what_makes_no_sense_is_refused_at_once(simulated: Any) -> None:
    config = simulated("run", 4)
    evaluation = config.evaluation.model_copy(update={"split": "test"})
    with pytest.raises(UserError, match="2 problems") as error:
        runner.run(config.model_copy(update={"evaluation": evaluation}))
    message = str(error.value)
    assert "--early_stopping 4: goes by val, and evaluation.split is test" in message
    assert "cannot end a run of --num_iterations 4 before its last one" in message
    assert not (config.directory / "config.json").exists()
