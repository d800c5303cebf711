"""Evaluation of a checkpoint by the data set's protocol, and what a submission needs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import Artifact
from cirloop.backbones import EmbedInput
from cirloop.config.run import RunConfig
from cirloop.data.dataset import with_grey_images
from cirloop.evaluation import protocols
from cirloop.evaluation.best import best_of, is_out_of_patience
from cirloop.evaluation.significance import compare_iterations
from cirloop.retrieval.embed import query_items
from cirloop.retrieval.images import ranks_of_images, scores_of_images, topk_images
from cirloop.retrieval.topk import scores_of
from cirloop.stages import futile
from cirloop.stages.context import RunContext, Vectors
from cirloop.stages.models import Embedder
from cirloop.types import EvalSplit, ImageId, QueryId, UserError

logger = logging.getLogger(__name__)
Ablation = Literal["text", "image"] | None
NUM_BEST = 10
"""Best images per query that an evaluation keeps."""
NUM_SAMPLED = 16
"""Queries, and images, whose scores it keeps."""
PER_QUERY = ("ranks", "top", "sample_scores")
"""What of an evaluation is in its own artifact only."""


def evaluate(
    run: RunContext, label: str, checkpoint: Artifact | None, split_name: str, iteration: int | None
) -> Artifact:
    """Write evaluation_{label}.json: metrics with standard errors, and rows per query.

    A row holds the target's rank without the reference (HP-FashionIQ: how much higher set 1
    scores), the value that iterations are compared on, and the query's cluster, mostly the
    reference. The query's best images are kept too.
    """

    def build(path: Path) -> None:
        content = evaluation(run, label, checkpoint, split_name)
        earlier = f"evaluation_{f'iter_{iteration - 1}' if iteration else 'base'}.json"
        if iteration is not None and checkpoint is not None and earlier in run.store.names:
            before = run.store.load(earlier).read()
            futile.warn(run, futile.unmoved(run, iteration, before, content))
        write_json(path, content)

    settings = run.stage_config("model", "data") | {"split": split_name}
    if run.config.evaluation.alone:
        settings["alone"] = True
    inputs = [run.eval_digest(split_name), *([checkpoint.digest] if checkpoint else [])]
    return run.build(f"evaluation_{label}.json", settings, inputs, build, iteration)


def evaluation(
    run: RunContext,
    label: str,
    checkpoint: Artifact | None,
    split_name: str,
    ablate: Ablation = None,
) -> dict[str, Any]:
    """Evaluate one checkpoint (None = the base model), and return the result as JSON."""
    parts = run.data.eval_splits(split_name)
    backbone = run.embedder(checkpoint)
    if any(part.relevance is None for part in parts):
        raise UserError(f"{parts[0].name} has no published targets, so there are no scores.")
    rows_by_query, tops = _rank(run, backbone, parts, ablate)
    labeled = [part.labeled for part in parts]
    metrics = protocols.metrics(labeled, rows_by_query)
    compared = parts[0].labeled.protocol.primary_metric
    sample = {} if ablate else _sample(run, backbone, parts[-1])
    if run.config.evaluation.alone and ablate is None:
        metrics |= _alone(run, backbone, parts, compared)
    return (
        run.mark
        | {
            "schema": 4,
            "iteration": label.removeprefix("iter_"),
            "split": parts[0].name,
            "queries": sum(len(part.queries) for part in parts),
            "gallery": sum(len(part.gallery.ids) for part in parts),
            "missing_images": sum(part.missing for part in parts),
            "dropped_queries": sum(part.dropped for part in parts),
            "protocol": protocols.describe(labeled),
            "ablated": ablate,
            "model": backbone.fingerprint,
            "metrics": {name: round(m.value, 6) for name, m in metrics.items()},
            "standard_errors": {name: round(m.se, 6) for name, m in metrics.items()},
            "compared_on": compared,
            "ranks": [row for part in parts for row in _query_rows(part, rows_by_query, compared)],
            "top": tops,
        }
        | sample
    )


def _rank(
    run: RunContext, backbone: Embedder, parts: Sequence[EvalSplit], ablate: Ablation
) -> tuple[dict[QueryId, Any], list[list[ImageId]]]:
    """Return, for each query, the ranks or scores of the images that matter, and its best
    images."""
    rows_by_query: dict[QueryId, Any] = {}
    tops: list[list[ImageId]] = []
    for part in parts:
        vectors, gallery = _embed_part(run, backbone, part, ablate)
        tops += _best_images(part, vectors, gallery)
        relevant_images = [part.labeled.relevant_images(query) for query in part.queries]
        preferences = part.relevance and part.relevance.preferences
        score_rows: Any = scores_of_images if preferences else ranks_of_images
        rows = score_rows(relevant_images, part.gallery, vectors, gallery)
        rows_by_query |= {query.id: row for query, row in zip(part.queries, rows, strict=True)}
    return rows_by_query, tops


def _alone(
    run: RunContext, backbone: Embedder, parts: Sequence[EvalSplit], compared: str
) -> dict[str, protocols.Metric]:
    """Return the metric `compared`, and those by aspect, with grey references and with empty
    texts."""
    metrics: dict[str, protocols.Metric] = {}
    ablations: tuple[tuple[Ablation, str], ...] = (("image", "text alone"), ("text", "image alone"))
    for ablate, name in ablations:
        rows_by_query, _ = _rank(run, backbone, parts, ablate)
        of_one = protocols.metrics([part.labeled for part in parts], rows_by_query)
        metrics |= {
            f"{metric}, {name}": value
            for metric, value in of_one.items()
            if metric == compared or metric.startswith("map@10, ")
        }
    return metrics


def _sample(run: RunContext, backbone: Embedder, part: EvalSplit) -> dict[str, Any]:
    """Return the scores of a few queries with a few images, by which it is seen whether embeddings
    have moved; nothing where they are drawn."""
    if run.config.retrieval == "simulated":
        return {}
    vectors, gallery = _embed_part(run, backbone, part)  # which are kept of this part
    query_S, image_S = (
        np.unique(np.linspace(0, len(rows) - 1, min(NUM_SAMPLED, len(rows))).astype(np.int64))
        for rows in (vectors, gallery)
    )
    scores_SS = scores_of(vectors[query_S], gallery, np.tile(image_S, (len(query_S), 1)))
    return {"sample_scores": np.round(scores_SS.astype(np.float64), 6).tolist()}


def _query_rows(
    part: EvalSplit, rows_by_query: Mapping[QueryId, Any], compared: str
) -> Iterator[list[Any]]:
    """Yield for each query its id, its target's rank (or by how much the preferred set scores
    higher), the value of the metric `compared`, and its cluster, mostly its reference."""
    assert part.relevance is not None
    values_Q = protocols.per_query(part.labeled, rows_by_query)[compared]
    for query, value in zip(part.queries, values_Q.tolist(), strict=True):
        row = rows_by_query[query.id]
        preference = part.relevance.preferences.get(query.id)
        if preference is not None:
            rank = round(protocols.preference_margin(row, preference), 6)
        else:
            ranks = protocols.remove_reference(row, query.reference)
            rank = ranks[part.relevance.targets[query.id]]
        yield [query.id, rank, round(value, 6), part.labeled.cluster_of(query)]


def _best_images(part: EvalSplit, vectors: Vectors, gallery: Vectors) -> list[list[ImageId]]:
    """Return each query's best images, as the protocol ranks them; none for preferences between
    sets."""
    if part.relevance is None or part.relevance.preferences:
        return []
    rows = topk_images(part.gallery, vectors, gallery, NUM_BEST + 1)
    kept = part.labeled.protocol.keep_reference
    return [
        [image for image in row if kept or image != query.reference][:NUM_BEST]
        for query, row in zip(part.queries, rows, strict=True)
    ]


def summary(
    evaluations: Sequence[dict[str, Any]],
    config: RunConfig,
    end: futile.FutileRound | None = None,
) -> dict[str, Any]:
    """Return evaluation_results.json: the evaluations without their queries' rows, each compared
    with the one before, the best iteration, and the round that early stopping, or a futile round
    (`end`), ends the run after, where that is not the last one anyway."""
    results = [
        {name: value for name, value in row.items() if name not in PER_QUERY} for row in evaluations
    ]
    best = best_of(evaluations)
    content = {"schema": 4, "results": results, "compared": compare_iterations(evaluations)}
    if best is not None:
        content["best"] = best.to_json()
    patience = config.evaluation.early_stopping
    if is_out_of_patience(evaluations, patience):
        after = int(results[-1]["iteration"])
        if after < config.num_iterations:
            content["stopped_early"] = {"after": after, "patience": patience}
    if end is not None:
        content["stopped_early"] = end.to_json()
    return content


def stops_before(run: RunContext, t: int, evaluations: Sequence[dict[str, Any]]) -> bool:
    """Return whether early stopping ends the run before round `t`, which it never does to a round
    that is finished."""
    patience = run.config.evaluation.early_stopping
    is_finished = f"evaluation_iter_{t}.json" in run.store.names
    best = best_of(evaluations)
    if best is None or is_finished or not is_out_of_patience(evaluations, patience):
        return False
    logger.info(
        "early stopping: the run ends after round %d of %d, since %d %s not improved: %s",
        t - 1,
        run.config.num_iterations,
        patience,
        "rounds in a row have" if patience > 1 else "round has",
        best.describe(),
    )
    return True


def predictions(
    run: RunContext, checkpoint: Artifact | None, split_name: str, depth: int
) -> list[dict[QueryId, list[ImageId]]]:
    """Return per part the best `depth` images of each query, then the rest of its group, in the
    model's order."""
    out = []
    backbone = run.embedder(checkpoint)
    for part in run.data.eval_splits(split_name):
        vectors, gallery = _embed_part(run, backbone, part)
        rows = topk_images(part.gallery, vectors, gallery, depth)
        groups = [part.labeled.groups.get(query.id, ()) for query in part.queries]
        group_ranks = ranks_of_images(groups, part.gallery, vectors, gallery)
        out.append(
            {
                query.id: (
                    row
                    + [image for image in sorted(group, key=group.__getitem__) if image not in row]
                )
                for query, row, group in zip(part.queries, rows, group_ranks, strict=True)
            }
        )
    return out


def _embed_part(
    run: RunContext, backbone: Embedder, part: EvalSplit, ablate: Ablation = None
) -> tuple[Vectors, Vectors]:
    """Embed the queries and the gallery of a part; without texts or with grey references on
    request."""
    items = query_items(part.queries)
    query_part = part
    if ablate == "text":
        items = [EmbedInput(item.image, "", item.category) for item in items]
    if ablate == "image":
        query_part = with_grey_images(part)
    queries = run.embed_cached(
        backbone, items, query_part, f"embed {query_part.gallery.name} queries"
    )
    return queries, run.gallery_embeddings(backbone, part)
