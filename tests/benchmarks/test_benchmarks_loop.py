"""The whole loop on data sets from files, and what happens to their broken images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cirloop.cli import runner
from cirloop.cli.evaluate import EvalConfig, evaluate
from cirloop.cli.score_rankings import score_rankings
from cirloop.data.shapes.draw import PRETRAIN, draw
from cirloop.data.shapes.splits import build_splits
from cirloop.types import UserError
from tests.commands import command
from tests.fake_datasets import write_circo, write_cirr

ROOT = Path(__file__).resolve().parents[2]


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.full
def test_a_round_on_cirr(run_on: Any) -> None:
    made = run_on("cirr")
    last = made.results[-1]
    assert last["split"] == "cirr_val" and "reference removed" in last["protocol"]
    assert {f"recall_subset@{k}" for k in (1, 2, 3)} <= set(last["metrics"])
    assert last["missing_images"] == last["dropped_queries"] == 0
    assert not (made.run / "accounting_iter_1.json").exists()  # nobody knows the truth here
    entries = read(made.data / "captions" / "cap.rc2.train.json")
    members = {str(entry["pairid"]): entry["img_set"]["members"] for entry in entries}
    mined = read(made.run / "hard_negatives_iter_0.json")["negatives"]
    assert mined and all(row["image"] in members[row["query"]] for row in mined)
    assert all(row["image"].startswith("train-") for row in mined)


@pytest.mark.full
def test_what_a_run_on_cirr_submits_is_scored_as_it_was(run_on: Any, tmp_path: Path) -> None:
    """Evaluated again, and the server's files scored from outside: the model's own recalls."""
    made = run_on("cirr")
    out, server = tmp_path / "out.json", tmp_path / "server"
    options = {"experiment_dir": made.run, "iterations": "base,1", "eval_dataset": "cirr_val"}
    again = evaluate(EvalConfig(**options, submission=server, output_file=out))
    first, _, last = made.results
    assert [r["metrics"] for r in again] == [first["metrics"], last["metrics"]]
    check_paired(again, read(out)["compared"])
    for metric, count in (("recall", 50), ("recall_subset", 3)):
        file = server / "iter_1" / f"cirr_val_{metric}.json"
        rows = {k: v for k, v in read(file).items() if k not in ("version", "metric")}
        assert all(len(row) == count for row in rows.values())
        outside = score_rankings(file, "cirr_val", made.data)["metrics"]
        assert outside
        for name, value in outside.items():
            assert last["metrics"][name] == pytest.approx(value, abs=1e-6)


@pytest.mark.full
def test_a_run_on_cirr_is_evaluated_on_other_files(run_on: Any, tmp_path: Path) -> None:
    made = run_on("cirr")
    run = made.run
    options = {"experiment_dir": run, "iterations": "1"}
    assert evaluate(EvalConfig(**options, eval_dataset="cirr_test")) == []
    assert (run / "submission_cirr_test" / "iter_1" / "cirr_test_recall.json").exists()
    with pytest.raises(UserError, match="nothing to score"):
        evaluate(EvalConfig(**options, eval_dataset="cirr_test", ablate="text"))
    options |= {"eval_dataset": "cirr_val", "data_dir": spoiled(tmp_path / "damaged")}
    with pytest.raises(UserError, match="--allow_missing_images 2"):
        evaluate(EvalConfig(**options))
    assert evaluate(EvalConfig(**options, allow_missing_images=2))[0]["missing_images"] == 2
    check_circo(run, write_circo(tmp_path / "circo"), tmp_path)


def check_paired(results: list[dict[str, Any]], compared: list[dict[str, Any]]) -> None:
    [found] = compared
    a, b = ([row[1] == 1 for row in result["ranks"]] for result in results)
    assert (found["from"], found["to"], found["metric"]) == ("base", "1", "recall@1")
    assert 0 < found["p"] <= 1
    assert found["difference"] == pytest.approx(sum(b) / len(b) - sum(a) / len(a))


def check_circo(run: Path, circo: Path, tmp_path: Path) -> None:
    """A run on one benchmark evaluated on another: the submission, scored from outside, gives the
    same."""
    options = {
        "experiment_dir": run,
        "iterations": "1",
        "data_dir": circo,
        "submission": tmp_path / "circo_server",
    }
    [result] = evaluate(EvalConfig(**options, eval_dataset="circo_val"))
    assert result["gallery"] == 66 and result["metrics"]["map@50"] > 0
    file = tmp_path / "circo_server" / "iter_1" / "circo_val.json"
    outside = score_rankings(file, "circo_val", circo)["metrics"]
    assert outside.keys() == result["metrics"].keys() and "map@10, addition" in outside
    assert all(result["metrics"][name] == pytest.approx(v, abs=1e-6) for name, v in outside.items())
    assert (
        evaluate(
            EvalConfig(
                experiment_dir=run, iterations="1", data_dir=circo, eval_dataset="circo_test"
            )
        )
        == []
    )
    assert len(read(run / "submission_circo_test" / "iter_1" / "circo_test.json")["0"]) == 50


@pytest.mark.full
def test_a_base_model_needs_no_training_files_and_counts_what_is_missing(
    small: Any, tmp_path: Path
) -> None:
    data = spoiled(tmp_path / "data")
    (data / "captions" / "cap.rc2.train.json").unlink()
    (data / "image_splits" / "split.rc2.train.json").unlink()
    shutil.rmtree(data / "train")
    settings = {"type": "cirr", "allow_missing_images": 2}
    training = {"iteration_0_steps": 0}
    results = runner.run(
        small(tmp_path / "run", data=settings, data_dir=data, training=training, num_iterations=0)
    )
    assert [r["iteration"] for r in results] == ["base", "0"]
    assert results[0]["metrics"] == results[1]["metrics"]
    entries = read(data / "captions" / "cap.rc2.val.json")
    missing = {"dev-3-img0", "dev-15-img0"}
    hit = {e["pairid"] for e in entries if missing & set(e["img_set"]["members"])}
    for result in results:
        assert result["missing_images"] == 2 and result["gallery"] == 42
        assert result["dropped_queries"] == len(hit) > 0
        assert result["queries"] == len(entries) - len(hit)


@pytest.mark.full
@pytest.mark.real_data
def test_the_real_cirr_val_end_to_end(small: Any, tmp_path: Path) -> None:
    """Real annotations, a drawn image per name: evaluated without training, submitted, and scored
    from outside."""
    real = ROOT.parent / "shared" / "data" / "cirr"
    if not real.is_dir():
        pytest.skip(f"the real annotations are not at {real}")
    data, scenes = tmp_path / "cirr", build_splits()["val"]
    for name in ("captions/cap.rc2.val.json", "image_splits/split.rc2.val.json"):
        (data / name).parent.mkdir(parents=True)
        (data / name).symlink_to(real / name)
    for row, path in enumerate(read(real / "image_splits" / "split.rc2.val.json").values()):
        (data / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(
            draw(scenes.scenes[row % len(scenes.scenes)], PRETRAIN, "stand-in", row)
        ).save(data / path)
    run = tmp_path / "run"
    settings = {
        "training": {"iteration_0_steps": 0},
        "evaluation": {"evaluate_base": False},
        "num_iterations": 0,
    }
    [result] = runner.run(small(run, data={"type": "cirr"}, data_dir=data, **settings))
    assert (result["queries"], result["gallery"]) == (4181, 2297)
    assert evaluate(EvalConfig(experiment_dir=run, iterations="0", submission=tmp_path / "server"))
    scored = {}
    for metric in ("recall", "recall_subset"):
        file = tmp_path / "server" / "iter_0" / f"cirr_val_{metric}.json"
        assert file.stat().st_size <= 5_000_000
        scored |= score_rankings(file, "cirr_val", real)["metrics"]
    assert len(scored) == 7
    assert all(
        result["metrics"][name] == pytest.approx(value, abs=1e-6) for name, value in scored.items()
    )
    # images that have nothing to do with the texts: a random ranker has 20% of the groups right
    assert 0.1 < scored["recall_subset@1"] < 0.3


@pytest.mark.full
def test_a_round_on_fashioniq(run_on: Any, tmp_path: Path) -> None:
    made = run_on("fashioniq")
    results = made.results
    metrics = results[-1]["metrics"]
    for name in ("recall@10", "recall@10, reference removed", "recall@50"):
        each = [metrics[f"{name}, {category}"] for category in ("dress", "shirt", "toptee")]
        assert metrics[name] == pytest.approx(sum(each) / 3, abs=1e-5)
    assert "original gallery" in results[-1]["protocol"] and results[-1]["gallery"] == 99
    summary = read(made.run / "evaluation_results.json")
    assert [(c["from"], c["to"]) for c in summary["compared"]] == [("base", "0"), ("0", "1")]
    hits = [[row[2] for row in result["ranks"]] for result in results]
    assert summary["compared"][1]["difference"] == pytest.approx(
        (sum(hits[2]) - sum(hits[1])) / len(hits[1])
    )
    options = {"experiment_dir": made.run, "iterations": "1", "submission": tmp_path / "out"}
    assert evaluate(EvalConfig(**options))
    outside = score_rankings(
        tmp_path / "out" / "iter_1" / "fashioniq_val_rankings.json", "fashioniq_val", made.data
    )
    assert outside["metrics"]["recall@10"] == pytest.approx(metrics["recall@10"], abs=1e-6)


@pytest.mark.full
def test_a_round_on_own_data(run_on: Any, tmp_path: Path) -> None:
    made = run_on("jsonl")
    last = made.results[-1]
    assert last["split"] == "jsonl_val" and last["gallery"] == 132  # every image of the folder
    assert set(last["metrics"]) == {f"recall@{k}" for k in (1, 5, 10, 50)}
    data = shutil.copytree(made.data, tmp_path / "data")
    options = {"experiment_dir": made.run, "iterations": "1"}
    test = {"eval_dataset": "jsonl_test", "data_dir": data, "submission": tmp_path / "out"}
    with pytest.raises(UserError, match=r"test\.jsonl: there is no such file"):
        evaluate(EvalConfig(**options, **test))
    lines = [json.loads(line) for line in (data / "val.jsonl").read_text().splitlines()]
    unlabelled = (json.dumps({**line, "target": None}) for line in lines)
    (data / "test.jsonl").write_text("\n".join(unlabelled))
    assert evaluate(EvalConfig(**options, **test)) == []
    found = read(tmp_path / "out" / "iter_1" / "jsonl_test_rankings.json")
    hits = sum(line["target"] in found[f"test/{n}"] for n, line in enumerate(lines))
    [again] = evaluate(EvalConfig(**options))
    assert len(found) == len(lines) and hits / len(lines) >= again["metrics"]["recall@50"] > 0


def test_circo_alone_cannot_be_trained_on(small: Any, tmp_path: Path) -> None:
    data = write_circo(tmp_path / "data", families=2)
    with pytest.raises(
        UserError,
        match=r"circo has no training split\. Name the data set to train on by --data\.train",
    ):
        runner.run(small(tmp_path / "run", data={"type": "circo"}, data_dir=data))


@pytest.mark.full
def test_a_round_on_circo_trained_on_cirr(run_on: Any) -> None:
    made = run_on("circo")
    assert [r["split"] for r in made.results] == ["circo_val"] * 3
    assert 0 < made.results[-1]["metrics"]["map@50"] <= 1
    mined = read(made.run / "hard_negatives_iter_0.json")["negatives"]
    assert mined and all(row["image"].startswith("train-") for row in mined)


@pytest.mark.full
def test_a_round_on_hp_fashioniq_trained_on_fashioniq(
    run_on: Any, small: Any, tmp_path: Path
) -> None:
    made = run_on("hp_fashioniq")
    run, data, last = made.run, made.data, made.results[-1]
    assert last["split"] == "hp_fashioniq_val" and set(last["metrics"]) == {
        "preference rate",
        "symmetric accuracy",
    }
    # both numbers again, from the rows of the evaluation and the file's own preferences
    chosen = read(data / "hpfiq.json")["user_1"]["question_set_1"]["preferred set"]
    margins = [row[1] for row in read(run / "evaluation_iter_1.json")["ranks"]]
    agrees = [
        (margin > 0) == (preferred == "1")
        for margin, preferred in zip(margins, chosen, strict=True)
    ]
    above = [agree for agree, margin in zip(agrees, margins, strict=True) if margin > 0]
    assert last["metrics"]["symmetric accuracy"] == pytest.approx(
        sum(agrees) / len(agrees), abs=1e-6
    )
    assert last["metrics"]["preference rate"] == pytest.approx(sum(above) / len(above), abs=1e-6)
    options = {"experiment_dir": run, "iterations": "1"}
    with pytest.raises(UserError, match="people chose between sets"):
        evaluate(EvalConfig(**options, submission=tmp_path / "s"))
    with pytest.raises(UserError, match="hp_fashioniq has only val"):
        runner.run(
            small(
                tmp_path / "other",
                data={"type": "hp_fashioniq"},
                data_dir=data,
                evaluation={"split": "test"},
            )
        )


@pytest.mark.full
def test_a_round_on_a_saved_data_set(run_on: Any) -> None:
    last = run_on("huggingface").results[-1]
    assert last["split"] == "huggingface_val" and last["metrics"]["recall@50"] > 0


def spoiled(directory: Path) -> Path:
    """A copy of the stand-in whose val has a missing image and a text file for another."""
    write_cirr(directory, families=4)
    (directory / "dev" / "dev-3-img0.png").unlink()
    (directory / "dev" / "dev-15-img0.png").write_text("<html>")
    return directory


def test_broken_images_stop_a_run_before_it_begins(small: Any, tmp_path: Path) -> None:
    data = spoiled(tmp_path / "data")
    with pytest.raises(UserError) as caught:
        runner.run(small(tmp_path / "run", data={"type": "cirr"}, data_dir=data))
    for part in (
        "dev-3-img0.png: is not there",
        "dev-15-img0.png: is not an image",
        "--allow_missing_images 2",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "run").exists()
    for image in (data / "dev").iterdir():
        image.unlink()
    with pytest.raises(UserError, match=r"none of its 44 .*give the --data_dir that has them"):
        runner.run(small(tmp_path / "run", data={"type": "cirr"}, data_dir=data))
    spoiled(data)
    with pytest.raises(UserError, match="2 of 44 images cannot be used"):
        runner.run(
            small(tmp_path / "run", data={"type": "cirr", "allow_missing_images": 1}, data_dir=data)
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dataset_name cirr", "needs --data_dir"),
        (
            "--dataset_name cirr --data_dir nowhere",
            "--data_dir nowhere: there is no such directory",
        ),
        ("--dataset_name fashioniq --data_dir .", "split.dress.val.json: there is no such file"),
        ("--dataset_name shapes --data_dir .", "is drawn and reads no files"),
        ("--dataset_name cirr --data.train_families 3", "train_families"),
    ],
)
def test_wrong_data_flags_end_with_one_error(flags: str, message: str, tmp_path: Path) -> None:
    done = command("train_iterative.py", *flags.split(), "--experiment_dir", tmp_path / "run")
    assert done.returncode == 2, done.stderr
    assert message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_lists_everything_at_once(tmp_path: Path) -> None:
    """Annotations and images of both splits, and the settings, in one table, one file and one
    exit code."""
    data, run = spoiled(tmp_path / "data"), tmp_path / "run"
    captions, splits = data / "captions", data / "image_splits"
    rows = read(captions / "cap.rc2.train.json")
    for number in range(30):
        rows[number]["caption"] = None
    rows[40]["target_hard"] = "train-none"
    (captions / "cap.rc2.train.json").write_text(json.dumps(rows))
    names = read(splits / "split.rc2.val.json")
    names["dev-1-img0"] = "../../secret.png"
    (splits / "split.rc2.val.json").write_text(json.dumps(names))
    (data / "train" / "0" / "train-4-img0.png").write_bytes(b"")
    for number in range(5, 25):
        (data / "train" / "0" / f"train-{number}-img0.png").unlink()
    flags = ["--dataset_name", "cirr", "--data_dir", data, "--experiment_dir", run]
    flags += ["--model_path", tmp_path / "none", "--runtime.cache_dir", tmp_path / "c"]
    done = command("train_iterative.py", *flags, "--dry_run")
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    found = read(tmp_path / "c" / "problems.json")
    said = [f"{row['where']}: {row['what']}" for row in found["problems"]]
    for message, count in (
        ("'caption' must be text, found null", 30),
        ("target_hard 'train-none' is not in split.rc2.train.json", 1),
        ("the path of 'dev-1-img0' leads out of the image folder", 1),
        ("train-4-img0.png: is empty", 1),
        ("train-", 22 + 1),
        ("dev-15-img0.png: is not an image but a web page", 1),
        ("model.path", 1),
    ):
        assert sum(message in line for line in said) == count, (message, said)
    table = "".join(done.stdout.split()).replace("│", "")
    assert f"{len(said)}problems" in table and table.count("'caption'must") == 1
    assert f"{len(said)} problems, in the table above." in done.stderr
    assert "problems.json" in done.stderr
    assert "--allow_missing_images 21" in done.stderr and not run.exists()
    for line in ("looked at 44 images in", "a second"):
        assert line in done.stderr
