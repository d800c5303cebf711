"""The trained part of an embedder: LoRA or DoRA by PEFT, or named parts in full. Saved and loaded,
and both proven."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cirloop.artifacts import schema
from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.fs import save_tensors, with_filename
from cirloop.artifacts.store import file_digest
from cirloop.backbones.base import Tuning
from cirloop.backbones.weights import LORA_CONFIG, LORA_WEIGHTS, PARTS_CONFIG, PARTS_WEIGHTS
from cirloop.types import UserError

PREFIX = "base_model.model."
TARGETS = "training.lora.target_modules do"
"""What did not fit, for messages."""


def _lora(directory: Path) -> LoraConfig:
    """PEFT's settings of a saved LoRA. Raises UserError for what is damaged, no LoRA, or names code
    to import."""
    try:
        lora = PeftConfig.from_pretrained(str(directory))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{directory / LORA_CONFIG} cannot be read: {error}. Restore it, or train it again."
        ) from None
    if not isinstance(lora, LoraConfig):
        raise UserError(
            f"adapter {directory} is of type {lora.peft_type}; only LoRA and DoRA are read."
        )
    if lora.megatron_config is not None:
        raise UserError(
            f"{directory / LORA_CONFIG} names a module for PEFT to import (megatron_core); not"
            " followed."
        )
    return lora


class Adapted:
    """What every embedder inherits: how its weights are trained, saved and loaded.

    The embedder sets `core` (the module that holds the weights; PEFT's and the parts' names start
    there), `base_path`, and before `load_adapter` everything that `probe` needs. Its base weights
    are frozen.
    """

    core: Any
    base_path: str
    lora_modules = r".*\.({targets})"
    """Which modules get a LoRA, as a pattern of their whole name; `{targets}` are the settings'."""
    parts: tuple[str, ...] = ()
    """What full tuning trains unless the settings name parts: patterns that a parameter's name
    starts with."""
    default_tune = "lora"
    lora: LoraConfig | None = None
    trained_parts: tuple[str, ...] = ()
    adapter_digest = ""

    def probe(self) -> torch.Tensor:
        """An output that every adapter must change."""
        raise NotImplementedError

    def vision_is_frozen(self) -> bool:
        """Whether what `encode_images` gives stays the same while training."""
        raise NotImplementedError

    def make_trainable(self, tuning: Tuning, seed: int) -> None:
        """Put a fresh LoRA on the model, or free the parts named; what is loaded already goes on
        being trained."""
        tune = tuning.finetuning or self.default_tune
        loaded = "full" if self.trained_parts else tune
        if self.lora is not None:
            loaded = "dora" if self.lora.use_dora else "lora"
        if loaded != tune:
            raise UserError(
                f"training.finetuning {tune!r}, but the checkpoint to go on from was made with"
                f" {loaded!r}."
            )
        if tune == "full":
            self.trained_parts = tuning.trainable_patterns or self.trained_parts or self.parts
            self._check_parts(self.trained_parts)
            freed = re.compile("|".join(f"(?:{part})" for part in self.trained_parts))
            for name, parameter in self.core.named_parameters():
                parameter.requires_grad_(freed.match(name) is not None)
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        else:
            if self.lora is None:
                torch.manual_seed(seed)
                self.lora = LoraConfig(
                    r=tuning.lora.r,
                    lora_alpha=tuning.lora.alpha,
                    lora_dropout=tuning.lora.dropout,
                    use_dora=tune == "dora",
                    target_modules=self.lora_modules.replace(
                        "{targets}", "|".join(tuning.lora.target_modules)
                    ),
                    base_model_name_or_path=self.base_path,
                )
                self._inject(self.lora)
            for name, parameter in self.core.named_parameters():
                parameter.requires_grad_("lora_" in name)
        assert self.vision_is_frozen() and self.trainable()

    def _check_parts(self, parts: tuple[str, ...]) -> None:
        if not parts:
            raise UserError(
                "training.finetuning full: say which parts with training.trainable_patterns; this"
                " model has no default."
            )
        names = [name for name, _ in self.core.named_parameters()]
        idle = [part for part in parts if not any(re.match(part, name) for name in names)]
        if idle:
            there = sorted({".".join(name.split(".")[:2]) for name in names})
            raise UserError(
                f"training.trainable_patterns: {', '.join(idle)} match no weight; there are"
                f" {', '.join(there)}."
            )

    def _inject(self, lora: LoraConfig, what: str = TARGETS) -> None:
        """LoRA modules in float32, whatever the base's dtype."""
        try:
            inject_adapter_in_model(lora, self.core)
        except (ValueError, TypeError, re.error) as error:
            raise UserError(f"{what} not fit the modules of {self.base_path!r}: {error}") from None
        for name, parameter in self.core.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.core.named_parameters() if p.requires_grad}

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """The trained weights: a LoRA's by PEFT's names, as `PeftModel.from_pretrained` expects
        them."""
        if self.trained_parts:
            freed = re.compile("|".join(f"(?:{part})" for part in self.trained_parts))
            named = {name: p for name, p in self.core.named_parameters() if freed.match(name)}
            return {name: p.detach().cpu().contiguous().clone() for name, p in named.items()}
        state = get_peft_model_state_dict(self.core, save_embedding_layers=False)
        return {PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()}

    def save_adapter(self, directory: Path) -> None:
        """Write the trained weights, a LoRA as PEFT does, and check that what was written is what
        is in memory."""
        directory.mkdir(parents=True, exist_ok=True)
        state, weights = (
            self.adapter_state(),
            directory / (PARTS_WEIGHTS if self.trained_parts else LORA_WEIGHTS),
        )
        empty = [k for k, v in state.items() if v.numel() == 0]
        assert state and not empty, f"empty adapter tensors: {empty[:3]}"
        save_tensors(weights, state)
        if self.trained_parts:
            write_json(
                directory / PARTS_CONFIG,
                {"schema": 1, "base": self.base_path, "parts": self.trained_parts},
            )
        else:
            assert self.lora is not None
            self.lora.inference_mode = True
            with with_filename(directory):
                self.lora.save_pretrained(str(directory))
        written = load_file(weights)
        assert written.keys() == state.keys() and all(
            torch.equal(written[k], state[k]) for k in state
        )

    def load_adapter(self, directory: Path) -> None:
        """Load what `save_adapter` wrote, or any LoRA of PEFT's. Raises UserError where it does not
        fit, key by key."""
        before = self._probed()
        if (directory / PARTS_CONFIG).is_file():
            weights = directory / PARTS_WEIGHTS
            self.trained_parts = tuple(schema.read(directory / PARTS_CONFIG)["parts"])
            state = self._read(weights, self.adapter_state())
            for name, parameter in self.core.named_parameters():
                if name in state:
                    parameter.data = state[name].to(parameter.device)
        else:
            weights = directory / LORA_WEIGHTS
            lora = _lora(directory)
            self._inject(lora, f"adapter {directory}: its {LORA_CONFIG} does")
            self.core.eval()  # a new LoRA drops out
            self.lora = lora
            state = self._read(weights, self.adapter_state())
            set_peft_model_state_dict(
                self.core, {name.removeprefix(PREFIX): value for name, value in state.items()}
            )
            if not any(v.any() for k, v in state.items() if "lora_B" in k):
                raise UserError(f"adapter {directory} changes nothing: every lora_B is zero.")
        loaded = self.adapter_state()
        assert all(torch.equal(loaded[k], state[k].to(loaded[k].dtype)) for k in state), (
            "adapter did not load"
        )
        self.core.requires_grad_(False)
        self.adapter_digest = file_digest(weights)
        assert not torch.equal(self._probed(), before), "the adapter loaded but changes no output"

    def _read(self, weights: Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        try:
            state = {self.map_legacy_key(name): value for name, value in load_file(weights).items()}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"adapter {weights} cannot be read ({error}). Restore it, or train it again."
            ) from None
        odd = sorted(state.keys() ^ expected.keys())
        if odd:
            raise UserError(
                f"adapter {weights.parent} does not fit the model {self.base_path!r}: {len(odd)}"
                f" keys differ, {odd[:3]}"
            )
        other = [
            f"{k} {list(state[k].shape)}, not {list(v.shape)}"
            for k, v in expected.items()
            if state[k].shape != v.shape
        ]
        if other:
            raise UserError(
                f"adapter {weights.parent} does not fit the model {self.base_path!r}: {len(other)}"
                f" shapes differ, {'; '.join(other[:3])}"
            )
        return state

    def map_legacy_key(self, name: str) -> str:
        """The name here of a saved weight; an adapter that others published may have another."""
        return name

    def _probed(self) -> torch.Tensor:
        with torch.no_grad():
            return self.probe()

    def switch_adapter(self, on: bool) -> None:
        """A LoRA on or off: off, the model is its base."""
        for layer in self.core.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(on)
        self.core.requires_grad_(False)
