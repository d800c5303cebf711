"""`cirloop.mine_negatives`: hard negatives from vectors of any model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cirloop.types import UserError

if TYPE_CHECKING:
    import numpy.typing as npt

    from cirloop.negatives import MiningSettings
    from cirloop.negatives.base import Strategy
    from cirloop.negatives.miner import MiningResult
    from cirloop.retrieval.arrays import Floats, Rows

ONLY_IN_RUNS = {"filters", "num_rounds", "skip_captioned", "anchors"}
"""Settings of `mining` that a run alone has a use for."""


@dataclass(frozen=True, slots=True)
class MinedNegatives:
    """Negatives of Q queries, best first, at most K each.

    `rows_QK` are gallery rows, -1 where a query has fewer; there the rank is 0 and the score -inf.
    Ranks count from 1 among all images but the reference. `target_ranks_Q` and `target_scores_Q`
    are the targets' own.
    """

    rows_QK: Rows
    ranks_QK: Rows
    scores_QK: Floats
    target_ranks_Q: Rows
    target_scores_Q: Floats


def mine_negatives(  # noqa: PLR0913 - what is known of a gallery
    queries: npt.ArrayLike,
    gallery: npt.ArrayLike,
    targets: npt.ArrayLike,
    strategy: str | Strategy = "top_k",
    *,
    references: npt.ArrayLike | None = None,
    positives: Sequence[Sequence[int]] | None = None,
    texts: npt.ArrayLike | None = None,
    groups: Sequence[Sequence[int]] | None = None,
    categories: Sequence[str] | None = None,
    seed: int = 0,
    device: str = "cpu",
    **settings: object,
) -> MinedNegatives:
    """Return wrong images of each query, chosen by a negative strategy (docs/negatives.md).

    `queries` (Q, D) and `gallery` (G, D), or (G, M, D) where an image has M vectors, are float16 or
    float32, memory-mapped ones too; scores are dot products. `targets` (Q,) are the gallery rows of
    the right images, `references` (Q,) those of the reference images, -1 where one is not in the
    gallery. `positives` names further right rows of each query, `groups` the rows of its group.
    `texts` (Q, D) are vectors of the texts alone, `categories` name what each gallery row shows.
    `strategy` is a type such as `band` or a strategy of `cirloop.negatives`. `settings` are the
    strategy's (`negatives_per_query=5`, `extra_ranks="all"`), and those of `mining`, such as
    `search="ivf"`. Raises UserError with every problem of the settings or arrays.
    """
    mining = _mining_settings(strategy, settings)
    _refuse_no_gpu(device)
    import numpy as np

    from cirloop.negatives.miner import mine
    from cirloop.negatives.vector_inputs import VectorArrays, checked_inputs
    from cirloop.reproducibility import prepared_process
    from cirloop.validation import ValidationReport

    problems = ValidationReport("Row i of targets is about row i of queries.")
    arrays = VectorArrays(
        np.asarray(queries),
        np.asarray(gallery),
        np.asarray(targets),
        None if references is None else np.asarray(references),
        positives,
        None if texts is None else np.asarray(texts),
        groups,
        categories,
    )
    inputs, context = checked_inputs(arrays, seed, problems)
    problems.raise_if_any()
    with prepared_process():
        results = list(mine(mining, inputs, context, device))
    return _as_arrays(results, mining.strategy.negatives_per_query)


def _refuse_no_gpu(device: str) -> None:
    """Raise UserError for a GPU where torch sees none."""
    if not device.startswith("cuda"):
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(
            f"device {device!r}: torch sees no CUDA GPU here. Leave it out, or give 'cpu'."
        )


def _mining_settings(strategy: str | Strategy, settings: dict[str, Any]) -> MiningSettings:
    """Return the settings of `mining`. Raises UserError with every one that is wrong."""
    from pydantic import ValidationError

    from cirloop.config.errors import format_errors
    from cirloop.negatives import MiningSettings

    shared = MiningSettings.model_fields.keys() - ONLY_IN_RUNS - {"strategy"}
    content: dict[str, Any] = {"only_failed_queries": False}
    content |= {name: value for name, value in settings.items() if name in shared}
    own = {name: value for name, value in settings.items() if name not in shared}
    if isinstance(strategy, str):
        content["strategy"] = {"negatives_per_query": 5, **own, "type": strategy}
    elif own:
        raise UserError(
            f"{', '.join(sorted(own))}: the strategy is given with its settings; give them there."
        )
    else:
        content["strategy"] = strategy
    try:
        return MiningSettings.model_validate(content)
    except ValidationError as error:
        page = "docs/negatives.md"
        raise UserError(format_errors(error, MiningSettings, page)) from None


def _as_arrays(results: Sequence[MiningResult], num: int) -> MinedNegatives:
    """Return the results of Q queries as arrays of `num` columns."""
    import numpy as np

    rows_QK = np.full((len(results), num), -1, np.int64)
    ranks_QK = np.zeros((len(results), num), np.int64)
    scores_QK = np.full((len(results), num), -np.inf, np.float32)
    for number, result in enumerate(results):
        width = len(result.gallery_indices)
        rows_QK[number, :width] = result.gallery_indices
        ranks_QK[number, :width] = result.ranks
        scores_QK[number, :width] = result.scores
    return MinedNegatives(
        rows_QK,
        ranks_QK,
        scores_QK,
        np.array([result.target_rank for result in results], np.int64),
        np.array([result.target_score for result in results], np.float32),
    )
