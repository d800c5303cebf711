"""`logs/`: what the log of an attempt holds, how it ends, and that it can end nothing else."""

from __future__ import annotations

import logging
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from cirloop.monitoring import preemption, run_log
from cirloop.monitoring.run_log import RunLog
from cirloop.types import UserError
from tests.commands import command, logging_kept, python
from tests.faults.harness import VERY_SMALL
from tests.monitoring.test_stopping import settings, terminated_at

logger = logging.getLogger("cirloop.test")
LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (INFO|WARNING|ERROR) [\w.]+: ")


@pytest.fixture(autouse=True)
def kept() -> Any:
    """Loggers as the commands have them."""
    with logging_kept():
        logging.getLogger().handlers = []
        logging.getLogger("cirloop").setLevel(logging.INFO)
        yield


def messages(path: Path) -> list[str]:
    return [LINE.sub("", line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.full
def test_each_attempt_has_a_log_of_all_that_was_said(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse")
    config = small(tmp_path / "correct-horse", **{**VERY_SMALL, "num_iterations": 0})
    flags = settings(tmp_path, config)
    logs = config.directory / "logs"
    command("train_iterative.py", *flags, "--dry_run")
    assert not logs.exists()
    with terminated_at("start (checkpoint_iter_0)"):
        first = command("train_iterative.py", *flags)
    assert first.returncode == preemption.EXIT_PREEMPTED
    refused = command("train_iterative.py", *flags)
    assert refused.returncode == 2 and [path.name for path in logs.iterdir()] == ["attempt_001.log"]
    second = command("train_iterative.py", *flags, "--auto_resume")
    assert second.returncode == 0, second.stderr
    for number, done in ((1, first), (2, second)):
        path = logs / f"attempt_{number:03d}.log"
        assert all(LINE.match(line) for line in path.read_text("utf-8").splitlines())
        said, timed = messages(path), re.compile(r"\d\d:\d\d:\d\d ")
        told = [line[9:] for line in done.stderr.splitlines() if timed.match(line)]
        assert [line for line in told if line not in said] == [] and len(told) > 5
        assert said[0].startswith("cirloop ") and "train_iterative.py --config" in said[0]
        assert said[1] == "log of this attempt: " + str(path).replace("correct-horse", "[hidden]")
        assert "correct-horse" not in path.read_text("utf-8")
    assert re.fullmatch(r"ended after \d+ s: stopped by SIGTERM; go on with --auto_resume",
                        messages(logs / "attempt_001.log")[-1])  # fmt: skip
    assert messages(logs / "attempt_002.log")[-1].startswith("finished in ")


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (UserError("the model is gone"), "the model is gone"),
        (KeyboardInterrupt(), "interrupted; go on with --auto_resume"),
        (
            OSError(28, "No space left on device", "/x/y"),
            "/x/y: No space left on device. Free space",
        ),
        (RuntimeError("a bug"), "RuntimeError: a bug"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_reason_of_the_end_is_in_it(error: BaseException, last: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), RunLog(tmp_path) as attempt:
        path = attempt.open()
        raise error
    said = messages(path)
    assert last in said[-1], said
    assert ("Traceback (most recent call last):" in said) == isinstance(error, RuntimeError)
    handlers = logging.getLogger().handlers
    assert not [handler for handler in handlers if isinstance(handler, run_log.RotatingLog)]


def test_what_came_before_the_file_and_warnings_are_in_it(tmp_path: Path) -> None:
    before = warnings.showwarning
    with RunLog(tmp_path) as attempt:
        logger.info("12 images are missing")
        assert [*tmp_path.iterdir()] == []
        path = attempt.open()
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("an odd shape", UserWarning, stacklevel=1)
        logger.info("embed: 3 of 9", extra={"bar": True})
        logging.getLogger("other").debug("a detail")
    said = messages(path)
    assert said[1] == "12 images are missing" and "embed: 3 of 9" in said
    assert any("UserWarning: an odd shape" in line for line in said) and "a detail" not in said
    assert warnings.showwarning is before


def test_a_run_that_is_refused_leaves_no_log(tmp_path: Path) -> None:
    with pytest.raises(UserError), RunLog(tmp_path):
        raise UserError("no")
    assert [*tmp_path.iterdir()] == []


def test_a_log_and_their_number_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "MAX_LOGS", 3)
    monkeypatch.setattr(run_log, "MAX_BYTES", 2000)
    for number in range(1, 6):
        with RunLog(tmp_path) as attempt:
            assert attempt.open().name == f"attempt_{number:03d}.log"
            for line in range(200):
                logger.info("line %d %s", line, "x" * 40)
    files = sorted(path.name for path in (tmp_path / "logs").iterdir())
    parts = ["", ".1", ".2", ".3"]
    assert files == sorted(f"attempt_{n:03d}.log{part}" for n in (3, 4, 5) for part in parts)
    assert all(path.stat().st_size <= 2000 for path in (tmp_path / "logs").iterdir())
    assert "line 199" in (tmp_path / "logs/attempt_005.log").read_text()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_stops_the_beginning_and_nothing_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/attempt_001.log").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as error:
        run_log.RotatingLog(tmp_path / "logs/attempt_001.log")
    assert error.value.filename == str(tmp_path / "logs/attempt_001.log")
    logging.getLogger().addHandler(caplog.handler)
    with RunLog(tmp_path) as attempt:
        path = attempt.open()
        log = next(
            handler
            for handler in logging.getLogger().handlers
            if isinstance(handler, run_log.RotatingLog)
        )
        assert log.stream is not None
        log.stream.close()
        log.stream = open("/dev/full", "w")  # noqa: SIM115 - the handler closes it
        for number in range(3):
            logger.info("line %d", number)
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if "the log lacks lines from here on" in line] == [
        f"the log lacks lines from here on: {path}: No space left on device. Free space there (df,"
        " quota). What was finished is kept: then run the command again, train_iterative.py with"
        " --auto_resume."
    ]
    assert "line 2" in said


CHILD = """
import logging, os, sys, warnings
from pathlib import Path
from cirloop.monitoring.console import start_logging
from cirloop.distributed.process import _open_worker_log
start_logging(plain=True)
_open_worker_log(Path(sys.argv[1]))
logging.getLogger("cirloop.distributed.worker").warning("half of it is done")
print("a library says hello", flush=True)
os.write(2, b"C says hello\\n")
"""


@pytest.mark.full
@pytest.mark.parametrize("rank", ["0", "1"])
def test_launched_processes_have_logs_beside_the_attempts_and_the_first_the_terminal(
    rank: str, tmp_path: Path
) -> None:
    with RunLog(tmp_path) as attempt:
        path = attempt.open()
    done = python("-c", CHILD, path, RANK=rank)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / f"logs/attempt_001.rank_{rank}.log").read_text("utf-8")
    said = done.stdout + done.stderr
    assert "half of it is done" in log
    for line in ("half of it is done", "a library says hello", "C says hello"):
        assert (line in said) == (rank == "0")
    assert rank == "0" or ("a library says hello" in log and "C says hello" in log)


def test_a_logs_of_launched_processes_go_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "MAX_LOGS", 1)
    for _ in range(2):
        with RunLog(tmp_path) as attempt:
            path = attempt.open()
            path.with_suffix(".rank_0.log").touch()
    assert sorted(each.name for each in path.parent.iterdir()) == [
        "attempt_002.log",
        "attempt_002.rank_0.log",
    ]
