"""Mining the training split: the current model's embeddings, what the data set knows, a strategy
and filters."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.rows import read_augmented
from cirloop.artifacts.store import Artifact, file_digest
from cirloop.backbones import EmbedInput
from cirloop.backbones.similarity import mean_pool, similarity
from cirloop.captioning.base import CaptionRequest
from cirloop.data.dataset import with_grey_images
from cirloop.data.known_positives import KnownPositives, known_positives
from cirloop.negatives import miner
from cirloop.negatives.attributes.images import image_attributes
from cirloop.negatives.base import MiningContext, gallery_indices
from cirloop.negatives.filters import FilterContext, MinedPairs, apply_filters
from cirloop.negatives.miner import MiningInputs
from cirloop.negatives.report import summary
from cirloop.retrieval.arrays import Floats
from cirloop.retrieval.embed import query_items
from cirloop.retrieval.topk import scores_of
from cirloop.retrieval.vectors import validate_embeddings
from cirloop.stages import futile
from cirloop.stages.anchors import mine_anchors
from cirloop.stages.context import RunContext
from cirloop.stages.exclusions import barred_rows, captioned_rows
from cirloop.stages.mined_rows import mined_pairs, mined_rows
from cirloop.stages.models import Embedder
from cirloop.types import AugmentedTriplet, ImageId, TrainSplit

logger = logging.getLogger(__name__)


def mine(
    run: RunContext, iteration: int, checkpoint: Artifact, before: Sequence[Artifact] = ()
) -> Artifact:
    """Write hard_negatives_iter_{t}.json: what M_t gets wrong on the training queries.

    `before` are the augmented samples so far: images that the captioner took for right are not
    mined again.
    """

    def build(path: Path) -> None:
        positives = known_positives(run.data.train, before)
        augmented = [row for artifact in before for row in read_augmented(artifact)]
        backbone = run.embedder(checkpoint)
        content = mine_split(run, backbone, iteration, positives, augmented)
        if run.config.mining.anchors.num:
            content["anchors"] = mine_anchors(run, backbone, iteration, positives, augmented)
        futile.warn(run, futile.nothing_mined(content, run.config.mining))
        write_json(path, run.mark | content)

    attributes = run.config.attributes
    uses_captioner = run.config.mining.verifies or (attributes and attributes.image_source == "vlm")
    settings = run.stage_config(
        "model", "mining", "attributes", "data", *(["foundation"] if uses_captioner else [])
    )
    if uses_captioner:
        settings["prompts"] = asdict(run.config.captioning.prompts(run.config.foundation))
    if attributes is not None and attributes.file is not None:
        settings["attributes"] = {**settings["attributes"], "file": file_digest(attributes.file)}
    return run.build(
        f"hard_negatives_iter_{iteration}.json",
        settings,
        [checkpoint.digest, run.data.digest, *(artifact.digest for artifact in before)],
        build,
        iteration,
    )


def mine_split(
    run: RunContext,
    backbone: Embedder,
    iteration: int,
    positives: KnownPositives | None = None,
    augmented: Sequence[AugmentedTriplet] = (),
) -> dict[str, Any]:
    """Mine the train split, and return the rows, statistics of strategy and filters, and counts as
    JSON.

    `positives` says what is right beside the targets, by default what the train split knows;
    `augmented` are the texts of earlier rounds, whose pairs `mining.skip_captioned` leaves out.
    """
    train = run.data.train
    settings = run.config.mining
    positives = positives or KnownPositives.of(train)
    barred, left_out = barred_rows(train, positives)
    if settings.skip_captioned:
        captioned = captioned_rows(train, positives, augmented)
        barred = [right | written for right, written in zip(barred, captioned, strict=True)]
    vectors = mining_inputs(run, backbone, train, barred)
    context = mining_context(run, backbone, train, vectors, iteration)
    stats: dict[str, Any] = {}
    results = []
    sizes = []
    for result in miner.mine(settings, vectors, context, _device(), sets=True, stats=stats):
        sizes += [] if result.candidate_set is None else [len(result.candidate_set)]
        # The sets of all queries at once may be as many as all scores.
        results.append(replace(result, candidate_set=None))
    pairs = mined_pairs(results, vectors)
    keep_N, counts = apply_filters(
        settings.filters, pairs, _filter_context(run, backbone, train, vectors)
    )
    num_kept = np.bincount(pairs.query_index_N[keep_N], minlength=len(results)).tolist()
    report = summary(
        [result.target_rank for result in results],
        [result.target_score for result in results],
        num_kept,
        pairs.scores_N[keep_N].tolist(),
        settings.strategy.negatives_per_query,
        sum(result.num_fallback for result in results),
        sizes or None,
    )
    _log_left_out(left_out)
    return {
        "schema": 3,
        "iteration": iteration,
        "strategy": settings.strategy.model_dump(mode="json"),
        "summary": report | stats | {"left_out": left_out, "filters": counts},
        "negatives": [asdict(row) for row in mined_rows(train, results, keep_N, settings)],
    }


def _log_left_out(left_out: Mapping[str, int]) -> None:
    if any(left_out.values()):
        counted = ", ".join(f"{kind} {count:,}" for kind, count in left_out.items() if count)
        logger.info("mining: images that are no negative of a query were left out: %s", counted)


def mining_inputs(
    run: RunContext,
    backbone: Embedder,
    train: TrainSplit,
    barred: Sequence[frozenset[int]] | None = None,
) -> MiningInputs:
    """Return embeddings of queries and gallery, and which rows are targets, references and
    (`barred`) no negatives."""
    rows = train.gallery.rows()
    queries = [t.query for t in train.triplets]
    if barred is None:
        barred, _ = barred_rows(train, KnownPositives.of(train))
    query_QD = run.embed_cached(
        backbone, query_items(queries), train, f"embed {train.name} queries"
    )
    return MiningInputs(
        validate_embeddings(query_QD, "query vectors"),
        validate_embeddings(run.gallery_embeddings(backbone, train), "gallery vectors"),
        np.array([rows[t.target] for t in train.triplets]),
        np.array([rows[q.reference] for q in queries]),
        barred,
    )


def mining_context(
    run: RunContext, backbone: Embedder, train: TrainSplit, vectors: MiningInputs, iteration: int
) -> MiningContext:
    """Return what the data set and the run's settings let a strategy know."""
    rows = train.gallery.rows()
    queries = [t.query for t in train.triplets]
    texts: list[Floats] = []

    def text_scores(query_index_B: npt.NDArray[np.int64]) -> Floats:
        if not texts:  # the text alone: the query with a grey image in the reference's place
            texts.append(
                run.embed_cached(
                    backbone,
                    query_items(queries),
                    with_grey_images(train),
                    f"embed {train.name} texts",
                )
            )
        return np.asarray(similarity(texts[0][query_index_B], cast(Floats, vectors.gallery_GD)))

    context = MiningContext(
        run.config.seed + iteration,
        iteration,
        run.config.num_iterations,
        [q.id for q in queries],
        groups=(
            [gallery_indices(train.groups.get(q.id, ()), rows) for q in queries]
            if train.groups
            else None
        ),
        categories=(
            [train.categories[image] for image in train.gallery.ids] if train.categories else None
        ),
        losses=_training_losses(run, iteration),
        vectors_GD=mean_pool(cast(Floats, vectors.gallery_GD)),
        text_scores=text_scores,
    )
    return _with_attributes(context, run, backbone, train)


def _with_attributes(
    context: MiningContext, run: RunContext, backbone: Embedder, train: TrainSplit
) -> MiningContext:
    """Add what images show and texts ask for, where the run's settings say how to know."""
    settings = run.config.attributes
    if settings is None:
        return context
    extractor = settings.build()
    requested = extractor.parse_request([triplet.query.text for triplet in train.triplets])
    table = image_attributes(
        settings, extractor, train.gallery.ids, partial(_describe_images, run, backbone)
    )
    categories = context.categories or table.categories(extractor.lexicon.category)
    return replace(context, categories=categories, attributes=table, requested_attributes=requested)


def _describe_images(
    run: RunContext, backbone: Embedder, images: Sequence[ImageId]
) -> list[str | None]:
    """Describe each image in a sentence by the captioner, greedily; None for one that was cut
    off."""
    settings = run.config.captioning
    prompts = run.config.captioning.prompts(run.config.foundation)
    requests = [CaptionRequest(image, image, "") for image in images]
    answers = run.captioner(lambda: backbone).generate(
        prompts.describe, requests, settings.max_new_tokens, [0.0], 0, "describe"
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


def _training_losses(run: RunContext, iteration: int) -> list[float]:
    """Return the mean training loss of each finished iteration."""
    checkpoints = [run.store.load(f"checkpoint_iter_{t}") for t in range(iteration + 1)]
    logs = [schema.read(a.path / "training_log.json")["rows"] for a in checkpoints]
    losses_by_iteration = [
        [row["loss"] for row in rows if "ids" not in row] for rows in logs
    ]  # a batch that was left out has ids
    return [float(np.mean(losses)) for losses in losses_by_iteration if losses]


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _filter_context(
    run: RunContext, backbone: Embedder, train: TrainSplit, vectors: MiningInputs
) -> FilterContext:
    def yes_probability(pairs: MinedPairs) -> list[float]:
        requests = [
            CaptionRequest(
                train.triplets[n].query.reference,
                train.gallery.ids[c],
                train.triplets[n].query.text,
            )
            for n, c in zip(pairs.query_index_N, pairs.gallery_index_N, strict=True)
        ]
        prompt = run.config.captioning.prompts(run.config.foundation).verify
        return run.captioner(lambda: backbone).yes_probability(
            prompt, requests, "verify mined images"
        )

    def second_model_scores(path: str, pairs: MinedPairs) -> tuple[Floats, Floats]:
        without_adapter = (
            {"start_adapter": None} if hasattr(run.config.model, "start_adapter") else {}
        )
        other = run.models.embedder(
            None, run.config.model.model_copy(update={"path": path, **without_adapter})
        )
        query_indices, position_N = np.unique(pairs.query_index_N, return_inverse=True)
        items = query_items([train.triplets[n].query for n in query_indices])
        queries = run.embed_cached(other, items, train, "embed queries, second model")
        gallery = run.embed_cached(
            other, [EmbedInput(i) for i in train.gallery.ids], train, "embed gallery, second model"
        )
        queries = queries[position_N]
        scores_N2 = scores_of(
            queries, gallery, np.stack([pairs.gallery_index_N, pairs.targets_N], 1)
        )
        return scores_N2[:, 0], scores_N2[:, 1]

    return FilterContext(
        mean_pool(cast(Floats, vectors.gallery_GD)), yes_probability, second_model_scores
    )
