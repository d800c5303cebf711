"""Checks of a run's models before any is loaded: adapters, packages and disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cirloop.backbones.model_settings import QwenSettings, VlmSettings
from cirloop.backbones.weights import LORA_CONFIG, LORA_WEIGHTS, resolve_adapter
from cirloop.config.run import RunConfig
from cirloop.data import Dataset
from cirloop.io import parse
from cirloop.stages import resources
from cirloop.types import EvalSplit, ImageId, TrainSplit, UserError
from cirloop.validation import ValidationReport

SAMPLE = 16
"""Images of a split whose sizes stand for all of them."""


def check_models(config: RunConfig, problems: ValidationReport) -> None:
    """Check adapters, packages and what settings require of the machine."""
    if isinstance(config.model, VlmSettings) and config.model.start_adapter is not None:
        try:
            _check_start_adapter(config, config.model, config.model.start_adapter)
        except UserError as error:
            problems.add("model.start_adapter", str(error))
    for group in ("model", "foundation"):
        if getattr(getattr(config, group), "attention", None) == "flash_attention_2":
            _check_flash(f"{group}.attention flash_attention_2", problems)
    if getattr(config.model, "quantization", "none") == "nf4" and find_spec("bitsandbytes") is None:
        problems.add(
            "model.quantization nf4",
            "needs the package bitsandbytes (pip install 'cirloop[qlora]'); or set none",
        )


def _check_flash(setting: str, problems: ValidationReport) -> None:
    import torch

    lacks = [] if find_spec("flash_attn") else ["the package flash-attn (pip install flash-attn)"]
    lacks += [] if torch.cuda.is_available() else ["a CUDA GPU"]
    if lacks:
        problems.add(setting, f"needs {' and '.join(lacks)}; or set it to sdpa")


def _check_start_adapter(config: RunConfig, model: VlmSettings, path: str) -> None:
    """Check that the start adapter is a LoRA, fits the model's layers, and agrees with the training
    settings.

    Raises UserError with all that is wrong.
    """
    directory = resolve_adapter(path)
    lora = parse.parse_json(parse.read_text(directory / LORA_CONFIG))
    wrong = _adapter_mismatches(directory / LORA_WEIGHTS, model, lora)
    tuning = config.training
    dora = bool(lora.get("use_dora"))
    tune = tuning.finetuning or "lora"
    if config.trains and tune != ("dora" if dora else "lora"):
        wrong.append(
            f"it is a {'DoRA' if dora else 'plain LoRA'}, and training.finetuning is {tune}: set"
            f" training.finetuning {'dora' if dora else 'lora'}"
        )
    names = {
        "r": ("r", tuning.lora.r),
        "alpha": ("lora_alpha", tuning.lora.alpha),
        "dropout": ("lora_dropout", tuning.lora.dropout),
    }
    for setting, (key, expected) in names.items() if config.trains and tune != "full" else ():
        if lora.get(key) != expected:
            wrong.append(
                f"its {setting} is {lora.get(key)}, training.lora.{setting} is {expected}: set that"
                " to the adapter's"
            )
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}.")


def _adapter_mismatches(weights: Path, model: VlmSettings, lora: dict[str, Any]) -> list[str]:
    """Return which tensors of an adapter do not fit the model's layers, by the headers of its
    file."""
    from safetensors import SafetensorError, safe_open

    sizes = resources.model_sizes(model.resolve_dir())
    wrong: list[str] = []
    layers: set[str] = set()
    try:
        with safe_open(weights, framework="pt") as tensors:
            for name in sorted(tensors.keys()):
                parts = name.split(".")
                leaf = next((part for part in parts if part in sizes.shapes), None)
                if "lora_A" not in parts or leaf is None:
                    continue
                layers.add(next((part for part in parts if part.isdigit()), ""))
                shape = tensors.get_slice(name).get_shape()
                expected = [lora.get("r"), sizes.shapes[leaf][0]]
                if list(shape) != expected:
                    wrong.append(f"{name} is {list(shape)}, not {expected}")
    except (SafetensorError, OSError) as error:
        return [f"{LORA_WEIGHTS} cannot be read ({error})"]
    if not layers:
        return [f"{LORA_WEIGHTS} has no lora_A for any of {', '.join(sizes.shapes)}"]
    beyond = [number for number in layers if number.isdigit() and int(number) >= sizes.layers]
    if beyond:
        wrong.append(f"it has layers up to {max(map(int, beyond))}, the model {sizes.layers}")
    more = f" ({len(wrong)} tensors do not fit {model.path!r})" if len(wrong) > 1 else ""
    return [wrong[0] + more] if wrong else []


def used_splits(config: RunConfig, data: Dataset) -> list[TrainSplit | EvalSplit]:
    """Return the splits whose images the run uses."""
    splits: list[TrainSplit | EvalSplit] = [*data.eval_splits(config.evaluation.split)]
    return [data.train, *splits] if config.trains else splits


def num_images(splits: Iterable[TrainSplit | EvalSplit]) -> int:
    """Count the different images of the splits."""
    return len({image for split in splits for image in split.gallery.ids})


def mean_tokens(model: VlmSettings, splits: Iterable[TrainSplit | EvalSplit]) -> float:
    """Return the mean vision tokens of an image, over a sample of each split weighed by its
    size."""
    total = 0.0
    weight = 0
    for split in splits:
        num = len(split.gallery.ids)
        tokens = sampled_tokens(model, split)
        total += num * sum(tokens) / max(1, len(tokens))
        weight += num
    return total / max(1, weight)


def sampled_tokens(model: VlmSettings, split: TrainSplit | EvalSplit) -> list[int]:
    """Return the vision tokens of a sample of a split's images."""
    ids = split.gallery.ids
    sample: list[ImageId] = [*ids[:: max(1, len(ids) // SAMPLE)]][:SAMPLE]
    shapes = [
        (pixels.height, pixels.width) for pixels in (split.images.load(image) for image in sample)
    ]
    return _tokens(model, shapes)


def _tokens(model: VlmSettings, shapes: list[tuple[int, int]]) -> list[int]:
    """Return the vision tokens of images of these heights and widths."""
    if isinstance(model, QwenSettings):
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        side = resources.model_sizes(model.resolve_dir()).pixels_per_token
        sized = [smart_resize(h, w, side, model.min_pixels, model.max_pixels) for h, w in shapes]
        return [height * width // side**2 for height, width in sized]
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(model.resolve_dir(), trust_remote_code=False)
    counted = processor._get_num_multimodal_tokens(image_sizes=[list(shape) for shape in shapes])
    tokens: list[int] = counted.num_image_tokens
    return tokens


def disk_bytes(config: RunConfig, data: Dataset) -> dict[str, int]:
    """Return the bytes that the vision cache (`vision`) and the run directory (`run`) will take.

    The run directory holds the adapters of all iterations and two step checkpoints. Empty for
    models other than vision-language models, whose size is not known beforehand.
    """
    model = config.model
    if not isinstance(model, VlmSettings):
        return {}
    splits = used_splits(config, data)
    sizes = resources.model_sizes(model.resolve_dir())
    training = config.training
    adapter = resources.adapter_weights(
        sizes, training.lora.r, training.lora.target_modules, training.finetuning == "dora"
    )
    weights = sizes.language_weights if training.finetuning == "full" else adapter
    kept = (config.num_iterations + 1) * 4 * weights + 2 * 12 * weights
    bytes_per_image = resources.feature_bytes(sizes, model.dtype, mean_tokens(model, splits))
    return {"vision": bytes_per_image * num_images(splits), "run": kept}


def check_disk(config: RunConfig, data: Dataset, problems: ValidationReport) -> None:
    """Check that what the run writes fits the disks."""
    needs = disk_bytes(config, data)
    if not needs:
        return
    cache_dir = config.cache / "vision"
    cache = nearest_directory(cache_dir)
    run = nearest_directory(config.directory)
    cached = (
        sum(path.stat().st_size for path in cache_dir.rglob("*.safetensors"))
        if cache_dir.is_dir()
        else 0
    )
    vision = max(0, needs["vision"] - cached)
    same_disk = cache.stat().st_dev == run.stat().st_dev
    free = shutil.disk_usage(cache).free
    if vision + needs["run"] * same_disk > free:
        problems.add(
            f"runtime.cache_dir {config.cache}",
            f"the vision features of {num_images(used_splits(config, data)):,} images take"
            f" {resources.gigabytes(needs['vision'])}, {resources.gigabytes(cached)} of them or of"
            f" others are there, and {resources.gigabytes(free)} are free: give a larger disk by"
            " --runtime.cache_dir, lower model.max_pixels (where the model has it), or free some"
            " of it. runtime.feature_cache_max_gb only deletes what other runs have left: what a"
            " run itself needs stays",
        )
    if not same_disk and needs["run"] > shutil.disk_usage(run).free:
        space = resources.gigabytes(shutil.disk_usage(run).free)
        problem = (
            f"checkpoints take {resources.gigabytes(needs['run'])}, and {space} are free: give one"
            " on a larger disk"
        )
        problems.add(f"--experiment_dir {config.directory}", problem)


def nearest_directory(path: Path) -> Path:
    """Return the nearest directory that exists. Raises UserError for one that may not be read."""
    path = path.absolute()
    try:
        return next(parent for parent in (path, *path.parents) if parent.is_dir())
    except PermissionError:
        raise UserError(
            f"{path}: permission denied. Give a directory that may be read and written."
        ) from None
