"""The judge's measurement: how well the foundation model tells right pairs from wrong ones."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import Artifact
from cirloop.captioning.planted import auc, planted_pairs
from cirloop.stages import futile
from cirloop.stages.context import RunContext

NAME = "judge_iter_1.json"


def measure_judge(run: RunContext, iteration: int, checkpoint: Artifact) -> Artifact | None:
    """Write judge_iter_1.json, before the first texts of a run: the AUC of the foundation model's
    verdicts on planted pairs. Raises FutileRound where that is too low and ends the run.

    None where nothing is measured: no verdict is asked for, the verdicts are exact, or the run had
    texts before it measured.
    """
    config = run.config
    if not config.captioning.measures_judge(config.foundation, filters=config.mining.verifies):
        return None
    has_texts = any(name.startswith("augmented_samples_iter_") for name in run.store.names)
    if NAME not in run.store.names and (has_texts or iteration > 1):
        return None

    floor = config.captioning.min_judge_auc

    def build(path: Path) -> None:
        content = _measurement(run, checkpoint)
        futile.warn(run, futile.weak_judge(content, floor))
        write_json(path, run.mark | {"schema": 1, "iteration": 1} | content)

    prompt = config.captioning.prompts(config.foundation).verify
    settings = run.stage_config("foundation", "data") | {
        "prompt": asdict(prompt),
        "batch_size": config.captioning.batch_size,
        "num_planted": config.captioning.relabel.num_planted,
    }
    if iteration > 1:  # an earlier round has compared its fingerprint
        artifact = run.store.load(NAME)
    else:
        artifact = run.build(NAME, settings, [run.data.digest], build, 1)
    futile.end_if_futile(run, iteration - 1, futile.weak_judge(artifact.read(), floor))
    return artifact


def _measurement(run: RunContext, checkpoint: Artifact) -> dict[str, Any]:
    """Ask the foundation model about the planted pairs, and return the AUC and every answer."""
    config = run.config
    prompt = config.captioning.prompts(config.foundation).verify
    num = config.captioning.relabel.num_planted
    planted = planted_pairs(run.data.train, num, config.seed)
    captioner = run.captioner(lambda: run.embedder(checkpoint))
    answers = captioner.yes_probability(prompt, planted.requests, "judge planted pairs")
    measured = auc(planted, answers)
    value, error = measured or (None, None)
    num_right = sum(planted.is_right)
    return {
        "summary": {
            "right": num_right,
            "wrong": len(planted.requests) - num_right,
            "auc": value if value is None else round(value, 4),
            "standard_error": error if error is None else round(error, 4),
            "judge": captioner.name,
        },
        "pairs": [
            {**asdict(request), "right": is_right, "yes": round(float(probability), 6)}
            for request, is_right, probability in zip(
                planted.requests, planted.is_right, answers, strict=True
            )
        ],
    }
