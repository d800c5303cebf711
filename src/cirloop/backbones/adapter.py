"""Trainable weights of an embedder: LoRA or DoRA by PEFT, or named parameters in full.

Weights are saved and loaded here, and both are checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

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
from cirloop.backbones.base import TuningSettings
from cirloop.backbones.weights import (
    LORA_CONFIG,
    LORA_WEIGHTS,
    PARTS_CONFIG,
    PARTS_WEIGHTS,
    differing,
)
from cirloop.types import UserError

PREFIX = "base_model.model."
LORA_TARGETS = "training.lora.target_modules do"
"""Subject and verb of the message about a LoRA that does not fit."""


def _read_lora_config(directory: Path) -> LoraConfig:
    """Read PEFT's settings of a saved LoRA.

    Raises UserError for a damaged file, another type of adapter, or one that names code to import.
    """
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


def any_of(patterns: Sequence[str]) -> re.Pattern[str]:
    """Compile a pattern that matches where one of `patterns` does."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns))


class TrainableWeights:
    """Base class of embedders: how weights are trained, saved and loaded.

    The embedder sets `root_module` (the module that holds the weights; names of PEFT and of
    trainable patterns start there), `base_path`, and before `load_adapter` everything that
    `probe_output` needs. Its base weights are frozen.
    """

    root_module: nn.Module
    base_path: str
    lora_modules = r".*\.({targets})"
    """Pattern of the whole names of modules that get a LoRA; `{targets}` are the settings'."""
    default_trainable_patterns: tuple[str, ...] = ()
    """Patterns that full finetuning trains unless the settings have some: a parameter is trained
    where its name starts with one."""
    default_finetuning = "lora"
    lora: LoraConfig | None = None
    trainable_patterns: tuple[str, ...] = ()
    """Patterns of the parameters that are trained in full; empty for a LoRA."""
    adapter_digest = ""

    def probe_output(self) -> torch.Tensor:
        """Return an output that every adapter must change."""
        raise NotImplementedError

    def vision_is_frozen(self) -> bool:
        """Return whether the output of `encode_images` stays the same in training."""
        raise NotImplementedError

    def make_trainable(self, tuning: TuningSettings, seed: int) -> None:
        """Put a new LoRA on the model, or free parameters; train on what is loaded already."""
        finetuning = tuning.finetuning or self.default_finetuning
        loaded = self._loaded_finetuning() or finetuning
        if loaded != finetuning:
            raise UserError(
                f"training.finetuning {finetuning!r}, but the checkpoint to go on from was made"
                f" with {loaded!r}."
            )
        if finetuning == "full":
            self._free_parameters(tuning)
        else:
            self._free_lora(tuning, seed, use_dora=finetuning == "dora")
        assert self.vision_is_frozen() and self.trainable()

    def _loaded_finetuning(self) -> str | None:
        """Return how the loaded weights were trained; None where there are none."""
        if self.lora is not None:
            return "dora" if self.lora.use_dora else "lora"
        return "full" if self.trainable_patterns else None

    def _free_parameters(self, tuning: TuningSettings) -> None:
        """Train parameters in full, in float32."""
        self.trainable_patterns = (
            tuning.trainable_patterns or self.trainable_patterns or self.default_trainable_patterns
        )
        self._check_patterns(self.trainable_patterns)
        pattern = any_of(self.trainable_patterns)
        for name, parameter in self.root_module.named_parameters():
            parameter.requires_grad_(pattern.match(name) is not None)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()

    def _free_lora(self, tuning: TuningSettings, seed: int, *, use_dora: bool) -> None:
        """Train the LoRA; draw a new one where none is loaded."""
        if self.lora is None:
            torch.manual_seed(seed)
            targets = "|".join(tuning.lora.target_modules)
            self.lora = LoraConfig(
                r=tuning.lora.r,
                lora_alpha=tuning.lora.alpha,
                lora_dropout=tuning.lora.dropout,
                use_dora=use_dora,
                target_modules=self.lora_modules.replace("{targets}", targets),
                base_model_name_or_path=self.base_path,
            )
            self._inject(self.lora)
        for name, parameter in self.root_module.named_parameters():
            parameter.requires_grad_("lora_" in name)

    def _check_patterns(self, patterns: tuple[str, ...]) -> None:
        """Raise UserError where there is no pattern, or one matches no parameter."""
        if not patterns:
            raise UserError(
                "training.finetuning full: say which parts with training.trainable_patterns; this"
                " model has no default."
            )
        names = [name for name, _ in self.root_module.named_parameters()]
        unmatched = [p for p in patterns if not any(re.match(p, name) for name in names)]
        if unmatched:
            prefixes = sorted({".".join(name.split(".")[:2]) for name in names})
            raise UserError(
                f"training.trainable_patterns: {', '.join(unmatched)} match no weight; there are"
                f" {', '.join(prefixes)}."
            )

    def _inject(self, lora: LoraConfig, subject: str = LORA_TARGETS) -> None:
        """Put LoRA modules on the model, in float32 whatever the base's dtype.

        `subject` begins the message of the UserError where they do not fit.
        """
        try:
            inject_adapter_in_model(lora, self.root_module)
        except (ValueError, TypeError, re.error) as error:
            raise UserError(
                f"{subject} not fit the modules of {self.base_path!r}: {error}"
            ) from None
        for name, parameter in self.root_module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def trainable(self) -> dict[str, nn.Parameter]:
        """Return the weights that are trained, by name."""
        return {name: p for name, p in self.root_module.named_parameters() if p.requires_grad}

    def adapter_state(self) -> dict[str, torch.Tensor]:
        """Return the trained weights: a LoRA's by the names `PeftModel.from_pretrained` expects."""
        if self.trainable_patterns:
            pattern = any_of(self.trainable_patterns)
            return {
                name: parameter.detach().cpu().contiguous().clone()
                for name, parameter in self.root_module.named_parameters()
                if pattern.match(name)
            }
        state = get_peft_model_state_dict(self.root_module, save_embedding_layers=False)
        return {PREFIX + name: value.detach().cpu().contiguous() for name, value in state.items()}

    def save_adapter(self, directory: Path) -> None:
        """Write the trained weights, a LoRA as PEFT does, and check the written file."""
        directory.mkdir(parents=True, exist_ok=True)
        state = self.adapter_state()
        weights = directory / (PARTS_WEIGHTS if self.trainable_patterns else LORA_WEIGHTS)
        empty = [name for name, value in state.items() if value.numel() == 0]
        assert state and not empty, f"empty adapter tensors: {empty[:3]}"
        save_tensors(weights, state)
        if self.trainable_patterns:
            content = {"schema": 1, "base": self.base_path, "parts": self.trainable_patterns}
            write_json(directory / PARTS_CONFIG, content)
        else:
            assert self.lora is not None
            self.lora.inference_mode = True
            with with_filename(directory):
                self.lora.save_pretrained(str(directory))
        written = load_file(weights)
        assert written.keys() == state.keys()
        assert all(torch.equal(written[name], value) for name, value in state.items())

    def load_adapter(self, directory: Path) -> None:
        """Load what `save_adapter` wrote, or any LoRA of PEFT's.

        Raises UserError, with the keys, where it does not fit.
        """
        before = self._probe()
        if (directory / PARTS_CONFIG).is_file():
            weights = directory / PARTS_WEIGHTS
            state = self._load_parameters(directory)
        else:
            weights = directory / LORA_WEIGHTS
            state = self._load_lora(directory)
        loaded = self.adapter_state()
        assert all(torch.equal(loaded[k], state[k].to(loaded[k].dtype)) for k in state), (
            "adapter did not load"
        )
        self.root_module.requires_grad_(False)
        self.adapter_digest = file_digest(weights)
        assert not torch.equal(self._probe(), before), "the adapter loaded but changes no output"

    def _load_parameters(self, directory: Path) -> dict[str, torch.Tensor]:
        self.trainable_patterns = tuple(schema.read(directory / PARTS_CONFIG)["parts"])
        state = self._read_state(directory / PARTS_WEIGHTS, self.adapter_state())
        for name, parameter in self.root_module.named_parameters():
            if name in state:
                parameter.data = state[name].to(parameter.device)
        return state

    def _load_lora(self, directory: Path) -> dict[str, torch.Tensor]:
        lora = _read_lora_config(directory)
        self._inject(lora, f"adapter {directory}: its {LORA_CONFIG} does")
        self.root_module.eval()  # a new LoRA has dropout
        self.lora = lora
        state = self._read_state(directory / LORA_WEIGHTS, self.adapter_state())
        peft_state = {name.removeprefix(PREFIX): value for name, value in state.items()}
        set_peft_model_state_dict(self.root_module, peft_state)
        if not any(value.any() for name, value in state.items() if "lora_B" in name):
            raise UserError(f"adapter {directory} changes nothing: every lora_B is zero.")
        return state

    def _read_state(
        self, weights: Path, expected: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Read saved weights. Raises UserError where names or shapes are not the expected ones."""
        try:
            state = {self.map_legacy_key(name): value for name, value in load_file(weights).items()}
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"adapter {weights} cannot be read ({error}). Restore it, or train it again."
            ) from None
        if other := differing(state, expected):
            raise UserError(
                f"adapter {weights.parent} does not fit the model {self.base_path!r}:"
                f" {len(other)} keys or shapes differ, {'; '.join(other[:3])}"
            )
        return state

    def map_legacy_key(self, name: str) -> str:
        """Return the name here of a saved weight; published adapters may have another."""
        return name

    def _probe(self) -> torch.Tensor:
        with torch.no_grad():
            return self.probe_output()

    def set_adapter_enabled(self, enabled: bool) -> None:
        """Switch a LoRA on or off; off, the model is its base."""
        for layer in self.root_module.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(enabled)
        self.root_module.requires_grad_(False)
