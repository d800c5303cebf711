"""Say what requirements.txt asks for and this Python lacks.

    python scripts/check_environment.py [--dev]   a requirement a line, exit 3; silent if none
    python scripts/check_environment.py --lists   where the two lists differ, exit 1

Versions come from installed metadata and modules are found, not imported: a fraction of a second.
With CIRLOOP_LOCKED=1 also the installed packages whose version is not that of requirements.lock.
`--dev` adds pyproject.toml's `dev` extra. scripts/setup_env.sh runs this under each Python it
considers.
"""

import importlib.metadata
import os
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UNFINISHED = (  # setup_env.sh keeps this file in the environment while pip works
    ".cirloop-install-unfinished"
)
LACKING = 3  # not 1, which is what a Python that stumbles over this file ends with
try:
    from packaging.requirements import Requirement
except ImportError:  # half of requirements.txt depends on packaging, so none of that is there
    print("the packages of requirements.txt")
    sys.exit(LACKING)

sys.path[:0] = [str(ROOT / "src")]
from cirloop.tools.installed import lacking  # noqa: E402 - it needs packaging and nothing else


def requirements_txt() -> list[Requirement]:
    lines = (
        line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()
    )
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def pinned() -> list[Requirement]:
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def unlike(requirement: Requirement) -> str | None:
    """Whether an installed package has another version; one that is not there may not be needed
    here."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return None
    same = requirement.specifier.contains(version, prereleases=True)
    return None if same else f"{requirement.name}{requirement.specifier} (has {version})"


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if "--lists" in sys.argv[1:]:
        extra = project["optional-dependencies"]["train"]
        theirs = [Requirement(line) for line in [*project["dependencies"], *extra]]
        differ = set(map(str, requirements_txt())) ^ set(map(str, theirs))
        for line in sorted(differ):
            print(f"{line}: not the same in requirements.txt and pyproject.toml; write it in both")
        return int(bool(differ))
    wanted = requirements_txt()
    if "--dev" in sys.argv[1:]:
        wanted += [Requirement(line) for line in project["optional-dependencies"]["dev"]]
    missing = [problem for requirement in wanted if (problem := lacking(requirement))]
    if os.environ.get("CIRLOOP_LOCKED") == "1":
        missing += [problem for line in pinned() if (problem := unlike(line))]
    if (Path(sys.prefix) / UNFINISHED).exists():
        missing.insert(0, "a finished installation (the last one was interrupted)")
    for problem in missing:
        print(problem)
    return LACKING if missing else 0


if __name__ == "__main__":
    sys.exit(main())
