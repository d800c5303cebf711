"""Commands that meet a fault: from a state of an unbroken run, with the fault, then without."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from cirloop.artifacts.store import file_digests
from tests.faults.fork_server import OPEN, ROOT

LIMIT = 240
"""Seconds for a child; it takes about one, and on a busy machine a minute."""
LEFT_OUT = ("run/.work/", "run/logs/", "run/figures/")
NOT_COMPARED = {
    "run/costs.json",
    "run/config.json",
    "run/run.lock",
    "run/run.lock.json",
    "run/report.html",
}
"""They hold times, paths and processes; so do the logs of attempts."""
VERY_SMALL: dict[str, Any] = {
    "model": {"type": "qwen2_vl", "path": "tiny", "dtype": "float32"},
    "foundation": {"type": "qwen2_vl", "path": "tiny", "dtype": "float32"},
    "data": {"type": "shapes", "train_families": 3, "train_triplets": 12, "eval_families": 3},
    "num_iterations": 1,
    "mining": {"strategy": {"type": "top_k", "negatives_per_query": 1, "extra_ranks": "all"}},
    "captioning": {
        "num_candidates": 1,
        "min_verify_probability": 0.0,
        "max_round_trip_rank": 33,
        "max_new_tokens": 8,
    },
    "training": {
        "iteration_0_steps": 5,
        "steps_per_iteration": 5,
        "batch_size": 3,
        "negatives_in_batch": 1,
        "negatives": {"type": "ranked", "first_rank": 1, "last_rank": 6},
    },
    "runtime": {"checkpoint_every_steps": 2, "num_workers": 0},
}
"""Five steps and two step checkpoints a training stage: the second removes the first."""


@dataclass(frozen=True, slots=True)
class Ended:
    code: int
    said: str
    fired: bool
    events: tuple[tuple[str, str, str, str], ...]
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Scene:
    """A command, the state it starts from and the stage it ends before. `OUT` stands for the output
    directory."""

    flags: tuple[str, ...]
    start: str = OPEN
    next: str | None = None
    script: str = "train_iterative.py"
    config: str = "run.yaml"
    code: int = 0


SCENES = {
    "run": Scene(("--auto_resume",)),
    "mended": Scene(("--auto_resume",), start="broken", next="evaluation_iter_1.json"),
    "again": Scene(
        ("--resume_from_iteration", "1"), start="finished", next="accounting_iter_1.json"
    ),
    "evaluate": Scene(
        ("--iterations", "1", "--output_file", "OUT/out.json", "--submission", "OUT/submission"),
        start="finished",
        script="eval_iterative.py",
    ),
    "search": Scene(
        ("--reference", "shapes:val:00003"),
        start="finished",
        script="cirloop.search",
    ),
    "images": Scene(("--dry_run",), start="images", config="images.yaml"),
    "problems": Scene((), start="images", config="problems.yaml", code=2),
}


def tree(case: Path) -> dict[str, str]:
    """Digest per file of a case, hidden ones too; without what is in work, which goes when all is
    done."""
    found: dict[str, str] = {}
    for top in filter(Path.is_dir, case.iterdir()):
        found |= {f"{top.name}/{name}": digest for name, digest in file_digests(top).items()}
    kept = [n for n in found if n not in NOT_COMPARED and not n.startswith(LEFT_OUT)]
    return {name: found[name] for name in sorted(kept)}


def finished_artifacts(run: Path) -> dict[str, Any]:
    """The manifest's entries, after looking at every file of theirs."""
    if not (run / "manifest.json").exists():
        return {}
    entries: dict[str, Any] = json.loads((run / "manifest.json").read_text("utf-8"))["artifacts"]
    for name, entry in entries.items():
        assert file_digests(run / name) == entry["files"], f"{name} is listed and not whole"
    return entries


def copy_state(state: Path, case: Path) -> None:
    for part in ("run", "cache"):
        if (state / part).exists():
            unlocked = shutil.ignore_patterns("run.lock*")
            shutil.copytree(state / part, case / part, ignore=unlocked)


class Harness:
    """The server of children, and the states of an unbroken run in `home`."""

    def __init__(self, home: Path) -> None:
        self.home, self._number = home, 0
        (home / "run.yaml").write_text(yaml.safe_dump(VERY_SMALL))
        threads = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.fork_server", str(home / "run.yaml")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=home,
            env={**os.environ, **threads, "PYTHONPATH": paths},
        )  # fmt: skip
        self._recorded: dict[str, Ended] = {}

    def close(self) -> None:
        self._server.kill()
        self._server.wait()

    def answer(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, f"the server of children ended with {self._server.wait(30)}"
        return line

    @cached_property
    def _ready(self) -> str:
        return self.answer()

    def child(self, case: Path, scene: str, before: str | None = None, **told: Any) -> Ended:
        """The scene's command in a child, until the stage `before` begins; `told` goes to the
        server."""
        assert self._ready == "ready\n" and self._server.stdin is not None
        s, out = SCENES[scene], case / "out"
        flags = [flag.replace("OUT", str(out)) for flag in s.flags]
        config = ["--config", str(self.home / s.config)] if s.script == "train_iterative.py" else []
        # not on the case's disk, which may be full
        log, noted = self.home / "log.txt", self.home / "result.json"
        noted.write_text("")
        noted.chmod(0o666)  # the child may be another user
        request = {
            "script": s.script,
            "argv": [*config, "--experiment_dir", str(case / "run"), *flags],
            "before": before,
            "roots": {"RUN": str(case / "run"), "CACHE": str(case / "cache"), "OUT": str(out)},
            "limit": LIMIT,
            "log": str(log),
            "result": str(noted),
            **told,
        }
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        code = json.loads(self.answer())["code"]
        killed = '{"fired": true, "events": [], "seconds": {}}'
        result = json.loads(noted.read_text("utf-8") or killed)
        events = tuple(tuple(event) for event in result["events"])
        said = log.read_text("utf-8", "replace")
        return Ended(code, said, result["fired"], events, result["seconds"])

    def state(self, name: str) -> Path:
        """A state to start from: before a stage of the unbroken run, after all of it, or as a
        killed one left it."""
        if name == "broken":
            return self._broken
        if name == "images":
            return self._images
        self.recorded("run")
        return self.home / ("finished" if name == "finished" else f"states/{name}")

    def case(self, start: str) -> Path:
        """A new directory in the state `start`."""
        self._number += 1
        case, state = self.home / f"case_{self._number}", self.state(start)
        case.mkdir()
        copy_state(state, case)
        (case / "out").mkdir()
        return case

    @cached_property
    def _images(self) -> Path:
        """Data of one's own; the list of test queries names an image that is not there."""
        data = self.home / "data"
        (data / "images").mkdir(parents=True)
        for n in range(3):
            Image.new("RGB", (40, 40), (60 * n, 90, 30)).save(data / "images" / f"{n}.png")
        pairs = {f"q{n}": (f"{n}.png", f"{(n + 1) % 3}.png") for n in range(3)}
        rows = [
            {"id": name, "reference": reference, "text": "redder", "target": target}
            for name, (reference, target) in pairs.items()
        ]
        for split in ("train", "val"):
            (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        bad = {**rows[0], "target": "gone.png"}
        (data / "test.jsonl").write_text(json.dumps(bad) + "\n")
        own = {**VERY_SMALL, "data": {"type": "jsonl"}, "data_dir": str(data), "num_iterations": 0}
        for split, name in (("val", "images"), ("test", "problems")):
            settings = {**own, "evaluation": {"split": split}}
            (self.home / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        return self.home / "none"

    @cached_property
    def _broken(self) -> Path:
        """Killed twice in the last training stage: what both left is there."""
        case = self.case("checkpoint_iter_1")
        new = "RUN/.work/new/checkpoint_iter_*/adapter_config.json"
        for site, path in (
            ("backbones.adapter:TrainableWeights.save_adapter", new),
            ("config.run:save", "RUN/config.json"),
        ):
            fault = {"site": site, "op": "open", "path": path, "when": "during", "kind": "SIGKILL"}
            ended = self.child(case, "run", fault=fault)
            assert ended.code == -9, ended.said
        return case

    def recorded(self, scene: str) -> Ended:
        """The scene unbroken, with what it wrote. The scene `run` leaves the states that others
        start from."""
        if scene not in self._recorded:
            s = SCENES[scene]
            case = self.home / ("finished" if scene == "run" else f"unbroken_{scene}")
            state = None if s.start == OPEN else self.state(s.start)
            (case / "out").mkdir(parents=True)
            if state:
                copy_state(state, case)
            told = {"snapshots": str(self.home / "states")} if scene == "run" else {}
            ended = self.child(case, scene, s.next, **told)
            assert ended.code == s.code, ended.said
            self._recorded[scene] = ended
        return self._recorded[scene]

    def stages(self) -> list[str]:
        return [OPEN, *self.recorded("run").seconds]

    def expected(self, scene: str, before: str | None) -> dict[str, str]:
        """The files of the unbroken scene when the stage `before` begins; None = at the end."""
        self.recorded(scene)
        if scene != "run":
            return tree(self.home / f"unbroken_{scene}")
        return tree(self.state("finished" if before is None else before))

    def where(self, scene: str, op: str, site: str, path: str) -> str:
        """The shortest stage of a scene that meets a write point; for a directory the first, which
        makes it."""
        events = self.recorded(scene).events
        stages = {stage for stage, *point in events if point == [op, site, path]}
        assert stages, f"{scene} never comes to {op} of {path} in {site}"
        seconds = {OPEN: 0.0, **self.recorded(scene).seconds}
        if op == "mkdir":
            return next(stage for stage in seconds if stage in stages)
        return min(stages, key=lambda stage: seconds.get(stage, 0.0))


def age(case: Path) -> None:
    """An hour passes for files that were half-written when a process was killed."""
    for path in hidden(case):
        before = path.stat().st_mtime - 3600
        os.utime(path, (before, before))


def hidden(directory: Path) -> Iterator[Path]:
    return (path for path in directory.rglob(".*") if path.is_file())
