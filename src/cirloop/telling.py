"""What a run tells those who watch it: how far a bar is, each training step, each stage. No result depends on them.

A listener is called with the kind of the news and what it says, in the thread that tells it:

- `bar`: `key`, `title`, `done`, `total` (None = not known); `done` None = the bar is over
- `step`: `row`, a step as the training log has it
- `begins`: `name`, `iteration` of an artifact, made or found; `ended`: the same and `artifact`
- `head`: what stands above the bars (`report.live.Head`); None = the run is over
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Listener = Callable[[str, dict[str, Any]], None]
_listeners: list[Listener] = []


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Within, `listener` hears what is told."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def tell(kind: str, **what: Any) -> None:
    """Nothing happens where nobody listens."""
    for listener in [*_listeners]:
        listener(kind, what)
