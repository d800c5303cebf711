"""`cirloop plan`: from a table of rates, for a device that is not here, and by measuring."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import pytest

from cirloop.stages import rates, timing
from cirloop.types import UserError

SMALL = (
    "--data.train_families 6 --data.train_triplets 48 --data.eval_families 6 --num_iterations 2"
    " --training.batch_size 8 --training.iteration_0_steps 2 --training.steps_per_iteration 2"
    " --captioning.batch_size 4 --captioning.max_new_tokens 6"
).split()
plan = importlib.import_module("cirloop.cli.plan")


def run(capsys: pytest.CaptureFixture[str], *flags: object) -> str:
    plan.main([*SMALL, *map(str, flags)])
    out, error = capsys.readouterr()
    return out + error


def test_a_device_is_measured_kept_and_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "BUDGET_S", 0.3)
    table = tmp_path / "rates.json"
    directory = ("--experiment_dir", tmp_path / "run")
    said = run(capsys, *directory, "--measure", "--rates", table)
    assert "of 2 rounds" in said and "caption, at most" in said
    (measured,) = [entry for entry in rates.read(table) if entry not in rates.read()]
    rates.extend(table, replace(measured, device="NVIDIA Z9"))
    slow = run(capsys, *directory, "--rates", table, "--device", "z9")
    fast = run(capsys, *directory, f"--rates={table}", "--device=z9", "--num-devices", 4)
    assert "1 x NVIDIA Z9" in slow and "4 x NVIDIA Z9" in fast
    assert minutes(fast) < minutes(slow)
    half = run(capsys, *directory, "--rates", table, "--device", "z9", "--failed_share", 0.5)
    assert minutes(half) < minutes(slow)
    assert not (tmp_path / "run").exists()


def minutes(said: str) -> float:
    (row,) = [line for line in said.splitlines() if "all " in line.replace("│", " ")[:8]]
    return float(row.replace("│", " ").split()[-1])


def test_what_does_not_go_together_is_named() -> None:
    with pytest.raises(UserError, match="has no rates"):
        plan.main([*SMALL, "--device", "no such device"])
    with pytest.raises(UserError, match="leave --device out"):
        plan.main([*SMALL, "--device", "H100", "--measure"])
    with pytest.raises(UserError, match="--failed_share: Input should be less"):
        plan.main(["--failed_share", "2"])
    with pytest.raises(UserError, match="unrecognized"):
        plan.main(["--lr", "1"])


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert 10 < len(lines) <= 45 and any("--num_devices" in line for line in lines)
