"""`cirloop.load_dataset`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.data import Dataset


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    train_dir: str | Path | None = None,
    cache_dir: str | Path | None = None,
    **settings: object,
) -> Dataset:
    """Return a data set, whose splits are read, and whose images are checked, on first use.

    `name` is a `data.type`: `shapes`, which is drawn; a benchmark such as `cirr`; `jsonl` for own
    triplets. `data_dir` holds its files, by default one of the usual places, `train_dir` those of a
    benchmark's training set where that is another's. `settings` are its settings under `data`, such
    as `train_triplets=100`. What is found out about images is kept in `cache_dir`, by default
    experiments/cache.

    `dataset.train` has `triplets`, `gallery` and `images`; `dataset.eval_splits("val")` gives a
    part for each category, with `queries`, `relevance`, `gallery` and `images`. Raises UserError
    with every problem of the settings or files.
    """
    from pydantic import ValidationError

    from cirloop.config.errors import format_errors
    from cirloop.config.from_python import ALL_SETTINGS
    from cirloop.config.run import RunConfig
    from cirloop.data import DataPaths, locations, own
    from cirloop.monitoring.console import progress

    try:
        config = RunConfig.model_validate(
            {
                "data": {**settings, "type": name},
                "data_dir": data_dir,
                "train_dir": train_dir,
                "runtime": {"cache_dir": cache_dir},
            }
        )
    except ValidationError as error:
        raise UserError(format_errors(error, RunConfig, ALL_SETTINGS)) from None
    own.refuse_unread(config.data.type, config.data_dir)
    places = locations.with_default_dirs(config.data, config.data_dir, config.train_dir)
    config = config.model_copy(update=places)
    return config.data.build(DataPaths(config.data_dir, config.cache, progress, config.train_dir))
