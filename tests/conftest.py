"""Shared pieces: the tiers, and a very small run of the real program on the embedded data and
model.

Tests marked `full` are left out by default (pyproject.toml); `./run_tests.sh --full` runs them too,
and .ci/run the `--full_share` of them that it can afford.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from tests.tiers import in_share

# Of every property test 30 examples, the same ones each time; with `--hypothesis-profile full` 500
# new ones. A slow machine is no failure.
common = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("default", common, max_examples=30, derandomize=True)
settings.register_profile("full", common, max_examples=500, derandomize=False, print_blob=True)
settings.load_profile("default")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

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


@pytest.fixture(scope="session")
def finished(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an unbroken small run of one iteration, which the processes of a session of
    tests share. Copy it before changing anything."""
    from cirloop.cli import runner

    temporary = tmp_path_factory.getbasetemp()
    runs = (temporary.parent if "PYTEST_XDIST_WORKER" in os.environ else temporary) / "runs"
    runs.mkdir(exist_ok=True)
    with FileLock(runs / "lock"):  # the first process makes it
        if not (runs / "made").exists():
            runner.run(small(runs / "finished"))
            (runs / "made").touch()
    return runs / "finished"


@pytest.fixture(scope="session")
def engine(finished: Path) -> Any:
    """What searches the gallery of the finished run."""
    from cirloop.tools.search.config import SearchOptions
    from cirloop.tools.search.engine import Engine

    return Engine(SearchOptions(experiment_dir=finished))
