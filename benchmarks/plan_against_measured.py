"""The plan's arithmetic of memory against what a model takes, in bytes: weights, what autograd
keeps of a training step, weights with optimizer, and keys and values of captions. With `--runs N`
the plan's seconds against those of N runs, by stage.

A random Qwen2-VL of about 100 million weights trains a LoRA around a bfloat16 base, its adapters in
float32 and in bfloat16. What autograd keeps is each storage that its graph saves, counted once,
without the model's own weights.

A run is one round of `tiny` on a part of `shapes`, in this process, right after its rates were
measured. Where others use the machine, wall-clock seconds say little: those of the processor that
this process had are compared, and the table says how many times as many passed. `--changed`: the
run has other batches than those that the rates were measured with.

    python benchmarks/plan_against_measured.py [--size small]
    python benchmarks/plan_against_measured.py --runs 3 [--changed]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _model import SIZES, write_model

ROWS, TOKENS, NEW_TOKENS = 2, 64, 16
RANK = 16


@dataclass
class Kept:
    """Storages that autograd saves, by their address; those in `apart` are not counted."""

    apart: set[int]
    sizes: dict[int, int] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)

    def pack(self, tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.apart:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)  # so that its address is not used again
        return tensor

    @property
    def total(self) -> int:
        return sum(self.sizes.values())


def inputs_of(vlm: Any) -> Any:
    """Embeddings and masks of ROWS rows of TOKENS tokens, one of them padded: (ROWS, TOKENS, D)."""
    import torch

    torch.manual_seed(0)
    ids = torch.randint(0, 500, (ROWS, TOKENS))
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    mask[0, -8:] = 0
    positions = torch.arange(TOKENS).expand(3, ROWS, TOKENS)
    return {
        "inputs_embeds": vlm.get_input_embeddings()(ids),
        "attention_mask": mask,
        "position_ids": positions,
    }


def step(directory: Path, adapter: str, checkpointing: bool) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward pass, and of weights that are trained with gradients
    and optimizer."""
    import torch

    from cirloop.backbones import LoraSettings, Qwen2VLSettings
    from cirloop.training.config import TrainingSettings
    from cirloop.training.master_weights import MasterWeights

    settings = Qwen2VLSettings(
        path=str(directory), dtype="bfloat16", gradient_checkpointing=checkpointing
    )
    backbone: Any = settings.build()
    backbone.make_trainable(TrainingSettings(lora=LoraSettings(r=RANK)), 0)
    trained = backbone.trainable()
    master_weights = MasterWeights(trained, torch.bfloat16) if adapter == "bfloat16" else None
    optimizer = torch.optim.AdamW(
        master_weights.copies.values() if master_weights else trained.values()
    )
    backbone.module.train()
    kept = Kept({p.untyped_storage().data_ptr() for p in backbone.vlm.parameters()})
    inputs = inputs_of(backbone.vlm)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        hidden = backbone.module.hidden(**inputs)
        loss = hidden[:, -1].float().square().sum()
    loss.backward()
    optimizer.step()
    ours = [*trained.values(), *(master_weights.copies.values() if master_weights else [])]
    state = [each for of in optimizer.state.values() for each in of.values() if each.ndim]
    gradients = [p.grad for p in ours if p.grad is not None]
    return kept.total, sum(each.nbytes for each in [*ours, *state, *gradients])


def captions(directory: Path) -> tuple[int, int]:
    """Bytes of the weights, and of keys and values of questions as they were read and with room for
    answers."""
    from transformers import DynamicCache

    from cirloop.backbones.vision import load_vlm
    from cirloop.captioning.decoding import PreallocatedCacheLayer
    from cirloop.captioning.prefix_cache import cache_argument

    vlm, _, _ = load_vlm(str(directory), directory, "bfloat16", "sdpa")
    cache = DynamicCache()
    language_model = vlm.model.language_model
    language_model(**inputs_of(vlm), **cache_argument(language_model, cache), use_cache=True)
    layers: Any = cache.layers
    past = [(layer.keys, layer.values) for layer in layers]
    roomy = [PreallocatedCacheLayer(each, TOKENS + NEW_TOKENS) for each in past]
    made = [*(t for each in past for t in each), *(t for each in roomy for t in each._buffers)]
    return sum(p.nbytes for p in vlm.parameters()), sum(tensor.nbytes for tensor in made)


def measure(size: str) -> dict[str, tuple[int, int]]:
    """By the name of a part, its bytes as planned and as measured."""
    import torch

    from cirloop.backbones.base import LoraSettings
    from cirloop.stages import resources

    targets = LoraSettings().target_modules
    with TemporaryDirectory() as name:
        directory = Path(name)
        write_model(directory, size, "bfloat16")
        sizes = resources.model_sizes(directory)
        tokens, weights = ROWS * TOKENS, resources.adapter_weights(sizes, RANK, targets)
        with torch.no_grad():
            base, key_values = captions(directory)
        rows = {
            "weights": (resources.weight_bytes(sizes, "bfloat16"), base),
            "keys and values of captions":
                (resources.caption_bytes(sizes, "bfloat16", ROWS, TOKENS, NEW_TOKENS), key_values),
        }  # fmt: skip
        for adapter, copies in (("float32", 0), ("bfloat16", 2)):
            per_token = resources.activation_bytes(
                sizes, "bfloat16", adapter, RANK, targets, 0.1, on_cpu=True
            )
            kept, trained = step(directory, adapter, False)
            rows[f"activations, adapters in {adapter}"] = (per_token * tokens, kept)
            rows[f"adapters and optimizer, {adapter}"] = (
                resources.trained_bytes(weights, copies),
                trained,
            )
    return rows


RUN: dict[str, Any] = {
    "model": {"type": "qwen2_vl", "path": "tiny", "dtype": "float32"},
    "foundation": {"type": "qwen2_vl", "path": "tiny", "dtype": "float32"},
    "num_iterations": 1,
    "captioning": {"num_candidates": 2, "min_verify_probability": 0.6, "max_round_trip_rank": 3},
    "mining": {"strategy": {"type": "top_k", "negatives_per_query": 3}},
}
CHANGED: dict[str, Any] = {"batch_size": 24, "grad_cache_chunk_size": 6}
"""Of training, in the runs of `--changed`."""
STAGES = {
    "evaluation_base": "evaluate base, 0",
    "checkpoint_iter_0": "train 0",
    "evaluation_iter_0": "evaluate base, 0",
    "judge_iter_1": "judge",
    "hard_negatives_iter_0": "mine",
    "augmented_samples_iter_1": "caption",
    "checkpoint_iter_1": "train",
    "evaluation_iter_1": "evaluate",
}
"""Artifact -> the plan's stage."""


def config_of(directory: Path, args: argparse.Namespace, name: str, **training: Any) -> Any:
    from cirloop.config.run import RunConfig

    steps = {"iteration_0_steps": args.steps, "steps_per_iteration": args.steps}
    data = {
        "type": "shapes",
        "train_families": args.families,
        "train_triplets": 15 * args.families // 2,
        "eval_families": args.families // 2,
    }
    runtime = {"cache_dir": directory / f"cache of {name}", "report": False, "num_workers": 0}
    settings = {**RUN, "data": data, "training": {**steps, **training}, "runtime": runtime}
    return RunConfig(experiment_dir=directory / name, **settings)


def run_metered(config: Any) -> tuple[dict[str, float], dict[str, float], list[dict[str, Any]]]:
    """Seconds of the processor and of the clock by the plan's stage, and the rows of costs.json."""
    from cirloop.artifacts import schema
    from cirloop.cli import runner
    from cirloop.monitoring import events

    began: list[float] = []
    spent: dict[str, float] = {}

    def note(kind: str, payload: dict[str, Any]) -> None:
        name = payload.get("name", "")
        if kind == "begins":
            began.append(time.process_time())
        elif kind == "ended":
            stage = STAGES.get(name.removesuffix(".json"), "")
            spent[stage] = spent.get(stage, 0.0) + time.process_time() - began.pop()

    with events.subscribe(note, "the benchmark"):
        runner.run(config)
    rows = schema.read(config.directory / "costs.json")["stages"]
    passed: dict[str, float] = {}
    for row in rows:
        stage = STAGES.get(row["stage"].removesuffix(".json"), "")
        passed[stage] = passed.get(stage, 0.0) + row["seconds"]
    return spent, passed, rows


def compare_run(directory: Path, args: argparse.Namespace) -> dict[str, tuple[float, float, float]]:
    """By stage: seconds as planned, of the processor, and of the clock."""
    from cirloop.artifacts import schema
    from cirloop.stages import estimate, preflight, rates, timing
    from cirloop.stages.lengths import lengths_of
    from cirloop.stages.plan import plan
    from cirloop.stages.work import counts_of

    timing.clock = time.process_time
    before = config_of(directory, args, "measured")
    data = preflight.check(before)
    lengths = lengths_of(before, data)
    table = rates.rates_of(before, lengths, estimate.measure_here(before, data))
    config = config_of(directory, args, "run", **(CHANGED if args.changed else {}))
    spent, passed, rows = run_metered(config)
    summary = schema.read(directory / "run" / "hard_negatives_iter_0.json")["negatives"]
    failed = len({row["query"] for row in summary}) / len(data.train.triplets)
    lengths = rates.with_texts(lengths, table)
    costs = rates.costs_of(table, config, lengths)
    planned = plan(config, counts_of(config, data, failed), lengths, costs)
    seconds = {**planned.once, **planned.round}
    del seconds["vision"]  # it is a part of the stages that first see an image
    for row in rows:
        stage = STAGES.get(row["stage"].removesuffix(".json"), "")
        if stage in seconds:
            seconds[stage] += row["images_encoded"] * costs["image"].unit
    seconds["all"] = sum(seconds.values())
    for totals in (spent, passed):
        totals["all"] = sum(took for stage, took in totals.items() if stage)
    return {stage: (took, spent[stage], passed[stage]) for stage, took in seconds.items()}


def compare_runs(args: argparse.Namespace) -> None:
    from cirloop.monitoring.console import table

    runs = []
    for _ in range(args.runs):
        with TemporaryDirectory() as name:
            runs.append(compare_run(Path(name), args))
        ratios = {stage: f"{a / b:.2f}" for stage, (a, b, _) in runs[-1].items()}
        print(f"run {len(runs)}, planned by taken: {ratios}", flush=True)
    rows = []
    for stage in runs[0]:
        ratios = [planned / spent for planned, spent, _ in (run[stage] for run in runs)]
        last = runs[-1][stage]
        rows.append(
            (
                stage,
                f"{last[0]:.1f}",
                f"{last[1]:.1f}",
                " ".join(f"{ratio:.2f}" for ratio in ratios),
                " ".join(f"{run[stage][2] / run[stage][1]:.1f}" for run in runs),
            )
        )
    columns = ("stage", "planned s", "processor s", "planned by taken", "clock by processor")
    table(f"{args.runs} runs; seconds of the last", columns, rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=SIZES, default="mid", help="of the model; small = to try it out"
    )
    parser.add_argument("--runs", type=int, default=0, help="compare seconds, of so many runs")
    parser.add_argument("--changed", action="store_true", help="see above")
    parser.add_argument("--families", type=int, default=40, help="of the train gallery")
    parser.add_argument("--steps", type=int, default=20, help="of an iteration")
    args = parser.parse_args(argv)
    from cirloop.monitoring.console import table

    if args.runs:
        compare_runs(args)
        return

    rows = [
        (name, f"{planned / 1e6:.2f} MB", f"{measured / 1e6:.2f} MB", f"{planned / measured:.3f}")
        for name, (planned, measured) in measure(args.size).items()
    ]
    title = f"A {args.size} model, {ROWS} rows of {TOKENS} tokens, rank {RANK}"
    table(title, ("part", "planned", "measured", "ratio"), rows)


if __name__ == "__main__":
    from cirloop.reproducibility import prepare_process

    prepare_process()
    main()
