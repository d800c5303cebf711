"""`report.html` of a run: what its rooms know, handed to the page; and the page made anew from a run directory."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cirloop import notices, schemas
from cirloop.artifacts import Store
from cirloop.config import RunConfig
from cirloop.data import Dataset
from cirloop.data.sources import Sources
from cirloop.directory import run_directory
from cirloop.evaluation import protocols
from cirloop.negatives.curriculum import Curriculum
from cirloop.report import html
from cirloop.report.terminal import progress
from cirloop.types import EvalSplit, TrainSplit, UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")
Splits = tuple[TrainSplit | None, tuple[EvalSplit, ...], str]
ANY_NUMBER = 1 << 62
LOG = "training_log.json"


class Reporter:
    """Writes the report of one run directory, any number of times: what it read of artifacts and the thumbnails stay.

    `splits` gives the data, as far as it is needed: of training, of evaluation, and why there is none.
    """

    def __init__(self, config: RunConfig, store: Store, splits: Callable[[bool, bool], Splits]) -> None:
        self._config, self._store, self._splits = config, store, splits
        self._thumbnails, self._kept = html.Thumbnails(), dict[Any, Any]()

    @classmethod
    def of_data(cls, config: RunConfig, store: Store, data: Dataset) -> Reporter:
        """Of a run whose data is there. Training data is asked for once something was mined: some runs have none."""
        split = config.evaluation.split
        return cls(config, store, lambda train, evals: (
            data.train if train else None, data.parts(split) if evals else (), "",
        ))  # fmt: skip

    def write(self) -> Path:
        """Raises UserError for an artifact that is not what it was, OSError where the disk refuses."""
        config, names = self._config, frozenset(self._store.names)
        begun = {kind: any(name.startswith(kind) for name in names) for kind in ("hard_negatives", "evaluation")}
        train, evals, no_data = self._splits(begun["hard_negatives"], begun["evaluation"])
        strategy, hardness = config.mining.strategy, None
        if isinstance(strategy, Curriculum):
            hardness = partial(strategy.difficulty, rounds=config.num_iterations)
        return html.write(
            html.Source(
                self._store.directory, names, self._read, config.resolved(), protocols.HEADLINE[config.data.type],
                train, evals, no_data, hardness, config.runtime.control, self._kept,
                notices.of(config), notices.title(config),
            ),
            self._thumbnails,
        )  # fmt: skip

    def _read(self, name: str) -> dict[str, Any]:
        """An artifact's content, verified; of a checkpoint the training log, without reading the weights."""
        path = self._store.directory / name
        with _uncollected():
            return schemas.read(path / LOG) if path.is_dir() else self._store.find(name).read()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Parsing makes many objects and no cycles; looking for those would take half of its time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def rebuild(config: RunConfig) -> Path:
    """The report of the run in `config.directory` from its artifacts; `config` may say where data or a control lie now.

    Loads no model and takes no lock; where the data or pictures are gone the page says so. Raises UserError where the
    directory holds no run, and as `Reporter.write`.
    """
    own, store = run_directory(config.directory)
    runtime = own.runtime.model_copy(update={"control": config.runtime.control or own.runtime.control})
    places = {"data_dir": config.data_dir or own.data_dir, "train_dir": config.train_dir or own.train_dir}
    own = own.model_copy(update={"runtime": runtime, **places})
    path = Reporter(own, store, lambda train, evals: _readable(own, train, evals)).write()
    logger.info("wrote %s", path)
    return path


def _readable(config: RunConfig, train: bool, evals: bool) -> Splits:
    """What of the data can still be read."""
    split, why = config.evaluation.split, [""]

    def read(look: Callable[[Dataset], T]) -> T | None:
        settings = config.data
        tried: list[Any] = [settings]
        if hasattr(settings, "allow_missing_images"):
            tried.append(settings.model_copy(update={"allow_missing_images": ANY_NUMBER}))
        for each in tried:
            links = config.runtime.allow_symlinks
            where = Sources(config.data_dir, config.cache, progress, config.train_dir, links)
            try:
                return look(each.build(where))
            except UserError as error:
                why.append(str(error))
        return None

    found = read(lambda data: data.train) if train else None
    parts = read(lambda data: data.parts(split)) if evals else ()
    gone = (train and found is None) or parts is None
    return found, parts or (), why[-1] if gone else ""
