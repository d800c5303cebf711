"""The train and eval commands that people type, as they stand: what they are taken to mean, and
whole runs of them."""

from __future__ import annotations

import contextlib
import json
import logging
import shlex
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from cirloop.config.run import RunConfig, load
from cirloop.types import UserError
from tests.commands import ROOT, command
from tests.fake_datasets import write_cirr, write_jsonl

DEFAULT = ROOT / "configs" / "shapes.yaml"
MODEL = "./models/Qwen2-VL-2B-Instruct"
RUN = "./experiments/qwen2_vl_cirr_iterative"
FIRST = (
    "--model_backbone qwen2_vl --dataset_name cirr --num_iterations 3 --foundation_model_path"
    " /path/to/qwen2-vl-model"
)
SECOND = (
    "--model_backbone qwen2_vl --dataset_name cirr --num_iterations 5 --hard_negative_k 10 "
    f"--foundation_model_path {MODEL} --batch_size 32 --learning_rate 1e-5"
)
TOY = (
    "--training.iteration_0_steps 1 --training.steps_per_iteration 1"
    " --training.grad_cache_chunk_size 0 --captioning.num_candidates 1"
    " --captioning.min_verify_probability 0 --captioning.max_round_trip_rank 0"
    " --captioning.max_new_tokens 4 --model.dtype float32 --model.max_pixels 3136"
    " --foundation.dtype float32 --foundation.max_pixels 3136"
)
"""What makes a recipe for a GPU a run of minutes on a CPU."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user is who has CIRR in its usual place, and a model, of which only the config is
    looked at."""
    (tmp_path / "data" / "cirr").mkdir(parents=True)
    model = tmp_path / MODEL
    model.mkdir(parents=True)
    (model / "config.json").write_text('{"model_type": "qwen2_vl"}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CIRLOOP_DATA", raising=False)
    return tmp_path


def parsed(flags: str) -> RunConfig:
    return load(shlex.split(flags), DEFAULT)


@contextlib.contextmanager
def said(caplog: pytest.LogCaptureFixture, *words: str) -> Iterator[None]:
    """Within, the program logs all of `words`."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "cirloop"):
        yield
    for word in words:
        assert word in caplog.text


def test_a_real_data_set_takes_its_own_recipe_and_says_so(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("configs/cirr_qwen2_vl.yaml", "data/cirr is taken")
    with said(caplog, *words, "also names the embedder's weights"):
        config = parsed(SECOND)
    recipe = load(["--config", str(ROOT / "configs" / "cirr_qwen2_vl.yaml")], DEFAULT)
    assert (config.model.path, config.foundation.path) == (MODEL, MODEL)
    assert (config.num_iterations, config.training.batch_size) == (5, 32)
    assert config.mining.strategy.negatives_per_query == 10  # type: ignore[union-attr]
    assert config.training.learning_rate == 1e-5
    assert config.training.steps_per_iteration == recipe.training.steps_per_iteration
    assert config.training.grad_cache_chunk_size == recipe.training.grad_cache_chunk_size
    assert config.data_dir == home / "data" / "cirr" and config.directory == Path(RUN)


def test_the_first_command_names_the_path_that_is_not_there(home: Path) -> None:
    config = parsed(FIRST)
    assert config.model.path == config.foundation.path == "/path/to/qwen2-vl-model"
    with pytest.raises(UserError, match=r"'/path/to/qwen2-vl-model' does not exist"):
        config.model.resolve_dir()


def test_a_path_of_another_family_is_the_foundation_models_alone(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "llava").mkdir()
    (home / "llava" / "config.json").write_text('{"model_type": "llava"}')
    with said(caplog, "is of type llava, the embedder of type qwen2_vl"):
        foundation = "--foundation_model_backbone llava --foundation_model_path llava"
        config = parsed(f"--dataset_name cirr {foundation}")
    assert (config.model.path, config.foundation.path) == ("Qwen/Qwen2-VL-2B-Instruct", "llava")


@pytest.mark.parametrize("more", ["--model_path other", "--config {recipe}"])
def test_the_embedders_weights_are_those_that_are_named(home: Path, more: str) -> None:
    flags = more.format(recipe=ROOT / "configs" / "cirr_qwen2_vl.yaml")
    config = parsed(f"--dataset_name cirr --foundation_model_path {MODEL} {flags}")
    assert config.model.path in ("other", "Qwen/Qwen2-VL-2B-Instruct")
    assert config.foundation.path == MODEL


def test_no_recipe_for_a_pair_is_one_error_that_lists_those_of_the_data_set(home: Path) -> None:
    with pytest.raises(UserError) as error:
        parsed("--dataset_name cirr --model_backbone blip2")
    message = str(error.value)
    assert "cirr_qwen2_vl.yaml" in message and "recall_cirr.yaml" in message
    assert "--config" in message
    assert "fashioniq_qwen2_vl.yaml" not in message


def test_where_files_were_looked_for_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cirloop.data.paths import DataPaths

    shutil.rmtree(home / "data")
    monkeypatch.setenv("CIRLOOP_DATA", str(home / "sets"))
    config = parsed("--dataset_name cirr")
    with pytest.raises(UserError) as error:
        config.data.build(DataPaths(config.data_dir, config.cache, lambda items, _: items))
    assert str(home / "data" / "cirr") in str(error.value)
    assert str(home / "sets" / "cirr") in str(error.value)
    (home / "sets" / "cirr").mkdir(parents=True)
    assert parsed("--dataset_name cirr").data_dir == home / "sets" / "cirr"


def test_the_embedded_model_is_taken_for_photographs_only_by_name(home: Path) -> None:
    from cirloop.config import notices

    (home / "bare.yaml").write_text("data: {type: cirr}\n")
    both = r"(?s)model\.path: is not given.*foundation\.path: is not given"
    with pytest.raises(UserError, match=both):
        parsed("--config bare.yaml")
    config = parsed("--config bare.yaml --model_path tiny --no-captioning.enabled")
    assert notices.of(config) == [
        "`tiny` is the embedder, and knows drawn shapes only: results on photographs mean nothing."
    ]
    assert notices.of(parsed("")) == []


def test_a_recipe_of_another_family_leaves_its_weights_out_and_asks_for_others(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = f"--config {ROOT / 'configs' / 'recall_cirr.yaml'} --model_backbone"
    left_out = "the settings were for qwen2_5_vl: model.path left out"
    with said(caplog, left_out), pytest.raises(UserError, match="path"):
        parsed(f"{recipe} qwen2_vl")
    assert parsed(f"{recipe} qwen2_vl --model_path {MODEL}").model.path == MODEL


def test_defaults_are_five_negatives_and_three_rounds(home: Path) -> None:
    (home / "bare.yaml").write_text("{}\n")
    config = parsed("--config bare.yaml")
    assert (config.mining.strategy.negatives_per_query, config.num_iterations) == (5, 3)  # type: ignore[union-attr]


def test_fast_mode_without_a_twin_is_one_error_with_the_ways_out(home: Path) -> None:
    needs = r"--fast_mode needs .*cirr_qwen2_vl_fast\.yaml.*shapes_fast\.yaml.*flags"
    with pytest.raises(UserError, match=needs):
        parsed("--fast_mode --dataset_name cirr")
    assert parsed("--fast_mode --num_iterations 1").num_iterations == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--negative_strategy qure", "see band"),
        ("--loss contrastive", "see info_nce"),
        ("--model_backbone qwen2vl", "see qwen2_vl"),
        ("--lr 1e-5", "Did you mean --learning_rate?"),
        ("--wandb", "Did you mean --report_to?"),
        ("--seed --learning_rate 1e-5", "--seed: expected one argument. All flags"),
        ("--config jsonl_tinny", "jsonl_tiny.yaml or"),
        ("--data_dir data/cirr", "Name a benchmark that lies there by --dataset_name"),
        ("--model_backbone simulated", "--retrieval simulated"),
    ],
)
def test_what_was_meant_is_suggested(home: Path, flags: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        parsed(flags)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("flags", "group", "settings"),
    [
        ("--loss bradley_terry", "training.loss", {"temperature": 1.0}),
        (
            "--loss bradley_terry --training.loss.temperature 0.5",
            "training.loss",
            {"temperature": 0.5},
        ),
        ("--loss info_nce", "training.loss", {"temperature": 0.05}),
        ("--negative_strategy random", "mining.strategy", {"negatives_per_query": 3}),
        (
            "--model_backbone qwen2_5_vl",
            "model",
            {"path": "Qwen/Qwen2.5-VL-3B-Instruct", "dtype": "float32"},
        ),
    ],
)
def test_a_type_by_flag_takes_its_own_defaults_for_what_means_something_else_there(
    flags: str, group: str, settings: dict[str, Any]
) -> None:
    value: Any = parsed(flags)
    for part in group.split("."):
        value = getattr(value, part)
    assert {name: getattr(value, name) for name in settings} == settings


def test_a_used_directory_goes_on_with_its_own_settings(home: Path, finished: Path) -> None:
    own = f"--experiment_dir {finished}"
    for flags in ("--auto_resume", "--resume_from_iteration 1"):
        config = parsed(f"{own} {flags}")
        assert (config.training.steps_per_iteration, config.num_iterations) == (6, 1)
        assert config.mining.strategy.negatives_per_query == 2  # type: ignore[union-attr]
    assert parsed(f"{own} --auto_resume --seed 7").seed == 7
    assert parsed(f"{own} --auto_resume --fast_mode").training.steps_per_iteration == 40


def test_flags_that_are_given_are_compared_with_the_directorys_settings(
    home: Path, finished: Path, tmp_path: Path
) -> None:
    from cirloop.cli import runner

    copy = shutil.copytree(finished, tmp_path / "copy")
    ways_out = r"(?s)seed: 0 -> 7.*leave those flags out.*--auto_resume goes on"
    with pytest.raises(UserError, match=ways_out):
        runner.run(parsed(f"--experiment_dir {copy} --auto_resume --seed 7"))
    runner.run(parsed(f"--experiment_dir {copy} --auto_resume --runtime.embed_batch_size 9"))
    with pytest.raises(UserError, match="never go on from each other"):
        runner.run(parsed(f"--experiment_dir {copy} --auto_resume --retrieval simulated"))


def test_places_are_saved_so_that_another_directory_can_use_the_run(home: Path) -> None:
    saved = parsed("--dataset_name cirr --data_dir data/cirr --runtime.cache_dir c").to_json()
    assert saved["data_dir"] == str(home / "data" / "cirr")
    assert saved["runtime"]["cache_dir"] == str(home / "c")


ON_OWN_DATA = "--dataset_name jsonl --retrieval simulated"


def trains(home: Path, flags: str) -> CompletedProcess[str]:
    done = command("train_iterative.py", *shlex.split(flags), cwd=home)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run without a model, on own triplets, in the home of who made it."""
    home = tmp_path_factory.mktemp("simulated")
    write_jsonl(home / "data" / "jsonl", families=2)
    done = trains(home, ON_OWN_DATA)
    assert "SIMULATED: jsonl_val" in done.stdout and "Simulated: rankings are drawn" in done.stderr
    return home / "experiments" / "simulated_jsonl_iterative"


@pytest.mark.full
def test_all_that_a_simulated_run_leaves_says_so_first(simulated: Path) -> None:
    paths = [path for path in simulated.rglob("*.json") if path.name not in ("manifest.json",)]
    assert len(paths) > 12
    for path in paths:
        content = json.loads(path.read_text())
        assert content["simulated"] is True and [*content].index("simulated") <= 1, path
    page = (simulated / "report.html").read_text("utf-8")
    assert "<title>SIMULATED: " in page and "Simulated: rankings are drawn from the seed" in page
    last = json.loads((simulated / "augmented_samples_iter_3.json").read_text())
    assert last["summary"]["candidates"] > 0 and not list(simulated.rglob("*.safetensors"))


@pytest.mark.full
def test_a_simulated_run_follows_from_its_seed_and_resumes(simulated: Path) -> None:
    home, name = simulated.parent.parent, "evaluation_results.json"
    trains(home, f"--experiment_dir {simulated} --resume_from_iteration 2")
    trains(home, f"{ON_OWN_DATA} --experiment_dir other")
    assert (home / "other" / name).read_text() == (simulated / name).read_text()


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (
            "train_iterative.py",
            "--auto_resume --retrieval real",
            "with an --experiment_dir of its own",
        ),
        pytest.param(
            "train_iterative.py",
            "--auto_resume --dataset_name jsonl --config {tiny}",
            "never go on from each other",
            marks=pytest.mark.full,
        ),
        pytest.param(
            "eval_iterative.py",
            "--submission s",
            "no model whose rankings could be submitted",
            marks=pytest.mark.full,
        ),
    ],
)
def test_nothing_real_follows_from_a_simulated_run(
    simulated: Path, script: str, flags: str, words: str
) -> None:
    flags = flags.format(tiny=ROOT / "configs" / "jsonl_tiny.yaml")
    run = ("--experiment_dir", simulated, *shlex.split(flags))
    done = command(script, *run, cwd=simulated.parent.parent)
    assert done.returncode == 2 and words in done.stderr


def test_a_simulated_run_has_no_model_to_search_with_or_to_export(simulated: Path) -> None:
    from cirloop.tools.export.config import ExportConfig
    from cirloop.tools.export.source import load_source
    from cirloop.tools.search.config import SearchOptions
    from cirloop.tools.search.engine import Engine

    with pytest.raises(UserError, match="no model to search with"):
        Engine(SearchOptions(experiment_dir=simulated))
    with pytest.raises(UserError, match="no model to export"):
        load_source(ExportConfig(experiment_dir=simulated, iteration="1", format="adapter"))


def test_simulated_results_can_be_evaluated_and_say_so(simulated: Path, tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    flags = ["--experiment_dir", simulated, "--iterations", "1", "--output_file", file]
    done = command("eval_iterative.py", *flags)
    assert done.returncode == 0, done.stderr
    assert next(iter(json.loads(file.read_text()))) == "simulated"
    assert "SIMULATED: jsonl_val" in done.stdout


def test_the_fallback_is_taken_by_name_and_only_without_weights(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fallback = "--retrieval_fallback simulated"
    with said(caplog, "'/no/weights' does not exist", "rankings are simulated"):
        config = parsed(f"--dataset_name cirr --model_path /no/weights {fallback}")
    assert (config.retrieval, config.model.type) == ("simulated", "simulated")
    assert config.directory == Path("experiments/simulated_cirr_iterative")
    tiny = "--model_path tiny --foundation_model_path tiny"
    there = parsed(f"--dataset_name cirr {tiny} {fallback}")
    assert (there.retrieval, there.model.path) == ("real", "tiny")
    assert parsed("--dataset_name cirr --model_path /no/weights").retrieval == "real"


@pytest.mark.parametrize("path", [".", "results"])
def test_an_output_file_that_is_a_directory_is_refused_before_any_work(
    finished: Path, tmp_path: Path, path: str
) -> None:
    (tmp_path / "results").mkdir()
    done = command(
        "eval_iterative.py", "--experiment_dir", finished, "--output_file", path, cwd=tmp_path
    )
    assert done.returncode == 2 and "is a directory; give a file" in done.stderr


def test_an_export_does_not_take_the_place_of_where_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cirloop.tools.export.config import ExportConfig
    from cirloop.tools.export.export import export

    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--output \. is the directory you are in"):
        export(
            ExportConfig(
                experiment_dir=tmp_path / "run", iteration="1", format="adapter", output=Path(".")
            )
        )


def test_processes_without_a_device_are_told_of(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from cirloop.config.runtime import Runtime
    from cirloop.distributed import launcher

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert launcher.device_warnings(Runtime()) == []
    assert "4 processes share" in launcher.device_warnings(Runtime(num_processes=4))[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert launcher.device_warnings(Runtime(num_processes=2)) == []
    with pytest.raises(UserError, match="4 processes on this machine and 2 GPUs"):
        launcher.device_warnings(Runtime(num_processes=4))


def test_a_terminal_without_the_signs_is_written_to_in_others() -> None:
    import io

    from cirloop.cli import entry

    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "ascii", errors=entry.ASCII_FALLBACK)
    stream.write("1.0 ± 0.5 → 木")
    stream.flush()
    assert raw.getvalue() == b"1.0 +- 0.5 -> ?"


@pytest.mark.full
def test_the_commands_work_one_after_the_other(tmp_path: Path) -> None:
    """As they stand, with the flags of TOY after the one that trains. `tiny` copied stands for the
    model."""
    write_cirr(tmp_path / "data" / "cirr", families=5)
    shutil.copytree(str(files("cirloop") / "tiny"), tmp_path / MODEL)
    for script, flags in (
        ("train_iterative.py", f"{SECOND} {TOY}"),
        ("train_iterative.py", f"--experiment_dir {RUN} --resume_from_iteration 2"),
        ("eval_iterative.py", f"--experiment_dir {RUN} --eval_dataset cirr_test"),
        (
            "eval_iterative.py",
            f'--experiment_dir {RUN} --iterations "1,3,5" --output_file results.json',
        ),
    ):
        done = command(script, *shlex.split(flags), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    directory = tmp_path / RUN
    assert (directory / "hard_negatives_iter_0.json").is_file()
    assert list(directory.glob("replaced_*"))
    assert (directory / "augmented_samples_iter_1.json").is_file()
    assert (directory / "checkpoint_iter_5").is_dir()
    assert {path.name for path in (directory / "submission_cirr_test" / "iter_5").iterdir()} == {
        "cirr_test_recall.json", "cirr_test_recall_subset.json",
    }  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [row["iteration"] for row in results] == ["1", "3", "5"]


@pytest.mark.full
def test_fast_mode_with_fewer_steps_is_gone_on_with(tmp_path: Path) -> None:
    """`--fast_mode` as it stands takes minutes; its settings are compared with its file above."""
    steps = "--training.iteration_0_steps 4 --training.steps_per_iteration 4"
    texts = "--captioning.max_per_iteration 8 --mining.anchors.num 4"
    flags = f"--fast_mode --num_iterations 1 {steps} {texts}"
    done = command("train_iterative.py", *shlex.split(flags), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "experiments/qwen2_vl_shapes_iterative/checkpoint_iter_1").is_dir()
    again = command("train_iterative.py", "--auto_resume", cwd=tmp_path)
    assert again.returncode == 0 and "going on with the settings of" in again.stderr
