"""Accounting: false negatives and true captions, where the data set knows the truth."""

from __future__ import annotations

from pathlib import Path

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.rows import read_augmented, read_mined
from cirloop.artifacts.store import Artifact
from cirloop.captioning.relabel import HUMAN_TEXT
from cirloop.stages.context import RunContext
from cirloop.types import (
    Query,
    QueryId,
    targets_of,
)


def account(
    run: RunContext, iteration: int, negatives: Artifact, augmented: Artifact | None
) -> Artifact | None:
    """Count false negatives and true captions in accounting_iter_{t}.json; None where the data set
    has no oracle."""
    oracle = run.data.train.oracle
    triplets = run.data.train.triplets
    if oracle is None:
        return None

    def build(path: Path) -> None:
        by_id: dict[QueryId, Query] = {t.query.id: t.query for t in triplets}
        targets = targets_of(triplets)
        mined = read_mined(negatives)
        false_negatives = {
            q: oracle.positives(by_id[q]) - {targets[q]} for q in {n.query for n in mined}
        }
        distances = [oracle.distance(by_id[n.query].reference, n.image) for n in mined]
        rows = read_augmented(augmented) if augmented else []
        relabelled = [row for row in rows if row.prompt == HUMAN_TEXT]
        right = sum(row.triplet.target in oracle.positives(by_id[row.source]) for row in relabelled)
        accepted = [row for row in rows if row.prompt != HUMAN_TEXT]
        is_true = [
            oracle.text_is_true(a.triplet.query.reference, a.triplet.query.text, a.triplet.target)
            for a in accepted
        ]
        write_json(
            path,
            run.mark
            | {
                "schema": 1,
                "iteration": iteration,
                "mined": len(mined),
                "false_negatives": sum(n.image in false_negatives[n.query] for n in mined),
                "mined_by_changes_from_reference": {
                    str(d): distances.count(d) for d in sorted(set(distances))
                },
                "accepted": len(accepted),
                "true_captions": sum(is_true),
            }
            | ({"relabelled": len(relabelled), "relabelled_right": right} if relabelled else {}),
        )

    inputs = [negatives.digest, *([augmented.digest] if augmented else [])]
    return run.build(f"accounting_iter_{iteration}.json", {}, inputs, build, iteration)
