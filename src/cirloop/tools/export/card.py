"""The model card: README.md of an export, from the run's artifacts. What they do not say, the card
does not say."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from cirloop.cli.iterations import find_best
from cirloop.config import notices
from cirloop.io import parse
from cirloop.io.redact import sanitize
from cirloop.monitoring.console import metric_rows
from cirloop.tools.export.config import SENTENCE_TRANSFORMERS
from cirloop.tools.export.prompt_spec import PromptSpec
from cirloop.tools.export.roundtrip import Difference
from cirloop.tools.export.source import ADAPTER, ExportSource
from cirloop.tools.export.templates import render

logger = logging.getLogger(__name__)
UNKNOWN = "not stated: fill in"
LICENSE = ("license", "license_name", "license_link")
LIBRARIES = {ADAPTER: "peft", "merged": "transformers"}
"""The library that loads a format; `sentence-transformers` is both."""


def code_of(source: ExportSource, prompt_spec: PromptSpec) -> str:
    """Return the Python of the card that loads the export and embeds with it."""
    return render(
        f"{source.options.format.replace('-', '_')}.py.jinja",
        name=source.name,
        pushed=source.options.push_to_hub is not None,
        hub=source.hub,
        dtype=source.settings.dtype,
        prompt_spec=prompt_spec,
    )


def card(source: ExportSource, prompt_spec: PromptSpec, difference: Difference | None) -> str:
    """Return the text of README.md. `difference` is what a comparison of the vectors gave."""
    evaluations = _evaluations(source)
    metrics = [*evaluations[-1]["metrics"]] if evaluations else []
    licenses = license_of(source)
    recipe = public(source.config.result_settings())
    library = LIBRARIES.get(source.options.format, source.options.format)
    packages = dict.fromkeys(("torch", "torchvision", "transformers", library, "pillow"))
    return render(
        "card.md.jinja",
        metadata=_metadata(source, library, evaluations, licenses),
        notices=notices.of(source.config),
        source=source,
        best=find_best(source.store),
        base=_shown(source.settings.path, source.hub),
        packages=packages,
        code=code_of(source, prompt_spec),
        prompt_spec=prompt_spec,
        difference=difference,
        evaluation=evaluations[-1] if evaluations else None,
        metrics=metrics,
        rows=metric_rows(evaluations, metrics),
        mined=_read(source, "hard_negatives_iter_0.json"),
        rounds=[*_rounds(source)],
        licenses=licenses,
        unknown=UNKNOWN,
        recipe=recipe,
        recipe_json=sanitize(json.dumps(recipe, indent=1, ensure_ascii=False)),
    )


def _read(source: ExportSource, name: str) -> dict[str, Any]:
    """Return an artifact of the run; empty where there is none of that name."""
    return source.store.load(name).read() if name in source.store.names else {}


def _evaluations(source: ExportSource) -> list[dict[str, Any]]:
    """Of the base and of every iteration there is, in order."""
    labels = ["base", *(f"iter_{number}" for number in range(source.iteration + 1))]
    return [*filter(None, (_read(source, f"evaluation_{label}.json") for label in labels))]


def _rounds(source: ExportSource) -> Iterable[tuple[int, dict[str, Any], dict[str, Any], Any]]:
    """Yield each iteration up to this one with the counts of what was mined and of what was
    written, and what an oracle knows to be true, if there is one."""
    for number in range(1, source.iteration + 1):
        mined = _read(source, f"hard_negatives_iter_{number - 1}.json")
        written = _read(source, f"augmented_samples_iter_{number}.json")
        if mined and written:
            truth = _read(source, f"accounting_iter_{number}.json")
            yield number, mined["summary"], written["summary"], truth


def license_of(source: ExportSource) -> dict[str, str]:
    """Return what the card of the base states (`license`, `license_name`, `license_link`), if there
    is a card: beside its weights, or on the Hub."""
    file = source.base / "README.md"
    place = file if file.is_file() else source.hub
    if place is None:
        return {}
    try:
        base_card: Any = ModelCard.load(place, ignore_metadata_errors=True)
        stated = base_card.data.to_dict()
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("the card of %s cannot be read (%s): its licence is left open", place, error)
        return {}
    return {
        name: value
        for name in LICENSE
        if isinstance(value := stated.get(name), str) and "license" in stated
    }


def _metadata(
    source: ExportSource,
    library: str,
    evaluations: list[dict[str, Any]],
    licenses: dict[str, str],
) -> str:
    """Return the YAML on top, as the Hub reads it. A licence that the base's card does not state is
    not there."""
    results = [
        EvalResult(
            task_type="feature-extraction",
            task_name="composed image retrieval",
            dataset_type=str(row["split"]),
            dataset_name=str(row["split"]),
            dataset_split=source.config.evaluation.split,
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
        for row in evaluations
        if row["iteration"] == str(source.iteration)
        for metric, value in row["metrics"].items()
    ]
    relation = "adapter" if library == "peft" else "finetune"
    tags = ["composed-image-retrieval", "image-retrieval", "cirloop"]
    data = ModelCardData(
        **licenses,  # type: ignore[arg-type]
        library_name=library,
        pipeline_tag="feature-extraction",
        base_model=source.hub,
        base_model_relation=relation if source.hub else None,
        datasets=_datasets(source),
        tags=[*tags, library] if library == SENTENCE_TRANSFORMERS else tags,
        model_name=Path(source.name).name,
        eval_results=results or None,
    )
    return str(data.to_yaml()).strip()


def _datasets(source: ExportSource) -> list[str] | None:
    """Return the data set by its name on the Hub, None where it has none."""
    path = getattr(source.config.data, "path", None)
    named = source.config.data.type == "huggingface" and path and "/" in path
    return [path] if path and named and not parse.expand_user(path).exists() else None


def public(settings: Any) -> Any:
    """Return settings without the places of this machine: of a path that is here, or is absolute,
    the last part."""
    if isinstance(settings, dict):
        return {name: public(value) for name, value in settings.items()}
    if isinstance(settings, list):
        return [public(value) for value in settings]
    return _shown(settings, None) if isinstance(settings, str) else settings


def _shown(path: str, hub: str | None) -> str:
    is_local = (
        "/" in path
        and "\n" not in path
        and (path.startswith(("/", "~", ".")) or Path(path).exists())
    )
    return Path(path).name if is_local and hub is None else path
