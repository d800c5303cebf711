"""Notices that a reader of a run's numbers must see first: on the terminal, in the report, page and
card."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cirloop.backbones.weights import TINY
from cirloop.config.recipes import DRAWN
from cirloop.types import UserError
from cirloop.validation import ValidationReport

if TYPE_CHECKING:
    from cirloop.config.run import RunConfig

SIMULATED = "simulated"
TINY_ON_PHOTOGRAPHS = (
    f"`{TINY}` is the {{}}, and knows drawn shapes only: results on photographs mean nothing."
)


def of(config: RunConfig) -> list[str]:
    """Return the notices of a run, none for most."""
    lines = []
    if config.retrieval == SIMULATED:
        lines.append(
            "Simulated: rankings are drawn from the seed and no model is trained; no number here"
            " means anything."
        )
    tiny = [name for name, path in _models(config).items() if path == TINY]
    if tiny and config.data.type != DRAWN:
        lines.append(TINY_ON_PHOTOGRAPHS.format(" and the ".join(tiny)))
    return lines


def mark(config: RunConfig) -> dict[str, Any]:
    """Return what stands first in every JSON file of a simulated run; empty for others."""
    return {SIMULATED: True} if config.retrieval == SIMULATED else {}


def title(config: RunConfig) -> str:
    """Return what stands before the title of a table or a page."""
    return "SIMULATED: " if config.retrieval == SIMULATED else ""


def refuse_simulated(config: RunConfig, purpose: str) -> None:
    """Raise UserError for what needs a model, in a run without one."""
    if config.retrieval == SIMULATED:
        raise UserError(
            f"{config.directory} holds a run with simulated retrieval: its rankings are drawn from"
            f" a seed, and there is no model {purpose}. Make a run without --retrieval simulated in"
            " another --experiment_dir."
        )


def refuse_unnamed(config: RunConfig) -> None:
    """Raise UserError where `tiny`, the default, would be used on photographs and nobody named
    it."""
    problems = ValidationReport()
    flags = {
        "embedder": ("model", "--model_path"),
        "foundation model": ("foundation", "--foundation_model_path"),
    }
    for name, path in _models(config).items():
        group, flag = flags[name]
        if (
            path == TINY
            and config.data.type != DRAWN
            and "path" not in getattr(config, group).model_fields_set
        ):
            problems.add(
                f"{group}.path",
                f"is not given, and `{TINY}`, the embedded model, knows drawn shapes only. Give"
                f" {flag}: a directory or a hub name such as Qwen/Qwen2-VL-2B-Instruct; or `{TINY}`"
                " by name, to try the machinery",
            )
    problems.raise_if_any()


def _models(config: RunConfig) -> dict[str, str]:
    """Return the weights of the models that a run uses."""
    verifies = any(mining_filter.type == "verify" for mining_filter in config.mining.filters)
    verifies = verifies or (
        config.attributes is not None and config.attributes.image_source == "vlm"
    )
    captions = config.captioning.enabled and config.num_iterations > 0
    models = {"embedder": config.model.path}
    return models | ({"foundation model": config.foundation.path} if captions or verifies else {})
