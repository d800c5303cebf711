"""Rounds that cannot help: a warning says why; with `stop_on_futile_round` the run ends there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cirloop.cli import runner
from cirloop.config.run import RunConfig, from_json
from cirloop.stages.futile import nothing_accepted, nothing_mined
from tests.captioning.chat_server import MODEL, ChatServer, Reply, by_rule, chat, logprobs, serving
from tests.report.pages import read

TEMPLATE = {"type": "template"}
UNCHECKED = {"min_verify_probability": 0.0, "max_round_trip_rank": 0}
DROP_ALL = {"filters": [{"type": "score_margin", "margin": 1e9}]}
JUDGE = "judge_iter_1.json"
NO_REPORT = {"report": False}
STOP = {"stop_on_futile_round": True}


@pytest.fixture
def simulated(small: Any, tmp_path: Path) -> Any:
    """Makes runs of two rounds without an embedder; their texts are a rule's."""

    def make(**changes: Any) -> RunConfig:
        settings = {"foundation": TEMPLATE, "captioning": UNCHECKED, "num_iterations": 2} | changes
        data = {"train_families": 3, "train_triplets": 12, "eval_families": 3}
        return small(  # type: ignore[no-any-return]
            tmp_path / "run", retrieval="simulated", data=data, **settings
        )

    return make


def says_yes(body: dict[str, Any]) -> Reply:
    """A text by a rule, and the same verdict on every text."""
    return chat("yes", **logprobs(yes=0.9, no=0.1)) if body.get("logprobs") else by_rule(body)


@pytest.fixture
def yes_sayer() -> Iterator[ChatServer]:
    with serving(says_yes) as server:
        yield server


def judged_by(server: ChatServer) -> dict[str, Any]:
    return {
        "foundation": {"type": "server", "path": MODEL, "url": [server.url]},
        "captioning": {"min_verify_probability": 0.5, "max_round_trip_rank": 0},
    }


def content(config: RunConfig, name: str) -> Any:
    return json.loads((config.directory / name).read_text("utf-8"))


def resumed(config: RunConfig, **changes: Any) -> list[str]:
    """The evaluations after going on with a run."""
    settings = {**json.loads(config.model_dump_json()), "auto_resume": True, **changes}
    return [row["iteration"] for row in runner.run(RunConfig(**settings))]


def verdicts(server: ChatServer) -> int:
    return sum(bool(body.get("logprobs")) for body in server.requests)


def test_a_judge_that_says_yes_to_everything_ends_the_run_before_it_mines(
    simulated: Any, yes_sayer: ChatServer, caplog: pytest.LogCaptureFixture
) -> None:
    config = simulated(**judged_by(yes_sayer), **STOP)
    with caplog.at_level(logging.WARNING, "cirloop"):
        results = runner.run(config)
    assert [row["iteration"] for row in results] == ["base", "0"]
    judge = content(config, JUDGE)
    assert judge["summary"]["auc"] == 0.5 and judge["summary"]["standard_error"] == 0
    num_pairs = judge["summary"]["right"] + judge["summary"]["wrong"]
    assert len(judge["pairs"]) == num_pairs == verdicts(yes_sayer) == len(yes_sayer.requests)
    stopped = content(config, "evaluation_results.json")["stopped_early"]
    assert stopped["after"] == 0 and "AUC is 0.50 ± 0.00 on 12 right" in stopped["reason"]
    assert caplog.text.count("hardly tells right texts from wrong ones") == 3
    assert "ended after round 0 of 2 by --stop_on_futile_round" in caplog.text
    page = read((config.directory / "report.html").read_text("utf-8"))
    assert "Stopped early. The run ended after round 0 of 2: the foundation model" in page.text
    (table,) = (rows for title, rows in page.tables.items() if "tells right texts" in title)
    assert table[1][3:] == ["0.500 ± 0.000", "0.7"]


def test_a_stopped_run_stays_stopped_and_goes_on_without_the_setting(
    simulated: Any, yes_sayer: ChatServer
) -> None:
    config = simulated(**judged_by(yes_sayer), **STOP, runtime=NO_REPORT)
    runner.run(config)
    asked = verdicts(yes_sayer)
    assert resumed(config) == ["base", "0"]
    assert verdicts(yes_sayer) == asked, "the judge is measured once in a run"
    measured = (config.directory / JUDGE).read_bytes()
    assert resumed(config, stop_on_futile_round=False) == ["base", "0", "1", "2"]
    assert (config.directory / JUDGE).read_bytes() == measured
    assert "stopped_early" not in content(config, "evaluation_results.json")
    assert resumed(config, stop_on_futile_round=True)[-1] == "2", "finished rounds stay"
    assert content(config, "config.json")["stop_on_futile_round"] is True


def test_by_default_a_weak_judge_is_a_warning_of_its_stage(
    simulated: Any, yes_sayer: ChatServer
) -> None:
    config = simulated(**judged_by(yes_sayer), num_iterations=1)
    assert runner.run(config)[-1]["iteration"] == "1"
    (row,) = (row for row in content(config, "costs.json")["stages"] if row["stage"] == JUDGE)
    (warning,) = row["warnings"]
    assert "captioning.min_judge_auc is 0.7" in warning and "another" in warning
    page = read((config.directory / "report.html").read_text("utf-8"))
    assert "iteration 1, judging: the foundation model" in page.text
    assert "Finished. All artifacts" in page.text


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"foundation": {"type": "catalogue"}, "captioning": {"min_verify_probability": 0.5}},
    ],
    ids=["no verdict is asked for", "exact verdicts"],
)
def test_a_judge_that_need_not_be_measured_is_not(simulated: Any, changes: Any) -> None:
    config = simulated(num_iterations=1, **changes)
    runner.run(config)
    assert not (config.directory / JUDGE).exists()


def test_a_floor_of_zero_measures_nothing_and_texts_are_never_measured_after(
    simulated: Any, yes_sayer: ChatServer
) -> None:
    settings = judged_by(yes_sayer)
    off = {**settings["captioning"], "min_judge_auc": 0.0}
    config = simulated(**settings | {"captioning": off}, num_iterations=1)
    runner.run(config)
    assert not (config.directory / JUDGE).exists()
    captioning = {**config.captioning.model_dump(mode="json"), "min_judge_auc": 0.7}
    assert resumed(config, captioning=captioning, num_iterations=2)[-1] == "2"
    assert not (config.directory / JUDGE).exists()
    page = read((config.directory / "report.html").read_text("utf-8"))
    assert "Finished. All artifacts of 2" in page.text


def test_nothing_to_mine_ends_the_run_by_the_setting(
    simulated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = simulated(mining=DROP_ALL, **STOP)
    with caplog.at_level(logging.WARNING, "cirloop"):
        results = runner.run(config)
    assert [row["iteration"] for row in results] == ["base", "0"]
    assert "no image was mined for 12 queries" in caplog.text
    assert "mining.filters dropped" in caplog.text
    assert not (config.directory / "augmented_samples_iter_1.json").exists()
    reason = content(config, "evaluation_results.json")["stopped_early"]["reason"]
    page = read((config.directory / "report.html").read_text("utf-8"))
    assert f"ended after round 0 of 2: {reason}." in page.text
    evaluated = resumed(config, stop_on_futile_round=False, num_iterations=1, runtime=NO_REPORT)
    assert evaluated == ["base", "0", "1"]


def test_nothing_accepted_ends_the_run_by_the_setting_and_goes_on_without(
    simulated: Any, caplog: pytest.LogCaptureFixture
) -> None:
    captioning = {**UNCHECKED, "min_words": 40}
    config = simulated(captioning=captioning, **STOP, runtime=NO_REPORT)
    with caplog.at_level(logging.WARNING, "cirloop"):
        assert len(runner.run(config)) == 2
    assert "was accepted (too short" in caplog.text
    assert "lower captioning.min_words; or end the run here" in caplog.text
    assert content(config, "evaluation_results.json")["stopped_early"]["after"] == 0
    assert resumed(config) == ["base", "0"]
    assert resumed(config, stop_on_futile_round=False)[-1] == "2"


def test_a_training_that_moves_nothing_is_said_and_ends_the_run(
    small: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    training = {"iteration_0_steps": 2, "steps_per_iteration": 2, "learning_rate": 1e-12}
    config = small(tmp_path / "run", training=training, num_iterations=2, runtime=NO_REPORT, **STOP)
    with caplog.at_level(logging.WARNING, "cirloop"):
        results = runner.run(config)
    assert [row["iteration"] for row in results] == ["base", "0"]
    stopped = content(config, "evaluation_results.json")["stopped_early"]
    assert stopped["after"] == 0
    assert stopped["reason"].startswith("the training of iteration 0 moved no embedding")
    assert "Of 2 steps, 0 were left out" in stopped["reason"]
    assert "the peak of the learning rate is 1e-12" in stopped["reason"]
    assert "sample_scores" not in content(config, "evaluation_results.json")["results"][0]


def test_small_steps_move_embeddings_and_a_run_without_steps_is_no_fault(
    steady: Path, finished: Path
) -> None:
    for directory in (steady, finished):
        stages = json.loads((directory / "costs.json").read_text())["stages"]
        assert "moved no embedding" not in json.dumps(stages)
        config = from_json(directory / "config.json")
        scores = [
            content(config.model_copy(update={"experiment_dir": directory}), name)["sample_scores"]
            for name in ("evaluation_iter_0.json", "evaluation_iter_1.json")
        ]
        assert scores[0] != scores[1] and len(scores[0]) == len(scores[0][0]) == 16


def test_reasons_name_what_is_to_blame(simulated: Any) -> None:
    mined = {
        "negatives": [],
        "summary": {
            "queries": 9,
            "target_first": 8,
            "without_candidates": 1,
            "filters": [{"filter": "verify", "seen": 3, "dropped": 3}],
        },
    }
    top_k = simulated(mining={"skip_captioned": True}).mining
    reason = nothing_mined(mined, top_k)
    assert "8 of them rank their target first, 1 have no image left to mine" in reason
    assert "mining.skip_captioned leaves out images with an accepted text" in reason
    assert "mining.filters dropped 3 images" in reason
    assert not nothing_mined(mined, simulated(mining={"strategy": {"type": "none"}}).mining)
    assert not nothing_mined(mined | {"anchors": {"pairs": [1]}}, top_k)

    rejected = {"not verified": 5, "round trip": 7}
    texts = {"summary": {"accepted": 0, "candidates": 12, "rejected": rejected}}
    reason = nothing_accepted(texts)
    assert "none of 12 texts was accepted (round trip 7, not verified 5)" in reason
    assert "raise captioning.max_round_trip_rank" in reason
    assert not nothing_accepted(texts | {"relabelled": ["a positive"]})
