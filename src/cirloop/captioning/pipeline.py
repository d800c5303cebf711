"""From mined negatives to augmented triplets: write, check by name, keep the surest, and the rest
with the reason.

ReCALL (CVPR 2026, arXiv 2602.01639) rewrites the text so that the mined image is right, and lets
the foundation model verify it. The round trip through the current embedder is the second opinion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cirloop.captioning.base import Answer, Ask
from cirloop.captioning.batched_captioner import Asked
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.parsing import text_of, without_set_phrases
from cirloop.captioning.prompts import REWRITE, VERIFY, Prompt
from cirloop.data.known_positives import DUPLICATE, ENOUGH, SURER_KEPT, WRITTEN_AGAIN, normal_text
from cirloop.io.redact import escape_control
from cirloop.types import AugmentedTriplet, ImageId, MinedNegative, Query, QueryId, Triplet

UNPARSEABLE, CUT_OFF, SET_PHRASE = "unparseable", "cut off", "set phrase"
RoundTrip = Callable[[Sequence[Query], Sequence[ImageId]], Sequence[int]]
"""Queries and the images they should find -> the rank (from 1) the current embedder gives each."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One text for one mined image. `reason` names the check that rejected it; empty = accepted so
    far."""

    negative: MinedNegative
    reference: ImageId
    original: str
    text: str
    reason: str = ""
    checks: Mapping[str, float] = field(default_factory=dict)
    prompt: str = REWRITE.name
    category: str | None = None
    """Of the human query."""

    def row(self) -> dict[str, Any]:
        return {
            "source": self.negative.query,
            "reference": self.reference,
            "image": self.negative.image,
            "original_text": self.original,
            "text": self.text,
            "reason": self.reason,
            "checks": dict(self.checks),
        }


def write_candidates(
    eyes: Asked,
    mined: Sequence[MinedNegative],
    queries: Mapping[QueryId, Query],
    settings: CaptioningSettings,
    seed: int,
    prompt: Prompt = REWRITE,
) -> list[Candidate]:
    """`settings.num_candidates` texts per mined image, the first greedy; equal texts once. An
    answer that had not ended after `settings.max_new_tokens` tokens is kept as it is, `cut off`,
    and so is one that is not of the kind the prompt asks for, `unparseable`."""
    asks = [Ask(queries[n.query].reference, n.image, queries[n.query].text) for n in mined]
    temperatures = [0.0] + [settings.temperature] * (settings.num_candidates - 1)
    answers = eyes.write(prompt, asks, settings.max_new_tokens, temperatures, seed, "captions")
    out = []
    for negative, ask, several in zip(mined, asks, answers, strict=True):
        category = queries[negative.query].category
        for text, reason in dict.fromkeys(_said(answer, prompt) for answer in several):
            out.append(
                Candidate(
                    negative,
                    ask.first,
                    ask.text,
                    text,
                    reason,
                    prompt=prompt.name,
                    category=category,
                )
            )
    return out


def _said(answer: Answer, prompt: Prompt) -> tuple[str, str]:
    """An answer's text, and why there is none in it; the answer as it is where that is so."""
    if not answer.ended:
        return answer.text, CUT_OFF
    text = text_of(answer.text, prompt.answer)
    return (answer.text, UNPARSEABLE) if text is None else (text, "")


def check_form(candidate: Candidate, settings: CaptioningSettings) -> Candidate:
    """No set phrase, not declined, parseable, not the original text, of sensible length.

    Set phrases that an answer begins with are taken off (`answers.SET_PHRASES`).
    """
    if candidate.reason:
        return candidate
    rest = without_set_phrases(candidate.text) if candidate.text.strip(' \n"') else candidate.text
    if rest is None:
        return replace(candidate, reason=SET_PHRASE)
    text = " ".join(rest.strip().strip('"').split())
    words = len(text.split())
    if (
        not text
        or "\n" in rest.strip()
        or any(mark in text for mark in "<>{}[]|")
        or escape_control(text) != text
    ):
        reason = UNPARSEABLE
    elif text.casefold().rstrip(".") == "none":
        reason = "declined"  # as the prompt allows
    elif normal_text(text) == normal_text(candidate.original):
        reason = WRITTEN_AGAIN
    elif words < settings.min_words:
        reason = "too short"
    elif words > settings.max_words:
        reason = "too long"
    else:
        reason = ""
    return replace(candidate, text=text, reason=reason)


def verify(
    eyes: Asked,
    candidates: Sequence[Candidate],
    settings: CaptioningSettings,
    prompt: Prompt = VERIFY,
) -> list[Candidate]:
    """Ask the foundation model whether each text, still accepted, is right."""
    out = list(candidates)
    left = [i for i, c in enumerate(out) if not c.reason]
    asks = [Ask(out[i].reference, out[i].negative.image, out[i].text) for i in left]
    for i, p in zip(left, eyes.yes(prompt, asks, "captions: verify"), strict=True):
        failed = "not verified" if p < settings.min_verify_probability else ""
        out[i] = replace(out[i], checks={**out[i].checks, "verify": p}, reason=failed)
    return out


def check_round_trip(
    candidates: Sequence[Candidate], settings: CaptioningSettings, round_trip: RoundTrip
) -> list[Candidate]:
    """The current embedder ranks the mined image within the top `settings.max_round_trip_rank` for
    the new text."""
    out = list(candidates)
    left = [i for i, c in enumerate(out) if not c.reason]
    queries = [Query(QueryId(str(i)), out[i].reference, out[i].text, out[i].category) for i in left]
    for i, rank in zip(
        left, round_trip(queries, [out[i].negative.image for i in left]), strict=True
    ):
        failed = "round trip" if rank > settings.max_round_trip_rank else ""
        out[i] = replace(out[i], checks={**out[i].checks, "round_trip_rank": rank}, reason=failed)
    return out


def choose(
    candidates: Sequence[Candidate],
    known: set[tuple[ImageId, str]],
    settings: CaptioningSettings,
    iteration: int,
    captioner: str,
) -> tuple[list[AugmentedTriplet], list[Candidate]]:
    """The surest text per mined image and the surest images per query; the rest, each with its
    reason.

    `known` holds (reference, `normal_text`) of every triplet there is already: a second target for
    one query would be a contradiction, and is called a duplicate.
    """
    out = list(candidates)
    taken = set(known)
    used: set[tuple[QueryId, ImageId]] = set()
    per_query: Counter[QueryId] = Counter()
    accepted: list[tuple[int, AugmentedTriplet]] = []
    sure = sorted(
        (i for i, c in enumerate(out) if not c.reason),
        key=lambda i: (-out[i].checks.get("verify", 0.0), i),
    )
    for i in sure:
        c = out[i]
        source, image, key = c.negative.query, c.negative.image, (c.reference, normal_text(c.text))
        if (source, image) in used:
            reason = SURER_KEPT
        elif key in taken:
            reason = DUPLICATE
        elif per_query[source] == settings.max_per_query:
            reason = ENOUGH
        else:
            taken.add(key)
            used.add((source, image))
            per_query[source] += 1
            query = Query(
                QueryId(f"{source}+{iteration}.{per_query[source]}"),
                c.reference,
                c.text,
                c.category,
            )
            accepted.append(
                (
                    i,
                    AugmentedTriplet(
                        Triplet(query, image), source, iteration, captioner, c.prompt, c.checks
                    ),
                )
            )
            continue
        out[i] = replace(c, reason=reason)
    kept = {i for i, _ in accepted}
    return [a for _, a in sorted(accepted, key=lambda pair: pair[0])], [
        c for i, c in enumerate(out) if i not in kept
    ]
