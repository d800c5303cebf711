"""The settings of a run, and the programs and device that the report was written with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from cirloop.report.html.charts import Table
from cirloop.report.html.source import Source, shortened
from cirloop.shown import HIDDEN, secrets_in

PACKAGES = ("cirloop", "torch", "transformers", "peft", "accelerate", "numpy", "safetensors", "pillow", "faiss-cpu",
            "faiss-gpu", "deepspeed", "bitsandbytes", "vllm", "open_clip_torch")  # fmt: skip


def settings(source: Source) -> tuple[Table, ...]:
    """A table per group of settings; what looks like a secret is hidden."""
    hidden = {*secrets_in(source.settings)}
    groups: dict[str, list[tuple[str, str]]] = {}
    for name, value in _flat(source.settings, ""):
        group, _, rest = name.partition(".")
        secret = any(f"{each}.".startswith(f"{name}.") for each in hidden)  # also one in a list
        shown = HIDDEN if secret else shortened(_said(value))
        groups.setdefault(group if rest else "run", []).append((shortened(rest or name), shown))
    return tuple(
        Table(group, ("setting", "value"), tuple(rows)) for group, rows in sorted(groups.items(), key=_run_first)
    )


def _run_first(group: tuple[str, Any]) -> bool:
    return group[0] != "run"


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{number}")
    else:
        yield name, value


def _said(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value) or "(empty)"


def environment() -> Table:
    rows = [("Python", platform.python_version()), ("system", platform.platform())]
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue  # the table lists what is there
    rows.append(("device", _device()))
    return Table("Written with", ("program", "version"), tuple((name, shortened(value)) for name, value in rows))


def _device() -> str:
    """The GPUs of a process that uses them; to look is no reason to load torch, or to take memory on one."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return f"CPU, {platform.machine()}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
