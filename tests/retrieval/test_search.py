"""Rankings against a naive oracle, ties and all."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.retrieval import search
from cirloop.retrieval.search import rank
from cirloop.types import Gallery, ImageId, Query, QueryId, Rankings

Floats = npt.NDArray[np.float32]
Problem = tuple[list[Query], list[ImageId], Gallery, Floats, Floats]


def problem(queries_QD: Any, gallery_GD: Any, references: list[int], targets: list[int]) -> Problem:
    gallery = Gallery("g", tuple(ImageId(f"i{row:04d}") for row in range(len(gallery_GD))))
    queries = [Query(QueryId(f"q{i}"), gallery.ids[row], "text") for i, row in enumerate(references)]
    wanted = [gallery.ids[row] for row in targets]
    return queries, wanted, gallery, np.array(queries_QD, np.float32), np.array(gallery_GD, np.float32)


def naive(given: Problem, depth: int) -> list[tuple[list[str], list[float], int, float]]:
    """Per query: the best's ids and scores, the target's rank and score, by sorting in plain Python."""
    queries, targets, gallery, queries_QD, gallery_GD = given
    out = []
    for query, target, vector in zip(queries, targets, queries_QD.tolist(), strict=True):
        scored = [
            (-sum(a * b for a, b in zip(vector, row, strict=True)), image)
            for image, row in zip(gallery.ids, gallery_GD.tolist(), strict=True)
            if image != query.reference
        ]
        scored.sort()
        place = [image for _, image in scored].index(target)
        best = scored[: depth or None]
        out.append(([i for _, i in best], [-s for s, _ in best], place + 1, -scored[place][0]))
    return out


def as_rows(rankings: Rankings) -> list[tuple[list[str], list[float], int, float]]:
    return [
        ([rankings.gallery.ids[row] for row in images], scores.tolist(), int(place), float(score))
        for images, scores, place, score in zip(
            rankings.images_QK,
            rankings.scores_QK,
            rankings.target_rank_Q,
            rankings.target_score_Q,
            strict=True,
        )
    ]


@st.composite
def tied(draw: st.DrawFn) -> Problem:
    """Vectors of two small integers: scores are exact in float32 and take few distinct values."""
    size, count = draw(st.integers(2, 40)), draw(st.integers(1, 6))
    vector = st.lists(st.integers(-1, 1), min_size=2, max_size=2)
    references = draw(st.lists(st.integers(0, size - 1), min_size=count, max_size=count))
    targets = [draw(st.integers(0, size - 1).filter(lambda t, r=r: t != r)) for r in references]
    vectors = (draw(st.lists(vector, min_size=n, max_size=n)) for n in (count, size))
    return problem(*vectors, references, targets)


@given(given=tied(), depth=st.integers(0, 45))
def test_exact_search_is_sorting_by_score_then_id(given: Problem, depth: int) -> None:
    assert as_rows(rank(*given, depth)) == naive(given, depth)


@pytest.mark.parametrize("depth", [1, 10, 24, 25, 99, 0])
def test_ties_at_the_cut_go_to_the_lower_id_at_every_depth(depth: int) -> None:
    """Both ways of cutting, a partition (shallow) and a full sort (deep), keep the same images."""
    given = problem([[1.0]], [[1.0]] * 100, [50], [99])
    ids = [f"i{row:04d}" for row in range(100) if row != 50]
    assert as_rows(rank(*given, depth)) == [(ids[: depth or 99], [1.0] * (depth or 99), 99, 1.0)]


def unit(rng: np.random.Generator, *shape: int) -> Floats:
    vectors = rng.standard_normal(shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def random_problem(seed: int, num_queries: int, num_images: int) -> Problem:
    rng = np.random.default_rng(seed)
    pairs = [rng.choice(num_images, 2, replace=False).tolist() for _ in range(num_queries)]
    return problem(unit(rng, num_queries, 16), unit(rng, num_images, 16), [p[0] for p in pairs], [p[1] for p in pairs])


@pytest.mark.parametrize("depth", [1, 7, 199, 0])
def test_faiss_finds_what_exact_search_finds(depth: int) -> None:
    given = random_problem(0, 40, 200)
    exact, faiss = (rank(*given, depth, way) for way in ("exact", "faiss"))
    assert np.array_equal(exact.images_QK, faiss.images_QK)
    assert np.allclose(exact.scores_QK, faiss.scores_QK, atol=1e-6)
    assert np.array_equal(exact.target_rank_Q, faiss.target_rank_Q)
    assert np.array_equal(exact.target_score_Q, faiss.target_score_Q)


@given(given=tied(), depth=st.integers(0, 45))
def test_faiss_breaks_ties_as_exact_search_does(given: Problem, depth: int) -> None:
    assert as_rows(rank(*given, depth, "faiss")) == naive(given, depth)


@pytest.mark.parametrize("way", ["exact", "faiss"])
def test_reference_is_never_ranked(way: Literal["exact", "faiss"]) -> None:
    """Even where it is the best match by far."""
    rng = np.random.default_rng(1)
    images = unit(rng, 30, 8)
    references = list(range(30))
    given = problem(images, images, references, [(r + 1) % 30 for r in references])
    rankings = rank(*given, 0, way)
    assert rankings.images_QK.shape == (30, 29)
    for reference, row in enumerate(rankings.images_QK):
        assert sorted(row) == [r for r in references if r != reference]


def test_rank_of_the_target_is_its_place_in_the_full_ranking() -> None:
    given = random_problem(2, 50, 120)
    full, shallow = rank(*given, 0), rank(*given, 3)
    rows = given[2].rows()
    for i, target in enumerate(given[1]):
        assert full.images_QK[i].tolist().index(rows[target]) + 1 == full.target_rank_Q[i]
    assert np.array_equal(full.target_rank_Q, shallow.target_rank_Q)
    assert np.array_equal(full.images_QK[:, :3], shallow.images_QK)


def test_blocks_do_not_change_the_ranking(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, targets, gallery, queries_QD, gallery_GD = random_problem(3, 20, 60)
    given = (
        queries,
        targets,
        gallery,
        np.round(queries_QD * 8),
        np.round(gallery_GD * 8),
    )  # exact in float32
    whole = rank(*given, 5)
    monkeypatch.setattr(search, "BLOCK", 7)
    assert as_rows(rank(*given, 5)) == as_rows(whole) == naive(given, 5)


def test_rankings_carry_their_queries_and_types() -> None:
    given = random_problem(4, 3, 9)
    rankings = rank(*given, 2)
    assert rankings.queries == ("q0", "q1", "q2") and rankings.gallery is given[2]
    assert (rankings.images_QK.dtype, rankings.scores_QK.dtype) == (np.int32, np.float32)
    assert (np.diff(rank(*given, 0).scores_QK, axis=1) <= 0).all()


def test_query_about_an_image_outside_the_gallery_is_refused() -> None:
    queries, targets, gallery, queries_QD, gallery_GD = random_problem(5, 2, 9)
    with pytest.raises(KeyError, match="elsewhere"):
        rank(queries, [ImageId("elsewhere"), targets[1]], gallery, queries_QD, gallery_GD, 2)
