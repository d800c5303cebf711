"""Input files of the embedding mode of add_hard_negatives.py, read and checked together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs
from cirloop.retrieval.dense import all_scores
from cirloop.retrieval.vectors import open_vectors, validate_embeddings
from cirloop.types import UserError
from cirloop.validation import ValidationReport

if TYPE_CHECKING:
    from cirloop.cli.mine_embeddings import EmbeddingMiningConfig


def read_inputs(
    options: EmbeddingMiningConfig, problems: ValidationReport
) -> tuple[MiningInputs, MiningContext]:
    """Read embeddings, rows, groups and categories; every problem is added to `problems`."""
    queries = _vectors(options.query_embeddings, "--query-embeddings", problems)
    gallery = _vectors(options.gallery_embeddings, "--gallery-embeddings", problems)
    texts = (
        _vectors(options.text_embeddings, "--text-embeddings", problems)
        if options.text_embeddings
        else None
    )
    for name, array in (("--query-embeddings", queries), ("--text-embeddings", texts)):
        if array is not None and gallery is not None and array.shape[1] != gallery.shape[1]:
            problems.add(
                name, f"has {array.shape[1]} dimensions, --gallery-embeddings {gallery.shape[1]}"
            )
    num = None if queries is None else len(queries)
    size = 0 if gallery is None else len(gallery)
    if num == 0 or (gallery is not None and size == 0):
        problems.add("--query-embeddings, --gallery-embeddings", "must have at least one row each")
    if texts is not None and num is not None and len(texts) != num:
        problems.add("--text-embeddings", f"has {len(texts)} rows for {num} queries")
    targets = _rows(options.targets, "--targets", num, 0, size, problems)
    references = (
        _rows(options.references, "--references", num, -1, size, problems)
        if options.references
        else None
    )
    positives = (
        _lists(options.positives, "--positives", num, size, problems) if options.positives else None
    )
    groups = _lists(options.groups, "--groups", num, size, problems) if options.groups else None
    categories = None
    if options.categories is not None:
        categories = problems.json(options.categories)
        named = isinstance(categories, list) and all(isinstance(name, str) for name in categories)
        if categories is not None and not (named and len(categories) == size):
            problems.add("--categories", f"must be a list of {size} names, one a gallery row")
    context = MiningContext(
        options.seed,
        groups=groups,
        categories=categories,
        vectors_GD=gallery,
        text_scores=None if texts is None else lambda numbers: all_scores(texts[numbers], gallery),
    )
    return MiningInputs(queries, gallery, targets, references, positives), context


def _array(path: Path, name: str, problems: ValidationReport) -> Any:
    try:
        return open_vectors(path)
    except UserError as error:
        problems.add(f"{name} {path}", str(error))
    return None


def _vectors(path: Path, name: str, problems: ValidationReport) -> Any:
    array = _array(path, name, problems)
    try:
        return None if array is None else validate_embeddings(array, f"{name} {path}")
    except UserError as error:
        problems.add(name, str(error))
        return None


def _rows(
    path: Path, name: str, num: int | None, lowest: int, size: int, problems: ValidationReport
) -> Any:
    array = _array(path, name, problems)
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
    wrong = np.flatnonzero((array < lowest) | (array >= size)) if size else np.zeros(0, int)
    if len(wrong):
        problems.add(
            name,
            f"{len(wrong)} rows are outside {lowest} .. {size - 1}, the first: {array[wrong[0]]} of"
            f" query {wrong[0]}",
        )
    return array.astype(np.int64)


def _lists(
    path: Path, name: str, num: int | None, size: int, problems: ValidationReport
) -> list[frozenset[int]] | None:
    content = problems.json(path)
    if isinstance(content, dict):
        row_numbers = {str(number) for number in range(num or 0)}
        unknown = [key for key in content if key not in row_numbers]
        if unknown:
            problems.add(name, f"{len(unknown)} queries are unknown, the first: {unknown[0]!r}")
            return None
        content = [content.get(str(number), []) for number in range(num or 0)]
    if content is None:
        return None
    if not isinstance(content, list) or (num is not None and len(content) != num):
        problems.add(name, f"must hold a list of gallery rows for each of {num} queries")
        return None
    for number, rows in enumerate(content):
        all_integers = isinstance(rows, list) and all(
            isinstance(r, int) and not isinstance(r, bool) for r in rows
        )
        if not all_integers or any(not 0 <= r < size for r in rows):
            problems.add(
                name, f"query {number}: must be gallery rows, whole numbers from 0 to {size - 1}"
            )
            return None
    return [frozenset(rows) for rows in content]
