"""How many models are in memory, counted while the program works."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from transformers import Qwen2VLForConditionalGeneration

from cirloop.distributed import launcher
from cirloop.monitoring import events


class Census:
    """Counts the models that are in memory: whenever one is built, at each step of training, where
    each stage begins and ends, and when processes are launched. Those that no one refers to any
    more, but in a cycle, count too."""

    def __init__(self) -> None:
        gc.collect()
        self._before = {id(each) for each in self._alive()}
        self.stage, self.most, self.at_launch = "the start", dict[str, int](), list[int]()
        self.built = 0

    @staticmethod
    def _alive() -> list[Any]:
        return [each for each in gc.get_objects() if type(each) is Qwen2VLForConditionalGeneration]

    def count(self) -> int:
        num = sum(id(each) not in self._before for each in self._alive())
        self.most[self.stage] = max(num, self.most.get(self.stage, 0))
        return num

    def hear(self, kind: str, what: dict[str, Any]) -> None:
        if kind == "begins":
            self.stage = what["name"]
        if kind in ("begins", "ended", "step"):
            self.count()


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Census]:
    """Count while inside."""
    made, build, launched = Census(), Qwen2VLForConditionalGeneration.__init__, launcher._run

    def counting(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        made.built += 1
        made.count()

    def with_none(*args: Any, **kwargs: Any) -> None:
        made.at_launch.append(made.count())
        launched(*args, **kwargs)

    monkeypatch.setattr(Qwen2VLForConditionalGeneration, "__init__", counting)
    monkeypatch.setattr(launcher, "_run", with_none)
    with events.subscribe(made.hear):
        yield made
