"""Mining the training split of a run: the current model's vectors, what the data set knows, a
strategy and filters."""

from __future__ import annotations

import logging
import posixpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cirloop.artifacts import schema
from cirloop.artifacts.store import Artifact, file_digest, write_json
from cirloop.backbones import Item
from cirloop.backbones.similarity import pooled, similarity
from cirloop.captioning.base import Ask
from cirloop.data.dataset import with_grey_images
from cirloop.data.known_positives import KINDS, REFERENCE, TARGET, KnownPositives, known_positives
from cirloop.negatives import MiningSettings, miner
from cirloop.negatives.attributes.images import image_attributes
from cirloop.negatives.base import MiningContext, gallery_indices
from cirloop.negatives.filters import FilterContext, MinedPairs, apply_filters
from cirloop.negatives.miner import MiningInputs, MiningResult
from cirloop.negatives.report import summary
from cirloop.retrieval.arrays import Floats
from cirloop.retrieval.embed import query_items
from cirloop.retrieval.topk import scores_of
from cirloop.retrieval.vectors import validate_embeddings
from cirloop.stages.context import Run
from cirloop.types import ImageId, MinedNegative, TrainSplit

logger = logging.getLogger(__name__)
SPELLING = "other spellings of target or reference"
"""Of the copies, those whose names differ in spelling alone, as `./a.png` and `a.png`."""
LEFT_OUT = (*KINDS, SPELLING)


def mine(
    run: Run, iteration: int, checkpoint: Artifact, before: Sequence[Artifact] = ()
) -> Artifact:
    """hard_negatives_iter_{t}.json: what M_t gets wrong on the training queries.

    `before` are the augmented samples so far: what the captioner took for right is mined no more.
    """

    def build(path: Path) -> None:
        known = known_positives(run.data.train, before)
        write_json(path, run.mark | mine_split(run, run.embedder(checkpoint), iteration, known))

    told = run.config.attributes
    asked = any(each.type == "verify" for each in run.config.mining.filters) or (
        told and told.image_source == "vlm"
    )
    settings = run.key("model", "mining", "attributes", "data", *(["foundation"] if asked else []))
    if asked:
        settings["prompts"] = asdict(run.config.captioning.prompts(run.config.foundation))
    if told is not None and told.file is not None:
        settings["attributes"] = {**settings["attributes"], "file": file_digest(told.file)}
    return run.make(
        f"hard_negatives_iter_{iteration}.json",
        settings,
        [checkpoint.digest, run.data.digest, *(each.digest for each in before)],
        build,
        iteration,
    )


def mine_split(
    run: Run, backbone: Any, iteration: int, known: KnownPositives | None = None
) -> dict[str, Any]:
    """hard_negatives_iter_{t}.json: the rows, what strategy and filters did, and counts.

    `known` says what is right beside the targets, by default what the train split knows.
    """
    config, train = run.config, run.data.train
    settings = config.mining
    barred, left_out = barred_rows(train, known or KnownPositives.of(train))
    vectors = mining_inputs(run, backbone, train, barred)
    context = mining_context(run, backbone, train, vectors, iteration)
    stats: dict[str, Any] = {}
    found, sizes = [], []
    for each in miner.mine(settings, vectors, context, _device(), sets=True, stats=stats):
        sizes += [] if each.candidate_set is None else [len(each.candidate_set)]
        found.append(
            replace(each, candidate_set=None)
        )  # the sets of all queries at once may be as many as all scores
    pairs = _pairs(found, vectors)
    keep_N, counts = apply_filters(
        settings.filters, pairs, _filter_context(run, backbone, train, vectors)
    )
    rows = _rows(train, found, keep_N, settings)
    num_kept = np.bincount(pairs.query_index_N[keep_N], minlength=len(found)).tolist()
    report = summary(
        [f.target_rank for f in found],
        [f.target_score for f in found],
        num_kept,
        pairs.scores_N[keep_N].tolist(),
        settings.strategy.negatives_per_query,
        sum(f.num_fallback for f in found),
        sizes or None,
    )
    if any(left_out.values()):
        counted = ", ".join(f"{kind} {count:,}" for kind, count in left_out.items() if count)
        logger.info("mining: images that are no negative of a query were left out: %s", counted)
    return {
        "schema": 3,
        "iteration": iteration,
        "strategy": settings.strategy.model_dump(mode="json"),
        "summary": report | stats | {"left_out": left_out, "filters": counts},
        "negatives": [asdict(row) for row in rows],
    }


def barred_rows(
    train: TrainSplit, known: KnownPositives
) -> tuple[list[frozenset[int]], dict[str, int]]:
    """Per query the gallery rows that are no negative of it, the target among them, and counts by
    kind.

    Counted are pairs of a query and an image other than its target and reference, each once,
    whether or not a strategy would have chosen it. The reference itself is left to
    `mining.rank_reference`.
    """
    gallery, out = train.gallery, []
    rows, counts = gallery.rows(), Counter[str]()
    of_content: dict[str, list[int]] = defaultdict(list)
    for row, image in enumerate(gallery.ids):
        of_content[known.content(image)].append(row)
    for triplet in train.triplets:
        target, reference = rows[triplet.target], rows[triplet.query.reference]
        spelled = {_spelling(triplet.target), _spelling(triplet.query.reference)}
        barred = {target}
        for content, kind in known.barred(triplet.query).items():
            equal = {*of_content[content]}
            others = equal - {target, reference}
            copies = kind in (TARGET, REFERENCE)
            counts.update(
                SPELLING if copies and _spelling(gallery.ids[row]) in spelled else kind
                for row in others
            )
            barred |= others if kind == REFERENCE else equal
        out.append(frozenset(barred))
    return out, {kind: counts[kind] for kind in LEFT_OUT}


def _spelling(image: ImageId) -> str:
    """One spelling of a name: without `./`, `//` and the like, in Unicode's composed form."""
    return posixpath.normpath(unicodedata.normalize("NFC", image))


def mining_inputs(
    run: Run, backbone: Any, train: TrainSplit, barred: Sequence[frozenset[int]] | None = None
) -> MiningInputs:
    """Vectors of the queries and the gallery, and which rows are targets, references and (`barred`)
    no negatives."""
    rows, queries = train.gallery.rows(), [t.query for t in train.triplets]
    if barred is None:
        barred, _ = barred_rows(train, KnownPositives.of(train))
    made = run.vectors(backbone, query_items(queries), train, f"embed {train.name} queries")
    return MiningInputs(
        validate_embeddings(made, "query vectors"),
        validate_embeddings(run.gallery(backbone, train), "gallery vectors"),
        np.array([rows[t.target] for t in train.triplets]),
        np.array([rows[q.reference] for q in queries]),
        barred,
    )


def mining_context(
    run: Run, backbone: Any, train: TrainSplit, vectors: MiningInputs, iteration: int
) -> MiningContext:
    """What the data set and the run's settings let a strategy know."""
    rows, queries = train.gallery.rows(), [t.query for t in train.triplets]
    texts: list[Floats] = []

    def text_scores(query_index_B: Any) -> Floats:
        if not texts:  # the text alone: the query with a grey picture in the reference's place
            texts.append(
                run.vectors(
                    backbone,
                    query_items(queries),
                    with_grey_images(train),
                    f"embed {train.name} texts",
                )
            )
        return np.asarray(similarity(texts[0][query_index_B], vectors.gallery_GD))

    categories = (
        [train.categories[image] for image in train.gallery.ids] if train.categories else None
    )
    table, asked = None, None
    if run.config.attributes is not None:
        extractor = run.config.attributes.build()
        asked = extractor.parse_request([q.text for q in queries])
        table = image_attributes(
            run.config.attributes, extractor, train.gallery.ids, partial(_describe, run, backbone)
        )
        categories = categories or table.categories(extractor.lexicon.category)
    return MiningContext(
        run.config.seed + iteration,
        iteration,
        run.config.num_iterations,
        [q.id for q in queries],
        groups=(
            [gallery_indices(train.groups.get(q.id, ()), rows) for q in queries]
            if train.groups
            else None
        ),
        categories=categories,
        attributes=table,
        requested_attributes=asked,
        losses=_losses(run, iteration),
        vectors_GD=pooled(vectors.gallery_GD),
        text_scores=text_scores,
    )


def _describe(run: Run, backbone: Any, images: Sequence[ImageId]) -> list[str | None]:
    """A sentence about each image by the foundation model, greedy; None for one that had not
    ended."""
    settings, prompts = run.config.captioning, run.config.captioning.prompts(run.config.foundation)
    asks = [Ask(image, image, "") for image in images]
    answers = run.asked(lambda: backbone).write(
        prompts.describe, asks, settings.max_new_tokens, [0.0], 0, "describe"
    )
    texts = [answer.text if answer.ended else None for (answer,) in answers]
    cut_off = texts.count(None)
    if cut_off:
        run.costs.warn(
            f"{cut_off} of {len(texts)} descriptions of images had not ended after"
            f" captioning.max_new_tokens {settings.max_new_tokens}; the attributes of these images"
            " are unknown. Raise it."
        )
    return texts


def _losses(run: Run, iteration: int) -> list[float]:
    """The mean training loss of each finished iteration."""
    found = [run.store.find(f"checkpoint_iter_{t}") for t in range(iteration + 1)]
    logs = [schema.read(a.path / "training_log.json")["rows"] for a in found]
    taken = [
        [row["loss"] for row in rows if "ids" not in row] for rows in logs
    ]  # a batch that was left out has ids
    return [float(np.mean(losses)) for losses in taken if losses]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _pairs(found: Sequence[MiningResult], vectors: MiningInputs) -> MinedPairs:
    counts = [len(f.gallery_indices) for f in found]
    query_index_N = np.repeat(np.arange(len(found)), counts)
    scores = np.array([f.target_score for f in found], np.float32)
    return MinedPairs(
        query_index_N,
        np.concatenate([np.zeros(0, np.int64), *(f.gallery_indices for f in found)]),
        np.concatenate([np.zeros(0, np.float32), *(f.scores for f in found)]),
        vectors.targets_Q[query_index_N],
        scores[query_index_N],
    )


def _rows(
    train: TrainSplit, found: Sequence[MiningResult], keep_N: Any, settings: MiningSettings
) -> list[MinedNegative]:
    out, at = [], 0
    for f in found:
        query, own = train.triplets[f.query_index].query.id, len(f.gallery_indices) - f.num_fallback
        for place, (column, rank, score) in enumerate(
            zip(f.gallery_indices, f.ranks, f.scores, strict=True)
        ):
            if keep_N[at]:
                name = settings.strategy.type
                made_by = name if place < own else f"{name}, filled by {settings.fallback}"
                out.append(
                    MinedNegative(
                        query,
                        train.gallery.ids[column],
                        int(rank),
                        round(float(score), 6),
                        f.target_rank,
                        round(f.target_score, 6),
                        made_by,
                    )
                )
            at += 1
    return out


def _filter_context(
    run: Run, backbone: Any, train: TrainSplit, vectors: MiningInputs
) -> FilterContext:
    def yes(pairs: MinedPairs) -> list[float]:
        asks = [
            Ask(
                train.triplets[n].query.reference,
                train.gallery.ids[c],
                train.triplets[n].query.text,
            )
            for n, c in zip(pairs.query_index_N, pairs.gallery_index_N, strict=True)
        ]
        prompt = run.config.captioning.prompts(run.config.foundation).verify
        return run.asked(lambda: backbone).yes(prompt, asks, "verify mined images")

    def second(path: str, pairs: MinedPairs) -> tuple[Floats, Floats]:
        alone = {"start_adapter": None} if hasattr(run.config.model, "start_adapter") else {}
        other = run.models.embedder(
            None, run.config.model.model_copy(update={"path": path, **alone})
        )
        numbers, place = np.unique(pairs.query_index_N, return_inverse=True)
        items = query_items([train.triplets[n].query for n in numbers])
        queries = run.vectors(other, items, train, "embed queries, second model")
        gallery = run.vectors(
            other, [Item(i) for i in train.gallery.ids], train, "embed gallery, second model"
        )
        queries = queries[place]
        scores_N2 = scores_of(
            queries, gallery, np.stack([pairs.gallery_index_N, pairs.targets_N], 1)
        )
        return scores_N2[:, 0], scores_N2[:, 1]

    return FilterContext(pooled(vectors.gallery_GD), yes, second)
