"""A report of a large run: seconds, peak memory and size of `train_iterative.py --report_only` on
made-up artifacts.

Data in the `jsonl` form with real JPEG files, and the artifacts of a finished run with everything a
report reads: per iteration 28,000 queries with their best five images, mined images and captions.
The numbers are drawn, the forms are the program's own. The report is made in a process of its own,
twice: the first also looks at every image of the data set, which a run has done before.

    python benchmarks/large_report.py
    python benchmarks/large_report.py --iterations 30 --queries 2000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cirloop.artifacts.atomic import write_checked, write_json
from cirloop.artifacts.store import Store
from cirloop.config.run import RunConfig, save
from cirloop.evaluation.significance import compare_iterations
from cirloop.monitoring.profiling import StageMetrics

ROOT = Path(__file__).resolve().parent.parent
REASONS = ("not verified", "round trip", "a surer text was kept", "declined", "too short")
TEXTS = (
    "the same in red",
    "with longer sleeves",
    "a smaller one, seen from the side",
    "without the pattern",
)
LIMITS = {"seconds": 60.0, "MB of memory": 1500.0, "MB of the file": 20.0}


def make_data(directory: Path, queries: int, images: int, texts: Sequence[str] = TEXTS) -> None:
    """`train.jsonl` and `val.jsonl` with ids `train/0`, ..., and `images` JPEG files of 160 x
    120."""
    folder = directory / "images"
    folder.mkdir(parents=True)
    noise = Image.effect_noise((40, 30), 60)
    for n in range(images):
        tint = Image.new("RGB", (40, 30), ((37 * n) % 256, (91 * n) % 256, (151 * n) % 256))
        picture = Image.blend(tint, noise.convert("RGB"), 0.35).resize(
            (160, 120), Image.Resampling.BICUBIC
        )
        picture.save(folder / f"{n:06d}.jpg", quality=85)
    for split in ("train", "val"):
        rows = [
            {
                "reference": name(n, images),
                "target": name(n + 1, images),
                "text": texts[n % len(texts)],
            }
            for n in range(queries)
        ]
        (directory / f"{split}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows), "utf-8"
        )


def name(n: int, images: int) -> str:
    return f"{n % images:06d}.jpg"


class Made:
    """A run directory whose artifacts are made up. `parts` of them are finished."""

    def __init__(self, config: RunConfig, queries: int, images: int, k: int) -> None:
        self.config, self.queries, self.images, self.k = config, queries, images, k
        self.draw = random.Random(0)
        self.results: list[dict[str, Any]] = []
        config.directory.mkdir(parents=True)
        self.store = Store(config.directory)
        self.store.initialize(
            save(config, config.directory / "config.json"), config.directory / "config.json"
        )
        self.costs: list[dict[str, Any]] = []

    def run(self, parts: int | None = None) -> Store:
        """Make the first `parts` artifacts (None = all), in the order of a run."""
        jobs: list[tuple[str, Any]] = [
            ("evaluation_base.json", self.evaluation("base")),
            *self.trained(0),
        ]
        for t in range(1, self.config.num_iterations + 1):
            jobs += [
                (f"hard_negatives_iter_{t - 1}.json", self.mined(t - 1)),
                (f"augmented_samples_iter_{t}.json", self.written(t)),
                *self.trained(t),
            ]
        for each, build in jobs[:parts]:
            digits = [int(part) for part in each.removesuffix(".json").split("_") if part.isdigit()]
            self.store.get_or_build(each, {}, [], build, digits[0] if digits else 0)
            cost = StageMetrics(
                seconds=60.0, images_encoded=self.images, items=self.queries, tokens=1000
            )
            self.costs.append({"stage": each, "attempt": 1, "finished": True, **cost.to_json()})
        write_checked(self.config.directory / "costs.json", "costs", {"stages": self.costs})
        bare = [{n: v for n, v in r.items() if n not in ("ranks", "top")} for r in self.results]
        found = {"schema": 4, "results": bare, "compared": compare_iterations(self.results)}
        write_json(self.config.directory / "evaluation_results.json", found)
        return self.store

    def trained(self, t: int) -> list[tuple[str, Any]]:
        def build(path: Path) -> None:
            rows = [
                {"step": n + 1, "loss": round(3 / (1 + 0.01 * n) + self.draw.random(), 6)}
                for n in range(500)
            ]
            write_json(path / "training_log.json", {"schema": 1, "steps": 500, "rows": rows})

        return [
            (f"checkpoint_iter_{t}", build),
            (f"evaluation_iter_{t}.json", self.evaluation(str(t))),
        ]

    def evaluation(self, label: str) -> Any:
        def build(path: Path) -> None:
            ranks, tops = [], []
            for n in range(self.queries):
                rank = 1 + int(self.draw.expovariate(0.2))
                ranks.append([f"val/{n}", rank, float(rank == 1), name(n, self.images)])
                tops.append([name(n + 1 + place - rank, self.images) for place in range(1, 11)])
            at = {
                f"recall@{k}": round(sum(row[1] <= k for row in ranks) / len(ranks), 6)
                for k in (1, 5, 10, 50)
            }
            errors = {
                metric: round((p * (1 - p) / len(ranks)) ** 0.5, 6) for metric, p in at.items()
            }
            content = {
                "schema": 4,
                "iteration": label,
                "split": "jsonl_val",
                "queries": self.queries,
                "gallery": self.images,
                "missing_images": 0,
                "dropped_queries": 0,
                "protocol": "made up",
                "ablated": None,
                "model": "m",
                "metrics": at,
                "standard_errors": errors,
                "compared_on": "recall@1",
                "ranks": ranks,
                "top": tops,
            }
            self.results.append(content)
            write_json(path, content)

        return build

    def mined(self, t: int) -> Any:
        def build(path: Path) -> None:
            rows = [
                {
                    "query": f"train/{n}",
                    "image": name(n + 2 + j, self.images),
                    "rank": 1 + j,
                    "score": round(0.6 + 0.1 * self.draw.random(), 6),
                    "target_rank": self.k + 1,
                    "target_score": 0.55,
                    "strategy": "top_k" if j else "top_k, filled by random",
                }
                for n in range(self.queries)
                for j in range(self.k)
            ]
            even = {"mean": 0.55, "25%": 0.5, "median": 0.55, "75%": 0.6}
            summary = {
                "queries": self.queries,
                "target_first": 0,
                "queries_mined": self.queries,
                "left_out": {},
                "filters": [{"filter": "near_duplicate", "seen": 9, "dropped": 2}],
                "negatives": len(rows),
                "similarity": {"positive": even, "negative": even},
            }
            write_json(
                path,
                {
                    "schema": 3,
                    "iteration": t,
                    "strategy": {"type": "top_k", "k": self.k},
                    "summary": summary,
                    "negatives": rows,
                },
            )

        return build

    def written(self, t: int) -> Any:
        """Two texts per mined image; every third is accepted."""

        def build(path: Path) -> None:
            accepted: list[dict[str, Any]] = []
            rejected: list[dict[str, Any]] = []
            for n in range(2 * self.k * self.queries):
                source, image = f"train/{n % self.queries}", name(n + 2, self.images)
                reference, text = name(n, self.images), TEXTS[n % len(TEXTS)]
                checks = {"verify": round(self.draw.random(), 6), "round_trip_rank": 1 + n % 9}
                if n % 3 == 0:
                    query = {"id": f"{source}/{t}", "reference": reference, "text": text}
                    accepted.append(
                        {
                            "triplet": {"query": query, "target": image},
                            "source": source,
                            "iteration": t,
                            "captioner": "m",
                            "prompt": "p",
                            "checks": checks,
                        }
                    )
                else:
                    rejected.append(
                        {
                            "source": source,
                            "reference": reference,
                            "image": image,
                            "original_text": text,
                            "text": text,
                            "reason": REASONS[n % len(REASONS)],
                            "checks": checks,
                        }
                    )
            why = {reason: sum(row["reason"] == reason for row in rejected) for reason in REASONS}
            summary = {
                "mined": self.k * self.queries,
                "candidates": len(accepted) + len(rejected),
                "accepted": len(accepted),
                "rejected": why,
            }
            write_json(
                path,
                {
                    "schema": 1,
                    "iteration": t,
                    "summary": summary,
                    "accepted": accepted,
                    "rejected": rejected,
                },
            )

        return build


def settings(directory: Path, iterations: int, **changes: Any) -> RunConfig:
    """Of a run that used data beside it and a model that is nowhere: a report loads none."""
    told: dict[str, Any] = {
        "model": {"type": "qwen2_vl", "path": "nowhere/no-model"}, "data": {"type": "jsonl"},
        "data_dir": directory / "data", "num_iterations": iterations,
    }  # fmt: skip
    return RunConfig(experiment_dir=directory / "run", **(told | changes))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=28_000)
    parser.add_argument("--images", type=int, default=17_000)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--k", type=int, default=5, help="mined images of a query")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        home, began = Path(place), time.monotonic()
        make_data(home / "data", args.queries, args.images)
        config = settings(home, args.iterations)
        Made(config, args.queries, args.images, args.k).run()
        size = sum(path.stat().st_size for path in config.directory.rglob("*.json")) / 1e6
        what = f"{args.queries} queries, {args.images} images, {args.iterations} iterations"
        print(
            f"{what}: {size:.0f} MB of JSON, made in {time.monotonic() - began:.0f} s", flush=True
        )
        command = [
            sys.executable,
            str(ROOT / "train_iterative.py"),
            "--report_only",
            "--experiment_dir",
            str(config.directory),
        ]
        held = True
        for turn in ("first, with a look at every image", "again"):
            began = time.monotonic()
            child = subprocess.Popen(command, cwd=ROOT)
            _, status, used = os.wait4(child.pid, 0)
            if status:
                sys.exit(f"--report_only ended with {os.waitstatus_to_exitcode(status)}")
            unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
            size = (config.directory / "report.html").stat().st_size
            values = (time.monotonic() - began, used.ru_maxrss * unit / 1e6, size / 1e6)
            told = [
                f"{value:.1f} of at most {limit:.0f} {what}"
                for (what, limit), value in zip(LIMITS.items(), values, strict=True)
            ]
            busy = used.ru_utime + used.ru_stime
            print(f"{turn}: {', '.join(told)}; {busy:.1f} s of a processor", flush=True)
            held = held and all(
                value < limit for limit, value in zip(LIMITS.values(), values, strict=True)
            )
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
