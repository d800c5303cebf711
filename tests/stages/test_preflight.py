"""What is refused before any model is loaded."""

from __future__ import annotations

import pytest

from cirloop.config import recipes
from cirloop.config.runtime import Runtime
from cirloop.stages import preflight
from cirloop.validation import ValidationReport


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(deepspeed=recipes.CONFIGS / "deepspeed" / "zero2.json")
    found = ValidationReport()
    preflight._check_runtime(runtime, found)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    missing = ValidationReport()
    preflight._check_runtime(runtime, missing)
    assert found.rows == []
    assert [row.what for row in missing.rows] == ["DeepSpeed is not installed"]
    assert "pip install 'cirloop[train]'" in missing.remedies[0]
