"""Settings of a group whose type a flag changes."""

from __future__ import annotations

import logging
from typing import Any, get_args

from pydantic import BaseModel

from cirloop.data.splits import FileSettings

logger = logging.getLogger(__name__)
COMMON = {
    "training.loss": frozenset[str](),
    "mining.strategy": frozenset({"negatives_per_query"}),
    "data": frozenset(FileSettings.model_fields),
}
"""Settings of a group that mean the same for all its types; of models all do but the weights."""


def change_type(root: type[BaseModel], settings: object, group: str, type_: str) -> object:
    """Return a file's settings of a group whose type a flag changes: those that the new type
    shares."""
    union: Any = root
    for part in group.split("."):
        default = union.model_fields[part].default
        union = union.model_fields[part].annotation
    if not isinstance(settings, dict):
        return settings
    old = settings.get("type", default.type)
    if old == type_:
        return settings
    fields = {
        n
        for kind in get_args(union)
        if kind.model_fields["type"].default == type_
        for n in kind.model_fields
    }
    if not fields:  # an unknown type, which is refused with the known ones
        return settings
    kept = {
        name: value
        for name, value in settings.items()
        if name in fields and _is_common(group, name)
    }
    dropped = [f"{group}.{name}" for name in sorted(settings.keys() - kept.keys() - {"type"})]
    if dropped:
        logger.warning(
            "%s.type is %s by flag, and the settings were for %s: %s left out, the rest stays",
            group,
            type_,
            old,
            ", ".join(dropped),
        )
    return kept


def _is_common(group: str, name: str) -> bool:
    """Tell whether a setting means the same for every type of its group."""
    return (
        name in COMMON[group] if group in COMMON else name not in ("type", "path", "start_adapter")
    )
