"""What each negative strategy mines on `shapes`, and what training on it buys. The truth is known,
so it is counted.

`--part table`: for the warm-up model of each seed, every strategy with no filter and with each
false-negative filter: how many images are mined or left, and the share of them that are right
answers. `--part recall`: arms that spend the same optimisation steps after one shared warm-up per
seed: the strategy's images as negatives, no new texts, against `control`, random images instead;
`strategy+filter` is an arm too, by default every filter after `top_k_all`. Prints recalls on
`shapes` test, mean and standard error over seeds, paired gains.

    python benchmarks/study_negatives.py --part table --seeds 3
    python benchmarks/study_negatives.py --part recall --seeds 3
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import Any

import _study as study
import numpy as np
import study_rounds
import torch
from study_rounds import STUDY

from cirloop.artifacts.atomic import write_json
from cirloop.cli import entry, runner
from cirloop.config.run import RunConfig
from cirloop.data.shapes.load import image_id
from cirloop.data.shapes.splits import build_splits
from cirloop.monitoring.console import table
from cirloop.stages.context import RunContext
from cirloop.stages.mine import mine_split

K = 3
CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "center",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)
ALL_QUERIES = ("random", "top_k_all")
"""Which mine for every query, also one whose target is first, against their strategy's default."""
STRATEGIES: dict[str, dict[str, Any]] = {
    "random": {"type": "random"},
    "in_batch": {"type": "in_batch", "batch_size": 32},
    "top_k": {"type": "top_k"},
    "top_k_all": {"type": "top_k", "extra_ranks": "all"},
    "semantic": {"type": "semantic"},
    "semi_hard": {"type": "semi_hard"},
    "online_hardest": {"type": "online_hardest"},
    "margin": {"type": "margin", "relative_margin": 0.05},
    "band": {"type": "band"},
    "band_released": {"type": "band", "variant": "released"},
    "category_discrepant": {"type": "category_discrepant"},
    "attribute_mismatch": {"type": "attribute_mismatch"},
    "soft": {"type": "soft"},
    "category_mix": {"type": "category_mix"},
    "diverse": {"type": "diverse"},
    "knn_text": {"type": "knn_text"},
    "mixture": {
        "type": "mixture",
        "parts": [{"strategy": {"type": "top_k"}}, {"strategy": {"type": "random"}}],
    },
    "curriculum": {
        "type": "curriculum",
        "stages": [{"type": "random"}, {"type": "semi_hard"}],
        "last_iteration": 2,
    },
}
FILTERS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    "score_margin": [{"type": "score_margin", "margin": 0.05}],
    "near_duplicate": [{"type": "near_duplicate"}],
    "verify": [{"type": "verify"}],
    "agreement": [{"type": "agreement", "path": "tiny"}],
}
"""The margin is 0.05; near duplicates are those of a cosine of 0.95, verified those of a
probability of 0.5, and the second model to agree is the base model: defaults but for the margin and
the model."""
ARMS = [
    "control",
    *STRATEGIES,
    *(f"top_k_all+{title}" for title, filters in FILTERS.items() if filters),
]


def metadata(path: Path) -> Path:
    """What a shop would know of its images: colours, shapes, sizes and places, as lists."""
    scenes = build_splits()["train"]
    rows = {
        image_id("train", row): {
            "color": sorted({o.color for o in scene if o}),
            "shape": sorted({o.shape for o in scene if o}),
            "size": sorted({o.size for o in scene if o}),
            "position": [CELLS[cell] for cell, o in enumerate(scene) if o],
        }
        for row, scene in enumerate(scenes.scenes)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, rows)
    return path


def mining(name: str, filters: list[dict[str, Any]]) -> dict[str, Any]:
    """The settings of a strategy of the study."""
    strategy = {**STRATEGIES[name], "negatives_per_query": K}
    return {"strategy": strategy, "filters": filters} | (
        {"only_failed_queries": False} if name in ALL_QUERIES else {}
    )


def with_strategy(
    config: RunConfig, name: str, filters: list[dict[str, Any]], output: Path
) -> RunConfig:
    told = {"domain": "shapes", "image_source": "metadata", "file": str(output / "metadata.json")}
    changes = {"mining": mining(name, filters), "attributes": told}
    kept = config.model_dump(exclude={"mining", "attributes"})
    return RunConfig(**kept, **changes)


def mined_table(args: argparse.Namespace) -> None:
    names = args.strategies.split(",")
    rows: list[dict[str, Any]] = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        directory = args.output / f"warm_{seed}"
        config = study.config(STUDY, args, seed, directory, 0, "control")
        runner.run(config)
        warm = runner.open_run(config)
        checkpoint, oracle, train = (
            warm.store.load("checkpoint_iter_0"),
            warm.data.train.oracle,
            warm.data.train,
        )
        assert oracle is not None
        right = {t.query.id: oracle.positives(t.query) - {t.target} for t in train.triplets}
        for name in names:
            for title, filters in FILTERS.items():
                run = RunContext(
                    with_strategy(config, name, filters, args.output), warm.store, warm.data
                )
                made = mine_split(run, warm.embedder(checkpoint), 0)["negatives"]
                false = sum(row["image"] in right[row["query"]] for row in made)
                rows.append(
                    {
                        "strategy": name,
                        "filter": title,
                        "seed": seed,
                        "mined": len(made),
                        "false": false,
                    }
                )
        write_json(args.output / "table.json", {"rows": rows})
    lines = []
    for name in names:
        cells = []
        for title in FILTERS:
            mine = [r for r in rows if r["strategy"] == name and r["filter"] == title]
            shares = [100 * r["false"] / r["mined"] for r in mine if r["mined"]]
            cells.append(
                f"{study.mean_se(shares)}% of {np.mean([r['mined'] for r in mine]):.0f}"
                if shares
                else "none"
            )
        lines.append([name, *cells])
    table(
        f"False negatives among mined images, {args.seeds} seeds, by filter",
        ("strategy", *FILTERS),
        lines,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["table", "recall"], required=True)
    parser.add_argument("--arms", default=",".join(ARMS), help="of --part recall")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="rows of --part table")
    parser.add_argument("--output", type=Path, default=Path("experiments/study_negatives"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first_seed", type=int, default=1)
    for name, value in (
        ("rounds", 2),
        ("families", 100),
        ("triplets", 400),
        ("eval_families", 182),
        ("warm_up", 60),
        ("steps", 60),
        ("batch_size", 32),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--split", default="test")
    parser.add_argument("--variant", type=int, default=1)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("cirloop").setLevel(logging.WARNING)
    file = metadata(args.output / "metadata.json")
    told = {"domain": "shapes", "image_source": "metadata", "file": str(file)}
    for name in STRATEGIES:
        for title, filters in FILTERS.items():
            study_rounds.ARMS[f"{name}+{title}" if filters else name] = {
                "mining": mining(name, filters),
                "captioning": {"enabled": False},
                "attributes": told,
            }
    if args.part == "table":
        mined_table(args)
        return
    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for arm in args.arms.split(","):
            rows.append(study.run_arm(STUDY, args, seed, arm))
            write_json(args.output / f"recall_{args.first_seed}.json", {"rows": rows})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    study.report(STUDY, rows, args.rounds)


if __name__ == "__main__":
    entry.main_wrapper(main)
