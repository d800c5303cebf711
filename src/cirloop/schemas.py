"""The JSON files that cirloop writes: the version of each kind's form, and how an older one becomes a newer one.

A file says its version as `schema`. One of a newer version is refused; one of an older is brought forward a version at
a time, in memory: what is on disk stays as it is. Files that the manifest does not vouch for carry a `digest` of their
own content, so that a changed one is noticed. Lists of ids, rankings and submissions have forms that others fixed and
carry no version; neither do the files that a process and its children exchange.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cirloop import reading
from cirloop.types import UserError

Content = dict[str, Any]
RESTORE = "Restore it from a backup, or start anew in another --experiment_dir."


def _same(content: Content) -> Content:
    """Between versions that differ in what is checked, not in what is said."""
    return content


def _config_0(content: Content) -> Content:
    if "digest" in content:
        raise ValueError("it has a digest")
    return content


def _state_0(content: Content) -> Content:
    """`digest` was that of the tensors."""
    if "tensors" in content:
        raise ValueError("it has the tensors' digest under its present name")
    return {"tensors" if name == "digest" else name: value for name, value in content.items()}


def _mined_1(content: Content) -> Content:
    """Schema 2 also counts queries with fewer than k images, and what fallbacks and filters did. There were neither."""
    counts: dict[str, int] = {}
    for row in content["negatives"]:
        counts[row["query"]] = counts.get(row["query"], 0) + 1
    few = sum(count < content["strategy"]["k"] for count in counts.values())
    added = {"fewer_than_k": few, "filled_by_fallback": 0, "filters": {}}
    return content | {"summary": content["summary"] | added}


def _mined_2(content: Content) -> Content:
    """Schema 3 also counts what was left out as right by kind. Schema 2 left out less, and did not count it."""
    return content | {"summary": content["summary"] | {"left_out": {}}}


def _metrics_1(metrics: Mapping[str, Mapping[str, float]]) -> Content:
    """`{"R@1": {"value": percent, "se": percent}}` -> fractions, by the names of schema 2."""
    names = {name: name.replace("any correct R@", "any correct recall@") for name in metrics}
    names = {name: f"recall@{new[2:]}" if new.startswith("R@") else new for name, new in names.items()}
    parts = {"metrics": "value", "standard_errors": "se"}
    return {
        part: {names[name]: round(found[of] / 100, 6) for name, found in metrics.items()} for part, of in parts.items()
    }


def _evaluation_1(content: Content) -> Content:
    """Schema 1 was of `shapes` alone, whose pictures are drawn: none is missing. Its metrics were percent, rounded to
    0.001, and its ranks lacked the value that iterations are compared on, recall@1, which follows from the rank."""
    old = dict(content)
    ranks = [[query, rank, float(rank <= 1)] for query, rank in old.pop("ranks")]
    return {
        **old, **_metrics_1(old["metrics"]), "missing_images": 0, "dropped_queries": 0, "ablated": None,
        "compared_on": "recall@1", "ranks": ranks,
    }  # fmt: skip


def _evaluation_2(content: Content) -> Content:
    """Schema 3 keeps each query's best images. Schema 2 did not, and nothing says what they were."""
    return content | {"top": []}


def _results_1(content: Content) -> Content:
    """Schema 1 compared nothing, and had no ranks by which to do it now."""
    added = {"missing_images": 0, "dropped_queries": 0, "ablated": None, "compared_on": "recall@1"}
    results = [{**row, **_metrics_1(row["metrics"]), **added} for row in content["results"]]
    return content | {"results": results, "compared": []}


@dataclass(frozen=True, slots=True)
class Kind:
    """Files of one form. `steps[n]` makes version n + 1 of version n; a version before the first step is not read.

    From version `sealed` on the file carries its digest. `way` is what to do about a damaged one.
    """

    version: int = 1
    steps: Mapping[int, Callable[[Content], Content]] = field(default_factory=dict)
    sealed: int | None = None
    way: str = RESTORE


KINDS = {
    "manifest": Kind(2, {1: _same}, sealed=2),
    "config": Kind(1, {0: _config_0}, sealed=1),
    "costs": Kind(2, {1: _same}, sealed=2, way="No result needs it: delete it."),
    "trackers": Kind(sealed=1, way="No result needs it: delete its directory; what was tracked is then tracked anew."),
    "pictures": Kind(2, {1: _same}, sealed=2, way="It is remade."),
    "state": Kind(1, {0: _state_0}, sealed=1, way="Delete its directory to train from the start."),
    "hard_negatives": Kind(3, {1: _mined_1, 2: _mined_2}),
    "augmented_samples": Kind(),
    "accounting": Kind(),
    "training_log": Kind(),
    "parts": Kind(),
    "evaluation": Kind(3, {1: _evaluation_1, 2: _evaluation_2}),
    "evaluation_results": Kind(3, {1: _results_1, 2: _same}),
    "problems": Kind(),
    "export": Kind(),
    "exported_model": Kind(),
    "scores": Kind(),
    "negatives": Kind(),
    "negatives_report": Kind(),
}  # fmt: skip
"""By name; version 0 is a file without `schema`. A new form of a kind: a higher version, and the step to it."""


def kind_of(name: str) -> str:
    """`hard_negatives` of `hard_negatives_iter_3.json`, `evaluation` of `evaluation_base.json`."""
    return re.sub(r"(_iter_\d+|_base)?\.json$", "", name)


def digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object in canonical form, its own `digest` aside."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def sealed(kind: str, content: Mapping[str, Any]) -> Content:
    """The content of a file of `kind` with its version and its digest."""
    made = {"schema": KINDS[kind].version, **content}
    return made | {"digest": digest(made)}


def read(path: Path, kind: str | None = None) -> Content:
    """A file that cirloop wrote, in the form of the present version and without its digest.

    Raises UserError, with the file named, where it cannot be read, is damaged or altered, or is of a newer version.
    """
    about = KINDS[kind or kind_of(path.name)]
    try:
        content = reading.parse_json(reading.text(path, 1 << 62))
        if not isinstance(content, dict):
            raise UserError("it holds no object")
        version = content.get("schema", 0)
        if not isinstance(version, int) or isinstance(version, bool):
            raise UserError(f"its schema is {version!r}")
    except UserError as error:
        raise UserError(f"{path} is damaged ({error}). {about.way}") from None
    if version > about.version:
        raise UserError(
            f"{path} was written by a newer cirloop (schema {version}; this version reads up to {about.version}): "
            "update cirloop."
        )
    return _forward(path, about, version, content)


def _forward(path: Path, about: Kind, version: int, content: Content) -> Content:
    """The content, proven, in the present version."""
    if version < min([about.version, *about.steps]):
        raise UserError(f"{path} is damaged (it has no schema). {about.way}")
    if about.sealed is not None and version >= about.sealed and content.pop("digest", None) != digest(content):
        raise UserError(f"{path} is altered: its digest does not agree with the rest. {about.way}")
    try:
        for step in range(version, about.version):
            content = about.steps[step](content)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged (no content of schema {version}: {error!r}). {about.way}") from None
    return content | {"schema": about.version}
