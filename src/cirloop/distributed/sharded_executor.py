"""Embedding and captioning in N processes: a job goes out as a file, each process does its shard,
rows come back as files.

The batches are those of one process; batch b goes to process b % N, with one process's seed. The
result therefore has the same bytes for every N. This module is the driver's half;
`sharded_worker.py` is a worker's.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cirloop.backbones import EmbedInput
from cirloop.captioning.base import Answer, CaptionRequest
from cirloop.captioning.prompts import Prompt
from cirloop.config.run import RunConfig
from cirloop.data import Dataset
from cirloop.distributed import launcher
from cirloop.distributed.jobs import ShardJob
from cirloop.distributed.sharded_worker import image_set_digest
from cirloop.monitoring import profiling
from cirloop.monitoring.costs import PROFILE
from cirloop.types import EvalSplit, ImageId, TrainSplit

logger = logging.getLogger(__name__)


class ShardedExecutor:
    """Runs jobs over the images of one split. `work` is a directory for the files, seen by all
    machines."""

    def __init__(
        self,
        config: RunConfig,
        data: Dataset,
        split: TrainSplit | EvalSplit,
        work: Path,
        log: Path | None,
    ) -> None:
        """Prepare jobs over the images of `split`; `log` is the attempt's log, beside which each
        worker has its own."""
        self._config = config
        self._work = work
        self._split = split
        self._log = log
        self._where = data.split_key(split)

    def embed(
        self, items: Sequence[EmbedInput], adapter: Path | None, model: str, title: str
    ) -> npt.NDArray[np.float32]:
        """Embed `items` to vectors (N, D) or (N, M, D); the workers prove that theirs is the
        embedder `model`."""
        unique = tuple(dict.fromkeys(items))
        images = [item.image for item in unique]
        self._run("embed", images, title, items=unique, adapter=adapter, model=model)
        rows = np.concatenate([np.load(path) for path in self._files("rows.npy")])
        vectors = np.concatenate([np.load(path) for path in self._files("vectors.npy")])
        place = dict(zip(unique, _positions(rows, len(unique)), strict=True))
        self._clear()
        return vectors[[place[item] for item in items]]

    def caption(
        self,
        kind: Literal["generate", "yes_probability"],
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        title: str,
        answers: Path,
        **options: object,
    ) -> tuple[str, list[Any]]:
        """Return the captioner's name and its answer to each request, from its method `kind`.

        The workers keep a journal in the directory `answers`.
        """
        images = [image for request in requests for image in (request.reference, request.image)]
        task = {"prompt": prompt, "requests": tuple(requests), "options": options}
        self._run(kind, images, title, answers=answers, **task)
        parts = [json.loads(path.read_text("utf-8")) for path in self._files("answers.json")]
        places = _positions(
            np.array([row for part in parts for row in part["rows"]], np.int64), len(requests)
        )
        rows = [answer for part in parts for answer in part["answers"]]
        self._clear()
        return parts[0]["name"], [rows[place] for place in places]

    def _run(
        self,
        kind: Literal["embed", "generate", "yes_probability"],
        images: Sequence[ImageId],
        title: str,
        **task: Any,
    ) -> None:
        began = time.monotonic()
        job = ShardJob(
            kind=kind,
            directory=self._work,
            log=self._log,
            config=self._config.to_json(),
            cache=self._config.cache,
            where=self._where,
            images=image_set_digest(self._split.images, images),
            title=title,
            profile=self._config.directory / PROFILE,
            **task,
        )
        if self._work.exists():
            shutil.rmtree(self._work)
        with ExitStack() as undo:
            undo.callback(self._clear)
            with profiling.collect_workers(self._work):
                launcher.run_sharded(job, self._config.runtime)
            undo.pop_all()
        num = launcher.num_processes(self._config.runtime)
        logger.info("%s: in %d processes, %.1f s", title, num, time.monotonic() - began)

    def _clear(self) -> None:
        shutil.rmtree(self._work)
        with suppress(OSError):  # another stage's work lies beside it
            self._work.parent.rmdir()

    def _files(self, name: str) -> list[Path]:
        return sorted(self._work.glob(f"*_{name}"))


class DistributedCaptioner:
    """`BatchedCaptioner` in several processes."""

    name = ""
    """Known from the first answer on."""

    def __init__(self, executor: ShardedExecutor, answers: Path) -> None:
        """`answers` is the directory of the run's journal."""
        self._executor = executor
        self._answers = answers

    def generate(
        self,
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
        title: str,
    ) -> list[list[Answer]]:
        """Write an answer to each request for each of `temperatures`; 0 is greedy."""
        options = {"max_new_tokens": max_new_tokens, "temperatures": [*temperatures], "seed": seed}
        rows = self._run("generate", prompt, requests, title, **options)
        return [[Answer(**answer) for answer in row] for row in rows]

    def yes_probability(
        self, prompt: Prompt, requests: Sequence[CaptionRequest], title: str
    ) -> list[float]:
        """Return the probability of "yes" for each request."""
        return self._run("yes_probability", prompt, requests, title)

    def _run(
        self,
        kind: Literal["generate", "yes_probability"],
        prompt: Prompt,
        requests: Sequence[CaptionRequest],
        title: str,
        **options: object,
    ) -> list[Any]:
        if not requests:
            return []
        self.name, answers = self._executor.caption(
            kind, prompt, requests, title, self._answers, **options
        )
        return answers


def _positions(rows: npt.NDArray[np.int64], num: int) -> list[int]:
    """Return the position of each of `num` rows among the rows that the workers did."""
    assert np.array_equal(np.sort(rows), np.arange(num)), "the processes did not do each row once"
    places: list[int] = np.argsort(rows).tolist()
    return places
