"""The whole program on the embedded data: run, kill, resume, misuse."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cirloop.artifacts.store import Store, file_digests
from cirloop.backbones import EmbedInput
from cirloop.cli import runner
from cirloop.cli.evaluate import EvalConfig, evaluate_run
from cirloop.config.run import from_json
from cirloop.data.paths import DataPaths
from cirloop.stages.context import RunContext
from cirloop.types import UserError
from tests.commands import command, environment, python

ROOT = Path(__file__).parent.parent
ARTIFACTS = (
    "checkpoint_iter_0",
    "checkpoint_iter_1",
    "hard_negatives_iter_0.json",
    "augmented_samples_iter_1.json",
    "accounting_iter_1.json",
    "evaluation_base.json",
    "evaluation_iter_0.json",
    "evaluation_iter_1.json",
    "evaluation_results.json",
    "manifest.json",
)


def digests(directory: Path) -> dict[str, dict[str, str]]:
    """Of every artifact and the manifest that lists them."""
    return {name: file_digests(directory / name) for name in ARTIFACTS}


def test_a_run_leaves_its_artifacts_and_nothing_else(finished: Path) -> None:
    there = {path.name for path in finished.iterdir()}
    assert there - {".work"} == {
        *ARTIFACTS,
        "config.json",
        "costs.json",
        "report.html",
        "figures",
        "logs",
    }
    assert not [p for p in finished.rglob("*") if p.is_file() and ".work" in p.parts]


def test_the_results_have_the_base_and_each_iteration_with_standard_errors(finished: Path) -> None:
    """Of a proportion, with the queries of one reference as one cluster."""
    results = json.loads((finished / "evaluation_results.json").read_text())["results"]
    assert [r["iteration"] for r in results] == ["base", "0", "1"]
    for result, name in zip(results, ("base", "iter_0", "iter_1"), strict=True):
        ranks = json.loads((finished / f"evaluation_{name}.json").read_text())["ranks"]
        p = result["metrics"]["recall@5"]
        residuals: dict[str, float] = {}
        for _, rank, _, reference in ranks:
            residuals[reference] = residuals.get(reference, 0) + (rank <= 5) - p
        assert 0 < p < 1 and 1 < len(residuals) <= len(ranks) == result["queries"]
        se = sum(value**2 for value in residuals.values()) ** 0.5 / len(ranks)
        assert result["standard_errors"]["recall@5"] == pytest.approx(se, abs=1e-5)
    assert results[-1]["metrics"]["recall@50"] > results[0]["metrics"]["recall@50"] - 0.2


def test_every_mined_image_is_accounted_for(finished: Path) -> None:
    samples = json.loads((finished / "augmented_samples_iter_1.json").read_text())
    summary = samples["summary"]
    assert summary["accepted"] == len(samples["accepted"])
    assert summary["accepted"] + sum(summary["rejected"].values()) == summary["candidates"]
    assert all(row["reason"] for row in samples["rejected"])
    account = json.loads((finished / "accounting_iter_1.json").read_text())
    assert account["mined"] == len(
        json.loads((finished / "hard_negatives_iter_0.json").read_text())["negatives"]
    )
    assert 0 <= account["true_captions"] <= account["accepted"]


@pytest.mark.full
def test_a_second_run_has_the_same_bytes(finished: Path, small: Any, tmp_path: Path) -> None:
    runner.run(small(tmp_path / "again"))
    assert digests(tmp_path / "again") == digests(finished)


@pytest.mark.full
@pytest.mark.skipif(
    "MKL_CBWR" not in os.environ,
    reason="not an Intel processor: bits of a product depend on its size",
)
@pytest.mark.parametrize(
    "runtime",
    [
        {"vision_batch_size": 3, "embed_batch_size": 5, "num_workers": 0},
        {
            "vision_batch_size": 1,
            "max_tokens_per_batch": 150,
            "num_workers": 3,
            "feature_cache_max_gb": 0.0005,
        },
    ],
)
def test_batch_sizes_workers_and_an_empty_cache_change_no_byte(
    finished: Path, small: Any, tmp_path: Path, runtime: dict[str, Any]
) -> None:
    runner.run(small(tmp_path / "other", runtime={**runtime, "cache_dir": tmp_path / "cache"}))
    assert digests(tmp_path / "other") == digests(finished)


def test_resuming_a_finished_run_makes_nothing_anew(
    finished: Path, small: Any, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*.safetensors")}
    runner.run(small(copy, auto_resume=True))
    assert {p: p.stat().st_mtime_ns for p in copy.rglob("*.safetensors")} == before
    assert digests(copy) == digests(finished)


@pytest.mark.full
def test_resume_from_iteration_keeps_what_is_below_and_moves_the_rest_aside(
    finished: Path, small: Any, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    kept = (copy / "checkpoint_iter_0" / "adapter_model.safetensors").stat().st_mtime_ns
    runner.run(small(copy, resume_from_iteration=1))
    assert (copy / "checkpoint_iter_0" / "adapter_model.safetensors").stat().st_mtime_ns == kept
    assert digests(copy) == digests(finished)
    assert file_digests(copy / "replaced_1" / "checkpoint_iter_1") == file_digests(
        finished / "checkpoint_iter_1"
    )
    attempts = {
        (row["stage"], row["attempt"])
        for row in json.loads((copy / "costs.json").read_text())["stages"]
    }
    assert ("checkpoint_iter_0", 1) in attempts and ("checkpoint_iter_0", 2) not in attempts
    assert {("checkpoint_iter_1", 1), ("checkpoint_iter_1", 2)} <= attempts


@pytest.mark.full
def test_a_run_can_be_prolonged(finished: Path, small: Any, tmp_path: Path) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    results = runner.run(small(copy, auto_resume=True, num_iterations=2))
    assert [r["iteration"] for r in results] == ["base", "0", "1", "2"]
    assert file_digests(copy / "checkpoint_iter_1") == file_digests(finished / "checkpoint_iter_1")


@pytest.mark.full
@pytest.mark.parametrize("num_kills", [1, 3])
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(
    num_kills: int, finished: Path, small: Any, tmp_path: Path
) -> None:
    """`kill -9` in one run, then to the end. benchmarks/kill_and_resume.py does it ten times."""
    directory = tmp_path / "killed"
    config = small(directory).to_json()
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    words = [str(ROOT / "train_iterative.py"), "--config", str(tmp_path / "small.yaml")]
    words += ["--experiment_dir", str(directory), "--auto_resume"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    moments = random.Random(5)
    for _ in range(num_kills):
        process = subprocess.Popen([sys.executable, *words], env=environment(), **silent)
        start = len(list(directory.glob("*"))) if directory.exists() else 0
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if directory.exists() and len(list(directory.glob("*"))) > start:
                break
            time.sleep(0.05)
        time.sleep(moments.random() * 3)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = python(*words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert digests(directory) == digests(finished)


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(p.relative_to(directory)): (p.stat().st_mtime_ns, p.read_bytes())
        for p in directory.rglob("*")
        if p.is_file()
    }


@pytest.mark.full
def test_a_command_is_a_process_with_its_exit_code(tmp_path: Path) -> None:
    for script in ("train_iterative.py", "eval_iterative.py"):
        words = ("--experiment_dir", tmp_path, "--nope", "1")
        done = python(ROOT / script, *words, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.count("error: ") == 1
        assert "--nope" in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--dataset_name nope", ["data.type", "'shapes'"]),
        ("--model_path /no/model", ["/no/model", "does not exist", "tiny"]),
        (
            "--model_path HERE --foundation_model_path /no/b",
            ["not a qwen2_vl", "config.json", "/no/b"],
        ),
        ("--training.batch_sze 4", ["--training.batch_sze", "--training.batch_size"]),
        (
            "--learning_rate -1 --num_iterations many",
            ["2 problems", "learning_rate", "num_iterations"],
        ),
        ("--config /no/file.yaml", ["/no/file.yaml", "no such file"]),
        ("--experiment_dir USED", ["--auto_resume", "--resume_from_iteration", "--experiment_dir"]),
        ("--experiment_dir USED --auto_resume --seed 9", ["seed: 0 -> 9", "Ways out"]),
        (
            "--experiment_dir USED --resume_from_iteration 7",
            ["has iterations 0, 1", "furthest", "2"],
        ),
        ("--experiment_dir HERE --auto_resume", ["not empty", "no run directory"]),
        ("--resume_from_iteration 1", ["holds no run"]),
        (
            f"--runtime.answers_dir {ROOT}/LICENSE/answers",
            ["answers_dir", "is a file, or is in one"],
        ),
        ("--deepspeed /no/ds.json", ["/no/ds.json", "no such file"]),
        (f"--accelerate_config {ROOT}/LICENSE", ["LICENSE", "Give a file of", "--num_processes N"]),
        ("--data_dir /data", ["--data_dir", "drawn"]),
    ],
)
def test_bad_use_is_one_clear_error_and_changes_nothing(
    flags: str, says: list[str], finished: Path, small: Any, tmp_path: Path
) -> None:
    here, used = tmp_path / "here", tmp_path / "used"
    here.mkdir()
    (here / "notes.txt").write_text("mine")
    if "USED" in flags:
        shutil.copytree(finished, used)
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small(used).to_json()))
    filled = [str({"HERE": here, "USED": used}.get(flag, flag)) for flag in flags.split()]
    config = [] if "--config" in filled else ["--config", str(tmp_path / "small.yaml")]
    before = snapshot(tmp_path)
    done = command("train_iterative.py", *config, *filled, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    for words in says:
        assert words in done.stderr
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "name",
    [
        "hard_negatives_iter_0.json",
        "checkpoint_iter_1/adapter_model.safetensors",
        "evaluation_base.json",
    ],
)
def test_a_corrupted_artifact_is_named_and_nothing_is_changed(
    name: str, finished: Path, small: Any, tmp_path: Path
) -> None:
    copy = shutil.copytree(finished, tmp_path / "copy")
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(bytes(content))
    before = snapshot(copy)
    with pytest.raises(UserError, match="altered") as error:
        runner.run(small(copy, auto_resume=True))
    assert name in str(error.value) and "--resume_from_iteration" in str(error.value)
    assert snapshot(copy) == before


def test_the_default_run_directory_is_named_after_model_and_data(small: Any) -> None:
    config = small(Path("x")).model_copy(update={"experiment_dir": None})
    assert config.directory == Path("experiments/qwen2_vl_shapes_iterative")


@pytest.mark.full
def test_dry_run_trains_nothing(
    small: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.dry_run(small(tmp_path / "dry"))
    assert not (tmp_path / "dry").exists()
    assert "48 triplets" in capsys.readouterr().out


def test_eval_iterative_scores_chosen_iterations(finished: Path, tmp_path: Path) -> None:
    results = evaluate_run(
        EvalConfig(
            experiment_dir=finished,
            eval_dataset="shapes_test",
            iterations="1,base",
            output_file=tmp_path / "out.json",
        )
    )
    assert [r["iteration"] for r in results] == ["1", "base"]
    assert json.loads((tmp_path / "out.json").read_text())["results"] == results
    [best] = evaluate_run(EvalConfig(experiment_dir=finished, iterations="best"))
    said = json.loads((finished / "evaluation_results.json").read_text())["best"]
    assert (best["iteration"], best["metrics"]["recall@1"]) == (
        str(said["iteration"]),
        said["value"],
    )
    again = evaluate_run(EvalConfig(experiment_dir=finished))
    run = json.loads((finished / "evaluation_results.json").read_text())["results"]
    assert [r["metrics"] for r in again] == [r["metrics"] for r in run]


@pytest.mark.full
def test_one_modality_alone_gives_another_result_and_says_so(finished: Path) -> None:
    whole, no_text, no_image = (
        evaluate_run(EvalConfig(experiment_dir=finished, iterations="1", ablate=what))[0]
        for what in (None, "text", "image")
    )
    assert [r["ablated"] for r in (whole, no_text, no_image)] == [None, "text", "image"]
    assert no_text["ranks"] != whole["ranks"] != no_image["ranks"] != no_text["ranks"]
    # without texts, the rank is that of the target for the reference and an empty text
    config, store = from_json(finished / "config.json", experiment_dir=finished), Store(finished)
    run = RunContext(
        config, store, config.data.build(DataPaths(None, config.cache, lambda items, _: items))
    )
    [part] = run.data.eval_splits("val")
    backbone = run.embedder(store.load("checkpoint_iter_1"))
    queries_QD = run.embed_cached(
        backbone, [EmbedInput(query.reference, "") for query in part.queries], part, ""
    )
    scores_QG, rows = queries_QD @ run.gallery_embeddings(backbone, part).T, part.gallery.rows()
    assert part.relevance is not None
    for scores_G, query, (name, rank, *_) in zip(
        scores_QG, part.queries, no_text["ranks"], strict=True
    ):
        scores_G[rows[query.reference]] = -2
        target = scores_G[rows[part.relevance.targets[query.id]]]
        assert name == query.id and (scores_G > target).sum() < rank <= (scores_G >= target).sum()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--iterations", "1,3,5"], ["no 3, 5 here", "base, 0, 1"]),
        (
            ["--eval_dataset", "shape_test"],
            ["shapes_test", "shapes_val", "with --data_dir cirr_val"],
        ),
        (["--eval_dataset", "cirr_test"], ["cirr needs --data_dir"]),
        (
            ["--eval_dataset", "cirr", "--data_dir", "."],
            ["cirr: unknown", "cirr_val", "shapes_val"],
        ),
        (["--gallery", "union"], ["the run has its own", "--data_dir"]),
        (["--allow_missing_images", "2"], ["the run has its own", "--data_dir"]),
        (["--output_file", "/no/where/out.json"], ["directory does not exist"]),
        (["--iteration", "1"], ["--iterations"]),
    ],
)
def test_eval_iterative_says_what_there_is(
    flags: list[str], says: list[str], finished: Path
) -> None:
    done = command("eval_iterative.py", "--experiment_dir", finished, *flags)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    for words in says:
        assert words in done.stderr
