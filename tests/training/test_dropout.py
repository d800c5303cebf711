"""Dropout of some rows is that of all of them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from cirloop.training.dropout import Window, drawn_for, random_state
from cirloop.types import UserError


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("pieces", [(7,), (3, 3, 1), (1, 6)])
def test_pieces_drop_out_what_the_whole_does(dim: int, pieces: tuple[int, ...]) -> None:
    rows = torch.randn(7, 7, 5)
    layers = torch.nn.Sequential(torch.nn.Dropout(0.3), torch.nn.Linear(5, 5), torch.nn.Dropout(0.6))
    torch.manual_seed(1)
    whole, after, first = layers(rows), torch.get_rng_state(), 0
    for count in pieces:
        torch.manual_seed(1)
        with drawn_for(Window(first, count, 7, dim)):
            made = layers(rows.narrow(dim, first, count))
        assert torch.equal(made == 0, whole.narrow(dim, first, count) == 0)
        assert torch.allclose(made, whole.narrow(dim, first, count))
        assert torch.equal(torch.get_rng_state(), after)
        first += count
    assert float((whole == 0).float().mean()) > 0.2


def test_what_does_not_train_drops_nothing() -> None:
    rows = torch.randn(2, 5)
    with drawn_for(Window(0, 2, 7)):
        assert torch.equal(torch.nn.Dropout(0.5).eval()(rows), rows)
        assert torch.equal(torch.nn.Dropout(0.0)(rows), rows)


def test_checkpointed_layers_drop_out_the_same_again() -> None:
    rows, layer = torch.randn(4, 5, requires_grad=True), torch.nn.Dropout(0.5)
    torch.manual_seed(2)
    with drawn_for(Window(2, 4, 9)):
        made = checkpoint(lambda x: layer(x) * x, rows, use_reentrant=False)
        made.sum().backward()
    assert rows.grad is not None and torch.allclose(rows.grad * rows, 2 * made)


def test_rows_along_another_dimension_are_noticed() -> None:
    with drawn_for(Window(0, 2, 7)):
        assert F.dropout(torch.ones(3, 2), 0.0).shape == (3, 2)  # drops nothing
        with pytest.raises(UserError, match=r"training.chunk_size"):
            F.dropout(torch.ones(3, 2))
    assert F.dropout(torch.ones(3, 2)).shape == (3, 2)


@pytest.mark.parametrize("by_name", [True, False])
def test_dropout_inside_attention_is_refused(by_name: bool) -> None:
    heads = torch.randn(2, 1, 3, 4)
    with drawn_for(Window(0, 2, 7)):
        F.scaled_dot_product_attention(heads, heads, heads)
        with pytest.raises(UserError, match="attention itself drops out"):
            if by_name:
                F.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.1)
            else:
                F.scaled_dot_product_attention(heads, heads, heads, None, 0.1)


def test_a_random_state_comes_back() -> None:
    torch.manual_seed(3)
    bring_back = random_state(torch.device("cpu"))
    first = torch.rand(5)
    bring_back()
    assert torch.equal(torch.rand(5), first)
