"""Strategies by attribute, category and group against plain loops over images, on random cases with
many unknowns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cirloop.negatives.attributes.table import Table
from cirloop.negatives.attributes.values import agrees, compare_values, join_values
from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy
from cirloop.negatives.strategies.attribute_mismatch import AttributeMismatch
from cirloop.negatives.strategies.category_discrepant import CategoryDiscrepant
from cirloop.negatives.strategies.category_mix import CategoryMix
from cirloop.negatives.strategies.group import Group
from cirloop.negatives.strategies.soft import Soft
from cirloop.types import QueryId, UserError
from tests.negatives.cases import Case, cases

NAMES = ("color", "shape", "size")
LETTERS = ("a", "b", "c")


@dataclass(frozen=True)
class World:
    """A case and what is known of its images and queries."""

    case: Case
    context: MiningContext

    @property
    def size(self) -> int:
        return int(self.case.scores_QG.shape[1])


@st.composite
def worlds(draw: st.DrawFn) -> World:
    case = draw(cases())
    queries, size = case.scores_QG.shape
    values = st.lists(st.sampled_from(LETTERS), min_size=1, max_size=2).map(join_values)
    image = st.dictionaries(st.sampled_from(NAMES), values)
    wanted = st.one_of(values, st.sampled_from(("*", "!a", "!b")))
    text = st.dictionaries(st.sampled_from((*NAMES, "unheard of")), wanted)
    members = st.sets(st.integers(0, size - 1), max_size=6)
    categories = st.lists(st.sampled_from(("dress", "shirt", "")), min_size=size, max_size=size)
    vectors = draw(st.lists(st.integers(0, 7), min_size=size, max_size=size))
    angles = np.array(vectors) * np.pi / 4  # many equal vectors
    context = MiningContext(
        seed=draw(st.integers(0, 3)),
        query_ids=[QueryId(f"q{i}") for i in range(queries)],
        targets_Q=np.array(case.targets),
        groups=[frozenset(draw(members)) for _ in range(queries)],
        categories=draw(categories),
        attributes=draw(st.lists(image, min_size=size, max_size=size)),
        requested_attributes=draw(st.lists(text, min_size=queries, max_size=queries)),
        vectors_GD=np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32),
    )
    return World(case, context)


def meets(wanted: str | None, found: str | None) -> bool | None:
    """Whether an image's values meet what is wanted, in so many words."""
    if wanted in (None, "", "*") or found is None:
        return None
    assert wanted is not None
    has = found.split("|")
    if wanted.startswith("!"):
        return wanted[1:] not in has
    want = wanted.split("|")
    num = sum(value in has for value in want)
    return True if num == len(want) else False if num == 0 else None


def says(world: World, i: int, g: int, name: str) -> int:
    """1, -1 or 0: the image agrees, differs or is unknown in an attribute."""
    context = world.context
    assert context.requested_attributes is not None and context.attributes is not None
    asked = context.requested_attributes[i].get(name)
    target = context.attributes[world.case.targets[i]].get(name)
    found = context.attributes[g].get(name)
    if meets(asked, target) is False:
        asked = None
    answers = {meets(asked, found), meets(target, found)}
    return 1 if True in answers else -1 if False in answers else 0


def verdicts(world: World, i: int, g: int) -> tuple[list[int], list[int]]:
    """Return the verdicts on the attributes asked for, and of the rest."""
    assert world.context.requested_attributes is not None
    requested = world.context.requested_attributes[i]
    asked = [says(world, i, g, name) for name in NAMES if name in requested]
    return asked, [says(world, i, g, name) for name in NAMES if name not in requested]


def chosen(
    strategy: Strategy, world: World, reference: str = "out", split: bool = False
) -> list[list[int]]:
    """Gallery rows per query, all in one block or each query in its own."""
    block = world.case.whole(reference)
    blocks = [one(block, i) for i in range(len(world.case.targets))] if split else [block]
    return [row.tolist() for part in blocks for row in strategy.choose(part, world.context)]


def one(block: CandidateBlock, i: int) -> CandidateBlock:
    return block.select(slice(i, i + 1))


def by_score(world: World, i: int, rows: list[int]) -> list[int]:
    return sorted(rows, key=lambda g: (-world.case.scores_QG[i, g], g))


def eligible(strategy: Strategy, world: World, i: int, reference: str) -> list[int]:
    """Images a strategy may choose, best first, by plain loops."""
    rows = []
    for g in world.case.allowed(i, reference):
        asked, other = verdicts(world, i, g)
        both = asked + other
        match strategy:
            case CategoryDiscrepant():
                fits = -1 in asked and closeness(world, i, g) >= strategy.min_similarity
            case AttributeMismatch():
                differs = -1 in asked and 1 not in asked and -1 not in other
                fits = differs and other.count(1) >= strategy.min_agreeing
            case Soft():
                num = both.count(1)
                total = num + both.count(-1)
                least, most = strategy.min_agreement, strategy.max_agreement
                fits = 0 < num < total and least <= num / total <= most
            case _:
                assert isinstance(strategy, Group) and world.context.groups is not None
                fits = g in world.context.groups[i]
        rows += [g] if fits else []
    if isinstance(strategy, CategoryDiscrepant):
        return sorted(rows, key=lambda g: (-closeness(world, i, g), g))
    return by_score(world, i, rows)


def closeness(world: World, i: int, g: int) -> float:
    vectors = world.context.vectors_GD
    assert vectors is not None
    pairs = zip(vectors[world.case.targets[i]].tolist(), vectors[g].tolist(), strict=True)
    return sum(a * b for a, b in pairs)


def made(strategy: type[Strategy], **settings: st.SearchStrategy[Any]) -> Any:
    return st.builds(strategy, negatives_per_query=st.integers(1, 30), **settings)


LEAST, MOST = st.sampled_from((0.0, 0.5)), st.sampled_from((0.5, 1.0))
MADE = st.one_of(
    made(CategoryDiscrepant, min_similarity=st.sampled_from((-1.0, 0.5))),
    made(AttributeMismatch, min_agreeing=st.integers(0, 2)),
    made(Soft, min_agreement=LEAST, max_agreement=MOST),
    made(Group),
)


@given(worlds(), MADE, st.sampled_from(("out", "in")))
def test_the_best_of_those_that_fit_are_chosen(
    world: World, strategy: Strategy, reference: str
) -> None:
    expected = [
        eligible(strategy, world, i, reference)[: strategy.negatives_per_query]
        for i in range(len(world.case.targets))
    ]
    assert chosen(strategy, world, reference) == expected


@given(
    worlds(),
    st.one_of(MADE, st.builds(CategoryMix, negatives_per_query=st.integers(1, 12))),
    st.randoms(),
)
def test_choices_do_not_hang_on_blocks_or_tables(
    world: World, strategy: Strategy, shuffle: Any
) -> None:
    assert world.context.attributes is not None
    whole = chosen(strategy, world)
    assert chosen(strategy, world, split=True) == whole
    table = World(world.case, replace(world.context, attributes=Table(world.context.attributes)))
    assert chosen(strategy, table) == whole
    order = list(range(world.size))
    shuffle.shuffle(order)
    block = world.case.whole()
    names = ("gallery_index_BK", "scores_BK", "eligible_BK")
    moved = replace(block, **{name: getattr(block, name)[:, order] for name in names})
    if not isinstance(strategy, CategoryMix):  # draws by place
        rows = strategy.choose(moved, world.context)
        got = [set(block.scores_BK[i, [order[p] for p in row]]) for i, row in enumerate(rows)]
        want = [set(block.scores_BK[i, row]) for i, row in enumerate(whole)]
        assert got == want


def pools(world: World, i: int, reference: str) -> tuple[set[int], set[int], set[int]]:
    """Return the pools: same category, other category, any."""
    kinds = world.context.categories
    assert kinds is not None
    mine = kinds[world.case.targets[i]]
    may = world.case.allowed(i, reference)
    same = {g for g in may if mine and kinds[g] == mine}
    return same, {g for g in may if mine and kinds[g] and kinds[g] != mine}, set(may)


@given(
    worlds(),
    st.integers(1, 30),
    st.sampled_from(((0.7, 0.2, 0.1), (1.0, 0.0, 0.0), (0.0, 0.5, 0.5))),
)
def test_a_mix_takes_its_share_of_each_pool(
    world: World, k: int, shares: tuple[float, float, float]
) -> None:
    for how in ("random", "hardest"):
        mix = CategoryMix(
            negatives_per_query=k, same=shares[0], other=shares[1], any=shares[2], selection=how
        )  # type: ignore[arg-type]
        rows = chosen(mix, world)
        counts_of = mix.num_per_pool(world.case.whole(), world.context)
        assert rows == chosen(mix, world)
        for i, found in enumerate(rows):
            same, other, every = pools(world, i, "out")
            counts = counts_of[i]
            want = [min(len(same), counts[0]), min(len(other), counts[1])]
            want.append(min(len(every) - sum(want), counts[2]))
            assert len(found) == len(set(found)) == sum(want)
            assert set(found) <= every
            assert found == by_score(world, i, found)
            assert len(same & set(found)) >= want[0] and len(other & set(found)) >= want[1]
            assert len(set(found) - same - other) <= want[2]
            if how == "hardest":
                taken = by_score(world, i, list(same))[: counts[0]]
                taken += by_score(world, i, list(other))[: counts[1]]
                left = by_score(world, i, list(every - set(taken)))[: counts[2]]
                assert set(found) == {*taken, *left}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("k", [1, 2, 3, 5, 10])
def test_the_shares_hold_over_the_queries_for_every_k(k: int, seed: int) -> None:
    """1,000 queries over 60 images of three categories; `any` is counted by what is left of a
    query's quota."""
    queries = 1000
    size = 60
    scores = np.random.default_rng(seed).random((queries, size)).astype(np.float32)
    targets = [i % 20 for i in range(queries)]  # all of category a
    case = Case(scores, targets, [59] * queries, [{t} for t in targets])
    kinds = ["a"] * 20 + ["b"] * 20 + [""] * 20
    mix = CategoryMix(negatives_per_query=k)
    world = World(case, MiningContext(seed=seed, categories=kinds, targets_Q=np.array(targets)))
    counts = np.array(mix.num_per_pool(case.whole(), world.context))
    assert (counts.sum(axis=1) == k).all()
    for total, share in zip(counts.sum(axis=0).tolist(), (0.7, 0.2, 0.1), strict=True):
        assert abs(total - share * k * queries) <= 1
    for column, share in zip(counts.T, (0.7, 0.2, 0.1), strict=True):
        assert set(column.tolist()) <= {int(share * k + 1e-9), int(share * k + 1e-9) + 1}
    rows = chosen(mix, world)
    found = [[kinds[row] for row in images] for images in rows]
    # of `any` alone: about 20 of its 57 and less
    unknown = sum(images.count("") for images in found)
    same, other = (sum(images.count(kind) for images in found) for kind in "ab")
    assert same >= 0.7 * k * queries - 1 and other >= 0.2 * k * queries - 1
    assert same + other + unknown == k * queries
    if k == 1:
        assert abs(unknown - 100 * 20 / 58) < 20  # a third of the tenth, deviation 4.7


def test_the_mix_at_one_image_differs_by_seed_and_not_by_block() -> None:
    targets = np.zeros(50, np.int64)
    scores = np.tile(np.linspace(1, 0, 9, dtype=np.float32), (50, 1))
    block = Case(scores, [0] * 50, [8] * 50, [{0}] * 50).whole()
    mix = CategoryMix(negatives_per_query=1)
    first, second = (MiningContext(seed=seed, targets_Q=targets) for seed in (0, 1))
    whole = mix.num_per_pool(block, first)
    assert whole != mix.num_per_pool(block, second)
    halves = [block.select(slice(None, 20)), block.select(slice(20, None))]
    assert [row for half in halves for row in mix.num_per_pool(half, first)] == whole


def small(**context: Any) -> World:
    """One query over six images, scores falling with the row; reference 0, target 1."""
    case = Case(np.array([[0.6, 0.5, 0.4, 0.3, 0.2, 0.1]], np.float32), [1], [0], [{1}])
    return World(case, MiningContext(seed=0, targets_Q=np.array([1]), **context))


RED = {"color": "red", "shape": "circle", "size": "small"}


def test_each_attribute_strategy_takes_its_own_kind_of_image() -> None:
    blue, large = RED | {"color": "blue"}, RED | {"size": "large"}
    world = small(
        requested_attributes=[{"color": "red"}],
        attributes=[RED, RED, blue, blue | {"size": "large"}, large, {"shape": "circle"}],
        vectors_GD=np.eye(6, 2, dtype=np.float32) + np.float32(0.1),
    )
    assert chosen(AttributeMismatch(), world) == [[2]]
    assert chosen(CategoryDiscrepant(), world) == [[2, 3]]
    assert chosen(Soft(), world) == [[2, 3, 4]]
    assert chosen(Soft(min_agreement=0.5), world) == [[2, 4]]


@pytest.mark.parametrize(
    "strategy", [CategoryDiscrepant(), AttributeMismatch(min_agreeing=0), Soft()]
)
def test_unknown_is_never_a_mismatch(strategy: Strategy) -> None:
    vectors = np.ones((6, 2), np.float32)
    for asked, attributes in [
        ({}, [RED] * 6),
        ({"color": "red"}, [{}] * 6),
        ({"color": "*"}, [{"shape": "a"}] * 6),
    ]:
        known = {"requested_attributes": [asked], "attributes": attributes}
        assert chosen(strategy, small(**known, vectors_GD=vectors)) == [[]]


def test_a_text_that_the_target_contradicts_is_not_believed() -> None:
    blue = {**RED, "color": "blue"}
    attributes = [RED, blue, blue, RED, RED, RED]
    world = small(requested_attributes=[{"color": "red"}], attributes=attributes)
    assert chosen(AttributeMismatch(), world) == [[3, 4, 5]]


def test_one_category_leaves_other_empty_and_unknown_targets_have_none() -> None:
    mix = CategoryMix(negatives_per_query=10)
    assert chosen(mix, small(categories=["dress"] * 6)) == [[2, 3, 4, 5]]
    assert len(chosen(mix, small(categories=[""] * 6))[0]) == 1  # the share of any
    others = CategoryMix(negatives_per_query=4, same=0, other=1, any=0)
    assert chosen(others, small(categories=["dress"] * 6)) == [[]]


def test_a_mix_draws_evenly_and_differently_per_query_and_seed() -> None:
    case = Case(np.zeros((1, 12), np.float32), [1], [0], [{1}])
    counts = np.zeros(12)
    for seed in range(600):
        known = {"categories": ["dress"] * 12, "targets_Q": np.array([1])}
        world = World(case, MiningContext(seed=seed, **known))
        counts[chosen(CategoryMix(negatives_per_query=1), world)[0]] += 1
    assert counts[:2].sum() == 0
    assert counts[2:].min() > 30 and counts[2:].max() < 95  # 60 expected, 4.8 standard deviations


@pytest.mark.parametrize(
    ("strategy", "missing"),
    [
        (CategoryDiscrepant(), "attributes.*requested_attributes.*vectors_GD"),
        (AttributeMismatch(), "attributes.*requested_attributes"),
        (Soft(), "attributes.*requested_attributes"),
        (CategoryMix(), "categories"),
        (Group(), "groups"),
    ],
)
def test_what_is_needed_and_missing_is_named(strategy: Strategy, missing: str) -> None:
    with pytest.raises(UserError, match=missing):
        chosen(strategy, small())


def test_settings_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"must sum to 1, found 0\.9"):
        CategoryMix(same=0.6)
    with pytest.raises(ValidationError, match=r"min_agreement 0\.8 is above max_agreement 0\.2"):
        Soft(min_agreement=0.8, max_agreement=0.2)


def test_near_ties_are_settled_by_exact_similarity_whatever_the_block() -> None:
    stream = np.random.default_rng(0)
    vectors = stream.normal(size=(1, 96)) + stream.normal(size=(300, 96)) * 1e-4
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    case = Case(np.zeros((5, 300), np.float32), [1, 2, 3, 4, 5], [0] * 5, [{1}, {2}, {3}, {4}, {5}])
    attributes = [{"color": "red" if g < 6 else "blue"} for g in range(300)]
    known = {"requested_attributes": [{"color": "red"}] * 5, "attributes": attributes}
    strategy = CategoryDiscrepant(negatives_per_query=7)
    for held in (vectors, vectors.astype(np.float16)):
        world = World(case, MiningContext(seed=0, **known, vectors_GD=held))
        exact = held.astype(np.float64)
        found = chosen(strategy, world)
        for i, rows in enumerate(found):
            near = (exact * exact[case.targets[i]]).sum(1)
            assert rows == sorted(range(6, 300), key=lambda g: (-near[g], g))[:7]
        assert chosen(strategy, world, split=True) == found


@pytest.mark.parametrize(
    ("wanted", "found", "answer"),
    [
        ("red", "red", True),
        ("red", "blue", False),
        ("red", None, None),
        (None, "red", None),
        ("*", "red", None),
        ("red", "blue|red", True),
        ("blue|red", "red", None),
        ("blue|red", "green", False),
        ("!red", "red", False),
        ("!red", "blue", True),
        ("!red", "!red", True),
        ("!red", "!blue", None),
        ("red", "!red", False),
        ("red", "!blue", None),
        ("!blue|red", "blue|red", False),
        ("!blue|red", "red", True),
        ("", "", None),
    ],
)
def test_when_values_agree(wanted: str | None, found: str | None, answer: bool | None) -> None:
    assert agrees(wanted, found) is answer


@pytest.mark.parametrize(
    ("asked", "target", "found", "answer"),
    [
        ("red", None, "blue", -1),
        ("red", None, "red", 1),
        ("red", None, None, 0),
        ("*", "red", "blue", -1),
        ("*", None, "blue", 0),
        ("red", "blue", "blue", 1),  # the target has it, so it is right
        ("red", "blue", "red", -1),
        ("red", "blue|red", "green|red", 1),
        ("red", "blue|red", "blue|green", -1),
        (None, "blue|red", "blue|green", 0),
    ],
)
def test_what_is_wanted_of_text_and_target(
    asked: str | None, target: str | None, found: str | None, answer: int
) -> None:
    assert compare_values(asked, target, found) == answer
