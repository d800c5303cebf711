"""The model card: README.md of an export, from the run's artifacts. What they do not say, the card
does not say."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from cirloop.config import notices
from cirloop.io import parse
from cirloop.io.redact import escape_control, sanitize
from cirloop.monitoring.console import metric_rows
from cirloop.tools.export.prompt_spec import PromptSpec
from cirloop.tools.export.roundtrip import ALIKE, EXACT, Difference
from cirloop.tools.export.source import ADAPTER, MERGED, SENTENCE_TRANSFORMERS, ExportSource
from cirloop.tools.export.templates import code, render
from cirloop.types import UserError

logger = logging.getLogger(__name__)
UNKNOWN = "not stated: fill in"
LICENSE = ("license", "license_name", "license_link")
LIBRARIES = {
    ADAPTER: "peft",
    MERGED: "transformers",
    SENTENCE_TRANSFORMERS: "sentence-transformers",
}
NEEDS = {
    ADAPTER: ("torch", "torchvision", "transformers", "peft", "pillow"),
    MERGED: ("torch", "torchvision", "transformers", "pillow"),
    SENTENCE_TRANSFORMERS: (
        "torch",
        "torchvision",
        "transformers",
        "sentence-transformers",
        "pillow",
    ),
}


def code_of(model: ExportSource, to: str, reading: PromptSpec, where: str, pushed: bool) -> str:
    """Return the Python of the card that loads the export and embeds with it; `where` is a
    directory or a name on the Hub."""
    return render(
        f"{to.replace('-', '_')}.py.jinja",
        where=where,
        pushed=pushed,
        hub=model.hub,
        dtype=model.settings.dtype,
        pillow=reading.pillow,
        sequential=reading.sequential,
    )


def card(
    model: ExportSource,
    to: str,
    reads: PromptSpec,
    where: str,
    pushed: bool,
    found: Difference | None,
    data_license: str | None,
) -> str:
    """Return the text of README.md. `found` is what a comparison of the vectors gave."""
    evaluations = _evaluations(model)
    licenses = license_of(model)
    decisive = public(model.config.result_settings())
    dtype = model.settings.dtype
    signs = {"cell": _cell, "percent": _percent}
    return render(
        "card.md.jinja",
        signs,
        metadata=_metadata(model, to, where, evaluations, licenses),
        notices=notices.of(model.config),
        name=escape_control(where.replace("`", "")),
        to=to,
        iteration=model.iteration,
        checkpoint=model.checkpoint.digest,
        base=_shown(model.settings.path, model.hub),
        hub=model.hub,
        dtype=dtype,
        lora=model.lora,
        needs=" ".join(NEEDS[to]),
        versions=", ".join(f"{name} {version(name)}" for name in NEEDS[to]),
        code=code_of(model, to, reads, where, pushed),
        reads=reads,
        asked="{text}".join(reads.composed),
        found=found,
        exact=EXACT,
        alike=ALIKE,
        last=evaluations[-1] if evaluations else None,
        metrics=[*evaluations[-1]["metrics"]] if evaluations else [],
        rows=metric_rows(evaluations, [*evaluations[-1]["metrics"]]) if evaluations else [],
        data=model.config.data.type,
        triplets=_triplets(model),
        rounds=[*_rounds(model)],
        licenses={
            "base": licenses.get("license", UNKNOWN),
            "data": data_license or UNKNOWN,
            "base_known": "license" in licenses,
        },
        unknown=UNKNOWN,
        training=decisive["training"],
        decisive=decisive,
        recipe=sanitize(json.dumps(decisive, indent=1, ensure_ascii=False)),
    )


def _evaluations(model: ExportSource) -> list[dict[str, Any]]:
    """Of the base and of every iteration there is, in order."""
    labels = ["base", *(f"iter_{number}" for number in range(model.iteration + 1))]
    names = [
        name
        for name in (f"evaluation_{label}.json" for label in labels)
        if name in model.store.names
    ]
    return [model.store.load(name).read() for name in names]


def _triplets(model: ExportSource) -> int | None:
    """Human triplets, where an iteration mined for them."""
    names = sorted(name for name in model.store.names if name.startswith("hard_negatives_iter_"))
    return int(model.store.load(names[0]).read()["summary"]["queries"]) if names else None


def _rounds(model: ExportSource) -> Iterable[dict[str, Any]]:
    """Return what was mined and written for each iteration up to this one; `None` where no oracle
    knows what is true."""
    for number in range(1, model.iteration + 1):
        names = {f"hard_negatives_iter_{number - 1}.json", f"augmented_samples_iter_{number}.json"}
        if not names <= {*model.store.names}:
            continue
        mined, written = (
            model.store.load(name).read()["summary"] for name in sorted(names, reverse=True)
        )
        known = f"accounting_iter_{number}.json"
        truth = model.store.load(known).read() if known in model.store.names else {}
        yield {
            "iteration": number,
            "mined": mined["negatives"],
            "candidates": written["candidates"],
            "accepted": written["accepted"],
            "rejected": sum(written["rejected"].values()),
            "false_negatives": truth.get("false_negatives"),
            "true_captions": truth.get("true_captions"),
        }


def license_of(model: ExportSource) -> dict[str, str]:
    """Return what the card of the base states (`license`, `license_name`, `license_link`), if there
    is a card: beside its weights, or on the Hub."""
    file = model.base / "README.md"
    if not file.is_file() and model.hub is not None:
        try:
            file = Path(hf_hub_download(model.hub, "README.md"))
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            logger.warning(
                "the card of %s cannot be read (%s): its licence is left open", model.hub, error
            )
            return {}
    if not file.is_file():
        return {}
    try:
        data: Any = ModelCard(parse.read_text(file), ignore_metadata_errors=True).data
        stated = data.to_dict()
    except (UserError, ValueError, yaml.YAMLError) as error:
        logger.warning("%s cannot be read (%s): the base's licence is left open", file, error)
        return {}
    return {
        name: value
        for name in LICENSE
        if isinstance(value := stated.get(name), str) and "license" in stated
    }


def _metadata(
    model: ExportSource,
    to: str,
    where: str,
    evaluations: list[dict[str, Any]],
    licenses: dict[str, str],
) -> str:
    """Return the YAML on top, as the Hub reads it. A licence that the base's card does not state is
    not there."""
    last = [row for row in evaluations if row["iteration"] == str(model.iteration)]
    results = [
        EvalResult(
            task_type="feature-extraction",
            task_name="composed image retrieval",
            dataset_type=str(row["split"]),
            dataset_name=str(row["split"]),
            dataset_split=model.config.evaluation.split,
            metric_type=metric,
            metric_value=value,
            metric_name=metric,
            metric_args={
                "standard_error": row["standard_errors"][metric],
                "queries": row["queries"],
                "gallery": row["gallery"],
                "protocol": row["protocol"],
            },
        )
        for row in last
        for metric, value in row["metrics"].items()
    ]
    named = (
        getattr(model.config.data, "path", None)
        if model.config.data.type == "huggingface"
        else None
    )
    data = ModelCardData(
        **licenses,  # type: ignore[arg-type]
        library_name=LIBRARIES[to],
        pipeline_tag="feature-extraction",
        base_model=model.hub,
        base_model_relation=("adapter" if to == ADAPTER else "finetune") if model.hub else None,
        datasets=[named]
        if named and "/" in named and not parse.expand_user(named).exists()
        else None,
        tags=[
            "composed-image-retrieval",
            "image-retrieval",
            "cirloop",
            *([SENTENCE_TRANSFORMERS] * ("sent" in to)),
        ],
        model_name=Path(where).name,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def public(settings: Any) -> Any:
    """Return settings without the places of this machine: of a path that is here, or is absolute,
    the last part."""
    if isinstance(settings, dict):
        return {name: public(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [public(value) for value in settings]
    return _shown(settings, None) if isinstance(settings, str) else settings


def _shown(path: str, hub: str | None) -> str:
    here = (
        "/" in path
        and "\n" not in path
        and (path.startswith(("/", "~", ".")) or Path(path).exists())
    )
    return Path(path).name if here and hub is None else path


def _cell(value: object) -> str:
    """Code in a table, where a bar would begin a cell."""
    return code(value).replace("|", "\\|")


def _percent(part: int | None, whole: int) -> str:
    if part is None:
        return "not known"
    return f"{part} ({100 * part / whole:.1f}%)" if whole else str(part)
