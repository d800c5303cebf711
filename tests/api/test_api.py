"""The API gives what the commands give, and says all that is wrong at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import cirloop
from cirloop import UserError
from cirloop.data import Dataset
from cirloop.negatives import MiningSettings, TopK
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs, mine
from cirloop.retrieval.topk import topk
from tests.conftest import SMALL
from tests.fake_datasets import write_cirr

ONE, TEXT = "shapes:val:00003", "the red square is now blue"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    sizes = {name: value for name, value in SMALL["data"].items() if name != "type"}
    return cirloop.load_dataset("shapes", cache_dir=tmp_path_factory.mktemp("cache"), **sizes)


def test_a_data_set_is_the_run_s(shapes: Dataset, finished: Path) -> None:
    config = cirloop.load_run(finished).config
    own = config.data.build()  # type: ignore[call-arg]
    assert shapes.train.triplets == own.train.triplets and len(shapes.train.triplets) == 48
    assert shapes.eval_splits("val")[0].queries == own.eval_splits("val")[0].queries
    with pytest.raises(UserError, match=r"has only val, test"):
        shapes.eval_splits("dev")


@pytest.mark.parametrize(
    ("name", "data_dir", "settings", "says"),
    [
        ("cir", None, {}, r"should be one of 'cirr', .*see cirr"),
        ("shapes", None, {"families": 1, "eval_families": -1}, "(?s)2 problems.*eval_families"),
        ("shapes", "photos", {}, "drawn and reads no files"),
        ("cirr", "nowhere", {}, "there is no such directory"),
        ("jsonl", None, {}, "needs --data_dir"),
    ],
)
def test_what_is_no_data_set(
    name: str, data_dir: str | None, settings: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        cirloop.load_dataset(name, data_dir, **settings).eval_splits("val")


def vectors(*shape: int, seed: int = 0) -> Any:
    rows = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_negatives_are_what_the_strategy_chooses() -> None:
    gallery, targets = vectors(80, 16, seed=1), np.arange(30)
    queries = gallery[:30] + vectors(30, 16)
    references = np.arange(30) + 40
    mined = cirloop.mine_negatives(
        queries, gallery, targets, negatives_per_query=3, references=references, extra_ranks=1
    )
    settings = MiningSettings(
        strategy=TopK(negatives_per_query=3, extra_ranks=1), only_failed_queries=False
    )
    inputs = MiningInputs(queries, gallery, targets, references)
    for number, result in enumerate(mine(settings, inputs, MiningContext(0))):
        width = len(result.gallery_indices)
        assert mined.rows_QK[number, :width].tolist() == result.gallery_indices.tolist()
        assert mined.ranks_QK[number, :width].tolist() == result.ranks.tolist()
        assert (mined.scores_QK[number, :width] == result.scores).all()
        assert (mined.rows_QK[number, width:] == -1).all()
        assert (mined.ranks_QK[number, width:] == 0).all()
        assert np.isneginf(mined.scores_QK[number, width:]).all()
        assert mined.target_ranks_Q[number] == result.target_rank
        assert mined.target_scores_Q[number] == np.float32(result.target_score)
    assert mined.rows_QK.shape == (30, 3) and (mined.rows_QK == -1).any()


def test_lists_tensors_and_strategies_are_taken() -> None:
    import torch

    queries, gallery = vectors(4, 8), vectors(20, 8, seed=1)
    wanted = cirloop.mine_negatives(queries, gallery, [0, 1, 2, 3], extra_ranks="all")
    strategy = TopK(negatives_per_query=5, extra_ranks="all")
    for same in (
        cirloop.mine_negatives(torch.from_numpy(queries), gallery, range(4), strategy),
        cirloop.mine_negatives(queries, gallery[:, None], [0, 1, 2, 3], strategy),
    ):
        assert (same.rows_QK == wanted.rows_QK).all()
    known = cirloop.mine_negatives(
        queries, gallery, range(4), strategy, positives=[[int(row)] for row in wanted.rows_QK[:, 0]]
    )
    assert (known.rows_QK[:, :4] == wanted.rows_QK[:, 1:]).all()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"strategy": "bnd"}, r"strategy\.type: should be one of .*see band"),
        ({"k": 0, "negatives_per_query": 0}, r"(?s)2 problems.*negatives_per_query.*\.k: unknown"),
        ({"strategy": TopK(), "extra_ranks": 2}, "extra_ranks: the strategy is given with its"),
        (
            {"targets": [0, 1, 99], "references": [0.5, 1, 2]},
            r"(?s)2 problems.*targets.*references",
        ),
        ({"gallery": vectors(20, 9), "targets": [0]}, r"(?s)2 problems.*has 8 dimensions, gallery"),
        ({"queries": [[1.0, 2.0]] * 3}, "found float64"),
        ({"queries": vectors(3, 2, 8)}, r"must have one vector a query, found \(3, 2, 8\)"),
        ({"strategy": "group"}, "needs groups"),
        ({"categories": ["a"], "positives": [[1], [2]]}, r"(?s)positives: .*categories: must be"),
    ],
)
def test_all_that_is_wrong_with_arrays_and_settings(changes: dict[str, Any], says: str) -> None:
    given = {"queries": vectors(3, 8), "gallery": vectors(20, 8, seed=1), "targets": [0, 1, 2]}
    with pytest.raises(UserError, match=says):
        cirloop.mine_negatives(**{**given, **changes})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0,cuda:1"])
def test_a_gpu_that_is_not_there_is_named(device: str) -> None:
    with pytest.raises(UserError, match=f"device '{device}': torch sees no CUDA GPU here"):
        cirloop.mine_negatives(vectors(3, 8), vectors(20, 8, seed=1), [0, 1, 2], device=device)


def test_scores_are_those_of_the_evaluation(shapes: Dataset, finished: Path) -> None:
    """The run's own ranking of every query, given as lists."""
    embedder = cirloop.load_run(finished).embedder(1)
    (part,) = shapes.eval_splits("val")
    ids = part.gallery.ids
    images = [part.images.load(image) for image in ids]
    gallery_GD = embedder.embed_images(images)
    of_id = dict(zip(ids, images, strict=True))
    queries_QD = embedder.embed_queries(
        [of_id[query.reference] for query in part.queries], [q.text for q in part.queries]
    )
    rows_QG, _ = topk(queries_QD, gallery_GD, len(ids))
    rankings = {
        query.id: tuple(ids[row] for row in rows)
        for query, rows in zip(part.queries, rows_QG, strict=True)
    }
    scores = cirloop.evaluate(rankings, [part])
    wanted = cirloop.load_run(finished).results[-1]
    assert wanted["iteration"] == "1" and scores.num_queries == len(part.queries)
    assert {name: round(value, 6) for name, value in scores.metrics.items()} == wanted["metrics"]
    assert cirloop.evaluate(rankings, part) == scores
    assert scores.protocol == wanted["protocol"] and scores.benchmark == "shapes_val"


def test_a_benchmark_by_name_is_scored_from_its_annotations(tmp_path: Path) -> None:
    from cirloop.cli.score_rankings import score_rankings

    directory = write_cirr(tmp_path / "cirr", families=3)
    names = json.loads((directory / "image_splits" / "split.rc2.val.json").read_text())
    asked = json.loads((directory / "captions" / "cap.rc2.val.json").read_text())
    rankings = {row["pairid"]: [*names] for row in asked}  # numbers, as the file has them
    file = tmp_path / "rankings.json"
    file.write_text(json.dumps(rankings))
    wanted = score_rankings(file, "cirr_val", directory)
    for each in (rankings, file, str(file)):
        scores = cirloop.evaluate(each, "cirr_val", directory)  # type: ignore[arg-type]
        assert scores.metrics == wanted["metrics"]
        assert scores.standard_errors == wanted["standard_errors"]
    with pytest.raises(UserError, match="cirr_test: has no published targets"):
        cirloop.evaluate(file, "cirr_test", directory)
    with pytest.raises(UserError, match=r"(?s)2 problems.*not ranked.*unknown: x"):
        cirloop.evaluate({"x": ["a"]}, "cirr_val", directory)
    with pytest.raises(UserError, match="rankings: must be an object"):
        cirloop.evaluate([["a"]], "cirr_val", directory)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("benchmark", "says"),
    [
        ("cirr_dev", "benchmark 'cirr_dev' is unknown. There are: cirr_val"),
        ("circo_val", "benchmark circo_val needs data_dir"),
        ([], "benchmark holds nothing"),
        ([1], "benchmark holds int"),
    ],
)
def test_what_is_no_benchmark(
    benchmark: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIRLOOP_DATA", raising=False)
    with pytest.raises(UserError, match=says):
        cirloop.evaluate({}, benchmark)


def test_a_run_is_searched_as_the_command_searches_it(finished: Path, engine: Any) -> None:
    run = cirloop.load_run(finished)
    assert run.iterations == [0, 1] and run.config.num_iterations == 1
    wanted = engine.search("1", engine.reference(ONE), TEXT, 5).hits
    assert tuple(run.search(ONE, TEXT, 5)) == wanted
    assert tuple(run.embedder(1).search(ONE, TEXT, 5)) == wanted
    image = engine.gallery.images.load(ONE)
    found = run.embedder("1").search(image, TEXT, 6, keep_reference=True)
    wanted = engine.search("1", engine.reference(ONE), TEXT, 6, True).hits
    assert [hit.image for hit in found] == [hit.image for hit in wanted]
    # Not the last bits: one has the features from the cache, the other computes them.
    assert np.allclose([hit.score for hit in found], [hit.score for hit in wanted], atol=1e-5)
    assert run.search(text="a red circle", k=1) and run.embedder() is run.embedder(1)
    assert run.embedder(0).fingerprint != run.embedder("base").fingerprint


def test_vectors_are_those_that_are_exported(finished: Path, tmp_path: Path) -> None:
    from cirloop.tools.export_embeddings import main

    flags = ["--experiment_dir", finished, "--iteration", "1", "--split", "val"]
    main([*map(str, flags), "--output", str(tmp_path / "vectors")])
    exported = np.load(tmp_path / "vectors" / "gallery" / "00000.npy")
    run = cirloop.load_run(finished)
    images = run.config.data.build().eval_splits("val")[0].images  # type: ignore[call-arg]
    ids = json.loads((tmp_path / "vectors" / "gallery_ids.json").read_text())
    path = tmp_path / "one.png"
    images.load(ids[1]).save(path)
    made = run.embedder(1).embed_images([images.load(ids[0]), path, str(path)])
    assert np.abs(made - exported[[0, 1, 1]]).max() < 1e-6 and made.dtype == np.float32
    clear = Image.new("RGBA", (40, 60), (0, 0, 0, 0))  # upright on white, as files are read
    both = run.embedder(1).embed_images([clear, Image.new("RGB", (40, 60), "white")])
    assert (both[0] == both[1]).all()


def test_a_folder_is_searched_in_place_of_the_gallery(finished: Path, tmp_path: Path) -> None:
    run = cirloop.load_run(finished)
    images = run.config.data.build().eval_splits("val")[0]  # type: ignore[call-arg]
    (tmp_path / "photos").mkdir()
    for image in images.gallery.ids[:3]:
        images.images.load(image).save(tmp_path / "photos" / f"{image[-5:]}.png")
    hits = cirloop.load_run(finished, gallery=tmp_path / "photos").search(text="a circle")
    assert sorted(hit.image for hit in hits) == ["00000.png", "00001.png", "00002.png"]
    with pytest.raises(UserError, match="there is no such directory"):
        cirloop.load_run(finished, gallery=tmp_path / "x").search(text="a circle")


def test_all_that_is_wrong_with_images_and_texts(finished: Path, tmp_path: Path) -> None:
    embedder = cirloop.load_run(finished).embedder(1)
    (tmp_path / "text.png").write_text("none")
    good = Image.new("RGB", (30, 30))
    with pytest.raises(UserError) as error:
        embedder.embed_queries([good, tmp_path / "text.png", "gone.png"], ["", "x"])
    said = str(error.value)
    assert "4 problems" in said and "texts: are 2, and images 3" in said
    assert "gone.png): is not there" in said and "text 0: the text is empty" in said
    wrong: Any = [None, np.zeros((9, 9, 3), np.uint8)]
    with pytest.raises(UserError, match=r"(?s)4 problems.*is a NoneType.*is a ndarray, .*is a int"):
        embedder.embed_queries(wrong, [None, 3])  # type: ignore[list-item]
    with pytest.raises(UserError, match="is a ndarray, and no image of Pillow's"):
        embedder.search(wrong[1])
    with pytest.raises(UserError, match="one side more than 200 times"):
        embedder.embed_images([Image.new("RGB", (900, 2))])
    with pytest.raises(UserError, match="nothing to search for"):
        embedder.search()
    with pytest.raises(UserError, match=r"iteration 7: no 7 here\. .* base, 0, 1"):
        cirloop.load_run(finished).embedder(7)
    with pytest.raises(UserError, match="is no run directory"):
        cirloop.load_run(tmp_path)


@pytest.mark.parametrize(
    ("config", "changes", "says"),
    [
        ({"num_iterations": -1, "trainin": {}}, {}, "(?s)2 problems.*did you mean training"),
        ("shapes", {"training": {"batch_size": "x"}}, r"training\.batch_size: Input should be"),
        ("shpes", {}, "(?s)there is no such file.*shapes.yaml"),
        ({"dry_run": True}, {"report_only": True}, "dry_run, report_only: is for the command"),
        ({}, {"fast_mode": True}, "fast_mode goes with a recipe"),
        ({"data_dir": "photos"}, {}, "drawn and reads no files"),
        ({"data": {"type": "jsonl"}}, {}, "(?s)model.path: is not given"),
    ],
)
def test_settings_are_refused_before_anything_is_written(
    config: Any, changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        cirloop.train(config, experiment_dir=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_used_directory_is_refused(finished: Path) -> None:
    with pytest.raises(UserError, match="holds a run already"):
        cirloop.train(SMALL, experiment_dir=finished)


def test_recipes_and_changes_are_laid_over_each_other() -> None:
    from cirloop.config.from_python import configuration

    plain = configuration("shapes", {})
    fast = configuration("shapes", {"fast_mode": True, "training": {"batch_size": 3}})
    assert fast.training.batch_size == 3
    assert fast.training.iteration_0_steps < plain.training.iteration_0_steps
    short = configuration({"mining": {"type": "top_k", "k": 2}}, {"seed": 4})
    assert short.mining.strategy.negatives_per_query == 2 and short.seed == 4  # type: ignore[union-attr]


@pytest.mark.full
def test_a_run_from_python_is_the_command_s(finished: Path, tmp_path: Path) -> None:
    """In a process that set up logging for itself, whose set-up is as it was afterwards."""
    from tests.api.test_process import run

    settings = {**SMALL, "experiment_dir": str(tmp_path / "run")}
    before, after, shown = run(
        f"""
import torch, transformers
from cirloop.cli import runner
import cirloop
before = state()
done = cirloop.train(json.loads({json.dumps(json.dumps(settings))}))
shown = [done.iterations, str(done.directory), done.results[-1]["iteration"]]
print(json.dumps([before, state(), shown]))
"""
    )
    assert shown == [[0, 1], str(tmp_path / "run"), "1"]
    names = [
        f"{kind}.json"
        for kind in ("hard_negatives_iter_0", "augmented_samples_iter_1", "evaluation_iter_1")
    ]
    for name in (*names, "checkpoint_iter_1/adapter_model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name
    assert after == before
