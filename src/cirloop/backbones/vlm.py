"""The embedder that all families of vision-language models share (VLM2Vec, arXiv 2410.05160).

Embedding = hidden state of the last token, L2-normalised, without `lm_head`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from peft import LoraConfig

from cirloop.artifacts.store import fingerprint
from cirloop.backbones.adapter import LORA_TARGETS, PREFIX, TrainableWeights
from cirloop.backbones.base import EmbedInput, Grid, ImageFeatures, Inputs, TuningSettings
from cirloop.backbones.numerics_check import (
    check_embeddings,
    check_gradient,
    compile_layers,
    eager_mode,
)
from cirloop.backbones.packing import check_packing, install_packed_sdpa
from cirloop.backbones.prompts import IMAGE, PROMPT, filled, fitting
from cirloop.backbones.vision import VISION_PREFIXES, VisionBase, load_vlm
from cirloop.backbones.vlm_module import VlmModule
from cirloop.backbones.weights import resolve_adapter
from cirloop.types import ImageId, UserError

if TYPE_CHECKING:
    from cirloop.backbones.model_settings import VlmSettings

logger = logging.getLogger(__name__)
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>")
"""Pattern of strings that look like a special token of Qwen's."""
LEGACY_PREFIXES = {
    "model.layers.": "model.language_model.layers.",
    "language_model.model.": "model.language_model.",
}
"""Prefixes of the language model's weights in adapters published for Qwen and LLaVA before
transformers 4.52, and the prefixes since."""


class VlmEmbedder(VisionBase, TrainableWeights):
    """An embedder of any family; a subclass adds what its family does differently."""

    image_placeholder: ClassVar[str]
    """What `{image}` in a prompt format becomes: the placeholder with the tokens that the family
    puts around it."""
    lora_modules = r".*language_model\..*\.({targets})"
    default_trainable_patterns = ("model.language_model",)

    def __init__(self, settings: VlmSettings, adapter: Path | None = None) -> None:
        self.settings = settings
        self.format = settings.load_prompt_format()
        directory = settings.resolve_dir()
        if settings.packed:
            check_packing(str(directory))
        self.vlm, self.processor, self.base_digest = load_vlm(
            settings.path, directory, settings.dtype, settings.attention, settings.quantization
        )
        self._check_format()
        self.root_module = self.vlm
        self.base_path = settings.path
        self.module = VlmModule(self.vlm, self.language_model_inputs)
        if adapter is None and settings.start_adapter is not None:
            self._load_start_adapter(resolve_adapter(settings.start_adapter))
        elif adapter is not None:
            self.load_adapter(adapter)
        if settings.packed:
            install_packed_sdpa(self.vlm.model.language_model)
            self.module.packed = True
        if settings.compile:
            self.module.skips_unread = False
            compile_layers(self.vlm.model.language_model)
        check_embeddings(self)

    def _load_start_adapter(self, adapter: Path) -> None:
        self.load_adapter(adapter)
        assert self.lora is not None
        base = self.lora.base_model_name_or_path
        path = self.settings.path
        # The same shape does not make it the same base.
        if base and Path(base).name != Path(path).name:
            logger.warning(
                "the adapter %s was trained on %s, and starts on %s here", adapter, base, path
            )

    @property
    def fingerprint(self) -> str:
        # Digests stand for files.
        excluded = {"path", "start_adapter", "prompt_format", "gradient_checkpointing"}
        settings = self.settings.model_dump(mode="json", exclude=excluded)
        return fingerprint([self.base_digest, self.adapter_digest, self.format.digest, settings])

    def _check_format(self) -> None:
        """Raise UserError where this model cannot read the prompt format."""
        name = self.settings.prompt_format
        path = self.settings.path
        formats = ", ".join(fitting(self.settings.type))
        way_out = f"Give another: {formats}, or a .yaml file."
        if self.format.chat_template and not self.processor.chat_template:
            raise UserError(f"model.prompt_format {name}: {path!r} has no chat template. {way_out}")
        prompts = [self.text(EmbedInput(ImageId(""), text)) for text in (None, "")]
        look_special = {token for prompt in prompts for token in SPECIAL.findall(prompt)}
        unknown = sorted(look_special - {*self.special_tokens})
        if unknown:
            raise UserError(
                f"model.prompt_format {name}: {', '.join(unknown)} are no special tokens of"
                f" {path!r}. {way_out}"
            )
        if any(prompt.count(self.processor.image_token) != 1 for prompt in prompts):
            raise UserError(
                f"model.prompt_format {name}: a query and a document must hold one image, {IMAGE}"
                f" or {self.processor.image_token}. {way_out}"
            )

    def inputs(self, items: Sequence[EmbedInput], vision: Sequence[ImageFeatures]) -> Inputs:
        """Return the module's inputs for items; `vision` are their images' features, in order."""
        return self.collate([self.text(item) for item in items], vision, side="right")

    def num_image_tokens(self, grid: Grid) -> int:
        """Count the vision tokens of an image."""
        raise NotImplementedError

    def sequence_length(self, item: EmbedInput, grid: Grid) -> int:
        """Count the tokens of an item."""
        return self._num_tokens(self.text(item)) - 1 + self.num_image_tokens(grid)

    @cached_property
    def _num_tokens(self) -> Callable[[str], int]:
        """Counts the tokens of a text, with one placeholder for its image."""
        return lru_cache(4096)(lambda text: len(self.tokenize([text], "right")["input_ids"][0]))

    @cached_property
    def _special_token_pattern(self) -> str:
        return "|".join(map(re.escape, self.special_tokens))

    def text(self, item: EmbedInput) -> str:
        """Return what the model reads, by the prompt format; an item's values are escaped."""
        frame = self._document if item.text is None else self._query
        if not self.format.chat_template:
            framed = frame.replace(IMAGE, self.image_placeholder)
            pieces = re.split(f"({self._special_token_pattern})", framed)
            return "".join(
                piece if i % 2 else self._filled(piece, item) for i, piece in enumerate(pieces)
            )
        before, after = (self._filled(piece, item) for piece in frame.split(IMAGE))
        content = [
            {"type": "text", "text": before},
            {"type": "image"},
            {"type": "text", "text": after},
        ]
        turn = {"role": "user", "content": [part for part in content if part.get("text") != ""]}
        text: str = self.processor.apply_chat_template(
            [turn], add_generation_prompt=True, tokenize=False
        )
        return text

    def _filled(self, piece: str, item: EmbedInput) -> str:
        """Fill a piece between special tokens with the item's values.

        The piece is escaped as a whole: a value must not make a special token with the text beside
        it.
        """
        category = item.category or self.format.category
        return self.escape(filled(piece, item.text or "", category))

    @cached_property
    def _query(self) -> str:
        """The format's query with its instruction; an instruction of the settings is escaped."""
        own = self.settings.query_prompt
        instruction = self.format.query_prompt if own is None else self.escape(own)
        return self.format.query.replace(PROMPT, instruction)

    @cached_property
    def _document(self) -> str:
        own = self.settings.document_prompt
        instruction = self.format.document_prompt if own is None else self.escape(own)
        return self.format.document.replace(PROMPT, instruction)

    def vision_width(self) -> int:
        """Return how many numbers a vision token has."""
        return int(self.vlm.config.text_config.hidden_size)

    def text_inputs(self, texts: Sequence[str]) -> Inputs:
        """Return the inputs of texts alone, whose special tokens are words."""
        batch = self.processor.tokenizer(
            list(texts),
            padding=True,
            padding_side="right",
            return_tensors="pt",
            split_special_tokens=True,
        )
        no_images = {
            "vision_tokens": torch.zeros(0, self.vision_width()),
            "image_grid_thw": torch.zeros(0, 3, dtype=torch.long),
        }
        ids_and_mask = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return self.on_device(ids_and_mask | no_images)

    def make_trainable(self, tuning: TuningSettings, seed: int) -> None:
        """Make weights trainable, and check gradients with packing and compiling."""
        self.settings.check_training(tuning)
        if self.lora is not None:
            self._check_same_lora(self.lora, tuning)
        super().make_trainable(tuning, seed)
        self._set_autocast()
        if self.settings.gradient_checkpointing:
            # backward runs layers again, outside the module's forward
            self.module.skips_unread = False
            self.vlm.gradient_checkpointing_enable({"use_reentrant": False})
        check_gradient(self)

    def _check_same_lora(self, lora: LoraConfig, tuning: TuningSettings) -> None:
        """Raise UserError where the loaded LoRA is not what the settings ask for."""
        names = [
            name for name, _ in self.root_module.named_parameters() if "language_model." in name
        ]
        modules = {module for name in names for module in name.split(".")}
        adapted = {n.split(".lora_A.")[0].split(".")[-1] for n in names if ".lora_A." in n}
        expected = modules & {*tuning.lora.target_modules}
        pairs = {
            "r": (lora.r, tuning.lora.r),
            "alpha": (lora.lora_alpha, tuning.lora.alpha),
            "dropout": (lora.lora_dropout, tuning.lora.dropout),
            "target_modules": (", ".join(sorted(adapted)), ", ".join(sorted(expected))),
        }
        differ = [
            f"{name} {has}, not {setting}"
            for name, (has, setting) in pairs.items()
            if has != setting
        ]
        if differ:
            raise UserError(
                "the adapter to go on from does not have training.lora's settings:"
                f" {'; '.join(differ)}. Set training.lora to the adapter's, or start without it."
            )

    def _check_patterns(self, patterns: tuple[str, ...]) -> None:
        super()._check_patterns(patterns)
        names = [
            name
            for name, _ in self.root_module.named_parameters()
            if name.startswith(VISION_PREFIXES)
        ]
        reaching = [p for p in patterns if any(re.match(p, name) for name in names)]
        if reaching:
            raise UserError(
                f"training.trainable_patterns: {', '.join(reaching)} reach the vision tower, which"
                " stays frozen here: its output per image is kept. Name parts of"
                " model.language_model."
            )

    def map_legacy_key(self, name: str) -> str:
        """Return the name here of a weight saved before transformers 4.52."""
        for legacy, prefix in LEGACY_PREFIXES.items():
            if name.startswith(PREFIX + legacy):
                return PREFIX + prefix + name.removeprefix(PREFIX + legacy)
        return name

    def _inject(self, lora: LoraConfig, subject: str = LORA_TARGETS) -> None:
        super()._inject(lora, subject)
        names = [name for name, _ in self.root_module.named_parameters() if "lora_" in name]
        outside = [name for name in names if "language_model." not in name]
        if outside:
            raise UserError(
                f"LoRA outside the language model of {self.base_path!r}: {len(outside)} of"
                f" {len(names)} weights, the first {outside[0]}. The vision tower stays frozen"
                " here. Merge such an adapter into its base (PEFT's merge_and_unload) and give the"
                " merged model as model.path."
            )

    def probe_output(self) -> torch.Tensor:
        """Return the hidden states of a text."""
        ids = torch.tensor(
            [self.processor.tokenizer.encode("represent the given image")], device=self.device
        )
        self._set_autocast()
        with eager_mode():
            return self.module.hidden(input_ids=ids)

    def _set_autocast(self) -> None:
        """Use autocast where parameters trained in full are float32 and others are not."""
        base_dtypes = {
            parameter.dtype
            for name, parameter in self.vlm.model.language_model.named_parameters()
            if "lora_" not in name and parameter.is_floating_point()
        }
        mixed = len(base_dtypes) > 1
        self.module.autocast_dtype = next(iter(base_dtypes - {torch.float32})) if mixed else None
