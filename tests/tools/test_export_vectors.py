"""Exported vectors: what add_hard_negatives.py mines from them is what the run mined; Parquet holds
the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cirloop.artifacts.store import Store
from cirloop.cli.mine_embeddings import main as mine_vectors
from cirloop.config.run import RunConfig, save
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import mine
from cirloop.retrieval.topk import topk
from cirloop.retrieval.vectors import open_vectors
from cirloop.stages.context import RunContext
from cirloop.stages.mine import mining_inputs
from cirloop.tools.export.command import main as export_command
from cirloop.tools.export_embeddings import ExportConfig, main, write, write_parquet
from cirloop.types import UserError


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def config(small: Any, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of a run that has not begun: its base model can be exported."""
    made: RunConfig = small(tmp_path_factory.mktemp("runs") / "run")
    save(made, made.directory / "config.json")
    return made


def export(run: Path, output: Path, *more: str) -> Path:
    main(["--experiment_dir", str(run), "--iteration", "base", "--output", str(output), *more])
    return output


FILES = {
    "--query-embeddings": "queries",
    "--gallery-embeddings": "gallery",
    "--targets": "targets.npy",
    "--references": "references.npy",
    "--positives": "positives.json",
}


def mined_by_the_run(config: RunConfig) -> list[tuple[str, str, int, int]]:
    """Query, image, its rank and the target's."""
    run = RunContext(config, Store(config.directory), config.data.build())
    inputs, train = mining_inputs(run, run.embedder(None), run.data.train), run.data.train
    return [
        (train.triplets[f.query_index].query.id, train.gallery.ids[column], rank, f.target_rank)
        for f in mine(config.mining, inputs, MiningContext(0))
        for column, rank in zip(f.gallery_indices, f.ranks.tolist(), strict=True)
    ]


@pytest.mark.full
def test_what_is_mined_from_an_export_is_what_the_run_mines(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = mined_by_the_run(config)
    # also: a gallery embedded in pieces and kept on disk
    monkeypatch.setattr("cirloop.stages.context.EMBED_CHUNK", 64)
    monkeypatch.setattr("cirloop.retrieval.vectors.MAPPED_BYTES", 1000)
    made = export(config.directory, tmp_path / "made", "--rows_per_file", "20")
    assert len(list((made / "gallery").iterdir())) > 1
    files = [word for flag, name in FILES.items() for word in (flag, str(made / name))]
    options = ["--extra-ranks", "all", "--negatives-per-query", "2"]
    mine_vectors([*files, *options, "--output", str(tmp_path / "mined.json")])
    images, queries = read(made / "gallery_ids.json"), read(made / "queries_ids.json")
    mined = [
        (queries[row["query"]], images[n["image"]], n["rank"], row["target_rank"])
        for row in read(tmp_path / "mined.json")
        if row["target_rank"] > 1  # the run's `top_k` passes over queries whose target is first
        for n in row["negatives"]
    ]
    assert mined == there and mined
    said = read(made / "export.json")
    assert said["iteration"] == "base"
    assert said["splits"][0]["gallery"] == list(open_vectors(made / "gallery").shape)


@pytest.mark.full
def test_parquet_holds_the_same_rows(config: RunConfig, tmp_path: Path) -> None:
    from datasets import load_dataset

    gallery = ("--split", "val", "--what", "gallery")
    plain = export(config.directory, tmp_path / "npy", *gallery)
    parquet = ("--format", "parquet", "--rows_per_file", "50")
    made = export(config.directory, tmp_path / "parquet", *gallery, *parquet)
    files = sorted(map(str, (made / "gallery").iterdir()))
    cache = str(tmp_path / "cache")
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    assert len(files) > 1 and rows["id"][:] == read(plain / "gallery_ids.json")
    vectors = np.array(rows["vector"][:], np.float32)
    assert (vectors == open_vectors(plain / "gallery")).all()
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-5)
    assert not (made / "queries").exists() and not (plain / "targets.npy").exists()


def test_a_vector_is_a_list_of_fixed_size(tmp_path: Path) -> None:
    from pyarrow import parquet

    made = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    write_parquet(tmp_path / "a.parquet", ["a", "b", "c"], made[:, 0])
    write_parquet(tmp_path / "b.parquet", ["a", "b", "c"], made)
    one, several = (parquet.read_table(tmp_path / f"{name}.parquet") for name in "ab")
    assert str(one.schema.field("vector").type).startswith("fixed_size_list")
    assert one["id"].to_pylist() == ["a", "b", "c"]
    assert one["vector"].to_pylist() == made[:, 0].tolist()
    assert several["vector"].to_pylist() == made.tolist()


@pytest.mark.parametrize("per_image", [None, 3], ids=["one vector", "several"])
def test_a_database_finds_the_same_ten(per_image: int | None, tmp_path: Path) -> None:
    """LanceDB, from two files as they are; of several vectors an image's most similar one counts,
    for it as here."""
    lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed")
    dataset = pytest.importorskip("pyarrow.dataset")
    random = np.random.default_rng(0)
    shape = (300, 16) if per_image is None else (300, per_image, 16)
    gallery = random.normal(size=shape).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=-1, keepdims=True)
    queries = random.normal(size=(5, 16)).astype(np.float32)
    queries /= np.linalg.norm(queries, axis=-1, keepdims=True)
    ids = [f"image {number}" for number in range(300)]
    options = ExportConfig(
        experiment_dir=tmp_path,
        iteration="0",
        output=tmp_path,
        rows_per_file=200,
        format="parquet",
    )
    write(tmp_path, "gallery", ids, gallery, options)
    database = lancedb.connect(tmp_path / "lance")
    table = database.create_table("images", dataset.dataset(tmp_path / "gallery"))
    rows_QK, scores_QK = topk(queries, gallery, 10)
    for query, rows, scores in zip(queries, rows_QK, scores_QK, strict=True):
        best = table.search(query).distance_type("cosine").limit(10).to_list()
        assert [row["id"] for row in best] == [ids[row] for row in rows]
        assert [1 - row["_distance"] for row in best] == pytest.approx(scores, abs=1e-5)


@pytest.mark.full
def test_vectors_of_a_run_are_searched_by_a_database(config: RunConfig, tmp_path: Path) -> None:
    lancedb = pytest.importorskip("lancedb", reason="lancedb is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    made = tmp_path / "vectors"
    flags = f"--vectors --iteration base --split val --format parquet --output {made}"
    export_command(["--experiment_dir", str(config.directory), *flags.split()])
    gallery, queries = (parquet.read_table(made / name) for name in ("gallery", "queries"))
    table = lancedb.connect(tmp_path / "lance").create_table("images", gallery)
    vectors = [np.array(each["vector"].to_pylist(), np.float32) for each in (queries, gallery)]
    rows_QK, _ = topk(vectors[0], vectors[1], 10)
    ids = gallery["id"].to_pylist()
    for query, rows in zip(vectors[0], rows_QK, strict=True):
        best = table.search(query).distance_type("dot").limit(10).to_list()
        assert [row["id"] for row in best] == [ids[row] for row in rows]


def test_files_of_so_many_rows(tmp_path: Path) -> None:
    options = ExportConfig(experiment_dir=tmp_path, iteration="0", output=tmp_path, rows_per_file=4)
    made = np.arange(18, dtype=np.float32).reshape(9, 2)
    assert write(tmp_path, "gallery", [str(n) for n in range(9)], made, options) == [9, 2]
    assert [len(np.load(file)) for file in sorted((tmp_path / "gallery").iterdir())] == [4, 4, 1]
    assert (open_vectors(tmp_path / "gallery")[:] == made).all()


def test_what_is_wrong_is_said_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match=r"--experiment_dir .* is no run directory"):
        export(tmp_path / "run", tmp_path / "made")
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"--output .* is there already and not an empty directory"):
        export(tmp_path / "run", tmp_path / "used")
    with pytest.raises(UserError, match="--rows_per_file"):
        export(tmp_path / "run", tmp_path / "made", "--rows_per_file", "0")
    assert not (tmp_path / "made").exists()


@pytest.mark.full
def test_an_unknown_iteration_or_split_is_named(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no 7 here\. There are: base"):
        export(config.directory, tmp_path / "made", "--iteration", "7")
    with pytest.raises(UserError):
        export(config.directory, tmp_path / "made", "--split", "unheard")
    assert not (tmp_path / "made").exists()
