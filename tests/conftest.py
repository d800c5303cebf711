"""Shared pieces: the tiers, and a very small run of the real program on the embedded data and
model.

Tests marked `full` are left out by default (pyproject.toml); `./run_tests.sh --full` runs them too,
and .ci/run the `--full_share` of them that it can afford.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from cirloop.reproducibility import prepare_process
from tests.tiers import in_share

# Of every property test 30 examples, the same ones each time; with `--hypothesis-profile full` 500
# new ones. A slow machine is no failure.
common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", common, max_examples=30, derandomize=True)
settings.register_profile("full", common, max_examples=500, derandomize=False, print_blob=True)
settings.load_profile("default")
prepare_process()  # as each command does, before anything is computed
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what it puts in the background with Ctrl-C ignored, and children inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)

SMALL: dict[str, Any] = {
    "model": {"type": "qwen2_vl", "path": "tiny", "dtype": "float32"},
    "foundation": {"type": "qwen2_vl", "path": "tiny", "dtype": "float32"},
    "data": {"type": "shapes", "train_families": 6, "train_triplets": 48, "eval_families": 6},
    "num_iterations": 1,
    "mining": {"strategy": {"type": "top_k", "negatives_per_query": 2, "extra_ranks": "all"}},
    "captioning": {"num_candidates": 2, "min_verify_probability": 0.0, "max_round_trip_rank": 66},
    "training": {"iteration_0_steps": 6, "steps_per_iteration": 6, "batch_size": 12},
    "runtime": {"checkpoint_every_steps": 2},
}
"""Checks on texts are lax here: what is tested is the machinery, not the model."""
STEADY: dict[str, Any] = {"lora": {"dropout": 0.0}, "learning_rate": 1e-5}
"""Without dropout, which two processes draw differently, and in small steps: Adam turns rounding of
near-zero gradients into full steps of either sign, which would drown what is compared."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full_share",
        type=int,
        default=1,
        metavar="N",
        help="of the tests marked `full`, one in N",
    )


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out all but one in N of the tests marked `full`."""
    every = config.getoption("full_share")
    left_out = [
        item
        for item in items
        if item.get_closest_marker("full") and not in_share(item.nodeid, every)
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One vision cache for the whole session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def small(cache: Path) -> Any:
    """Makes small configurations: `small(directory, num_iterations=2)`."""
    from cirloop.config.run import RunConfig

    def make(directory: Path, **changes: Any) -> RunConfig:
        settings = {k: dict(v) if isinstance(v, dict) else v for k, v in SMALL.items()}
        settings["runtime"]["cache_dir"] = cache
        for key, value in changes.items():
            old = settings.get(key, {})
            if isinstance(value, dict) and value.get("type", old.get("type")) == old.get("type"):
                settings[key] = {**old, **value}
            else:  # a plain value, or another member of a union
                settings[key] = value
        return RunConfig(experiment_dir=directory, **settings)

    return make


Made = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Returns the directory of this name, which the first of a session's processes fills."""
    temporary = tmp_path_factory.getbasetemp()
    runs = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "runs"
    runs.mkdir(exist_ok=True)

    def directory_of(name: str, fill: Callable[[Path], object]) -> Path:
        with FileLock(runs / f"{name}.lock"):
            if not (runs / f"{name}.made").exists():
                fill(runs / name)
                (runs / f"{name}.made").touch()
        return runs / name

    return directory_of


@pytest.fixture(scope="session")
def finished(small: Any, made_once: Made) -> Path:
    """The directory of an unbroken small run of one iteration, with a vision cache of its own.
    Copy it before changing anything."""
    from cirloop.cli import runner

    def fill(directory: Path) -> None:
        cache = directory.with_name("finished_cache")
        runner.run(small(directory, runtime={"cache_dir": cache}))

    return made_once("finished", fill)


@pytest.fixture(scope="session")
def steady(small: Any, made_once: Made) -> Path:
    """The directory of a small run without dropout, in small steps."""
    from cirloop.cli import runner

    return made_once("steady", lambda directory: runner.run(small(directory, training=STEADY)))


@dataclass(frozen=True)
class DataSetRun:
    """A small run on a stand-in of a data set."""

    run: Path
    data: Path
    results: list[dict[str, Any]]


@pytest.fixture(scope="session")
def run_on(small: Any, made_once: Made) -> Callable[[str], DataSetRun]:
    """Returns a run of one iteration on the data set of this type, the same one to every test."""
    from cirloop.cli import runner
    from tests.fake_datasets import DATA_SETS, write_cirr

    def run_of(name: str) -> DataSetRun:
        files = DATA_SETS[name]

        def fill(home: Path) -> None:
            directories = {"data_dir": files.write(home / "data")} if files.write else {}
            if name == "circo":
                directories["train_dir"] = write_cirr(home / "cirr")
            results = runner.run(
                small(
                    home / "run",
                    data={"type": name, **files.settings},
                    mining={"strategy": {"type": files.strategy, "negatives_per_query": 4}},
                    training={"iteration_0_steps": 2, "steps_per_iteration": 2, "batch_size": 8},
                    **directories,
                )
            )
            (home / "results.json").write_text(json.dumps(results))

        home = made_once(name, fill)
        results = json.loads((home / "results.json").read_text())
        return DataSetRun(home / "run", home / "data", results)

    return run_of


@pytest.fixture(scope="session")
def engine(finished: Path) -> Any:
    """What searches the gallery of the finished run."""
    from cirloop.tools.search.config import SearchOptions
    from cirloop.tools.search.engine import Engine

    return Engine(SearchOptions(experiment_dir=finished))
