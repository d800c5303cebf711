"""The report for a person: tables, and the advice."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from cirloop.monitoring.console import table

logger = logging.getLogger(__name__)
PARTS = {
    "negatives": "Negatives",
    "dropped": "Visual neighbours, and what each filter dropped",
    "thresholds": "Negatives by the threshold that their text is below",
    "kind_looked_for_first": "Negatives of the kind looked for first",
    "reasons": "Samples without a negative",
    "phrases": "Phrases",
    "clusters": "Clusters",
    "seconds": "Seconds",
}
"""Parts of the report that are a table of two columns each, and its title."""


def show(report: dict[str, Any]) -> None:
    """Print the report's tables; what is advised goes to the log."""
    most_used = [uses for _, uses in report["phrases"]["most_used"]]
    parts = {name: report[name] for name in PARTS}
    parts["phrases"] = report["phrases"] | {"most_used": max(most_used, default=0)}
    parts["negatives"] = report["negatives"] | {"with a short text": report["short_texts"]}
    rate = f"{report['success_rate']:.1%} of {report['samples']:,} samples have one"
    for name, title in PARTS.items():
        rows = [[key.replace("_", " "), _cell(value)] for key, value in parts[name].items()]
        if rows:
            table(f"{title}: {rate}" if name == "negatives" else title, ["", "number"], rows)
    similarity = [
        {"of": f"{side}, {of}"} | values
        for side, kinds in report["similarity"].items()
        for of, values in kinds.items()
        if values is not None
    ]
    _rows("Similarity", ["of", "mean", "25%", "median", "75%"], similarity)
    shards = report["shards"]
    means = ("mean_text_similarity", "mean_visual_similarity")
    counts = ("shard", "samples", "hard", "diverse", "none", "success_rate")
    _rows("Negatives by shard", [*counts, *means], shards)
    _rows("Processes", ["shard", "device", "images", "texts"], shards)
    timed = [{"shard": shard["shard"]} | shard["seconds"] for shard in shards]
    _rows("Seconds by shard", ["shard", "load", "images", "texts"], timed)
    gib = [device | {"memory, GiB": device["memory_bytes"] / 2**30} for device in report["devices"]]
    _rows("Devices of this machine", ["device", "name", "memory, GiB"], gib)
    for sentence in report["advice"]:
        logger.warning("low yield: %s", sentence)


def _rows(title: str, keys: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of what each row has under these keys."""
    heads = [key.removesuffix("_similarity").replace("_", " ") for key in keys]
    table(title, heads, [[_cell(row[key]) for key in keys] for row in rows])


def _cell(value: str | float | None) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return value
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"
