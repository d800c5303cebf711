"""How similar queries and images are. B queries, N images, M vectors of an image, D dimensions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def similarity(queries_BD: Any, images: Any) -> Any:
    """Scores (B, N): dot products; where an image has several vectors (N, M, D), the most similar
    one's.

    Tensors or arrays, and the same comes back.
    """
    if images.ndim == 2:
        return queries_BD @ images.T
    several, width = images.shape[1:]
    scores_BNM = (queries_BD @ images.reshape(-1, width).T).reshape(len(queries_BD), -1, several)
    return scores_BNM.amax(-1) if isinstance(scores_BNM, torch.Tensor) else scores_BNM.max(-1)


def pooled(images: Any) -> Any:
    """One vector of unit norm (N, D) per image, to compare images with each other: the mean of
    several."""
    if images.ndim == 2:
        return images
    mean_ND = images.mean(1)
    return mean_ND / np.maximum(np.linalg.norm(mean_ND, axis=-1, keepdims=True), 1e-12)
