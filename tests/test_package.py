"""The command `cirloop`, and what an installed package holds."""

from __future__ import annotations

import subprocess
import sys
import time
import tomllib
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import pytest
from setuptools import glob

from cirloop import __main__ as door
from cirloop.config import recipes
from cirloop.config.run import load
from cirloop.tools.installed import missing
from cirloop.types import UserError
from tests.commands import ROOT, environment

SOURCE = ROOT / "src" / "cirloop"
DEFAULT = ROOT / "configs" / "shapes.yaml"


def cirloop(*words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "cirloop", *words]
    return subprocess.run(
        command, env=environment(), capture_output=True, text=True, check=False, timeout=60
    )


def test_every_file_of_the_package_is_installed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["cirloop"]
    listed = {
        Path(file).relative_to(SOURCE)
        for pattern in patterns
        for file in glob.glob(str(SOURCE / pattern), recursive=True)
    }
    code = {".py", ".pyc"}
    files = {path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file()}
    files |= {
        Path("configs") / path.relative_to(ROOT / "configs")
        for path in (ROOT / "configs").rglob("*")
        if path.is_file()
    }
    assert {path for path in files if path.suffix not in code} - listed == set()


def test_help_fits_a_screen_and_loads_nothing() -> None:
    began = time.monotonic()
    done = cirloop("--help")
    assert done.returncode == 0 and time.monotonic() - began < 5
    assert len(done.stdout.splitlines()) <= 24 + 1
    assert all(f"  {name} " in done.stdout for name in door.COMMANDS)
    code = "import sys, cirloop.__main__; print([m for m in sys.modules if m in LOADED])"
    loaded = code.replace("LOADED", repr(("torch", "pydantic", "rich", "numpy", "yaml")))
    listed = subprocess.run(
        [sys.executable, "-c", loaded], env=environment(), capture_output=True, text=True
    )
    assert listed.stdout.strip() == "[]"


def test_an_unknown_command_names_the_nearest() -> None:
    done = cirloop("trian")
    assert done.returncode == 2 and "Did you mean train?" in done.stderr


@pytest.mark.parametrize("name", door.COMMANDS)
def test_each_command_is_a_function_of_its_flags(name: str) -> None:
    assert callable(import_module(door.COMMANDS[name][0]).main)


@pytest.mark.parametrize(
    "flags",
    [
        *((name, "--help") for name in door.COMMANDS),
        ("mine", "--query-embeddings", "q", "--help"),
        ("export", "--vectors", "--help"),
    ],
    ids=" ".join,
)
def test_the_help_of_each_command_fits_a_screen(
    flags: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/cirloop", *flags])
    with suppress(SystemExit):
        import_module(door.COMMANDS[flags[0]][0]).main([*flags[1:]])
    lines = capsys.readouterr().out.splitlines()
    assert f"usage: cirloop {flags[0]}" in lines[0]
    assert 5 < len(lines) <= 48 and max(map(len, lines)) <= 100


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("train", ["--training.batch-size", "x"], "training.batch_size: Input should be a valid"),
        ("eval", ["--output-file", "a/b.json"], "--output_file a/b.json: its directory"),
        ("mine", ["--image_dir", "x", "--k_nn", "0"], "--k-nn: Input should be greater"),
        ("search", ["--experiment-dir", "x", "--top-k", "0"], "top_k: Input should be greater"),
        ("export", ["--experiment-dir", "x", "--format", "y"], "format: Input should be"),
        ("compare", ["a", "b", "--examples", "-1"], "--examples: Input should be greater"),
        ("import", ["a.csv", "--skip-rows", "-1"], "--skip_rows: Input should be greater"),
        ("plan", ["--num-devices", "0"], "--num_devices: Input should be greater"),
        ("init", ["--gpu-memory", "-1"], "--gpu_memory: Input should be greater"),
    ],
)
def test_flags_take_dashes_and_underscores(name: str, flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match="(?s).*" + message.replace(".", r"\.")):
        import_module(door.COMMANDS[name][0]).main(flags)


def test_messages_name_the_command_that_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/venv/bin/cirloop", "train", "--lr", "1"])
    with pytest.raises(UserError, match=r"Did you mean --learning_rate.*cirloop train --help_all"):
        load(["--lr", "1"], DEFAULT)


def test_a_recipe_is_taken_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("jsonl_tiny", "jsonl_tiny.yaml", "configs/jsonl_tiny.yaml"):
        assert load(["--config", name], DEFAULT).data.type == "jsonl"
    (tmp_path / "jsonl_tiny.yaml").write_text("data: {type: shapes}\n")  # a file comes first
    assert load(["--config", "jsonl_tiny.yaml"], DEFAULT).data.type == "shapes"
    with pytest.raises(UserError, match="there is no such file"):
        load(["--config", "other/jsonl_tiny.yaml"], DEFAULT)
    assert recipes.CONFIGS == ROOT / "configs"


def test_doctor_says_what_is_missing_for_which_command(capsys: pytest.CaptureFixture[str]) -> None:
    doctor = import_module("cirloop.tools.doctor")
    rows = dict(doctor._packages(["torch>=99"], ['nowhere>=1; extra == "xlsx"']))
    assert rows["every command"].startswith("missing: torch>=99")
    assert "nowhere>=1; pip install 'cirloop[xlsx]'" in rows["cirloop import of Excel workbooks"]
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    assert "every command: all there" in said and "GB free" in said and "cirr: " in said
    assert doctor.main(["--x"]) == 2


def test_requirements_of_an_extra_are_not_those_of_every_command() -> None:
    lines = ["numpy", "nowhere>=1", 'elsewhere; extra == "train"', 'no; python_version < "3"']
    assert missing(lines) == ["nowhere>=1"]
    assert missing(lines, "train") == ["elsewhere"]
    assert missing(["numpy>=99999"])[0].startswith("numpy>=99999 (has ")
