"""Mining inside a run: what a data set lets strategies know, filters against false negatives, and
the rows written."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cirloop.artifacts.store import Store
from cirloop.cli import runner
from cirloop.data.shapes.splits import build_splits
from cirloop.stages.context import RunContext
from cirloop.stages.mine import mine_split
from cirloop.types import UserError
from cirloop.validation import ValidationFailed
from tests.stages.copies import CHECKPOINT, copied

WARM: dict[str, Any] = {
    "num_iterations": 1,
    "training": {"iteration_0_steps": 2, "steps_per_iteration": 2},
    "evaluation": {"evaluate_base": False},
}


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.full
def test_filters_drop_false_negatives_and_count_them(
    finished: Path, small: Any, tmp_path: Path
) -> None:
    filters = [
        {"type": "near_duplicate", "threshold": 0.9},
        {"type": "agreement", "path": "tiny"},
        {"type": "verify", "threshold": 0.5},
    ]
    runner.run(small(tmp_path, mining={"filters": filters}, evaluation=WARM["evaluation"]))
    accounts = []
    for directory in (finished, tmp_path):
        mined = read(directory / "hard_negatives_iter_0.json")
        accounts.append(read(directory / "accounting_iter_1.json"))
        num = accounts[-1]["mined"]
        assert len(mined["negatives"]) == mined["summary"]["negatives"] == num
    plain, filtered = accounts
    counts = mined["summary"]["filters"]
    assert [c["filter"] for c in counts] == ["near_duplicate", "agreement", "verify"]
    assert counts[0]["seen"] == plain["mined"]
    assert all(b["seen"] == a["seen"] - a["dropped"] for a, b in pairwise(counts))
    assert counts[-1]["seen"] - counts[-1]["dropped"] == filtered["mined"] > 0
    before, after = (account["false_negatives"] / account["mined"] for account in accounts)
    assert after < before, "the filters dropped right answers no more often than wrong ones"


@pytest.mark.full
def test_a_band_tells_the_size_of_its_sets(small: Any, tmp_path: Path) -> None:
    mining = {
        "strategy": {"type": "band", "negatives_per_query": 2, "variant": "released"},
        "fallback": "random",
    }
    training = {**WARM["training"], "num_hard_candidates": 3, "hard_candidate_pool": 20}
    runner.run(small(tmp_path / "run", mining=mining, **{**WARM, "training": training}))
    made = read(tmp_path / "run" / "hard_negatives_iter_0.json")
    assert made["summary"]["set_size"]["mean"] >= 1
    names = {row["strategy"] for row in made["negatives"]}
    assert names <= {"band", "band, filled by random"}
    assert (
        sum(row["strategy"] != "band" for row in made["negatives"])
        == made["summary"]["filled_by_fallback"]
    )


@pytest.mark.full
def test_attributes_from_a_file(small: Any, tmp_path: Path) -> None:
    scenes = build_splits()["train"].scenes
    rows = {
        f"shapes:train:{row:05d}": {"color": sorted({o.color for o in scenes[row] if o})}
        for row in range(len(scenes))
    }
    (tmp_path / "attributes.json").write_text(json.dumps(rows))
    told = {"domain": "shapes", "file": str(tmp_path / "attributes.json")}
    settings = {
        **WARM,
        "mining": {"strategy": {"type": "category_discrepant", "negatives_per_query": 2}},
        "attributes": told,
    }
    runner.run(small(tmp_path / "run", **settings))
    assert read(tmp_path / "run" / "hard_negatives_iter_0.json")["negatives"]
    # another content of the file is another input: the stage is made anew
    (tmp_path / "attributes.json").write_text(json.dumps({key: {"color": ["red"]} for key in rows}))
    with pytest.raises(UserError, match="made with other"):
        runner.run(small(tmp_path / "run", **settings, auto_resume=True))


def test_a_foundation_model_that_describes_nothing_is_named(
    small: Any, finished: Path, tmp_path: Path
) -> None:
    """`tiny` was not taught to describe one image, and answers it with nothing."""
    attributes = {"domain": "shapes", "image_source": "vlm"}
    config = small(tmp_path, mining={"strategy": {"type": "soft"}}, attributes=attributes)
    run = RunContext(config, Store(tmp_path), config.data.build(None))
    copied(run, finished, CHECKPOINT)
    said = "shapes:train:00000: the model gave no caption, but ''"
    with pytest.raises(ValidationFailed, match=said):
        mine_split(run, run.embedder(None), 0)


def test_what_a_strategy_lacks_is_said_before_training(small: Any, tmp_path: Path) -> None:
    said = r"mining\.strategy group: needs groups: a data set that has them"
    with pytest.raises(UserError, match=said):
        runner.run(small(tmp_path / "run", mining={"strategy": {"type": "group"}}, **WARM))
    assert not (tmp_path / "run").exists()


@pytest.mark.full
def test_sets_are_defined_by_the_model_of_their_period(small: Any, tmp_path: Path) -> None:
    """Four rounds and n_def 2: rounds 0 and 1 warm up, rounds 2 and 3 score with the model of round
    2."""
    settings = {**WARM, "num_iterations": 4, "captioning": {"enabled": False}}
    runner.run(
        small(tmp_path / "run", mining={"strategy": {"type": "band", "n_def": 2}}, **settings)
    )
    made = [read(tmp_path / "run" / f"hard_negatives_iter_{t}.json") for t in range(4)]
    sizes = [one["summary"]["set_size"]["mean"] for one in made]
    assert sizes[0] == sizes[1] > 60 and sizes[2] == sizes[3] < sizes[0]
    scores = [{row["query"]: row["target_score"] for row in one["negatives"]} for one in made]
    assert scores[0] == scores[1] != scores[2] == scores[3]
    assert [row["image"] for row in made[2]["negatives"]] != [
        row["image"] for row in made[3]["negatives"]
    ]
