"""Embeddings of a run's model as .npy files, for `add_hard_negatives.py`, or as Parquet.

    python -m cirloop.export_vectors --experiment_dir DIR --iteration 1 --split train --output V

OUTPUT/gallery/ and OUTPUT/queries/ hold files of `--rows_per_file` rows, in the order of ids (a
directory for each category where a split has several). With .npy the ids are in gallery_ids.json
and queries_ids.json, and for the train split targets.npy, references.npy and positives.json are
what `add_hard_negatives.py` reads. In Parquet a row is an `id` and a `vector`, a list of fixed
size. `export.json`, written last, says what they are. N rows, M vectors of an image, D dimensions.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from cirloop.artifacts.atomic import write_json
from cirloop.cli.iterations import BASE, BEST, select_iteration
from cirloop.config import cli, notices
from cirloop.data.paths import DataPaths
from cirloop.monitoring.console import progress
from cirloop.retrieval.arrays import Vectors
from cirloop.retrieval.embed import query_items
from cirloop.retrieval.vectors import validate_embeddings
from cirloop.stages.context import RunContext, run_directory
from cirloop.stages.mine import mining_inputs
from cirloop.stages.models import Embedder
from cirloop.types import EvalSplit, TrainSplit, UserError

logger = logging.getLogger(__name__)
PROGRAM = "python -m cirloop.export_vectors"
TRAIN = "train"


class ExportConfig(cli.Flags):
    """Which vectors are exported, and how."""

    experiment_dir: Path
    """The run directory."""
    iteration: str = BEST
    """Whose model: `best` by the run's evaluations, a finished iteration's number, `last` or
    `base`."""
    split: str = TRAIN
    """`train`, or another split of the run's data set, such as val."""
    what: Literal["both", "gallery", "queries"] = "both"
    """Which vectors."""
    format: Literal["npy", "parquet"] = "npy"
    """`.npy` files with the ids beside them, or Parquet with an id in each row."""
    rows_per_file: int = Field(1_000_000, ge=1)
    """Rows of a file, at most."""
    output: Path
    """A directory that is not there yet, or is empty."""


def main(argv: Sequence[str]) -> None:
    """Write embeddings. Raises UserError for wrong flags; then nothing is written."""
    export(cli.parse_flags(ExportConfig, argv, PROGRAM))


def export(options: ExportConfig) -> None:
    """Embed with the model of the iteration, and write the files."""
    directory = options.experiment_dir
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise UserError(
            f"--output {options.output} is there already and not an empty directory; give another."
        )
    config, store = run_directory(directory)
    notices.refuse_simulated(config, "whose vectors could be exported")
    label = select_iteration(options.iteration, store)
    data = config.open_data(DataPaths(config.data_dir, config.cache, progress, config.train_dir))
    splits: Sequence[TrainSplit | EvalSplit]
    splits = [data.train] if options.split == TRAIN else data.eval_splits(options.split)
    run = RunContext(config, store, data)
    backbone = run.embedder(None if label == BASE else store.load(f"checkpoint_iter_{label}"))
    entries = []
    for split in splits:
        place = options.output / split.name.replace(":", "_") if len(splits) > 1 else options.output
        entries.append({"split": split.name} | _export_split(run, backbone, split, options, place))
    write_json(
        options.output / "export.json",
        {
            "schema": 1,
            "model": backbone.fingerprint,
            "iteration": label,
            "format": options.format,
            "splits": entries,
        },
    )
    logger.info("wrote %s", options.output)


def _export_split(
    run: RunContext,
    backbone: Embedder,
    split: TrainSplit | EvalSplit,
    options: ExportConfig,
    place: Path,
) -> dict[str, list[int]]:
    """Return the shape of what was written, by its name."""
    shapes = {}
    if options.what != "queries":
        vectors = validate_embeddings(run.gallery_embeddings(backbone, split), "gallery vectors")
        shapes["gallery"] = write(place, "gallery", split.gallery.ids, vectors, options)
    if options.what == "gallery":
        return shapes
    queries = (
        [t.query for t in split.triplets] if isinstance(split, TrainSplit) else list(split.queries)
    )
    if isinstance(split, TrainSplit) and options.format == "npy":
        inputs = mining_inputs(run, backbone, split)
        vectors = inputs.queries_QD
        assert inputs.references_Q is not None
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / "targets.npy", inputs.targets_Q)
        np.save(place / "references.npy", inputs.references_Q)
        write_json(place / "positives.json", [sorted(rows) for rows in inputs.positives or ()])
    else:
        vectors = run.embed_cached(
            backbone, query_items(queries), split, f"embed {split.name} queries"
        )
    shapes["queries"] = write(
        place,
        "queries",
        [query.id for query in queries],
        validate_embeddings(vectors, "queries"),
        options,
    )
    return shapes


def write(
    place: Path, name: str, ids: Sequence[str], vectors: Vectors, options: ExportConfig
) -> list[int]:
    """Files of rows (N, D) or (N, M, D) in `place/name`; the shape."""
    (place / name).mkdir(parents=True, exist_ok=True)
    for start in range(0, len(ids), options.rows_per_file):
        rows = slice(start, start + options.rows_per_file)
        file = place / name / f"{start // options.rows_per_file:05d}.{options.format}"
        if options.format == "npy":
            np.save(file, vectors[rows])
        else:
            write_parquet(file, ids[rows], vectors[rows])
    if options.format == "npy":
        write_json(place / f"{name}_ids.json", list(ids))
    return [int(size) for size in vectors.shape]


def write_parquet(file: Path, ids: Sequence[str], vectors: Vectors) -> None:
    """Write a row for each id: the id and a vector (D), a list of fixed size, or a list of an
    image's vectors (M, D), as vector databases read them."""
    import pyarrow as pa
    from pyarrow import parquet

    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[-1])
    if vectors.ndim == 3:
        num, per_image, _ = vectors.shape
        column = pa.ListArray.from_arrays(np.arange(num + 1, dtype=np.int32) * per_image, column)
    parquet.write_table(pa.table({"id": list(ids), "vector": column}), file)
