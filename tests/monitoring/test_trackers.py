"""Trackers: what real TensorBoard, W&B, MLflow and trackio hold after a run that was stopped and
went on."""

from __future__ import annotations

import json
import logging
import shutil
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from cirloop.cli import runner
from cirloop.config.run import load
from cirloop.monitoring import events, preemption
from cirloop.monitoring.trackers import flatten, tracking
from cirloop.types import UserError
from cirloop.validation import ValidationFailed
from tests.commands import command, python
from tests.faults.harness import VERY_SMALL
from tests.monitoring.test_stopping import settings, terminated_when

ALL = ("tensorboard", "wandb", "mlflow", "trackio")
Rows = dict[str, list[tuple[int, float]]]
"""Name of a number -> (step, value), in the order in which they were sent."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Trackers keep their runs below a directory of the tests."""
    home = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", (home / "mlflow").as_uri())
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("TRACKIO_DIR", str(home / "trackio"))
        patch.delenv("WANDB_DIR", raising=False)
        yield home


@pytest.fixture(scope="module")
def tracked(places: Path, small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that SIGTERM stopped in the second training stage, and that went on."""
    config = very_small(small, tmp_path_factory.mktemp("runs") / "tracked", ALL)
    flags = [*settings(config.directory.parent, config), "--auto_resume"]
    steps = config.directory / ".work" / "checkpoint_iter_1"
    with terminated_when(lambda: any(steps.glob("step_*"))):
        done = command("train_iterative.py", *flags)
    assert done.returncode == preemption.EXIT_PREEMPTED, done.stderr
    done = command("train_iterative.py", *flags)
    assert done.returncode == 0, done.stderr
    return Path(config.directory)


def very_small(small: Any, directory: Path, names: Sequence[str], **changes: Any) -> Any:
    """A run of five warm-up steps and a round of five."""
    return small(
        directory,
        **{**VERY_SMALL, "runtime": {**VERY_SMALL["runtime"], "report_to": names}, **changes},
    )


@pytest.fixture
def without(tracked: Path, tmp_path: Path) -> Path:
    """A copy of it that was never tracked."""
    copy = shutil.copytree(tracked, tmp_path / "copy")
    shutil.rmtree(copy / "trackers")
    return copy


def in_tensorboard(run: Path, _: Path) -> Rows:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = str(run / "trackers/tensorboard")
    found = EventAccumulator(path, size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def in_mlflow(run: Path, _: Path) -> Rows:
    from mlflow import MlflowClient

    client, number = MlflowClient(), runs(run)["mlflow"]
    names = client.get_run(number).data.metrics
    return {
        name: [(m.step, m.value) for m in client.get_metric_history(number, name)] for name in names
    }


def in_trackio(run: Path, places: Path) -> Rows:
    name = f"{run.name}-{runs(run)['trackio'][:8]}"
    with sqlite3.connect(places / "trackio/cirloop.db") as base:
        query = "select step, metrics from metrics where run_name = ? order by id"
        return by_name((step, json.loads(row)) for step, row in base.execute(query, [name]))


def by_name(rows: Iterator[tuple[int, dict[str, float]]]) -> Rows:
    found: Rows = {}
    for step, row in rows:
        for name, value in row.items():
            found.setdefault(name, []).append((step, value))
    return found


def runs(run: Path) -> dict[str, str]:
    return dict(json.loads((run / "trackers/runs.json").read_text())["runs"])


def artifact(run: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((run / name).read_text()))


def expected(run: Path) -> Rows:
    """From the artifacts of a run of 5 warm-up steps and a round of 5."""
    found: Rows = {}
    for t in (0, 1):
        for row in artifact(run, f"checkpoint_iter_{t}/training_log.json")["rows"]:
            for name in ("loss", "learning_rate", "grad_norm"):
                found.setdefault(f"train/{name}", []).append((5 * t + row["step"], row[name]))
    results = artifact(run, "evaluation_results.json")["results"]
    for place, row in zip((0, 5, 10), results, strict=True):
        for part, end in (("metrics", ""), ("standard_errors", " standard error")):
            for name, value in row[part].items():
                name = f"evaluation/{name.replace('@', '_at_')}{end}"
                found.setdefault(name, []).append((place, value))
    summary = artifact(run, "augmented_samples_iter_1.json")["summary"]
    mined = artifact(run, "hard_negatives_iter_0.json")["summary"]["negatives"]
    true = artifact(run, "accounting_iter_1.json")["true_captions"]
    once = {"mining/negatives": mined, "captions/accepted": summary["accepted"]}
    once |= {f"captions/rejected {reason}": num for reason, num in summary["rejected"].items()}
    once["accounting/true_captions"] = true
    found |= {name: [(5, value)] for name, value in once.items()}
    return found


def as_sent(found: Rows) -> Rows:
    """Of steps that were done again after the stop, the value sent last, which is the same on a
    CPU."""
    return {name: sorted(dict(rows).items()) for name, rows in found.items()}


def agree(found: Rows, run: Path) -> None:
    kept = as_sent(found)
    for name, rows in expected(run).items():
        assert kept.get(name) == [(s, pytest.approx(v, rel=1e-6)) for s, v in rows], name


@pytest.mark.full
@pytest.mark.parametrize(
    "read", [in_tensorboard, in_mlflow, in_trackio], ids=["tensorboard", "mlflow", "trackio"]
)
def test_each_tracker_has_every_number_of_the_run(read: Any, tracked: Path, places: Path) -> None:
    found = read(tracked, places)
    agree(found, tracked)
    stages = artifact(tracked, "costs.json")["stages"]
    costs = {row["stage"]: row for row in stages if row["finished"]}
    first, *_ = sorted(found["cost/captions/seconds"])
    assert first == (5, pytest.approx(costs["augmented_samples_iter_1.json"]["seconds"], rel=1e-6))


@pytest.mark.full
def test_wandb_has_one_run_in_two_parts(tracked: Path) -> None:
    files = sorted((tracked / "trackers/wandb").glob("offline-run-*/*.wandb"))
    assert [file.stem for file in files] == [f"run-{runs(tracked)['wandb']}"] * 2
    whole = b"".join(file.read_bytes() for file in files)
    for name in (b"train/loss", b"evaluation/recall_at_1", b"cost/captions/seconds"):
        assert name in whole


@pytest.mark.full
def test_the_settings_are_the_hyperparameters(tracked: Path) -> None:
    from mlflow import MlflowClient

    params = MlflowClient().get_run(runs(tracked)["mlflow"]).data.params
    training = artifact(tracked, "config.json")["training"]
    assert params["training.lora.r"] == str(training["lora"]["r"])
    assert params["runtime.report_to"] == json.dumps(list(ALL))
    secrets = {"path": "https://me:word@host/x", "hub_token": "x"}
    hidden = {"a.path": "[hidden]", "a.hub_token": "[hidden]"}
    told = {"a": secrets, "list": [1, "b"], "none": None, "empty": {}}
    assert flatten(told) == hidden | {"list": '[1, "b"]', "none": None, "empty": "{}"}


@pytest.mark.full
def test_a_tracker_asked_for_later_gets_all_of_it_and_results_do_not_change(
    without: Path, places: Path, small: Any
) -> None:
    manifest = (without / "manifest.json").read_bytes()
    for _ in range(2):  # what it has of stages that are done is not sent again
        runner.run(very_small(small, without, ["tensorboard"], auto_resume=True))
    found = in_tensorboard(without, places)
    agree(found, without)
    assert all(
        len(rows) == len(dict(rows)) for name, rows in found.items() if name in expected(without)
    )
    assert (without / "manifest.json").read_bytes() == manifest


def test_remade_iterations_are_a_new_run_of_the_tracker(without: Path, small: Any) -> None:
    with tracking(without, ("tensorboard",), {}):
        events.emit("numbers", step=12, values={"train/loss": 1.0}, found=False)
    config = very_small(small, without, ["tensorboard"], resume_from_iteration=1)
    runner.open_run(config)
    assert not (without / "trackers").exists()
    assert (without / "replaced_1/trackers/runs.json").exists()


def test_what_can_be_known_is_said_before_the_run(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cirloop.monitoring.trackers.find_spec", lambda name: None)
    with pytest.raises(ValidationFailed) as error:
        runner.run(small(tmp_path / "run", runtime={"report_to": ["wandb", "trackio"]}))
    assert str(error.value).count("pip install -e '.[trackers]'") == 2
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_stops_the_run_before_it_begins(
    without: Path, places: Path, small: Any
) -> None:
    (without / "trackers").mkdir()
    (without / "trackers/tensorboard").write_text("in the way")
    said = r"--report_to tensorboard cannot start: .*(?s:.*)Nothing was trained"
    with pytest.raises(UserError, match=said):
        runner.run(very_small(small, without, ["tensorboard"], auto_resume=True))


def test_a_tracker_that_fails_later_is_left_out_with_one_warning(
    places: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), tracking(tmp_path, ("mlflow", "tensorboard"), {"a": 1}):
        (gone,) = (places / "mlflow").glob(f"*/{runs(tmp_path)['mlflow']}")
        shutil.rmtree(gone)
        for step in (1, 2):
            events.emit("numbers", step=step, values={"x": 0.5}, found=False)
        events.emit("head", head=None)
    ours = [each for each in caplog.records if each.name == "cirloop.monitoring.events"]
    [said] = [record.getMessage() for record in ours]
    assert said.startswith("--report_to mlflow failed, and this attempt goes on without it")
    assert in_tensorboard(tmp_path, places)["x"] == [(1, 0.5), (2, 0.5)]


def test_off_imports_nothing_and_writes_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cirloop.monitoring.trackers import"
        " missing_packages, tracking\nwith tracking(Path(sys.argv[1]), (), {}): assert not"
        " [*missing_packages(())]\nprint({'tensorboard', 'wandb', 'mlflow', 'trackio',"
        " 'accelerate', 'torch'} & {*sys.modules})"
    )
    done = python("-c", code, tmp_path)
    assert done.stdout == "set()\n", done.stderr
    assert [*tmp_path.iterdir()] == []


def test_the_flag_is_a_list_and_decides_no_result(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("{}")
    config = load(["--config", str(path), "--report_to", "tensorboard,wandb"], path)
    assert config.runtime.report_to == ("tensorboard", "wandb")
    assert "runtime" not in config.result_settings()
    path.write_text(yaml.safe_dump({"runtime": {"report_to": ["mlflow"]}}))
    assert load(["--config", str(path)], path).runtime.report_to == ("mlflow",)
    with pytest.raises(UserError, match="tensorboard"):
        load(["--config", str(path), "--report_to", "tensorbord"], path)
