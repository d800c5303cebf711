"""How an image and a text become one query: three combiners of CLIP features (B, D). None
normalises its output.

Array suffixes: B batch, T tokens, D CLIP's embedding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn


class Encoded(NamedTuple):
    """What CLIP makes of images or texts: features (B, D), not normalised, and where asked for
    tokens (B, T, D).

    `mask` (B, T) is true on a text's tokens, from its start sign to its end sign.
    """

    pooled: torch.Tensor
    tokens: torch.Tensor | None = None
    mask: torch.Tensor | None = None


class Sum(nn.Module):
    """image + text, features as CLIP gives them: what CLIP4Cir fine-tunes CLIP with. Has no
    weights."""

    needs_tokens = False

    def forward(self, image: Encoded, text: Encoded) -> torch.Tensor:
        return image.pooled + text.pooled


class Combiner(nn.Module):
    """CLIP4Cir's network (Baldrati et al., ACM TOMM 2023, arXiv 2308.11485).

    Both features are projected to `width` D, ReLU, dropout; from the two together a network gives a
    mixture v and a second one a share s in (0, 1): query = v + s text + (1 - s) image. Theirs has
    width 4 and dropout 0.5.
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

    def forward(self, image: Encoded, text: Encoded) -> torch.Tensor:
        both = torch.cat([self.project_text(text.pooled), self.project_image(image.pooled)], dim=-1)
        share = self.share(both)
        out: torch.Tensor = self.mixture(both) + share * text.pooled + (1 - share) * image.pooled
        return out


class AttentionFusion(nn.Module):
    """Text tokens look at image tokens; what they found is added to the sum of both features
    through a gate.

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
        self.norm_text, self.norm_image, self.norm_mlp = (
            nn.LayerNorm(dim),
            nn.LayerNorm(dim),
            nn.LayerNorm(dim),
        )
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(dim, width * dim), nn.GELU(), nn.Linear(width * dim, dim)
        )
        self.dropout = nn.Dropout(dropout)
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, image: Encoded, text: Encoded) -> torch.Tensor:
        assert image.tokens is not None and text.tokens is not None and text.mask is not None
        seen = self.norm_image(image.tokens)
        found, _ = self.attention(self.norm_text(text.tokens), seen, seen, need_weights=False)
        hidden = text.tokens + self.dropout(found)
        hidden = hidden + self.dropout(self.mlp(self.norm_mlp(hidden)))
        weight = (text.mask / text.mask.sum(1, keepdim=True)).unsqueeze(-1)
        out: torch.Tensor = (
            image.pooled + text.pooled + torch.tanh(self.gate) * (weight * hidden).sum(1)
        )
        return out


def combiner(name: str, dim: int, width: int, dropout: float) -> Sum | Combiner | AttentionFusion:
    """The combiner of that name, of CLIP features (B, dim), its weights drawn from torch's
    generator."""
    if name == "sum":
        return Sum()
    if name == "combiner":
        return Combiner(dim, width, dropout)
    assert name == "attention_fusion", name
    return AttentionFusion(dim, width, dropout)
