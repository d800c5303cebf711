"""Searches multiply in float32 where the process allows less, and leave what it allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest
import torch

from cirloop.retrieval.gallery_part import GalleryPart
from cirloop.retrieval.precision import float32_products
from cirloop.retrieval.topk import ranks, score_blocks, scores_of, topk

RANDOM = np.random.default_rng(0)
QUERIES = RANDOM.standard_normal((30, 16)).astype(np.float32)
GALLERY = RANDOM.standard_normal((400, 16)).astype(np.float32)
WANTED = RANDOM.integers(0, 400, (30, 1))


def by_function() -> None:
    torch.set_float32_matmul_precision("medium")


def by_older_flag() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True


def by_newer_flag() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


SWITCHES: list[Callable[[], None]] = [by_function, by_older_flag, by_newer_flag]
SEARCHES: dict[str, Callable[[], Any]] = {
    "topk": lambda: topk(QUERIES, GALLERY, 5),
    "ranks": lambda: ranks(QUERIES, GALLERY, WANTED),
    "scores_of": lambda: scores_of(QUERIES, GALLERY, WANTED),
    "score_blocks": lambda: [scores for _, scores in score_blocks(QUERIES, GALLERY)],
}


def allowed() -> list[str]:
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    try:
        overall = torch.get_float32_matmul_precision()
    except RuntimeError:
        overall = "the two interfaces of torch disagree"
    return [overall, *(backend.fp32_precision for backend in backends)]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", SEARCHES)
def test_products_are_exact_and_the_setting_is_put_back(
    name: str, switch: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = SEARCHES[name]()
    switch()
    before = allowed()
    assert before != ["highest", "ieee", "ieee"]
    seen = []
    matmul, exact = torch.Tensor.__matmul__, GalleryPart.exact

    def watched(*args: Any) -> Any:
        seen.append(allowed())
        return matmul(*args)

    def watched_exact(*args: Any) -> Any:
        seen.append(allowed())
        return exact(*args)

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    monkeypatch.setattr(GalleryPart, "exact", watched_exact)
    found = SEARCHES[name]()
    assert seen and all(each == ["highest", "ieee", "ieee"] for each in seen)
    assert allowed() == before
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_between_two_blocks_of_scores_the_setting_is_as_it_was() -> None:
    by_function()
    for _ in score_blocks(QUERIES, GALLERY):
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("switch", SWITCHES)
def test_an_error_puts_it_back(switch: Callable[[], None]) -> None:
    switch()
    before = allowed()
    with pytest.raises(ValueError, match="within"), float32_products():
        raise ValueError("within")
    assert allowed() == before


def test_of_two_threads_the_last_puts_it_back() -> None:
    by_function()
    both, first_is_out = Barrier(2), Barrier(2)
    seen: list[str] = []

    def search(leaves_first: bool) -> None:
        with float32_products():
            both.wait(10)
            if not leaves_first:
                first_is_out.wait(10)
                seen.append(torch.get_float32_matmul_precision())
        if leaves_first:
            first_is_out.wait(10)

    threads = [Thread(target=search, args=(leaves_first,)) for leaves_first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
