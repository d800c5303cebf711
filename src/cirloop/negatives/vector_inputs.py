"""Arrays to mine from, checked together: every problem is told at once. Array suffixes as in
`negatives/base.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs
from cirloop.retrieval.dense import all_scores
from cirloop.retrieval.vectors import validate_embeddings
from cirloop.types import UserError
from cirloop.validation import ValidationReport, are, counted


@dataclass(frozen=True, slots=True)
class VectorArrays:
    """What is mined from vectors alone, as it was given; None is what was not given.

    `positives` and `groups` list gallery rows of each query, by its number or in order.
    """

    queries: Any
    gallery: Any
    targets: Any
    references: Any = None
    positives: Any = None
    texts: Any = None
    groups: Any = None
    categories: Any = None


NAMES = {field.name: field.name for field in fields(VectorArrays)}
"""What messages call each array."""


def checked_inputs(
    arrays: VectorArrays, seed: int, problems: ValidationReport, names: Mapping[str, str] = NAMES
) -> tuple[MiningInputs, MiningContext]:
    """Return what is mined. What is wrong is added to `problems`; then the result is not to be
    used."""
    queries = _vectors(arrays.queries, names["queries"], problems)
    gallery = _vectors(arrays.gallery, names["gallery"], problems)
    texts = _vectors(arrays.texts, names["texts"], problems)
    for name, array in (("queries", queries), ("texts", texts)):
        if array is not None and array.ndim != 2:
            problems.add(names[name], f"must have one vector a query, found {array.shape}")
        elif array is not None and gallery is not None and array.shape[1] != gallery.shape[-1]:
            problems.add(
                names[name],
                f"has {array.shape[1]} dimensions, {names['gallery']} {gallery.shape[-1]}",
            )
    num = None if queries is None else len(queries)
    size = 0 if gallery is None else len(gallery)
    if num == 0 or (gallery is not None and size == 0):
        problems.add(f"{names['queries']}, {names['gallery']}", "must have at least one row each")
    if texts is not None and num is not None and len(texts) != num:
        problems.add(names["texts"], f"has {len(texts)} rows for {num} queries")
    targets = _rows(arrays.targets, names["targets"], num, (0, size), problems)
    references = _rows(arrays.references, names["references"], num, (-1, size), problems)
    positives = _lists(arrays.positives, names["positives"], num, size, problems)
    groups = _lists(arrays.groups, names["groups"], num, size, problems)
    categories = arrays.categories
    named = isinstance(categories, list | tuple) and all(isinstance(c, str) for c in categories)
    if categories is not None and not (named and len(categories) == size):
        problems.add(names["categories"], f"must be a list of {size} names, one a gallery row")
    context = MiningContext(
        seed,
        groups=groups,
        categories=categories,
        vectors_GD=gallery,
        text_scores=None if texts is None else lambda numbers: all_scores(texts[numbers], gallery),
    )
    return MiningInputs(queries, gallery, targets, references, positives), context


def _vectors(array: Any, name: str, problems: ValidationReport) -> Any:
    try:
        return None if array is None else validate_embeddings(array, name)
    except UserError as error:
        problems.add(name, str(error).removeprefix(name).lstrip(": "))
        return None


def _rows(
    array: Any, name: str, num: int | None, bounds: tuple[int, int], problems: ValidationReport
) -> Any:
    """Return whole numbers from the first of the `bounds` up to below the second, one a query."""
    if array is None:
        return None
    if (
        array.ndim != 1
        or not np.issubdtype(array.dtype, np.integer)
        or (num is not None and len(array) != num)
    ):
        problems.add(
            name, f"must be {num} whole numbers in one dimension, found {array.dtype} {array.shape}"
        )
        return None
    lowest, size = bounds
    wrong = np.flatnonzero((array < lowest) | (array >= size)) if size else np.zeros(0, int)
    if len(wrong):
        problems.add(
            name,
            f"{len(wrong)} rows are outside {lowest} .. {size - 1}, the first: {array[wrong[0]]} of"
            f" query {wrong[0]}",
        )
    return array.astype(np.int64)


def _lists(
    content: Any, name: str, num: int | None, size: int, problems: ValidationReport
) -> list[frozenset[int]] | None:
    """Return the gallery rows of each query, from a list of lists or a mapping by its number."""
    if isinstance(content, dict):
        row_numbers = {str(number) for number in range(num or 0)}
        unknown = [key for key in content if key not in row_numbers]
        if unknown:
            num = len(unknown)
            queries = counted(num, "query", "queries")
            problems.add(name, f"{queries} {are(num)} unknown, the first: {unknown[0]!r}")
            return None
        content = [content.get(str(number), []) for number in range(num or 0)]
    if content is None:
        return None
    if not isinstance(content, list | tuple) or (num is not None and len(content) != num):
        problems.add(name, f"must hold a list of gallery rows for each of {num} queries")
        return None
    for number, rows in enumerate(content):
        all_integers = isinstance(rows, list | tuple | set | frozenset) and all(
            isinstance(r, int | np.integer) and not isinstance(r, bool) for r in rows
        )
        if not all_integers or any(not 0 <= r < size for r in rows):
            problems.add(
                name, f"query {number}: must be gallery rows, whole numbers from 0 to {size - 1}"
            )
            return None
    return [frozenset(map(int, rows)) for rows in content]
