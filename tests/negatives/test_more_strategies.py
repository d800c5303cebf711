"""Strategies beyond ranking, each against an oracle of plain loops, over the whole gallery and over
windows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from typing import Annotated, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from cirloop.negatives.base import CandidateBlock, MiningContext, Strategy, sorted_block
from cirloop.negatives.strategies.curriculum import Curriculum
from cirloop.negatives.strategies.diverse import Diverse
from cirloop.negatives.strategies.in_batch import InBatch
from cirloop.negatives.strategies.mixture import Mixture, MixturePart, allocate, derived_context
from cirloop.negatives.strategies.online_hardest import OnlineHardest
from cirloop.negatives.strategies.semantic import Semantic
from cirloop.negatives.strategies.semi_hard import SemiHard
from cirloop.retrieval.ann import kmeans
from cirloop.retrieval.arrays import Rows
from cirloop.types import QueryId, UserError
from tests.negatives.cases import Case, cases

ANY = SemiHard | InBatch | OnlineHardest | Semantic | Diverse
Union = Annotated[ANY, Field(discriminator="type")]
for model in (MixturePart, Mixture, Curriculum):  # nothing where the package has done it
    model.model_rebuild(_types_namespace={"AnyStrategy": Union})

EIGHTHS = st.integers(-8, 8).map(lambda n: n / 8)
COUNTS = st.sampled_from([1, 2, 3, 5, 30])
Oracle = Callable[[int, list[int]], list[int]]
"""Query, gallery rows it may be given -> those chosen, best first."""


@st.composite
def any_cases(draw: st.DrawFn) -> Case:
    """Cases, one in four with all scores equal."""
    case = draw(cases())
    return replace(case, scores_QG=case.scores_QG * 0) if draw(st.integers(0, 3)) == 0 else case


ONE_IMAGE = Case(np.zeros((1, 1), np.float32), [0], [-1], [{0}])
NONE_ALLOWED = Case(np.eye(2, 3, dtype=np.float32), [0, 1], [2, 2], [{0, 1}, {0, 1}])


def some(block: CandidateBlock, part: slice) -> CandidateBlock:
    arrays = [getattr(block, field.name) for field in fields(block)]
    return CandidateBlock(*(None if array is None else array[part] for array in arrays))


def images(strategy: Strategy, block: CandidateBlock, context: MiningContext) -> list[list[int]]:
    """Return the gallery rows chosen for each query."""
    found = strategy.choose(block, context)
    return [block.gallery_index_BK[i, positions].tolist() for i, positions in enumerate(found)]


def check(
    strategy: Strategy, case: Case, context: MiningContext, expected: list[list[int]]
) -> None:
    """Check that the strategy gives `expected`: whole gallery, best first, in window; the queries
    together, in two halves."""
    blocks = [sorted_block(case.whole())[0], case.window(case.scores_QG.shape[1])]
    blocks += [case.whole()] if strategy.needs_full_gallery else [case.window(strategy.depth)]
    for block in blocks:
        assert images(strategy, block, context) == expected
        half = len(case.targets) // 2
        parts = [some(block, slice(None, half)), some(block, slice(half, None))]
        assert [rows for part in parts for rows in images(strategy, part, context)] == expected


def check_all(strategy: Strategy, case: Case, context: MiningContext, oracle: Oracle) -> None:
    check(strategy, case, context, [oracle(i, case.allowed(i)) for i in range(len(case.targets))])


def check_sets(
    strategy: Strategy, case: Case, context: MiningContext, oracle: Oracle, k: int
) -> None:
    """Check that the strategy gives the first k of the oracle's images, and all as its set."""
    check_all(strategy, case, context, lambda i, allowed: oracle(i, allowed)[:k])
    sets = strategy.candidate_sets(case.whole(), context)
    assert sets is not None
    whole = [oracle(i, case.allowed(i)) for i in range(len(case.targets))]
    assert [rows.tolist() for rows in sets] == whole


def best(case: Case, i: int, rows: Any, k: int | None = None) -> list[int]:
    return sorted(rows, key=lambda g: (-case.scores_QG[i, g], g))[:k]


# Semi-hard


def semi_hard(case: Case, margin: float, i: int, allowed: list[int]) -> list[int]:
    target = case.scores_QG[i, case.targets[i]]
    return best(case, i, [g for g in allowed if target - margin < case.scores_QG[i, g] < target])


@given(case=any_cases(), k=COUNTS, margin=st.sampled_from([0.125, 0.25, 0.5, 2.0]))
def test_semi_hard_is_the_best_of_the_band(case: Case, k: int, margin: float) -> None:
    strategy = SemiHard(negatives_per_query=k, margin=margin)
    check_sets(strategy, case, MiningContext(seed=0), partial(semi_hard, case, margin), k)


@given(case=any_cases(), k=COUNTS, seed=st.integers(0, 5))
def test_random_semi_hard_draws_from_the_band(case: Case, k: int, seed: int) -> None:
    strategy = SemiHard(negatives_per_query=k, margin=0.5, selection="random")
    context = MiningContext(seed=seed)
    found = images(strategy, case.whole(), context)
    for i, rows in enumerate(found):
        band = semi_hard(case, 0.5, i, case.allowed(i))
        assert set(rows) <= set(band) and len(set(rows)) == len(rows) == min(k, len(band))
        assert rows == best(case, i, rows)
    parts = [some(case.whole(), part) for part in (slice(None, 1), slice(1, None))]
    assert [rows for part in parts for rows in images(strategy, part, context)] == found


def test_semi_hard_edges_are_outside() -> None:
    scores = np.array([[0.75, 0.75, 0.5, 0.25, 0.375, 1.0]], np.float32)
    case = Case(scores, [0], [5], [{0}])
    assert images(SemiHard(margin=0.5), case.whole(), MiningContext(seed=0)) == [[2, 4]]


def test_seeds_and_names_change_the_draw() -> None:
    case = Case(np.linspace(0.5, 0, 40, dtype=np.float32)[None], [0], [39], [{0}])
    strategy = SemiHard(negatives_per_query=3, margin=1, selection="random")
    seeds = [MiningContext(seed=seed) for seed in range(20)]
    named = [MiningContext(seed=0, query_ids=[QueryId(name)]) for name in "abcdefghij"]
    for contexts, least in ((seeds, 16), (named, 8)):
        draws = {tuple(images(strategy, case.whole(), context)[0]) for context in contexts}
        assert len(draws) >= least


# In batch


@given(case=any_cases(), k=COUNTS, batch_size=st.integers(2, 8), seed=st.integers(0, 5))
def test_in_batch_is_the_other_targets(case: Case, k: int, batch_size: int, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(len(case.targets)).tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def others(i: int, allowed: list[int]) -> list[int]:
        (batch,) = (b for b in batches if i in b)
        return best(case, i, {case.targets[j] for j in batch if j != i} & set(allowed))

    strategy = InBatch(negatives_per_query=k, batch_size=batch_size)
    context = MiningContext(seed=seed, targets_Q=np.array(case.targets))
    check_sets(strategy, case, context, others, k)


def test_in_batch_needs_targets() -> None:
    with pytest.raises(UserError, match="target of every query"):
        InBatch().choose(ONE_IMAGE.whole(), MiningContext(seed=0))


def test_in_batch_batches_change_with_the_seed() -> None:
    scores = np.tile(np.arange(41, dtype=np.float32), (40, 1))
    case = Case(scores, list(range(40)), [40] * 40, [{i} for i in range(40)])
    strategy = InBatch(negatives_per_query=3, batch_size=4)
    contexts = [MiningContext(seed=seed, targets_Q=np.arange(40)) for seed in (1, 2)]
    found = [images(strategy, case.whole(), context) for context in contexts]
    assert found[0] != found[1] and all(len(rows) == 3 for rows in found[0])


# Online hardest


def online(case: Case, pool: int, margin: float | None, i: int, allowed: list[int]) -> list[int]:
    target = case.scores_QG[i, case.targets[i]]
    pooled = best(case, i, allowed, pool)
    return [g for g in pooled if margin is None or case.scores_QG[i, g] <= target + margin]


@given(
    case=any_cases(),
    k=COUNTS,
    pool=st.sampled_from([1, 2, 5, 40]),
    margin=st.sampled_from([None, 0.0, 0.25, -0.25]),
)
def test_online_hardest_is_the_best_valid_of_the_pool(
    case: Case, k: int, pool: int, margin: float | None
) -> None:
    strategy = OnlineHardest(
        negatives_per_query=k,
        candidate_pool=pool,
        margin=margin or 0.0,
        validity="all" if margin is None else "below_target",
    )
    check_sets(strategy, case, MiningContext(seed=0), partial(online, case, pool, margin), k)


# Semantic


@given(
    case=any_cases(),
    k=COUNTS,
    window=st.sampled_from([1, 3, 40]),
    margin=st.sampled_from([0.0, 0.25]),
    data=st.data(),
)
def test_semantic_fits_the_text_worse(
    case: Case, k: int, window: int, margin: float, data: st.DataObject
) -> None:
    size = case.scores_QG.size
    text = np.array(data.draw(st.lists(EIGHTHS, min_size=size, max_size=size)), np.float32)
    text_QG = text.reshape(case.scores_QG.shape)
    context = MiningContext(seed=0, text_scores=lambda numbers: text_QG[numbers])

    def unfit(i: int, allowed: list[int]) -> list[int]:
        limit = text_QG[i, case.targets[i]] - margin
        return [g for g in best(case, i, allowed, window) if text_QG[i, g] <= limit]

    strategy = Semantic(negatives_per_query=k, candidate_pool=window, margin=margin)
    check_sets(strategy, case, context, unfit, k)


def test_semantic_asks_for_few_queries_at_once() -> None:
    num = 600
    asked = []

    def text_scores(numbers: Rows) -> Any:
        asked.append(numbers.tolist())
        return np.tile(np.array([1, 0, 1, 0], np.float32), (len(numbers), 1))

    scores = np.tile(np.array([0, 1, 2, 3], np.float32), (num, 1))
    case = Case(scores, [0] * num, [-1] * num, [{0}] * num)
    context = MiningContext(seed=0, text_scores=text_scores)
    found = images(Semantic(negatives_per_query=2), case.window(100), context)
    assert found == [[3, 1]] * num
    assert [n for numbers in asked for n in numbers] == list(range(num))
    assert max(map(len, asked)) <= 256


# Diverse


@st.composite
def vectors(draw: st.DrawFn, size: int) -> Any:
    """Short vectors whose dot products are exact."""
    halves = draw(st.lists(st.integers(-2, 2), min_size=3 * size, max_size=3 * size))
    return np.array(halves, np.float32).reshape(size, 3) / 2


def mmr(
    case: Case, vectors_GD: Any, k: int, window: int, balance: float, i: int, allowed: list[int]
) -> list[int]:
    left = best(case, i, allowed, window)
    taken = []
    while left and len(taken) < k:

        def value(g: int) -> float:
            nearest = max((float(vectors_GD[g] @ vectors_GD[y]) for y in taken), default=0.0)
            return balance * float(case.scores_QG[i, g]) - (1 - balance) * nearest

        taken.append(left[0] if not taken else max(left, key=value))  # max: the first of equals
        left.remove(taken[-1])
    return taken


@given(
    case=any_cases(),
    k=COUNTS,
    window=st.sampled_from([1, 4, 40]),
    balance=st.sampled_from([0, 0.25, 0.5, 1]),
    half=st.booleans(),
    data=st.data(),
)
def test_mmr_is_the_greedy_choice(
    case: Case, k: int, window: int, balance: float, half: bool, data: st.DataObject
) -> None:
    vectors_GD = data.draw(vectors(case.scores_QG.shape[1]))
    held = vectors_GD.astype(np.float16) if half else vectors_GD
    strategy = Diverse(negatives_per_query=k, candidate_pool=window, mmr_lambda=balance)
    oracle = partial(mmr, case, vectors_GD, k, window, balance)
    check_all(strategy, case, MiningContext(seed=0, vectors_GD=held), oracle)


@given(
    case=any_cases(),
    k=COUNTS,
    num_clusters=st.integers(2, 9),
    seed=st.integers(0, 3),
    data=st.data(),
)
def test_clusters_give_one_image_each(
    case: Case, k: int, num_clusters: int, seed: int, data: st.DataObject
) -> None:
    vectors_GD = data.draw(vectors(case.scores_QG.shape[1]))
    labels = kmeans(vectors_GD, num_clusters, seed)[0].tolist()

    def one_each(i: int, allowed: list[int]) -> list[int]:
        seen = {labels[case.targets[i]]}
        taken = []
        for g in best(case, i, allowed):
            if labels[g] not in seen:
                seen.add(labels[g])
                taken.append(g)
        return taken[:k]

    strategy = Diverse(negatives_per_query=k, method="clusters", num_clusters=num_clusters)
    check_all(strategy, case, MiningContext(seed=seed, vectors_GD=vectors_GD), one_each)


def test_clusters_are_worked_out_once_for_all_blocks() -> None:
    case = many(4, 20)
    vectors_GD = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    context = MiningContext(seed=0, vectors_GD=vectors_GD)
    strategy = Diverse(method="clusters", num_clusters=3)
    images(strategy, case.whole(), context)
    [labels] = context.cache.values()
    images(strategy, some(case.whole(), slice(0, 2)), context)
    assert next(iter(context.cache.values())) is labels and len(context.cache) == 1
    images(strategy, case.whole(), replace(context, seed=1))
    assert len(context.cache) == 2


NOTHING = "does nothing with"


@pytest.mark.parametrize(
    ("strategy", "settings", "message"),
    [
        (OnlineHardest, {"validity": "all", "margin": 0.1}, f"{NOTHING} validity: all"),
        (Diverse, {"num_clusters": 7}, f"num_clusters {NOTHING} method: mmr"),
        (
            Diverse,
            {"method": "clusters", "candidate_pool": 7, "mmr_lambda": 1},
            f"candidate_pool and mmr_lambda {NOTHING} method: clusters",
        ),
    ],
)
def test_a_setting_that_would_do_nothing_is_refused(
    strategy: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        strategy(**settings)


@pytest.mark.parametrize("strategy", [Diverse(), Diverse(method="clusters"), Semantic()])
def test_what_is_not_known_is_named(strategy: Strategy) -> None:
    with pytest.raises(UserError, match=strategy.type):
        strategy.choose(NONE_ALLOWED.whole(), MiningContext(seed=0))


# Mixture and curriculum


def mixture(k: int, *parts: tuple[float, Strategy]) -> Mixture:
    return Mixture(
        negatives_per_query=k, parts=tuple(MixturePart(weight=w, strategy=s) for w, s in parts)
    )


def shared(k: int, weights: list[int], draw: float) -> list[int]:
    """Slot m of k goes to the part in whose stretch of the quotas, laid end to end, m - draw
    falls."""
    ends = [k * sum(weights[: i + 1]) / sum(weights) for i in range(len(weights))]
    given = Counter(
        next(i for i, end in enumerate(ends) if m - draw <= end) for m in range(1, k + 1)
    )
    return [given[i] for i in range(len(weights))]


@given(
    k=st.integers(1, 40), weights=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    draw=st.integers(0, 1008).map(lambda i: (2 * i + 1) / 2018),
)  # fmt: skip
def test_shares_are_the_quotas_rounded(k: int, weights: list[int], draw: float) -> None:
    given_P = allocate(k, weights, draw)
    assert given_P.tolist() == shared(k, weights, draw)
    assert given_P.sum() == k
    assert (np.abs(given_P - k * np.array(weights) / sum(weights)) < 1).all()


@given(
    case=any_cases(), k=COUNTS, seed=st.integers(0, 5), weights=st.tuples(*[st.integers(1, 5)] * 3)
)
def test_mixture_is_its_parts_in_turn(
    case: Case, k: int, seed: int, weights: tuple[int, int, int]
) -> None:
    context = MiningContext(seed=seed, targets_Q=np.array(case.targets))
    every = OnlineHardest(validity="all", candidate_pool=9)
    strategies = [SemiHard(margin=0.25), OnlineHardest(candidate_pool=7), every]
    strategy = mixture(k, *zip(weights, strategies, strict=True))

    def oracle(i: int, allowed: list[int]) -> list[int]:
        taken: list[int] = []
        draw = derived_context(context, 0).rng(i).random()
        for part, num in enumerate(shared(k, list(weights), draw)):
            left = [g for g in allowed if g not in taken]
            ways = [partial(semi_hard, case, 0.25), partial(online, case, 7, 0.0)]
            ways.append(partial(online, case, 9, None))
            taken += ways[part](i, left)[:num]
        return best(case, i, taken)

    check_all(strategy, case, context, oracle)


def many(queries: int, size: int) -> Case:
    """Make queries whose target, image 0, is scored 1 and all other images a little less; no
    reference."""
    scores = np.linspace(1, 0.9, size, dtype=np.float32)
    return Case(np.tile(scores, (queries, 1)), [0] * queries, [-1] * queries, [{0}] * queries)


def test_weights_hold_over_many_queries() -> None:
    """Weights 3, 2 and 1 of four images: 2, 4/3 and 2/3; told apart by what each part can give."""
    case = many(3000, 41)
    text = np.zeros((1, 41), np.float32)
    text[:, 1:31] = 1  # the target's is 0: none of these fits worse
    text[:, 31:] = -1
    context = MiningContext(seed=4, text_scores=lambda numbers: np.repeat(text, len(numbers), 0))
    strategy = mixture(
        4,
        (3, Semantic(candidate_pool=100)),
        (2, SemiHard(margin=0.02)),
        (1, OnlineHardest(margin=-0.03, candidate_pool=40)),
    )
    found = images(strategy, case.whole(), context)

    def giver(g: int) -> str:
        return "semantic" if g > 30 else "semi" if g < 8 else "online"

    parts = [Counter(map(giver, rows)) for rows in found]
    assert all(sum(part.values()) == 4 for part in parts)
    assert {part["semantic"] for part in parts} == {2}
    assert {part["semi"] for part in parts} == {1, 2}
    assert sum(part["semi"] for part in parts) / 3000 == pytest.approx(4 / 3, abs=0.03)
    assert sum(part["online"] for part in parts) / 3000 == pytest.approx(2 / 3, abs=0.03)


def test_a_small_weight_gets_its_share_too() -> None:
    strategy = mixture(1, (9, SemiHard(margin=0.004)), (1, OnlineHardest(validity="all")))
    found = images(strategy, many(4000, 51).whole(), MiningContext(seed=0))
    assert found == [[1]] * 4000  # both give the best one, and each query gets it once
    context = derived_context(MiningContext(seed=0), 0)
    draws = [context.rng(i).random() for i in range(4000)]
    given_QP = np.array([allocate(1, [9, 1], draw) for draw in draws])
    assert given_QP.mean(axis=0) == pytest.approx([0.9, 0.1], abs=0.015)


def test_a_part_with_too_few_is_not_filled_up() -> None:
    strategy = mixture(6, (1, SemiHard(margin=0.004)), (1, OnlineHardest(validity="all")))
    found = images(strategy, many(5, 51).whole(), MiningContext(seed=0))
    assert found == [[1, 2, 3, 4]] * 5  # one of three, and three of three


def test_draws_of_a_part_do_not_hang_on_its_share() -> None:
    """One of two parts gives a query its image; the random one still draws each of the four as
    often."""
    case = many(8000, 5)
    random = SemiHard(margin=1, selection="random")
    found = images(mixture(1, (1, random), (1, random)), case.whole(), MiningContext(seed=0))
    counts = Counter(g for (g,) in found)
    assert all(1850 < counts[g] < 2150 for g in (1, 2, 3, 4))
    held = mixture(1, (1, OnlineHardest(validity="all", candidate_pool=1)), (1, random))
    counts = Counter(g for (g,) in images(held, case.whole(), MiningContext(seed=0)))
    assert all(850 < counts[g] < 1150 for g in (2, 3, 4))


def test_held_strategies_have_no_share_of_their_own() -> None:
    held = "negatives_per_query of the held strategy"
    with pytest.raises(ValidationError, match=f"{held} 'semi_hard' does nothing"):
        mixture(5, (1, SemiHard(negatives_per_query=3)))
    with pytest.raises(ValidationError, match=f"{held} 'in_batch'"):
        Curriculum(stages=(SemiHard(), InBatch(negatives_per_query=2)))
    with pytest.raises(ValidationError, match="at least 1"):
        Mixture(parts=())


def test_mixture_and_curriculum_come_back_from_json() -> None:
    held = mixture(4, (2, Diverse(method="clusters")), (1, InBatch(batch_size=3)))
    assert Mixture.model_validate_json(held.model_dump_json()) == held
    lesson = Curriculum(stages=(SemiHard(), OnlineHardest()), schedule="step", steps=(2,))
    assert Curriculum.model_validate_json(lesson.model_dump_json()) == lesson


LEVELS = (SemiHard(margin=0.25), OnlineHardest(validity="all"))


def test_linear_share() -> None:
    lesson = Curriculum(stages=LEVELS, initial_difficulty=0.2, first_iteration=1, last_iteration=5)
    shares_T = [lesson.difficulty(t) for t in range(8)]
    assert shares_T == pytest.approx([0.2, 0.2, 0.4, 0.6, 0.8, 1, 1, 1])
    at_once = Curriculum(stages=LEVELS, first_iteration=2, last_iteration=2)
    assert [at_once.difficulty(t) for t in range(4)] == [0, 0, 1, 1]


LESSONS: dict[str, dict[str, Any]] = {
    "even": {},
    "late end": {"last_iteration": 9},
    "late start": {"first_iteration": 2},
    "step": {"schedule": "step", "steps": (7,)},
    "loss": {"schedule": "loss"},
}


@pytest.mark.parametrize("rounds", range(1, 7))
@pytest.mark.parametrize("name", LESSONS)
def test_the_last_round_is_at_the_hardest_level(rounds: int, name: str) -> None:
    lesson = Curriculum(stages=LEVELS, **LESSONS[name])
    shares_T = [lesson.difficulty(t, (2.0, 1.9), rounds) for t in range(rounds)]
    assert shares_T[-1] == 1 and lesson.weights(shares_T[-1]) == [0, 1]
    assert all(share < 1 for share in shares_T[:-1])
    case = Case(np.array([[0.5, 0.9, 0.4, 0.0]], np.float32), [0], [3], [{0}])
    context = MiningContext(seed=0, iteration=rounds - 1, rounds=rounds, losses=(2.0, 1.9))
    one = lesson.model_copy(update={"negatives_per_query": 1})
    assert images(one, case.whole(), context) == [[1]]  # above the target: not semi-hard


def test_the_share_rises_evenly_over_the_rounds() -> None:
    lesson = Curriculum(stages=LEVELS)
    shares_T = [lesson.difficulty(t, rounds=5) for t in range(5)]
    assert shares_T == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert [lesson.difficulty(t, rounds=2) for t in range(2)] == [0, 1]
    assert lesson.difficulty(0, rounds=1) == 1


def test_step_share() -> None:
    lesson = Curriculum(stages=(*LEVELS, InBatch()), schedule="step", steps=(2, 3))
    assert [lesson.difficulty(t) for t in range(5)] == [0, 0, 0.5, 1, 1]
    weights = [lesson.weights(lesson.difficulty(t)) for t in (1, 2, 3)]
    assert weights == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


def test_loss_share() -> None:
    ratio = {"initial_difficulty": 0.5, "target_loss_ratio": 0.5}
    lesson = Curriculum(stages=LEVELS, schedule="loss", **ratio)
    losses: dict[tuple[float, ...], float] = {(): 0.5, (2,): 0.5, (2, 3): 0.5}
    losses |= {(2, 1.5): 0.75, (2, 1): 1.0, (2, 0.1): 1.0, (2, 1, 1.5): 0.75}
    assert {seen: lesson.difficulty(9, seen) for seen in losses} == losses
    assert lesson.difficulty(1, (0.0,)) == 1


def test_weights_lie_between_neighbours() -> None:
    lesson = Curriculum(stages=(*LEVELS, InBatch()))
    assert lesson.weights(0.25) == pytest.approx([0.5, 0.5, 0])
    assert lesson.weights(0.875) == pytest.approx([0, 0.25, 0.75])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": (1,)}, "steps does nothing with schedule: linear"),
        (
            {"schedule": "loss", "last_iteration": 9},
            "last_iteration does nothing with schedule: loss",
        ),
        (
            {"first_iteration": 4, "last_iteration": 3},
            "last_iteration 3 is before first_iteration 4",
        ),
        ({"schedule": "step"}, "must be 1 ascending"),
        ({"schedule": "step", "steps": (3, 1)}, "must be 1 ascending"),
        ({"stages": LEVELS[:1]}, "at least 2"),
    ],
)
def test_curriculum_refuses(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Curriculum(**{"stages": LEVELS, **wrong})


@given(case=any_cases(), k=COUNTS, seed=st.integers(0, 3), iteration=st.integers(0, 5))
def test_curriculum_goes_from_easy_to_hard(case: Case, k: int, seed: int, iteration: int) -> None:
    lesson = Curriculum(negatives_per_query=k, stages=LEVELS, first_iteration=1, last_iteration=4)
    context = MiningContext(seed=seed, iteration=iteration)
    hard = [0, 0, 1, 2, 3, 3][iteration]

    def oracle(i: int, allowed: list[int]) -> list[int]:
        draw = derived_context(context, 0).rng(i).random()
        ends = {0: (k, 0), 3: (0, k)}
        num_easy, num_hard = ends.get(hard) or shared(k, [3 - hard, hard], draw)
        easy = semi_hard(case, 0.25, i, allowed)[:num_easy]
        left = [g for g in allowed if g not in easy]
        return best(case, i, easy + online(case, 50, None, i, left)[:num_hard])

    check_all(lesson, case, context, oracle)


def test_curriculum_reads_the_losses() -> None:
    case = many(4, 51)
    lesson = Curriculum(
        negatives_per_query=2,
        stages=(OnlineHardest(margin=-0.051), OnlineHardest(validity="all")),
        schedule="loss",
    )
    assert images(lesson, case.whole(), MiningContext(seed=0)) == [[26, 27]] * 4
    assert images(lesson, case.whole(), MiningContext(seed=0, losses=(2.0, 0.9))) == [[1, 2]] * 4


# All


EVERY: list[Strategy] = [
    SemiHard(),
    SemiHard(selection="random"),
    InBatch(),
    OnlineHardest(),
    OnlineHardest(validity="all"),
    Semantic(),
    Diverse(),
    Diverse(method="clusters"),
    mixture(5, (1, SemiHard()), (2, Semantic())),
    Curriculum(stages=LEVELS),
]


@pytest.mark.parametrize("strategy", EVERY, ids=lambda s: s.type)
@pytest.mark.parametrize("case", [ONE_IMAGE, NONE_ALLOWED], ids=["one image", "none allowed"])
def test_no_candidates_give_nothing(strategy: Strategy, case: Case) -> None:
    size = case.scores_QG.shape[1]
    context = MiningContext(
        seed=0, targets_Q=np.array(case.targets), vectors_GD=np.eye(size, 4, dtype=np.float32),
        text_scores=lambda numbers: case.scores_QG[numbers],
    )  # fmt: skip
    check(strategy, case, context, [[]] * len(case.targets))
    assert images(strategy, some(case.whole(), slice(0, 0)), context) == []
