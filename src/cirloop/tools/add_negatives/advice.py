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
    dropped = report["dropped"]
    if dropped["neighbours"] == 0:
        return [
            "no sample has a neighbour outside its own image and group: give more samples, or"
            " smaller groups"
        ]
    says = _filters(report["similarity"], options)
    left = dropped["neighbours"]
    rows = []
    for name, sentence in says.items():
        share = dropped[name] / left if left else 0
        if share >= NOTEWORTHY:
            rows.append((share, sentence.format(share=f"{share:.0%}")))
        left -= dropped[name]
    return [sentence for _, sentence in sorted(rows, key=lambda row: -row[0])] + _of_candidates(
        report, options
    )


def _filters(similarity: dict[str, Any], options: AddNegativesConfig) -> dict[str, str]:
    """Return a sentence per filter, in the order in which they drop."""
    visual, text = (
        [similarity[side]["neighbours"][q] for q in ("25%", "median", "75%")]
        for side in ("visual", "text")
    )
    floor = options.min_visual_similarity
    threshold = options.cosine_threshold
    lower = max((value for value in visual if value < floor), default=min(visual))
    higher = min((value for value in text if value > threshold), default=1.0)
    return {
        "below_similarity_floor": (
            f"{{share}} of the visual neighbours are below --min-visual-similarity {floor} "
            f"(median {visual[1]}, upper quartile {visual[2]}): lower it, to {lower} for a start"
        ),
        "same_text": (
            "{share} of the rest have the sample's own text: write texts that tell the images apart"
        ),
        "generic_text": (
            "{share} of the rest have a generic text: write texts that say what is there"
        ),
        "text_too_near": (
            "{share} of the rest have a text at or above the last threshold, --cosine-threshold"
            f" {threshold} + 0.18 (lower quartile {text[0]}, median {text[1]}): raise it, to"
            f" {higher} for a start, look at more neighbours than --k-nn {options.k_nn}, or give a"
            " --text-encoder that tells the texts apart better"
        ),
    }


def _of_candidates(report: dict[str, Any], options: AddNegativesConfig) -> list[str]:
    """On what keeps candidates from being chosen: uses and lengths of texts, and clusters."""
    dropped = report["dropped"]
    rows = []
    used_up = report["reasons"].get("every candidate's text used up", 0)
    if used_up:
        rows.append(
            f"{used_up} samples have candidates whose texts are all used up: raise"
            f" --fallback-phrase-reuse-limit {options.fallback_phrase_reuse_limit}, or look at more"
            f" neighbours than --k-nn {options.k_nn}"
        )
    if dropped["candidates"] and dropped["short_candidates"] / dropped["candidates"] >= NOTEWORTHY:
        rows.append(
            f"{dropped['short_candidates'] / dropped['candidates']:.0%} of the candidates have"
            f" texts shorter than --min-answer-length {options.min_answer_length}, which may be"
            " used less often: lower it"
        )
    if report["clusters"]["clusters"] == 1:
        rows.append(
            "all images are one cluster, so there are no diverse negatives: give --num-clusters 2"
            " or more"
        )
    return rows
