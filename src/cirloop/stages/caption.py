"""Captioning: texts that make mined images right, checked and selected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.rows import read_anchors, read_augmented, read_mined
from cirloop.artifacts.store import Artifact
from cirloop.captioning import pipeline
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.batched_captioner import CaptionClient
from cirloop.captioning.planted import planted_pairs
from cirloop.captioning.relabel import HUMAN_TEXT, Judgement, judge_mined
from cirloop.data.known_positives import normal_text
from cirloop.stages import futile
from cirloop.stages.context import RunContext
from cirloop.types import AugmentedTriplet, ImageId, MinedNegative, Query, QueryId, Triplet


def caption(
    run: RunContext,
    iteration: int,
    negatives: Artifact,
    checkpoint: Artifact,
    before: Sequence[Artifact],
) -> Artifact | None:
    """Write augmented_samples_iter_{t}.json: mined images with a new text that makes them right,
    and rejected texts; None where `captioning.enabled` is off.

    Raises FutileRound where nothing is mined or accepted, and that ends the run.
    """
    config = run.config
    reason = futile.nothing_mined(negatives.read(), config.mining)
    futile.end_if_futile(run, iteration - 1, reason)
    if not config.captioning.enabled:
        return None
    config.captioning.check(config.foundation)

    def build(path: Path) -> None:
        texts = _write_and_check(run, iteration, negatives, checkpoint)
        rows = [row for artifact in before for row in read_augmented(artifact)]
        present_texts = {
            (t.query.reference, normal_text(t.query.text))
            for t in (*run.data.train.triplets, *(row.triplet for row in rows))
        }
        num_before = Counter(row.source for row in rows if row.prompt != HUMAN_TEXT)
        accepted, rejected = pipeline.select(
            texts.candidates,
            present_texts,
            config.captioning,
            iteration,
            texts.captioner,
            num_before,
        )
        reasons = Counter(candidate.reason for candidate in rejected)
        content: dict[str, Any] = {
            "schema": 1,
            "iteration": iteration,
            "summary": _counts(texts.candidates, accepted)
            | {"rejected": dict(sorted(reasons.items()))},
            "accepted": [asdict(triplet) for triplet in accepted],
            "rejected": [candidate.row() for candidate in rejected],
        }
        anchors = {query.id for query in read_anchors(negatives).queries}
        if anchors:
            of_anchors = [c for c in texts.candidates if c.negative.query in anchors]
            kept = [triplet for triplet in accepted if triplet.source in anchors]
            content["summary"] |= {"anchors": _counts(of_anchors, kept)}
        if texts.judgement is not None:
            content["summary"] |= {"relabelled": texts.judgement}
            content["relabelled"] = [asdict(triplet) for triplet in texts.relabelled]
        futile.warn(run, futile.nothing_accepted(content))
        write_json(path, run.mark | content)

    inputs = [negatives.digest, checkpoint.digest, run.data.digest, *(b.digest for b in before)]
    name = f"augmented_samples_iter_{iteration}.json"
    samples = run.build(name, _settings(run), inputs, build, iteration)
    futile.end_if_futile(run, iteration - 1, futile.nothing_accepted(samples.read()))
    return samples


def _counts(
    candidates: Sequence[pipeline.Candidate], accepted: Sequence[AugmentedTriplet]
) -> dict[str, Any]:
    """Return how many images texts were written for, how many texts, and how many were accepted."""
    return {
        "mined": len({(c.negative.query, c.negative.image) for c in candidates}),
        "candidates": len(candidates),
        "accepted": len(accepted),
    }


def _settings(run: RunContext) -> dict[str, Any]:
    """Return the settings that captions depend on."""
    settings = run.stage_config("model", "foundation", "captioning", "data")
    # Names, or paths of files: the prompts themselves count.
    for name in ("rewrite_prompt", "verify_prompt"):
        settings["captioning"].pop(name, None)
    prompts = run.config.captioning.prompts(run.config.foundation)
    settings["prompts"] = [asdict(prompt) for prompt in (prompts.rewrite, prompts.verify)]
    return settings


class _Texts(NamedTuple):
    """What a captioner gives for mined images: texts, and images right for the human text."""

    candidates: list[pipeline.Candidate]
    captioner: str
    relabelled: list[AugmentedTriplet]
    judgement: Judgement | None


def _write_and_check(
    run: RunContext, iteration: int, negatives: Artifact, checkpoint: Artifact
) -> _Texts:
    """Judge the mined images, where that is asked for, and have texts written for them and
    checked."""
    settings = run.config.captioning
    prompts = settings.prompts(run.config.foundation)
    train = run.data.train
    mined = read_mined(negatives)
    anchors = read_anchors(negatives)
    queries = {q.id: q for q in (*(t.query for t in train.triplets), *anchors.queries)}
    captioner = run.captioner(lambda: run.embedder(checkpoint))
    relabelled: list[AugmentedTriplet] = []
    judgement: Judgement | None = None
    if settings.relabel.min_probability:
        relabelled, judgement = _relabel(run, captioner, mined, queries, iteration)
        positives = {(row.source, row.triplet.target) for row in relabelled}
        mined = [n for n in mined if (n.query, n.image) not in positives]
    pairs = [*mined, *anchors.pairs]
    seed = run.config.seed + 1000 * iteration
    candidates = pipeline.generate_candidates(
        captioner, pairs, queries, settings, seed, prompts.rewrite
    )
    candidates = [pipeline.check_format(candidate, settings) for candidate in candidates]
    if settings.min_verify_probability:
        candidates = pipeline.verify(captioner, candidates, settings, prompts.verify)
    captioner_name = captioner.name
    del captioner  # before the embedder comes in

    def rank_targets(queries: Sequence[Query], images: Sequence[ImageId]) -> Sequence[int]:
        if not queries:
            return []
        return run.rank_targets(run.embedder(checkpoint), queries, images, train)

    if settings.checks_round_trip:
        candidates = pipeline.check_round_trip(candidates, settings, rank_targets)
    return _Texts(candidates, captioner_name, relabelled, judgement)


def _relabel(
    run: RunContext,
    captioner: CaptionClient,
    mined: Sequence[MinedNegative],
    queries: Mapping[QueryId, Query],
    iteration: int,
) -> tuple[list[AugmentedTriplet], Judgement]:
    """Return mined images that are right for the human text, as triplets with that text.

    Warns where the foundation model is not precise enough to say so.
    """
    config = run.config
    settings = config.captioning.relabel
    prompt = config.captioning.prompts(config.foundation).verify

    def yes_probability(requests: Sequence[CaptionRequest]) -> Sequence[float]:
        return captioner.yes_probability(prompt, requests, "captions: judge mined images")

    pairs = [
        CaptionRequest(queries[n.query].reference, n.image, queries[n.query].text) for n in mined
    ]
    planted = planted_pairs(run.data.train, settings.num_planted, config.seed)
    positives, judgement = judge_mined(pairs, planted, settings, yes_probability)
    if judgement["right"] and not positives:
        precision = judgement["precision"]
        figure = "not known" if precision is None else f"{100 * precision:.0f}%"
        run.costs.warn(
            f"none of {judgement['right']} mined images became a positive of its human text: the"
            f" foundation model's precision on planted pairs is {figure}, and"
            f" captioning.relabel.min_precision is {settings.min_precision}. Raise"
            " captioning.relabel.min_probability, or use another --foundation_model_backbone."
        )
    rows = []
    for number, (i, probability) in enumerate(positives.items()):
        query = queries[mined[i].query]
        name = QueryId(f"{query.id}+{iteration}.right{number}")
        triplet = Triplet(Query(name, query.reference, query.text, query.category), mined[i].image)
        checks = {"verify": probability}
        rows.append(
            AugmentedTriplet(triplet, query.id, iteration, captioner.name, HUMAN_TEXT, checks)
        )
    return rows, judgement
