"""Metrics of a stage: counters that its code adds to, and on request a trace of some batches.

`metering()` makes a `StageMetrics` the current one of this context. Code that runs inside adds to
it; where no stage is metered, adding does nothing. A worker process meters itself and writes a file
that its driver reads.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from cirloop.artifacts.fs import with_filename

T = TypeVar("T")
logger = logging.getLogger(__name__)
SEQUENTIAL_MAXIMA = frozenset({"memory_bytes", "gpu_bytes", "processes"})
"""Of pieces one after another, the largest counts; of all else, the sum."""
PARALLEL_MAXIMA = frozenset({"memory_bytes", "gpu_bytes", "seconds", "waiting", "writing"})
"""Of processes at once, the largest counts; of all else, the sum."""
TRACE_SCHEDULE = {"wait": 1, "warmup": 1, "active": 3}
"""Batches of a trace: left alone, run to warm up, recorded."""
FLOP_BATCHES = 2
"""Batches under the counter of operations; the last of them counts, since the first may make what
all need."""


@dataclass(slots=True)
class StageMetrics:
    """Metrics of one stage. The counters of several processes are sums."""

    seconds: float = 0.0
    waiting: float = 0.0
    """Seconds in which the host waited for images or features; a GPU may compute meanwhile what it
    was asked before."""
    images_encoded: int = 0
    images_cached: int = 0
    """Unlike images whose features lay on disk when the stage first wanted them."""
    items: int = 0
    """Images, or images with a text, that went through the embedder."""
    tokens: int = 0
    """Read by the language model, without padding; those of an image among them."""
    padding: int = 0
    """Places in its batches that hold none."""
    texts: int = 0
    writing: float = 0.0
    """Seconds in which a captioner wrote these texts: from the first batch of questions to the last
    answer."""
    tokens_written: int = 0
    triplets: int = 0
    steps: int = 0
    splits: int = 0
    """Batches that were halved for lack of memory."""
    flops: float = 0.0
    """Floating-point operations, as torch counts them in one batch of each kind, times the batches;
    0 = not counted."""
    processes: int = 1
    memory_bytes: int = 0
    """Most that the process ever had in memory (its largest one's), in bytes; not only in this
    stage."""
    gpu_bytes: int = 0
    """Most that torch had allocated on a GPU in this stage, in bytes."""

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as JSON, which `StageMetrics(**row)` reads back."""
        return asdict(self)

    def add_sequential(self, other: StageMetrics) -> None:
        """Add the metrics of a part of the stage; its seconds are already on the stage's clock."""
        for counter in fields(self):
            if counter.name != "seconds":
                own = getattr(self, counter.name)
                more = getattr(other, counter.name)
                setattr(
                    self,
                    counter.name,
                    max(own, more) if counter.name in SEQUENTIAL_MAXIMA else own + more,
                )

    @classmethod
    def merge_parallel(cls, rows: Sequence[Mapping[str, Any]]) -> StageMetrics:
        """Merge the metrics of processes that worked at once, from what `to_json` gave in each.

        Times are the longest of any process. FLOPs are counted in the first process, and the others
        are assumed to do as many.
        """
        merged = cls(
            **{
                name: (max if name in PARALLEL_MAXIMA else sum)([row[name] for row in rows])
                for name in StageMetrics.__annotations__
            }
        )
        merged.flops *= len(rows)
        return merged


class _Meter:
    """The current metrics, the images known to each vision tower, and the directory of traces."""

    def __init__(self, profile: Path | None) -> None:
        self.cost = StageMetrics()
        self.profile = profile
        self.inside = False
        self.known: dict[str, set[str]] = defaultdict(set)
        self.places = 0
        self.tokens: dict[Any, Any] = {}
        """Tokens in these places of batches, summed on each device: reading a number back makes the
        host wait for the device."""

    def read_tokens(self) -> None:
        """Put the tokens into the metrics."""
        tokens = sum(int(count) for count in self.tokens.values())
        self.cost.tokens += tokens
        self.cost.padding += self.places - tokens
        self.places = 0
        self.tokens.clear()


_current: ContextVar[_Meter | None] = ContextVar("cost", default=None)


@contextmanager
def metering(profile: Path | None = None) -> Iterator[StageMetrics]:
    """Meter what runs inside; times and peaks are set at the end. Traces go into `profile`, if
    given."""
    meter = _Meter(profile)
    began = time.monotonic()
    cuda = _cuda()
    if cuda is not None:
        cuda.reset_peak_memory_stats()
    before = _current.set(meter)
    try:
        yield meter.cost
        meter.read_tokens()
    finally:
        _current.reset(before)
        cost = meter.cost
        cuda = _cuda()
        cost.seconds = time.monotonic() - began
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        cost.memory_bytes = max(
            cost.memory_bytes, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        )
        cost.gpu_bytes = max(cost.gpu_bytes, cuda.max_memory_allocated() if cuda is not None else 0)
        with suppress(RuntimeError):  # of a device that failed, which the error in flight says
            meter.read_tokens()


def _cuda() -> Any:
    """Return torch.cuda if this process uses it already: looking must not allocate GPU memory."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_initialized() else None


@contextmanager
def worker_metrics(directory: Path, number: int, profile: Path | None) -> Iterator[None]:
    """Meter one of several processes, and write its metrics to a file of `directory`."""
    with metering(profile if number == 0 else None) as cost:
        yield
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".cost_{number}.json"
    with with_filename(temporary):
        temporary.write_text(json.dumps(cost.to_json()), "utf-8")
    temporary.replace(directory / f"cost_{number}.json")


@contextmanager
def collect_workers(directory: Path) -> Iterator[None]:
    """Add the metrics that `worker_metrics` of parallel processes wrote to `directory` to the
    current ones."""
    for stale in directory.glob("cost_*.json"):  # of an attempt that was stopped
        stale.unlink()
    yield
    rows = [json.loads(path.read_text("utf-8")) for path in sorted(directory.glob("cost_*.json"))]
    meter = _current.get()
    if meter is not None and rows:
        meter.cost.add_sequential(StageMetrics.merge_parallel(rows))


def add(**counts: float) -> None:
    """Add to counters of the current metrics, by their names."""
    meter = _current.get()
    if meter is not None:
        for name, count in counts.items():
            setattr(meter.cost, name, getattr(meter.cost, name) + count)


def add_tokens(inputs: Mapping[str, Any]) -> None:
    """Add the tokens of a model's `inputs` by its attention mask, and the positions that are
    padding."""
    meter = _current.get()
    mask = inputs.get("attention_mask")
    if meter is not None and mask is not None:
        meter.places += mask.numel()
        meter.tokens[mask.device] = meter.tokens.get(mask.device, 0) + mask.sum()


def count_cache_hits(tower: str, digests: Collection[str], missing: Collection[str] = ()) -> None:
    """Count as cached, once each, the images that the stage wants of a `tower` and that are not
    `missing`.

    Both are images by digest.
    """
    meter = _current.get()
    if meter is not None:
        fresh = {*digests} - meter.known[tower]
        meter.known[tower] |= fresh
        meter.cost.images_cached += len(fresh.difference(missing))


@contextmanager
def add_seconds(counter: str) -> Iterator[None]:
    """Add the seconds that pass inside to a counter."""
    began = time.monotonic()
    try:
        yield
    finally:
        add(**{counter: time.monotonic() - began})


def data_wait() -> AbstractContextManager[None]:
    """Count the seconds that pass inside as waiting for data."""
    return add_seconds("waiting")


def profile_batches(batches: Iterable[T], name: str) -> Iterator[T]:
    """Yield `batches`; where a profile is requested, trace some of them and count FLOPs in the
    first two.

    Writes `<name>.json.gz`, which chrome://tracing and ui.perfetto.dev show, unless it exists, and
    logs the longest operators. Loops inside such a loop are part of it.
    """
    meter = _current.get()
    if meter is None or meter.profile is None or meter.inside:
        yield from batches
        return
    from torch.utils.flop_counter import FlopCounterMode

    path = meter.profile / f"{name}.json.gz"
    num = 0
    flops = 0

    def save(profiler: Any) -> None:
        # Recording begins before its batch.
        if num > TRACE_SCHEDULE["wait"] + TRACE_SCHEDULE["warmup"]:
            _save_trace(profiler, path)

    meter.inside = True
    try:
        recording: Any = nullcontext() if path.exists() else _profiler(save)
        with recording as profiler:
            for batch in batches:
                num += 1
                counting: Any = (
                    FlopCounterMode(display=False) if num <= FLOP_BATCHES else nullcontext()
                )
                with counting as counter:
                    yield batch
                flops = counter.get_total_flops() if counter is not None else flops
                if profiler is not None:
                    profiler.step()
    finally:
        meter.inside = False
        meter.cost.flops += flops * num
    if not path.exists():
        logger.info("profile: too few batches of %s for a trace; the next ones are tried", name)


def _profiler(save: Callable[[Any], None]) -> Any:
    from torch.profiler import ProfilerActivity, profile, schedule, supported_activities

    activities = supported_activities() & {ProfilerActivity.CPU, ProfilerActivity.CUDA}
    return profile(
        activities=activities, schedule=schedule(**TRACE_SCHEDULE, repeat=1), on_trace_ready=save
    )


def _save_trace(profiler: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    profiler.export_chrome_trace(str(temporary))
    temporary.replace(path)
    rows = profiler.key_averages()
    device = "device" if any(row.self_device_time_total for row in rows) else "cpu"
    by = f"self_{device}_time_total"
    table = rows.table(sort_by=by, row_limit=10, max_name_column_width=40)
    logger.info("profile: %s; its longest operators:\n%s", path, table)
