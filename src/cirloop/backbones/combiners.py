"""Combiners of CLIP's image and text features (B, D) into one query. None normalises its output.

Array suffixes: B batch, T tokens, D CLIP's embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class ClipFeatures(NamedTuple):
    """CLIP's features (B, D) of images or texts, not normalised, and for some combiners of their
    tokens (B, T, D).

    `mask` (B, T) is true on a text's tokens, from its start token to its end token.
    """

    pooled: torch.Tensor
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class Sum(nn.Module):
    """The sum of image and text features, with which CLIP4Cir fine-tunes CLIP, without weights."""

    needs_tokens = False

    def forward(self, image: ClipFeatures, text: ClipFeatures) -> torch.Tensor:
        return image.pooled + text.pooled


class Combiner(nn.Module):
    """CLIP4Cir's network (Baldrati et al., ACM TOMM 2023, arXiv 2308.11485).

    Both features are projected to `width` D, with ReLU and dropout. From the two together one
    network computes a mixture v, and another a share s in (0, 1): query = v + s text + (1 - s)
    image. CLIP4Cir has width 4 and dropout 0.5.
    """

    needs_tokens = False

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


class AttentionFusion(nn.Module):
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


def combiner(name: str, dim: int, width: int, dropout: float) -> Sum | Combiner | AttentionFusion:
    """Build the combiner `name` of CLIP features (B, dim); torch's generator draws its weights."""
    if name == "sum":
        return Sum()
    if name == "combiner":
        return Combiner(dim, width, dropout)
    assert name == "attention_fusion", name
    return AttentionFusion(dim, width, dropout)
