"""Which tests run when: by default, with `./run_tests.sh --full`, or in the share of these that
.ci/run takes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def one_in(every: int, *cases: Iterable[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """Parameters of a test: all combinations of the cases, of which but the 1st, (`every` + 1)th,
    ... are `full`.

    The parts of a combination are told apart by their names in the test's id.
    """
    combinations = list(product(*cases))
    return [
        pytest.param(
            *values,
            id="-".join(map(name, values)),
            marks=[pytest.mark.full] if place % every else [],
        )
        for place, values in enumerate(combinations)
    ]


def in_share(test: str, every: int) -> bool:
    """Whether a test is of the one in `every` chosen by their names, which are the same ones each
    time."""
    return zlib.crc32(test.encode()) % every == 0
