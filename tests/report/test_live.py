"""The live view: on a real terminal and on a narrow one, what it shows and what it leaves
behind."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import pty
import re
import select
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyte
import pytest
from rich.console import Console

from cirloop.artifacts.store import Store
from cirloop.config.run import from_json
from cirloop.loop import expected_artifacts
from cirloop.monitoring import events
from cirloop.monitoring.console import progress
from cirloop.monitoring.costs import Costs
from cirloop.monitoring.live import LiveDisplay, RunHeader
from cirloop.monitoring.stage_names import stage_words
from cirloop.report.run_monitor import RunMonitor
from tests.commands import ROOT, environment
from tests.distributed.test_many import are_gone, processes
from tests.faults.harness import VERY_SMALL
from tests.monitoring.test_stopping import settings

ONE = """
compute_environment: LOCAL_MACHINE
distributed_type: "NO"
num_processes: 1
num_machines: 1
mixed_precision: "no"
use_cpu: true
"""
RECALLS = [
    ["iteration", "recall@1", "recall@5", "recall@10"],
    ["base", "22.4 ± 1.3", "60.1 ± 1.5", "75.3 ± 1.4"],
    *([str(t), f"{40 + t}.0 ± 1.6", "86.2 ± 1.1", "96.3 ± 0.6"] for t in range(6)),
]


class Terminal:
    """A pseudo terminal with a command in it, and what a person would see."""

    def __init__(self, words: list[str], columns: int, environment: dict[str, str]) -> None:
        self._screen = pyte.Screen(columns, 40)
        self._stream = pyte.ByteStream(self._screen)
        self.pid, self._end = pty.fork()
        if self.pid == 0:
            os.execve(words[0], words, environment)
        fcntl.ioctl(self._end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self._screen.display if line.strip()]

    @property
    def cursor_is_hidden(self) -> bool:
        return bool(self._screen.cursor.hidden)

    def look(self) -> bool:
        """Take in what has come; False once the terminal is shut."""
        if select.select([self._end], [], [], 0.1)[0]:
            try:
                data = os.read(self._end, 1 << 16)
            except OSError:  # what Linux says then
                return False
            self._stream.feed(data)
        return True

    def until(self, there: Callable[[str], Any]) -> str:
        deadline = time.monotonic() + 300
        while not there("\n".join(self.lines)):
            assert self.look() and time.monotonic() < deadline, "\n".join(self.lines)
        return "\n".join(self.lines)

    def type(self, keys: bytes) -> None:
        os.write(self._end, keys)

    def end(self) -> int:
        while self.look():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.full
def test_a_run_on_a_terminal_and_ctrl_c(small: Any, tmp_path: Path) -> None:
    """Training is in a launched process, which has the terminal."""
    (tmp_path / "one.yaml").write_text(ONE)
    runtime = {"num_workers": 0, "accelerate_config": tmp_path / "one.yaml"}
    training = {**VERY_SMALL["training"], "iteration_0_steps": 2000}
    changes = {"num_iterations": 1, "training": training, "runtime": runtime}
    config = small(tmp_path / "run", **{**VERY_SMALL, **changes})
    words = [sys.executable, str(ROOT / "train_iterative.py"), *settings(tmp_path, config)]
    terminal = Terminal(words, 90, environment(TERM="xterm"))
    bar = re.compile(r"train iteration 0 .* [1-9]\d*/2000 .*left \d")
    shown = terminal.until(bar.search)
    assert shown.count("train iteration 0") == 1 and "stage 2 of 8" not in shown, "two regions"
    there = [pid for pid, _ in processes(terminal.pid)]
    terminal.type(b"\x03")
    assert terminal.end() == 130
    assert not terminal.cursor_is_hidden
    last = terminal.lines
    assert last[-1] == "stopped; go on with --auto_resume"
    are_gone(there)
    log = (tmp_path / "run/logs/attempt_001.log").read_text()
    assert log.splitlines()[-1].endswith("interrupted; go on with --auto_resume")


class Screen:
    """A view on a terminal of so many columns."""

    def __init__(self, columns: int) -> None:
        self._out = io.StringIO()
        self.console = Console(
            file=self._out, force_terminal=True, width=columns, height=20, color_system=None
        )
        self.view = LiveDisplay(self.console)
        self._screen = pyte.Screen(columns, 60)
        self._stream = pyte.Stream(self._screen)

    @property
    def lines(self) -> list[str]:
        if self.view._live is not None:
            self.view._live.refresh()
        self._stream.feed(self._out.getvalue().replace("\n", "\r\n"))
        self._out.seek(0)
        self._out.truncate()
        return [line.rstrip() for line in self._screen.display if line.strip()]

    @property
    def cursor_is_hidden(self) -> bool:
        return bool(self._screen.cursor.hidden)


def head(**changes: Any) -> RunHeader:
    stage = {"stage": "checkpoint_iter_2", "number": 12, "of": 17, "seconds_left": 754.0}
    run = {"run": "experiments/a_run_with_a_long_name", "iteration": 2, "iterations": 3}
    return RunHeader(**{**run, **stage, "recalls": RECALLS, **changes})


@pytest.mark.parametrize("columns", [100, 40, 24])
def test_the_region_fits_the_terminal_and_goes_without_a_trace(columns: int) -> None:
    screen = Screen(columns)
    with events.subscribe(screen.view):
        events.emit("head", head=head())
        bar = progress(range(100), "train iteration 2")
        for _ in range(30):
            next(bar)
            lines = screen.lines
        screen.console.print("a log line")
        lines = screen.lines
        assert lines[0] == "a log line" and lines[1].startswith("stage 12 of 17: check"), lines
        # the stage, the bar, the columns, four evaluations
        assert len(lines) == 1 + 2 + 1 + 1 + 4, lines
        assert (lines[2].startswith("iteration 2 of 3") and "29" in lines[3]) or columns < 30
        assert [line.split()[0] for line in lines[5:]] == ["base", "3", "4", "5"]
        assert lines[4].split()[1:] == RECALLS[0][1:][: max(1, columns // 14 - 1)]
        if columns == 100:
            left = r"about 1[0-3] min left in all · experiments/a_run_with_a_long_name"
            assert re.search(left, lines[2]), lines[2]
            assert "22.4 ± 1.3" in lines[5] and "45.0 ± 1.6" in lines[8] and "29/100" in lines[3]
        # a process that is killed now would leave the terminal without one
        assert not screen.cursor_is_hidden
        bar.close()
        assert not [line for line in screen.lines if "29/100" in line]
        events.emit("head", head=None)
        assert screen.lines == ["a log line"] and not screen.cursor_is_hidden


def test_without_an_honest_estimate_there_is_none() -> None:
    screen = Screen(100)
    with events.subscribe(screen.view):
        for left, says in ((None, False), (0.5, True), (-1.0, False)):
            events.emit("head", head=head(seconds_left=left))
            assert ("left in all" in screen.lines[1]) == says
    screen.view.stop()


def test_the_view_shows_no_markup_and_no_signs_that_steer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "correct-horse")
    screen = Screen(100)
    with events.subscribe(screen.view):
        events.emit("head", head=head(run="[red]correct-horse\x1b[2J"))
        events.emit("bar", key="1", title="[b]x\x1b[2J", done=1, total=2)
        shown = "\n".join(screen.lines)
    assert "[red][hidden]\\x1b[2J" in shown and "[b]x\\x1b[2J" in shown
    screen.view.stop()


@pytest.mark.parametrize("columns", [100, 60])
def test_a_bar_shows_its_rate(columns: int) -> None:
    screen = Screen(columns)
    with events.subscribe(screen.view):
        for done, rate in ((0, ""), (1, "12.5 texts/s"), (2, "[b]13 texts/s")):
            events.emit("bar", key="1", title="captions: write", done=done, total=4, rate=rate)
            assert not rate or rate in "\n".join(screen.lines)
    screen.view.stop()


def test_a_plain_line_says_the_rate(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cirloop.monitoring.console.LINE_EVERY", -1.0)
    with caplog.at_level(logging.INFO, "cirloop"):
        batches = events.CountedBatches([1, 2], [5, 5], "texts/s")
        assert [*progress(batches, "captions: write")] == [1, 2]
    (said,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(r"captions: write: 1 of 2, about \d+ s left, [\d.e+]+ texts/s", said)


def test_no_terminal_has_plain_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("cirloop.monitoring.console.LINE_EVERY", -1.0)
    with caplog.at_level(logging.INFO, "cirloop"):
        assert [*progress([1, 2, 3], "embed")] == [1, 2, 3]
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(", about")[0] for line in said] == ["embed: 1 of 3", "embed: 2 of 3"]


def test_the_plan_is_what_a_run_makes(finished: Path) -> None:
    made = json.loads((finished / "manifest.json").read_text())["artifacts"]
    planned = expected_artifacts(from_json(finished / "config.json"), True)
    assert {*planned} == {*made}
    rows = json.loads((finished / "costs.json").read_text())["stages"]
    assert planned == [row["stage"] for row in rows]


@pytest.mark.parametrize(
    ("artifact", "words"),
    [
        ("evaluation_base.json", "base model, evaluation"),
        ("checkpoint_iter_0", "warm-up, training"),
        ("hard_negatives_iter_0.json", "iteration 1, mining"),
        ("augmented_samples_iter_1.json", "iteration 1, captions"),
        ("checkpoint_iter_12", "iteration 12, training"),
        ("something.json", "something.json"),
    ],
)
def test_stages_have_names_in_words(artifact: str, words: str) -> None:
    assert stage_words(artifact) == words


def test_the_time_left_is_that_of_stages_of_the_same_kind(small: Any, tmp_path: Path) -> None:
    training = {"iteration_0_steps": 50, "steps_per_iteration": 10}
    config = small(tmp_path / "run", num_iterations=2, training=training)
    costs, heads = Costs(tmp_path), list[RunHeader]()
    watch = RunMonitor(config, Store(tmp_path), costs, True)

    def left(name: str, iteration: int) -> float | None:
        with events.subscribe(lambda kind, what: heads.append(what["head"])):
            watch("begins", {"name": name, "iteration": iteration})
        return heads[-1].seconds_left

    assert left("evaluation_base.json", 0) is None
    seconds = {
        "evaluation_base.json": 9,
        "checkpoint_iter_0": 100,
        "evaluation_iter_0.json": 3,
        "hard_negatives_iter_0.json": 5,
        "augmented_samples_iter_1.json": 40,
        "accounting_iter_1.json": 1,
        "checkpoint_iter_1": 16,
    }
    rows = [
        {"stage": name, "seconds": s, "steps": 8 * name.startswith("check"), "finished": True}
        for name, s in seconds.items()
    ]
    costs._write(rows[:6])
    assert left("checkpoint_iter_1", 1) is None, "a round's training is not the warm-up"
    begun = {"stage": "evaluation_iter_1.json", "seconds": 999, "steps": 0, "finished": False}
    costs._write([*rows, begun])
    # evaluate; mine, caption, account, train 10 steps, evaluate
    two_rounds_more = 3 + 5 + 40 + 1 + 16 / 8 * 10 + 3
    assert left("evaluation_iter_1.json", 1) == pytest.approx(two_rounds_more)
    assert (heads[-1].number, heads[-1].of) == (8, 13)
