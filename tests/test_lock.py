"""One run at a time: the lock says who works, outlives a kill, and is taken over only where nobody does."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cirloop import lock
from cirloop.artifacts import Store, write_json
from cirloop.types import UserError

ROOT = Path(__file__).resolve().parent.parent
WORK = """
import sys
from pathlib import Path
from cirloop import lock
from cirloop.types import UserError
directory = Path(sys.argv[1])
sys.stdin.readline()
try:
    with lock.held(directory):
        print("in", flush=True)
        sys.stdin.readline()
except UserError as error:
    print("refused", error, flush=True)
"""
"""Waits for a line, takes the lock, and works until another line."""
needs_proc = pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no /proc")


@contextmanager
def workers(directory: Path, num: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are about to work in `directory`; killed at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", WORK, str(directory)]
    made = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(num)
    ]
    try:
        yield made
    finally:
        for each in made:
            each.kill()
            each.communicate()


def go(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("\n")
    worker.stdin.flush()


def said(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline()


def write(directory: Path, **changes: Any) -> Path:
    """A lock as this process would write it, with changes; what is changed to `...` is left out."""
    directory.mkdir(exist_ok=True)
    record = {name: value for name, value in (lock._record() | changes).items() if value is not ...}
    (directory / lock.FILE).write_text(json.dumps(record))
    return directory / lock.FILE


def test_the_lock_says_who_works_and_goes_also_on_errors(tmp_path: Path) -> None:
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with lock.held(tmp_path / "run"):
                there = json.loads((tmp_path / "run" / lock.FILE).read_text())
                (tmp_path / "run" / "made").touch()
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt) as raised:
            assert type(raised) is error
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["made"]
    assert there["schema"] == 1 and there["pid"] == os.getpid() and there["host"] == socket.gethostname()
    assert all(there[name] for name in ("owner", "began", "command"))


def test_a_working_run_is_named_and_a_killed_one_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with workers(tmp_path) as (worker,):
        go(worker)
        assert said(worker) == "in\n"
        there = json.loads((tmp_path / lock.FILE).read_text())
        with pytest.raises(UserError) as caught, lock.held(tmp_path):
            raise AssertionError("two runs in one directory")
        for words in (there["owner"], there["host"], f"process {worker.pid}", there["began"], "--experiment_dir"):
            assert words in str(caught.value)
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet cleared away
        with caplog.at_level(logging.INFO), lock.held(tmp_path):
            assert json.loads((tmp_path / lock.FILE).read_text())["pid"] == os.getpid()
    assert f"process {worker.pid}" in caplog.text and "stale" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stale", [False, True])
def test_of_runs_that_start_at_once_one_works(stale: bool, tmp_path: Path) -> None:
    for _ in range(3):
        if stale:
            write(tmp_path, pid=2**22 + 1)
        with workers(tmp_path, 6) as started:
            for worker in started:
                go(worker)
            answers = sorted(said(worker).split()[0] for worker in started)
            assert answers == ["in", *["refused"] * 5]
        (tmp_path / lock.FILE).unlink()


def test_a_stale_lock_that_another_takes_over_first_is_left_to_it(tmp_path: Path) -> None:
    path, found = write(tmp_path, pid=2**22 + 1), list[str]()

    def late() -> None:
        try:
            with lock.held(tmp_path):
                found.append("in")
        except UserError:
            found.append("refused")

    with path.open("r+b") as stale:
        fcntl.flock(stale, fcntl.LOCK_EX)
        thread = threading.Thread(target=late)
        thread.start()
        thread.join(0.3)  # it has read the stale lock, and waits for its turn
        taken = json.dumps(lock._record())
        (tmp_path / "aside").write_text(taken)
        (tmp_path / "aside").replace(path)
    thread.join()
    assert found == ["refused"] and path.read_text() == taken


@needs_proc
def test_a_number_given_out_again_is_no_working_run(tmp_path: Path) -> None:
    process = lock._record()["process"]
    for other in ({"started": process["started"] - 1}, {"boot": "another"}):
        write(tmp_path, process=process | other)
        with lock.held(tmp_path):
            assert json.loads((tmp_path / lock.FILE).read_text())["process"] == process


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "kill"),
        ({"process": ...}, "kill"),
        ({"host": "elsewhere"}, "delete"),
        ({"host": "elsewhere", "pid": 2**22 + 1}, "delete"),
        pytest.param({"process": lock._record()["process"] | {"namespace": "pid:[1]"}}, "delete", marks=needs_proc),
        ({"schema": 2}, "later version"),
        ({"pid": "many"}, "damaged"),
        ({"pid": 0}, "damaged"),
        ({"owner": ...}, "damaged"),
        ({"schema": ...}, "damaged"),
    ],
)
def test_a_lock_that_may_be_held_is_left(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = write(tmp_path, **changes)
    before = path.read_bytes()
    with pytest.raises(UserError, match=says) as caught, lock.held(tmp_path):
        raise AssertionError
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
    assert str(path) in str(caught.value) or says == "kill"


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\x00", b"null"])
def test_a_damaged_lock_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / lock.FILE).write_bytes(content)
    with pytest.raises(UserError, match="damaged") as caught, lock.held(tmp_path):
        raise AssertionError
    assert str(tmp_path / lock.FILE) in str(caught.value) and (tmp_path / lock.FILE).read_bytes() == content


def test_a_run_whose_lock_was_deleted_leaves_the_next_ones(tmp_path: Path) -> None:
    with lock.held(tmp_path):
        (tmp_path / lock.FILE).unlink()
        other = write(tmp_path, began="later")
    assert other.exists()


def test_directories_are_made_and_go_again_when_nothing_came_into_them(tmp_path: Path) -> None:
    with lock.held(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / lock.FILE).exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises((UserError, NotADirectoryError)), lock.held(tmp_path / "file" / "run"):
        raise AssertionError


def test_a_second_run_refuses_and_changes_nothing(small: Any, tmp_path: Path) -> None:
    from cirloop import experiment

    with lock.held(tmp_path / "run"):
        write_json(tmp_path / "run" / "config.json", small(tmp_path / "run").resolved())
        before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        for resume in (False, True):
            with pytest.raises(UserError, match="a run works in"):
                experiment.run(small(tmp_path / "run", auto_resume=resume))
        assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_directory_of_something_else_gets_no_lock(small: Any, tmp_path: Path) -> None:
    from cirloop import experiment

    (tmp_path / "notes.txt").write_text("mine")
    os.utime(tmp_path, (1, 1))
    with pytest.raises(UserError, match="no run directory"):
        experiment.run(small(tmp_path))
    assert tmp_path.stat().st_mtime == 1 and [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_those_who_only_read_leave_a_move_to_the_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for iteration in (0, 1):
        content = {"schema": 1, "iteration": iteration}
        name = f"accounting_iter_{iteration}.json"
        store.make(name, {}, [], lambda path, content=content: write_json(path, content), iteration)  # type: ignore[misc]
    store._finish_moves = lambda: None  # type: ignore[method-assign]  # the run is killed here
    store.set_aside(1)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    reader = Store(tmp_path, reading=True)
    assert reader.names == ["accounting_iter_0.json"] and reader.find(*reader.names).read()["iteration"] == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    Store(tmp_path)
    assert (tmp_path / "replaced_1" / "accounting_iter_1.json").exists()


def test_threads_of_one_process_do_not_share_a_lock(tmp_path: Path) -> None:
    found: list[str] = []

    def second() -> None:
        try:
            with lock.held(tmp_path):
                found.append("in")
        except UserError:
            found.append("refused")

    with lock.held(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert found == ["refused"]
