"""The plan of a dry run: the method, memory by stage, disk and time, each measured or
calculated."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from cirloop.artifacts.store import MANIFEST
from cirloop.backbones.model_settings import VlmSettings
from cirloop.captioning.foundation import ServerFoundation
from cirloop.config.run import RunConfig
from cirloop.data import Dataset
from cirloop.distributed import launcher
from cirloop.monitoring import oom
from cirloop.stages import resources
from cirloop.stages.lengths import lengths_of
from cirloop.stages.measure import Measured, measure
from cirloop.stages.memory_plan import peak_memory, rows_at_once
from cirloop.stages.model_checks import (
    disk_bytes,
    mean_tokens,
    nearest_directory,
    num_images,
    used_splits,
)
from cirloop.stages.plan import plan
from cirloop.stages.resources import gigabytes
from cirloop.stages.work import PIECES, counts_of
from cirloop.types import UserError
from cirloop.validation import counted

Rows = list[tuple[str, str]]


class CannotMeasure(UserError):
    """A model that this machine's memory does not hold."""


def plan_rows(config: RunConfig, data: Dataset) -> Rows:
    """Return the rows of the plan's table."""
    if config.retrieval == "simulated":
        return [*_method_rows(config, data), ("time", "seconds: there is no model")]
    rows = _method_rows(config, data) + _memory_rows(config, data) + _disk_rows(config, data)
    try:
        measured = measure_here(config, data)
    except CannotMeasure as error:
        return [*rows, ("time", str(error))]
    if config.trains and "step" not in measured.timings:
        rows.append(
            (
                "not measured",
                "training: the activations of its rows do not fit the memory that is free here",
            )
        )
    return rows + _time_rows(config, data, measured)


def measure_here(config: RunConfig, data: Dataset) -> Measured:
    """Measure the pieces of a run's work on this machine. Raises CannotMeasure where its memory
    does not hold the model."""
    why = _too_large(config)
    try:
        if not why:
            return measure(config, data, _max_training_rows(config, data))
    except (MemoryError, RuntimeError) as error:
        if not oom.is_oom(error):
            raise
        why = oom.first_line(error)
    raise CannotMeasure(f"not measured, since the model cannot be loaded here: {why}")


def _method_rows(config: RunConfig, data: Dataset) -> Rows:
    """Describe data, model and method."""
    training = config.training
    mining = config.mining
    mined = f"{mining.strategy.type}, {mining.strategy.negatives_per_query} a query"
    if mining.anchors.num:
        mined += f"; {mining.anchors.num} anchors, {mining.anchors.neighbors} neighbours each"
    used = " (used)" if (config.directory / MANIFEST).exists() else ""
    num_processes = launcher.num_processes(config.runtime)
    processes = f"{num_processes} process{'es' * (num_processes > 1)}"
    model = filter(None, (config.model.path, getattr(config.model, "dtype", "")))
    triplets = "nothing"
    if config.trains:
        triplets = f"{len(data.train.triplets)} triplets, {len(data.train.gallery.ids)} images"
    parts = data.eval_splits(config.evaluation.split)
    num_queries = sum(len(part.queries) for part in parts)
    num_images = sum(len(part.gallery.ids) for part in parts)
    steps = (
        f"warm-up of {training.iteration_0_steps} steps, then {config.num_iterations} of"
        f" {training.steps_per_iteration} steps"
    )
    if config.evaluation.early_stopping:
        steps += f", fewer after {config.evaluation.early_stopping} without a better result on val"
    if config.stop_on_futile_round:
        steps += ", fewer where a round cannot help"
    rows = (
        f"{training.batch_size} queries a step, {training.grad_cache_chunk_size or 'all'} rows at"
        " once"
    )
    return [
        ("run directory", f"{config.directory}{used}"),
        ("device", f"{_device()}, {gigabytes(_device_memory()[0])}; {processes}"),
        ("model", " ".join(model)),
        ("foundation model", _foundation(config)),
        ("train", triplets),
        (parts[0].name, f"{num_queries} queries, {num_images} images"),
        ("iterations", f"{steps}; {rows}"),
        ("strategy", mined),
        ("loss", str(training.loss.type)),
        ("tuning", _tuning(config)),
        ("captioning", _captioning(config)),
    ]


def _foundation(config: RunConfig) -> str:
    return config.foundation.path or f"{config.foundation.type}, without a model"


def _tuning(config: RunConfig) -> str:
    """Describe which weights are trained."""
    if config.model.type == "simulated":
        return "none: there is no model"
    training = config.training
    lora = training.lora
    usual = "lora" if isinstance(config.model, VlmSettings) else "as the model has it"
    weights = f"rank {lora.r}, alpha {lora.alpha}, {lora.dtype}"
    if training.finetuning == "full":
        weights = ", ".join(training.trainable_patterns)
    return f"{training.finetuning or usual}; {weights}"


def _captioning(config: RunConfig) -> str:
    """Describe which texts are written, and by which model."""
    if not config.captioning.enabled or not config.num_iterations:
        return "none"
    num_texts = counted(config.captioning.num_candidates, "text")
    texts = f"{num_texts} per mined image by {_foundation(config)}"
    if not config.foundation.path:
        return texts
    if isinstance(config.foundation, ServerFoundation):
        return f"{texts}, asked at {', '.join(config.foundation.url)}"
    one_process = launcher.num_processes(config.runtime) == 1
    shared = one_process and config.foundation.shares_base_with(config.model)
    return texts + (", on the embedder's weights" if shared else ", loaded in the embedder's place")


def _memory_rows(config: RunConfig, data: Dataset) -> Rows:
    if not isinstance(config.model, VlmSettings):
        return [("memory", f"no arithmetic is known for {config.model.type}")]
    stages = peak_memory(config, mean_tokens(config.model, used_splits(config, data)))
    capacity = _device_memory()[0]
    rows = []
    for stage, parts in stages.items():
        total = sum(parts.values())
        note = f": more than the {gigabytes(capacity)} of this device" if total > capacity else ""
        shown = ", ".join(f"{name} {gigabytes(size)}" for name, size in parts.items())
        rows.append((f"memory: {stage}", f"{gigabytes(total)}{note} = {shown}"))
    if config.training.finetuning == "full":
        rows.append(("memory: train", "no arithmetic is known for training.finetuning full"))
    return rows


def _disk_rows(config: RunConfig, data: Dataset) -> Rows:
    needs = disk_bytes(config, data)
    free = shutil.disk_usage(nearest_directory(config.cache)).free
    if not needs:
        return [("disk", f"not known for {config.model.type}; {gigabytes(free)} free")]
    num = num_images(used_splits(config, data))
    vision = (
        f"{gigabytes(needs['vision'])} for {num:,} images,"
        f" {needs['vision'] / max(1, num) / 1e6:.3g} MB each"
    )
    return [
        ("disk: vision cache", f"{vision}; {gigabytes(free)} free in {config.cache}"),
        ("disk: checkpoints", gigabytes(needs["run"])),
    ]


def _time_rows(config: RunConfig, data: Dataset, measured: Measured) -> Rows:
    """Return what was measured, and the minutes of the run that follow from it."""
    rows: Rows = [
        (f"measured: {PIECES[piece]}", str(timing)) for piece, timing in measured.timings.items()
    ]
    if config.num_iterations and config.captioning.enabled and "write" not in measured.timings:
        rows.append(("not measured", f"captions of {config.foundation.type}"))
    lengths = lengths_of(config, data)
    if measured.answer:
        lengths = replace(lengths, answer=measured.answer, distinct=measured.distinct)
    planned = plan(config, counts_of(config, data, 1.0), lengths, measured.costs)
    for stage, of_round, in_all in planned.rows():
        a_round = "" if of_round == "-" else f"{of_round} min a round, "
        rows.append((f"estimate: {stage}", f"{a_round}{in_all} min in all"))
    num = launcher.num_processes(config.runtime)
    note = f"{num} processes are taken to be as fast as {num} devices"
    return [*rows, ("estimate", note)] if num > 1 else rows


def _too_large(config: RunConfig) -> str:
    """Return why the weights do not fit the free memory; empty where they do."""
    if not isinstance(config.model, VlmSettings):
        return ""
    sizes = resources.model_sizes(config.model.resolve_dir())
    needed = resources.weight_bytes(sizes, config.model.dtype, config.model.quantization)
    free = _device_memory()[1]
    return (
        f"its weights take {gigabytes(needed)}, and {gigabytes(free)} are free"
        if needed > free
        else ""
    )


def _max_training_rows(config: RunConfig, data: Dataset) -> int:
    """Return how many rows of a training step fit the free memory; no limit where no arithmetic is
    known."""
    if not isinstance(config.model, VlmSettings) or config.training.finetuning == "full":
        return sys.maxsize
    tokens = mean_tokens(config.model, used_splits(config, data))
    parts = peak_memory(config, tokens).get("train")
    if parts is None:
        return sys.maxsize
    kept = parts["activations"] + parts["working space"]
    free = _device_memory()[1] - parts["weights"] - parts["adapters and optimizer"]
    return max(0, int(0.8 * free * rows_at_once(config) / kept))


def _device() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"


def _device_memory() -> tuple[int, int]:
    """Return the bytes of the device's memory, and those that are free."""
    if torch.cuda.is_available():
        free, capacity = torch.cuda.mem_get_info()
        return capacity, free
    capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")  # on Linux; elsewhere all of it counts as free
    available = (
        re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text("utf-8"))
        if meminfo.is_file()
        else None
    )
    return capacity, int(available[1]) * 1024 if available else capacity
