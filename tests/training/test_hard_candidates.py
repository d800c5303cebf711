"""The mask of online hard mining against a loop, and what it does to the loss."""

from __future__ import annotations

from math import exp, log

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cirloop.negatives.base import MiningContext
from cirloop.negatives.strategies.online_hardest import OnlineHardest
from cirloop.training.batches import Batch
from cirloop.training.config import TrainingSettings
from cirloop.training.gradient_engine import candidate_masks
from cirloop.training.hard_candidates import candidate_rows, hard_candidate_mask
from cirloop.training.losses import CandidateMasks, info_nce
from tests.negatives.cases import Case, cases


def naive(
    scores: list[float], target: int, right: set[int], top: int, k: int, margin: float | None
) -> set[int]:
    """What is kept for one query, by sorting."""
    wrong = [n for n in range(len(scores)) if n != target and n not in right]
    pool = sorted(wrong, key=lambda n: (-scores[n], n))[:top]
    valid = [n for n in pool if margin is None or scores[n] <= scores[target] + margin]
    return {target, *valid[:k]}


def tensors(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, targets and the known positives beside the target, the reference among them."""
    known_positive = torch.zeros(case.scores_QG.shape, dtype=torch.bool)
    for i, target in enumerate(case.targets):
        known_positive[i, list((case.positives[i] | {case.references[i]}) - {target})] = True
    return torch.from_numpy(case.scores_QG), torch.tensor(case.targets), known_positive


def nce(
    scores: torch.Tensor, target: torch.Tensor, left_out: torch.Tensor, temperature: float
) -> torch.Tensor:
    masks = CandidateMasks(target, left_out, torch.full((len(scores), 1), -1))
    return info_nce(scores, masks, temperature)


@given(
    case=cases(),
    top=st.integers(1, 30),
    k=st.integers(1, 30),
    margin=st.sampled_from([None, 0.0, -0.125, 0.25, -5.0]),
)
def test_mask_is_what_a_loop_keeps(case: Case, top: int, k: int, margin: float | None) -> None:
    scores, target, known_positive = tensors(case)
    mask = hard_candidate_mask(scores, target, known_positive, top, k, margin)
    assert mask.dtype == torch.bool and mask.shape == scores.shape
    for i, row in enumerate(mask):
        right = set(known_positive[i].nonzero().flatten().tolist())
        kept = set(row.nonzero().flatten().tolist())
        assert kept == naive(scores[i].tolist(), case.targets[i], right, top, k, margin)


@given(
    case=cases(),
    top=st.integers(1, 30),
    k=st.integers(1, 30),
    valid=st.sampled_from(["below_target", "all"]),
)
def test_mask_keeps_what_the_strategy_mines(case: Case, top: int, k: int, valid: str) -> None:
    strategy = OnlineHardest(negatives_per_query=k, candidate_pool=top, validity=valid)  # type: ignore[arg-type]
    mined = strategy.choose(case.window(top), MiningContext(seed=0))
    mask = hard_candidate_mask(*tensors(case), top, k, None if valid == "all" else 0.0)
    for i, positions in enumerate(mined):
        images = case.window(top).gallery_index_BK[i, positions].tolist()
        assert set(mask[i].nonzero().flatten().tolist()) == {case.targets[i], *images}


def test_one_candidate_is_the_target() -> None:
    none = torch.zeros(1, 1, dtype=torch.bool)
    mask = hard_candidate_mask(torch.zeros(1, 1), torch.tensor([0]), none, 5, 5)
    assert mask.tolist() == [[True]]


def test_masked_positives_take_no_place_in_the_pool() -> None:
    scores = torch.tensor([[0.0, -torch.inf, -torch.inf, -1.0]])
    known_positive = torch.tensor([[False, True, False, False]])
    mask = hard_candidate_mask(scores, torch.tensor([0]), known_positive, 2, 2)
    assert mask.tolist() == [[True, False, True, True]]


def test_loss_over_the_hardest_valid_candidate() -> None:
    """Scores 0.6 (target), 1, 0.6, 0: what outscores the target goes, of the rest the equal one
    stays: log 2."""
    query = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[0.6, 0.8], [1.0, 0.0], [0.6, -0.8], [0.0, 1.0]], requires_grad=True)
    target, none = torch.tensor([0]), torch.zeros(1, 4, dtype=torch.bool)
    mask = hard_candidate_mask(query @ candidates.T, target, none, 4, 1)
    loss = nce(query @ candidates.T, target, ~mask, 1.0)
    assert loss.item() == pytest.approx(log(2), rel=1e-6)
    loss.backward()
    assert candidates.grad is not None
    assert candidates.grad.abs().sum(1).gt(0).tolist() == [True, False, True, False]
    hardest = hard_candidate_mask(query @ candidates.T, target, none, 4, 1, None)
    harder = nce(query @ candidates.T, target, ~hardest, 1.0).item()
    assert harder == pytest.approx(log(1 + exp(0.4)), rel=1e-6)


def test_everything_kept_is_plain_info_nce() -> None:
    random = np.random.default_rng(0)
    queries, candidates = (
        torch.from_numpy(random.standard_normal((n, 4)).astype(np.float32)) for n in (5, 9)
    )
    target, known_positive = torch.arange(5), torch.from_numpy(random.random((5, 9)) < 0.2)
    known_positive[torch.arange(5), target] = False
    mask = hard_candidate_mask(queries @ candidates.T, target, known_positive, 9, 9, None)
    assert torch.equal(~mask, known_positive)
    scores = queries @ candidates.T
    assert nce(scores, target, ~mask, 0.1) == nce(scores, target, known_positive, 0.1)


def test_no_valid_candidate_leaves_no_loss() -> None:
    scores, target = torch.tensor([[0.0, 1.0, 0.6]]), torch.tensor([0])
    mask = hard_candidate_mask(scores, target, torch.zeros(1, 3, dtype=torch.bool), 2, 2)
    assert mask.tolist() == [[True, False, False]]
    assert nce(scores, target, ~mask, 0.1).item() == 0.0


def test_rows_are_those_of_the_mask() -> None:
    mask = torch.tensor(
        [[True, False, True, False], [False, False, False, False], [False, True, False, False]]
    )
    assert candidate_rows(mask, 2).tolist() == [[0, 2], [-1, -1], [1, -1]]
    assert candidate_rows(mask[:, :1], 3).tolist() == [[0], [-1], [-1]]


SCORES = torch.tensor([[0.5, 0.55, 0.4, 0.3, 0.9], [0.2, 0.6, 0.1, 0.65, 0.5]])
"""Of two queries, whose targets are candidates 0 and 1; candidate 4 is known to be right for the
first."""


def batch() -> Batch:
    known_positive = np.zeros((2, 5), bool)
    known_positive[0, 4] = True
    return Batch((), (), np.array([0, 1]), known_positive, np.array([[3], [-1]]))


def loss_of(**settings: object) -> float:
    made = TrainingSettings.model_validate(settings)
    return float(made.loss.build()(SCORES, candidate_masks(SCORES, batch(), made)))


TRIPLET = {"type": "triplet", "margin": 0.2}
NCE = {"type": "info_nce", "temperature": 1.0}
BOTH = {"type": "sum", "parts": [{"weight": 2.0, "loss": NCE}, {"weight": 0.5, "loss": TRIPLET}]}


def test_triplet_of_the_hardest_valid_candidate() -> None:
    """Below the targets 0.5 and 0.6 the best are 0.4 and 0.5: each lacks 0.1 of the margin."""
    for online, expected in (
        ({"num_hard_candidates": 1}, 0.1),
        # 0.06 above the target counts too: 0.55 and 0.65, each 0.05 above
        ({"num_hard_candidates": 1, "hard_candidate_margin": 0.06}, 0.25),
        # 0.15 below it: 0.3 is beyond the margin; the second query's best is 0.2, beyond it too
        ({"num_hard_candidates": 1, "hard_candidate_margin": -0.15}, 0),
        # two of each: hinges 0.1 and 0, and 0.1 and 0
        ({"num_hard_candidates": 2}, 0.05),
        # off: the first query's own negative, 0.3, is 0.2 below
        ({}, 0),
    ):
        assert loss_of(**online, loss=TRIPLET) == pytest.approx(expected, abs=1e-6)
    # the one most similar candidate is not valid for either query, so there is no pair
    assert loss_of(num_hard_candidates=1, hard_candidate_pool=1, loss=TRIPLET) == 0


def test_a_margin_lets_harder_candidates_into_the_denominator() -> None:
    plain, wide = log(1 + exp(-0.1)), log(1 + exp(0.05))
    assert loss_of(num_hard_candidates=1, loss=NCE) == pytest.approx(plain, rel=1e-5)
    margin = {"num_hard_candidates": 1, "hard_candidate_margin": 0.06}
    assert loss_of(**margin, loss=NCE) == pytest.approx(wide, rel=1e-5)


def test_the_hardest_within_a_sum() -> None:
    for online in (
        {"num_hard_candidates": 1},
        {"num_hard_candidates": 2, "hard_candidate_margin": 0.06},
        {},
    ):
        parts = 2.0 * loss_of(**online, loss=NCE) + 0.5 * loss_of(**online, loss=TRIPLET)
        assert loss_of(**online, loss=BOTH) == pytest.approx(parts, rel=1e-5)
    both = 2 * log(1 + exp(-0.1)) + 0.05
    assert loss_of(num_hard_candidates=1, loss=BOTH) == pytest.approx(both, rel=1e-5)


def test_what_is_known_to_be_right_is_no_hardest_candidate() -> None:
    scores = torch.tensor([[0.5, 0.9]])
    known = Batch((), (), np.array([0]), np.array([[False, True]]), np.array([[-1]]))
    online = TrainingSettings(num_hard_candidates=1, hard_candidate_margin=1.0)
    masks = candidate_masks(scores, known, online)
    assert masks.hard_candidates_BH is not None and masks.hard_candidates_BH.tolist() == [[-1]]
