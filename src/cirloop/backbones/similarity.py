"""How similar queries and images are. B queries, N images, M vectors of an image, D dimensions."""

from __future__ import annotations

from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch

Array = TypeVar("Array", torch.Tensor, npt.NDArray[np.float32], npt.NDArray[np.float64])

FloatArray = TypeVar("FloatArray", npt.NDArray[np.float32], npt.NDArray[np.float64])


def similarity(queries_BD: Array, images: Array) -> Array:
    """Return scores (B, N): dot products of queries with images (N, D).

    Where an image has several vectors (N, M, D), the most similar one counts. Takes tensors or
    arrays, and returns the same.
    """
    if images.ndim == 2:
        return queries_BD @ images.T
    num_vectors, width = images.shape[1:]
    scores_BNM = (queries_BD @ images.reshape(-1, width).T).reshape(
        len(queries_BD), -1, num_vectors
    )
    if isinstance(scores_BNM, torch.Tensor):
        return scores_BNM.amax(-1)
    return cast(Array, scores_BNM.max(-1))


def mean_pool(images: FloatArray) -> FloatArray:
    """Return one vector of unit norm (N, D) per image, the mean of several, to compare images."""
    if images.ndim == 2:
        return images
    mean_ND = images.mean(1)
    norm_N1 = np.linalg.norm(mean_ND, axis=-1, keepdims=True)
    return cast(FloatArray, mean_ND / np.maximum(norm_N1, 1e-12))
