"""A process in which everything is imported and nothing runs, and which forks one child a request.

`python -m tests.faults.fork_server`: requests and answers are JSON lines. A child is the real
command on its own files. It has one thread: a fork takes no other thread along, and what those held
stays locked.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import threading
import time
import traceback
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
OPEN, END = "open", "end"


class Enough(BaseException):
    """The stage that a child goes as far as begins."""


IMPORTED = """
    torch._dynamo peft accelerate transformers tests.faults.write_recorder cirloop.cli.runner
    cirloop.cli.evaluate cirloop.distributed.worker cirloop.captioning.backends.qwen_vl
    cirloop.stages.mine transformers.models.qwen2_vl.modeling_qwen2_vl
    transformers.models.qwen2_vl.processing_qwen2_vl pydantic_settings.sources rich.table
    rich.progress
"""
"""What a run imports."""


def warm(config: Path) -> None:
    """Import what a run imports, and draw its data, which is Python alone."""
    import torch
    import tqdm

    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0  # no thread
    # its own lock is shared with the children, and one killed would keep it
    tqdm.tqdm.set_lock(threading.RLock())
    torch.set_num_interop_threads(1)
    for name in IMPORTED.split():
        importlib.import_module(name)
    use(config)
    assert len(os.listdir("/proc/self/task")) == 1, "a child would lack the other threads"


def use(config: Path) -> None:
    """Use once what imports or reads more at its first use."""
    from cirloop import report
    from cirloop.backbones import EmbedInput
    from cirloop.backbones.features import VisionCache
    from cirloop.config.run import load
    from cirloop.data.paths import DataPaths
    from cirloop.retrieval.embed import embed

    settings = load(["--config", str(config)], config)
    data = settings.data.build(DataPaths(None, settings.cache, lambda items, _: items))
    part = data.eval_splits(settings.evaluation.split)[0]
    backbone: Any = settings.model.build()
    features = VisionCache(backbone, part.images, settings.cache / "vision", settings.runtime)
    items = [EmbedInput(part.queries[0].reference, "a")]
    embed(backbone, features, items, 1, lambda items, _: items, "warm")
    _ = data.train
    report.page._template()


def watch_stages(request: dict[str, Any], watch: Any) -> list[tuple[str, float]]:
    """Stages from now on tell when they begin, in the list that is returned."""
    from cirloop.artifacts.store import Store

    marks: list[tuple[str, float]] = []

    def mark(stage: str) -> None:
        if stage == request.get("before"):
            raise Enough
        watch.stage = stage
        for name in ("run", "cache") if request.get("snapshots") else ():
            source = Path(request["roots"][name.upper()])
            if source.exists():
                shutil.copytree(source, Path(request["snapshots"]) / stage / name)
        marks.append((stage, time.monotonic()))

    make, clean = Store.get_or_build, Store.remove_scratch

    def making(store: Store, name: str, *rest: Any) -> Any:
        if name not in store.names:
            mark(name)
        return make(store, name, *rest)

    def cleaning(store: Store) -> None:
        mark(END)
        clean(store)

    Store.get_or_build, Store.remove_scratch = making, cleaning  # type: ignore[method-assign]
    return marks


def child(request: dict[str, Any]) -> int:
    """The command, with its faults; returns the exit code that Python would give."""
    import torch

    from tests.faults import syscall_faults
    from tests.faults.write_recorder import Watch

    # torch makes its pool anew after a fork, and not well in two threads at once
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(request["limit"], exit=True)
    roots = {name: Path(path) for name, path in request["roots"].items()}
    watch = Watch(roots, request.get("fault"))
    call = syscall_faults.plant(request["call"]) if request.get("call") else None
    marks = watch_stages(request, watch)
    code = command(request)
    marks.append(("", time.monotonic()))
    seconds = {stage: after - at for (stage, at), (_, after) in pairwise(marks)}
    fired = watch.fired or (call is not None and call.fired)
    result = {"fired": fired, "events": watch.events, "seconds": seconds}
    Path(request["result"]).write_text(json.dumps(result))
    return code


def command(request: dict[str, Any]) -> int:
    if request.get("uid"):
        os.setgroups([])
        os.setgid(request["uid"])
        os.setuid(request["uid"])
    if request.get("file_bytes"):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"], resource.RLIM_INFINITY))
    sys.argv = [str(ROOT / request["script"]), *request["argv"]]
    try:
        if request["script"].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(request["script"], run_name="__main__")
    except Enough:
        return 0
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:  # what Python itself does
        traceback.print_exc()
        return 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return 0


def fork(request: dict[str, Any]) -> int:
    """The exit code of a child, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(log, number)
        code = 1
        try:
            code = child(request)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    until = time.monotonic() + request.get("kill_after", request["limit"] + 10)
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed here is no answer
    warm(Path(sys.argv[1]))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps({"code": fork(json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
