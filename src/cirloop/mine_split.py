"""Mining the training split of a run: the current model's vectors, what the data set knows, a strategy and filters."""

from __future__ import annotations

import logging
import posixpath
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from cirloop import schemas
from cirloop.backbones import Item
from cirloop.backbones.similarity import pooled, similarity
from cirloop.captioning.base import Ask
from cirloop.data.dataset import grey
from cirloop.known_positives import KINDS, REFERENCE, TARGET, KnownPositives
from cirloop.mining import Found, Vectors, mine
from cirloop.negatives.attributes.images import image_attributes
from cirloop.negatives.base import About, Floats, Strategy, rows_of
from cirloop.negatives.filters import Judges, Pairs, kept
from cirloop.negatives.report import summary
from cirloop.retrieval.blocks import checked
from cirloop.retrieval.embed import query_items
from cirloop.retrieval.top import pair_scores
from cirloop.run import Run
from cirloop.types import ImageId, MinedNegative, TrainSplit

logger = logging.getLogger(__name__)
SPELLING = "other spellings of target or reference"
"""Of the copies, those whose names differ in spelling alone, as `./a.png` and `a.png`."""
LEFT_OUT = (*KINDS, SPELLING)


def mine_split(run: Run, backbone: Any, iteration: int, known: KnownPositives | None = None) -> dict[str, Any]:
    """hard_negatives_iter_{t}.json: the rows, what strategy and filters did, and counts.

    `known` says what is right beside the targets, by default what the train split knows.
    """
    config, train = run.config, run.data.train
    strategy = config.mining
    barred, left_out = barred_rows(train, known or KnownPositives.of(train))
    vectors = split_vectors(run, backbone, train, barred)
    about = knowledge(run, backbone, train, vectors, iteration)
    notes: dict[str, Any] = {}
    found, sizes = [], []
    for each in mine(strategy, vectors, about, _device(), sets=True, notes=notes):
        sizes += [] if each.whole is None else [len(each.whole)]
        found.append(replace(each, whole=None))  # the sets of all queries at once may be as many as all scores
    pairs = _pairs(found, vectors)
    keep_N, counts = kept(strategy.filters, pairs, _judges(run, backbone, train, vectors))
    rows = _rows(train, found, keep_N, strategy)
    num_kept = np.bincount(pairs.numbers_N[keep_N], minlength=len(found)).tolist()
    report = summary(
        [f.target_rank for f in found], [f.target_score for f in found], num_kept, pairs.scores_N[keep_N].tolist(),
        strategy.k, sum(f.filled for f in found), sizes or None,
    )  # fmt: skip
    if any(left_out.values()):
        counted = ", ".join(f"{kind} {count:,}" for kind, count in left_out.items() if count)
        logger.info("mining: images that are no negative of a query were left out: %s", counted)
    return {
        "schema": 3, "iteration": iteration, "strategy": strategy.model_dump(mode="json"),
        "summary": report | notes | {"left_out": left_out, "filters": counts},
        "negatives": [asdict(row) for row in rows],
    }  # fmt: skip


def barred_rows(train: TrainSplit, known: KnownPositives) -> tuple[list[frozenset[int]], dict[str, int]]:
    """Per query the gallery rows that are no negative of it, the target among them, and counts by kind.

    Counted are pairs of a query and an image other than its target and reference, each once, whether or not a strategy
    would have chosen it. The reference itself is left to `mining.reference`.
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
            counts.update(SPELLING if copies and _spelling(gallery.ids[row]) in spelled else kind for row in others)
            barred |= others if kind == REFERENCE else equal
        out.append(frozenset(barred))
    return out, {kind: counts[kind] for kind in LEFT_OUT}


def _spelling(image: ImageId) -> str:
    """One spelling of a name: without `./`, `//` and the like, in Unicode's composed form."""
    return posixpath.normpath(unicodedata.normalize("NFC", image))


def split_vectors(
    run: Run, backbone: Any, train: TrainSplit, barred: Sequence[frozenset[int]] | None = None
) -> Vectors:
    """Vectors of the queries and the gallery, and which rows are targets, references and (`barred`) no negatives."""
    rows, queries = train.gallery.rows(), [t.query for t in train.triplets]
    if barred is None:
        barred, _ = barred_rows(train, KnownPositives.of(train))
    made = run.vectors(backbone, query_items(queries), train, f"embed {train.name} queries")
    return Vectors(
        checked(made, "query vectors"),
        checked(run.gallery(backbone, train), "gallery vectors"),
        np.array([rows[t.target] for t in train.triplets]),
        np.array([rows[q.reference] for q in queries]),
        barred,
    )


def knowledge(run: Run, backbone: Any, train: TrainSplit, vectors: Vectors, iteration: int) -> About:
    """What the data set and the run's settings let a strategy know."""
    rows, queries = train.gallery.rows(), [t.query for t in train.triplets]
    texts: list[Floats] = []

    def text_scores(numbers_B: Any) -> Floats:
        if not texts:  # the text alone: the query with a grey picture in the reference's place
            texts.append(run.vectors(backbone, query_items(queries), grey(train), f"embed {train.name} texts"))
        return np.asarray(similarity(texts[0][numbers_B], vectors.gallery_GD))

    categories = [train.categories[image] for image in train.gallery.ids] if train.categories else None
    table, asked = None, None
    if run.config.attributes is not None:
        extractor = run.config.attributes.build()
        asked = extractor.asked([q.text for q in queries])
        table = image_attributes(run.config.attributes, extractor, train.gallery.ids, partial(_describe, run, backbone))
        categories = categories or table.categories(extractor.lexicon.category)
    return About(
        run.config.seed + iteration,
        iteration,
        run.config.num_iterations,
        [q.id for q in queries],
        groups=[rows_of(train.groups.get(q.id, ()), rows) for q in queries] if train.groups else None,
        categories=categories,
        attributes=table,
        asked=asked,
        losses=_losses(run, iteration),
        vectors_GD=pooled(vectors.gallery_GD),
        text_scores=text_scores,
    )


def _describe(run: Run, backbone: Any, images: Sequence[ImageId]) -> list[str]:
    """A sentence about each image by the foundation model, greedy."""
    settings, prompts = run.config.captioning, run.config.captioning.prompts(run.config.foundation)
    asks = [Ask(image, image, "") for image in images]
    answers = run.asked(lambda: backbone).write(prompts.describe, asks, settings.max_new_tokens, [0.0], 0, "describe")
    return [text for (text,) in answers]


def _losses(run: Run, iteration: int) -> list[float]:
    """The mean training loss of each finished iteration."""
    found = [run.store.find(f"checkpoint_iter_{t}") for t in range(iteration + 1)]
    logs = [schemas.read(a.path / "training_log.json")["rows"] for a in found]
    taken = [[row["loss"] for row in rows if "ids" not in row] for rows in logs]  # a batch that was left out has ids
    return [float(np.mean(losses)) for losses in taken if losses]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _pairs(found: Sequence[Found], vectors: Vectors) -> Pairs:
    counts = [len(f.columns) for f in found]
    numbers_N = np.repeat(np.arange(len(found)), counts)
    scores = np.array([f.target_score for f in found], np.float32)
    return Pairs(
        numbers_N, np.concatenate([np.zeros(0, np.int64), *(f.columns for f in found)]),
        np.concatenate([np.zeros(0, np.float32), *(f.scores for f in found)]),
        vectors.targets_Q[numbers_N], scores[numbers_N],
    )  # fmt: skip


def _rows(train: TrainSplit, found: Sequence[Found], keep_N: Any, strategy: Strategy) -> list[MinedNegative]:
    out, at = [], 0
    for f in found:
        name, filled = train.triplets[f.number].query.id, len(f.columns) - f.filled
        for place, (column, rank, score) in enumerate(zip(f.columns, f.ranks, f.scores, strict=True)):
            if keep_N[at]:
                made_by = strategy.type if place < filled else f"{strategy.type}, filled by {strategy.fallback}"
                out.append(
                    MinedNegative(
                        name,
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


def _judges(run: Run, backbone: Any, train: TrainSplit, vectors: Vectors) -> Judges:
    def yes(pairs: Pairs) -> list[float]:
        asks = [
            Ask(train.triplets[n].query.reference, train.gallery.ids[c], train.triplets[n].query.text)
            for n, c in zip(pairs.numbers_N, pairs.columns_N, strict=True)
        ]
        prompt = run.config.captioning.prompts(run.config.foundation).verify
        return run.asked(lambda: backbone).yes(prompt, asks, "verify mined images")

    def second(path: str, pairs: Pairs) -> tuple[Floats, Floats]:
        alone = {"start_adapter": None} if hasattr(run.config.model, "start_adapter") else {}
        other = run.config.model.model_copy(update={"path": path, **alone}).build()
        numbers, place = np.unique(pairs.numbers_N, return_inverse=True)
        items = query_items([train.triplets[n].query for n in numbers])
        queries = run.vectors(other, items, train, "embed queries, second model")
        gallery = run.vectors(other, [Item(i) for i in train.gallery.ids], train, "embed gallery, second model")
        queries = queries[place]
        return pair_scores(queries, gallery, pairs.columns_N), pair_scores(queries, gallery, pairs.targets_N)

    return Judges(pooled(vectors.gallery_GD), yes, second)
