"""cirloop: an iterative trainer for composed image retrieval (CIR).

The names of `__all__` are the API (docs/python.md). `import cirloop` loads none of what they need
and changes nothing in the process.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cirloop.api.datasets import load_dataset
    from cirloop.api.negatives import mine_negatives
    from cirloop.api.runs import load_run
    from cirloop.api.scores import evaluate
    from cirloop.api.training import train
    from cirloop.types import UserError

__version__ = "0.1.0"
API = {
    "UserError": "cirloop.types",
    "evaluate": "cirloop.api.scores",
    "load_dataset": "cirloop.api.datasets",
    "load_run": "cirloop.api.runs",
    "mine_negatives": "cirloop.api.negatives",
    "train": "cirloop.api.training",
}
"""Name of the API -> the module that has it."""
__all__ = ["UserError", "evaluate", "load_dataset", "load_run", "mine_negatives", "train"]


def __getattr__(name: str) -> object:
    """Return a name of the API, whose module is imported now."""
    if name not in API:
        raise AttributeError(f"module 'cirloop' has no attribute {name!r}")
    return getattr(importlib.import_module(API[name]), name)


def __dir__() -> list[str]:
    """Return the names of the API beside those that are loaded."""
    return sorted({*globals(), *API})
