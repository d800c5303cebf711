"""What a run tells: a listener that fails hears nothing more, and ends nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from cirloop.monitoring import events, preemption


def test_a_listener_that_fails_is_logged_once_and_dropped(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[int] = []

    def bad(kind: str, what: dict[str, Any]) -> None:
        raise RuntimeError("a bug")

    with caplog.at_level(logging.WARNING), events.subscribe(bad, "the view"):
        with events.subscribe(lambda kind, what: heard.append(what["n"])):
            for n in range(3):
                events.emit("step", n=n)
        events.emit("step", n=3)
    assert heard == [0, 1, 2]
    (record,) = caplog.records
    assert record.getMessage().startswith("the view failed") and "a bug" in (record.exc_text or "")


def test_a_request_to_stop_passes() -> None:
    def stop(kind: str, what: dict[str, Any]) -> None:
        raise preemption.GracefulStop

    with events.subscribe(stop), pytest.raises(preemption.GracefulStop):
        events.emit("step")
