"""Embedding and captioning in one of N processes: its share of a job that `shares.py` sent out, written to files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from cirloop import cost
from cirloop.artifacts import fingerprint, write_json
from cirloop.backbones import Item
from cirloop.backbones.features import VisionFeatures
from cirloop.captioning.base import Ask
from cirloop.captioning.eyes import Eyes
from cirloop.captioning.prompts import Prompt
from cirloop.config import RunConfig
from cirloop.data.sources import Sources
from cirloop.report.terminal import progress
from cirloop.retrieval.embed import embed_share
from cirloop.types import ImageId, Images

PATIENCE = timedelta(days=1)
"""For which processes wait for each other. One that dies ends all at once; one may have far more to do."""


def content(images: Images, ids: Iterable[ImageId]) -> str:
    """Of pictures: a process proves that it looks at the driver's."""
    return fingerprint([[image, images.digest(image)] for image in dict.fromkeys(ids)])


def do_share(job: dict[str, Any]) -> None:
    """This process's share of a job, whose images it finds by itself."""
    import torch

    gpu = {} if torch.cuda.is_available() else {"cpu": True, "backend": "gloo"}
    state = PartialState(timeout=PATIENCE, **gpu)
    config = RunConfig(**job["config"])
    data = config.data.build(Sources(config.data_dir, Path(job["cache"]), _quiet, config.train_dir))
    images = data.at(job["where"]).images
    asked = [row[:1] for row in job["items"]] if job["kind"] == "embed" else [row[:2] for row in job["asks"]]
    assert content(images, [image for row in asked for image in row]) == job["images"], "not the driver's pictures"
    with cost.process(Path(job["work"]), state.process_index, Path(job["profile"]) if config.runtime.profile else None):
        (_embed if job["kind"] == "embed" else _caption)(job, config, images, state)


def _embed(job: dict[str, Any], config: RunConfig, images: Images, state: PartialState) -> None:
    """Write `i_rows.npy` and `i_vectors.npy`: every n-th batch of the items, from the i-th on."""
    share, runtime = (state.process_index, state.num_processes), config.runtime
    backbone = config.model.build(Path(job["adapter"]) if job["adapter"] else None)
    assert backbone.fingerprint == job["model"], "this is another embedder than the driver's"
    items = [Item(*row) for row in job["items"]]
    features = VisionFeatures(backbone, images, Path(job["cache"]) / "vision", runtime)
    see_together(features, [item.image for item in items], state)
    shown, size = progress if share[0] == 0 else _quiet, runtime.embed_batch_size
    rows, made = embed_share(backbone, features, items, size, shown, job["title"], runtime.embed_batch_tokens, share)
    if rows:
        np.save(Path(job["work"]) / f"{share[0]}_rows.npy", np.array(rows, np.int64))
        np.save(Path(job["work"]) / f"{share[0]}_vectors.npy", made)


def _caption(job: dict[str, Any], config: RunConfig, images: Images, state: PartialState) -> None:
    """Write `i_answers.json`: the answers to every n-th batch of questions, from the i-th on."""
    share = (state.process_index, state.num_processes)
    captioner, size = config.foundation.build(), config.captioning.batch_size
    shown = progress if share[0] == 0 else _quiet
    eyes = Eyes(captioner, images, Path(job["cache"]) / "vision", size, shown, config.runtime, share)
    asks, prompt = [Ask(*row) for row in job["asks"]], Prompt(**job["prompt"])
    eyes.see(asks, lambda features, wanted: see_together(features, wanted, state))
    ask: Any = {"write": eyes.write, "yes": eyes.yes}[job["kind"]]
    answers = ask(prompt, asks, title=job["title"], **job["options"])
    if job["kind"] == "write":
        answers = [[asdict(answer) for answer in row] for row in answers]
    found = {"name": captioner.name, "rows": eyes.done, "answers": [answers[row] for row in eyes.done]}
    write_json(Path(job["work"]) / f"{share[0]}_answers.json", found)


def see_together(features: VisionFeatures, wanted: Sequence[ImageId], state: PartialState) -> None:
    """Have the images on disk, each process its share of the batches that one process would make."""
    if not state.is_main_process:
        features.known(wanted)  # the first process counts them
    batches = features.missing(wanted)
    state.wait_for_everyone()  # all have looked before the first writes
    features.make(batches[state.process_index :: state.num_processes], progress=_vision(state))
    state.wait_for_everyone()
    features.missing(wanted)  # looks at what the others wrote


def _vision(state: PartialState) -> Any:
    return (lambda batches: progress(batches, "vision")) if state.is_main_process else iter


def _quiet(items: Any, title: str) -> Any:
    return items
