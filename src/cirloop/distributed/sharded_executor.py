"""Embedding and captioning in N processes: a job goes out as a file, each process does its share,
rows come as files.

The batches are those of one process; batch b goes to process b % N, with one process's seed. So the
result has the same bytes whatever N is. This is the driver's half; `sharded_worker.py` is a
process's.
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

from cirloop.backbones import Item
from cirloop.captioning.base import Answer, Ask
from cirloop.captioning.prompts import Prompt
from cirloop.config.run import RunConfig
from cirloop.data import Dataset
from cirloop.distributed import launcher
from cirloop.distributed.jobs import ShardJob
from cirloop.distributed.sharded_worker import content
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
        """`log` is that of the attempt, beside which each process has its own."""
        self._config, self._work, self._split, self._log = config, work, split, log
        self._where = data.split_key(split)

    def embed(
        self, items: Sequence[Item], adapter: Path | None, model: str, title: str
    ) -> npt.NDArray[np.float32]:
        """Vectors (N, D) or (N, M, D) of `items`; the processes prove that theirs is the embedder
        `model`."""
        unique = tuple(dict.fromkeys(items))
        images = [item.image for item in unique]
        self._run("embed", images, title, items=unique, adapter=adapter, model=model)
        rows = np.concatenate([np.load(path) for path in self._files("rows.npy")])
        vectors = np.concatenate([np.load(path) for path in self._files("vectors.npy")])
        place = dict(zip(unique, _places(rows, len(unique)), strict=True))
        self._clear()
        return vectors[[place[item] for item in items]]

    def ask(
        self,
        kind: Literal["write", "yes"],
        prompt: Prompt,
        asks: Sequence[Ask],
        title: str,
        **options: Any,
    ) -> tuple[str, list[Any]]:
        """The captioner's name, and its answer to each question: `Eyes.write` or `Eyes.yes`."""
        images = [image for ask in asks for image in (ask.first, ask.second)]
        self._run(kind, images, title, prompt=prompt, asks=tuple(asks), options=options)
        parts = [json.loads(path.read_text("utf-8")) for path in self._files("answers.json")]
        places = _places(
            np.array([row for part in parts for row in part["rows"]], np.int64), len(asks)
        )
        answers = [answer for part in parts for answer in part["answers"]]
        self._clear()
        return parts[0]["name"], [answers[place] for place in places]

    def _run(
        self,
        kind: Literal["embed", "write", "yes"],
        images: Sequence[ImageId],
        title: str,
        **task: Any,
    ) -> None:
        began = time.monotonic()
        job = ShardJob(
            kind=kind,
            directory=self._work,
            log=self._log,
            config=self._config.resolved(),
            cache=self._config.cache,
            where=self._where,
            images=content(self._split.images, images),
            title=title,
            profile=self._config.directory / PROFILE,
            **task,
        )
        if self._work.exists():
            shutil.rmtree(self._work)
        with ExitStack() as undo:
            undo.callback(self._clear)
            with profiling.of_processes(self._work):
                launcher.sharded(job, self._config.runtime)
            undo.pop_all()
        num = launcher.processes(self._config.runtime)
        logger.info("%s: in %d processes, %.1f s", title, num, time.monotonic() - began)

    def _clear(self) -> None:
        shutil.rmtree(self._work)
        with suppress(OSError):  # another stage's work lies beside it
            self._work.parent.rmdir()

    def _files(self, name: str) -> list[Path]:
        return sorted(self._work.glob(f"*_{name}"))


class DistributedCaptioner:
    """`Eyes` in several processes."""

    name = ""
    """Known from the first answer on."""

    def __init__(self, executor: ShardedExecutor) -> None:
        self._executor = executor

    def write(
        self,
        prompt: Prompt,
        asks: Sequence[Ask],
        max_new_tokens: int,
        temperatures: Sequence[float],
        seed: int,
        title: str,
    ) -> list[list[Answer]]:
        """Per question an answer for each of `temperatures`; 0 is greedy. As `Eyes.write`
        answers."""
        options = {"max_new_tokens": max_new_tokens, "temperatures": [*temperatures], "seed": seed}
        rows = self._ask("write", prompt, asks, title, **options)
        return [[Answer(**answer) for answer in row] for row in rows]

    def yes(self, prompt: Prompt, asks: Sequence[Ask], title: str) -> list[float]:
        """Probability of "yes" per question."""
        return self._ask("yes", prompt, asks, title)

    def _ask(
        self,
        kind: Literal["write", "yes"],
        prompt: Prompt,
        asks: Sequence[Ask],
        title: str,
        **options: Any,
    ) -> list[Any]:
        if not asks:
            return []
        self.name, answers = self._executor.ask(kind, prompt, asks, title, **options)
        return answers


def _places(rows: npt.NDArray[np.int64], num: int) -> list[int]:
    """Where each of `num` rows lies among those that the processes did."""
    assert np.array_equal(np.sort(rows), np.arange(num)), "the processes did not do each row once"
    places: list[int] = np.argsort(rows).tolist()
    return places
