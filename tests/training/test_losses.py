"""InfoNCE against closed forms worked out by hand."""

from __future__ import annotations

from math import exp, log

import pytest
import torch

from cirloop.training.losses import info_nce

NONE = torch.zeros(1, 2, dtype=torch.bool)


def test_one_query_with_its_target_and_one_other() -> None:
    """Scores 1 and 0 at temperature T: loss = log(1 + e^(-1/T))."""
    query, candidates = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    for temperature in (1.0, 0.5, 0.1):
        right = info_nce(query, candidates, torch.tensor([0]), NONE, temperature)
        wrong = info_nce(query, candidates, torch.tensor([1]), NONE, temperature)
        assert right.item() == pytest.approx(log(1 + exp(-1 / temperature)), abs=1e-6)
        assert wrong.item() == pytest.approx(log(1 + exp(1 / temperature)), abs=1e-5)


def test_equal_scores_cost_the_log_of_the_candidates() -> None:
    query = torch.tensor([[1.0, 0.0]])
    for n in (1, 2, 5):
        mask = torch.zeros(1, n, dtype=torch.bool)
        loss = info_nce(query, query.repeat(n, 1), torch.tensor([0]), mask, 0.02)
        assert loss.item() == pytest.approx(log(n), abs=1e-6)


def test_two_queries_are_averaged() -> None:
    """cos 0.6 and 0.8 crossed: each target scores 0.8, each other 0.6."""
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    candidates = torch.tensor([[0.8, 0.6], [0.6, 0.8]])
    mask = torch.zeros(2, 2, dtype=torch.bool)
    straight = info_nce(queries, candidates, torch.tensor([0, 1]), mask, 1.0)
    assert straight.item() == pytest.approx(log(1 + exp(-0.2)), rel=1e-5)
    mixed = info_nce(queries, candidates, torch.tensor([0, 0]), mask, 1.0)
    assert mixed.item() == pytest.approx((log(1 + exp(-0.2)) + log(1 + exp(0.2))) / 2, rel=1e-5)


def test_masked_positive_leaves_the_denominator() -> None:
    query = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]])
    target, none = torch.tensor([0]), torch.zeros(1, 3, dtype=torch.bool)
    with_all = info_nce(query, candidates, target, none, 1.0)
    assert with_all.item() == pytest.approx(log(exp(0.8) + exp(1.0) + 1) - 0.8, rel=1e-5)
    masked = info_nce(query, candidates, target, torch.tensor([[False, True, False]]), 1.0)
    assert masked.item() == pytest.approx(log(exp(0.8) + 1) - 0.8, rel=1e-5)
    alone = info_nce(query, candidates, target, torch.tensor([[False, True, True]]), 1.0)
    assert alone.item() == pytest.approx(0.0, abs=1e-7)


def test_gradient_pulls_the_target_and_pushes_the_rest_but_not_the_masked() -> None:
    query = torch.tensor([[1.0, 0.0]])
    candidates = torch.tensor([[0.8, 0.6], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    mask = torch.tensor([[False, True, False]])
    info_nce(query, candidates, torch.tensor([0]), mask, 1.0).backward()
    assert candidates.grad is not None
    p = 1 / (exp(0.8) + 1)  # of the third candidate
    assert candidates.grad[:, 0].tolist() == pytest.approx([-p, 0.0, p], abs=1e-6)
    assert candidates.grad.isfinite().all()
