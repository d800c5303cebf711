"""Write requirements.lock: the versions that this environment has of what requirements.txt and the
dev tools need.

    python scripts/lock.py            write the file
    python scripts/lock.py --check    exit 1 and say what differs

Versions come from installed metadata, so the environment is to be one whose tests pass.
CIRLOOP_LOCKED=1 makes scripts/setup_env.sh install these.
"""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
HEAD = """\
# What the tests last passed with: Python {python}, {platform}. Written by scripts/lock.py (`make
# lock`). CIRLOOP_LOCKED=1 ./run_iterative_training.sh ... installs these; pip install -c
# requirements.lock -r requirements.txt.
"""


def needed(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def closure(wanted: list[Requirement]) -> dict[str, str]:
    """Name -> version of the requirements and all that they need here."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    left = [(requirement, extra) for requirement in wanted for extra in ("", *requirement.extras)]
    while left:
        requirement, extra = left.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} is needed and not here, so not in the lock", file=sys.stderr)
            continue
        for line in importlib.metadata.requires(name) or ():
            inner = Requirement(line)
            if needed(inner, extra):
                left += [(inner, each) for each in ("", *inner.extras)]
    return found


def main() -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *extras["train"], *extras["dev"]]
    wanted = [requirement for requirement in map(Requirement, lines) if needed(requirement)]
    rows = [f"{name}=={version}" for name, version in sorted(closure(wanted).items())]
    python, platform = ".".join(map(str, sys.version_info[:2])), sys.platform
    text = HEAD.format(python=python, platform=platform) + "\n".join(rows) + "\n"
    if "--check" not in sys.argv[1:]:
        LOCK.write_text(text, "utf-8")
        return 0
    before = LOCK.read_text("utf-8").splitlines() if LOCK.exists() else []
    for line in sorted({*text.splitlines()} ^ {*before}):
        print(f"{'only in requirements.lock' if line in before else 'only here'}: {line}")
    return int(text.splitlines() != before)


if __name__ == "__main__":
    sys.exit(main())
