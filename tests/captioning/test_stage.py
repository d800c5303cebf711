"""Captioning as a stage of a run: what its artifact says, and what makes it another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cirloop.captioning.foundation import Qwen2VLFoundation
from cirloop.captioning.prompts import load
from cirloop.cli import runner
from cirloop.stages.caption import caption
from cirloop.types import UserError
from tests.stages.copies import CHECKPOINT, NEGATIVES, context, copied

TURN = 'answer: json\nturn: "{image}{image}Change of the first: {text}. Answer in JSON."\n'


@pytest.mark.full
def test_a_dry_run_by_template_says_so_and_a_changed_prompt_makes_other_captions(
    small: Any, tmp_path: Path
) -> None:
    prompt = tmp_path / "mine-1.yaml"
    prompt.write_text(TURN)
    config = small(
        tmp_path / "run",
        foundation={"type": "template"},
        captioning={
            "min_verify_probability": 0,
            "max_round_trip_rank": 0,
            "rewrite_prompt": str(prompt),
        },
        training={"iteration_0_steps": 0, "steps_per_iteration": 1},
    )
    runner.run(config)
    rows = json.loads((tmp_path / "run" / "augmented_samples_iter_1.json").read_text("utf-8"))
    assert rows["accepted"]
    assert {(row["captioner"], row["prompt"]) for row in rows["accepted"]} == {
        ("template (no model)", "mine-1")
    }

    prompt.write_text(TURN.replace("first", "left"))
    load.cache_clear()  # as in another process
    said = r"augmented_samples_iter_1.json was made with other settings"
    with pytest.raises(UserError, match=said):
        runner.run(config.model_copy(update={"auto_resume": True}))


def test_a_template_that_is_to_judge_is_refused_before_anything_is_made(
    small: Any, tmp_path: Path
) -> None:
    said = r"cannot judge a text. Set captioning.min_verify_probability to 0"
    with pytest.raises(UserError, match=said):
        runner.run(
            small(
                tmp_path / "run",
                foundation={"type": "template"},
                captioning={"min_verify_probability": 0.5},
            )
        )
    assert not list((tmp_path / "run").glob("*.json"))


@pytest.mark.full
def test_one_model_is_loaded_where_the_base_is_the_same(
    finished: Path, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[bool] = []
    build = Qwen2VLFoundation.build

    def watched(self: Any, shared: Any = None, train: Any = None) -> Any:
        captioner: Any = build(self, shared, train)
        built.append(captioner.shared_embedder is shared and shared is not None)
        return captioner

    monkeypatch.setattr(Qwen2VLFoundation, "build", watched)
    for dtype in ("float32", "bfloat16"):
        config = small(tmp_path / dtype, foundation={"dtype": dtype})
        run = context(config)
        checkpoint, negatives = copied(run, finished, CHECKPOINT, NEGATIVES)
        written = caption(run, 1, negatives, checkpoint, [])
        assert written.read()["summary"]["candidates"]
    assert built == [True, False]
