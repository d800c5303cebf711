"""A command whose reader closes the pipe ends without a traceback."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from cirloop.io.pipes import READER_GONE, quiet_when_unread
from tests.commands import ROOT, environment

COMMANDS = {
    "help": ("-m", "cirloop", "--help"),
    "doctor": ("-m", "cirloop", "doctor"),
    "a command's help": ("-m", "cirloop", "init", "--help"),
    "a module": ("-m", "cirloop.export", "--help"),
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_a_reader_that_is_gone_is_no_error(words: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # as `head -0` would
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(60) in (READER_GONE, 0)  # argparse passes over it when it prints help
    assert "Traceback" not in said and "Exception ignored" not in said and "Broken" not in said


def test_both_streams_may_be_gone() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cirloop", "trian"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(60) == READER_GONE


def test_another_connection_that_breaks_is_an_error() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with ours, pytest.raises(BrokenPipeError), quiet_when_unread():
        ours.sendall(b"x")
