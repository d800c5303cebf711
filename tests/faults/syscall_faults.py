"""Faults where nothing is written: at the n-th call of a function of cirloop."""

from __future__ import annotations

import importlib
from typing import Any

from tests.faults.write_recorder import raise_fault


class Call:
    """Stands in front of `module:function`; the `nth` call meets the fault, or with NaN gives
    that."""

    def __init__(self, site: str, kind: str, nth: int = 1) -> None:
        module, _, name = site.partition(":")
        *path, self._name = name.split(".")
        self._owner: Any = importlib.import_module(f"cirloop.{module}")
        for part in path:
            self._owner = getattr(self._owner, part)
        self._kind, self._left, self.fired = kind, nth, False
        self._real = getattr(self._owner, self._name)

    def plant(self) -> None:
        call = self

        def stand_in(*args: Any, **options: Any) -> Any:
            call._left -= 1
            if call._left == 0:
                call.fired = True
                if call._kind == "NaN":
                    return call._real(*args, **options) * float("nan")
                raise_fault(call._kind, None)
            return call._real(*args, **options)

        setattr(self._owner, self._name, stand_in)


def plant(told: dict[str, Any]) -> Call:
    call = Call(**told)
    call.plant()
    return call
