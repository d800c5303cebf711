"""From samples to negatives: read, look, embed, find neighbours, cluster, choose, write."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import file_digest
from cirloop.monitoring.console import progress
from cirloop.negatives.knn_text_samples import Clusters, SamplePool, choose, neighbours
from cirloop.negatives.strategies.knn_text import thresholds
from cirloop.tools.add_negatives import samples as reading
from cirloop.tools.add_negatives.advice import advice
from cirloop.tools.add_negatives.config import AddNegativesConfig
from cirloop.tools.add_negatives.encode import check_devices, encode, num_gpus_here
from cirloop.tools.add_negatives.report import MiningRun, reason, report
from cirloop.tools.add_negatives.samples import Sample, UniqueItems
from cirloop.tools.add_negatives.show import show
from cirloop.tools.add_negatives.text_reuse import max_uses
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
RESULT_SETTINGS = (
    "split",
    "k_nn",
    "cosine_threshold",
    "min_visual_similarity",
    "diverse_ratio",
    "min_answer_length",
    "fallback_phrase_reuse_limit",
    "num_clusters",
    "batch_size",
    "max_samples",
    "max_pixels",
    "dtype",
    "seed",
)
"""What decides the result, beside the files."""
TINY = (
    "the embedder is the embedded model `tiny`, which knows drawn shapes only: of photographs its"
    " similarities mean little. Give another by --model-path, such as Qwen/Qwen2-VL-2B-Instruct"
)


class PhaseTimer:
    """Seconds of each phase, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - began
        logger.info("%s: %.1f s", name, self.seconds[name])


def add_negatives(options: AddNegativesConfig) -> dict[str, Any]:
    """Write the result and the report, print the report and return it. Raises UserError with all
    that is wrong with the input."""
    timer = PhaseTimer()
    if options.annotations is not None and options.output is not None:
        logger.info("samples from %s; the result goes to %s", options.annotations, options.output)
    if options.embeds_by_tiny:
        logger.warning("%s", TINY)
    with timer.phase("read samples and look at pictures"):
        samples, what = _read(options)
    with timer.phase("embed"):
        encoded = encode(options, what, progress)
    uses = max_uses(what.texts, options.min_answer_length, options.fallback_phrase_reuse_limit)
    pool = SamplePool(
        encoded.visual_VD, what.image_of_N, encoded.texts_TE, what.text_of_N, what.group_of_N, *uses
    )
    params = options.params
    device = f"cuda:{options.gpu_id}" if num_gpus_here() else "cpu"
    with timer.phase("find neighbours"):
        near = neighbours(pool, params, device, lambda starts: progress(starts, "find neighbours"))
    with timer.phase("cluster"):
        num = options.num_clusters or num_clusters_for(len(what.images))
        clusters = Clusters.of_images(pool.visual_VD, num, options.seed)
    with timer.phase("choose"):
        chosen, num_exhausted = choose(
            pool, near, clusters, params, lambda starts: progress(starts, "choose")
        )
    timer.seconds["total"] = sum(timer.seconds.values())
    run = MiningRun(
        options, what, encoded, pool, near, clusters, chosen, num_exhausted, timer.seconds
    )
    content = report(run)
    content["advice"] = advice(content, options)
    write_json(options.result_file, _result(run, samples))
    write_json(options.report, content)
    show(content)
    return content


def num_clusters_for(images: int) -> int:
    """Return the square root of half the images, 2 to 256."""
    return int(np.clip(round((images / 2) ** 0.5), 2, 256))


def _read(options: AddNegativesConfig) -> tuple[list[Sample], UniqueItems]:
    """Return the samples, once nothing is wrong with them, their pictures, the paths and the
    devices."""
    problems = ValidationReport()
    options.check(problems)
    check_devices(options, problems)
    samples: list[Sample] = []
    if options.annotations is not None:
        path = options.annotations
        folder = options.image_dir
        samples = reading.read(path, options.split, options.max_samples, problems, folder)
    if options.image_dir.is_dir():
        looked_at = partial(progress, title="look at pictures")
        reading.check_images(samples, options.image_dir, options.num_workers, looked_at, problems)
    problems.raise_if_any(
        "docs/add_hard_negatives.md has the form of the annotations; all flags:"
        " add_hard_negatives.py --help"
    )
    what = reading.deduplicate(samples, options.image_dir)
    logger.info(
        "%d samples, %d different images, %d different texts",
        len(samples),
        len(what.images),
        len(what.texts),
    )
    return samples, what


def _result(run: MiningRun, samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what is written; it names no paths and no times, so that a rerun gives the same
    bytes."""
    options = run.options
    done = run.encoded.shards[0].done
    settings = options.model_dump(mode="json", include={*RESULT_SETTINGS})
    settings |= {"num_clusters": len(run.clusters.centroids_CD), "model": done["model"]}
    settings |= {"text_model": done["text_model"], "annotations": file_digest(options.samples_file)}
    levels = [round(float(threshold), 4) for threshold in thresholds(options.cosine_threshold)]
    rows = []
    for i, (sample, negative) in enumerate(zip(samples, run.chosen, strict=True)):
        if negative is None:
            rows.append({**sample.row(), "negative": None, "reason": reason(run, i)})
            continue
        other = samples[negative.row]
        said = {
            "visual_similarity": round(negative.visual, 6),
            "text_similarity": round(negative.text, 6),
            "kind": negative.kind,
            "threshold": levels[negative.level],
            "short_text": bool(run.pool.short_T[run.pool.text_of_N[negative.row]]),
        }
        rows.append({**sample.row(), "negative": {**other.row(), **said}})
    return {"schema": 1, "settings": settings, "samples": rows}
