"""Configuration: YAML under flags, strict, with every problem named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cirloop.config import cli_help
from cirloop.config.base import differences
from cirloop.config.run import RunConfig, from_json, load, save
from cirloop.data.paths import DataPaths
from cirloop.types import UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
DEFAULT = CONFIGS / "shapes.yaml"


def setting(config: RunConfig, dotted: str) -> Any:
    value: Any = config
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    return write(tmp_path / "empty.yaml", "{}\n")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_config_parses_and_says_what_it_says(path: Path) -> None:
    fast = path.stem.endswith("_fast")
    base = path.with_name(path.name.replace("_fast.yaml", ".yaml"))
    config = load(["--config", str(base), *(["--fast_mode"] if fast else [])], DEFAULT)
    resolved = json.dumps(config.to_json())
    for name, value in yaml.safe_load(path.read_text("utf-8")).items():
        for line in differences({name: json.loads(resolved)[name]}, {name: value}):
            assert line.endswith("-> None"), f"{path.name} was not heard: {line}"


RECALL: dict[str, Any] = {
    "training.batch_size": 512,
    "training.lora.r": 16,
    "training.negatives_in_batch": 0,
    "training.augmented_fraction": 0.5,
    "captioning.min_verify_probability": 0.95,
    "captioning.max_per_query": 5,
    "num_iterations": 1,
    "mining.strategy.negatives_per_query": 5,
    "model.max_pixels": 147_456,
}
"""Of ReCALL (arXiv 2602.01639), implementation details and 6.2: batch 512, LoRA rank 16, 300 + 350
steps on CIRR and 200 + 250 on FashionIQ, InfoNCE + lambda x triplet (margin 0.05), verification at
0.95, 5 images a failed query."""
RECALL_CIRR = RECALL | {
    "training.iteration_0_steps": 300,
    "training.steps_per_iteration": 350,
    "training.learning_rate": 2e-5,
    "model.prompt_format": "recall_cirr",
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "recall_cirr": RECALL_CIRR,
    "recall_cirr_2b": RECALL_CIRR,
    "recall_fashioniq": RECALL
    | {
        "training.iteration_0_steps": 200,
        "training.steps_per_iteration": 250,
        "training.learning_rate": 4e-5,
        "training.group_batches": "category",
        "model.prompt_format": "recall_fashioniq",
    },
    # VLM2Vec-V2 (arXiv 2507.04590), train_v2-qwen2vl-2B.sh and arguments.py
    "vlm2vec_cirr": {
        "training.batch_size": 1024,
        "training.learning_rate": 5e-5,
        "training.lora.r": 16,
        "training.lora.alpha": 64,
        "training.loss.temperature": 0.02,
        "training.grad_cache_chunk_size": 8,
        "model.max_pixels": 1_003_520,
        "model.min_pixels": 3_136,
        "model.prompt_format": "vlm2vec",
        "training.finetuning": "lora",
    },
    # QuRe (arXiv 2507.12416)
    "qure_like_cirr_2b": {
        "mining.strategy.type": "band",
        "mining.strategy.n_def": 6,
        "num_iterations": 6,
        "training.negatives_in_batch": 1,
        "training.loss.type": "bradley_terry",
        "captioning.enabled": False,
        "training.iteration_0_steps": 0,
    },
}
LOSSES = {
    "recall_cirr": (0.02, 0.25),
    "recall_cirr_2b": (0.02, 0.25),
    "recall_fashioniq": (0.03, 0.30),
}
"""Temperature and weight of the triplet part."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_has_its_sources_numbers(name: str) -> None:
    config = load(["--config", str(CONFIGS / f"{name}.yaml")], DEFAULT)
    assert {dotted: setting(config, dotted) for dotted in PUBLISHED[name]} == PUBLISHED[name]
    if name in LOSSES:
        temperature, weight = LOSSES[name]
        parts: Any = setting(config, "training.loss.parts")
        types = [(part.weight, part.loss.type) for part in parts]
        assert types == [(1.0, "info_nce"), (weight, "triplet")]
        assert (parts[0].loss.temperature, parts[1].loss.margin) == (temperature, 0.05)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.name)
def test_a_recipe_states_memory_and_disk(path: Path) -> None:
    lines = path.read_text("utf-8").splitlines()
    comments = " ".join(line for line in lines if line.startswith("#"))
    if not path.stem.endswith("_fast"):  # laid over another
        assert re.search(r"Memory(, by arithmetic)?: .*?\d GB", comments), "no memory"
        assert re.search(r"Disk: .*?\d GB|GB of disk", comments), "no disk"


def test_default_command_is_shapes_with_tiny() -> None:
    config = load([], DEFAULT)
    assert config.data.type == "shapes" and config.model.path == config.foundation.path == "tiny"
    assert config.directory == Path("experiments/qwen2_vl_shapes_iterative")
    assert config.cache == Path("experiments/cache")


@pytest.mark.parametrize(
    ("flags", "dotted", "value"),
    [
        ("--model_backbone qwen2_vl", "model.type", "qwen2_vl"),
        ("--model_path /m", "model.path", "/m"),
        ("--dataset_name shapes", "data.type", "shapes"),
        ("--num_iterations 7", "num_iterations", 7),
        ("--hard_negative_k 9", "mining.strategy.negatives_per_query", 9),
        ("--negative_strategy random", "mining.strategy.type", "random"),
        ("--foundation_model_path /f", "foundation.path", "/f"),
        ("--foundation_model_backbone qwen2_vl", "foundation.type", "qwen2_vl"),
        ("--batch_size 32", "training.batch_size", 32),
        ("--learning_rate 1e-3", "training.learning_rate", 0.001),
        ("--experiment_dir /e", "experiment_dir", Path("/e")),
        ("--auto_resume", "auto_resume", True),
        ("--resume_from_iteration 2", "resume_from_iteration", 2),
        ("--seed 4", "seed", 4),
        ("--data.variant 2", "data.variant", 2),
        ("--num_processes 2", "runtime.num_processes", 2),
        ("--accelerate_config /a.yaml", "runtime.accelerate_config", Path("/a.yaml")),
        ("--deepspeed /d.json", "runtime.deepspeed", Path("/d.json")),
        ("--profile", "runtime.profile", True),
        ("--dry_run", "dry_run", True),
        ("--fast_mode", "fast_mode", True),
        ("--training.batch_size 32", "training.batch_size", 32),
        ("--training.lora.r 4", "training.lora.r", 4),
        ("--mining.strategy.negatives_per_query 2", "mining.strategy.negatives_per_query", 2),
        ("--no-captioning.enabled", "captioning.enabled", False),
    ],
)
def test_flag_sets_its_setting(flags: str, dotted: str, value: Any) -> None:
    argv = flags.split()
    assert setting(load(argv, DEFAULT), dotted) == value
    if len(argv) == 2:
        assert setting(load(["=".join(argv)], DEFAULT), dotted) == value


@pytest.mark.parametrize(
    ("flags", "text", "dtype"),
    [
        ("--model.dtype bfloat16", "", "bfloat16"),
        ("--model.dtype bfloat16 --foundation.dtype float32", "", "float32"),
        ("--model.dtype bfloat16 --foundation.path /other", "", "float32"),
        ("", "model: {dtype: float16}", "float16"),
        ("", "model: {dtype: float16}\nfoundation: {dtype: float32}", "float32"),
        ("--model.dtype bfloat16 --foundation.type generic --foundation.path tiny", "", "float32"),
    ],
)
def test_one_model_has_one_dtype(
    flags: str, text: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    both = "model: {dtype: float32}\nfoundation: {dtype: float32}"
    file = write(tmp_path / "a.yaml", text or both)
    with caplog.at_level("INFO"):
        config = load(flags.split(), file)
    assert config.foundation.dtype == dtype
    follows = dtype == config.model.dtype
    assert ("foundation.dtype is" in caplog.text) == follows
    assert not (follows and "\n" in caplog.messages[0])


def test_data_dir_is_refused_for_a_drawn_data_set(tmp_path: Path) -> None:
    """And the message says how own data is started, by what lies there."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    table = tmp_path / "triplets.csv"
    table.touch()
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "train.jsonl").touch()
    imported = f"cirloop import {table} --images {tmp_path / 'photos'} --val 0.2"
    ways = {
        Path("/x"): "cirloop import triplets.csv --images photos",
        tmp_path: imported,
        table: imported,
        tmp_path / "shop": f"It holds train.jsonl: give --dataset_name jsonl, .*{tmp_path}/shop",
    }
    for place, way in ways.items():
        said = rf"--data_dir {place}: the data set is `shapes`, .*{way}"
        with pytest.raises(UserError, match=said):
            load(["--data_dir", str(place)], DEFAULT)
    config = RunConfig(data_dir=Path("/x"))
    with pytest.raises(UserError, match="--data_dir: the data set `shapes` is drawn"):
        config.data.build(DataPaths(config.data_dir, config.cache, lambda items, _: items))


def test_experiment_dir_takes_the_place_of_the_default(tmp_path: Path) -> None:
    config = load(["--experiment_dir", str(tmp_path / "e")], DEFAULT)
    assert config.directory == tmp_path / "e" and config.cache == tmp_path / "cache"


def test_flags_beat_fast_beats_file_beats_defaults(tmp_path: Path) -> None:
    text = "training: {steps_per_iteration: 1, batch_size: 10, lora: {r: 1}}\nseed: 1\n"
    base = write(tmp_path / "a.yaml", text)
    fast = "training: {steps_per_iteration: 2, iteration_0_steps: 2, lora: {r: 2}}\nseed: 2\n"
    write(tmp_path / "a_fast.yaml", fast)
    training = ("steps_per_iteration", "batch_size", "iteration_0_steps", "lora.r", "lora.alpha")
    names = (*(f"training.{name}" for name in training), "seed")

    def values(*argv: str) -> list[Any]:
        config = load(["--config", str(base), *argv], DEFAULT)
        return [setting(config, name) for name in names]

    assert values() == [1, 10, 100, 1, 64, 1]
    assert values("--fast_mode") == [2, 10, 2, 2, 64, 2]
    assert values("--fast_mode", "--training.lora.r", "3", "--seed", "3") == [2, 10, 2, 3, 64, 3]
    assert values("--training.steps_per_iteration", "4") == [4, 10, 100, 1, 64, 1]


def test_every_problem_of_a_file_is_listed_with_a_suggestion(tmp_path: Path) -> None:
    path = write(
        tmp_path / "bad.yaml",
        "modle: {path: a}\n"
        "training: {batchsize: 3, learning_rate: -1, lora: {alpah: 3}}\n"
        "mining: {strategy: {type: top_k, extra_rank: 3}}\n"
        "learning_rate: 0.1\n"
        "num_iterations: two\n"
        "data: {type: imagenet}\n",
    )
    with pytest.raises(UserError) as error:
        load(["--config", str(path), "--seed", "-1"], DEFAULT)
    first, *lines, last = str(error.value).splitlines()
    assert first == "9 problems in the configuration:" and "--help" in last
    said = dict(line.strip().split(": ", 1) for line in lines)
    assert said["modle"] == "unknown setting; did you mean model?"
    for given, meant in (
        ("training.batchsize", "training.batch_size"),
        ("training.lora.alpah", "training.lora.alpha"),
        ("mining.strategy.top_k.extra_rank", "mining.strategy.top_k.extra_ranks"),
    ):
        assert said[given].startswith(f"unknown setting; did you mean {meant}")
    assert said["learning_rate"] == "unknown setting; did you mean training.learning_rate?"
    assert "greater than 0 (given: -1)" in said["training.learning_rate"]
    assert "(given: 'two')" in said["num_iterations"]
    assert "'shapes' (given: 'imagenet')" in said["data.type"]
    assert "(given: '-1')" in said["seed"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--batchsize 3", "--batch_size"),
        ("--trainig.steps_per_iteration 3", "--training.steps_per_iteration"),
        ("--fast_mod", "--fast_mode"),  # not taken as a shortened --fast_mode
        ("--fast_mode=true", "--fast_mode"),
        ("--config", "expected one argument"),
        ("--batch_size", "expected one argument"),
        ("more", "unrecognized arguments: more"),
        ("--dataset_name imagenet", "'shapes'"),
        ("--model_backbone clip", "'qwen2_vl'"),
        ("--negative_strategy best", "'top_k'"),
        ("--hard_negative_k 0", "greater than or equal to 1"),
        ("--batch_size x", "valid integer"),
        ("--training.augmented_fraction 0.6", "less than or equal to 0.5"),
        ("--learning_rate nan", "finite number"),
        ("--resume_from_iteration -1", "greater than or equal to 0"),
        ("--config /no/such.yaml", "/no/such.yaml"),
    ],
)
def test_bad_flag_is_one_clear_error(
    argv: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError) as error:
        load(argv.split(), DEFAULT)
    assert said in str(error.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("- a", "must be a mapping"),
        ("", "must be a mapping"),
        ("1: 2", "found 1"),
        ("fast_mode: true", "Give it as --fast_mode"),
        ("config: other.yaml", "Give it as --config"),
    ],
)
def test_bad_file_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(UserError) as error:
        load(["--config", str(path)], DEFAULT)
    assert said in str(error.value) and "bad.yaml" in str(error.value)


def test_missing_config_names_those_there_are(tmp_path: Path, empty: Path) -> None:
    with pytest.raises(UserError, match=r"empty\.yaml"):
        load(["--config", str(tmp_path / "x.yaml")], DEFAULT)
    with pytest.raises(UserError, match=r"--fast_mode needs .*empty_fast\.yaml"):
        load(["--config", str(empty), "--fast_mode"], DEFAULT)


DECISIVE = {
    *"seed retrieval model foundation data mining attributes captioning training evaluation".split()
}
INDECISIVE = {
    *"config fast_mode experiment_dir auto_resume resume_from_iteration dry_run data_dir".split(),
    *"num_iterations stop_on_futile_round runtime train_dir report_only retrieval_fallback".split(),
}


def test_every_setting_is_known_to_decide_results_or_not() -> None:
    """A new group of settings is entered in one of the two sets above."""
    assert set(RunConfig.model_fields) == DECISIVE | INDECISIVE
    assert set(load([], DEFAULT).result_settings()) == DECISIVE


@pytest.mark.parametrize(
    "flags",
    [
        *("--num_iterations 9", "--runtime.embed_batch_size 1", "--num_processes 2"),
        *("--runtime.checkpoint_every_steps 1", "--experiment_dir /e", "--auto_resume"),
        "--resume_from_iteration 1",
        *("--dry_run", "--runtime.cache_dir /c", "--deepspeed /d", "--accelerate_config /a"),
        *("--profile", "--report_only", "--compare_with /c", "--report_to tensorboard"),
        *("--max_skipped_batches 3", "--training.grad_cache_chunk_size 2"),
    ],
)
def test_setting_that_cannot_change_results_is_not_decisive(flags: str) -> None:
    assert load(flags.split(), DEFAULT).result_settings() == load([], DEFAULT).result_settings()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--seed 1", "seed: 0 -> 1"),
        ("--hard_negative_k 4", "mining.strategy.negatives_per_query: 3 -> 4"),
        ("--training.lora.r 4", "training.lora.r: 16 -> 4"),
        ("--captioning.num_candidates 3", "captioning.num_candidates: 2 -> 3"),
        ("--foundation_model_path /f", "foundation.path: 'tiny' -> '/f'"),
        ("--evaluation.split test", "evaluation.split: 'val' -> 'test'"),
        ("--data.train_triplets 9", "data.train_triplets: 4400 -> 9"),
        ("--model.max_pixels 7840", "model.max_pixels: 200704 -> 7840"),
    ],
)
def test_setting_that_decides_results_is_decisive_and_shown_as_a_difference(
    flags: str, line: str
) -> None:
    old, new = load([], DEFAULT).result_settings(), load(flags.split(), DEFAULT).result_settings()
    assert differences(old, new) == [line]


def test_differences_show_what_only_one_side_has() -> None:
    old = {"a": 1, "m": {"k": 5, "same": 0}, "l": [1]}
    new = {"b": 2, "m": {"j": 5, "same": 0}, "l": [1, 2]}
    assert differences(old, new) == [
        *("a: 1 -> None", "b: None -> 2", "l: [1] -> [1, 2]"),
        *("m.j: None -> 5", "m.k: 5 -> None"),
    ]
    assert differences(old, old) == []


@pytest.mark.parametrize(
    "flags", ["", "--fast_mode --seed 3", "--negative_strategy random --deepspeed /d"]
)
def test_resolved_copy_reads_back_as_the_same_run(tmp_path: Path, flags: str) -> None:
    config = load(flags.split(), DEFAULT)
    path = tmp_path / "config.json"
    save(config, path)
    again = from_json(path, experiment_dir=config.experiment_dir)
    assert again.result_settings() == config.result_settings()
    assert again.runtime == config.runtime and again.num_iterations == config.num_iterations


def test_resolved_copy_does_not_remember_how_the_run_was_resumed() -> None:
    flags = "--auto_resume --resume_from_iteration 1 --dry_run --experiment_dir /e"
    assert load(flags.split(), DEFAULT).to_json() == load([], DEFAULT).to_json()


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"seeed": 1}', '{"seed": -1}'])
def test_damaged_copy_is_one_clear_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        from_json(write(tmp_path / "config.json", text))


def test_config_is_frozen() -> None:
    config = load([], DEFAULT)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 1
    with pytest.raises(ValueError, match="frozen"):
        config.training.lora.r = 1


def test_requirements_end_with_the_package_itself() -> None:
    assert (ROOT / "requirements.txt").read_text("utf-8").splitlines()[-1] == "-e ."


def test_a_strategys_settings_may_stand_right_under_mining(tmp_path: Path) -> None:
    flat = "mining: {type: top_k, k: 2, below: all, fallback: random}"
    path = write(tmp_path / "flat.yaml", flat)
    strategy = {"type": "top_k", "negatives_per_query": 2, "extra_ranks": "all"}
    nested = {"mining": {"strategy": strategy, "fallback": "random"}}
    other = write(tmp_path / "nested.yaml", yaml.safe_dump(nested))
    one, two = (load(["--config", str(each)], DEFAULT) for each in (path, other))
    assert one.mining == two.mining
    band = load(["--config", str(path), "--negative_strategy", "band"], DEFAULT)
    assert band.mining.strategy.type == "band"


def helped(words: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as end:
        load(words.split(), CONFIGS / "shapes.yaml")
    assert not end.value.code
    return capsys.readouterr().out


def test_help_shows_the_flags_people_use_with_the_values_of_the_recipe(
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = helped("--help --dataset_name cirr", capsys)
    assert set(re.findall(r"^--(\w+)", said, re.MULTILINE)) == set(cli_help.COMMON)
    cirr = load(["--dataset_name", "cirr"], CONFIGS / "shapes.yaml")
    for value in (cirr.training.batch_size, cirr.training.learning_rate, cirr.model.path):
        assert f"({value})" in said
    assert len(said.splitlines()) < 45


def test_help_on_a_word_and_on_all(capsys: pytest.CaptureFixture[str]) -> None:
    one, everything = helped("--help hard_negative", capsys), helped("--help_all", capsys)
    assert "--hard_negative_k" in one and "--seed" not in one
    assert all(f"--{flag}" in everything for flag in cli_help.COMMON) and len(everything) > 20_000
    with pytest.raises(UserError, match="no flag has this in its name"):
        load(["--help", "nonsense"], CONFIGS / "shapes.yaml")


def test_flags_are_read_before_torch_is_loaded() -> None:
    """So that a mistyped flag and --help answer at once."""
    code = "import sys, cirloop.config.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("flags", "loss"),
    [
        ("--loss triplet", {"type": "triplet", "margin": 0.2}),
        (
            "--training.loss.type bradley_terry --training.loss.temperature 0.5",
            {"type": "bradley_terry", "temperature": 0.5},
        ),
        ("--loss info_nce", {"type": "info_nce", "temperature": 0.05, "mask_margin": None}),
    ],
)
def test_another_loss_by_flag_leaves_out_what_it_lacks(flags: str, loss: dict[str, Any]) -> None:
    """The file's temperature stays where the loss has one, and is no error where it has none."""
    assert load(flags.split(), CONFIGS / "shapes.yaml").training.loss.model_dump() == loss


def test_an_unknown_loss_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="'bradley_terry', 'sum', 'triplet', 'info_nce'"):
        load(["--loss", "dpo"], CONFIGS / "shapes.yaml")


def test_some_earlier_names_are_still_read(empty: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path / "earlier.yaml",
        "training: {warm_up_steps: 3, steps: 4}\n"
        "captioning: {candidates: 2, verify: 0.0, round_trip: 0}\n",
    )
    config = load(["--config", str(path)], DEFAULT)
    assert (config.training.iteration_0_steps, config.training.steps_per_iteration) == (3, 4)
    captioning = config.captioning
    assert (captioning.num_candidates, captioning.max_round_trip_rank) == (2, 0)
    assert captioning.min_verify_probability == 0
    flags = ["--training.warm_up_steps", "5", "--training.steps=6"]
    config = load(["--config", str(empty), *flags], DEFAULT)
    assert (config.training.iteration_0_steps, config.training.steps_per_iteration) == (5, 6)


def test_a_setting_by_both_of_its_names_is_refused(tmp_path: Path) -> None:
    mining = "mining: {type: top_k, k: 3, negatives_per_query: 4}\n"
    for text, says in (
        ("training: {steps: 3, steps_per_iteration: 4}\n", r"training\.steps: unknown setting"),
        (mining, r"mining\.strategy\.top_k\.k: unknown setting"),
    ):
        path = write(tmp_path / "both.yaml", text)
        with pytest.raises(UserError, match=says):
            load(["--config", str(path)], DEFAULT)
