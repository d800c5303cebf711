"""What a number of a benchmark means: places of images in a ranking -> metrics, as the benchmark's
papers compute them.

Every metric is a mean over queries of a value in [0, 1], so each has a standard error; an image
that a ranking does not list is not retrieved. Q queries.

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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cirloop.types import ImageId, LabeledQueries, Preference, QueryId

Places = Mapping[ImageId, int]
"""Place in a ranking, from 1 with the reference counted, of each image that matters to a query and
is listed."""
Scores = Mapping[ImageId, float]
"""Similarity to the query of each image of the two sets a person chose between."""
Values = npt.NDArray[np.float64]

SUBSET_KS = (1, 2, 3)


@dataclass(frozen=True, slots=True)
class Metric:
    """A mean over queries and its standard error, both fractions."""

    value: float
    se: float


def describe(parts: Sequence[LabeledQueries]) -> str:
    """The protocol of a result, with FashionIQ's gallery named."""
    gallery = parts[0].gallery.name.rsplit("/", 1)[-1] if parts[0].gallery else ""
    return parts[0].protocol.description.format(gallery=gallery)


def places_of(ranking: Sequence[ImageId], wanted: set[ImageId]) -> dict[ImageId, int]:
    """Places of the `wanted` images that `ranking` lists, from 1."""
    return {image: place for place, image in enumerate(ranking, 1) if image in wanted}


def without(places: Places, reference: ImageId) -> dict[ImageId, int]:
    """The places with the reference removed from the ranking."""
    gone = places.get(reference)
    return {
        image: place - (gone is not None and place > gone)
        for image, place in places.items()
        if image != reference
    }


def recall_at(place: int | None, k: int) -> float:
    return float(place is not None and place <= k)


def subset_place(places: Places, target: ImageId, members: Sequence[ImageId]) -> int | None:
    """The target's place among the members of its group; members not listed come after those that
    are."""
    if target not in places:
        return None
    return sum(places.get(member, np.inf) < places[target] for member in members) + 1


def average_precision_at(places: Places, positives: frozenset[ImageId], k: int) -> float:
    """Sum over hits within k of the precision there, divided by min(|positives|, k) (CIRCO,
    equation 1)."""
    hits = sorted(place for image, place in places.items() if image in positives and place <= k)
    return sum(number / place for number, place in enumerate(hits, 1)) / min(len(positives), k)


def margin(scores: Scores, preference: Preference) -> float:
    """How much higher set 1 scores than set 2, in mean similarity."""
    first, second = (
        [scores[image] for image in images] for images in (preference.first, preference.second)
    )
    return sum(first) / len(first) - sum(second) / len(second)


def _preferences(part: LabeledQueries, scores: Mapping[QueryId, Scores]) -> dict[str, Values]:
    """The preference rate over the queries whose set 1 scores higher, the symmetric accuracy over
    all."""
    assert part.relevance is not None
    chosen = part.relevance.preferences
    margins_Q = np.array([margin(scores[query.id], chosen[query.id]) for query in part.queries])
    first_Q = np.array([chosen[query.id].preferred == 1 for query in part.queries])
    agrees_Q = np.where(margins_Q == 0, 0.5, (margins_Q > 0) == first_Q)
    rate = (
        {"preference rate": first_Q[margins_Q > 0].astype(np.float64)}
        if (margins_Q > 0).any()
        else {}
    )
    return rate | {"symmetric accuracy": agrees_Q}


def values(
    part: LabeledQueries, places: Mapping[QueryId, Mapping[ImageId, Any]]
) -> dict[str, Values]:
    """Every metric of one part, a value per query in the order of `part.queries`.

    `places` are scores where people chose between sets. An aspect's mAP and the preference rate are
    over some of the queries. There is no preference rate where no set 1 scores higher.
    """
    relevance = part.relevance
    protocol = part.protocol
    assert relevance is not None
    if relevance.preferences:
        return _preferences(part, places)
    rows: dict[str, list[float]] = {}

    def add(name: str, value: float) -> None:
        rows.setdefault(name, []).append(value)

    for query in part.queries:
        kept = places[query.id]
        target = relevance.targets[query.id]
        removed = without(kept, query.reference)
        seen = kept if protocol.keep_reference else removed
        for k in protocol.cutoffs:
            add(f"recall@{k}", recall_at(seen.get(target), k))
            if protocol.without_reference_too:
                add(f"recall@{k}, reference removed", recall_at(removed.get(target), k))
            if protocol.mean_average_precision and relevance.positives:
                add(f"map@{k}", average_precision_at(seen, relevance.positives[query.id], k))
        if protocol.any_correct_cutoffs:
            right = relevance.positives[query.id] | {target}
            first = min((place for image, place in seen.items() if image in right), default=None)
            for k in protocol.any_correct_cutoffs:
                add(f"any correct recall@{k}", recall_at(first, k))
        if part.groups:
            among = subset_place(seen, target, part.groups[query.id])
            for k in SUBSET_KS:
                add(f"recall_subset@{k}", recall_at(among, k))
            add(
                "mean of recall@5 and recall_subset@1",
                (recall_at(seen.get(target), 5) + recall_at(among, 1)) / 2,
            )
        if protocol.mean_recall:
            name = f"mean of {' and '.join(f'recall@{k}' for k in protocol.mean_recall)}"
            recalls = [recall_at(seen.get(target), k) for k in protocol.mean_recall]
            add(name, sum(recalls) / len(recalls))
        for aspect in relevance.aspects.get(query.id, ()):
            add(f"map@10, {aspect}", average_precision_at(seen, relevance.positives[query.id], 10))
    return {name: np.array(row) for name, row in rows.items()}


def mean(values_Q: Values) -> Metric:
    return Metric(float(values_Q.mean()), float(values_Q.std() / len(values_Q) ** 0.5))


def metrics(
    parts: Sequence[LabeledQueries], places: Mapping[QueryId, Mapping[ImageId, Any]]
) -> dict[str, Metric]:
    """Every metric of a benchmark; over several categories their unweighted means, then each
    category's."""
    tables = {
        part.category: {name: mean(v) for name, v in values(part, places).items()} for part in parts
    }
    if len(parts) == 1:
        out = dict(next(iter(tables.values())))
    else:
        out = {
            name: _average([table[name] for table in tables.values()])
            for name in next(iter(tables.values()))
        }
        out |= {
            f"{name}, {category}": m
            for category, table in tables.items()
            for name, m in table.items()
        }
    return out


def _average(rows: Sequence[Metric]) -> Metric:
    """The unweighted mean over categories, whose queries are independent."""
    return Metric(
        sum(m.value for m in rows) / len(rows), sum(m.se**2 for m in rows) ** 0.5 / len(rows)
    )
