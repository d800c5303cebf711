"""A process in which everything is imported, and which forks a child for each command of the
documents.

`python -m tests.docs.shell`: requests and answers are JSON lines. Importing takes longer than most
of the commands. A child is the real command, in the directory and with the words that a shell would
give it. It has one thread: a fork takes no other thread along.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.commands import ROOT

WARM = (
    "torch._dynamo",
    "peft",
    "accelerate",
    "transformers",
    "cirloop.cli.runner",
    "cirloop.cli.evaluate",
    "cirloop.distributed.worker",
    "cirloop.captioning.backends.qwen_vl",
    "cirloop.stages.mine",
    "cirloop.cli.mine_embeddings",
    "cirloop.tools.export_embeddings",
    "cirloop.tools.add_negatives.pipeline",
    "transformers.models.qwen2_vl.modeling_qwen2_vl",
    "transformers.models.qwen2_vl.processing_qwen2_vl",
    "pydantic_settings.sources",
    "rich.table",
    "rich.progress",
)


def warm() -> None:
    import torch
    import tqdm

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread
    for name in WARM:
        importlib.import_module(name)
    assert len(os.listdir("/proc/self/task")) == 1, "a child would lack the other threads"


def run(words: list[str]) -> int:
    """The exit code that Python would give for `python` and these words, or for `-c` and a text."""
    import torch

    torch.set_num_threads(1)  # torch makes its pool anew after a fork
    try:
        if words[0] == "bash":
            return subprocess.run(words, check=False).returncode
        if words[0] == "-c":
            exec(compile(words[1], "<document>", "exec"), {"__name__": "__main__"})
        elif words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [str(ROOT / words[0]), *words[1:]]
            sys.path.insert(0, str(Path(sys.argv[0]).parent))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # what Python itself does
        traceback.print_exc()
        return 1
    return 0


def fork(request: dict[str, Any]) -> int:
    """The exit code of a child, negative for a signal. With `until` it is interrupted once its
    output has that text."""
    log = Path(request["log"])
    log.write_text("")
    pid = os.fork()
    if pid == 0:
        os.setsid()  # what it starts can be ended with it
        handle = os.open(log, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(handle, number)
        os.chdir(request["cwd"])
        os.environ.update(request["env"])
        code = 1
        try:
            code = run(request["words"])
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end, until, told = time.monotonic() + request["limit"], request["until"], False
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return 0 if told else os.waitstatus_to_exitcode(status)
        if until and not told and until in log.read_text("utf-8", "replace"):
            os.kill(pid, signal.SIGINT)
            told, end = True, time.monotonic() + 20
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)


class Shell:
    """The process as its user sees it; it starts with the first command, whose output goes to the
    file `log`."""

    def __init__(self, log: Path) -> None:
        self.log = log

    @cached_property
    def _server(self) -> subprocess.Popen[str]:
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.docs.shell"],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "TOKENIZERS_PARALLELISM": "false",
            },
        )
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line == "ready\n", f"the server of children ended with {server.wait(30)}"
        return server

    def close(self) -> None:
        if "_server" in self.__dict__:
            self._server.kill()
            self._server.wait()

    def run(
        self,
        words: list[str],
        cwd: Path,
        limit: float,
        env: Mapping[str, str] | None = None,
        until: str = "",
    ) -> tuple[int, str]:
        """The exit code of Python with these words, and what it wrote. `limit` is in seconds;
        `until` as in `fork`."""
        server = self._server
        assert server.stdin is not None and server.stdout is not None
        request = {
            "words": words,
            "cwd": str(cwd),
            "log": str(self.log),
            "limit": limit,
            "env": dict(env or {}),
            "until": until,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code: int = json.loads(server.stdout.readline())["code"]
        return code, self.log.read_text("utf-8", "replace")


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed here is no answer
    warm()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"code": fork(json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
