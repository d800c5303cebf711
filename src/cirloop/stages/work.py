"""What a run does, counted: how often each stage does each piece of work. Time is these counts by
what a piece costs, measured (`measure.py`) or by a device's rates (`rates.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from cirloop.backbones.model_settings import VlmSettings
from cirloop.captioning.planted import WRONG_PER_RIGHT
from cirloop.config.run import RunConfig
from cirloop.data import Dataset
from cirloop.distributed import launcher
from cirloop.stages.lengths import Lengths, mean, num_batches
from cirloop.stages.model_checks import num_images, used_splits
from cirloop.training.config import RankedNegatives

Piece = Literal["load", "image", "row", "step", "read", "write", "search", "rank"]
PIECES: dict[Piece, str] = {
    "load": "loading the embedder",
    "image": "an image, decoded and through the tower",
    "row": "a token embedded, vision cached",
    "step": "a triplet in a step",
    "read": "a token of a question read",
    "write": "a token of a text written",
    "search": "a score where mining searches",
    "rank": "a score where targets are ranked",
}
"""Piece of work -> its unit."""
ALONE: frozenset[Piece] = frozenset({"load", "search", "rank"})
"""Pieces that several processes do not share."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a piece of work: of a call, however large, and of each unit in it."""

    call: float
    unit: float


@dataclass(frozen=True, slots=True)
class Work:
    """A piece of work in a stage: in how many calls, and of how many units in all."""

    piece: Piece
    calls: float
    units: float


Stages = dict[str, list[Work]]


@dataclass(frozen=True, slots=True)
class Counts:
    """Sizes of a run's data. `failed` is the share of training queries for which images are
    mined."""

    queries: int
    images: int
    eval_queries: int
    eval_images: int
    all_images: int
    failed: float = 1.0


def counts_of(config: RunConfig, data: Dataset, failed: float) -> Counts:
    """Count the data of a run."""
    parts = data.eval_splits(config.evaluation.split)
    skips = config.mining.skips_solved_queries
    return Counts(
        len(data.train.triplets) if config.trains else 0,
        len(data.train.gallery.ids) if config.trains else 0,
        sum(len(part.queries) for part in parts),
        sum(len(part.gallery.ids) for part in parts),
        num_images(used_splits(config, data)),
        failed if skips else 1.0,
    )


def once(config: RunConfig, counts: Counts, lengths: Lengths) -> Stages:
    """Count what is done once: vision features, iteration 0 and its evaluations, and the judge's
    measurement."""
    batch_size = config.runtime.vision_batch_size
    batches = ceil(counts.all_images / batch_size)
    evaluation = _evaluation(config, counts, lengths)
    stages = {
        "vision": [Work("image", batches, counts.all_images)],
        "evaluate base, 0": evaluation * (1 + config.evaluation.evaluate_base),
    }
    if config.training.iteration_0_steps:
        pairs = float(config.training.batch_size)
        stages["train 0"] = _training(config.training.iteration_0_steps, pairs)
    captioning = config.captioning
    asks = captioning.measures_judge(config.foundation, filters=config.mining.verifies)
    if config.num_iterations and captioning.enabled and asks:
        stages["judge"] = _judging(config, counts, lengths)
    return stages


def of_round(config: RunConfig, counts: Counts, lengths: Lengths) -> Stages:
    """Count what a round does whose images are encoded already."""
    rows = _rows(config, lengths.queries, counts.queries)
    rows += _rows(config, lengths.documents, counts.images)
    scores = float(counts.queries * counts.images)
    stages = {"mine": [*rows, Work("search", 0, scores)]}
    if config.captioning.enabled:
        stages["caption"] = _captions(config, counts, lengths)
    if isinstance(config.training.negatives, RankedNegatives):
        stages["rank negatives"] = _ranking(config, counts, lengths)
    stages["train"] = _training(config.training.steps_per_iteration, _pairs(config, counts))
    stages["evaluate"] = _evaluation(config, counts, lengths)
    return stages


def seconds(
    stages: Stages, costs: Mapping[Piece, Cost], num_processes: int = 1
) -> dict[str, float]:
    """Return the seconds of each stage whose pieces all have a cost."""
    return {
        name: sum(
            (work.calls * costs[work.piece].call + work.units * costs[work.piece].unit)
            / (1 if work.piece in ALONE else num_processes)
            for work in pieces
        )
        for name, pieces in stages.items()
        if {work.piece for work in pieces} <= costs.keys()
    }


def _rows(config: RunConfig, lengths: Sequence[int], num: int) -> list[Work]:
    runtime = config.runtime
    batches = num_batches(lengths, num, runtime.embed_batch_size, runtime.max_tokens_per_batch)
    return [Work("row", batches, num * mean(lengths))]


def _evaluation(config: RunConfig, counts: Counts, lengths: Lengths) -> list[Work]:
    """Return the work of one evaluation, whose model was trained in its own stage."""
    rows = _rows(config, lengths.queries, counts.eval_queries)
    if config.evaluation.alone:  # with grey references, and without texts
        rows *= 3
    rows += _rows(config, lengths.documents, counts.eval_images)
    # the best images, and the ranks of those that matter
    scores = 2.0 * counts.eval_queries * counts.eval_images
    return [Work("load", 0, 1), *rows, Work("rank", 0, scores)]


def _training(steps: int, pairs: float) -> list[Work]:
    return [Work("load", 0, 1), Work("step", steps, steps * pairs)]


def _pairs(config: RunConfig, counts: Counts) -> float:
    """Return the rows of a step of a round, in pairs of a query and a candidate.

    An explicit negative is a row where it is not the target of a text in the batch already.
    """
    training = config.training
    negatives = counts.failed * training.negatives_in_batch
    if not isinstance(training.negatives, RankedNegatives):
        if config.captioning.enabled and not training.bundles.size:
            augmented = training.augmented_fraction  # each with the triplet it came from
            others = 1 - 1 / max(1, config.mining.strategy.negatives_per_query)
            share = counts.failed * (1 - 2 * augmented) + augmented * others
            negatives = share * training.negatives_in_batch
    elif training.negatives.rows == "all":
        negatives = float(training.negatives_in_batch)
    return training.batch_size * (2 + negatives) / 2


def _captions(config: RunConfig, counts: Counts, lengths: Lengths) -> list[Work]:
    """Return the work of texts for all mined images: at most, since rejected ones are not judged or
    not ranked."""
    captioning = config.captioning
    references, pairs = _pairs_to_caption(config, counts)
    texts = pairs * captioning.num_candidates
    batches = ceil(pairs / captioning.batch_size)
    work = [
        Work("read", batches, lengths.rewrite.tokens(references, pairs, pairs)),
        Work("write", batches * captioning.num_candidates * lengths.answer, texts * lengths.answer),
    ]
    texts *= lengths.distinct
    if captioning.min_verify_probability:
        tokens = lengths.verify.tokens(references, pairs, texts)
        work.append(Work("read", ceil(texts / captioning.batch_size), tokens))
    if captioning.checks_round_trip:
        work += _rows(config, lengths.queries, round(texts))
        work.append(Work("rank", 0, texts * counts.images))
    if not _shares_weights(config):
        work.append(Work("load", 0, 2))  # the captioner, and then the embedder again
    return work


def _pairs_to_caption(config: RunConfig, counts: Counts) -> tuple[float, float]:
    """Return the references and the pairs, of mistakes and of anchors, that a round has texts
    written for."""
    mining = config.mining
    references = counts.queries * counts.failed * (mining.strategy.type != "none")
    pairs = references * mining.strategy.negatives_per_query
    anchors = min(mining.anchors.num, counts.images)
    if anchors:
        references += anchors
        pairs += anchors * mining.anchors.neighbors
    return references, pairs


def _ranking(config: RunConfig, counts: Counts, lengths: Lengths) -> list[Work]:
    """Return the work of ranking for explicit negatives, in the mean over rounds: the texts of all
    rounds so far, at most one a pair, and human queries and the gallery in rounds without mining,
    which has their vectors."""
    assert isinstance(config.training.negatives, RankedNegatives)
    num_rounds = config.num_iterations
    last = min(config.mining.num_rounds or num_rounds, num_rounds)
    texts = 0.0
    if config.captioning.enabled and config.training.negatives.rows == "all":
        rounds_so_far = sum(min(t, last) for t in range(1, num_rounds + 1)) / num_rounds
        _, pairs = _pairs_to_caption(config, counts)
        texts = pairs * rounds_so_far
    without_mining = 1 - last / num_rounds
    return [
        *_rows(config, lengths.queries, round(texts + counts.queries * without_mining)),
        *_rows(config, lengths.documents, round(counts.images * without_mining)),
        Work("rank", 0, (counts.queries + texts) * counts.images),
    ]


def _judging(config: RunConfig, counts: Counts, lengths: Lengths) -> list[Work]:
    """Return the work of verdicts on planted pairs."""
    right = min(config.captioning.relabel.num_planted, counts.queries)
    texts = right * (1 + WRONG_PER_RIGHT)
    batches = ceil(texts / config.captioning.batch_size)
    return [Work("read", batches, lengths.verify.tokens(right, right, texts))]


def _shares_weights(config: RunConfig) -> bool:
    """Return whether the captioner needs no loading of its own."""
    one_process = launcher.num_processes(config.runtime) == 1
    model = config.model
    shares = isinstance(model, VlmSettings) and config.foundation.shares_base_with(model)
    return not config.foundation.is_timed or (one_process and shares)
