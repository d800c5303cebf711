"""Evaluation of a checkpoint by the data set's protocol, and what a submission needs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from cirloop.artifacts.store import Artifact, write_json
from cirloop.backbones import Item
from cirloop.data.dataset import with_grey_images
from cirloop.evaluation import protocols
from cirloop.evaluation.significance import compare_iterations
from cirloop.retrieval.embed import query_items
from cirloop.retrieval.images import ranks_of_images, scores_of_images, topk_images
from cirloop.stages.context import Run, Vectors
from cirloop.types import (
    EvalSplit,
    ImageId,
    QueryId,
    UserError,
)

Ablation = Literal["text", "image"] | None
TOP = 5
"""Best images per query that an evaluation keeps."""


def evaluate(
    run: Run, label: str, checkpoint: Artifact | None, split_name: str, iteration: int | None
) -> Artifact:
    """evaluation_iter_{t}.json (or `evaluation_base.json`): metrics with standard errors; per query
    the target's rank without the reference (HP-FashionIQ: how much higher set 1 scores), the value
    that iterations are compared on, and its best images."""

    def build(path: Path) -> None:
        write_json(path, evaluation(run, label, checkpoint, split_name))

    settings = run.key("model", "data") | {"split": split_name}
    inputs = [run.eval_digest(split_name), *([checkpoint.digest] if checkpoint else [])]
    return run.make(f"evaluation_{label}.json", settings, inputs, build, iteration)


def evaluation(
    run: Run, label: str, checkpoint: Artifact | None, split_name: str, ablate: Ablation = None
) -> dict[str, Any]:
    """The evaluation of one checkpoint (None = the base model) as JSON."""
    parts, backbone = run.data.eval_splits(split_name), run.embedder(checkpoint)
    if any(part.relevance is None for part in parts):
        raise UserError(f"{parts[0].name} has no published targets, so there are no scores.")
    found: dict[QueryId, Any] = {}
    tops: list[list[ImageId]] = []
    for part in parts:
        vectors, gallery = _vectors(run, backbone, part, ablate)
        tops += _top(part, vectors, gallery)
        wanted = [part.labeled.relevant_images(query) for query in part.queries]
        preferences = part.relevance and part.relevance.preferences
        look: Any = scores_of_images if preferences else ranks_of_images
        rows = look(wanted, part.gallery, vectors, gallery)
        found |= {query.id: row for query, row in zip(part.queries, rows, strict=True)}
    metrics = protocols.metrics([part.labeled for part in parts], found)
    compared, ranks = parts[0].labeled.protocol.primary_metric, []
    for part in parts:
        assert part.relevance is not None
        values_Q = protocols.per_query(part.labeled, found)[compared]
        for query, value in zip(part.queries, values_Q.tolist(), strict=True):
            if query.id in part.relevance.preferences:
                place = round(
                    protocols.preference_margin(
                        found[query.id], part.relevance.preferences[query.id]
                    ),
                    6,
                )
            else:
                place = protocols.remove_reference(found[query.id], query.reference)[
                    part.relevance.targets[query.id]
                ]
            ranks.append([query.id, place, round(value, 6)])
    return run.mark | {
        "schema": 3,
        "iteration": label.removeprefix("iter_"),
        "split": parts[0].name,
        "queries": sum(len(part.queries) for part in parts),
        "gallery": sum(len(part.gallery.ids) for part in parts),
        "missing_images": sum(part.missing for part in parts),
        "dropped_queries": sum(part.dropped for part in parts),
        "protocol": protocols.describe([part.labeled for part in parts]),
        "ablated": ablate,
        "model": backbone.fingerprint,
        "metrics": {name: round(m.value, 6) for name, m in metrics.items()},
        "standard_errors": {name: round(m.se, 6) for name, m in metrics.items()},
        "compared_on": compared,
        "ranks": ranks,
        "top": tops,
    }


def _top(part: EvalSplit, vectors: Vectors, gallery: Vectors) -> list[list[ImageId]]:
    """Each query's best images, as the protocol ranks them; none where people chose between sets of
    images."""
    if part.relevance is None or part.relevance.preferences:
        return []
    rows = topk_images(part.gallery, vectors, gallery, TOP + 1)
    kept = part.labeled.protocol.keep_reference
    return [
        [image for image in row if kept or image != query.reference][:TOP]
        for query, row in zip(part.queries, rows, strict=True)
    ]


def summary(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """evaluation_results.json: the evaluations without their queries' rows, and each against the
    one before it."""
    results = [
        {name: value for name, value in row.items() if name not in ("ranks", "top")}
        for row in evaluations
    ]
    return {"schema": 3, "results": results, "compared": compare_iterations(evaluations)}


def predictions(
    run: Run, checkpoint: Artifact | None, split_name: str, depth: int
) -> list[dict[QueryId, list[ImageId]]]:
    """Per part the best `depth` images of each query and, after them, the rest of its group, in the
    model's order."""
    out, backbone = [], run.embedder(checkpoint)
    for part in run.data.eval_splits(split_name):
        vectors, gallery = _vectors(run, backbone, part)
        rows = topk_images(part.gallery, vectors, gallery, depth)
        groups = [part.labeled.groups.get(query.id, ()) for query in part.queries]
        among = ranks_of_images(groups, part.gallery, vectors, gallery)
        out.append(
            {
                query.id: (
                    row
                    + [image for image in sorted(group, key=group.__getitem__) if image not in row]
                )
                for query, row, group in zip(part.queries, rows, among, strict=True)
            }
        )
    return out


def _vectors(
    run: Run, backbone: Any, part: EvalSplit, ablate: Ablation = None
) -> tuple[Vectors, Vectors]:
    """Query and gallery vectors of a part; the queries without their texts, or with grey
    references, on request."""
    items, asked = query_items(part.queries), part
    if ablate == "text":
        items = [Item(item.image, "", item.category) for item in items]
    if ablate == "image":
        asked = with_grey_images(part)
    queries = run.vectors(backbone, items, asked, f"embed {asked.gallery.name} queries")
    return queries, run.gallery(backbone, part)
