"""`import cirloop`, and touching each name of it, changes nothing in the process and takes no
time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cirloop
from cirloop import reproducibility
from tests.commands import python

STATE = """
import json, logging, os, signal, sys, time, warnings
def state():
    found = {
        "environment": dict(os.environ),
        "filters of warnings": [repr(each) for each in warnings.filters],
        "showing of warnings": repr(warnings.showwarning),
        "handlers": [repr(each) for each in logging.getLogger().handlers],
        "levels": [logging.getLogger().level, logging.getLogger("cirloop").level],
        "signals": [repr(signal.getsignal(each)) for each in sorted(signal.valid_signals())],
        "hooks": [repr(sys.excepthook), repr(sys.displayhook), sys.getrecursionlimit()],
        "directory": os.getcwd(),
    }
    if "torch" in sys.modules:
        import torch
        found["torch"] = [
            str(torch.get_default_dtype()), torch.get_num_threads(), torch.is_grad_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.initial_seed(),
            torch.get_float32_matmul_precision(), torch.backends.cudnn.benchmark,
            str(torch.get_default_device()),
        ]
    return found
"""


def run(code: str, **more: str) -> Any:
    """What a fresh process that knows `state()` writes as JSON on its last line."""
    done = python("-c", STATE + code, **more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_and_touching_changes_nothing() -> None:
    before, imported, touched, loaded = run(
        """
before = state()
import cirloop
imported = state()
for name in cirloop.__all__:
    assert getattr(cirloop, name).__doc__, name
heavy = [name for name in ("torch", "numpy", "pydantic", "transformers") if name in sys.modules]
print(json.dumps([before, imported, state(), heavy]))
"""
    )
    assert imported == before and touched == before
    assert loaded == [], "loaded by import cirloop"


def test_torch_is_as_it_was_after_the_import() -> None:
    before, touched = run(
        """
import torch
before = state()
import cirloop
[getattr(cirloop, name) for name in cirloop.__all__]
print(json.dumps([before, state()]))
"""
    )
    assert "torch" in before and touched == before


def test_mining_puts_back_what_it_sets() -> None:
    """Torch itself adds nothing to the environment, and is imported first: its filters stay."""
    before, after = run(
        """
import torch, torch.sparse, numpy as np
from cirloop.negatives import miner
import cirloop
before = state()
rows = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
rows.setflags(write=False)  # what torch would warn of
warnings.simplefilter("error")
before = state()
cirloop.mine_negatives(rows[:5], rows, range(5))
print(json.dumps([before, state()]))
"""
    )
    assert after == before


def test_importing_takes_no_time() -> None:
    code = "began = time.perf_counter(); import cirloop; print(time.perf_counter() - began)"
    assert min(run(code) for _ in range(3)) < 0.3


def test_names_are_those_of_the_module() -> None:
    assert {*cirloop.__all__} == cirloop.API.keys() <= {*dir(cirloop)}
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        cirloop.trian  # noqa: B018


@pytest.mark.parametrize(
    ("processor", "needed"), [("GenuineIntel", {"MKL_CBWR": "AUTO,STRICT"}), ("AuthenticAMD", {})]
)
def test_only_intel_s_processors_need_a_variable(
    processor: str, needed: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {processor}\n")
    monkeypatch.delenv("MKL_CBWR", raising=False)
    assert reproducibility.needed_variables(tmp_path / "cpuinfo") == needed
    assert reproducibility.needed_variables(tmp_path / "nowhere") == {}
    monkeypatch.setenv("MKL_CBWR", "OFF")
    assert reproducibility.needed_variables(tmp_path / "cpuinfo") == {}


INTEL = """
from pathlib import Path
from cirloop import reproducibility
reproducibility.needed_variables.__defaults__ = (Path(sys.argv[1]),)
"""


@pytest.mark.parametrize(
    "code",
    [
        "from cirloop.cli import entry; entry.main_wrapper(lambda: show())",
        "with reproducibility.prepared_process(): show()",
        "from cirloop.distributed.launcher import worker_environment\nshow(worker_environment())",
        "from cirloop.distributed import process; from types import SimpleNamespace\n"
        "process.serve(SimpleNamespace(driver=('elsewhere', 1), log=None), lambda: show())",
    ],
    ids=["command", "api", "launched", "process"],
)
def test_where_work_starts_the_variable_is_set(code: str, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("vendor_id\t: GenuineIntel\n")
    shown = f"""{INTEL}
def show(environment=os.environ):
    print(json.dumps(environment.get("MKL_CBWR")))
os.environ.pop("MKL_CBWR", None)
{code}
"""
    done = python("-c", STATE + shown, tmp_path / "cpuinfo")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == "AUTO,STRICT"
