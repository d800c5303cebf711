"""From samples to negatives: read, look, embed, find neighbours, cluster, choose, write."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import file_digest
from cirloop.config import cli
from cirloop.data.image_check import unreadable_images
from cirloop.monitoring.console import progress
from cirloop.negatives.knn_text_samples import Clusters, SamplePool, choose, neighbours
from cirloop.negatives.text_reuse import max_uses
from cirloop.tools.add_negatives import samples as reading
from cirloop.tools.add_negatives.advice import advice
from cirloop.tools.add_negatives.config import PROGRAM, AddNegativesConfig
from cirloop.tools.add_negatives.encode import encode
from cirloop.tools.add_negatives.report import MiningRun, levels, reason, report
from cirloop.tools.add_negatives.samples import Sample, UniqueItems
from cirloop.tools.add_negatives.show import show
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
WITHOUT_EFFECT = {"image_dir", "annotations", "output", "gpu_id", "num_gpus", "num_workers"}
"""Flags that do not decide the result, beside what the files hold."""
MODELS = {"model_path", "run_config", "adapter", "text_encoder"}
"""Flags that the models' digests stand for."""
TINY = (
    "the embedder is the embedded model `tiny`, which knows drawn shapes only: of photographs its"
    " similarities mean little. Give another by --model-path, such as Qwen/Qwen2-VL-2B-Instruct"
)


def add_negatives(options: AddNegativesConfig) -> dict[str, Any]:
    """Write the result and the report, print the report and return it. Raises UserError with all
    that is wrong with the input."""
    seconds: dict[str, float] = {}
    if options.annotations is not None and options.output is not None:
        logger.info("samples from %s; the result goes to %s", options.annotations, options.output)
    if options.embeds_by_tiny:
        logger.warning("%s", TINY)
    with _phase("read samples and look at images", seconds):
        samples, items = _read(options)
    with _phase("embed", seconds):
        visual_VD, texts_TE, shards = encode(options, items)
    uses = max_uses(items.texts, options.min_answer_length, options.fallback_phrase_reuse_limit)
    rows = (items.text_of_N, items.group_of_N)
    pool = SamplePool(visual_VD, items.image_of_N, texts_TE, *rows, *uses)
    params = options.params
    device = f"cuda:{options.gpu_id}" if torch.cuda.is_available() else "cpu"
    with _phase("find neighbours", seconds):
        near = neighbours(pool, params, device, partial(progress, title="find neighbours"))
    with _phase("cluster", seconds):
        num = options.num_clusters or num_clusters_for(len(items.images))
        clusters = Clusters.of_images(pool.visual_VD, num, options.seed)
    with _phase("choose", seconds):
        chosen = choose(pool, near, clusters, params, partial(progress, title="choose"))
    seconds["total"] = sum(seconds.values())
    run = MiningRun(options, items, shards, pool, near, clusters, *chosen, seconds)
    content = report(run)
    content["advice"] = advice(content, options)
    write_json(options.paths[1], _result(run, samples))
    write_json(options.report, content)
    show(content)
    return content


@contextmanager
def _phase(name: str, seconds: dict[str, float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began
    logger.info("%s: %.1f s", name, seconds[name])


def num_clusters_for(images: int) -> int:
    """Return the square root of half the images, 2 to 256."""
    return int(np.clip(round((images / 2) ** 0.5), 2, 256))


def _read(options: AddNegativesConfig) -> tuple[list[Sample], UniqueItems]:
    """Return the samples, once nothing is wrong with them, their images, the paths and the
    devices."""
    problems = ValidationReport()
    options.check(problems)
    samples: list[Sample] = []
    path = options.annotations
    folder = options.image_dir
    if path is not None:
        samples = reading.read(path, options.split, options.max_samples, problems, folder)
    if folder.is_dir():
        files = {sample.image: folder / sample.image for sample in samples}
        looked_at = partial(progress, title="look at images")
        way = "Put the images right, or take their samples out of the annotations."
        for image, wrong in unreadable_images(files, options.num_workers, looked_at).items():
            problems.add(files[image], wrong, way)
    problems.raise_if_any(
        "docs/add_hard_negatives.md has the form of the annotations; all flags:"
        f" {cli.program(PROGRAM)} --help"
    )
    items = UniqueItems.of_samples(samples, folder)
    counts = (len(samples), len(items.images), len(items.texts))
    logger.info("%d samples, %d different images, %d different texts", *counts)
    return samples, items


def _result(run: MiningRun, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what is written; it names no paths and no times, so that a rerun gives the same
    bytes."""
    options = run.options
    done = run.shards[0]
    settings = options.model_dump(mode="json", exclude=WITHOUT_EFFECT | MODELS)
    settings |= {"num_clusters": len(run.clusters.centroids_CD), "model": done["model"]}
    settings["text_model"] = done["text_model"]
    settings["annotations"] = file_digest(options.paths[0])
    rows = []
    for i, (sample, negative) in enumerate(zip(samples, run.chosen, strict=True)):
        if negative is None:
            rows.append(sample.row() | {"negative": None, "reason": reason(run, i)})
            continue
        details = {
            "visual_similarity": round(negative.visual, 6),
            "text_similarity": round(negative.text, 6),
            "kind": negative.kind,
            "threshold": levels(options)[negative.level],
            "short_text": run.is_short(negative),
        }
        rows.append(sample.row() | {"negative": samples[negative.row].row() | details})
    return {"schema": 1, "settings": settings, "samples": rows}
