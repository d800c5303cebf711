"""The best of made-up evaluations, and when there is none."""

from __future__ import annotations

from typing import Any

import pytest

from cirloop.evaluation.best import best_of, gain_words, is_out_of_patience


def evaluations(*values: float, base: float | None = 0.1) -> list[dict[str, Any]]:
    """Of a base model and iterations 0, 1, ..., with these recalls."""
    labels = [*([] if base is None else ["base"]), *map(str, range(len(values)))]
    numbers = [*([] if base is None else [base]), *values]
    return [
        {
            "iteration": label,
            "split": "shapes_val",
            "compared_on": "recall@1",
            "metrics": {"recall@1": value, "recall@5": 1 - value},
        }
        for label, value in zip(labels, numbers, strict=True)
    ]


def test_the_best_is_the_earliest_of_equal_ones() -> None:
    best = best_of(evaluations(0.2, 0.4, 0.3, 0.4))
    assert best is not None
    assert (best.iteration, best.metric, best.value) == (1, "recall@1", 0.4)
    assert best.describe() == "iteration 1 is the best by recall@1 on shapes_val (40.0)"
    turned = best_of(evaluations(0.2, 0.4, 0.3, 0.4)[::-1])
    assert turned == best


def test_the_base_model_is_no_iteration_and_is_named_where_it_is_better() -> None:
    best = best_of(evaluations(0.2, 0.3, base=0.5))
    assert best is not None and best.iteration == 1
    assert best.describe().endswith("(30.0); the base model is better there (50.0)")
    assert best_of(evaluations()) is None and best_of([]) is None


@pytest.mark.parametrize(
    ("values", "patience", "over"),
    [
        ((0.3,), 1, False),
        ((0.3, 0.4), 1, False),
        ((0.3, 0.3), 1, True),  # as good is not better
        ((0.3, 0.2, 0.4), 1, False),
        ((0.3, 0.2, 0.25), 2, True),
        ((0.3, 0.4, 0.2, 0.35), 2, True),
        ((0.3, 0.4, 0.2, 0.35), 3, False),
        ((0.3, 0.2, 0.2, 0.2), 0, False),  # off
        ((), 1, False),
    ],
)
def test_patience_counts_rounds_since_the_best(
    values: tuple[float, ...], patience: int, over: bool
) -> None:
    assert is_out_of_patience(evaluations(*values), patience) is over
    assert is_out_of_patience(evaluations(*values, base=None), patience) is over


def test_the_base_model_does_not_end_a_run() -> None:
    assert not is_out_of_patience(evaluations(0.2, 0.3, base=0.9), 1)


def test_a_gain_is_said_of_the_best_iteration() -> None:
    rows = evaluations(0.4, 0.531, 0.5, base=0.285)
    assert gain_words(rows) == "recall@1 53.1: +24.6 over base, shapes_val, iteration 1"
    assert gain_words(rows[1:3]).startswith("recall@1 53.1: +13.1 over iteration 0, ")
    assert gain_words(rows[:1]) == ""
    assert gain_words(evaluations(0.4, 0.3, base=None)) == ""  # the first is the best
    assert gain_words(evaluations(0.3, base=0.4)).startswith("recall@1 30.0: -10.0 over base, ")
