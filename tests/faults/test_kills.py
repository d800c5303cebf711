"""`kill -9` at every write point: what was finished is whole, and the command again makes the
unbroken run's files."""

from __future__ import annotations

import pytest

from tests.faults.fault_case import goes_on, meets
from tests.faults.harness import Harness
from tests.faults.write_points import Case, kills
from tests.tiers import one_in


@pytest.mark.parametrize("case", one_in(100, kills()))
def test_killed(case: Case, harness: Harness) -> None:
    directory, ended, ends = meets(harness, case)
    assert ended.code == -9, ended.said
    goes_on(harness, directory, case.point.scene, ends)
