"""Rounds that cannot help, and why: a judge that cannot tell right from wrong, nothing new to train
on, a training that moved nothing.

Each reason is a warning of its stage; with `stop_on_futile_round` the run ends there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cirloop.artifacts import schema
from cirloop.data.known_positives import DUPLICATE, ENOUGH, KNOWN_ALREADY, WRITTEN_AGAIN
from cirloop.validation import counted

if TYPE_CHECKING:
    from cirloop.negatives import MiningSettings
    from cirloop.stages.context import RunContext

Content = Mapping[str, Any]
logger = logging.getLogger(__name__)
UNMOVED = 1e-5
"""Change of a score up to which an embedding has not moved."""
WAYS_OUT = {
    "not verified": "lower captioning.min_verify_probability, or use another"
    " --foundation_model_backbone",
    "round trip": "raise captioning.max_round_trip_rank",
    KNOWN_ALREADY: "lower captioning.min_round_trip_rank",
    "cut off": "raise captioning.max_new_tokens",
    "too long": "raise captioning.max_words",
    "too short": "lower captioning.min_words",
    ENOUGH: "raise captioning.max_per_query_in_all or captioning.max_per_query",
    DUPLICATE: "mine other images (mining.strategy, mining.anchors)",
    WRITTEN_AGAIN: "mine other images (mining.strategy, mining.anchors)",
}
"""What to do about texts that are rejected for a reason; for others, another foundation model."""


class FutileRound(Exception):
    """The end of a run after round `after`, since the next one, or that one, cannot help."""

    def __init__(self, after: int, reason: str) -> None:
        super().__init__(reason)
        self.after = after
        self.reason = reason

    def to_json(self) -> dict[str, Any]:
        """Return what `evaluation_results.json` holds of it."""
        return {"after": self.after, "reason": self.reason}


def warn(run: RunContext, reason: str) -> None:
    """Warn of the running stage's reason, if there is one."""
    if reason:
        run.costs.warn(reason)


def end_if_futile(run: RunContext, after: int, reason: str) -> None:
    """Raise FutileRound where there is a reason, `stop_on_futile_round` is set, and rounds are left
    of which none is finished."""
    is_finished = f"evaluation_iter_{after + 1}.json" in run.store.names
    ends = run.config.stop_on_futile_round and after < run.config.num_iterations
    if reason and ends and not is_finished:
        logger.warning(
            "the run ends after round %d of %d: %s", after, run.config.num_iterations, reason
        )
        raise FutileRound(after, reason)


def check_moved(run: RunContext, evaluations: Sequence[Content]) -> None:
    """End the run where the training of the last of the evaluated rounds moved no embedding."""
    if len(evaluations) > 1:
        t = int(evaluations[-1]["iteration"])
        end_if_futile(run, t, unmoved(run, t, evaluations[-2], evaluations[-1]))


def weak_judge(content: Content, floor: float) -> str:
    """Return why a judge cannot be trusted; empty where its AUC is at least `floor`."""
    summary = content["summary"]
    if summary["auc"] is None or summary["auc"] >= floor:
        return ""
    return (
        f"the foundation model ({summary['judge']}) hardly tells right texts from wrong ones: its"
        f" AUC is {summary['auc']:.2f} ± {summary['standard_error']:.2f} on"
        f" {summary['right']} right and {summary['wrong']} wrong planted pairs (0.5 = by chance),"
        f" and captioning.min_judge_auc is {floor}. What it accepts is hardly better than what"
        " it rejects. Use another --foundation_model_backbone or --foundation_model_path, or"
        " another captioning.verify_prompt; or set captioning.min_verify_probability 0 and check by"
        " the round trip alone"
    )


def nothing_mined(content: Content, settings: MiningSettings) -> str:
    """Return why no image was mined; empty where some were, or none is asked for."""
    pairs = content.get("anchors", {}).get("pairs", ())
    is_asked = settings.strategy.type != "none" or settings.anchors.num
    if content["negatives"] or pairs or not is_asked:
        return ""
    summary = content["summary"]
    dropped = sum(row["dropped"] for row in summary["filters"])
    causes = []
    if settings.skips_solved_queries and summary["target_first"]:
        causes.append(f"{summary['target_first']} of them rank their target first")
    if summary["without_candidates"]:
        causes.append(f"{summary['without_candidates']} have no image left to mine")
    if settings.skip_captioned:
        causes.append("mining.skip_captioned leaves out images with an accepted text")
    if dropped:
        causes.append(f"mining.filters dropped {counted(dropped, 'image')}")
    because = f": {', '.join(causes)}" if causes else ""
    return (
        f"no image was mined for {counted(summary['queries'], 'query', 'queries')}{because}. The"
        " round has nothing new to train on. Take another mining.strategy or more of its ranks,"
        " turn mining.only_failed_queries, mining.skip_captioned or mining.filters off, write texts"
        " for images without one (mining.anchors.num), or end the run here"
    )


def nothing_accepted(content: Content) -> str:
    """Return why no text of a round was accepted; empty where one was, an image became a positive
    of its human text, or nothing was written."""
    summary = content["summary"]
    rejected: dict[str, int] = summary["rejected"]
    if summary["accepted"] or content.get("relabelled") or not rejected:
        return ""
    most_first = sorted(rejected, key=lambda reason: (-rejected[reason], reason))
    counts = ", ".join(f"{reason} {rejected[reason]}" for reason in most_first)
    way_out = WAYS_OUT.get(most_first[0], "use another --foundation_model_backbone or prompt")
    return (
        f"none of {counted(summary['candidates'], 'text')} was accepted ({counts}). The round has"
        f" no new text to train on. To have some, {way_out}; or end the run here"
    )


def unmoved(run: RunContext, t: int, before: Content, after: Content) -> str:
    """Return why iteration `t` ranks as the evaluation before it does; empty where embeddings
    moved, or no step of training was asked for."""
    training = run.config.training
    steps = training.steps_per_iteration if t else training.iteration_0_steps
    scores = [content.get("sample_scores") for content in (before, after)]
    if not steps or None in scores:
        return ""
    old, new = (np.array(rows, np.float64) for rows in scores)
    if old.shape != new.shape or np.abs(old - new).max(initial=0.0) > UNMOVED:
        return ""
    rows = schema.read(run.store.load(f"checkpoint_iter_{t}").path / "training_log.json")["rows"]
    num_skipped = sum("ids" in row for row in rows)
    earlier = f"iteration {before['iteration']}" if before["iteration"] != "base" else "the base"
    return (
        f"the training of iteration {t} moved no embedding: the scores of"
        f" {counted(len(new), 'query', 'queries')} with {counted(new.shape[1], 'image')} are those"
        f" of {earlier}. Of {counted(len(rows), 'step')}, {num_skipped} were left out as bad"
        f" batches; the peak of the learning rate is {training.learning_rate:g}. Raise"
        " --learning_rate; look at the losses and bad batches in training_log.json (a loss of 0"
        " moves nothing)"
    )
