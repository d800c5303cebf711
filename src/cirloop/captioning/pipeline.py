"""From mined negatives to augmented triplets: generate texts, check them, select the surest.

Every rejected text is kept with the name of the check that rejected it. ReCALL (CVPR 2026, arXiv
2602.01639) rewrites the text so that the mined image is right, and lets the foundation model verify
it. The round trip through the current embedder is the second opinion.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypedDict

from cirloop.captioning.base import Answer, CaptionRequest
from cirloop.captioning.batched_captioner import CaptionClient
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.parsing import parse_answer, without_set_phrases
from cirloop.captioning.prompts import REWRITE, VERIFY, Prompt
from cirloop.data.known_positives import (
    DUPLICATE,
    ENOUGH,
    ENOUGH_IN_ALL,
    KNOWN_ALREADY,
    SURER_KEPT,
    WRITTEN_AGAIN,
    normal_text,
)
from cirloop.io.redact import escape_control
from cirloop.types import AugmentedTriplet, ImageId, MinedNegative, Query, QueryId, Triplet

UNPARSEABLE = "unparseable"
CUT_OFF = "cut off"
SET_PHRASE = "set phrase"
RoundTrip = Callable[[Sequence[Query], Sequence[ImageId]], Sequence[int]]
"""Queries and the image each should retrieve -> the rank (from 1) that the current embedder gives
each image."""


class RejectedRow(TypedDict):
    """A rejected text in augmented_samples_iter_{t}.json."""

    source: QueryId
    reference: ImageId
    image: ImageId
    original_text: str
    text: str
    reason: str
    checks: dict[str, float]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A text for a mined image. `reason` names the check that rejected it; empty = not rejected."""

    negative: MinedNegative
    reference: ImageId
    original_text: str
    text: str
    reason: str = ""
    checks: Mapping[str, float] = field(default_factory=dict)
    prompt: str = REWRITE.name
    category: str | None = None
    """Category of the human query."""

    def row(self) -> RejectedRow:
        """Return the candidate as the artifact lists it."""
        return {
            "source": self.negative.query,
            "reference": self.reference,
            "image": self.negative.image,
            "original_text": self.original_text,
            "text": self.text,
            "reason": self.reason,
            "checks": dict(self.checks),
        }


def generate_candidates(
    captioner: CaptionClient,
    mined: Sequence[MinedNegative],
    queries: Mapping[QueryId, Query],
    settings: CaptioningSettings,
    seed: int,
    prompt: Prompt = REWRITE,
) -> list[Candidate]:
    """Generate `settings.num_candidates` texts per mined image, the first greedy; equal texts once.

    An answer that had not ended after `settings.max_new_tokens` tokens is kept as it is with the
    reason `cut off`; one that is not of the kind the prompt asks for, with `unparseable`.
    """
    requests = [
        CaptionRequest(queries[n.query].reference, n.image, queries[n.query].text) for n in mined
    ]
    temperatures = [0.0] + [settings.temperature] * (settings.num_candidates - 1)
    answers = captioner.generate(
        prompt, requests, settings.max_new_tokens, temperatures, seed, "captions"
    )
    candidates = []
    for negative, request, request_answers in zip(mined, requests, answers, strict=True):
        texts = dict.fromkeys(_text_and_reason(answer, prompt) for answer in request_answers)
        for text, reason in texts:
            candidate = Candidate(
                negative,
                request.reference,
                request.text,
                text,
                reason,
                prompt=prompt.name,
                category=queries[negative.query].category,
            )
            candidates.append(candidate)
    return candidates


def _text_and_reason(answer: Answer, prompt: Prompt) -> tuple[str, str]:
    """Return an answer's text and an empty reason, or the whole answer and why it has no text."""
    if not answer.ended:
        return answer.text, CUT_OFF
    text = parse_answer(answer.text, prompt.answer)
    return (answer.text, UNPARSEABLE) if text is None else (text, "")


def check_format(candidate: Candidate, settings: CaptioningSettings) -> Candidate:
    """Reject talk, a declined request, markup, the original text, and a text too short or too long.

    Set phrases at the beginning (`parsing.SET_PHRASES`) are removed.
    """
    if candidate.reason:
        return candidate
    stripped = candidate.text
    if candidate.text.strip(' \n"'):
        without = without_set_phrases(candidate.text)
        if without is None:
            return replace(candidate, reason=SET_PHRASE)
        stripped = without
    text = " ".join(stripped.strip().strip('"').split())
    reason = _format_reason(text, "\n" in stripped.strip(), candidate.original_text, settings)
    return replace(candidate, text=text, reason=reason)


def _format_reason(
    text: str, has_line_break: bool, original_text: str, settings: CaptioningSettings
) -> str:
    """Return why the format of `text` is refused; empty where it is not."""
    num_words = len(text.split())
    has_markup = any(mark in text for mark in "<>{}[]|")
    if not text or has_line_break or has_markup or escape_control(text) != text:
        return UNPARSEABLE
    if text.casefold().rstrip(".") == "none":
        return "declined"  # as the prompt allows
    if normal_text(text) == normal_text(original_text):
        return WRITTEN_AGAIN
    if num_words < settings.min_words:
        return "too short"
    if num_words > settings.max_words:
        return "too long"
    return ""


def verify(
    captioner: CaptionClient,
    candidates: Sequence[Candidate],
    settings: CaptioningSettings,
    prompt: Prompt = VERIFY,
) -> list[Candidate]:
    """Reject texts that the foundation model does not find right for the mined image."""
    checked = list(candidates)
    remaining = _not_rejected(checked)
    requests = [
        CaptionRequest(checked[i].reference, checked[i].negative.image, checked[i].text)
        for i in remaining
    ]
    probabilities = captioner.yes_probability(prompt, requests, "captions: verify")
    for i, probability in zip(remaining, probabilities, strict=True):
        reason = "not verified" if probability < settings.min_verify_probability else ""
        checks = {**checked[i].checks, "verify": probability}
        checked[i] = replace(checked[i], checks=checks, reason=reason)
    return checked


def check_round_trip(
    candidates: Sequence[Candidate], settings: CaptioningSettings, round_trip: RoundTrip
) -> list[Candidate]:
    """Reject texts for which the embedder ranks the mined image outside the ranks of the
    settings."""
    checked = list(candidates)
    remaining = _not_rejected(checked)
    queries = [
        Query(QueryId(str(i)), checked[i].reference, checked[i].text, checked[i].category)
        for i in remaining
    ]
    ranks = round_trip(queries, [checked[i].negative.image for i in remaining])
    for i, rank in zip(remaining, ranks, strict=True):
        reason = "round trip" if rank > (settings.max_round_trip_rank or rank) else ""
        if rank < settings.min_round_trip_rank:
            reason = KNOWN_ALREADY
        checks = {**checked[i].checks, "round_trip_rank": rank}
        checked[i] = replace(checked[i], checks=checks, reason=reason)
    return checked


def _not_rejected(candidates: Sequence[Candidate]) -> list[int]:
    """Return the indices of candidates that no check has rejected."""
    return [i for i, candidate in enumerate(candidates) if not candidate.reason]


def select(
    candidates: Sequence[Candidate],
    known: set[tuple[ImageId, str]],
    settings: CaptioningSettings,
    iteration: int,
    captioner: str,
    before: Counter[QueryId] | None = None,
) -> tuple[list[AugmentedTriplet], list[Candidate]]:
    """Select the surest text per mined image and the surest images per query.

    `before` counts the accepted triplets of earlier iterations per query.

    Returns the accepted triplets, and the rejected candidates each with its reason. `known` holds
    (reference, `normal_text`) of every existing triplet: a second target for one query would be a
    contradiction, and is called a duplicate.
    """
    accepted: dict[int, AugmentedTriplet] = {}
    reasons: dict[int, str] = {}
    taken_queries = set(known)
    taken_pairs: set[tuple[QueryId, ImageId]] = set()
    num_accepted: Counter[QueryId] = Counter()
    surest_first = sorted(
        _not_rejected(candidates), key=lambda i: (-candidates[i].checks.get("verify", 0.0), i)
    )
    for i in surest_first:
        candidate = candidates[i]
        source = candidate.negative.query
        pair = (source, candidate.negative.image)
        query = (candidate.reference, normal_text(candidate.text))
        if pair in taken_pairs:
            reasons[i] = SURER_KEPT
        elif query in taken_queries:
            reasons[i] = DUPLICATE
        elif num_accepted[source] >= _room(settings, before, source):
            reasons[i] = ENOUGH
        elif len(accepted) == settings.max_per_iteration:
            reasons[i] = ENOUGH_IN_ALL
        else:
            taken_queries.add(query)
            taken_pairs.add(pair)
            num_accepted[source] += 1
            query_id = QueryId(f"{source}+{iteration}.{num_accepted[source]}")
            accepted[i] = _augmented_triplet(candidate, query_id, iteration, captioner)
    rejected = [
        replace(candidate, reason=reasons.get(i, candidate.reason))
        for i, candidate in enumerate(candidates)
        if i not in accepted
    ]
    return [accepted[i] for i in sorted(accepted)], rejected


def _room(settings: CaptioningSettings, before: Counter[QueryId] | None, source: QueryId) -> int:
    """Return how many triplets of an iteration a query may have."""
    if settings.max_per_query_in_all is None or before is None:
        return settings.max_per_query
    return min(settings.max_per_query, settings.max_per_query_in_all - before[source])


def _augmented_triplet(
    candidate: Candidate, query_id: QueryId, iteration: int, captioner: str
) -> AugmentedTriplet:
    query = Query(query_id, candidate.reference, candidate.text, candidate.category)
    triplet = Triplet(query, candidate.negative.image)
    source = candidate.negative.query
    return AugmentedTriplet(
        triplet, source, iteration, captioner, candidate.prompt, candidate.checks
    )
