"""Model directories: finding one, saying what is wrong with one, and its content digest."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from cirloop.artifacts.store import file_digest, fingerprint
from cirloop.io import parse
from cirloop.types import UserError

if TYPE_CHECKING:
    pass

TINY = "tiny"
LORA_CONFIG, LORA_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PARTS_CONFIG, PARTS_WEIGHTS = "parts.json", "parts.safetensors"
_NEEDED = ("config.json", "tokenizer_config.json", "preprocessor_config.json")


def resolve(path: str, *model_types: str) -> Path:
    """The local directory of `path` (a directory, a hub name, or `tiny`), whose config.json has one
    of `model_types`; any where none are given.

    Raises UserError with all that is wrong.
    """
    directory = Path(str(files("cirloop"))) / TINY if path == TINY else parse.expand_user(path)
    if not directory.exists():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise UserError(
                f"model path {path!r} does not exist{_here(path)}. Give a directory, a hub name"
                f" such as Qwen/Qwen2-VL-2B-Instruct, or `{TINY}`, the embedded model."
            )
        directory = _download(path)
    if not directory.is_dir():
        raise UserError(f"model path {path!r} is not a directory.")
    problems = _problems(directory, model_types)
    if problems:
        raise UserError(
            f"model path {path!r} is not a {' or '.join(model_types) or 'complete'} model:\n  "
            + "\n  ".join(problems)
            + "\nGive a complete model directory, a hub name, or another --model_backbone."
        )
    return directory


def _here(path: str) -> str:
    """Where a path that is no absolute one was looked for."""
    return "" if path.startswith(("/", "~")) else f" in {Path.cwd()}"


def _problems(directory: Path, model_types: tuple[str, ...]) -> list[str]:
    problems = []
    for name in _NEEDED:
        if not (directory / name).is_file() and not (
            name.startswith("pre") and (directory / "processor_config.json").is_file()
        ):
            problems.append(f"no {name}")
    if not list(directory.glob("*.safetensors")):
        problems.append("no *.safetensors weights (pickled .bin weights are not read)")
    config, index = directory / "config.json", directory / "model.safetensors.index.json"
    try:
        if config.is_file():
            found = parse.parse_json(parse.read_text(config)).get("model_type")
            if model_types and found not in model_types:
                expected = " or ".join(map(repr, model_types))
                problems.append(f"config.json says model_type {found!r}, expected {expected}")
        if index.is_file():
            shards = set(parse.parse_json(parse.read_text(index))["weight_map"].values())
            problems += [
                f"no {name}" for name in sorted(shards) if not (directory / name).is_file()
            ]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        problems.append(f"config.json or {index.name} cannot be read: {error}")
    return problems


def model_type(path: str) -> str | None:
    """The `model_type` in the config.json of a model directory that is here; None where there is no
    such file or it says none."""
    config = parse.expand_user(path) / "config.json"
    try:
        content = parse.parse_json(parse.read_text(config)) if config.is_file() else None
    except UserError:  # said by `resolve`, with all else that is wrong
        return None
    return content.get("model_type") if isinstance(content, dict) else None


def resolve_adapter(path: str) -> Path:
    """The local directory of a published LoRA: a directory or a hub name. Raises UserError with all
    that is wrong."""
    directory = parse.expand_user(path)
    if not directory.exists():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise UserError(
                f"model.start_adapter {path!r} does not exist. Give a directory or a hub name."
            )
        directory = _download(path)
    lacks = [name for name in (LORA_CONFIG, LORA_WEIGHTS) if not (directory / name).is_file()]
    if lacks:
        raise UserError(
            f"model.start_adapter {path!r} is no LoRA as PEFT writes it: no {', no '.join(lacks)}. "
            "Weights of a whole model, such as a merged embedder's, belong in model.path."
        )
    try:
        kind = parse.parse_json(parse.read_text(directory / LORA_CONFIG)).get("peft_type")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"model.start_adapter {path!r}: {LORA_CONFIG} cannot be read: {error}"
        ) from None
    if kind != "LORA":
        raise UserError(
            f"model.start_adapter {path!r} is of type {kind!r}; only 'LORA' is read, with DoRA or"
            " without."
        )
    return directory


def is_adapter(directory: Path) -> bool:
    """Whether `directory` holds trained weights: a LoRA, or parts trained in full."""
    return any((directory / name).is_file() for name in (LORA_CONFIG, PARTS_CONFIG))


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja", "*.model"]
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model path {name!r} is neither a directory here nor to be had from the hub"
            f" ({type(error).__name__}). Check the name and the network, download it beforehand, or"
            f" use `{TINY}`, the embedded model."
        ) from None


@cache
def weights_digest(directory: Path) -> str:
    """Digest of every file that decides the model's output."""
    names = sorted(
        p
        for p in directory.iterdir()
        if p.suffix in {".safetensors", ".json", ".jinja", ".txt", ".model"}
    )
    return fingerprint({p.name: file_digest(p) for p in names})
