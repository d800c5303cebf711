"""A disk that is full, failing or shut, at every write point: one clear error, and nothing is
lost."""

from __future__ import annotations

import pytest

from tests.faults.fault_case import REFUSED, goes_on, meets, refused_clearly
from tests.faults.harness import Harness
from tests.faults.write_points import WORK, Case, refusals
from tests.tiers import one_in


@pytest.mark.parametrize("case", one_in(100, refusals()))
def test_refused(case: Case, harness: Harness) -> None:
    directory, ended, ends = meets(harness, case)
    if case.op == "rmtree" and case.point.path in ("RUN/.work", WORK):  # what it served is done
        assert ended.code == 0 and "delete it" in ended.said, ended.said
    elif case.op == "utime" or (
        case.op == "mkdir" and case.point.site == "monitoring.profiling:worker_metrics"
    ):  # the directory is there
        assert ended.code == 0, ended.said
    elif case.point.site.startswith("report.page:"):  # no result depends on the report
        assert ended.code == 0 and "the report failed" in ended.said, ended.said
    else:
        assert ended.code == REFUSED, ended.said
        refused_clearly(ended.said, directory)
    goes_on(harness, directory, case.point.scene, ends)
