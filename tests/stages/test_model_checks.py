"""What is known of models before they are loaded: adapters that do not fit, what is not installed,
the disk."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from cirloop.backbones import LoraSettings, Qwen2VLSettings
from cirloop.config import recipes
from cirloop.config.run import RunConfig
from cirloop.config.runtime import Runtime
from cirloop.stages import model_checks, preflight, sharding_checks
from cirloop.training import TrainingSettings
from cirloop.validation import ValidationFailed, ValidationReport

ZERO3 = Path(__file__).parents[2] / "configs/deepspeed/zero3.json"
DEEPSPEED = "distributed_type: DEEPSPEED\ndeepspeed_config: "


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained LoRA and a trained DoRA of `tiny`."""
    directory = tmp_path_factory.mktemp("adapters")
    for tune in ("lora", "dora"):
        backbone: Any = Qwen2VLSettings(dtype="float32").build()
        backbone.make_trainable(TrainingSettings(finetuning=tune), 0)
        with torch.no_grad():
            for name, parameter in backbone.trainable().items():
                if "lora_B" in name:
                    parameter.normal_(std=0.02)
        backbone.save_adapter(directory / tune)
    return directory


def problems_of(config: Any) -> str:
    found = ValidationReport()
    model_checks.check_models(config, found)
    sharding_checks.check_sharding(config, found)
    return "\n".join(f"{row.where} {row.what}" for row in found.rows)


@pytest.mark.parametrize(
    ("start", "training", "words"),
    [
        ("lora", {}, []),
        ("dora", {"finetuning": "dora"}, []),
        ("dora", {}, ["it is a DoRA", "training.finetuning dora"]),
        ("lora", {"finetuning": "dora"}, ["it is a plain LoRA", "training.finetuning lora"]),
        ("lora", {"lora": LoraSettings(r=8)}, ["its r is 16", "training.lora.r is 8"]),
        ("nowhere/at/all", {}, ["does not exist"]),
    ],
)
def test_a_start_adapter_is_looked_at(
    start: str,
    training: dict[str, Any],
    words: list[str],
    adapters: Path,
    small: Any,
    tmp_path: Path,
) -> None:
    path = str(adapters / start) if (adapters / start).is_dir() else start
    found = problems_of(small(tmp_path / "run", model={"start_adapter": path}, training=training))
    assert all(word in found for word in words) and bool(words) == bool(found), found


def test_an_adapter_of_another_size_is_named(adapters: Path, small: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(adapters / "lora", tmp_path / "copy")
    state = load_file(copy / "adapter_model.safetensors")
    wide = {
        n: torch.zeros(16, 999) if "q_proj.lora_A" in n else value for n, value in state.items()
    }
    save_file(wide, copy / "adapter_model.safetensors")
    found = problems_of(small(tmp_path / "run", model={"start_adapter": str(copy)}))
    assert "[16, 999], not [16, 256]" in found and "5 tensors" in found


def test_flash_attention_that_is_not_there(small: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    found = problems_of(small(tmp_path / "run", foundation={"attention": "flash_attention_2"}))
    assert "foundation.attention flash_attention_2" in found and "a CUDA GPU" in found
    assert "sdpa" in found


def test_adapters_in_half_precision_need_whole_weights(small: Any, tmp_path: Path) -> None:
    root = Path(__file__).parents[2] / "configs/accelerate"
    half = {"lora": LoraSettings(dtype="base")}
    sharded = small(
        tmp_path / "run", training=half, runtime={"accelerate_config": root / "cpu_2_fsdp2.yaml"}
    )
    assert "training.lora.dtype base" in problems_of(sharded)
    assert not problems_of(
        small(tmp_path / "run", training=half, runtime={"accelerate_config": root / "cpu_2.yaml"})
    )


@pytest.mark.parametrize(
    ("name", "content", "refused"),
    [
        ("deepspeed", '{"zero_optimization": {"stage": 3}}', True),
        ("deepspeed", '{"zero_optimization": {"stage": 2}}', False),
        ("accelerate_config", "distributed_type: FSDP", True),
        ("accelerate_config", f"{DEEPSPEED}{{zero_stage: 3}}", True),
        ("accelerate_config", f"{DEEPSPEED}{{deepspeed_config_file: {ZERO3}}}", True),
        ("accelerate_config", f"{DEEPSPEED}3", False),
        ("accelerate_config", "deepspeed_config: {zero_stage: 3}", False),
        ("accelerate_config", "distributed_type: MULTI_CPU", False),
    ],
)
def test_what_sharded_weights_do_not_allow_is_named(
    name: str, content: str, refused: bool, small: Any, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text(content)
    config = small(
        tmp_path / "run",
        model=Qwen2VLSettings(compile=True, quantization="nf4"),
        runtime={name: tmp_path / "file"},
    )
    found = problems_of(config)
    for name in ("model.compile", "model.quantization"):
        assert (f"{name} is not available where weights are sharded" in found) == refused


@pytest.mark.parametrize("how", ["deepspeed", "accelerate_config"])
def test_what_deepspeed_does_not_do_is_named(how: str, small: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}" if how == "deepspeed" else "distributed_type: DEEPSPEED")
    settings = {
        "training": {"grad_cache_chunk_size": 4, "max_skipped_batches": 1},
        "runtime": {how: tmp_path / "file"},
    }
    found = problems_of(small(tmp_path / "run", **settings))
    for name in ("grad_cache_chunk_size", "max_skipped_batches"):
        assert f"training.{name} is not available under DeepSpeed; set it to 0" in found


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{}", "zero_optimization.stage is None; set it to 2 or 3"),
        ('{"zero_optimization": {"stage": 0}}', "zero_optimization.stage is 0"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}', "to cpu"),
        ("{", "is not JSON"),
        ('{"zero_optimization": {"stage": 2}}', ""),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}', ""),
    ],
)
def test_a_deepspeed_file_without_step_checkpoints_is_refused(
    content: str, says: str, small: Any, tmp_path: Path
) -> None:
    file = tmp_path / "zero.json"
    file.write_text(content)
    found = problems_of(small(tmp_path / "run", runtime={"deepspeed": file}))
    assert says in found and (f"--deepspeed {file}" in found) == bool(says)


def test_a_disk_that_does_not_suffice_is_refused(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", runtime={"cache_dir": tmp_path / "cache"})
    assert preflight.check(config)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(10**6, 0, 10**6)
    )
    with pytest.raises(ValidationFailed, match="vision features of") as error:
        preflight.check(config)
    assert "1e-03 GB" in str(error.value) or "0.001 GB" in str(error.value)
    assert "runtime.cache_dir" in str(error.value) and "max_pixels" in str(error.value)


def test_features_that_are_there_need_no_room(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path / "run", runtime={"cache_dir": tmp_path / "cache"})
    needed = model_checks.disk_bytes(config, preflight.check(config))
    file = tmp_path / "cache" / "vision" / "a" / "b.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x" * needed["vision"])
    free = needed["run"] + 1
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(free, 0, free)
    )
    assert preflight.check(config)


def test_the_tokens_of_a_image_are_those_of_the_model(small: Any, tmp_path: Path) -> None:
    config = small(tmp_path / "run")
    split = config.data.build(None).train
    backbone = config.model.build()
    ids = split.gallery.ids[:4]
    made = backbone.encode_images([split.images.load(image) for image in ids])
    shapes = [(p.height, p.width) for p in (split.images.load(image) for image in ids)]
    assert model_checks._tokens(config.model, shapes) == [len(each.tokens) for each in made]


def test_a_long_narrow_image_has_the_tokens_that_its_tower_makes() -> None:
    from PIL import Image

    settings = Qwen2VLSettings(dtype="float32", max_pixels=12544)
    with torch.no_grad():
        (visual,) = settings.build().encode_images([Image.new("RGB", (1990, 10))])
    assert model_checks._tokens(settings, [(10, 1990)]) == [len(visual.tokens)]


def test_deepspeed_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(deepspeed=recipes.CONFIGS / "deepspeed" / "zero2.json")
    monkeypatch.setattr(sharding_checks, "find_spec", lambda name: None)
    assert "pip install 'cirloop[train]'" in problems_of(RunConfig(runtime=runtime))
