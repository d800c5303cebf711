"""What is installed, found and missing on this machine, and for which command.

Until the packages are known to be there nothing but the standard library and `packaging` is used,
so that it also runs where they are not.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import cirloop
from cirloop.tools.installed import missing

Row = tuple[str, str]
HELP = f"usage: cirloop doctor\n\n{(__doc__ or '').strip()}\n"
EXTRAS = {
    "train": "cirloop train --deepspeed",
    "qlora": "cirloop train --model.quantization nf4",
    "trackers": "cirloop train --report_to",
    "xlsx": "cirloop import of Excel workbooks",
}
"""Extra of this package -> what needs it."""
OTHERS = {
    "sentence-transformers>=6.0": "cirloop export --format sentence-transformers",
    "vllm": "cirloop train --foundation_model_backbone vllm, in an environment of its own",
}
"""Requirement -> what needs it, where it is in no extra for users."""
LACKING = 1
"""The exit code where a package is missing that every command needs."""


def main(argv: Sequence[str]) -> int:
    """Print what was found. Returns the exit code."""
    if argv:
        asked = {*argv} <= {"--help", "-h"}
        (sys.stdout if asked else sys.stderr).write(HELP if asked else f"error: no flags.\n{HELP}")
        return 0 if asked else 2
    try:
        requirements = importlib.metadata.requires("cirloop") or []
    except importlib.metadata.PackageNotFoundError:
        sys.stderr.write("error: cirloop is not installed here, only found. pip install -e .\n")
        return LACKING
    needed = missing(requirements)
    _print("This Python", _python())
    _print("Packages", _packages(needed, requirements))
    _print("Disk", _disk())
    if needed:
        _print("Devices and data", [("not looked at", "first the missing packages")])
        return LACKING
    _print("Devices", _devices())
    _print("Data in the usual places", _data_sets())
    return 0


def _print(title: str, rows: Sequence[Row] | Iterator[Row]) -> None:
    sys.stdout.write(f"{title}\n" + "".join(f"  {name}: {value}\n" for name, value in rows))


def _python() -> list[Row]:
    folder = Path(cirloop.__file__).parent
    return [
        ("Python", f"{platform.python_version()}, {sys.executable}"),
        ("cirloop", f"{cirloop.__version__}, {folder}"),
        ("recipes", f"{(folder / 'configs').resolve()}; --config takes one by its name"),
    ]


def _packages(needed: Sequence[str], requirements: list[str]) -> Iterator[Row]:
    repair = f"missing: {', '.join(needed)}; pip install -U cirloop"
    yield "every command", repair if needed else "all there"
    for extra, command in EXTRAS.items():
        known = any(f'extra == "{extra}"' in line.replace("'", '"') for line in requirements)
        lacks = missing(requirements, extra) if known else [f"the extra {extra}"]
        way = f"pip install 'cirloop[{extra}]'"
        yield command, f"missing: {', '.join(lacks)}; {way}" if lacks else "all there"
    for requirement, command in OTHERS.items():
        lacks = missing([requirement])
        yield command, f"missing: pip install '{requirement}'" if lacks else "all there"


def _disk() -> Iterator[Row]:
    """Yield the free space where runs, and models that are downloaded, go."""
    hub = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    for name, path in (("runs and caches, experiments", Path.cwd()), ("models, HF_HOME", hub)):
        folder = Path(path).absolute()
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        usage = shutil.disk_usage(existing)
        yield name, f"{usage.free / 1e9:,.0f} GB free of {usage.total / 1e9:,.0f} GB, {folder}"


def _devices() -> Iterator[Row]:
    from cirloop.tools.add_negatives.report import devices

    for device in devices():
        yield device["device"], f"{device['name']}, {device['memory_bytes'] / 1e9:,.0f} GB"


def _data_sets() -> Iterator[Row]:
    from cirloop.config.recipes import DRAWN, type_names
    from cirloop.data import locations
    from cirloop.data.config import DataConfig

    yield DRAWN, "drawn, needs no files"
    for name in sorted({*type_names(DataConfig)} - {DRAWN}):
        directories = locations.default_dirs(name)
        existing = next((path for path in directories if path.is_dir()), None)
        places = " or ".join(map(str, directories))
        yield name, str(existing.absolute()) if existing else f"not in {places}; give --data_dir"
