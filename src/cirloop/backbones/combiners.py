"""Combiners of CLIP's image and text features (B, D) into one query. None normalises its output.

Features of towers that share no space are mapped into one first, see `Aligned`. Array suffixes: B
batch, T tokens, D the queries' space, which is CLIP's embedding where the towers have it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from cirloop.types import UserError


class ClipFeatures(NamedTuple):
    """CLIP's features (B, D) of images or texts, not normalised, and for some combiners of their
    tokens (B, T, D).

    `mask` (B, T) is true on a text's tokens, from its start token to its end token.
    """

    pooled: torch.Tensor
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class QueryNetwork(nn.Module):
    """A network that makes queries (B, D) of image and text features that are mapped into their
    space.

    `map_images` and `map_texts` do that, for gallery images and texts alone too; features that are
    in it already stay as they are.
    """

    needs_tokens = False
    """Whether tokens' features are needed, not only those of whole images and texts."""

    def map_images(self, features: ClipFeatures) -> ClipFeatures:
        """Map features of the image tower into the queries' space."""
        return features

    def map_texts(self, features: ClipFeatures) -> ClipFeatures:
        """Map features of the text tower into the queries' space."""
        return features


class Sum(QueryNetwork):
    """The sum of image and text features, with which CLIP4Cir fine-tunes CLIP, without weights."""

    def forward(self, image: ClipFeatures, text: ClipFeatures) -> torch.Tensor:
        return image.pooled + text.pooled


class Combiner(QueryNetwork):
    """CLIP4Cir's network (Baldrati et al., ACM TOMM 2023, arXiv 2308.11485).

    Both features are projected to `width` D, with ReLU and dropout. From the two together one
    network computes a mixture v, and another a share s in (0, 1): query = v + s text + (1 - s)
    image. CLIP4Cir has width 4 and dropout 0.5.
    """

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        both = 2 * width * dim
        self.project_text = nn.Sequential(
            nn.Linear(dim, width * dim), nn.ReLU(), nn.Dropout(dropout)
        )
        self.project_image = nn.Sequential(
            nn.Linear(dim, width * dim), nn.ReLU(), nn.Dropout(dropout)
        )
        self.mixture = nn.Sequential(
            nn.Linear(both, both), nn.ReLU(), nn.Dropout(dropout), nn.Linear(both, dim)
        )
        self.share = nn.Sequential(
            nn.Linear(both, both), nn.ReLU(), nn.Dropout(dropout), nn.Linear(both, 1), nn.Sigmoid()
        )

    def forward(self, image: ClipFeatures, text: ClipFeatures) -> torch.Tensor:
        both = torch.cat([self.project_text(text.pooled), self.project_image(image.pooled)], dim=-1)
        share = self.share(both)
        query: torch.Tensor = self.mixture(both) + share * text.pooled + (1 - share) * image.pooled
        return query


class AttentionFusion(QueryNetwork):
    """Attention from text tokens to image tokens, added to the sum of both features through a
    gate.

    One pre-norm layer: h = text tokens + attention(text tokens -> image tokens), h + mlp(h)
    averaged over the text's tokens gives f, and query = image + text + tanh(gate) f, a gate per
    dimension (tanh gates from 0: Flamingo, arXiv 2204.14198). The gate starts at 0, so that the
    query starts as that of `sum`: the first step moves only the gate, and from the second step
    every weight has a gradient other than zero.
    """

    needs_tokens = True

    def __init__(self, dim: int, width: int, dropout: float) -> None:
        super().__init__()
        heads = max(h for h in range(1, max(1, dim // 64) + 1) if dim % h == 0)
        self.norm_text = nn.LayerNorm(dim)
        self.norm_image = nn.LayerNorm(dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(dim, width * dim), nn.GELU(), nn.Linear(width * dim, dim)
        )
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, image: ClipFeatures, text: ClipFeatures) -> torch.Tensor:
        assert image.tokens is not None and text.tokens is not None and text.mask is not None
        image_tokens = self.norm_image(image.tokens)
        text_tokens = self.norm_text(text.tokens)
        attended, _ = self.attention(text_tokens, image_tokens, image_tokens, need_weights=False)
        hidden = text.tokens + self.dropout(attended)
        hidden = hidden + self.dropout(self.mlp(self.norm_mlp(hidden)))
        weight = (text.mask / text.mask.sum(1, keepdim=True)).unsqueeze(-1)
        gated = torch.tanh(self.gate) * (weight * hidden).sum(1)
        query: torch.Tensor = image.pooled + text.pooled + gated
        return query


class Aligned(QueryNetwork):
    """A query network behind trained linear maps of both towers' features into its space.

    Texts always have a map. Images have one with `project_images` dimensions, unless that is 0, and
    a gallery image's vector is then what the map makes of its feature.
    """

    def __init__(self, network: QueryNetwork, dims: tuple[int, int], project_images: int) -> None:
        super().__init__()
        image_dim, text_dim = dims
        dim = project_images or image_dim
        self.network = network
        self.needs_tokens = network.needs_tokens
        self.images = nn.Linear(image_dim, dim) if project_images else nn.Identity()
        self.texts = nn.Linear(text_dim, dim)

    def map_images(self, features: ClipFeatures) -> ClipFeatures:
        return _map_features(self.images, features)

    def map_texts(self, features: ClipFeatures) -> ClipFeatures:
        return _map_features(self.texts, features)

    def forward(self, image: ClipFeatures, text: ClipFeatures) -> torch.Tensor:
        query: torch.Tensor = self.network(image, text)
        return query


def _map_features(layer: nn.Module, features: ClipFeatures) -> ClipFeatures:
    tokens = None if features.tokens is None else layer(features.tokens)
    return ClipFeatures(layer(features.pooled), tokens, features.mask)


def combiner(
    name: str, dims: tuple[int, int], width: int, dropout: float, project_images: int = 0
) -> QueryNetwork:
    """Build the combiner `name`; torch's generator draws its weights.

    `dims` are the widths of image and text features. Queries have the image's, or
    `project_images` dimensions where that is not 0. Raises UserError for `sum` where the widths
    differ and nothing maps them.
    """
    image_dim, text_dim = dims
    if name == "sum" and image_dim != text_dim and not project_images:
        raise UserError(
            f"model.combiner `sum` adds features of one width; the image tower has {image_dim}"
            f" dimensions and the text tower {text_dim}. Set model.project_images, or the combiner"
            " `combiner`."
        )
    dim = project_images or image_dim
    network: QueryNetwork
    if name == "sum":
        network = Sum()
    elif name == "combiner":
        network = Combiner(dim, width, dropout)
    else:
        assert name == "attention_fusion", name
        network = AttentionFusion(dim, width, dropout)
    if project_images or image_dim != text_dim:
        return Aligned(network, dims, project_images)
    return network
