"""Model directories: where they are, what is wrong with them, their loading, and their digest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from cirloop.artifacts.store import file_digest, fingerprint
from cirloop.io import parse
from cirloop.types import UserError

if TYPE_CHECKING:
    import torch

    from cirloop.backbones.base import VisionLanguageModel

TINY = "tiny"
LORA_CONFIG = "adapter_config.json"
LORA_WEIGHTS = "adapter_model.safetensors"
PARTS_CONFIG = "parts.json"
PARTS_WEIGHTS = "parts.safetensors"
SUFFIXES = (".json", ".safetensors", ".txt", ".jinja", ".model")
"""Suffixes of files that decide a model's output."""
_PATTERNS = tuple(f"*{suffix}" for suffix in SUFFIXES)
_NEEDED = ("config.json", "tokenizer_config.json", "preprocessor_config.json")


def resolve(path: str, *model_types: str) -> Path:
    """Return the local directory of `path` (a directory, a hub name, or `tiny`).

    Its config.json must have one of `model_types`, if any are given. Raises UserError with all that
    is wrong.
    """
    directory = Path(str(files("cirloop"))) / TINY if path == TINY else parse.expand_user(path)
    if not directory.exists():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise UserError(
                f"model path {path!r} does not exist{_search_place(path)}. Give a directory, a hub"
                f" name such as Qwen/Qwen2-VL-2B-Instruct, or `{TINY}`, the embedded model."
            )
        directory = download(path)
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


def _search_place(path: str) -> str:
    """Return where a relative path was looked for."""
    return "" if path.startswith(("/", "~")) else f" in {Path.cwd()}"


def _problems(directory: Path, model_types: tuple[str, ...]) -> list[str]:
    """List what is missing in a model directory, or wrong with it."""
    problems = []
    for name in _NEEDED:
        names = (name, "processor_config.json") if name == "preprocessor_config.json" else (name,)
        if not any((directory / alternative).is_file() for alternative in names):
            problems.append(f"no {name}")
    if not list(directory.glob("*.safetensors")):
        problems.append("no *.safetensors weights (pickled .bin weights are not read)")
    config = directory / "config.json"
    index = directory / "model.safetensors.index.json"
    try:
        if config.is_file():
            model_type = parse.parse_json(parse.read_text(config)).get("model_type")
            if model_types and model_type not in model_types:
                expected = " or ".join(map(repr, model_types))
                problems.append(f"config.json says model_type {model_type!r}, expected {expected}")
        if index.is_file():
            shards = set(parse.parse_json(parse.read_text(index))["weight_map"].values())
            problems += [
                f"no {name}" for name in sorted(shards) if not (directory / name).is_file()
            ]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        problems.append(f"config.json or {index.name} cannot be read: {error}")
    return problems


def model_type(path: str) -> str | None:
    """Return the `model_type` in a local directory's config.json; None where it has none."""
    config = parse.expand_user(path) / "config.json"
    try:
        content = parse.parse_json(parse.read_text(config)) if config.is_file() else None
    except UserError:  # said by `resolve`, with all else that is wrong
        return None
    return content.get("model_type") if isinstance(content, dict) else None


def resolve_adapter(path: str) -> Path:
    """Return the local directory of a published LoRA, by its path or hub name.

    Raises UserError with all that is wrong.
    """
    directory = parse.expand_user(path)
    if not directory.exists():
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise UserError(
                f"model.start_adapter {path!r} does not exist. Give a directory or a hub name."
            )
        directory = download(path)
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
    """Return whether `directory` holds trained weights: a LoRA, or parameters trained in full."""
    return any((directory / name).is_file() for name in (LORA_CONFIG, PARTS_CONFIG))


def download(
    name: str,
    patterns: Sequence[str] = _PATTERNS,
    way_out: str = f"download it beforehand, or use `{TINY}`, the embedded model",
) -> Path:
    """Download files of a model. Raises UserError where the hub does not give them."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[*patterns]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model path {name!r} is neither a directory here nor to be had from the hub"
            f" ({type(error).__name__}). Check the name and the network, {way_out}."
        ) from None


def unloadable() -> tuple[type[Exception], ...]:
    """Return what transformers raises of files that are damaged, or do not fit together."""
    from huggingface_hub.errors import StrictDataclassError

    damaged = (SafetensorError, StrictDataclassError, OSError, ValueError, ImportError)
    return (*damaged, KeyError, TypeError, AttributeError, AssertionError, ArithmeticError)


@contextmanager
def loading_errors(subject: str, way_out: str) -> Iterator[None]:
    """Raise UserError with what transformers says of files that it cannot load."""
    try:
        yield
    except unloadable() as error:
        message = f"{type(error).__name__}: {error}"
        raise UserError(f"{subject} cannot be loaded: {message}\n{way_out}") from None


def load_pretrained(
    kind: type[VisionLanguageModel],
    directory: Path,
    subject: str,
    way_out: str,
    may_lack: tuple[str, ...] = (),
    **options: object,
) -> VisionLanguageModel:
    """Load a model by its class in transformers, or an `Auto` class, frozen.

    Raises UserError where a file cannot be read, a weight is missing whose name does not begin with
    one of `may_lack`, or a weight has another shape than config.json says.
    """
    with loading_errors(subject, way_out):
        model, info = kind.from_pretrained(
            directory,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused by name
            trust_remote_code=False,
            use_safetensors=True,
            **options,
        )
    wrong = [f"no {name}" for name in sorted(info["missing_keys"]) if not name.startswith(may_lack)]
    wrong += [
        f"{name} {list(shape)}, not {list(expected)}"
        for name, shape, expected in sorted(info["mismatched_keys"])
    ]
    if wrong:
        raise UserError(
            f"{subject}: {len(wrong)} weights do not fit config.json:"
            f" {'; '.join(wrong[:5])}. {way_out}"
        )
    return model.requires_grad_(requires_grad=False)


def differing(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of weights that only one of both has, and the shapes that are not as
    expected."""
    return sorted(state.keys() ^ expected.keys()) + [
        f"{name} {list(state[name].shape)}, not {list(value.shape)}"
        for name, value in expected.items()
        if name in state and state[name].shape != value.shape
    ]


@cache
def weights_digest(directory: Path) -> str:
    """Return the digest of every file that decides the model's output."""
    paths = sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES)
    return fingerprint({path.name: file_digest(path) for path in paths})
