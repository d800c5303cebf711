"""Planted pairs: questions to a judge whose answers are known, and how well it answered.

Right are human triplets. A wrong pair is a triplet's own two images with the text of another query.
The images stay a pair that belongs together, so that only whoever reads the text can tell: a judge
that looks at the images alone has an AUC of 0.5. Random images of the gallery would be too easy for
it (docs/when-it-stops.md has figures). Left out are texts that are right for the two images by the
training lines, or by the catalogue of a data set that has one. Elsewhere some are right by chance,
so AUC and precision are lower bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
import numpy.typing as npt

from cirloop.captioning.base import CaptionRequest
from cirloop.data.known_positives import KnownPositives
from cirloop.types import Query, QueryId, TrainSplit, Triplet

WRONG_PER_RIGHT = 9
"""Planted wrong pairs for each right one: of mined images, about one in ten is right on the drawn
data, where that is known."""


@dataclass(frozen=True, slots=True)
class PlantedPairs:
    """Pairs of a query and an image, for each whether the image is right, and the number of the
    triplet that the pair is made of."""

    requests: list[CaptionRequest]
    is_right: list[bool]
    triplets: list[int]


def planted_pairs(train: TrainSplit, num: int, seed: int) -> PlantedPairs:
    """Plant `num` human triplets (all, where there are fewer), and nine times as many wrong pairs,
    less those that are known to be right."""
    positives = KnownPositives.of(train)

    def is_right(request: CaptionRequest) -> bool:
        query = Query(QueryId(""), request.reference, request.text)
        catalogue = train.catalogue
        return positives.content(request.image) in positives.right(query) or (
            catalogue is not None
            and catalogue.is_true(request.reference, request.text, request.image)
        )

    return draw_pairs(train.triplets, num, seed, is_right)


def draw_pairs(
    triplets: Sequence[Triplet], num: int, seed: int, is_right: Callable[[CaptionRequest], bool]
) -> PlantedPairs:
    """Draw the pairs by the seed; a wrong one that `is_right` is left out, not replaced."""
    random = Random(f"{seed}/planted")
    right = random.sample(list(triplets), min(num, len(triplets)))
    requests = [CaptionRequest(t.query.reference, t.target, t.query.text) for t in right]
    numbers = [*range(len(right))]
    for number, triplet in enumerate(right):
        texts = [t.query.text for t in triplets if t.query.text != triplet.query.text]
        for text in random.sample(texts, min(WRONG_PER_RIGHT, len(texts))):
            request = CaptionRequest(triplet.query.reference, triplet.target, text)
            if not is_right(request):
                requests.append(request)
                numbers.append(number)
    return PlantedPairs(requests, [i < len(right) for i in range(len(requests))], numbers)


def auc(pairs: PlantedPairs, probabilities: Sequence[float]) -> tuple[float, float] | None:
    """Return the probability that a right pair gets a higher one than a wrong pair (a tie counts
    half), and its standard error; None where either kind is not there.

    The error is the jackknife's over triplets: pairs of one triplet share their images.
    """
    scores_N = np.array(probabilities, np.float64)
    right_N = np.array(pairs.is_right, np.bool_)
    triplet_N = np.array(pairs.triplets, np.int64)
    value = _auc(scores_N, right_N)
    if value is None:
        return None
    numbers = np.unique(triplet_N)
    without = [_auc(scores_N[triplet_N != n], right_N[triplet_N != n]) for n in numbers]
    values = np.array([v for v in without if v is not None])
    if len(values) < 2:
        return value, 0.0
    variance = (len(values) - 1) * values.var()
    return value, float(variance**0.5)


def _auc(scores_N: npt.NDArray[np.float64], right_N: npt.NDArray[np.bool_]) -> float | None:
    differences_RW = scores_N[right_N][:, None] - scores_N[~right_N][None]
    if not differences_RW.size:
        return None
    return float(((differences_RW > 0) + 0.5 * (differences_RW == 0)).mean())
