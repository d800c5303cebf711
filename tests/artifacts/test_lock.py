"""One run at a time: the lock says who works, and ends with its process."""

from __future__ import annotations

import json
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

from cirloop.artifacts import run_lock
from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import Store
from cirloop.config.run import save
from cirloop.types import UserError

ROOT = Path(__file__).resolve().parents[2]
WORK = """
import sys
from pathlib import Path
from cirloop.artifacts.run_lock import run_lock
from cirloop.types import UserError
directory = Path(sys.argv[1])
sys.stdin.readline()
try:
    with run_lock(directory):
        print("in", flush=True)
        sys.stdin.readline()
except UserError as error:
    print("refused", error, flush=True)
"""
"""Waits for a line, takes the lock, and works until another line."""


@contextmanager
def workers(directory: Path, num: int = 1) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that are about to work in `directory`; killed at the end."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", WORK, str(directory)]
    made = [
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
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


def test_the_lock_says_who_works_and_goes_also_on_errors(tmp_path: Path) -> None:
    for error in (None, RuntimeError, KeyboardInterrupt):
        try:
            with run_lock.run_lock(tmp_path / "run"):
                owner = json.loads((tmp_path / "run" / run_lock.OWNER).read_text())["owner"]
                (tmp_path / "run" / "made").touch()
                if error:
                    raise error
        except (RuntimeError, KeyboardInterrupt) as raised:
            assert type(raised) is error
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["made"]
    assert f"process {os.getpid()} of" in owner and f"on {socket.gethostname()}, since 2" in owner


def test_a_working_run_is_named_and_a_killed_one_hinders_nobody(tmp_path: Path) -> None:
    with workers(tmp_path) as (worker,):
        go(worker)
        assert said(worker) == "in\n"
        owner = json.loads((tmp_path / run_lock.OWNER).read_text())["owner"]
        with (
            pytest.raises(UserError, match="--experiment_dir") as caught,
            run_lock.run_lock(tmp_path),
        ):
            raise AssertionError("two runs in one directory")
        assert owner in str(caught.value) and f"process {worker.pid} of" in owner
        worker.kill()
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet cleared away
        assert sorted(path.name for path in tmp_path.iterdir()) == [run_lock.FILE, run_lock.OWNER]
        with run_lock.run_lock(tmp_path):
            assert f"process {os.getpid()} of" in (tmp_path / run_lock.OWNER).read_text()
    assert not list(tmp_path.iterdir())


def test_of_runs_that_start_at_once_one_works(tmp_path: Path) -> None:
    for _ in range(3):
        with workers(tmp_path, 6) as started:
            for worker in started:
                go(worker)
            answers = sorted(said(worker).split()[0] for worker in started)
            assert answers == ["in", *["refused"] * 5]
    with run_lock.run_lock(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\x00", b"null", b"{}"])
def test_a_damaged_note_of_the_owner_frees_nothing_and_hinders_nobody(
    content: bytes, tmp_path: Path
) -> None:
    with run_lock.run_lock(tmp_path):
        (tmp_path / run_lock.OWNER).write_bytes(content)
        with pytest.raises(UserError, match="does not say which"), run_lock.run_lock(tmp_path):
            raise AssertionError
    (tmp_path / run_lock.OWNER).write_bytes(content)
    with run_lock.run_lock(tmp_path):
        assert str(os.getpid()) in (tmp_path / run_lock.OWNER).read_text()


def test_directories_are_made_and_go_again_when_nothing_came_into_them(tmp_path: Path) -> None:
    with run_lock.run_lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / run_lock.FILE).exists()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), run_lock.run_lock(tmp_path / "file" / "run"):
        raise AssertionError


def test_a_second_run_refuses_and_changes_nothing(small: Any, tmp_path: Path) -> None:
    from cirloop.cli import runner

    with run_lock.run_lock(tmp_path / "run"):
        save(small(tmp_path / "run"), tmp_path / "run" / "config.json")
        before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        for resume in (False, True):
            with pytest.raises(UserError, match="a run works in"):
                runner.run(small(tmp_path / "run", auto_resume=resume))
        assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_directory_of_something_else_gets_no_lock(small: Any, tmp_path: Path) -> None:
    from cirloop.cli import runner

    (tmp_path / "notes.txt").write_text("mine")
    os.utime(tmp_path, (1, 1))
    with pytest.raises(UserError, match="no run directory"):
        runner.run(small(tmp_path))
    assert tmp_path.stat().st_mtime == 1
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_those_who_only_read_leave_a_move_to_the_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for iteration in (0, 1):
        content = {"schema": 1, "iteration": iteration}
        name = f"accounting_iter_{iteration}.json"
        store.get_or_build(
            name, {}, [], lambda path, content=content: write_json(path, content), iteration
        )  # type: ignore[misc]
    store._finish_moves = lambda: None  # type: ignore[method-assign]  # the run is killed here
    store.archive_from(1)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    reader = Store(tmp_path, reading=True)
    assert reader.names == ["accounting_iter_0.json"]
    assert reader.load(*reader.names).read()["iteration"] == 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    Store(tmp_path)
    assert (tmp_path / "replaced_1" / "accounting_iter_1.json").exists()


def test_threads_of_one_process_do_not_share_a_lock(tmp_path: Path) -> None:
    found: list[str] = []

    def second() -> None:
        try:
            with run_lock.run_lock(tmp_path):
                found.append("in")
        except UserError:
            found.append("refused")

    with run_lock.run_lock(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert found == ["refused"]
