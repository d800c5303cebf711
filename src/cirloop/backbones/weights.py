"""Model directories: finding one, saying what is wrong with one, and its content digest."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from pathlib import Path

from cirloop.artifacts import file_digest, fingerprint
from cirloop.types import UserError

TINY = "tiny"
LORA_CONFIG, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARTS_CONFIG, PARTS_WEIGHTS = "parts.json", "parts.safetensors"
_NEEDED = ("config.json", "tokenizer_config.json", "preprocessor_config.json")


def resolve(path: str, model_type: str) -> Path:
    """The local directory of `path` (a directory, a hub name, or `tiny`). Raises UserError with all that is wrong."""
    if path == TINY:
        return Path(str(files("cirloop"))) / TINY
    directory = Path(path).expanduser()
    if not directory.exists():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise UserError(
                f"model path {path!r} does not exist. Give a directory, a hub name such as Qwen/Qwen2-VL-2B-Instruct, "
                f"or `{TINY}`, the embedded model."
            )
        directory = _download(path)
    problems = []
    if not directory.is_dir():
        raise UserError(f"model path {path!r} is not a directory.")
    for name in _NEEDED:
        if not (directory / name).is_file() and not (
            name.startswith("pre") and (directory / "processor_config.json").is_file()
        ):
            problems.append(f"no {name}")
    if not list(directory.glob("*.safetensors")):
        problems.append("no *.safetensors weights (pickled .bin weights are not read)")
    config = directory / "config.json"
    if config.is_file():
        try:
            found = json.loads(config.read_text("utf-8")).get("model_type")
            if found != model_type:
                problems.append(f"config.json says model_type {found!r}, expected {model_type!r}")
        except (ValueError, AttributeError) as error:
            problems.append(f"config.json cannot be read: {error}")
    if problems:
        raise UserError(
            f"model path {path!r} is not a {model_type} model:\n  "
            + "\n  ".join(problems)
            + "\nGive a complete model directory, a hub name, or another --model_backbone."
        )
    return directory


def is_adapter(directory: Path) -> bool:
    """Whether `directory` holds trained weights: a LoRA, or parts trained in full."""
    return any((directory / name).is_file() for name in (LORA_CONFIG, PARTS_CONFIG))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model path {name!r} is neither a directory here nor to be had from the hub ({type(error).__name__}). "
            f"Check the name and the network, download it beforehand, or use `{TINY}`, the embedded model."
        ) from None


@cache
def weights_digest(directory: Path) -> str:
    """Digest of every file that decides the model's output."""
    names = sorted(p for p in directory.iterdir() if p.suffix in {".safetensors", ".json", ".jinja", ".txt"})
    return fingerprint({p.name: file_digest(p) for p in names})
