"""The trained module of CLIP with a combiner: tensors in, unit-norm embeddings out.

Suffixes: B batch, T tokens, D embedding.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from torch import nn

from cirloop.backbones.combiners import AttentionFusion, ClipFeatures, Combiner, Sum
from cirloop.types import UserError

Clip: TypeAlias = Any
"""open_clip's `CLIP` or `CustomTextCLIP`, which have no common class."""


class ClipModule(nn.Module):
    """CLIP's towers and a combiner. CLIP stays in evaluation mode.

    With `pixels_in`, images come as resized pixels, else as features.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        clip: Clip,
        combiner: Sum | Combiner | AttentionFusion,
        preprocess: PreprocessCfg,
        *,
        pixels_in: bool,
    ) -> None:
        super().__init__()
        self.clip = clip
        self.combiner = combiner
        self.pixels_in = pixels_in
        self.register_buffer("mean", torch.tensor(preprocess.mean), persistent=False)
        self.register_buffer("std", torch.tensor(preprocess.std), persistent=False)

    def train(self, mode: bool = True) -> ClipModule:  # torch's signature
        """Set the mode of the combiner alone."""
        super().train(mode)
        self.clip.eval()
        return self

    def encode_pixels(self, pixels_BHWC: torch.Tensor) -> torch.Tensor:
        """Return image features (B, 1 + T, D) of pixels (B, H, W, 3) in bytes.

        The global feature comes first; T = 0 for a combiner that needs no tokens.
        """
        pixels = ((pixels_BHWC.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        pixels = pixels.to(next(self.clip.parameters()).dtype)
        if not self.combiner.needs_tokens:
            pooled: torch.Tensor = self.clip.encode_image(pixels).unsqueeze(1)
            return pooled
        visual = self.clip.visual
        if isinstance(visual, VisionTransformer):
            output = visual.forward_intermediates(
                pixels, indices=1, normalize_intermediates=True, output_fmt="NLC"
            )
            tokens = output["image_intermediates"][-1] @ visual.proj
        else:
            # A token is what the attention pool makes of it alone (MaskCLIP, arXiv 2112.01071).
            output = visual.forward_intermediates(pixels, indices=1)
            patches = output["image_intermediates"][-1].flatten(2).transpose(1, 2)
            pool = visual.attnpool
            tokens = pool.c_proj(pool.v_proj(patches + pool.positional_embedding[1:]))
        return torch.cat([output["image_features"].unsqueeze(1), tokens], dim=1)

    def encode_text(self, ids_BT: torch.Tensor) -> ClipFeatures:
        """Return text features (B, D), float32.

        For a combiner that needs them, the tokens' features are in the same space.
        """
        if not self.combiner.needs_tokens:
            return ClipFeatures(self.clip.encode_text(ids_BT).float())
        output = self.clip.forward_intermediates(
            text=ids_BT, text_indices=1, normalize_intermediates=True, normalize=False
        )
        tokens = output["text_intermediates"][-1] @ self.clip.text_projection
        columns = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        mask = columns <= ids_BT.argmax(1, keepdim=True)
        return ClipFeatures(output["text_features"].float(), tokens.float(), mask)

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Embed inputs: `images` alone are gallery images, `text` alone texts, both are queries."""
        if "images" not in inputs:
            return F.normalize(self.encode_text(inputs["text"]).pooled, dim=-1)
        images = inputs["images"]
        features = (self.encode_pixels(images) if self.pixels_in else images).float()
        features = features[inputs["image_of"]]
        if "text" not in inputs:
            return F.normalize(features[:, 0], dim=-1)
        image = ClipFeatures(features[:, 0], features)
        return F.normalize(self.combiner(image, self.encode_text(inputs["text"])), dim=-1)


def require_tokens(clip: Clip, name: str) -> None:
    """Raise UserError where CLIP's towers have no tokens for `attention_fusion`."""
    visual = clip.visual
    is_vit = (
        isinstance(visual, VisionTransformer)
        and visual.attn_pool is None
        and not visual.final_ln_after_pool
    )
    has_projection = isinstance(getattr(clip, "text_projection", None), nn.Parameter)
    if not (is_vit or isinstance(visual, ModifiedResNet)) or not has_projection:
        raise UserError(
            "model.combiner `attention_fusion` needs the tokens of CLIP's own ViT or ResNet, which"
            f" {name} does not have. Choose `combiner` or `sum`, or an architecture such as RN50x4"
            " or ViT-L-14."
        )
