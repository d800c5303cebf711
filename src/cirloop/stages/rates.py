"""Rates of devices: what a piece of work costs per operation, so that it can be planned for another
model, image size, length of text or batch on the same device.

`rates.json` has an entry per device, model and dtype, each measured on that device: by
`cirloop plan --measure`, or by scripts/gpu_check.sh. A piece costs

    seconds = calls * s_per_call + operations / flops_per_s

with the operations of `resources.py`. A call of `write` is a step of decoding, which reads all
weights, so its seconds grow with them; all other calls and the loading of a model stay as measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_json
from cirloop.backbones.model_settings import VlmSettings
from cirloop.config.run import RunConfig
from cirloop.stages import resources
from cirloop.stages.lengths import Lengths
from cirloop.stages.measure import Measured
from cirloop.stages.resources import Sizes
from cirloop.stages.work import Cost, Piece
from cirloop.types import UserError
from cirloop.validation import counted

PACKAGED = Path(__file__).with_name("rates.json")
KIND = "rates"
FAR = 4.0
"""Times as large or as small as the measured model, from which on a plan says so."""
HOW = (
    "On that device, scripts/gpu_check.sh --extend_rates measures them with the architecture of"
    " Qwen2-VL-2B, and cirloop plan --measure --rates FILE with a config's own model and data."
)


@dataclass(frozen=True, slots=True)
class Rate:
    """The speed of a piece of work."""

    flops_per_s: float
    s_per_call: float


@dataclass(frozen=True, slots=True)
class Rates:
    """The rates of a device with a model."""

    device: str
    model: str
    dtype: str
    weights: int
    """Of the embedder."""
    captioner_weights: int
    """0 = it wrote no texts."""
    pieces: dict[Piece, Rate]
    load_s: float
    answer_tokens: float
    """Of a text; 0 = not known, since the weights were random or none was written."""
    distinct_share: float
    """Of an image's texts, those that differ."""
    measured_with: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def device_name() -> str:
    """Return the name of this machine's device in the table."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text("utf-8").splitlines() if cpu.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else 'CPU'}, {counted(torch.get_num_threads(), 'thread')}"


def operations(config: RunConfig, lengths: Lengths) -> dict[Piece, float]:
    """Return the operations of a unit of each piece of a run's work. Raises UserError for an
    embedder without arithmetic."""
    model = vision_language_model(config)
    sizes = resources.model_sizes(model.resolve_dir())
    training = config.training
    passes = 2 + bool(training.grad_cache_chunk_size) + model.gradient_checkpointing
    passes += training.finetuning == "full"
    row = max(1.0, lengths.pair / 2)
    ops: dict[Piece, float] = {
        "image": resources.vision_flops(sizes, lengths.image),
        "row": resources.language_flops(sizes, row) / row,
        "step": passes * 2 * resources.language_flops(sizes, row),
        "search": 2.0 * sizes.hidden,
        "rank": 2.0 * sizes.hidden,
    }
    captioner = captioner_sizes(config)
    if captioner is not None:
        question = lengths.rewrite.tokens(1, 1, 1)
        head = 2.0 * captioner.embedding_weights
        ops["read"] = resources.language_flops(captioner, 1, question / 2)
        ops["write"] = resources.language_flops(captioner, 1, question) + head
    return ops


def vision_language_model(config: RunConfig) -> VlmSettings:
    """Return the embedder's settings. Raises UserError for one without arithmetic."""
    if not isinstance(config.model, VlmSettings):
        raise UserError(
            f"no arithmetic is known for {config.model.type}, so rates cannot plan it. On the"
            " machine of the run, cirloop train --dry_run measures its time."
        )
    return config.model


def captioner_sizes(config: RunConfig) -> Sizes | None:
    """Return the sizes of the captioner; None where none of transformers writes texts here."""
    foundation = config.foundation
    writes = config.captioning.enabled and config.num_iterations and foundation.is_timed
    return resources.model_sizes(foundation.resolve_dir()) if writes else None


def rates_of(config: RunConfig, lengths: Lengths, measured: Measured) -> Rates:
    """Return the rates of this machine's device, from what was measured with a run's model."""
    model = vision_language_model(config)
    costs = measured.costs
    ops = operations(config, lengths)
    pieces: dict[Piece, Rate] = {
        piece: Rate(ops[piece] / costs[piece].unit, costs[piece].call)
        for piece in ops
        if piece in costs
    }
    captioner = captioner_sizes(config)
    return Rates(
        device_name(),
        Path(model.path).name,
        model.dtype,
        resources.model_sizes(model.resolve_dir()).weights,
        captioner.weights if captioner else 0,
        pieces,
        costs["load"].unit,
        measured.answer,
        measured.distinct,
        f"torch {torch.__version__}, transformers {transformers.__version__}",
    )


def costs_of(rates: Rates, config: RunConfig, lengths: Lengths) -> dict[Piece, Cost]:
    """Return the cost of each piece of a run's work on the device of `rates`."""
    costs: dict[Piece, Cost] = {"load": Cost(0.0, rates.load_s)}
    captioner = captioner_sizes(config)
    for piece, ops in operations(config, lengths).items():
        if piece not in rates.pieces:
            continue
        rate = rates.pieces[piece]
        larger = 1.0
        if piece == "write" and captioner is not None:
            larger = captioner.weights / rates.captioner_weights
        costs[piece] = Cost(rate.s_per_call * larger, ops / rate.flops_per_s)
    return costs


def with_texts(lengths: Lengths, rates: Rates) -> Lengths:
    """Return the lengths with those of texts as they were measured, where they were."""
    if not rates.answer_tokens:
        return lengths
    return replace(lengths, answer=rates.answer_tokens, distinct=rates.distinct_share)


def read(path: Path | None = None) -> list[Rates]:
    """Read the package's table, before it that of `path`. Raises UserError for one that is missing
    or damaged."""
    if path is not None and not path.is_file():
        raise UserError(
            f"--rates {path}: there is no such file. cirloop plan --measure --rates {path} makes"
            " one."
        )
    files = [PACKAGED] if path is None else [path, PACKAGED]
    return [rates for file in files for rates in _read(file)]


def _read(path: Path) -> list[Rates]:
    rows = schema.read(path, KIND)["rates"]
    try:
        return [
            Rates(**{**row, "pieces": {name: Rate(**r) for name, r in row["pieces"].items()}})
            for row in rows
        ]
    except (TypeError, KeyError, AttributeError) as error:
        remedy = schema.SCHEMAS[KIND].remedy
        raise UserError(f"{path} is no table of rates ({error!r}). {remedy}") from None


def extend(path: Path, new: Rates) -> None:
    """Put rates into a table, in place of those of the same device, model and dtype."""
    rows = _read(path) if path.exists() else []
    kept = [row.to_json() for row in rows if _key(row) != _key(new)]
    write_json(path, {"schema": schema.SCHEMAS[KIND].version, "rates": [*kept, new.to_json()]})


def _key(rates: Rates) -> tuple[str, str, str, int]:
    return rates.device, rates.model, rates.dtype, rates.weights


def choose(table: Sequence[Rates], device: str, config: RunConfig) -> Rates:
    """Return the rates of a device, named or a part of its name, with the model nearest in size.

    Raises UserError where there are none, with those that there are and how to measure others.
    """
    model = vision_language_model(config)
    fitting = [r for r in table if device.lower() in r.device.lower() and r.dtype == model.dtype]
    if not fitting or len({rates.device for rates in fitting}) > 1:
        listed = [f"{r.device}, {r.model} ({r.weights / 1e6:,.0f} M) in {r.dtype}" for r in table]
        wrong = "is a part of several names" if fitting else "has no rates"
        raise UserError(
            f"--device {device!r} {wrong} for model.dtype {model.dtype}. There are:\n  "
            + "\n  ".join(listed or ["none"])
            + f"\n{HOW}"
        )
    weights = resources.model_sizes(model.resolve_dir()).weights
    return min(fitting, key=lambda rates: abs(math.log(rates.weights / weights)))


def warnings(rates: Rates, config: RunConfig) -> list[str]:
    """Return what makes a plan by these rates less sure."""
    weights = resources.model_sizes(vision_language_model(config).resolve_dir()).weights
    captioner = captioner_sizes(config)
    lines = []
    if not 1 / FAR < weights / rates.weights < FAR:
        lines.append(
            f"measured with {rates.weights / 1e6:,.0f} M weights, and {config.model.path} has"
            f" {weights / 1e6:,.0f} M: seconds of calls and of loading may be others"
        )
    if captioner is not None and not rates.captioner_weights:
        lines.append("no texts were written when these rates were measured")
    elif captioner is not None and not rates.answer_tokens:
        lines.append("texts are planned with captioning.max_new_tokens, the most that they have")
    return lines
