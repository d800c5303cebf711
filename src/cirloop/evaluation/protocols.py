"""Metrics of the benchmarks, from ranks of images, as the benchmarks' papers compute them.

Every metric is a mean over queries of a value in [0, 1], so each has a standard error, for which
queries with the same reference are one cluster (grocery: with the same reference product); an
image that a ranking does not list is not retrieved. Q queries.

- grocery: as shapes, and map@K over all right images, also by kind of change (map@10).
- shapes: the reference is removed. recall@K of the annotated target; `any correct recall@K` of the
  first right image.
- CIRR (arXiv 2108.04024): the reference is removed. recall@K of `target_hard`; recall_subset@K
  among the five other members of the query's group.
- Own data: as CIRR, and map@K as CIRCO where there are several right answers.
- FashionIQ (arXiv 1905.12794): recall@10 and @50 per category and their unweighted mean. The
  reference stays in, as in CLIP4Cir and QuRe; `, reference removed` marks the other variant,
  ReCALL's.
- HP-FashionIQ (QuRe, ICML 2025, section 4): people saw two sets of images for a query and preferred
  one. A set's score is the mean similarity of its images. `preference rate` = P(set 1 preferred |
  set 1 scored higher), the paper's, one-sided; `symmetric accuracy` = P(the set scored higher is
  preferred), an equal score counting one half.
- CIRCO (arXiv 2303.15247, section 5): map@K over all right answers with min(|GT|, K); recall@K of
  the one target; map@10 per semantic aspect. The reference stays in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cirloop.evaluation.significance import standard_error
from cirloop.types import ImageId, LabeledQueries, Preference, Query, QueryId, Relevance

Ranks = Mapping[ImageId, int]
"""Rank in a ranking, from 1 with the reference counted, of each image that matters to a query and
is listed."""
Scores = Mapping[ImageId, float]
"""Similarity to the query of each image of the two sets a person chose between."""
Values = npt.NDArray[np.float64]

SUBSET_CUTOFFS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean over queries and its standard error, both fractions."""

    value: float
    se: float


def describe(parts: Sequence[LabeledQueries]) -> str:
    """Describe the protocol of a result, with FashionIQ's gallery named."""
    gallery = parts[0].gallery.name.rsplit("/", 1)[-1] if parts[0].gallery else ""
    return parts[0].protocol.description.format(gallery=gallery)


def ranks_in(ranking: Sequence[ImageId], images: set[ImageId]) -> dict[ImageId, int]:
    """Return the ranks, from 1, of the `images` that `ranking` lists."""
    return {image: rank for rank, image in enumerate(ranking, 1) if image in images}


def remove_reference(ranks: Ranks, reference: ImageId) -> dict[ImageId, int]:
    """Return the ranks with the reference removed from the ranking."""
    removed = ranks.get(reference)
    return {
        image: rank - (removed is not None and rank > removed)
        for image, rank in ranks.items()
        if image != reference
    }


def recall_at(rank: int | None, k: int) -> float:
    return float(rank is not None and rank <= k)


def subset_rank(ranks: Ranks, target: ImageId, members: Sequence[ImageId]) -> int | None:
    """Return the target's rank among the members of its group; members that are not listed come
    last."""
    if target not in ranks:
        return None
    return sum(ranks.get(member, np.inf) < ranks[target] for member in members) + 1


def average_precision_at(ranks: Ranks, positives: frozenset[ImageId], k: int) -> float:
    """Sum the precision at each hit within k, divided by min(|positives|, k) (CIRCO,
    equation 1)."""
    hits = sorted(rank for image, rank in ranks.items() if image in positives and rank <= k)
    return sum(number / rank for number, rank in enumerate(hits, 1)) / min(len(positives), k)


def preference_margin(scores: Scores, preference: Preference) -> float:
    """Return how much higher set 1 scores than set 2, in mean similarity."""
    first = [scores[image] for image in preference.first]
    second = [scores[image] for image in preference.second]
    return sum(first) / len(first) - sum(second) / len(second)


def _preferences(part: LabeledQueries, scores: Mapping[QueryId, Scores]) -> dict[str, Values]:
    """Compute the preference rate over the queries whose set 1 scores higher, and the symmetric
    accuracy over all."""
    assert part.relevance is not None
    chosen = part.relevance.preferences
    margins_Q = np.array(
        [preference_margin(scores[query.id], chosen[query.id]) for query in part.queries]
    )
    first_Q = np.array([chosen[query.id].preferred == 1 for query in part.queries])
    agrees_Q = np.where(margins_Q == 0, 0.5, (margins_Q > 0) == first_Q)
    rate_Q = np.where(margins_Q > 0, first_Q, np.nan)
    rate = {"preference rate": rate_Q} if (margins_Q > 0).any() else {}
    return rate | {"symmetric accuracy": agrees_Q}


def per_query(
    part: LabeledQueries, ranks: Mapping[QueryId, Mapping[ImageId, Any]]
) -> dict[str, Values]:
    """Compute every metric of one category, a value per query in the order of `part.queries`.

    `ranks` are scores where people chose between sets. An aspect's mAP and the preference rate are
    NaN for the queries that they leave out. There is no preference rate where no set 1 scores
    higher.
    """
    relevance = part.relevance
    assert relevance is not None
    if relevance.preferences:
        return _preferences(part, ranks)
    rows: dict[str, Values] = {}
    for number, query in enumerate(part.queries):
        for name, value in _query_metrics(part, relevance, query, ranks[query.id]):
            rows.setdefault(name, np.full(len(part.queries), np.nan))[number] = value
    return rows


def _query_metrics(
    part: LabeledQueries, relevance: Relevance, query: Query, with_reference: Ranks
) -> Iterator[tuple[str, float]]:
    """Yield the metrics of one query, in the order in which results show them."""
    protocol = part.protocol
    target = relevance.targets[query.id]
    positives = relevance.positives.get(query.id, frozenset())
    without_reference = remove_reference(with_reference, query.reference)
    ranks = with_reference if protocol.keep_reference else without_reference
    for k in protocol.cutoffs:
        yield f"recall@{k}", recall_at(ranks.get(target), k)
        if protocol.without_reference_too:
            removed = without_reference.get(target)
            yield f"recall@{k}, reference removed", recall_at(removed, k)
        if protocol.mean_average_precision and relevance.positives:
            yield f"map@{k}", average_precision_at(ranks, positives, k)
    if protocol.any_correct_cutoffs:
        correct = positives | {target}
        first = min((rank for image, rank in ranks.items() if image in correct), default=None)
        for k in protocol.any_correct_cutoffs:
            yield f"any correct recall@{k}", recall_at(first, k)
    if part.groups:
        in_subset = subset_rank(ranks, target, part.groups[query.id])
        for k in SUBSET_CUTOFFS:
            yield f"recall_subset@{k}", recall_at(in_subset, k)
        total = recall_at(ranks.get(target), 5) + recall_at(in_subset, 1)
        yield "mean of recall@5 and recall_subset@1", total / 2
    if protocol.mean_recall:
        name = f"mean of {' and '.join(f'recall@{k}' for k in protocol.mean_recall)}"
        recalls = [recall_at(ranks.get(target), k) for k in protocol.mean_recall]
        yield name, sum(recalls) / len(recalls)
    for aspect in relevance.aspects.get(query.id, ()):
        yield f"map@10, {aspect}", average_precision_at(ranks, positives, 10)


def mean(values_Q: Values, clusters: Sequence[str]) -> Metric:
    """Compute the mean over the queries that a metric covers, and its standard error."""
    covered_Q = np.isfinite(values_Q)
    values = values_Q[covered_Q]
    covered = [cluster for cluster, is_one in zip(clusters, covered_Q, strict=True) if is_one]
    return Metric(float(values.mean()), standard_error(values, covered))


def metrics(
    parts: Sequence[LabeledQueries], ranks: Mapping[QueryId, Mapping[ImageId, Any]]
) -> dict[str, Metric]:
    """Compute every metric of a benchmark; over several categories their unweighted means, then
    each category's."""
    tables: dict[str, dict[str, Metric]] = {}
    for part in parts:
        table = per_query(part, ranks)
        clusters = [part.cluster_of(query) for query in part.queries]
        tables[part.category] = {n: mean(values_Q, clusters) for n, values_Q in table.items()}
    first = next(iter(tables.values()))
    if len(parts) == 1:
        return dict(first)
    out = {name: _average([table[name] for table in tables.values()]) for name in first}
    for category, metrics_of in tables.items():
        out |= {f"{name}, {category}": metric for name, metric in metrics_of.items()}
    return out


def _average(rows: Sequence[Metric]) -> Metric:
    """Compute the unweighted mean over categories, whose queries are independent."""
    value = sum(m.value for m in rows) / len(rows)
    return Metric(value, sum(m.se**2 for m in rows) ** 0.5 / len(rows))
