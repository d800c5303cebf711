"""The commands as a shell would start them, but in this process: starting Python and torch takes
seconds each time."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent


def environment(**more: str) -> dict[str, str]:
    """Of a process that imports the package and the tests, and has one thread."""
    paths = f"{ROOT / 'src'}{os.pathsep}{ROOT}"
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def python(*words: object, cwd: Path = ROOT, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own; `more` goes into its environment."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment(**more),
        cwd=cwd,
        timeout=600,
        capture_output=True,
        text=True,
        check=False,
    )


def in_two_processes(script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository in two processes of torch's launcher."""
    launch = "-m torch.distributed.run --nproc_per_node 2 --standalone".split()
    return python(*launch, ROOT / script, *words)


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """A command sets up logging for itself."""
    root, ours = logging.getLogger(), logging.getLogger("cirloop")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    root.handlers = []
    try:
        yield
    finally:
        root.handlers = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])


def command(script: str, *flags: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository's root, or a module (`python -m`), in `cwd`. What it does not
    catch is raised, not returned."""
    words, out, err = [str(ROOT / script), *map(str, flags)], io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.object(sys, "path", [str(Path(words[0]).parent), *sys.path]),
        mock.patch.dict(os.environ),
        warnings.catch_warnings(),
        logging_kept(),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = 0
        try:
            if script.endswith(".py"):
                runpy.run_path(words[0], run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())
