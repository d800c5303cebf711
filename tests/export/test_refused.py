"""What cannot be exported is said at once, with what can be; nothing half-made is ever under its
name."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cirloop.artifacts.fs import os_error_hint
from cirloop.artifacts.store import file_digests
from cirloop.cli.evaluate import EvalConfig, evaluate_run
from cirloop.config.run import save
from cirloop.stages.context import run_directory
from cirloop.tools.export.command import main
from cirloop.tools.export.config import ExportConfig
from cirloop.tools.export.source import load_source
from cirloop.types import UserError
from tests.commands import python


def export(run: Path, *more: str, iteration: str = "1", export_format: str = "adapter") -> None:
    main(["--experiment_dir", str(run), "--iteration", iteration, "--format", export_format, *more])


@pytest.mark.parametrize(
    ("iteration", "says"),
    [
        ("base", "is not trained: use it as it is"),
        ("7", "no such iteration"),
        ("x", "no such iteration"),
    ],
)
def test_iterations_that_are_not_there(iteration: str, says: str, run: Path) -> None:
    with pytest.raises(UserError, match=rf"{says}.*There are: 0, 1\.\nNothing was written"):
        export(run, iteration=iteration)


def test_a_package_that_a_format_needs_is_named_before_anything_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cirloop.tools.export.config.missing", lambda lines: lines)
    needs = r"needs the package sentence-transformers>=6\.0: pip install.*--format merged"
    with pytest.raises(UserError, match=needs):
        export(tmp_path / "no run", export_format="sentence-transformers")
    with pytest.raises(UserError, match="no run directory"):
        export(tmp_path / "no run", export_format="merged")


def test_a_missing_package_is_found_without_torch() -> None:
    code = """
import sys
from importlib import metadata
def absent(name): raise metadata.PackageNotFoundError(name)
metadata.version = absent
from cirloop.tools.export.command import main
try:
    main("--experiment_dir x --iteration 1 --format sentence-transformers".split())
except ValueError as error:
    print(type(error).__name__, "torch" in sys.modules, error)
"""
    assert python("-c", code).stdout.startswith("UserError False --format sentence-transformers")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--vectors"], "(?s)2 problems.*--experiment_dir: is needed: The run.*--output: is"),
        (["--vectors", "--format", "adapter"], "(?s)--format: Input should be 'npy' or 'parquet'"),
        (["--split", "val"], "--split"),
    ],
)
def test_vectors_have_flags_of_their_own(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        main(words)


def unfinished(small: Any, place: Path, **changes: Any) -> Path:
    """A run directory with settings, and no artifact."""
    config = small(place / "run", **changes)
    save(config, config.directory / "config.json")
    return config.directory  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (
            {"type": "blip2", "path": "x", "dtype": "float32"},
            "a model of type blip2 is made of parts",
        ),
        (
            {"type": "clip_combiner", "path": "random", "clip": "RN50", "dtype": "float32"},
            "of type clip_combiner",
        ),
        ({"type": "qwen2_vl", "path": "tiny", "quantization": "nf4"}, "weights of nf4"),
    ],
)
def test_models_that_are_not_exported(
    model: dict[str, str], says: str, small: Any, tmp_path: Path
) -> None:
    """All problems at once."""
    run = unfinished(small, tmp_path, model=model)
    with pytest.raises(UserError, match=r"2 problems:(.|\n)*There are: none") as error:
        export(run, export_format="merged")
    assert says in str(error.value) and {path.name for path in run.iterdir()} == {"config.json"}


def test_a_prompt_format_that_sentence_transformers_cannot_follow(
    small: Any, tmp_path: Path
) -> None:
    model = {"type": "qwen2_vl", "path": "tiny", "dtype": "float32", "prompt_format": "vlm2vec"}
    run = unfinished(small, tmp_path, model=model)
    with pytest.raises(
        UserError, match=r"prompt_format vlm2vec numbers (.|\n)*Give --format merged or adapter"
    ):
        export(run, export_format="sentence-transformers")
    with pytest.raises(UserError) as error:
        export(run, export_format="merged")
    assert "model.prompt_format" not in str(error.value)


def test_a_warm_up_of_no_steps_and_parts_in_full(run: Path, tmp_path: Path) -> None:
    from cirloop.artifacts.store import Store

    shutil.copytree(
        run,
        tmp_path / "run",
        ignore=shutil.ignore_patterns("export", "manifest.json", "*_iter_*", "eval*"),
    )
    store = Store(tmp_path / "run")

    def build(name: str) -> Any:
        def make(path: Path) -> None:
            path.mkdir(parents=True)
            (path / name).write_text("{}")
            if name == "parts.json":
                (path / "parts.safetensors").write_text("")

        return make

    store.get_or_build("checkpoint_iter_0", {}, [], build("training_log.json"), 0)
    store.get_or_build("checkpoint_iter_1", {}, [], build("parts.json"), 1)
    with pytest.raises(
        UserError, match=r"was trained for 0 steps, so it is the base model\. There are: 1\."
    ):
        export(tmp_path / "run", iteration="0")
    with pytest.raises(UserError, match=r"there is no LoRA\. Give --format merged"):
        export(tmp_path / "run")


@pytest.mark.full
def test_an_export_is_not_overwritten_unless_asked_and_nothing_else_ever(
    run: Path, adapter: Path
) -> None:
    there = file_digests(adapter)
    with pytest.raises(UserError, match=r"is an export already\. Replace it with --overwrite"):
        export(run)
    assert file_digests(adapter) == there
    with pytest.raises(
        UserError, match=r"is there already and is no export \(no exported_model.json\)"
    ):
        export(run, "--output", str(run / "checkpoint_iter_1"), "--overwrite")


def test_unknown_flags_and_formats(run: Path) -> None:
    with pytest.raises(UserError, match="'adapter', 'merged' or 'sentence-transformers'"):
        export(run, export_format="gguf")
    with pytest.raises(UserError, match="Did you mean --format"):
        main(["--fromat", "adapter"])


@pytest.mark.full
def test_a_failure_leaves_the_old_export_and_nothing_beside_it(
    run: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full in the middle of the card; then again, over what a killed export left."""
    from cirloop.tools.export import export as export_module

    digests = file_digests(adapter)

    def full(*_: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device", "README.md")

    with monkeypatch.context() as patched:
        patched.setattr(export_module, "card", full)
        with pytest.raises(OSError, match="No space left") as error:
            export(run, "--overwrite")
    assert "Free space there" in (os_error_hint(error.value) or "")
    assert file_digests(adapter) == digests and not [*adapter.parent.glob(".*")]
    for name in (".iter_1_adapter.tmp", ".iter_1_adapter.old"):
        shutil.copytree(adapter, adapter.parent / name)
        (adapter.parent / name / "half").write_text("")
    export(run, "--overwrite")
    assert file_digests(adapter) == digests and not [*adapter.parent.glob(".*")]


@pytest.mark.full
def test_the_run_is_as_whole_as_before(run: Path, adapter: Path) -> None:
    """Exports in a run directory are no part of its artifacts, and in nobody's way."""
    store = run_directory(run)[1]
    assert [store.load(name).name for name in store.names] == store.names
    assert evaluate_run(EvalConfig(experiment_dir=run, iterations="1"))[0]["iteration"] == "1"


KILLED = """
import os, signal, sys
from cirloop.tools.export.command import main

def strike(event, args):
    if event == "{event}" and str(args[{place}]) == "{path}":
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(strike)
main(sys.argv[1:])
"""


@pytest.mark.full
def test_a_killed_export_leaves_the_old_one_whole(
    run: Path, adapter: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`kill -9` with half of the files there, and between the old one's rename and the new one's;
    then again."""
    there, aside = file_digests(adapter), adapter.with_name(f".{adapter.name}.tmp")
    old = adapter.with_name(f".{adapter.name}.old")

    def killed(event: str, place: int, path: Path) -> None:
        code = KILLED.format(event=event, place=place, path=path)
        argv = [
            "--experiment_dir",
            str(run),
            "--iteration",
            "1",
            "--format",
            "adapter",
            "--overwrite",
        ]
        ended = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True)
        assert ended.returncode == -signal.SIGKILL, ended.stderr

    killed("open", 0, aside / "adapter_config.json")
    assert file_digests(adapter) == there and aside.exists() and not old.exists()
    killed("os.rename", 1, adapter)
    assert file_digests(old) == there and not adapter.exists()
    with pytest.raises(UserError, match="is an export already"):
        export(run)
    assert "is back" in caplog.text and file_digests(adapter) == there

    real = Path.replace

    def fails(self: Path, target: Path) -> Path:
        if self == aside:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="Input/output error"):
            export(run, "--overwrite")
    assert file_digests(adapter) == there and not [*adapter.parent.glob(".*")]
    export(run, "--overwrite")
    assert file_digests(adapter) == there and not [*adapter.parent.glob(".*")]


def test_the_best_iteration_is_exported_by_default(run: Path) -> None:
    best = json.loads((run / "evaluation_results.json").read_text())["best"]["iteration"]
    source = load_source(ExportConfig(experiment_dir=run, format="adapter"))
    assert source.iteration == best and source.target_dir.name == f"iter_{best}_adapter"
    last = load_source(ExportConfig(experiment_dir=run, format="adapter", iteration="last"))
    assert last.iteration == 1
