"""Qwen-VL's patch embedding as a product of matrices.

The towers of Qwen's families begin with a Conv3d that gets each patch by itself, as large as its
kernel: every weight meets one number, so that patches (N, C, T, P, P) times the kernel, both
flattened, is the same sum in another order. A convolution is the slower way to it: several times on
a CPU, and seconds a call in bfloat16 with some releases of cuDNN. Weights keep the convolution's
names and shapes, so checkpoints, exports and digests do too.

transformers offers the same for Qwen's families (`fusion_config={"patch_embeddings": True}`), for
all models of a process at once, and up to 5.17 not for the second one that is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from cirloop.types import UserError

VERSION = "patches as a product"
"""Part of the key of kept features: those of the convolution differ in their last bits."""
LIMITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Largest difference from the convolution in float32, as a share of its largest number. A result is
rounded once, by 2^-24, 2^-11 or 2^-9 of itself, and a GPU may round parts of a sum before they are
added: eight times that is let pass, and in float32 the thousand terms of a sum, each rounded."""
NUM_PATCHES = 8


class PatchProduct(nn.Conv3d):
    """A Conv3d for inputs as large as its kernel."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(N, C, T, P, P) to (N, D, 1, 1, 1)."""
        made_ND = F.linear(input.flatten(1), self.weight.flatten(1), self.bias)
        return made_ND[:, :, None, None, None]


def use_product(vlm: Any, path: str) -> None:
    """Have the vision tower of a Qwen-VL embed patches by a product; other families are left as
    they are.

    Raises UserError where that gives something else than the convolution.
    """
    embed = getattr(getattr(vlm.model, "visual", None), "patch_embed", None)
    if embed is None:
        return
    product = product_of(embed.proj)
    check(product, embed.proj, path)
    embed.proj = product


def product_of(convolution: nn.Conv3d) -> PatchProduct:
    """On the convolution's own weights."""
    kernel: Any = convolution.kernel_size
    bias = convolution.bias is not None
    product = PatchProduct(
        convolution.in_channels, convolution.out_channels, kernel, kernel, bias=bias, device="meta"
    )
    product.weight = convolution.weight
    product.bias = convolution.bias
    return product.train(convolution.training)


@torch.no_grad()
def check(product: nn.Conv3d, convolution: nn.Conv3d, path: str) -> None:
    """Random patches by `product` where it is, and by `convolution` on the CPU in float32. Raises
    UserError."""
    weight = product.weight
    shape = (NUM_PATCHES, convolution.in_channels, *convolution.kernel_size)
    patches = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    made_ND = product(patches.to(weight.device)).flatten(1).float().cpu()
    bias = None if convolution.bias is None else convolution.bias.float().cpu()
    wanted_ND = convolution._conv_forward(patches.float(), weight.float().cpu(), bias).flatten(1)
    apart = float((made_ND - wanted_ND).abs().max() / wanted_ND.abs().max().clamp_min(1e-30))
    limit = LIMITS[weight.dtype]
    if bool(wanted_ND.isfinite().all()) and not apart <= limit:  # also where it is not a number
        dtype = str(weight.dtype).removeprefix("torch.")
        raise UserError(
            f"model path {path!r}: the patch embedding as a product of matrices on"
            f" {weight.device.type} in {dtype} differs from the convolution by {apart:.2g} of its"
            f" largest value, at most {limit:g} is rounding. This device's products are wrong: set"
            " model.dtype (and foundation.dtype) float32, or install another release of torch."
        )
