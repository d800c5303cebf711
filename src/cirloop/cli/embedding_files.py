"""Input files of the embedding mode of add_hard_negatives.py, read and checked together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs
from cirloop.negatives.vector_inputs import VectorArrays, checked_inputs
from cirloop.retrieval.vectors import open_vectors
from cirloop.types import UserError
from cirloop.validation import ValidationReport

if TYPE_CHECKING:
    from cirloop.cli.mine_embeddings import EmbeddingMiningConfig

FLAGS = {
    "queries": "--query-embeddings",
    "gallery": "--gallery-embeddings",
    "targets": "--targets",
    "references": "--references",
    "positives": "--positives",
    "texts": "--text-embeddings",
    "groups": "--groups",
    "categories": "--categories",
}
"""The flag of each array."""


def read_inputs(
    options: EmbeddingMiningConfig, problems: ValidationReport
) -> tuple[MiningInputs, MiningContext]:
    """Read embeddings, rows, groups and categories; every problem is added to `problems`."""
    arrays = VectorArrays(
        _array(options.query_embeddings, "queries", problems),
        _array(options.gallery_embeddings, "gallery", problems),
        _array(options.targets, "targets", problems),
        _array(options.references, "references", problems),
        _json(options.positives, problems),
        _array(options.text_embeddings, "texts", problems),
        _json(options.groups, problems),
        _json(options.categories, problems),
    )
    return checked_inputs(arrays, options.seed, problems, FLAGS)


def _array(path: Path | None, name: str, problems: ValidationReport) -> Any:
    try:
        return None if path is None else open_vectors(path)
    except UserError as error:
        problems.add(f"{FLAGS[name]} {path}", str(error))
    return None


def _json(path: Path | None, problems: ValidationReport) -> Any:
    return None if path is None else problems.json(path)
