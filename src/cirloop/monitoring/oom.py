"""Out-of-memory errors: recognised, and explained with the settings that help."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cirloop.types import UserError

FAISS_MESSAGES = ("std::bad_alloc", "cudaMalloc error out of memory")
"""How FAISS says it, on a CPU and on a GPU."""


def is_oom(error: BaseException) -> bool:
    """Tell whether an error means that the memory of a device or of the machine did not suffice."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        should_reduce_batch_size(error) or any(words in str(error) for words in FAISS_MESSAGES)
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def explain_oom(task: str, ways: str) -> Iterator[None]:
    """Raise UserError with `ways`, the settings to change, where memory does not suffice inside."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_oom(error):
            raise
        raise UserError(f"{task}: {first_line(error)}\n{ways}") from error
