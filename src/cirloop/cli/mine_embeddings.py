"""The embedding mode of add_hard_negatives.py: a strategy over embeddings of any model, without
images and texts."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import AliasChoices, Field, ValidationError, create_model
from pydantic_settings import SettingsConfigDict

from cirloop.artifacts.atomic import write_text
from cirloop.cli.embedding_files import read_inputs
from cirloop.config import cli
from cirloop.config.cli_help import requests_help
from cirloop.monitoring.console import table
from cirloop.negatives import STRATEGIES, MiningSettings
from cirloop.negatives.miner import MiningResult, mine
from cirloop.negatives.report import summary
from cirloop.types import UserError
from cirloop.validation import ValidationReport

logger = logging.getLogger(__name__)
PROGRAM = "add_hard_negatives.py"
OF_RUNS = ("filters", "num_rounds", "skip_captioned", "anchors")
"""Settings of mining that need texts or rounds."""


class EmbeddingMiningConfig(cli.Flags):
    """What is mined from vectors alone. `--strategy band --help` has the settings of a strategy,
    `--search ivf --help` those of an index too."""

    model_config = SettingsConfigDict(cli_kebab_case=True, cli_implicit_flags=True)

    query_embeddings: Path
    """Query vectors, float16 or float32: a .npy file, a directory of them or a pattern, in the
    order of their names."""
    gallery_embeddings: Path
    """Gallery vectors, likewise."""
    targets: Path
    """The gallery row of each query's target, whole numbers, .npy."""
    references: Path | None = None
    """The gallery row of each query's reference, -1 where it is not in the gallery, .npy."""
    positives: Path | None = None
    """JSON: further right gallery rows per query, a list of lists or {query: [rows]}."""
    text_embeddings: Path | None = None
    """Vectors of the texts alone, for `semantic` and `knn_text`, .npy."""
    groups: Path | None = None
    """JSON: gallery rows of each query's group, for `group`, like --positives."""
    categories: Path | None = None
    """JSON: the category of each gallery row, a list, for `category_mix`."""
    strategy: str = "top_k"
    """A negative strategy. Its settings are flags too, such as --absolute-margin 0.05 or --variant
    released."""
    negatives_per_query: int = Field(
        5, ge=1, validation_alias=AliasChoices("negatives_per_query", "num_negatives")
    )
    """Images per query."""
    save_sets: bool = False
    """Also write the whole set a strategy draws from, such as that of `band`."""
    seed: int = Field(0, ge=0)
    """Of strategies that draw."""
    device: str | None = None
    """Where scores are computed; by default a GPU where there is one. `cuda:0,cuda:1`: parts of the
    gallery on each."""
    output: Path
    """The JSON file to write."""


def main(argv: Sequence[str]) -> None:
    """Mine and write `--output`. Raises UserError with every problem found; then nothing is
    written."""
    options, settings = parse(argv)
    problems = ValidationReport(
        "Vectors and rows must belong together: row i of --targets is about query i."
    )
    vectors, context = read_inputs(options, problems)
    if not options.output.absolute().parent.is_dir():
        problems.add(f"--output {options.output}", "its directory does not exist")
    problems.raise_if_any()
    device = options.device or _device()
    began = time.monotonic()
    stats: dict[str, Any] = {}
    if vectors.positives is not None:
        targets = vectors.targets_Q.tolist()
        stats["left_out"] = sum(
            len(rows - {t}) for rows, t in zip(vectors.positives, targets, strict=True)
        )
    results = list(mine(settings, vectors, context, device, options.save_sets, stats=stats))
    seconds = time.monotonic() - began
    write_text(options.output, "[\n" + ",\n".join(_lines(results)) + "\n]\n")
    report = summary(
        [f.target_rank for f in results],
        [f.target_score for f in results],
        [len(f.gallery_indices) for f in results],
        np.concatenate([f.scores for f in results]).tolist(),
        settings.strategy.negatives_per_query,
        sum(f.num_fallback for f in results),
        [len(f.candidate_set) for f in results if f.candidate_set is not None] or None,
    )
    rows = [
        (name, value) for name, value in (report | stats).items() if not isinstance(value, dict)
    ]
    rows += [(f"similarity, {part}", value) for part, value in report["similarity"].items()]
    rows += [("set size", report["set_size"])] if "set_size" in report else []
    table(f"{settings.strategy.type}: {seconds:.1f} s on {device}", ("what", "value"), rows)
    logger.info("wrote %s", options.output)


def parse(argv: Sequence[str]) -> tuple[EmbeddingMiningConfig, MiningSettings]:
    """Parse the options and the mining settings; flags as --kebab-case or --snake_case.

    Raises UserError for what is unknown, wrong or missing.
    """
    peek = cli.Parser(prog=PROGRAM, add_help=False)
    peek.add_argument("--strategy", default="top_k")
    peek.add_argument("--search", default="exact")
    chosen = peek.parse_known_args(list(argv))[0]
    kind = STRATEGIES.get(chosen.strategy)
    if kind is None:
        raise UserError(f"--strategy must be one of {', '.join(sorted(STRATEGIES))}.")
    hidden = ("index",) if chosen.search == "exact" and requests_help(argv) else ()
    own = {
        name: field
        for name, field in kind.model_fields.items()
        if name not in ("type", "negatives_per_query")
    }
    shared = {
        name: field
        for name, field in MiningSettings.model_fields.items()
        if name not in ("strategy", *OF_RUNS, *hidden)
    }
    fields: dict[str, Any] = {
        name: (field.annotation, field) for name, field in (own | shared).items()
    }
    model = create_model(
        "VectorFlags",
        __base__=EmbeddingMiningConfig,
        __doc__=EmbeddingMiningConfig.__doc__,
        **fields,
    )
    help_flag = f"--query-embeddings x --strategy {chosen.strategy} --help"
    parser = cli.Parser(prog=PROGRAM, description=model.__doc__, help_flag=help_flag)
    try:
        options: EmbeddingMiningConfig = cli.parse(model, argv, parser)
        strategy = kind(
            negatives_per_query=options.negatives_per_query,
            **{name: getattr(options, name) for name in own},
        )
        mining = {name: getattr(options, name) for name in shared}
        mining["only_failed_queries"] = bool(mining["only_failed_queries"])
        return options, MiningSettings(strategy=strategy, **mining)
    except ValidationError as error:
        raise cli.flag_errors(error, model, f"{parser.prog} {help_flag}") from None


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return "cuda"
    logger.warning("no GPU: scores are computed on the CPU")
    return "cpu"


def _lines(results: Sequence[MiningResult]) -> Iterator[str]:
    for f in results:
        negatives = [
            {"image": int(column), "rank": int(rank), "score": round(float(score), 6)}
            for column, rank, score in zip(f.gallery_indices, f.ranks, f.scores, strict=True)
        ]
        row: dict[str, Any] = {
            "query": f.query_index,
            "target_rank": f.target_rank,
            "negatives": negatives,
        }
        if f.num_fallback:
            row["filled"] = f.num_fallback
        if f.candidate_set is not None:
            row["set"] = f.candidate_set.tolist()
        yield json.dumps(row)
