"""cirloop: an iterative trainer for composed image retrieval (CIR)."""

import os
from pathlib import Path

__version__ = "0.1.0"

CPU = Path("/proc/cpuinfo")
if CPU.exists() and "GenuineIntel" in CPU.read_text("utf-8"):
    # A row of a matrix product then has the same bits whatever rows are beside it, so no batch size
    # changes a result. MKL reads this at its first call. Other vendors' processors would get slower
    # code by it.
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
