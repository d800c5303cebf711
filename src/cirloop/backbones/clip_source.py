"""CLIP checkpoints: an architecture of open_clip's, or one in a JSON file, and its weights.

The towers are CLIP's own, timm's for images and those of transformers for texts. No pickle is read.
open_clip's own loader would fetch a pickle where a repository has no safetensors, resize position
embeddings that do not fit, and only warn where weights were trained with another GELU. Here the
first two are errors, and the weights' own config says which GELU.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path

import open_clip
import timm
import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from cirloop.artifacts.store import file_digest, fingerprint
from cirloop.backbones import clip_text
from cirloop.backbones.clip_module import Clip
from cirloop.backbones.clip_text import Config
from cirloop.backbones.weights import differing, download
from cirloop.io import parse
from cirloop.types import UserError

RANDOM = "random"
HUB = "hf-hub:"
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
_TIMM_PROJECTIONS = ("linear", "mlp", "none", "")
_HUB_FILES = [HF_SAFE_WEIGHTS_NAME, "*.json", "*vocab.txt", "*.model"]
"""Weights, configs, and tokenizers' files."""
_digest = cache(file_digest)


@dataclass(frozen=True, slots=True)
class ClipCheckpoint:
    """A CLIP: open_clip's model config, its preprocessing, and the files of config and weights.

    Without a file of weights, they are drawn. Directories of a text tower and of a tokenizer lie
    beside `config`.
    """

    name: str
    model: Config
    preprocess: PreprocessCfg
    config: Path
    weights: Path | None

    def digest(self, seed: int) -> str:
        """Return the digest of all that decides features; `seed` is that of drawn weights."""
        drawn = ["drawn", seed] if self.weights is None else _digest(self.weights)
        parts = [self.model, asdict(self.preprocess), drawn]
        if clip_text.has_text_files(self.model["text_cfg"]):
            parts.append(clip_text.digest_text_files(self.text))
        return fingerprint(parts)

    @property
    def text(self) -> Config:
        """Open_clip's text config, with paths of directories in place of names."""
        return clip_text.resolve_text(self.model["text_cfg"], self.config.parent)

    def build(self, seed: int) -> Clip:
        """Build the model in float32 on the CPU, frozen and in evaluation mode.

        Raises UserError where the weights do not fit.
        """
        vision = {**self.model["vision_cfg"], "timm_model_pretrained": False}
        model = {**self.model, "vision_cfg": vision, "text_cfg": self.text}
        is_custom = model.pop("custom_text", False) or clip_text.TOWER in model["text_cfg"]
        kind = open_clip.CustomTextCLIP if is_custom else open_clip.CLIP
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            clip = kind(**model).float()  # a text tower's config.json may have another dtype
        if self.weights is not None:
            clip.load_state_dict(_load_matching(self.name, self.weights, clip.state_dict()))
        # Losses have their own temperature, so these are not trained.
        for name in ("logit_scale", "logit_bias"):
            value = getattr(clip, name)
            if value is not None:
                delattr(clip, name)
                clip.register_buffer(name, value.detach())
        return clip.requires_grad_(False).eval()


def find_checkpoint(name: str, path: str) -> ClipCheckpoint:
    """Find the CLIP `name` (open_clip's, or a JSON file) with the weights `path`.

    Downloads what a tag or `hf-hub:` names. Raises UserError for an unknown architecture or tag, a
    missing or damaged file, a pickle, and where the network is needed and missing.
    """
    checkpoint = _find_checkpoint(name, path)
    width = checkpoint.model["embed_dim"]
    clip_text.require_text_files(str(checkpoint.config), checkpoint.text, width)
    return checkpoint


def _find_checkpoint(name: str, path: str) -> ClipCheckpoint:
    model, preprocess, config = _architecture(name)
    if path == RANDOM:
        return ClipCheckpoint(name, model, preprocess, config, None)
    if path.startswith(HUB) or parse.expand_user(path).is_dir():
        is_hub_name = path.startswith(HUB)
        directory = _download(path.removeprefix(HUB)) if is_hub_name else parse.expand_user(path)
        config = directory / HF_CONFIG_NAME
        model, preprocess = _require_same_architecture(name, model, config)
        weights = _require_safetensors(directory / HF_SAFE_WEIGHTS_NAME)
    elif tag := open_clip.get_pretrained_cfg(name, path):
        repository, _, file = tag.get("hf_hub", "").rpartition("/")
        if not repository or file:  # a file named there is a pickle
            raise UserError(
                f"model.path {path!r}: open_clip has these weights of {name} as a pickle only,"
                f" which is not read. {_convert(name)}"
            )
        model["quick_gelu"] = bool(tag.get("quick_gelu", False))
        preprocess = PreprocessCfg(**merge_preprocess_dict(preprocess, tag))
        directory = _download(repository)
        config = directory / HF_CONFIG_NAME  # beside its tokenizer, where that is not CLIP's own
        weights = _require_safetensors(directory / HF_SAFE_WEIGHTS_NAME)
    else:
        weights = _weights_file(name, path)
    return ClipCheckpoint(name, model, preprocess, config, weights)


def _weights_file(name: str, path: str) -> Path:
    """Return the file of weights. Raises UserError where it does not exist or cannot be read."""
    file = parse.expand_user(path)
    if not file.exists():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"model.path {path!r} does not exist. Give a .safetensors file, a directory with"
            f" {HF_CONFIG_NAME} and {HF_SAFE_WEIGHTS_NAME}, `{HUB}NAME` of such a repository,"
            f" `{RANDOM}`, or a tag of {name}'s published weights: {tags}."
            " scripts/convert_towers.py makes a directory of two small towers (docs/tutorial.md)."
        )
    return _require_safetensors(file, name)


def _architecture(name: str) -> tuple[Config, PreprocessCfg, Path]:
    """Return the model config and preprocessing of an architecture, and the file of its config."""
    if name.endswith(".json"):
        file = parse.expand_user(name)
        return *_read_config(file), file
    model = open_clip.get_model_config(name) if ":" not in name else None
    if model is None:
        by_lower_case = {
            architecture.lower(): architecture for architecture in open_clip.list_models()
        }
        matches = get_close_matches(name.lower(), by_lower_case, 3, cutoff=0.5)
        near = [by_lower_case[match] for match in matches] or ["RN50x4", "ViT-B-32"]
        raise UserError(
            f"model.clip {name!r} is no architecture of open_clip's. Near: {', '.join(near)}. Or"
            " give the path of an open_clip model config, ending in .json."
        )
    config = Path(open_clip.__file__).parent / "model_configs" / f"{name}.json"
    return *_require_clip_config(model, name), config


def _read_config(file: Path) -> tuple[Config, PreprocessCfg]:
    """Read a model config, alone or with a `preprocess_cfg` in a hub's `open_clip_config.json`."""
    try:
        content = parse.parse_json(parse.read_text(file))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as an open_clip model config ({error}).") from None
    model, preprocess = _require_clip_config(content.get("model_cfg", content), str(file))
    merged = merge_preprocess_dict(preprocess, content.get("preprocess_cfg", {}))
    return model, PreprocessCfg(**merged)


def _require_clip_config(model: Config, name: str) -> tuple[Config, PreprocessCfg]:
    lacks = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model]
    if lacks:
        raise UserError(f"{name} is no open_clip model config: no {', '.join(lacks)}.")
    try:
        vision = open_clip.CLIPVisionCfg(**model["vision_cfg"])
        text = open_clip.CLIPTextCfg(**model["text_cfg"])
    except TypeError as error:
        raise UserError(f"{name} is no model config of this open_clip: {error}.") from None
    if "multimodal_cfg" in model:
        raise UserError(
            f"{name} has a decoder of texts, not CLIP's own two towers alone. Give a model without."
        )
    smallest = open_clip.SimpleTokenizer().vocab_size
    if not clip_text.has_text_files(model["text_cfg"]) and text.vocab_size < smallest:
        raise UserError(
            f"{name}: text_cfg.vocab_size {text.vocab_size}; CLIP's tokenizer needs {smallest}."
        )
    if vision.timm_model_name:
        _require_timm_tower(name, vision)
    return model, PreprocessCfg(size=vision.image_size)


def _require_timm_tower(name: str, vision: open_clip.CLIPVisionCfg) -> None:
    """Raise UserError for an image tower that timm does not have; no hub is asked for one."""
    if not timm.is_model(vision.timm_model_name):
        near = get_close_matches(vision.timm_model_name, timm.list_models(), 3, cutoff=0.5)
        raise UserError(
            f"{name}: vision_cfg.timm_model_name {vision.timm_model_name!r} is no model of timm's."
            f" Near: {', '.join(near) or 'none'}."
        )
    if vision.timm_proj not in _TIMM_PROJECTIONS:
        raise UserError(
            f"{name}: vision_cfg.timm_proj {vision.timm_proj!r} is none of {_TIMM_PROJECTIONS}."
        )


def _require_same_architecture(
    name: str, model: Config, file: Path
) -> tuple[Config, PreprocessCfg]:
    """Return the repository's own config, which says which GELU and which mean.

    Raises UserError where its towers are not those of `name`.
    """
    weights_model, preprocess = _read_config(file)
    expected = _tower_dims(model)
    dims = _tower_dims(weights_model)
    other = [
        f"{key} {value}, not {dims[key]}" for key, value in expected.items() if value != dims[key]
    ]
    if other:
        raise UserError(
            f"model.clip {name} is another architecture than the weights': {', '.join(other)}. Give"
            f" theirs, by open_clip's name or as {file}."
        )
    return weights_model, preprocess


def _tower_dims(model: Config) -> Config:
    """Return what tells architectures apart, with open_clip's defaults."""
    vision = open_clip.CLIPVisionCfg(**model["vision_cfg"])
    text = open_clip.CLIPTextCfg(**model["text_cfg"])
    vision_keys = ("timm_model_name", "layers", "width", "head_width", "image_size")
    text_keys = ("layers", "width", "heads", "context_length", clip_text.TOWER)
    dims: Config = {"embed_dim": model["embed_dim"]}
    dims |= {f"vision_cfg.{key}": getattr(vision, key) for key in vision_keys}
    dims |= {f"text_cfg.{key}": getattr(text, key) for key in text_keys}
    return dims


def _require_safetensors(file: Path, name: str = "") -> Path:
    """Return `file`. Raises UserError where it is a pickle, or no safetensors file."""
    if file.suffix in _PICKLES:
        raise UserError(f"model.path {file} is a pickle, which is not read. {_convert(name)}")
    try:
        with safe_open(file, framework="pt"):
            return file
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"model.path {file} cannot be read as safetensors ({error}). Restore it or fetch it"
            " again."
        ) from None


def _convert(name: str) -> str:
    """Tell how to convert a pickle."""
    return (
        "Where you trust it, convert it once: safetensors.torch.save_file(open_clip.create_model("
        f"{name!r}, pretrained=FILE_OR_TAG).state_dict(), 'clip.safetensors'); then give that file."
    )


def _load_matching(
    name: str, file: Path, expected: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Load weights. Raises UserError where names or shapes are not the expected ones."""
    state = load_file(file)
    if other := differing(state, expected):
        raise UserError(
            f"model.path {file} holds weights of another architecture than {name}:"
            f" {len(other)} keys or shapes differ, {'; '.join(other[:3])}. Give the `clip` that"
            " they are of."
        )
    return state


def _download(name: str) -> Path:
    files = f"{HF_CONFIG_NAME} and {HF_SAFE_WEIGHTS_NAME} of {name}"
    return download(name, _HUB_FILES, f"or fetch {files} beforehand and give their directory")
