"""The settings of a run, and the programs and device that the report was written with."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from cirloop.io.redact import HIDDEN, secrets_in
from cirloop.report.charts import Table
from cirloop.report.report_data import ReportData, Section, shortened

PACKAGES = (
    "cirloop",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "numpy",
    "safetensors",
    "pillow",
    "faiss-cpu",
    "faiss-gpu",
    "deepspeed",
    "bitsandbytes",
    "vllm",
    "open_clip_torch",
)


def section(data: ReportData) -> Section:
    return Section(
        "settings", "Settings and environment", tables=[*_settings(data), _environment()]
    )


def _settings(data: ReportData) -> list[Table]:
    """Return a table per group of settings, the run's own first; secrets are hidden."""
    hidden = {*secrets_in(data.settings)}
    groups: dict[str, list[tuple[str, str]]] = {"run": []}
    for name, value in _flat(data.settings, ""):
        group, _, rest = name.partition(".")
        # Also one in a list.
        secret = any(f"{secret_name}.".startswith(f"{name}.") for secret_name in hidden)
        shown = HIDDEN if secret else shortened(_words(value))
        if value in (None, []) and name in data.used:
            shown = shortened(f"automatic: {data.used[name]}")
        groups.setdefault(group if rest else "run", []).append((rest or name, shown))
    return [Table(group, ("setting", "value"), rows) for group, rows in groups.items()]


def _flat(value: object, name: str) -> Iterator[tuple[str, object]]:
    """Yield dotted names and values; positions are names too where items have settings."""
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        value = dict(enumerate(value))
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}".lstrip("."))
    else:
        yield name, value


def _words(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value) or "(empty)"


def _environment() -> Table:
    rows = [("Python", platform.python_version()), ("system", platform.platform())]
    for name in PACKAGES:
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue  # the table lists what is there
    rows.append(("device", _device()))
    return Table("Written with", ("program", "version"), rows)


def _device() -> str:
    """Return the GPUs of a process that uses them; looking must not load torch or allocate GPU
    memory."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return f"CPU, {platform.machine()}"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
