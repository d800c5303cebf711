"""The plan of a dry run: the method, memory by stage, disk and time, each measured or
calculated."""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

import torch

from cirloop.artifacts.store import MANIFEST
from cirloop.backbones.model_settings import VlmSettings
from cirloop.config.run import RunConfig
from cirloop.data import Dataset
from cirloop.distributed import launcher
from cirloop.monitoring import oom
from cirloop.stages import resources
from cirloop.stages.measure import Timing, measure
from cirloop.stages.memory_plan import peak_memory, rows_at_once
from cirloop.stages.model_checks import (
    disk_bytes,
    mean_tokens,
    nearest_directory,
    num_images,
    used_splits,
)
from cirloop.stages.resources import gigabytes
from cirloop.validation import counted

Rows = list[tuple[str, str]]


def plan_rows(config: RunConfig, data: Dataset) -> Rows:
    """Return the rows of the plan's table."""
    if config.retrieval == "simulated":
        return [*_method_rows(config, data), ("time", "seconds: there is no model")]
    rows = _method_rows(config, data) + _memory_rows(config, data) + _disk_rows(config, data)
    trains = bool(config.num_iterations or config.training.iteration_0_steps)
    cannot = _too_large(config)
    try:
        timings = {} if cannot else measure(config, data, trains, _max_training_rows(config, data))
    except (MemoryError, RuntimeError) as error:
        if not oom.is_oom(error):
            raise
        timings = {}
        cannot = oom.first_line(error)
    if trains and timings and "step" not in timings:
        rows.append(
            (
                "not measured",
                "training: the activations of its rows do not fit the memory that is free here",
            )
        )
    if not timings:
        return [*rows, ("time", f"not measured, since the model cannot be loaded here: {cannot}")]
    return rows + _time_rows(config, data, timings)


def _method_rows(config: RunConfig, data: Dataset) -> Rows:
    """Describe data, model and method."""
    training = config.training
    captioning = config.captioning
    mining = config.mining
    parts = data.eval_splits(config.evaluation.split)
    trains = bool(config.num_iterations or training.iteration_0_steps)
    num_queries = sum(len(p.queries) for p in parts)
    num_images = sum(len(p.gallery.ids) for p in parts)
    num = launcher.num_processes(config.runtime)
    shared = config.foundation.shares_base_with(config.model) and num == 1
    lora = training.lora
    tune = training.finetuning or (
        "lora" if isinstance(config.model, VlmSettings) else "as the model has it"
    )
    foundation = config.foundation.path or f"{config.foundation.type}, a rule without a model"
    texts = f"{counted(captioning.num_candidates, 'text')} per mined image by {foundation}"
    if config.foundation.path:
        texts += ", on the embedder's weights" if shared else ", loaded in the embedder's place"
    tuning = (
        f"rank {lora.r}, alpha {lora.alpha}, {lora.dtype}"
        if training.finetuning != "full"
        else ", ".join(training.trainable_patterns)
    )
    trained = (
        f"{len(data.train.triplets)} triplets, {len(data.train.gallery.ids)} images"
        if trains
        else "nothing"
    )
    steps = (
        f"warm-up of {training.iteration_0_steps} steps, then {config.num_iterations} of"
        f" {training.steps_per_iteration} steps"
    )
    return [
        (
            "run directory",
            f"{config.directory}{' (used)' if (config.directory / MANIFEST).exists() else ''}",
        ),
        (
            "device",
            f"{_device()}, {gigabytes(_device_memory()[0])}; {num} process{'es' * (num > 1)}",
        ),
        ("model", " ".join(filter(None, (config.model.path, getattr(config.model, "dtype", ""))))),
        ("foundation model", foundation),
        ("train", trained),
        (parts[0].name, f"{num_queries} queries, {num_images} images"),
        (
            "iterations",
            (
                f"{steps}; {training.batch_size} queries a step,"
                f" {training.grad_cache_chunk_size or 'all'} rows at once"
            ),
        ),
        ("strategy", f"{mining.strategy.type}, {mining.strategy.negatives_per_query} a query"),
        ("loss", str(training.loss.type)),
        (
            "tuning",
            "none: there is no model" if config.model.type == "simulated" else f"{tune}; {tuning}",
        ),
        ("captioning", texts if captioning.enabled and config.num_iterations else "none"),
    ]


def _memory_rows(config: RunConfig, data: Dataset) -> Rows:
    if not isinstance(config.model, VlmSettings):
        return [("memory", f"no arithmetic is known for {config.model.type}")]
    stages = peak_memory(config, mean_tokens(config.model, used_splits(config, data)))
    whole = _device_memory()[0]
    rows = []
    for stage, parts in stages.items():
        total = sum(parts.values())
        note = f": more than the {gigabytes(whole)} of this device" if total > whole else ""
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


def _time_rows(config: RunConfig, data: Dataset, timings: dict[str, Timing]) -> Rows:
    """Return what was measured, and the hours of the run that follow from it."""
    training = config.training
    rounds = config.num_iterations
    parts = data.eval_splits(config.evaluation.split)
    splits = used_splits(config, data)
    num_queries = sum(len(p.queries) for p in parts)
    num_gallery = sum(len(p.gallery.ids) for p in parts)
    row = timings["row"].seconds
    hours = {}
    hours["vision, once"] = num_images(splits) * timings["picture"].seconds
    hours["evaluate"] = (
        (rounds + 1 + config.evaluation.evaluate_base) * (num_queries + num_gallery) * row
    )
    if "step" in timings:
        queries = len(data.train.triplets)
        images = len(data.train.gallery.ids)
        # Measured: a query and its target.
        rows = training.batch_size * (2 + training.negatives_in_batch) / 2
        hours["train"] = (
            (training.iteration_0_steps + rounds * training.steps_per_iteration)
            * rows
            * timings["step"].seconds
        )
        hours["mine"] = rounds * (queries + images) * row
        mined = rounds * queries * config.mining.strategy.negatives_per_query
        if "text" in timings:
            checked = (
                config.captioning.num_candidates * row
                if config.captioning.max_round_trip_rank
                else 0.0
            )
            hours["caption, at most"] = mined * (timings["text"].seconds + checked)
    names = {
        "picture": "a picture in the tower",
        "row": "an embedding, vision cached",
        "step": "a triplet in a step",
        "text": "an image's texts, written and judged",
    }
    num = launcher.num_processes(config.runtime)
    shown: Rows = [(f"measured: {names[name]}", str(timing)) for name, timing in timings.items()]
    if rounds and config.captioning.enabled and "text" not in timings:
        shown.append(("not measured", f"captions of {config.foundation.type}"))
    note = f", at {num} processes as fast as {num} devices" if num > 1 else ""
    shown += [
        (f"estimate: {name}", f"{seconds / num / 3600:.3g} h") for name, seconds in hours.items()
    ]
    return [*shown, ("estimate: all", f"{sum(hours.values()) / num / 3600:.3g} h{note}")]


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
        free, whole = torch.cuda.mem_get_info()
        return whole, free
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    known = Path("/proc/meminfo")  # on Linux; elsewhere all of it counts as free
    available = (
        re.search(r"MemAvailable:\s+(\d+) kB", known.read_text("utf-8"))
        if known.is_file()
        else None
    )
    return whole, int(available[1]) * 1024 if available else whole
