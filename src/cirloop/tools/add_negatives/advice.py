"""What to change where few samples found a negative, with the numbers that say so."""

from __future__ import annotations

from typing import Any

from cirloop.tools.add_negatives.config import AddNegativesConfig

ENOUGH = 0.9
"""Success rate from which nothing is advised."""
NOTEWORTHY = 0.2
"""Share of what could have passed that a filter drops, from which it is named."""


def advice(report: dict[str, Any], options: AddNegativesConfig) -> list[str]:
    """Sentences, the filter that drops the largest share first; none where enough was found.

    Each filter's share is of the neighbours that the filters before it let through.
    """
    if report["success_rate"] >= ENOUGH:
        return []
    num_neighbours = report["dropped"]["neighbours"]
    if num_neighbours == 0:
        return [
            "no sample has a neighbour outside its own image and group: give more samples, or"
            " smaller groups"
        ]
    rows = []
    for name, sentence in _filters(report["similarity"], options).items():
        share = report["dropped"][name] / num_neighbours if num_neighbours else 0
        if share >= NOTEWORTHY:
            rows.append((share, f"{share:.0%} of {sentence}"))
        num_neighbours -= report["dropped"][name]
    rows.sort(key=lambda row: -row[0])
    return [sentence for _, sentence in rows] + _of_candidates(report, options)


def _filters(similarity: dict[str, Any], options: AddNegativesConfig) -> dict[str, str]:
    """Return a sentence per filter, in the order in which they drop."""
    floor = options.min_visual_similarity
    threshold = options.cosine_threshold
    visual = similarity["visual"]["neighbours"]
    text = similarity["text"]["neighbours"]
    quarters = ("25%", "median", "75%")
    lower = [visual[name] for name in quarters if visual[name] < floor]
    higher = [text[name] for name in quarters if text[name] > threshold]
    return {
        "below_similarity_floor": (
            f"the visual neighbours are below --min-visual-similarity {floor} (median"
            f" {visual['median']}, upper quartile {visual['75%']}): lower it, to"
            f" {max(lower, default=visual['25%'])} for a start"
        ),
        "same_text": "the rest have the sample's own text: write texts that tell the images apart",
        "generic_text": "the rest have a generic text: write texts that say what is there",
        "text_too_near": (
            "the rest have a text at or above the last threshold, --cosine-threshold"
            f" {threshold} + 0.18 (lower quartile {text['25%']}, median {text['median']}): raise"
            f" it, to {min(higher, default=1.0)} for a start, look at more neighbours than --k-nn"
            f" {options.k_nn}, or give a --text-encoder that tells the texts apart better"
        ),
    }


def _of_candidates(report: dict[str, Any], options: AddNegativesConfig) -> list[str]:
    """On what keeps candidates from being chosen: uses and lengths of texts, and clusters."""
    rows = []
    used_up = report["reasons"].get("every candidate's text used up", 0)
    if used_up:
        rows.append(
            f"{used_up} samples have candidates whose texts are all used up: raise"
            f" --fallback-phrase-reuse-limit {options.fallback_phrase_reuse_limit}, or look at more"
            f" neighbours than --k-nn {options.k_nn}"
        )
    short = report["dropped"]["short_candidates"] / max(1, report["dropped"]["candidates"])
    if short >= NOTEWORTHY:
        rows.append(
            f"{short:.0%} of the candidates have texts shorter than --min-answer-length"
            f" {options.min_answer_length}, which may be used less often: lower it"
        )
    if report["clusters"]["clusters"] == 1:
        rows.append(
            "all images are one cluster, so there are no diverse negatives: give --num-clusters 2"
            " or more"
        )
    return rows
