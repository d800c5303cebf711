"""The stages: artifacts in, one artifact out. The only place where rooms meet."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from cirloop.artifacts import schema
from cirloop.artifacts.rows import known_positives, read_augmented, read_mined
from cirloop.artifacts.store import Artifact, file_digest, fingerprint, write_json
from cirloop.backbones import Item
from cirloop.captioning import rewrite
from cirloop.data.dataset import grey
from cirloop.data.known_positives import normal_text
from cirloop.distributed import launcher
from cirloop.distributed.jobs import TrainJob
from cirloop.evaluation import protocols
from cirloop.evaluation.significance import compared
from cirloop.monitoring import profiling
from cirloop.retrieval.embed import query_items
from cirloop.retrieval.images import ranks_of_images, scores_of_images, topk_images
from cirloop.stages.context import Run, Vectors, adapter_of
from cirloop.stages.mine import mine_split
from cirloop.training.health import not_falling
from cirloop.types import (
    EvalSplit,
    ImageId,
    Query,
    QueryId,
    UserError,
    targets_of,
)

logger = logging.getLogger(__name__)
Ablation = Literal["text", "image"] | None
TOP = 5
"""Best images per query that an evaluation keeps."""


def mine(run: Run, iteration: int, checkpoint: Artifact, before: Sequence[Artifact] = ()) -> Artifact:
    """hard_negatives_iter_{t}.json: what M_t gets wrong on the training queries.

    `before` are the augmented samples so far: what the captioner took for right is mined no more.
    """

    def build(path: Path) -> None:
        known = known_positives(run.data.train, before)
        write_json(path, run.mark | mine_split(run, run.embedder(checkpoint), iteration, known))

    told = run.config.attributes
    asked = any(each.type == "verify" for each in run.config.mining.filters) or (told and told.images == "vlm")
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


def caption(
    run: Run, iteration: int, negatives: Artifact, checkpoint: Artifact, before: Sequence[Artifact]
) -> Artifact:
    """augmented_samples_iter_{t}.json: mined images with a new text that makes them right, and the rejected ones."""
    config, train = run.config, run.data.train
    settings = config.captioning
    settings.check(config.foundation)
    prompts = settings.prompts(config.foundation)

    def round_trip(queries: Sequence[Query], images: Sequence[ImageId]) -> Sequence[int]:
        if not queries:
            return []
        return run.rank_targets(run.embedder(checkpoint), queries, images, train)

    def build(path: Path) -> None:
        queries = {t.query.id: t.query for t in train.triplets}
        eyes = run.asked(lambda: run.embedder(checkpoint))
        seed = config.seed + 1000 * iteration
        candidates = rewrite.write_candidates(eyes, read_mined(negatives), queries, settings, seed, prompts.rewrite)
        candidates = [rewrite.check_form(c, settings) for c in candidates]
        if settings.verify:
            candidates = rewrite.verify(eyes, candidates, settings, prompts.verify)
        name = eyes.name
        del eyes  # before the embedder comes in
        if settings.round_trip:
            candidates = rewrite.check_round_trip(candidates, settings, round_trip)
        written = [each.triplet for artifact in before for each in read_augmented(artifact)]
        known = {(t.query.reference, normal_text(t.query.text)) for t in (*train.triplets, *written)}
        accepted, rejected = rewrite.choose(candidates, known, settings, iteration, name)
        reasons = sorted({c.reason for c in rejected})
        write_json(path, run.mark | {
            "schema": 1, "iteration": iteration,
            "summary": {
                "mined": len({(c.negative.query, c.negative.image) for c in candidates}), "candidates": len(candidates),
                "accepted": len(accepted), "rejected": {r: sum(c.reason == r for c in rejected) for r in reasons},
            },
            "accepted": [asdict(a) for a in accepted], "rejected": [c.row() for c in rejected],
        })  # fmt: skip

    inputs = [negatives.digest, checkpoint.digest, run.data.digest, *(b.digest for b in before)]
    key = run.key("model", "foundation", "captioning", "data")
    asked = ("rewrite_prompt", "verify_prompt")  # names, or paths of files: the prompts themselves count
    key["captioning"] = {name: value for name, value in key["captioning"].items() if name not in asked}
    key["prompts"] = [asdict(p) for p in (prompts.rewrite, prompts.verify)]
    return run.make(f"augmented_samples_iter_{iteration}.json", key, inputs, build, iteration)


def train(
    run: Run,
    iteration: int,
    parent: Artifact | None,
    augmented: Sequence[Artifact],
    negatives: Artifact | None,
) -> Artifact:
    """checkpoint_iter_{t}/: the LoRA after training on human and augmented triplets with the mined negatives."""
    config, name = run.config, f"checkpoint_iter_{iteration}"
    steps = config.training.steps if iteration else config.training.warm_up_steps
    untrained = steps == 0 and parent is None  # evaluating a base model needs no training data
    inputs = [a.digest for a in (parent, *augmented, negatives) if a is not None]
    inputs = inputs if untrained else [run.data.digest, *inputs]
    settings = run.key("model", "training", "data") | {"steps": steps}

    def build(path: Path) -> None:
        if untrained or config.retrieval == "simulated":  # which has nothing to train
            write_json(path / "training_log.json", run.mark | {"schema": 1, "steps": 0, "rows": []})
            return
        workspace = run.store.workspace(name)
        job = TrainJob(
            directory=workspace.parent, log=run.log, run=run.store.directory, cache=config.cache, iteration=iteration,
            steps=steps, parent=adapter_of(parent), augmented=tuple(a.name for a in augmented),
            negatives=negatives.name if negatives else None, key=fingerprint([settings, inputs]), workspace=workspace,
            output=path,
        )  # fmt: skip
        run.models.release()  # the trainer loads its own
        with profiling.of_processes(workspace):
            launcher.training(job, config.runtime)
        log = schema.read(path / "training_log.json")
        said = not_falling([row["loss"] for row in log["rows"] if "ids" not in row])
        if said:
            run.costs.warn(f"{name}: {said}")

    return run.make(name, settings, inputs, build, iteration)


def evaluate(run: Run, label: str, checkpoint: Artifact | None, split_name: str, iteration: int | None) -> Artifact:
    """evaluation_iter_{t}.json (or `evaluation_base.json`): metrics with standard errors; per query the target's rank
    without the reference (HP-FashionIQ: how much higher set 1 scores), the value that iterations are compared on, and
    its best images.
    """

    def build(path: Path) -> None:
        write_json(path, evaluation(run, label, checkpoint, split_name))

    settings = run.key("model", "data") | {"split": split_name}
    inputs = [run.eval_digest(split_name), *([checkpoint.digest] if checkpoint else [])]
    return run.make(f"evaluation_{label}.json", settings, inputs, build, iteration)


def evaluation(
    run: Run, label: str, checkpoint: Artifact | None, split_name: str, ablate: Ablation = None
) -> dict[str, Any]:
    """The evaluation of one checkpoint (None = the base model) as JSON."""
    parts, backbone = run.data.parts(split_name), run.embedder(checkpoint)
    if any(part.relevance is None for part in parts):
        raise UserError(f"{parts[0].name} has no published targets, so there are no scores.")
    found: dict[QueryId, Any] = {}
    tops: list[list[ImageId]] = []
    for part in parts:
        vectors, gallery = _vectors(run, backbone, part, ablate)
        tops += _top(part, vectors, gallery)
        wanted = [part.judged.needs(query) for query in part.queries]
        preferences = part.relevance and part.relevance.preferences
        look: Any = scores_of_images if preferences else ranks_of_images
        rows = look(wanted, part.gallery, vectors, gallery)
        found |= {query.id: row for query, row in zip(part.queries, rows, strict=True)}
    metrics = protocols.metrics([part.judged for part in parts], found)
    compared, ranks = parts[0].judged.protocol.primary_metric, []
    for part in parts:
        assert part.relevance is not None
        values_Q = protocols.values(part.judged, found)[compared]
        for query, value in zip(part.queries, values_Q.tolist(), strict=True):
            if query.id in part.relevance.preferences:
                place = round(protocols.margin(found[query.id], part.relevance.preferences[query.id]), 6)
            else:
                place = protocols.without(found[query.id], query.reference)[part.relevance.targets[query.id]]
            ranks.append([query.id, place, round(value, 6)])
    return run.mark | {
        "schema": 3, "iteration": label.removeprefix("iter_"), "split": parts[0].name,
        "queries": sum(len(part.queries) for part in parts), "gallery": sum(len(part.gallery.ids) for part in parts),
        "missing_images": sum(part.missing for part in parts), "dropped_queries": sum(part.dropped for part in parts),
        "protocol": protocols.describe([part.judged for part in parts]), "ablated": ablate,
        "model": backbone.fingerprint,
        "metrics": {name: round(m.value, 6) for name, m in metrics.items()},
        "standard_errors": {name: round(m.se, 6) for name, m in metrics.items()},
        "compared_on": compared, "ranks": ranks, "top": tops,
    }  # fmt: skip


def _top(part: EvalSplit, vectors: Vectors, gallery: Vectors) -> list[list[ImageId]]:
    """Each query's best images, as the protocol ranks them; none where people chose between sets of images."""
    if part.relevance is None or part.relevance.preferences:
        return []
    rows = topk_images(part.gallery, vectors, gallery, TOP + 1)
    kept = part.judged.protocol.keep_reference
    return [
        [image for image in row if kept or image != query.reference][:TOP]
        for query, row in zip(part.queries, rows, strict=True)
    ]


def summary(evaluations: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """evaluation_results.json: the evaluations without their queries' rows, and each against the one before it."""
    results = [{name: value for name, value in row.items() if name not in ("ranks", "top")} for row in evaluations]
    return {"schema": 3, "results": results, "compared": compared(evaluations)}


def predictions(
    run: Run, checkpoint: Artifact | None, split_name: str, depth: int
) -> list[dict[QueryId, list[ImageId]]]:
    """Per part the best `depth` images of each query and, after them, the rest of its group, in the model's order."""
    out, backbone = [], run.embedder(checkpoint)
    for part in run.data.parts(split_name):
        vectors, gallery = _vectors(run, backbone, part)
        rows = topk_images(part.gallery, vectors, gallery, depth)
        groups = [part.judged.groups.get(query.id, ()) for query in part.queries]
        among = ranks_of_images(groups, part.gallery, vectors, gallery)
        out.append(
            {
                query.id: row + [image for image in sorted(group, key=group.__getitem__) if image not in row]
                for query, row, group in zip(part.queries, rows, among, strict=True)
            }
        )
    return out


def _vectors(run: Run, backbone: Any, part: EvalSplit, ablate: Ablation = None) -> tuple[Vectors, Vectors]:
    """Query and gallery vectors of a part; the queries without their texts, or with grey references, on request."""
    items, asked = query_items(part.queries), part
    if ablate == "text":
        items = [Item(item.image, "", item.category) for item in items]
    if ablate == "image":
        asked = grey(part)
    queries = run.vectors(backbone, items, asked, f"embed {asked.gallery.name} queries")
    return queries, run.gallery(backbone, part)


def account(run: Run, iteration: int, negatives: Artifact, augmented: Artifact | None) -> Artifact | None:
    """accounting_iter_{t}.json, where the data set knows the truth: false negatives and true captions, counted."""
    oracle, triplets = run.data.train.oracle, run.data.train.triplets
    if oracle is None:
        return None

    def build(path: Path) -> None:
        by_id: dict[QueryId, Query] = {t.query.id: t.query for t in triplets}
        targets, mined = targets_of(triplets), read_mined(negatives)
        right = {q: oracle.positives(by_id[q]) - {targets[q]} for q in {n.query for n in mined}}
        apart = [oracle.distance(by_id[n.query].reference, n.image) for n in mined]
        accepted = read_augmented(augmented) if augmented else []
        true = [
            oracle.text_is_true(a.triplet.query.reference, a.triplet.query.text, a.triplet.target) for a in accepted
        ]
        write_json(path, run.mark | {
            "schema": 1, "iteration": iteration,
            "mined": len(mined), "false_negatives": sum(n.image in right[n.query] for n in mined),
            "mined_by_changes_from_reference": {str(d): apart.count(d) for d in sorted(set(apart))},
            "accepted": len(accepted), "true_captions": sum(true),
        })  # fmt: skip

    inputs = [negatives.digest, *([augmented.digest] if augmented else [])]
    return run.make(f"accounting_iter_{iteration}.json", {}, inputs, build, iteration)
