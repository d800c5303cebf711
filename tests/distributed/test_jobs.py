"""Jobs come out of their files as they went in."""

from __future__ import annotations

from pathlib import Path

import pytest

from cirloop.backbones import EmbedInput
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.prompts import Prompt
from cirloop.distributed import jobs
from cirloop.distributed.jobs import ShardJob, TrainJob
from cirloop.types import ImageId

A, B = ImageId("shapes:1"), ImageId("shapes:2")


def job(kind: str, directory: Path) -> TrainJob | ShardJob:
    if kind == "train":
        return TrainJob(
            directory=directory,
            cache=Path("cache"),
            log=directory / "attempt_001.log",
            run=Path("run"),
            iteration=2,
            steps=9,
            parent=None,
            augmented=("a", "b"),
            negatives=None,
            schedule=(9, 18),
            key="k",
            workspace=Path("w"),
            output=Path("o"),
        )
    return ShardJob(
        kind="generate",
        directory=directory,
        cache=Path("cache"),
        log=None,
        config={"seed": 1},
        where=("val", "gallery"),
        images="digest",
        title="captions",
        profile=Path("p"),
        items=(EmbedInput(A), EmbedInput(B, "réd", "dress")),
        adapter=Path("adapter"),
        model="m",
        answers=Path("a"),
        prompt=Prompt("rewrite", "<image>", "json"),
        requests=(CaptionRequest(A, B, "text"),),
        options={"temperatures": [0.0, 0.7], "seed": 3},
    )


@pytest.mark.parametrize("kind", ["train", "generate"])
def test_a_job_is_read_as_it_was_written(kind: str, tmp_path: Path) -> None:
    written = job(kind, tmp_path / "new")
    jobs.write(written)
    read = jobs.read(written.file)
    assert type(read) is type(written) and read == written
