"""Which requirements this Python meets, by installed metadata; modules are found, not imported.

scripts/check_environment.py runs this in a Python that may lack everything but `packaging`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MODULES = {
    "faiss-cpu": "faiss",
    "faiss-gpu": "faiss",
    "mlflow-skinny": "mlflow",
    "open-clip-torch": "open_clip",
    "pillow": "PIL",
    "pytest-xdist": "xdist",
    "pyyaml": "yaml",
    "types-pyyaml": "yaml-stubs",
}
"""Distribution -> module, where it is not the name with underscores."""


def lacking(requirement: Requirement, extra: str = "") -> str | None:
    """Return what is wrong with the installed version; None where nothing is, or where the
    requirement is not for this machine and `extra`."""
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
        return None
    name = canonicalize_name(requirement.name)
    wanted = f"{requirement.name}{requirement.specifier}"
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return wanted
    if importlib.util.find_spec(MODULES.get(name, name.replace("-", "_"))) is None:
        return f"{wanted} (its files are gone)"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{wanted} (has {version})"
    return None


def missing(lines: list[str], extra: str = "") -> list[str]:
    """Return what this Python lacks of requirements, as they stand in metadata: of those of
    `extra`, or without one of those that every installation has."""
    problems = []
    for requirement in map(Requirement, lines):
        if ("extra ==" in str(requirement.marker)) == bool(extra):
            problems.append(lacking(requirement, extra))
    return [problem for problem in problems if problem is not None]
