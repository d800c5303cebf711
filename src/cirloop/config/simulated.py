"""A run without a model: what takes the place of the embedder and of the foundation model, by name
only."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from cirloop.backbones.config import SimulatedSettings
from cirloop.captioning.foundation import TemplateFoundation
from cirloop.types import UserError

if TYPE_CHECKING:
    from cirloop.config.run import RunConfig

logger = logging.getLogger(__name__)
UNCHECKED = {"min_verify_probability": 0.0, "max_round_trip_rank": 0}
"""Checks of texts that a rule cannot answer, or that random rankings would decide."""


def settings(content: dict[str, Any], foundation_named: bool) -> dict[str, Any]:
    """Return what `--retrieval simulated` changes of a file's settings.

    Texts are written by a rule unless a flag names a model.
    """
    if foundation_named or content.get("retrieval") == "simulated":
        return {}
    logger.info("simulated retrieval: texts are written by the rule `template`, and not verified")
    return {
        "foundation": {"type": "template"},
        "captioning": {**content.get("captioning", {}), **UNCHECKED},
    }


def fall_back(config: RunConfig) -> RunConfig:
    """Return the run without the models whose weights are missing; `config` itself where none
    is."""
    missing = {}
    for name, model in (("model", config.model), ("foundation", config.foundation)):
        try:
            model.resolve_dir()
        except UserError as error:
            missing[name] = str(error)
    for name, reason in missing.items():
        logger.warning("%s.path: %s", name, reason)
    if "model" not in missing:
        return config  # a foundation model alone is no matter of retrieval: the checks refuse it
    logger.warning(
        "--retrieval_fallback simulated: the embedder's weights are not here, so rankings are"
        " simulated"
    )
    update: dict[str, Any] = {
        "retrieval": "simulated",
        "model": SimulatedSettings(seed=config.seed),
    }
    if "foundation" in missing:
        update |= {
            "foundation": TemplateFoundation(),
            "captioning": config.captioning.model_copy(update=UNCHECKED),
        }
    return config.model_copy(update=update)
