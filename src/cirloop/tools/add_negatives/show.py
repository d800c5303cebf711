"""The report for a person: tables, and the advice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from cirloop.monitoring.console import table

logger = logging.getLogger(__name__)


def show(report: dict[str, Any]) -> None:
    """Print the report's tables; what is advised goes to the log."""
    num = report["samples"]
    negatives = report["negatives"]
    shares = [[kind, f"{count:,}", f"{count / num:.1%}"] for kind, count in negatives.items()]
    table(
        f"Negatives of {num:,} samples: {report['success_rate']:.1%} have one",
        ["kind", "samples", "share"],
        shares,
    )
    names = ("mean", "25%", "median", "75%")
    rows = [
        [f"{side}, {of}", *(f"{values[name]:.3f}" for name in names)]
        for side, kinds in report["similarity"].items()
        for of, values in kinds.items()
        if values is not None
    ]
    table("Similarity", ["of", *names], rows)
    dropped = {name.replace("_", " "): f"{count:,}" for name, count in report["dropped"].items()}
    table(
        "Visual neighbours, and what each filter dropped",
        ["", "neighbours"],
        [*map(list, dropped.items())],
    )
    table("Choice", ["", "samples"], _choice(report))
    table("Diversity", ["", "different", "evenness", ""], _diversity(report))
    table(
        "Seconds",
        ["phase", "s"],
        [[name, f"{value:.1f}"] for name, value in report["seconds"].items()],
    )
    _show_shards(report["shards"])
    rows = [
        [each["device"], each["name"], f"{each['memory_bytes'] / 2**30:.1f}"]
        for each in report["devices"]
    ]
    table("Devices of this machine", ["device", "name", "memory, GiB"], rows)
    for sentence in report["advice"]:
        logger.warning("low yield: %s", sentence)


def _show_shards(shards: Sequence[dict[str, Any]]) -> None:
    """Print a row per process: what became of its samples, then what it embedded and how long that
    took."""
    counts = ("samples", "hard", "diverse", "none")
    means = ("mean_text_similarity", "mean_visual_similarity")
    yields = []
    work = []
    for shard in shards:
        rate = "none" if shard["success_rate"] is None else f"{shard['success_rate']:.1%}"
        similar = ["none" if shard[name] is None else f"{shard[name]:.3f}" for name in means]
        yields.append(
            [str(shard["shard"]), *(f"{shard[name]:,}" for name in counts), rate, *similar]
        )
        seconds = [f"{shard['seconds'][phase]:.1f}" for phase in ("load", "images", "texts")]
        work.append(
            [
                str(shard["shard"]),
                shard["device"],
                f"{shard['images']:,}",
                f"{shard['texts']:,}",
                *seconds,
            ]
        )
    table("Negatives by shard", ["shard", *counts, "success", "mean text", "mean visual"], yields)
    table(
        "Processes",
        ["shard", "device", "images", "texts", "load, s", "images, s", "texts, s"],
        work,
    )


def _choice(report: dict[str, Any]) -> list[list[str]]:
    rows = [[f"text below {threshold}", count] for threshold, count in report["thresholds"].items()]
    first = report["kind_looked_for_first"]
    rows += [
        ["of the kind looked for first", first["found"]],
        ["of the other kind", first["other kind"]],
    ]
    rows += [["with a short text", report["short_texts"]]]
    rows += [[f"none: {why}", count] for why, count in report["reasons"].items()]
    return [[name, f"{count:,}"] for name, count in rows]


def _diversity(report: dict[str, Any]) -> list[list[str]]:
    phrases = report["phrases"]
    clusters = report["clusters"]

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    most = f"most used: {phrases['most_used'][0][1]} times" if phrases["most_used"] else ""
    outside = f"outside the sample's own: {number(clusters['outside_own'])}"
    return [
        ["phrases", str(phrases["distinct"]), number(phrases["evenness"]), most],
        [
            "clusters",
            f"{clusters['reached']} of {clusters['clusters']}",
            number(clusters["evenness"]),
            outside,
        ],
    ]
