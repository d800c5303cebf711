"""What a process is set to before models compute in it, so that a result has the same bits again.

`import cirloop` sets nothing. Each command, each launched process and each training run does.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CPU = Path("/proc/cpuinfo")
VARIABLE = "MKL_CBWR"
ROW_BY_ROW = "AUTO,STRICT"
"""With it a row of a matrix product has the same bits whatever rows are beside it, so that no batch
size changes a result. MKL reads it at its first call."""
HARMLESS = (
    "The given NumPy array is not writable",  # memory-mapped vectors are only read
    "Sparse CSR tensor support is in beta",
)
"""Beginnings of torch's warnings that say nothing to a user."""


def needed_variables(cpu: Path = CPU) -> dict[str, str]:
    """Return the environment variables that this machine needs and that are not set yet.

    Only Intel's processors need one; others would get slower code by it.
    """
    is_intel = cpu.exists() and "GenuineIntel" in cpu.read_text("utf-8")
    return {VARIABLE: ROW_BY_ROW} if is_intel and VARIABLE not in os.environ else {}


def prepare_process() -> None:
    """Set up a process that is a command's own, for as long as it lives."""
    os.environ.update(needed_variables())
    for message in HARMLESS:
        warnings.filterwarnings("ignore", message)


@contextmanager
def prepared_process() -> Iterator[None]:
    """Set up a process that is somebody else's, and put its environment and its filters of warnings
    back at the end."""
    before = dict(os.environ)
    with warnings.catch_warnings():
        prepare_process()
        try:
            yield
        finally:
            for name in os.environ.keys() - before.keys():
                del os.environ[name]
            os.environ.update(before)
