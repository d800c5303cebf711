"""Accounting: false negatives and true captions, where the data set knows the truth."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.rows import read_anchors, read_augmented, read_mined
from cirloop.artifacts.store import Artifact
from cirloop.captioning.relabel import HUMAN_TEXT
from cirloop.stages.context import RunContext
from cirloop.types import Oracle, Query, QueryId, Triplet, targets_of


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
        true = [row for row in accepted if _is_true(oracle, row.triplet)]
        content: dict[str, Any] = {
            "schema": 1,
            "iteration": iteration,
            "mined": len(mined),
            "false_negatives": sum(n.image in false_negatives[n.query] for n in mined),
            "mined_by_changes_from_reference": {
                str(d): distances.count(d) for d in sorted(set(distances))
            },
            "accepted": len(accepted),
            "true_captions": len(true),
        }
        anchors = {query.id for query in read_anchors(negatives).queries}
        if anchors:
            for name, part in (("accepted", accepted), ("true_captions", true)):
                content[f"{name}_of_anchors"] = sum(row.source in anchors for row in part)
        if relabelled:
            content |= {"relabelled": len(relabelled), "relabelled_right": right}
        write_json(path, run.mark | content)

    inputs = [negatives.digest, *([augmented.digest] if augmented else [])]
    return run.build(f"accounting_iter_{iteration}.json", {}, inputs, build, iteration)


def _is_true(oracle: Oracle, triplet: Triplet) -> bool:
    query = triplet.query
    return oracle.text_is_true(query.reference, query.text, triplet.target)
