"""Files of a finished run, altered: what reads them names them, and nothing is made of them."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cirloop.artifacts import schema
from cirloop.artifacts.store import Store
from cirloop.backbones.tensor_cache import TensorCache
from cirloop.cli import runner
from cirloop.cli.evaluate import EvalConfig, evaluate_run
from cirloop.data.paths import DataPaths
from cirloop.monitoring.costs import Costs
from cirloop.stages.context import run_directory
from cirloop.tools.export_embeddings import main as export_vectors
from cirloop.training.checkpoints import StepCheckpoints
from cirloop.types import UserError
from tests.security import corruptions
from tests.security.corruptions import ALTERATIONS, content, copied, refused, refused_to_nobody
from tests.tiers import one_in

VOUCHED = (
    "hard_negatives_iter_0.json",
    "augmented_samples_iter_1.json",
    "accounting_iter_1.json",
    "evaluation_base.json",
    "evaluation_iter_1.json",
    "checkpoint_iter_1/adapter_model.safetensors",
    "checkpoint_iter_1/adapter_config.json",
    "checkpoint_iter_1/training_log.json",
)
"""By the manifest."""
CHECKPOINT = [name for name in VOUCHED if name.startswith("checkpoint")]
OWN = ("manifest.json", "config.json")


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return copied(finished, tmp_path / "run")


def evaluated(run: Path) -> object:
    return evaluate_run(EvalConfig(experiment_dir=run, iterations="1"))


def exported(run: Path) -> object:
    return export_vectors(
        ["--experiment_dir", str(run), "--iteration", "1", "--output", str(run.parent / "vectors")]
    )


@pytest.mark.parametrize(("name", "alteration"), one_in(200, [*VOUCHED, *OWN], ALTERATIONS))
def test_a_run_does_not_go_on_with_an_altered_file(
    name: str, alteration: str, run: Path, small: Any
) -> None:
    ALTERATIONS[alteration](run / name)
    before = content(run)
    said = refused(lambda: runner.open_run(small(run, auto_resume=True)))
    assert str(run / name) in said or (name == "config.json" and "(no config.json)" in said)
    assert content(run) == before, "something was made of it"


def test_the_same_run_unaltered_is_opened(run: Path, small: Any) -> None:
    runner.open_run(small(run, auto_resume=True))
    Store(run).load("checkpoint_iter_1")
    assert run_directory(run)[1].names


@pytest.mark.parametrize(
    ("name", "alteration", "read"),
    one_in(
        7,
        [*CHECKPOINT, *OWN],
        ["a bit of its middle", "half of it", "empty", "a directory", "gone"],
        [evaluated, exported],
        name=lambda value: getattr(value, "__name__", str(value)),
    ),
)
def test_nothing_is_evaluated_or_exported(
    name: str, alteration: str, read: Callable[[Path], object], run: Path
) -> None:
    ALTERATIONS[alteration](run / name)
    assert name in refused(lambda: read(run)) and not (run.parent / "vectors").exists()


@pytest.mark.full
@pytest.mark.parametrize("name", one_in(12, [*VOUCHED, *OWN]))
def test_another_runs_file_is_refused(name: str, run: Path, steady: Path, small: Any) -> None:
    if (steady / name).read_bytes() == (run / name).read_bytes():
        pytest.skip("the same in both runs")
    shutil.copy(steady / name, run / name)
    said = refused(lambda: runner.open_run(small(run, auto_resume=True)))
    assert str(run / name) in said or "does not agree with the manifest" in said
    if name in CHECKPOINT or name in OWN:
        assert refused(lambda: evaluated(run)), "only the resumed run minds"


@pytest.mark.full
def test_a_planted_artifact_is_not_taken_for_one(
    run: Path, steady: Path, small: Any, caplog: Any
) -> None:
    """Nor shown: what the manifest does not list is nobody's."""
    planted = json.loads((steady / "accounting_iter_1.json").read_text()) | {"iteration": 7}
    (run / "accounting_iter_7.json").write_text(json.dumps(planted))
    assert "accounting_iter_7.json" not in runner.open_run(small(run, auto_resume=True)).store.names


@pytest.fixture
def open_to_all(finished: Path) -> Iterator[Path]:
    """A copy where other users come to; pytest's own directories are root's alone."""
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        yield copied(finished, Path(made) / "run")


@pytest.mark.parametrize("name", one_in(3, [*VOUCHED, *OWN]))
def test_an_unreadable_file_is_named(name: str, open_to_all: Path, small: Any) -> None:
    (open_to_all / name).chmod(0)
    config = small(open_to_all, auto_resume=True, runtime={"cache_dir": open_to_all / "cache"})
    said = refused_to_nobody(lambda: runner.open_run(config))
    assert str(open_to_all / name) in said and "Permission denied" in said, said


@pytest.mark.parametrize(
    "alteration",
    one_in(5, ["a bit of its middle", "empty", "half of it", "zeros", "a dangling link"]),
)
def test_what_is_gathered_from_others_is_written_anew(
    alteration: str, run: Path, small: Any
) -> None:
    whole = (run / "evaluation_results.json").read_bytes()
    ALTERATIONS[alteration](run / "evaluation_results.json")
    runner.run(small(run, auto_resume=True))
    assert (run / "evaluation_results.json").read_bytes() == whole


def test_a_directory_where_results_belong_is_named(run: Path, small: Any) -> None:
    corruptions.a_directory(run / "evaluation_results.json")
    said = refused(lambda: runner.run(small(run, auto_resume=True)))
    assert f"{run / 'evaluation_results.json'} is a directory" in said
    assert not list(run.glob(".*.tmp"))


@pytest.mark.parametrize(
    "alteration", [name for name in ALTERATIONS if name not in ("gone", "a dangling link")]
)
def test_corrupted_files_costs_are_named(alteration: str, run: Path) -> None:
    ALTERATIONS[alteration](run / "costs.json")
    assert str(run / "costs.json") in refused(Costs(run).read)


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A step checkpoint."""
    tensors = {"parameter/a": torch.arange(1000.0), "exp_avg/a": torch.ones(1000)}
    StepCheckpoints(tmp_path, "k").write(2, tensors, [{"step": 1, "loss": 2.5}])
    return tmp_path / "step_000002"


@pytest.mark.parametrize("alteration", ALTERATIONS)
@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_an_altered_step_checkpoint_is_named(
    name: str, alteration: str, step: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = StepCheckpoints(step.parent, "k")
    assert checkpoints.newest()[0]["step"] == 2  # type: ignore[index]
    ALTERATIONS[alteration](step / name)
    if alteration == "gone":  # as of a removal that was broken off
        assert checkpoints.newest() is None
        assert f"{step} is not whole and is passed over" in caplog.text
    else:
        assert str(step / name) in refused(checkpoints.newest)


def test_a_step_checkpoint_of_another_stage_is_named(step: Path) -> None:
    assert str(step) in refused(StepCheckpoints(step.parent, "another").newest)


@pytest.mark.parametrize("name", ["manifest.json", "config.json", "costs.json"])
def test_no_single_bit_of_a_sealed_file_changes_what_is_read(
    name: str, finished: Path, tmp_path: Path
) -> None:
    """Each byte in turn: refused, or read as what it was (a blank for a blank)."""
    whole, path = (finished / name).read_bytes(), tmp_path / name
    read, same = schema.read(finished / name), 0
    for place in range(len(whole)):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
        )
        try:
            assert schema.read(path) == read
            same += 1
        except UserError as error:
            assert str(path) in str(error)
    assert same < 0.02 * len(whole)


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """The file of a shard of vision features."""
    TensorCache(tmp_path, "tower").write(
        {f"{name}@1x2x2": torch.rand(40, 8, dtype=torch.bfloat16) for name in "abc"}
    )
    (path,) = tmp_path.rglob("*.safetensors")
    return path


def read_cached(path: Path) -> dict[str, torch.Tensor]:
    cache = TensorCache(path.parent.parent, "tower")
    held = [name for name in "abc" if name not in cache.missing("abc")]
    return {name: cache.read(name) for name in held}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_an_altered_shard_is_missing(
    alteration: str, cached: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(read_cached(cached)) == 3
    ALTERATIONS[alteration](cached)
    assert read_cached(cached) == {}
    if alteration not in ("gone", "a dangling link", "a directory", "a pipe"):
        assert f"{cached} are damaged" in caplog.text and not cached.exists()


def test_no_single_bit_of_a_shard_is_read_over(cached: Path) -> None:
    whole = cached.read_bytes()
    for place in range(0, len(whole), 3):
        cached.write_bytes(
            whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :]
        )
        assert read_cached(cached) == {}, place


def test_another_shard_under_this_ones_name_is_not_read(cached: Path, tmp_path: Path) -> None:
    TensorCache(tmp_path, "other tower").write({"a@1x2x2": torch.rand(40, 8)})
    (planted,) = (tmp_path / "other tower").iterdir()
    shutil.copy(planted, cached)
    assert read_cached(cached) == {}


def test_an_unreadable_shard_is_missing() -> None:
    with tempfile.TemporaryDirectory() as made:
        os.chmod(made, 0o755)
        TensorCache(Path(made), "tower").write({"a@1x2x2": torch.zeros(3)})
        (path,) = Path(made).rglob("*.safetensors")
        path.chmod(0)
        assert (
            refused_to_nobody(lambda: read_cached(path))
            == "not a UserError: AssertionError('accepted: {}')"
        )


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_what_is_known_of_images_is_found_out_again(alteration: str, tmp_path: Path) -> None:
    from PIL import Image

    files = {"a": tmp_path / "a.png", "b": tmp_path / "b.png"}
    Image.new("RGB", (8, 8)).save(files["a"])
    files["b"].write_text("no image")
    data_paths = DataPaths(tmp_path, tmp_path / "cache", lambda items, _: items)
    found = data_paths.unreadable_images("set", files)  # type: ignore[arg-type]
    (record,) = (tmp_path / "cache" / "images").iterdir()
    ALTERATIONS[alteration](record)
    if alteration == "a directory":
        assert str(record) in refused(lambda: data_paths.unreadable_images("set", files))  # type: ignore[arg-type]
        return
    assert (
        data_paths.unreadable_images("set", files)
        == found
        == {"b": "is not an image of a known kind"}
    )  # type: ignore[arg-type]
    assert schema.read(record, "images")["bad"] == found
