"""Qwen-VL's patch embedding as transformers has it, a Conv3d, against ours, a product of matrices.

At the size of Qwen2-VL (1,176 numbers a patch to 1,280) and of Qwen3-VL (1,536 to 1,024, with a
bias), on random patches; an image of 256 visual tokens has 1,024. Both sides in turn, `--repeats`
times. Prints milliseconds, how many times as fast with its standard error over the repeats, and the
largest difference as a share of the largest number. Under a minute on one core; on a GPU where
torch sees one.

    python benchmarks/patch_embedding.py
    python benchmarks/patch_embedding.py --patches 64 --repeats 2 --dtype bfloat16     to try it out
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from _model import in_turn
from torch import nn

from cirloop.backbones.patches import product_of
from cirloop.monitoring.console import table
from cirloop.reproducibility import prepare_process

SIZES = {"Qwen2-VL": ((3, 2, 14, 14), 1280, False), "Qwen3-VL": ((3, 2, 16, 16), 1024, True)}
"""Channels, frames, height and width of a patch; width of the tower; whether there is a bias."""


def compare(name: str, args: argparse.Namespace) -> tuple[str, ...]:
    (channels, *kernel), width, bias = SIZES[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    convolution = nn.Conv3d(
        channels, width, tuple(kernel), tuple(kernel), bias=bias, device=device, dtype=dtype
    )
    product = product_of(convolution)
    patches = torch.randn(args.patches, channels, *kernel, device=device).to(dtype)
    sides = {"convolution": convolution, "product": product}
    for side in sides.values():
        side(patches)  # what is only slow the first time
    calls = {side: partial(_call, layer, patches) for side, layer in sides.items()}
    taken, made = in_turn(calls, args.repeats)
    ratios = torch.tensor(taken["convolution"]) / torch.tensor(taken["product"])
    error = f"{float(ratios.std()) / len(ratios) ** 0.5:.2f}" if len(ratios) > 1 else "unknown"
    first = made["convolution"][0].float()
    differ = float((made["product"][0].float() - first).abs().max() / first.abs().max())
    each = [f"{1000 * sum(seconds) / len(seconds):.2f}" for seconds in taken.values()]
    return (name, *each, f"{float(ratios.mean()):.2f} ± {error}", f"{differ:.1e}")


def _call(layer: nn.Module, patches: torch.Tensor, repeat: int) -> torch.Tensor:
    out: torch.Tensor = layer(patches)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--patches", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with torch.inference_mode():
        rows = [compare(name, args) for name in SIZES]
    head = (
        "patch embedding of",
        "convolution, ms",
        "product, ms",
        "times as fast",
        "largest difference",
    )
    table(f"{args.patches} patches, {args.dtype}", head, rows)


if __name__ == "__main__":
    prepare_process()
    main()
