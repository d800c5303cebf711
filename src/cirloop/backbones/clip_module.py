"""The trained module of CLIP with a combiner: tensors in, unit-norm embeddings out.

Suffixes: B batch, T tokens, D embedding.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from open_clip import CLIPTextCfg
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transform import PreprocessCfg
from open_clip.transformer import VisionTransformer
from open_clip.utils import to_2tuple
from torch import nn

from cirloop.backbones.clip_text import Config
from cirloop.backbones.combiners import ClipFeatures, QueryNetwork
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
        combiner: QueryNetwork,
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
        """Return text features (B, D), float32; features that are kept come in and go out.

        For a combiner that needs them, the tokens' features are in the same space.
        """
        if ids_BT.is_floating_point():
            return ClipFeatures(ids_BT)
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
        """Embed inputs: `images` alone are gallery images, `text` alone texts, both are queries.

        `text` are ids (B, T) or kept features (B, D).
        """
        if "images" not in inputs:
            return F.normalize(self._text(inputs).pooled, dim=-1)
        images = inputs["images"]
        features = (self.encode_pixels(images) if self.pixels_in else images).float()
        features = features[inputs["image_of"]]
        tokens = features if self.combiner.needs_tokens else None
        image = self.combiner.map_images(ClipFeatures(features[:, 0], tokens))
        if "text" not in inputs:
            return F.normalize(image.pooled, dim=-1)
        return F.normalize(self.combiner(image, self._text(inputs)), dim=-1)

    def _text(self, inputs: dict[str, torch.Tensor]) -> ClipFeatures:
        return self.combiner.map_texts(self.encode_text(inputs["text"]))


def tower_dims(clip: Clip, model: Config, preprocess: PreprocessCfg) -> tuple[int, int]:
    """Return the widths of image and text features.

    `model` is open_clip's config. Its `embed_dim` is both, but for a tower without a projection
    ("timm_proj": "none", "proj_type": "none"), which has its own. Raises UserError where a tower of
    timm's does not give one vector an image.
    """
    text = CLIPTextCfg(**model["text_cfg"])
    bare = not text.hf_model_name and text.proj_type == "none"
    text_dim = text.width if bare else model["embed_dim"]
    if not isinstance(clip.visual, TimmModel):
        return model["embed_dim"], text_dim
    height, width = to_2tuple(preprocess.size)
    name = model["vision_cfg"]["timm_model_name"]
    try:
        with torch.no_grad():
            shape = clip.visual(torch.zeros(1, 3, height, width)).shape
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"the image tower {name} takes no images of {height}x{width} pixels ({error}). Set"
            " preprocess_cfg.size in the model's config."
        ) from None
    if len(shape) != 2:
        raise UserError(
            f"the image tower {name} gives {list(shape)} for an image, not one vector. Set"
            " vision_cfg.timm_pool in the model's config, as to avg."
        )
    return int(shape[1]), text_dim


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
