"""Qwen-VL's patch embedding as a product of matrices.

The towers of Qwen's families begin with a Conv3d whose input is one patch, as large as its kernel:
every weight meets one number, so the product of patches (N, C, T, P, P) and kernel, both flattened,
is the same sum in another order. The convolution is slower: several times on a CPU, and seconds a
call in bfloat16 with some releases of cuDNN. Weights keep the convolution's names and shapes, and
so do checkpoints, exports and digests.

transformers offers the same for Qwen's families (`fusion_config={"patch_embeddings": True}`), for
all models of a process at once, and up to 5.17 not for the second one that is loaded.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from cirloop.backbones.base import VisionLanguageModel
from cirloop.types import UserError

VERSION = "patches as a product"
"""Part of the vision key: features of the convolution differ in their last bits."""
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference from the convolution in float32, as a share of its largest number.

A result is rounded once, by 2^-24, 2^-11 or 2^-9 of itself, and a GPU may round parts of a sum
before they are added: eight times that is allowed, and in float32 the rounding of a thousand terms
of a sum."""
NUM_PATCHES = 8


class PatchProduct(nn.Conv3d):
    """A Conv3d for inputs as large as its kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Embed patches (N, C, T, P, P) as (N, D, 1, 1, 1)."""
        embedded_ND = F.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return embedded_ND[:, :, None, None, None]


def use_product(vlm: VisionLanguageModel, path: str) -> None:
    """Make the vision tower of a Qwen-VL embed patches by a product; leave other families alone.

    Raises UserError where the product differs from the convolution.
    """
    embed = getattr(getattr(vlm.model, "visual", None), "patch_embed", None)
    if embed is None:
        return
    product = product_of(embed.proj)
    check(product, embed.proj, path)
    embed.proj = product


def product_of(convolution: nn.Conv3d) -> PatchProduct:
    """Return the product on the convolution's own weights."""
    kernel = cast(tuple[int, int, int], convolution.kernel_size)
    bias = convolution.bias is not None
    product = PatchProduct(
        convolution.in_channels, convolution.out_channels, kernel, kernel, bias=bias, device="meta"
    )
    product.weight = convolution.weight
    product.bias = convolution.bias
    return product.train(convolution.training)


@torch.no_grad()
def check(product: nn.Conv3d, convolution: nn.Conv3d, path: str) -> None:
    """Compare both on random patches: the convolution runs on the CPU in float32.

    Raises UserError where they differ by more than rounding.
    """
    weight = product.weight
    shape = (NUM_PATCHES, convolution.in_channels, *convolution.kernel_size)
    patches = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    product_ND = product(patches.to(weight.device)).flatten(1).float().cpu()
    bias = None if convolution.bias is None else convolution.bias.float().cpu()
    expected_ND = F.conv3d(
        patches.float(),
        weight.float().cpu(),
        bias,
        convolution.stride,
        convolution.padding,
        convolution.dilation,
        convolution.groups,
    ).flatten(1)
    difference = float(
        (product_ND - expected_ND).abs().max() / expected_ND.abs().max().clamp_min(1e-30)
    )
    limit = LIMITS[weight.dtype]
    # Also where it is not a number.
    if bool(expected_ND.isfinite().all()) and not difference <= limit:
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(
            f"model path {path!r}: the patch embedding as a product of matrices on"
            f" {weight.device.type} in {dtype} differs from the convolution by {difference:.2g} of"
            f" its largest value, at most {limit:g} is rounding. This device's products are wrong:"
            " set model.dtype (and foundation.dtype) float32, or install another release of torch."
        )
