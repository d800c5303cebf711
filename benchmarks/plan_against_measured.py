"""The plan's arithmetic of memory against what a model takes, in bytes: weights, what autograd
keeps of a training step, weights with optimizer, and keys and values of captions.

A random Qwen2-VL of about 100 million weights trains a LoRA around a bfloat16 base, its adapters in
float32 and in bfloat16. What autograd keeps is each storage that its graph saves, counted once,
without the model's own weights.

    python benchmarks/plan_against_measured.py [--size small]
"""

from __future__ import annotations

import argparse
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

    vlm, _, _ = load_vlm(str(directory), "bfloat16", "sdpa")
    cache = DynamicCache()
    vlm.model.language_model(**inputs_of(vlm), past_key_values=cache, use_cache=True)
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", choices=SIZES, default="mid", help="of the model; small = to try it out"
    )
    args = parser.parse_args(argv)
    from cirloop.monitoring.console import table

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
