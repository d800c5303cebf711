"""The table of write points: who writes what below a run directory, its cache and the outputs of an
evaluation.

`test_table.py` compares it with what the commands were seen to write: a new write fails there until
it has a line here, and from the line its faults follow. RUN, CACHE and OUT are the directories, `*`
numbers and names of processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

TEXT = "mkdir open sync rename sync_dir"
"""`write_text` and `write_json`: beside the goal, synced, renamed."""
ARTIFACTS = (
    "accounting_iter_*.json",
    "augmented_samples_iter_*.json",
    "checkpoint_iter_*",
    "evaluation_*.json",
    "hard_negatives_iter_*.json",
    "ranked_negatives_iter_*.json",
)
NEW, WORK = "RUN/.work/new", "RUN/.work/checkpoint_iter_*"
CHECKPOINTS = "training.checkpoints:StepCheckpoints.write"
SHARD = "CACHE/vision/*/*"


@dataclass(frozen=True, slots=True)
class Point:
    """A call site, `module:function` below cirloop, what it writes, and by which operations."""

    site: str
    path: str
    ops: str
    scene: str = "run"

    @property
    def name(self) -> str:
        return f"{self.site.rpartition(':')[2]}-{self.path.removeprefix('RUN/')}"


POINTS = (
    # opening a run directory
    Point("artifacts.run_lock:run_lock", "RUN", "mkdir rmdir"),
    Point("artifacts.run_lock:run_lock", "RUN/run.lock", "open remove"),
    Point("artifacts.run_lock:run_lock", "RUN/run.lock.json", f"{TEXT} remove"),
    Point("config.run:save", "RUN/config.json", TEXT),
    Point(
        "cli.runner:open_run", "RUN/config.json", "remove", "mended"
    ),  # what a killed one left half-written
    Point("monitoring.run_log:RunLog.open", "RUN/logs", "mkdir"),
    Point("monitoring.run_log:RotatingLog.__init__", "RUN/logs/attempt_*.log", "open"),
    # an artifact: made aside by its stage, moved, listed
    Point("stages.account:account.build", f"{NEW}/accounting_iter_*.json", TEXT),
    Point("stages.caption:caption.build", f"{NEW}/augmented_samples_iter_*.json", TEXT),
    Point("stages.evaluate:evaluate.build", f"{NEW}/evaluation_*.json", TEXT),
    Point("stages.mine:mine.build", f"{NEW}/hard_negatives_iter_*.json", TEXT),
    Point(
        "stages.rank_negatives:rank_negatives.build", f"{NEW}/ranked_negatives_iter_*.json", TEXT
    ),
    Point("backbones.adapter:TrainableWeights.save_adapter", f"{NEW}/checkpoint_iter_*", "mkdir"),
    Point(
        "backbones.adapter:TrainableWeights.save_adapter",
        f"{NEW}/checkpoint_iter_*/adapter_model.safetensors",
        "save chmod",
    ),
    Point(
        "backbones.adapter:TrainableWeights.save_adapter",
        f"{NEW}/checkpoint_iter_*/adapter_config.json",
        "open",
    ),
    Point("distributed.worker:_train", f"{NEW}/checkpoint_iter_*/training_log.json", TEXT),
    *(
        Point("artifacts.store:Store.get_or_build", f"{NEW}/{artifact}", "remove sync")
        for artifact in ARTIFACTS
    ),
    *(
        Point("artifacts.store:Store.get_or_build", f"RUN/{artifact}", "remove rename")
        for artifact in ARTIFACTS
    ),
    Point(
        "artifacts.store:Store.get_or_build", f"{NEW}/checkpoint_iter_*", "rmtree", "mended"
    ),  # a killed one's
    Point("artifacts.store:Store.get_or_build", "RUN/.work", "mkdir"),
    Point("artifacts.store:Store.get_or_build", NEW, "mkdir"),
    Point("artifacts.store:Store.get_or_build", "RUN", "sync"),
    Point("artifacts.store:Store._write_manifest", "RUN/manifest.json", TEXT),
    Point("artifacts.store:Store.get_or_build", WORK, "rmtree"),
    Point("artifacts.store:Store.remove_scratch", "RUN/.work", "rmtree"),
    # what a captioner answered, as it comes
    Point("captioning.journal:Journal.add", "RUN/.work/answers", "mkdir"),
    Point("captioning.journal:Journal.add", "RUN/.work/answers/0.jsonl", "open"),
    # beside the artifacts
    Point("monitoring.costs:Costs._write", "RUN/costs.json", TEXT),
    Point("loop:iterate.note", "RUN/evaluation_results.json", TEXT),
    Point("report.page:write_figures", "RUN/figures", "mkdir"),
    Point("report.page:write_figures", "RUN/figures/*.svg", "open"),
    Point("report.page:write_figures", "RUN/figures/*.png", "open"),
    Point("report.page:write", "RUN/report.html", TEXT),
    # step checkpoints
    Point(CHECKPOINTS, WORK, "mkdir sync"),
    Point(CHECKPOINTS, f"{WORK}/new", "mkdir sync rename"),
    Point(CHECKPOINTS, f"{WORK}/new/state.safetensors", "save chmod"),
    Point(CHECKPOINTS, f"{WORK}/new/state.json", TEXT),
    Point(CHECKPOINTS, f"{WORK}/step_*", "rename"),
    Point("training.checkpoints:_remove", f"{WORK}/new", "rmtree"),
    Point(
        "distributed.worker:train", "RUN/bad_batch.json", "remove"
    ),  # of a batch that was bad before
    Point("monitoring.profiling:worker_metrics", WORK, "mkdir"),
    Point("monitoring.profiling:worker_metrics", f"{WORK}/.cost_0.json", "open"),
    Point("monitoring.profiling:worker_metrics", f"{WORK}/cost_0.json", "rename"),
    # iterations moved aside
    Point("artifacts.store:Store._finish_moves", "RUN/replaced_*", "mkdir", "again"),
    *(
        Point("artifacts.store:Store._finish_moves", f"RUN/replaced_*/{name}", "rename", "again")
        for name in (*ARTIFACTS[:4], ARTIFACTS[5], "evaluation_results.json")
    ),
    # the cache
    Point("backbones.tensor_cache:TensorCache.write", "CACHE", "mkdir"),
    Point("backbones.tensor_cache:TensorCache.write", "CACHE/vision", "mkdir"),
    Point("backbones.tensor_cache:TensorCache.write", "CACHE/vision/*", "mkdir"),
    Point("backbones.tensor_cache:TensorCache.write", SHARD, "save chmod remove"),
    Point("backbones.tensor_cache:TensorCache.write", f"{SHARD}.safetensors", "rename"),
    Point("backbones.tensor_cache:_touch", f"{SHARD}.safetensors", "utime"),
    Point("data.paths:DataPaths._check", "CACHE/images/*.json", TEXT, "images"),
    Point("stages.preflight:check", "CACHE/problems.json", TEXT, "problems"),
    # searching
    Point("tools.search.index:Index.write", "CACHE/search", "mkdir sync", "search"),
    Point("tools.search.index:Index.write", "CACHE/search/*", "save chmod sync remove", "search"),
    Point("tools.search.index:Index.write", "CACHE/search/*.safetensors", "rename", "search"),
    # eval_iterative.py
    Point("evaluation.submission:write", "OUT/submission", "mkdir", "evaluate"),
    Point("evaluation.submission:write", "OUT/submission/iter_*", "mkdir", "evaluate"),
    Point(
        "evaluation.submission:write",
        "OUT/submission/iter_*/shapes_val_rankings.json",
        TEXT,
        "evaluate",
    ),
    Point("cli.evaluate:evaluate_run", "OUT/out.json", TEXT, "evaluate"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """A fault at an operation of a point: before, after or in the middle of the `nth` one."""

    point: Point
    op: str
    when: str
    kind: str
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.kind}-{self.when}-{self.op}-{self.point.name}" + (
            f"-{self.nth}" if self.nth > 1 else ""
        )

    @property
    def fault(self) -> dict[str, object]:
        return {
            "site": self.point.site,
            "path": self.point.path,
            "op": self.op,
            "when": self.when,
            "kind": self.kind,
            "nth": self.nth,
        }


def kills() -> list[Case]:
    """kill -9 at every point: around each operation, and with half a file written."""
    moments = {
        "open": ("during",),
        "save": ("during", "after"),
        "rename": ("before", "after"),
        "sync": (),
        "utime": ("before",),
        "sync_dir": (),
        "chmod": (),
        "mkdir": ("after",),
        "rmtree": ("before", "after"),
        "remove": ("after",),
        "link": ("before", "after"),
        "rmdir": (),
    }
    found = []
    for point in POINTS:
        ops = [op for op in point.ops.split() if not (op == "mkdir" and point.ops == TEXT)]
        every = [Case(point, op, when, "SIGKILL") for op in ops for when in moments[op]]
        found += every or [Case(point, ops[0], "before", "SIGKILL")]
    return found


def refusals() -> list[Case]:
    """A disk that is full, failing or shut, at every point: where it opens something, and in the
    middle of a write."""
    numbers = cycle(["EROFS", "ENOSPC", "EACCES", "EIO", "EDQUOT"])
    found = []
    for point in POINTS:
        ops = point.ops.split()
        first = next(op for op in ("open", "save", "rename", *ops) if op in ops)
        found.append(Case(point, first, "before", next(numbers)))
        if first in ("open", "save"):
            found.append(Case(point, first, "during", "ENOSPC"))
        if point.ops == TEXT:
            found.append(Case(point, "sync", "before", "EIO"))
    return found
