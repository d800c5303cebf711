"""From mined negatives to augmented triplets: write, check by name, keep the surest, and the rest with the reason.

ReCALL (CVPR 2026, arXiv 2602.01639) rewrites the text so that the mined image is right, and lets the foundation
model verify it. The round trip through the current embedder is the second opinion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cirloop.backbones.features import VisionFeatures
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.prompts import REWRITE, VERIFY
from cirloop.captioning.qwen2_vl import Ask
from cirloop.types import AugmentedTriplet, ImageId, MinedNegative, Query, QueryId, Triplet

PROMPTS = (REWRITE, VERIFY)
RoundTrip = Callable[[Sequence[Query], Sequence[ImageId]], Sequence[int]]
"""Queries and the images they should find -> the rank (from 1) the current embedder gives each."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One text for one mined image. `reason` names the check that rejected it; empty = accepted so far."""

    negative: MinedNegative
    reference: ImageId
    original: str
    text: str
    reason: str = ""
    checks: Mapping[str, float] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        return {
            "source": self.negative.query, "reference": self.reference, "image": self.negative.image,
            "original_text": self.original, "text": self.text, "reason": self.reason,
            "checks": dict(self.checks),
        }  # fmt: skip


def write_candidates(
    captioner: Any, features: VisionFeatures, mined: Sequence[MinedNegative],
    queries: Mapping[QueryId, Query],
    settings: CaptioningSettings, seed: int, progress: Callable[[Any, str], Any],
) -> list[Candidate]:  # fmt: skip
    """`settings.candidates` texts per mined image, the first greedy; equal texts once."""
    asks = [Ask(queries[n.query].reference, n.image, queries[n.query].text) for n in mined]
    features.ensure(
        [image for ask in asks for image in (ask.first, ask.second)],
        lambda b: progress(b, "captions: vision"),
    )
    order = sorted(range(len(asks)), key=lambda i: (len(asks[i].text), i))
    batches = [order[i : i + settings.batch_size] for i in range(0, len(order), settings.batch_size)]
    texts: list[list[str]] = [[] for _ in asks]
    for number, rows in enumerate(progress(batches, "captions: write")):
        batch = [asks[i] for i in rows]
        vision = features.get([image for ask in batch for image in (ask.first, ask.second)])
        for turn in range(settings.candidates):
            temperature = settings.temperature if turn else 0.0
            answers = captioner.write(
                REWRITE,
                batch,
                vision,
                settings.max_new_tokens,
                temperature,
                seed + number * settings.candidates + turn,
            )
            for i, answer in zip(rows, answers, strict=True):
                texts[i].append(answer)
    return [
        Candidate(negative, ask.first, ask.text, text)
        for negative, ask, several in zip(mined, asks, texts, strict=True)
        for text in dict.fromkeys(several)
    ]


def check_form(candidate: Candidate, settings: CaptioningSettings) -> Candidate:
    """Not declined, parseable, not the original text, of sensible length."""
    text = " ".join(candidate.text.strip().strip('"').split())
    words = len(text.split())
    if not text or "\n" in candidate.text.strip() or any(mark in text for mark in "<>{}[]|"):
        reason = "unparseable"
    elif text.casefold().rstrip(".") == "none":
        reason = "declined"  # as the prompt allows
    elif text.casefold().rstrip(".") == candidate.original.casefold().rstrip("."):
        reason = "same as the original text"
    elif words < settings.min_words:
        reason = "too short"
    elif words > settings.max_words:
        reason = "too long"
    else:
        reason = ""
    return replace(candidate, text=text, reason=reason)


def verify(
    captioner: Any, features: VisionFeatures, candidates: Sequence[Candidate], settings: CaptioningSettings,
    progress: Callable[[Any, str], Any],
) -> list[Candidate]:  # fmt: skip
    """Ask the foundation model whether each text, still accepted, is right."""
    out = list(candidates)
    left = sorted((i for i, c in enumerate(out) if not c.reason), key=lambda i: (len(out[i].text), i))
    batches = [left[i : i + settings.batch_size] for i in range(0, len(left), settings.batch_size)]
    for rows in progress(batches, "captions: verify"):
        asks = [Ask(out[i].reference, out[i].negative.image, out[i].text) for i in rows]
        vision = features.get([image for ask in asks for image in (ask.first, ask.second)])
        for i, p in zip(rows, captioner.yes(VERIFY, asks, vision), strict=True):
            failed = "not verified" if p < settings.verify else ""
            out[i] = replace(out[i], checks={**out[i].checks, "verify": p}, reason=failed)
    return out


def check_round_trip(
    candidates: Sequence[Candidate], settings: CaptioningSettings, round_trip: RoundTrip
) -> list[Candidate]:
    """The current embedder ranks the mined image within the top `settings.round_trip` for the new text."""
    out = list(candidates)
    left = [i for i, c in enumerate(out) if not c.reason]
    queries = [Query(QueryId(str(i)), out[i].reference, out[i].text) for i in left]
    for i, rank in zip(left, round_trip(queries, [out[i].negative.image for i in left]), strict=True):
        failed = "round trip" if rank > settings.round_trip else ""
        out[i] = replace(out[i], checks={**out[i].checks, "round_trip_rank": rank}, reason=failed)
    return out


def choose(
    candidates: Sequence[Candidate],
    known: set[tuple[ImageId, str]],
    settings: CaptioningSettings,
    iteration: int,
    captioner: str,
) -> tuple[list[AugmentedTriplet], list[Candidate]]:
    """The surest text per mined image and the surest images per query; the rest, each with its reason.

    `known` holds (reference, text) of every triplet there is already: a second target for one query would be a
    contradiction, and is called a duplicate.
    """
    out = list(candidates)
    taken = set(known)
    used: set[tuple[QueryId, ImageId]] = set()
    per_query: Counter[QueryId] = Counter()
    accepted: list[tuple[int, AugmentedTriplet]] = []
    sure = sorted((i for i, c in enumerate(out) if not c.reason), key=lambda i: (-out[i].checks.get("verify", 0.0), i))
    for i in sure:
        c = out[i]
        source, image, key = c.negative.query, c.negative.image, (c.reference, c.text.casefold())
        if (source, image) in used:
            reason = "a surer text was kept"
        elif key in taken:
            reason = "duplicate"
        elif per_query[source] == settings.max_per_query:
            reason = "enough for this query"
        else:
            taken.add(key)
            used.add((source, image))
            per_query[source] += 1
            query = Query(QueryId(f"{source}+{iteration}.{per_query[source]}"), c.reference, c.text)
            accepted.append(
                (
                    i,
                    AugmentedTriplet(Triplet(query, image), source, iteration, captioner, REWRITE.name, c.checks),
                )
            )
            continue
        out[i] = replace(c, reason=reason)
    kept = {i for i, _ in accepted}
    return [a for _, a in sorted(accepted, key=lambda pair: pair[0])], [c for i, c in enumerate(out) if i not in kept]
