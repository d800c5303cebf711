"""A sample of many cases of one kind for the default tests; all of them run with `./run_tests.sh --full`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from typing import Any

import pytest


def one_in(every: int, *cases: Iterable[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """Parameters of a test: all combinations of the cases, of which but the 1st, (`every` + 1)th, ... are `full`.

    The parts of a combination are told apart by their names in the test's id.
    """
    combinations = list(product(*cases))
    return [
        pytest.param(*values, id="-".join(map(name, values)), marks=[pytest.mark.full] if place % every else [])
        for place, values in enumerate(combinations)
    ]
