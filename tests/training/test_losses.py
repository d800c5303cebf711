"""Losses against closed forms worked out by hand, and against torch's own where torch has them."""

from __future__ import annotations

from math import exp, log
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError

from cirloop.training.config import (
    BradleyTerry,
    InfoNCE,
    LossConfig,
    LossPart,
    LossSum,
    TripletHinge,
)
from cirloop.training.losses import CandidateMasks, info_nce

NONE = torch.zeros(1, 2, dtype=torch.bool)
HALF = torch.tensor([[0.5, 0.3], [0.1, 0.2]])
"""Scores of two queries, each with its target on the diagonal."""
LOSSES = [
    InfoNCE(temperature=0.1),
    InfoNCE(temperature=0.1, mask_margin=0.05),
    TripletHinge(),
    BradleyTerry(temperature=0.1),
    LossSum(
        parts=(
            LossPart(weight=0.5, loss=InfoNCE(temperature=0.1)),
            LossPart(weight=2.0, loss=TripletHinge()),
        )
    ),
]


def nce(queries: Any, candidates: Any, target: torch.Tensor, out: torch.Tensor, t: float) -> Any:
    given = CandidateMasks(target, out, torch.full((len(queries), 1), -1))
    return info_nce(queries @ candidates.T, given, t)


def masks(own: list[list[int]], out: torch.Tensor | None = None, num: int = 2) -> CandidateMasks:
    """Queries whose targets are on the diagonal of their scores."""
    left_out = torch.zeros(len(own), num, dtype=torch.bool) if out is None else out
    return CandidateMasks(torch.arange(len(own)), left_out, torch.tensor(own))


def value(loss: Any, scores: torch.Tensor, given: CandidateMasks | list[list[int]]) -> float:
    """Of a loss; a list holds the own negatives of queries whose targets are on the diagonal."""
    mask = masks(given, num=scores.shape[1]) if isinstance(given, list) else given
    return float(loss.build()(scores, mask))


def test_one_query_with_its_target_and_one_other() -> None:
    """Scores 1 and 0 at temperature T: loss = log(1 + e^(-1/T))."""
    query, candidates = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for temperature in (1.0, 0.5, 0.1):
        right = nce(query, candidates, torch.tensor([0]), NONE, temperature)
        wrong = nce(query, candidates, torch.tensor([1]), NONE, temperature)
        assert right.item() == pytest.approx(log(1 + exp(-1 / temperature)), abs=1e-6)
        assert wrong.item() == pytest.approx(log(1 + exp(1 / temperature)), abs=1e-5)


def test_equal_scores_cost_the_log_of_the_candidates() -> None:
    query = torch.tensor([[1.0, 0.0]])
    for n in (1, 2, 5):
        mask = torch.zeros(1, n, dtype=torch.bool)
        loss = nce(query, query.repeat(n, 1), torch.tensor([0]), mask, 0.02)
        assert loss.item() == pytest.approx(log(n), abs=1e-6)


def test_two_queries_are_averaged() -> None:
    """cos 0.6 and 0.8 crossed: each target scores 0.8, each other 0.6."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    mask = torch.zeros(2, 2, dtype=torch.bool)
    straight = nce(queries, candidates, torch.tensor([0, 1]), mask, 1.0)
    assert straight.item() == pytest.approx(log(1 + exp(-0.2)), rel=1e-5)
    mixed = nce(queries, candidates, torch.tensor([0, 0]), mask, 1.0)
    assert mixed.item() == pytest.approx((log(1 + exp(-0.2)) + log(1 + exp(0.2))) / 2, rel=1e-5)


def test_masked_positive_leaves_the_denominator() -> None:
    query = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]])
    target, none = torch.tensor([0]), torch.zeros(1, 3, dtype=torch.bool)
    with_all = nce(query, candidates, target, none, 1.0)
    assert with_all.item() == pytest.approx(log(exp(0.8) + exp(1.0) + 1) - 0.8, rel=1e-5)
    masked = nce(query, candidates, target, torch.tensor([[False, True, False]]), 1.0)
    assert masked.item() == pytest.approx(log(exp(0.8) + 1) - 0.8, rel=1e-5)
    alone = nce(query, candidates, target, torch.tensor([[False, True, True]]), 1.0)
    assert alone.item() == pytest.approx(0.0, abs=1e-7)


def test_gradient_pulls_the_target_and_pushes_the_rest_but_not_the_masked() -> None:
    query = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    mask = torch.tensor([[False, True, False]])
    nce(query, candidates, torch.tensor([0]), mask, 1.0).backward()
    assert candidates.grad is not None
    p = 1 / (exp(0.8) + 1)  # of the third candidate
    assert candidates.grad[:, 0].tolist() == pytest.approx([-p, 0.0, p], abs=1e-6)
    assert candidates.grad.isfinite().all()


def test_info_nce_is_cross_entropy() -> None:
    scores = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    left_out = torch.zeros(6, 9, dtype=torch.bool)
    given = CandidateMasks(torch.tensor([3, 0, 8, 8, 1, 2]), left_out, torch.full((6, 1), -1))
    expected = F.cross_entropy(scores / 0.5, given.target_B)
    assert torch.equal(InfoNCE(temperature=0.5).build()(scores, given), expected)


def test_mask_margin_leaves_out_what_scores_too_high_but_not_own_negatives() -> None:
    """Of the second query's candidates 0.1 and target 0.2 none is 0.05 above; of the first 0.3 is
    0.1 above 0.2."""
    scores = torch.tensor([[0.2, 0.3], [0.1, 0.2]])
    loss = InfoNCE(temperature=1.0, mask_margin=0.05)
    second = log(1 + exp(-0.1))
    first = log(1 + exp(0.1))
    assert value(loss, scores, [[-1], [-1]]) == pytest.approx(second / 2, rel=1e-5)
    assert value(loss, scores, [[1], [-1]]) == pytest.approx((first + second) / 2, rel=1e-5)
    wide, plain = InfoNCE(temperature=1.0, mask_margin=0.2), InfoNCE(temperature=1.0)
    assert value(wide, scores, [[-1], [-1]]) == value(plain, scores, [[-1], [-1]])


def test_triplet_is_the_hinge_of_each_own_negative() -> None:
    """Targets lead by 0.2 and 0.1: hinges 0 and 0.1 at margin 0.2, 0.1 and 0.2 at margin 0.3."""
    for margin, own, loss in ((0.2, 0, 0.05), (0.3, 0, 0.15), (0.3, -1, 0.1)):
        hinge = TripletHinge(margin=margin)
        assert value(hinge, HALF, [[1], [own]]) == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    "loss", [TripletHinge(margin=0.3), BradleyTerry()], ids=lambda loss: loss.type
)
def test_queries_without_negatives_do_not_water_down_the_pairs(loss: Any) -> None:
    """The mean is over the queries that have a pair; without any the loss is 0 and has a gradient
    of 0."""
    alone = value(loss, HALF[:1], [[1]])
    assert value(loss, HALF, [[1], [-1]]) == pytest.approx(alone, rel=1e-6)
    scores = HALF.clone().requires_grad_()
    none = loss.build()(scores, masks([[-1], [-1]]))
    none.backward()
    assert none.item() == 0 and scores.grad is not None and not scores.grad.any()


def test_triplet_takes_the_hardest_valid_candidates_where_there_are_some() -> None:
    """Target 0.5; own negative 0.1, hardest 0.45 and 0.3: hinges 0.15 and 0. Bradley-Terry keeps
    its own."""
    scores = torch.tensor([[0.5, 0.1, 0.45, 0.3]])
    none = torch.zeros(1, 4, dtype=torch.bool)
    own, hard = torch.tensor([[1]]), torch.tensor([[2, 3]])
    given = CandidateMasks(torch.tensor([0]), none, own, hard)
    hinge = TripletHinge(margin=0.2)
    assert value(hinge, scores, given) == pytest.approx(0.15 / 2, abs=1e-6)
    assert value(BradleyTerry(), scores, given) == pytest.approx(log(1 + exp(-0.4)), rel=1e-5)
    nothing = CandidateMasks(torch.tensor([0]), none, own, torch.tensor([[-1, -1]]))
    assert value(hinge, scores, nothing) == 0


def test_bradley_terry_is_the_mean_of_its_pairs() -> None:
    one, other = log(1 + exp(-0.2)), log(1 + exp(-0.1))
    mean = pytest.approx((one + other) / 2, rel=1e-5)
    assert value(BradleyTerry(), HALF, [[1], [0]]) == mean
    assert value(BradleyTerry(), torch.tensor([[0.5, 0.3, 0.4]]), [[1, 2, -1]]) == mean
    warm = value(BradleyTerry(temperature=0.1), HALF, [[1], [0]])
    assert warm == pytest.approx((log(1 + exp(-2)) + log(1 + exp(-1))) / 2, rel=1e-5)


def test_a_sum_weighs_its_parts() -> None:
    given = masks([[1], [0]])
    parts = (LossPart(weight=0.5, loss=BradleyTerry()), LossPart(weight=3.0, loss=TripletHinge()))
    expected = 0.5 * BradleyTerry().build()(HALF, given) + 3.0 * TripletHinge().build()(HALF, given)
    assert torch.allclose(LossSum(parts=parts).build()(HALF, given), expected)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.type)
def test_every_loss_falls_along_its_gradient_and_is_read_back(loss: Any) -> None:
    scores = HALF.clone().requires_grad_()
    given = masks([[1], [0]])
    before = loss.build()(scores, given)
    before.backward()
    assert scores.grad is not None and scores.grad.any()
    assert (scores.grad.diagonal() <= 0).all(), "a target is pushed away"
    assert loss.build()(HALF - 0.01 * scores.grad, given) < before
    assert TypeAdapter(LossConfig).validate_python(loss.model_dump(mode="json")) == loss


def test_pairs_ignore_what_is_not_their_own() -> None:
    scores = torch.tensor([[0.5, 0.3, 9.0]], requires_grad=True)
    for loss in (TripletHinge(margin=0.3), BradleyTerry()):
        scores.grad = None
        loss.build()(scores, masks([[1, -1]], num=3)).backward()
        assert scores.grad is not None and scores.grad[0, 2] == 0 and scores.grad[0, 1] > 0


def test_a_loss_without_a_type_is_info_nce_and_an_unknown_one_is_refused() -> None:
    read = TypeAdapter(LossConfig).validate_python
    assert read({"temperature": 0.07}) == InfoNCE(temperature=0.07)
    unknown: list[dict[str, Any]] = [{"type": "dpo"}, {"type": "sum", "parts": []}]
    for wrong in (*unknown, {"type": "triplet", "temperature": 1}):
        with pytest.raises(ValidationError):
            read(wrong)
