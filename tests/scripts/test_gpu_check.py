"""scripts/gpu_check.sh at toy size on a CPU: every part tells, on the packages that it says it
needs."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cirloop.types import UserError

ROOT = Path(__file__).resolve().parents[2]
TOY = (
    "--size small --num 4 --tokens 4 --batches 2 --batch 2 --chunk 1 --k 1 --new_tokens 4 --workers"
    " 0 --dtype float32 --mine_queries 200 --mine_images 3000 --mine_width 32 --measure_seconds 0.3"
)


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "gpu_check.sh"), *words],
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def rows_of(path: Path) -> dict[str, dict[str, Any]]:
    read = json.loads(path.read_text("utf-8"))
    assert read["size"] == "small" and read["torch"]
    return {f"{row['part']}: {row['case']}": row for row in read["rows"]}


@pytest.mark.full
def test_every_part_tells_in_its_order(tmp_path: Path) -> None:
    table = tmp_path / "rates.json"
    files = ("--output", str(tmp_path / "results.json"), "--extend_rates", str(table))
    done = command(*TOY.split(), *files)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = rows_of(tmp_path / "results.json")
    parts = [*dict.fromkeys(row["part"] for row in rows.values())]
    assert parts[:5] == ["model", "limits", "patches", "embed", "train"]
    assert parts[5:] == ["captions", "decode", "mine", "equality", "round"]
    assert not [row for row in rows.values() if {"failed", "refused", "out_of_memory"} & row.keys()]
    assert rows["limits: product in float32"]["TFLOP/s"] > 0 and rows["limits: copy"]["GB/s"] > 0
    product, convolution = rows["patches: product"], rows["patches: convolution"]
    assert 0 < product["of_tower"] < 1 and 0 < convolution["of_tower"] < 1
    assert float(convolution["differ"]) < 1e-5
    for cache in ("empty", "full"):
        row = rows[f"embed: 4 tokens, batches of 2, {cache} cache"]
        assert row["images_a_second"] > 0
    ways = ("padded", "packed")
    padded, packed = (rows[f"train: sdpa, {way}, adapters in float32"] for way in ways)
    assert padded["triplets_a_second"] > 0 and padded["GB"] > 0
    assert padded["loss"] == pytest.approx(packed["loss"], abs=1e-4)
    assert "minutes" in rows["train: compiled"]["skipped"]
    assert rows["captions: 2 of 4 tokens, batches of 1"]["captions_a_second"] > 0
    assert rows["decode: fixed addresses"]["equal_tokens"] == 1
    assert "GPU" in rows["decode: CUDA graphs"]["skipped"]
    assert rows["mine: 200 queries x 3,000 images"]["queries_a_second"] > 0
    assert rows["mine: float32"]["wrong"] == 0
    allowed = rows["mine: TF32 allowed from outside"]
    assert allowed["as_float32"] and allowed["setting_kept"] and not allowed["wrong"]
    for stage in ("mine", "caption, at most", "train", "evaluate", "all"):
        assert float(rows[f"round: CIRR, {stage}"]["min_a_round"]) > 0
    assert "A round of CIRR's size" in done.stdout
    (measured,) = json.loads(table.read_text("utf-8"))["rates"]
    assert measured["device"].endswith("1 thread") and measured["answer_tokens"] == 0
    assert float(rows["equality: float32 and float32, 8 items"]["of_other_items_at_least"]) > 0.01


@pytest.fixture
def gpu_check(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("gpu_check")


def check_of(gpu_check: Any, directory: Path, minutes: float) -> Any:
    """Without a model: for parts that need none."""
    output = directory / "deep" / "results.json"
    args = {"size": "small", "dtype": "float32", "minutes": minutes}
    parts = [*gpu_check.PARTS]
    return gpu_check.Check(Namespace(**args, output=output, parts=parts), directory)


def test_a_part_beyond_its_time_is_told_and_the_others_go_on(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeps = {"embed": (lambda check: time.sleep(60), 0.01), "limits": (gpu_check.limits, 0.9)}
    monkeypatch.setattr(gpu_check, "PARTS", sleeps)
    check = check_of(gpu_check, tmp_path, minutes=0.5)
    assert gpu_check.run(check)
    rows = rows_of(check.args.output)
    assert rows["embed: the rest"]["skipped"] == "its 0.3 s are over"
    assert rows["limits: copy"]["GB/s"] > 0


def test_running_out_of_memory_and_failing_are_told_by_name(
    gpu_check: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def out_of_memory() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    def refused() -> dict[str, Any]:
        raise UserError("out of memory with one of items to embed")

    def fails(check: Any) -> None:
        check.case("embed", "a large batch", out_of_memory)
        check.case("embed", "a large image", refused)
        raise RuntimeError("no kernel image")

    parts = {"embed": (fails, 0.5), "limits": (gpu_check.limits, 0.5)}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    check = check_of(gpu_check, tmp_path, minutes=1.0)
    assert not gpu_check.run(check)
    rows = rows_of(check.args.output)
    assert "2 GiB" in rows["embed: a large batch"]["out_of_memory"]
    assert "one of items" in rows["embed: a large image"]["refused"]
    assert rows["embed: the rest"]["failed"] == "RuntimeError: no kernel image"
    assert rows["limits: copy"]["GB/s"] > 0
    assert "no kernel image" in capsys.readouterr().err


def test_a_cpu_and_a_folder_without_wheels_are_named(
    gpu_check: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = command("--wheels-from", str(tmp_path))
    assert done.returncode == 2
    assert f"{tmp_path} has no wheels: fill it with --wheels" in done.stderr
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        gpu_check.main()


@pytest.mark.full
def test_only_listed_packages_are_imported(tmp_path: Path) -> None:
    """What a bare machine has, with what those packages need, and the wheels of gpu_check.sh; no
    more."""
    bare = tmp_path / "bare"
    wheels = (ROOT / "scripts" / "gpu_check.sh").read_text("utf-8").split('locked="')[1]
    names = "torch transformers peft accelerate safetensors pillow rich numpy".split()
    names += ["torchvision", *wheels.split('"')[0].split()]
    script = f"""
import sys
sys.path[:] = [path for path in sys.path if "-packages" not in path]
sys.path += [{str(bare)!r}]
sys.path[:0] = [{str(ROOT / "scripts")!r}, {str(ROOT / "benchmarks")!r}, {str(ROOT / "src")!r}]
import gpu_check, cirloop.backbones.qwen2_vl, cirloop.captioning.backends.qwen_vl
import cirloop.training.trainer, cirloop.distributed.worker, cirloop.stages.estimate
import cirloop.data.jsonl
"""
    link(names, bare)
    done = subprocess.run(
        [sys.executable, "-S", "-c", script],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr[-2000:]


def link(names: list[str], directory: Path) -> None:
    """Links to the packages of `names`; of all but the listed wheels also to what they need."""
    directory.mkdir()
    left, known = list(names), set[str]()
    while left:
        name = canonicalize_name(left.pop())
        if name in known:
            continue
        known.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # an extra, or for another system
            continue
        needs = [Requirement(each) for each in found.requires or []]
        if name not in names[8:]:
            needs = [n for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
            left += [each.name for each in needs]
        tops = {file.parts[0] for file in found.files or []} - {"..", "__pycache__"}
        for top in tops:
            if not (directory / top).exists():
                (directory / top).symlink_to(found.locate_file(top))
