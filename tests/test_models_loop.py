"""Every kind of embedder through the whole loop: tiny, randomly initialised models of the real
classes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from transformers import BertTokenizer

from cirloop.cli import runner
from cirloop.data import ShapesSettings
from cirloop.training import TrainingSettings
from cirloop.types import UserError
from tests.backbones.tiny_blip2 import save_blip2
from tests.backbones.tiny_models import WRITERS, write_towers

DATA = {"train_families": 6, "train_triplets": 48, "eval_families": 4}
NO_TEXTS = {"captioning": {"enabled": False}}
CLIP = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 56, "patch_size": 14, "width": 64, "layers": 2, "head_width": 32},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


def clip(directory: Path, **settings: Any) -> dict[str, Any]:
    config = directory / "clip.json"
    config.write_text(json.dumps(CLIP))
    return {
        "type": "clip_combiner",
        "clip": str(config),
        "path": "random",
        "combiner_width": 2,
        **settings,
    }


def blip2(directory: Path, data: dict[str, int]) -> dict[str, Any]:
    """A BLIP-2 whose word pieces are the words of the training texts, with a random, frozen vision
    tower."""
    triplets = ShapesSettings(**data).build().train.triplets
    words = sorted(
        {word for t in triplets for word in re.findall(r"[a-z]+|[^a-z\s]", t.query.text.lower())}
    )
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *words]
    tokenizer = BertTokenizer(vocab={name: i for i, name in enumerate(names)}, bos_token="[DEC]")
    return {
        "type": "blip2",
        "path": str(save_blip2(directory / "blip2", tokenizer, 64, 64, 56, 14)),
    }


def model_of(name: str, directory: Path) -> dict[str, Any]:
    if name == "blip2":
        return blip2(directory, DATA)
    if name == "towers":
        towers = {"type": "clip_combiner", "path": str(write_towers(directory / "towers"))}
        return {**towers, "combiner_width": 2, "project_images": 16}
    if name.startswith("clip"):
        return clip(directory, train_clip="trained" in name, combiner=name.split()[1])
    kind = name.removesuffix("_next").removesuffix("_onevision")
    return {"type": kind, "path": str(WRITERS[name](directory / "model")), "dtype": "float32"}


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


LOSSES = {
    "blip2": {"type": "bradley_terry"},
    "clip combiner": {"type": "triplet"},
    "clip attention_fusion trained": {"type": "triplet"},
    "towers": {"type": "info_nce"},
}
LAX = {"num_candidates": 1, "min_verify_probability": 0.0, "max_round_trip_rank": 0}


@pytest.mark.full
@pytest.mark.parametrize("name", [*sorted({*WRITERS} - {"qwen2_vl"}), *LOSSES])
def test_a_round_with_gradient_caching(name: str, small: Any, tmp_path: Path) -> None:
    """`tiny` is a Qwen2-VL, and runs everywhere else. Qwen2.5-VL also writes texts, with the
    embedder's own weights."""
    model, writes = model_of(name, tmp_path), name == "qwen2_5_vl"
    training = {
        "iteration_0_steps": 2,
        "steps_per_iteration": 2,
        "batch_size": 8,
        "grad_cache_chunk_size": 3,
        "learning_rate": 1e-3,
        "loss": LOSSES.get(name, {}),
    }
    options = {
        "data": {"type": "shapes", **DATA},
        "mining": {"strategy": {"type": "band", "negatives_per_query": 2}},
        **({"foundation": model, "captioning": LAX} if writes else NO_TEXTS),
    }
    run = tmp_path / "run"
    runner.run(small(run, model=model, training=training, **options))
    made = read(run / "evaluation_results.json")["results"]
    assert [row["iteration"] for row in made] == ["base", "0", "1"]
    assert len({row["model"] for row in made}) == 3, (
        "an iteration was evaluated with the weights of another"
    )
    assert read(run / "hard_negatives_iter_0.json")["negatives"]
    log = read(run / "checkpoint_iter_1" / "training_log.json")
    assert len(log["rows"]) == 2 and all(row["grad_norm"] > 0 for row in log["rows"])
    assert not writes or read(run / "augmented_samples_iter_1.json")["summary"]["candidates"] > 0


@pytest.mark.full
def test_blip2_learns_from_a_random_start_with_a_frozen_random_tower(
    small: Any, tmp_path: Path
) -> None:
    """60 queries among 109 images: chance is 9% at R@10; before training 8%, after it 57% (one
    seed)."""
    data = {"train_families": 100, "train_triplets": 1500, "eval_families": 10}
    training = {
        "iteration_0_steps": 200, "batch_size": 48, "learning_rate": 1e-3,
        "loss": {"type": "info_nce", "temperature": 0.1},
    }  # fmt: skip
    options = {"data": {"type": "shapes", **data}, "num_iterations": 0}
    runner.run(small(tmp_path / "run", model=blip2(tmp_path, data), training=training, **options))
    rows = read(tmp_path / "run" / "evaluation_results.json")["results"]
    found = {row["iteration"]: row["metrics"] for row in rows}
    assert found["base"]["recall@10"] < 0.25 < 0.35 < found["0"]["recall@10"], found


def test_what_cannot_work_together_is_said_before_anything_runs(small: Any, tmp_path: Path) -> None:
    """An index over images of several vectors, and a model with nothing to train: both in one
    error."""
    options = {"data": {"type": "shapes", **DATA}, **NO_TEXTS}
    searched = {
        "mining": {"strategy": {"type": "top_k", "negatives_per_query": 2}, "search": "ivf"}
    }
    with pytest.raises(UserError, match=r"mining\.search ivf.*Use exact"):
        runner.run(small(tmp_path / "run", model=blip2(tmp_path, DATA), **options, **searched))
    for model, training, said in (
        ({"combiner": "sum"}, {}, "nothing to train"),
        ({"combiner": "combiner"}, {"finetuning": "lora"}, "trained in full"),
    ):
        with pytest.raises(UserError, match=said):
            runner.run(
                small(tmp_path / "run", model=clip(tmp_path, **model), training=training, **options)
            )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            {"num_hard_candidates": 3, "loss": {"type": "bradley_terry"}},
            "num_hard_candidates 3 does nothing with loss bradley_terry",
        ),
        (
            {"hard_candidate_margin": 0.1},
            "hard_candidate_margin 0.1 does nothing with num_hard_candidates: 0",
        ),
        (
            {"negatives_in_batch": 0, "loss": {"type": "triplet"}},
            "negatives_in_batch 0 leaves queries without a pair",
        ),
        (
            {"finetuning": "lora", "trainable_patterns": ["model"]},
            "trainable_patterns are for finetuning full, not lora",
        ),
        ({"lr_overrides": {"clip(": 1e-6}}, r"'clip\(' is no pattern"),
        ({"lr_overrides": {"clip": 0}}, "greater than 0"),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(training: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        TrainingSettings.model_validate(training)
