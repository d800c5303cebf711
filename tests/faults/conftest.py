"""One server of children, and the states of one unbroken run, for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.harness import Harness


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    made = Harness(tmp_path_factory.mktemp("faults"))
    yield made
    made.close()
