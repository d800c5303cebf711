"""What can be known of a run's models before any is loaded: whether adapters fit, what must be
installed, the disk."""

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
from cirloop.validation import Problems

SAMPLE = 16
"""Pictures of a split whose sizes stand for all of them."""


def check_models(config: RunConfig, problems: Problems) -> None:
    """Adapters, and what settings ask of the machine."""
    trains = bool(config.num_iterations or config.training.iteration_0_steps)
    if isinstance(config.model, VlmSettings) and config.model.start_adapter is not None:
        try:
            _check_start_adapter(config, config.model, config.model.start_adapter, trains)
        except UserError as error:
            problems.add("model.start_adapter", str(error))
    for group in ("model", "foundation"):
        if getattr(getattr(config, group), "attention", None) == "flash_attention_2":
            _check_flash(f"{group}.attention flash_attention_2", problems)
    if getattr(config.model, "quantization", "none") == "nf4" and find_spec("bitsandbytes") is None:
        problems.add(
            "model.quantization nf4",
            "needs the package bitsandbytes (pip install bitsandbytes); or set none",
        )
    if not trains:
        return
    runtime, half = config.runtime, config.training.lora.dtype == "base"
    if runtime.deepspeed is not None and find_spec("deepspeed") is None:
        problems.add(
            "--deepspeed", "needs the package deepspeed (pip install deepspeed); or leave it out"
        )
    kind = _kind(runtime.accelerate_config) if runtime.deepspeed is None else "DEEPSPEED"
    if half and kind in ("DEEPSPEED", "FSDP"):
        problems.add(
            "training.lora.dtype base",
            "is not available under DeepSpeed or FSDP; set it to float32",
        )
    for name in ("chunk_size", "max_skipped_batches"):
        if kind == "DEEPSPEED" and getattr(config.training, name):
            problems.add(f"training.{name}", "is not available under DeepSpeed; set it to 0")


def _kind(accelerate_config: Path | None) -> str | None:
    """`distributed_type` of an accelerate config; None where it cannot be read, which is said
    elsewhere."""
    if accelerate_config is None or not accelerate_config.is_file():
        return None
    try:
        content = parse.yaml_file(accelerate_config)
    except UserError:
        return None
    return content.get("distributed_type") if isinstance(content, dict) else None


def _check_flash(setting: str, problems: Problems) -> None:
    import torch

    lacks = [] if find_spec("flash_attn") else ["the package flash-attn (pip install flash-attn)"]
    lacks += [] if torch.cuda.is_available() else ["a CUDA GPU"]
    if lacks:
        problems.add(setting, f"needs {' and '.join(lacks)}; or set it to sdpa")


def _check_start_adapter(config: RunConfig, model: VlmSettings, path: str, trains: bool) -> None:
    """It is a LoRA, it fits the model's layers, and training goes on with what it is. Raises
    UserError with all that is wrong."""
    directory = resolve_adapter(path)
    lora = parse.parse_json(parse.text(directory / LORA_CONFIG))
    wrong = _misfits(directory / LORA_WEIGHTS, model, lora)
    tuning = config.training
    dora, tune = bool(lora.get("use_dora")), tuning.finetuning or "lora"
    if trains and tune != ("dora" if dora else "lora"):
        wrong.append(
            f"it is a {'DoRA' if dora else 'plain LoRA'}, and training.finetuning is {tune}: set"
            f" training.finetuning {'dora' if dora else 'lora'}"
        )
    names = {
        "r": ("r", tuning.lora.r),
        "alpha": ("lora_alpha", tuning.lora.alpha),
        "dropout": ("lora_dropout", tuning.lora.dropout),
    }
    for setting, (key, wanted) in names.items() if trains and tune != "full" else ():
        if lora.get(key) != wanted:
            wrong.append(
                f"its {setting} is {lora.get(key)}, training.lora.{setting} is {wanted}: set that"
                " to the adapter's"
            )
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong)}.")


def _misfits(weights: Path, model: VlmSettings, lora: dict[str, Any]) -> list[str]:
    """What of an adapter's tensors cannot be put on the model's layers, by the headers of its
    file."""
    from safetensors import SafetensorError, safe_open

    sizes = resources.sizes_of(model.find())
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
                shape, wanted = (
                    tensors.get_slice(name).get_shape(),
                    [lora.get("r"), sizes.shapes[leaf][0]],
                )
                if list(shape) != wanted:
                    wrong.append(f"{name} is {list(shape)}, not {wanted}")
    except (SafetensorError, OSError) as error:
        return [f"{LORA_WEIGHTS} cannot be read ({error})"]
    if not layers:
        return [f"{LORA_WEIGHTS} has no lora_A for any of {', '.join(sizes.shapes)}"]
    beyond = [number for number in layers if number.isdigit() and int(number) >= sizes.layers]
    if beyond:
        wrong.append(f"it has layers up to {max(map(int, beyond))}, the model {sizes.layers}")
    more = f" ({len(wrong)} tensors do not fit {model.path!r})" if len(wrong) > 1 else ""
    return [wrong[0] + more] if wrong else []


def splits_of(config: RunConfig, data: Dataset) -> list[TrainSplit | EvalSplit]:
    """Those whose pictures the run looks at."""
    splits: list[TrainSplit | EvalSplit] = [*data.eval_splits(config.evaluation.split)]
    return (
        [data.train, *splits]
        if config.num_iterations or config.training.iteration_0_steps
        else splits
    )


def num_images(splits: Iterable[TrainSplit | EvalSplit]) -> int:
    return len({image for split in splits for image in split.gallery.ids})


def mean_tokens(model: VlmSettings, splits: Iterable[TrainSplit | EvalSplit]) -> float:
    """Vision tokens of a picture, over a sample of each split weighed by its size."""
    total, weight = 0.0, 0
    for split in splits:
        ids = split.gallery.ids
        some: list[ImageId] = [*ids[:: max(1, len(ids) // SAMPLE)]][:SAMPLE]
        shapes = [
            (picture.height, picture.width)
            for picture in (split.images.load(image) for image in some)
        ]
        total += len(ids) * sum(_tokens(model, shapes)) / max(1, len(some))
        weight += len(ids)
    return total / max(1, weight)


def _tokens(model: VlmSettings, shapes: list[tuple[int, int]]) -> list[int]:
    """Of pictures by height and width."""
    if isinstance(model, QwenSettings):
        from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

        side = resources.sizes_of(model.find()).pixels_per_token
        sized = [smart_resize(h, w, side, model.min_pixels, model.max_pixels) for h, w in shapes]
        return [height * width // side**2 for height, width in sized]
    from transformers import AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(model.find(), trust_remote_code=False)
    counted = processor._get_num_multimodal_tokens(image_sizes=[list(shape) for shape in shapes])
    tokens: list[int] = counted.num_image_tokens
    return tokens


def disk_of(config: RunConfig, data: Dataset) -> dict[str, int]:
    """Bytes by where they go: features of all pictures in the cache, and in the run directory the
    adapters of all iterations with two step checkpoints. Only of vision-language models; of others
    neither is known beforehand."""
    model = config.model
    if not isinstance(model, VlmSettings):
        return {}
    splits, sizes, training = (
        splits_of(config, data),
        resources.sizes_of(model.find()),
        config.training,
    )
    adapter = resources.adapter_weights(
        sizes, training.lora.r, training.lora.target_modules, training.finetuning == "dora"
    )
    weights = sizes.language_weights if training.finetuning == "full" else adapter
    kept = (config.num_iterations + 1) * 4 * weights + 2 * 12 * weights
    each = resources.feature_bytes(sizes, model.dtype, mean_tokens(model, splits))
    return {"vision": each * num_images(splits), "run": kept}


def check_disk(config: RunConfig, data: Dataset, problems: Problems) -> None:
    """What the run writes fits where it goes."""
    needs = disk_of(config, data)
    if not needs:
        return
    kept = config.cache / "vision"
    cache = standing(kept)
    run = standing(config.directory)
    there = sum(path.stat().st_size for path in kept.rglob("*.safetensors")) if kept.is_dir() else 0
    vision = max(0, needs["vision"] - there)
    together = cache.stat().st_dev == run.stat().st_dev
    free = shutil.disk_usage(cache).free
    if vision + needs["run"] * together > free:
        problems.add(
            f"runtime.cache_dir {config.cache}",
            f"the vision features of {num_images(splits_of(config, data)):,} images take"
            f" {resources.gigabytes(needs['vision'])}, {resources.gigabytes(there)} of them or of"
            f" others are there, and {resources.gigabytes(free)} are free: give a larger disk by"
            " --runtime.cache_dir, lower model.max_pixels (where the model has it), or free some"
            " of it. runtime.feature_cache_max_gb only deletes what other runs have left: what a"
            " run itself needs stays",
        )
    if not together and needs["run"] > shutil.disk_usage(run).free:
        left = resources.gigabytes(shutil.disk_usage(run).free)
        what = (
            f"checkpoints take {resources.gigabytes(needs['run'])}, and {left} are free: give one"
            " on a larger disk"
        )
        problems.add(f"--experiment_dir {config.directory}", what)


def standing(path: Path) -> Path:
    """The nearest directory that is there already. Raises UserError for one that may not be looked
    into."""
    path = path.absolute()
    try:
        return next(each for each in (path, *path.parents) if each.is_dir())
    except PermissionError:
        raise UserError(
            f"{path}: permission denied. Give a directory that may be read and written."
        ) from None
