"""What each negative strategy mines on `shapes`, and what training on it buys. The truth is known,
so it is counted.

`--part table`: for the warm-up model of each seed, every strategy with no filter and with each
false-negative filter: how many images are mined or left, and the share of them that are right
answers. `--part recall`: arms that spend the same optimisation steps after one shared warm-up per
seed: the strategy's images as negatives, no new texts, against `control`, random images instead;
`strategy+filter` is an arm too, by default every filter after `top_k_all`. Prints recalls on
`shapes` test, mean and standard error over seeds, paired gains.

With `--data_dir` and `--towers` the table is of photographs of groceries, as
`study_photographs.py` trains on them, with the catalogue as what verifies.

    python benchmarks/study_negatives.py --part table --seeds 3
    python benchmarks/study_negatives.py --part recall --seeds 3
    python benchmarks/study_negatives.py --part table --data_dir data/grocery --towers towers
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import _study as study
import numpy as np
import study_photographs
import study_rounds
import torch
from _study import Study
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
OF_ATTRIBUTES = ("category_discrepant", "attribute_mismatch", "category_mix", "soft")
"""Strategies that need a lexicon of the images' attributes: those of groceries have none."""
PHOTOGRAPHS: dict[str, dict[str, Any]] = {
    "near_reference": {"type": "near_reference"},
    **{name: at for name, at in STRATEGIES.items() if name not in OF_ATTRIBUTES},
}
FILTERS_OF_PHOTOGRAPHS = {name: at for name, at in FILTERS.items() if name != "agreement"}
"""Without a second model: the towers have none before their combiner is trained."""
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
    strategy = {**(STRATEGIES | PHOTOGRAPHS)[name], "negatives_per_query": K}
    return {"strategy": strategy, "filters": filters} | (
        {"only_failed_queries": False} if name in ALL_QUERIES else {}
    )


def with_strategy(
    config: RunConfig, name: str, filters: list[dict[str, Any]], output: Path
) -> RunConfig:
    changes: dict[str, Any] = {"mining": mining(name, filters)}
    if config.data.type == "shapes":
        file = str(output / "metadata.json")
        changes["attributes"] = {"domain": "shapes", "image_source": "metadata", "file": file}
    return RunConfig(**config.model_dump(exclude={*changes}), **changes)


def mined_table(of: Study, args: argparse.Namespace) -> None:
    """Print the shares of right answers in what strategies and filters leave, nothing barred by the
    truth itself."""
    names = args.strategies.split(",")
    filters_here = FILTERS if of is STUDY else FILTERS_OF_PHOTOGRAPHS
    rows: list[dict[str, Any]] = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        warm = runner.open_run(share_iteration_0(of, args, seed))
        checkpoint, train = warm.store.load("checkpoint_iter_0"), warm.data.train
        oracle = train.oracle
        assert oracle is not None
        right = {t.query.id: oracle.positives(t.query) - {t.target} for t in train.triplets}
        unjudged = replace(warm.data, load_train=partial(replace, train, judge=None))
        for name, (title, filters) in product(names, filters_here.items()):
            config = with_strategy(warm.config, name, filters, args.output)
            run = RunContext(config, warm.store, unjudged)
            made = mine_split(run, warm.embedder(checkpoint), 0)["negatives"]
            false = sum(row["image"] in right[row["query"]] for row in made)
            of_arm = {"strategy": name, "filter": title, "seed": seed}
            rows.append(of_arm | {"mined": len(made), "false": false})
        write_json(args.output / "table.json", {"rows": rows})
    print_table(args, rows, names, [*filters_here])


def share_iteration_0(of: Study, args: argparse.Namespace, seed: int) -> RunConfig:
    """Train iteration 0 of a seed; return its settings."""
    study.share_iteration_0(of, args, seed)
    return study.config(of, args, seed, args.output / f"warm_{seed}", 0, "control")


def print_table(
    args: argparse.Namespace, rows: list[dict[str, Any]], names: list[str], filters: list[str]
) -> None:
    lines = []
    for name in names:
        cells = []
        for title in filters:
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
        ("strategy", *filters),
        lines,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["table", "recall"], required=True)
    parser.add_argument("--arms", default=",".join(ARMS), help="of --part recall")
    parser.add_argument("--strategies", help="rows of --part table, by default all")
    parser.add_argument("--data_dir", type=Path, help="the clone of GroceryStoreDataset")
    parser.add_argument("--towers", type=Path, default=Path("towers"), help="of photographs")
    parser.add_argument("--eval_queries", type=int, default=1000, help="of photographs")
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
    args.output = args.output.absolute()
    torch.set_num_threads(args.threads)
    logging.getLogger("cirloop").setLevel(logging.WARNING)
    if args.data_dir:
        if args.part != "table":
            parser.error("--data_dir is of --part table")
        args.strategies = args.strategies or ",".join(PHOTOGRAPHS)
        mined_table(study_photographs.STUDY, args)
        return
    args.strategies = args.strategies or ",".join(STRATEGIES)
    file = metadata(args.output / "metadata.json")
    if args.part == "table":
        mined_table(STUDY, args)
    else:
        recalls(args, file)


def recalls(args: argparse.Namespace, file: Path) -> None:
    """Train on what each strategy and filter leaves, and print the recalls."""
    for name, (title, filters) in product(STRATEGIES, FILTERS.items()):
        study_rounds.ARMS[f"{name}+{title}" if filters else name] = {
            "mining": mining(name, filters),
            "captioning": {"enabled": False},
            "attributes": {"domain": "shapes", "image_source": "metadata", "file": str(file)},
        }
    rows = []
    for seed in range(args.first_seed, args.first_seed + args.seeds):
        for arm in args.arms.split(","):
            rows.append(study.run_arm(STUDY, args, seed, arm))
            write_json(args.output / f"recall_{args.first_seed}.json", {"rows": rows})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    study.report(STUDY, rows, args.rounds)


if __name__ == "__main__":
    entry.main_wrapper(main)
