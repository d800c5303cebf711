"""The mining report: what was found, what each filter dropped, and what to change where little was
found."""

from __future__ import annotations

import os
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from cirloop.negatives import knn_text_samples
from cirloop.negatives.knn_text_samples import DIVERSE, HARD, Negative, RejectReason
from cirloop.negatives.report import quartiles
from cirloop.negatives.strategies.knn_text import RAISES, thresholds
from cirloop.tools.add_negatives.config import AddNegativesConfig
from cirloop.tools.add_negatives.samples import UniqueItems

MOST_USED = 5
DROPS = {
    RejectReason.BELOW_FLOOR: "below_similarity_floor",
    RejectReason.SAME_TEXT: "same_text",
    RejectReason.GENERIC: "generic_text",
    RejectReason.TEXT_NEAR: "text_too_near",
}
REASONS = {
    RejectReason.BELOW_FLOOR: "no visual neighbour at or above the floor",
    RejectReason.GENERIC: "no visual neighbour with a usable text",
    RejectReason.TEXT_NEAR: "every neighbour's text too near",
}
"""What holds where all neighbours of a sample are dropped for this reason or one before it."""
KINDS = {HARD: (HARD,), DIVERSE: (DIVERSE,), "all": (HARD, DIVERSE)}


@dataclass(frozen=True, slots=True)
class MiningRun:
    """All that a report is made from."""

    options: AddNegativesConfig
    items: UniqueItems
    shards: Sequence[Mapping[str, Any]]
    pool: knn_text_samples.SamplePool
    near: knn_text_samples.Neighbours
    clusters: knn_text_samples.Clusters
    chosen: Sequence[Negative | None]
    num_exhausted: int
    seconds: Mapping[str, float]

    @property
    def negatives(self) -> list[Negative]:
        return [negative for negative in self.chosen if negative is not None]

    def is_short(self, negative: Negative) -> bool:
        return bool(self.pool.short_T[self.pool.text_of_N[negative.row]])


def reason(run: MiningRun, i: int) -> str:
    """Why sample i has no negative: what its visual neighbours lack. The farthest cluster had none
    for it either."""
    least = run.near.codes_NK[i].min()
    held = (text for code, text in REASONS.items() if least >= code)
    return next(held, "every candidate's text used up")


def levels(options: AddNegativesConfig) -> list[float]:
    """Return the three thresholds, rounded."""
    return [round(float(threshold), 4) for threshold in thresholds(options.cosine_threshold)]


def report(run: MiningRun) -> dict[str, Any]:
    """As JSON. Only `seconds` and `shards` differ between runs of the same settings on one
    machine."""
    num = len(run.chosen)
    negatives = run.negatives
    first = zip(run.chosen, knn_text_samples.diverse_first(num, run.options.params), strict=True)
    as_drawn = sum((n.kind == DIVERSE) == bool(drawn) for n, drawn in first if n is not None)
    counts = Counter(negative.level for negative in negatives)
    reasons = Counter(reason(run, i) for i, negative in enumerate(run.chosen) if negative is None)
    by_level = {str(level): counts[n] for n, level in enumerate(levels(run.options))}
    similarity = {side: _similarities(run, side) for side in ("visual", "text")}
    return {
        "schema": 1,
        "samples": num,
        "images": len(run.items.images),
        "texts": len(run.items.texts),
        "texts_cut": sum(map(itemgetter("texts_cut"), run.shards)),
        "success_rate": round(len(negatives) / num, 6),
        "negatives": _kinds(run.chosen),
        "kind_looked_for_first": {"found": as_drawn, "other kind": len(negatives) - as_drawn},
        "thresholds": by_level,
        "short_texts": sum(map(run.is_short, negatives)),
        "reasons": dict(sorted(reasons.items())),
        "similarity": similarity,
        "dropped": _dropped(run),
        "phrases": _phrases(run),
        "clusters": _clusters(run),
        "seconds": _rounded(run.seconds),
        "devices": devices(),
        "shards": [_shard(run, number, shard) for number, shard in enumerate(run.shards)],
    }


def _kinds(chosen: Sequence[Negative | None]) -> dict[str, int]:
    kinds = Counter("none" if negative is None else negative.kind for negative in chosen)
    return {kind: kinds[kind] for kind in (HARD, DIVERSE, "none")}


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in seconds.items()}


def _dropped(run: MiningRun) -> dict[str, int]:
    """Return what became of all samples' visual neighbours. `text_used_up` counts candidates passed
    over when looked at."""
    codes = run.near.codes_NK
    short_NK = run.pool.short_T[run.pool.text_of_N[run.near.rows_NK]]
    return {
        "neighbours": int((codes != RejectReason.ABSENT).sum()),
        **{name: int((codes == code).sum()) for code, name in DROPS.items()},
        "candidates": int((codes < RAISES).sum()),
        "short_candidates": int(((codes < RAISES) & short_NK).sum()),
        "text_used_up": run.num_exhausted,
    }


def _similarities(run: MiningRun, side: str) -> dict[str, Any]:
    """Of images or of texts: of each kind of negative, of all, and of all visual neighbours."""
    rows = {}
    for name, kinds in KINDS.items():
        values = [getattr(negative, side) for negative in run.negatives if negative.kind in kinds]
        rows[name] = quartiles(np.array(values))
    near_NK = run.near.visual_NK if side == "visual" else run.near.text_NK
    rows["neighbours"] = quartiles(near_NK[run.near.codes_NK != RejectReason.ABSENT])
    return rows


def normalized_entropy(counts: Sequence[int]) -> float | None:
    """Entropy of the counts over its largest value: 1 where all are equal, 0 where one has all;
    None of nothing."""
    if len(counts) < 2:
        return 0.0 if len(counts) else None
    shares = np.array(counts) / sum(counts)
    return round(float(-(shares * np.log(shares)).sum() / np.log(len(shares))), 4)


def _phrases(run: MiningRun) -> dict[str, Any]:
    used = Counter(run.items.texts[run.pool.text_of_N[n.row]] for n in run.negatives)
    return {
        "distinct": len(used),
        "per_negative": round(len(used) / len(run.negatives), 4) if run.negatives else None,
        "evenness": normalized_entropy([*used.values()]),
        "most_used": sorted(used.items(), key=lambda row: (-row[1], row[0]))[:MOST_USED],
    }


def _clusters(run: MiningRun) -> dict[str, Any]:
    of_N = run.clusters.of_V[run.pool.image_of_N]
    reached = Counter(int(of_N[n.row]) for n in run.negatives)
    outside = [of_N[i] != of_N[n.row] for i, n in enumerate(run.chosen) if n is not None]
    return {
        "clusters": len(run.clusters.centroids_CD),
        "reached": len(reached),
        "evenness": normalized_entropy([*reached.values()]),
        "outside_own": round(sum(outside) / len(outside), 4) if outside else None,
    }


def devices() -> list[dict[str, Any]]:
    """Return what the machine computes with, whatever of it is used: each GPU, or else the CPU,
    with memory in bytes."""
    gpus = [torch.cuda.get_device_properties(n) for n in range(torch.cuda.device_count())]
    rows = [(f"cuda:{number}", gpu.name, gpu.total_memory) for number, gpu in enumerate(gpus)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cpu = ("cpu", f"{platform.machine()}, {os.cpu_count()} cores", memory)
    keys = ("device", "name", "memory_bytes")
    return [dict(zip(keys, row, strict=True)) for row in rows or [cpu]]


def _shard(run: MiningRun, number: int, done: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a process embedded, how long it took, and what became of the samples of its
    images."""
    start, end = done["images"]
    inside_N = (run.pool.image_of_N >= start) & (run.pool.image_of_N < end)
    samples = [run.chosen[i] for i in np.flatnonzero(inside_N).tolist()]
    negatives = [negative for negative in samples if negative is not None]
    return {
        "shard": number,
        "device": done["device"],
        "images": end - start,
        "texts": done["texts"][1] - done["texts"][0],
        "samples": len(samples),
        **_kinds(samples),
        "success_rate": round(len(negatives) / len(samples), 6) if samples else None,
        "mean_visual_similarity": _mean([negative.visual for negative in negatives]),
        "mean_text_similarity": _mean([negative.text for negative in negatives]),
        "seconds": _rounded(done["seconds"]),
    }


def _mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return round(float(np.mean(values)), 6) if values else None
