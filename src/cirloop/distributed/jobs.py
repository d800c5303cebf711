"""Jobs of launched processes: a JSON file in a directory that they share with the driver."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from cirloop.backbones import EmbedInput
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.prompts import Prompt


def _this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The fields that every job has."""

    directory: Path
    """Of the job's file and of what the processes leave for the driver."""
    log: Path | None = None
    """The log of the attempt, beside which each process has one; None = no logs."""
    driver: tuple[str, int] = field(default_factory=_this_process)
    """The host and the number of the process that waits for the job's."""

    @property
    def file(self) -> Path:
        return self.directory / "job.json"

    @property
    def error(self) -> Path:
        """The message to the user of a process that failed."""
        return self.directory / "error.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainJob(Job):
    """A training stage: from artifacts of the run directory to the checkpoint `output`."""

    kind: Literal["train"] = "train"
    cache: Path
    run: Path
    iteration: int
    steps: int
    parent: Path | None
    """The adapter that training goes on from; None = the base model."""
    augmented: tuple[str, ...]
    negatives: str | None
    schedule: tuple[int, int]
    """The first of these steps in the learning rate's schedule, and how many steps that has."""
    key: str
    """Of step checkpoints: those of another key are not gone on with."""
    workspace: Path
    output: Path

    @property
    def stop_file(self) -> Path:
        """A file that asks the processes to stop after a step."""
        return self.directory / "stop"

    @property
    def rows(self) -> Path:
        """The steps done so far, as rows of the training log, a line each."""
        return self.directory / "steps.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob(Job):
    """Embedding (`items`) or captioning (`requests`): each process does every N-th batch."""

    kind: Literal["embed", "generate", "yes_probability"]
    cache: Path
    config: dict[str, Any]
    where: tuple[str, str]
    """The split, as `Dataset.at` finds it."""
    images: str
    """Digest of the images: a process proves that it looks at the driver's."""
    title: str
    profile: Path
    items: tuple[EmbedInput, ...] = ()
    adapter: Path | None = None
    model: str = ""
    """Fingerprint of the embedder, which a process proves too."""
    answers: Path | None = None
    """The directory of the captioner's journal."""
    prompt: Prompt | None = None
    requests: tuple[CaptionRequest, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of the captioner's method `kind`."""


_ADAPTER: TypeAdapter[TrainJob | ShardJob] = TypeAdapter(TrainJob | ShardJob)


def write(job: Job) -> None:
    job.directory.mkdir(parents=True, exist_ok=True)
    job.file.write_bytes(TypeAdapter(type(job)).dump_json(job))


def read(file: Path) -> TrainJob | ShardJob:
    return _ADAPTER.validate_json(file.read_bytes())
