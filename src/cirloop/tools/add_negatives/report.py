"""The mining report: what was found, what each filter dropped, and what to change where little was
found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cirloop.negatives.knn_text_samples import (
    DIVERSE,
    HARD,
    Clusters,
    Negative,
    Neighbours,
    RejectReason,
    SamplePool,
    diverse_first,
)
from cirloop.negatives.report import quartiles
from cirloop.negatives.strategies.knn_text import RAISES, thresholds
from cirloop.tools.add_negatives.config import AddNegativesConfig
from cirloop.tools.add_negatives.encode import Encoded, devices
from cirloop.tools.add_negatives.samples import UniqueItems

MOST_USED = 5
DROPS = {
    RejectReason.BELOW_FLOOR: "below_similarity_floor",
    RejectReason.SAME_TEXT: "same_text",
    RejectReason.GENERIC: "generic_text",
    RejectReason.TEXT_NEAR: "text_too_near",
}


@dataclass(frozen=True, slots=True)
class MiningRun:
    """All that a report is made from."""

    options: AddNegativesConfig
    what: UniqueItems
    encoded: Encoded
    pool: SamplePool
    near: Neighbours
    clusters: Clusters
    chosen: Sequence[Negative | None]
    num_exhausted: int
    seconds: Mapping[str, float]

    @property
    def found(self) -> list[Negative]:
        return [negative for negative in self.chosen if negative is not None]


def reason(run: MiningRun, i: int) -> str:
    """Why sample i has no negative: what its visual neighbours lack. The farthest cluster had none
    for it either."""
    codes = run.near.codes_NK[i]
    if (codes >= RejectReason.BELOW_FLOOR).all():
        return "no visual neighbour at or above the floor"
    if (codes >= RejectReason.GENERIC).all():
        return "no visual neighbour with a usable text"
    return (
        "every neighbour's text too near"
        if (codes >= RejectReason.TEXT_NEAR).all()
        else "every candidate's text used up"
    )


def report(run: MiningRun) -> dict[str, Any]:
    """As JSON. Only `seconds` and `shards` differ between runs of the same settings on one
    machine."""
    num = len(run.chosen)
    found = run.found
    kinds = Counter(negative.kind for negative in found)
    first = diverse_first(num, run.options.params)
    as_drawn = sum(
        (n.kind == DIVERSE) == bool(f)
        for n, f in zip(run.chosen, first, strict=True)
        if n is not None
    )
    levels = [round(float(t), 4) for t in thresholds(run.options.cosine_threshold)]
    counts = Counter(negative.level for negative in found)
    reasons = Counter(reason(run, i) for i, negative in enumerate(run.chosen) if negative is None)
    return {
        "schema": 1,
        "samples": num,
        "images": len(run.what.images),
        "texts": len(run.what.texts),
        "texts_cut": sum(shard.done["texts_cut"] for shard in run.encoded.shards),
        "success_rate": round(len(found) / num, 6),
        "negatives": {HARD: kinds[HARD], DIVERSE: kinds[DIVERSE], "none": num - len(found)},
        "kind_looked_for_first": {"found": as_drawn, "other kind": len(found) - as_drawn},
        "thresholds": {str(level): counts[number] for number, level in enumerate(levels)},
        "short_texts": sum(bool(run.pool.short_T[run.pool.text_of_N[n.row]]) for n in found),
        "reasons": dict(sorted(reasons.items())),
        "similarity": _similarities(run),
        "dropped": dropped(run),
        "phrases": _phrases(run),
        "clusters": _clusters(run),
        "seconds": {name: round(value, 3) for name, value in run.seconds.items()},
        "devices": devices(),
        "shards": _shards(run),
    }


def dropped(run: MiningRun) -> dict[str, int]:
    """Return what became of all samples' visual neighbours. `text_used_up` counts candidates passed
    over when looked at."""
    codes = run.near.codes_NK
    there = int((run.near.codes_NK != RejectReason.ABSENT).sum())
    short_NK = run.pool.short_T[run.pool.text_of_N[run.near.rows_NK]]
    return {
        "neighbours": there,
        **{name: int((codes == code).sum()) for code, name in DROPS.items()},
        "candidates": int((codes < RAISES).sum()),
        "short_candidates": int(((codes < RAISES) & short_NK).sum()),
        "text_used_up": run.num_exhausted,
    }


def _similarities(run: MiningRun) -> dict[str, Any]:
    """Of images and of texts: of each kind of negative, of all, and of all visual neighbours."""
    near = run.near.codes_NK != RejectReason.ABSENT
    kinds = {HARD: {HARD}, DIVERSE: {DIVERSE}, "all": {HARD, DIVERSE}}
    rows = {name: [n for n in run.found if n.kind in kind] for name, kind in kinds.items()}
    return {
        "visual": (
            {name: quartiles(np.array([n.visual for n in found])) for name, found in rows.items()}
            | {"neighbours": quartiles(run.near.visual_NK[near])}
        ),
        "text": (
            {name: quartiles(np.array([n.text for n in found])) for name, found in rows.items()}
            | {"neighbours": quartiles(run.near.text_NK[near])}
        ),
    }


def normalized_entropy(counts: Sequence[int]) -> float | None:
    """Entropy of the counts over its largest value: 1 where all are equal, 0 where one has all;
    None of nothing."""
    if len(counts) == 0:
        return None
    shares = np.array(counts) / sum(counts)
    return (
        round(float(-(shares * np.log(shares)).sum() / np.log(len(shares))), 4)
        if len(shares) > 1
        else 0.0
    )


def _phrases(run: MiningRun) -> dict[str, Any]:
    used = Counter(run.what.texts[run.pool.text_of_N[n.row]] for n in run.found)
    most = sorted(used.items(), key=lambda row: (-row[1], row[0]))[:MOST_USED]
    share = round(len(used) / len(run.found), 4) if run.found else None
    return {
        "distinct": len(used),
        "per_negative": share,
        "evenness": normalized_entropy([*used.values()]),
        "most_used": most,
    }


def _clusters(run: MiningRun) -> dict[str, Any]:
    of_N = run.clusters.of_V[run.pool.image_of_N]
    reached = Counter(int(of_N[n.row]) for n in run.found)
    pairs = [(of_N[i], of_N[n.row]) for i, n in enumerate(run.chosen) if n is not None]
    return {
        "clusters": len(run.clusters.centroids_CD),
        "reached": len(reached),
        "evenness": normalized_entropy([*reached.values()]),
        "outside_own": round(sum(a != b for a, b in pairs) / len(pairs), 4) if pairs else None,
    }


def _shards(run: MiningRun) -> list[dict[str, Any]]:
    """Each process: what it embedded, how long it took, and what became of the samples of its
    images."""
    rows = []
    for number, shard in enumerate(run.encoded.shards):
        start, end = shard.images
        mine = [
            run.chosen[int(i)]
            for i in np.flatnonzero((run.pool.image_of_N >= start) & (run.pool.image_of_N < end))
        ]
        kinds = Counter("none" if negative is None else negative.kind for negative in mine)
        row = {"shard": number, "device": shard.done["device"], "images": end - start}
        row |= {"texts": shard.texts[1] - shard.texts[0], "samples": len(mine)}
        row |= {kind: kinds[kind] for kind in (HARD, DIVERSE, "none")}
        chosen = [negative for negative in mine if negative is not None]
        row |= {"success_rate": round(len(chosen) / len(mine), 6) if mine else None}
        row |= {"mean_visual_similarity": _mean([negative.visual for negative in chosen])}
        row |= {"mean_text_similarity": _mean([negative.text for negative in chosen])}
        rows.append(row | {"seconds": {k: round(v, 3) for k, v in shard.done["seconds"].items()}})
    return rows


def _mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return round(float(np.mean(values)), 6) if values else None
