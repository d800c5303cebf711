"""Which CLIP: an architecture of open_clip's, or one in a JSON, and where its weights are. Nothing
pickled is read.

open_clip's own loader would fetch a pickle where a repository has no safetensors, resize position
embeddings that do not fit, and only warn where weights were trained with another GELU; here each of
these is an error, or settled.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from cirloop.artifacts.store import file_digest, fingerprint
from cirloop.io import parse
from cirloop.types import UserError

RANDOM, HUB = "random", "hf-hub:"
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl"}
_digest = cache(file_digest)
Config = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Source:
    """A CLIP: open_clip's model config, its preprocessing, the file of the config and of the
    weights (None = drawn)."""

    name: str
    model: Config
    preprocess: PreprocessCfg
    config: Path
    weights: Path | None

    def digest(self, seed: int) -> str:
        """Of everything that decides what this CLIP gives; `seed` is that of drawn weights."""
        drawn = ["drawn", seed] if self.weights is None else _digest(self.weights)
        return fingerprint([self.model, asdict(self.preprocess), drawn])

    def build(self, seed: int) -> Any:
        """The model in float32 on the CPU, frozen and in eval mode; raises UserError where the
        weights do not fit."""
        model = {
            **self.model,
            "vision_cfg": {**self.model["vision_cfg"], "timm_model_pretrained": False},
        }
        kind = open_clip.CustomTextCLIP if model.pop("custom_text", False) else open_clip.CLIP
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            clip = kind(**model)
        if self.weights is not None:
            clip.load_state_dict(_fitting(self.name, self.weights, clip.state_dict()))
        for name in (
            "logit_scale",
            "logit_bias",
        ):  # our losses have their own temperature: nothing to train here
            value = getattr(clip, name)
            if value is not None:
                delattr(clip, name)
                clip.register_buffer(name, value.detach())
        return clip.requires_grad_(False).eval()


def find_source(name: str, path: str) -> Source:
    """The CLIP `name` (open_clip's, or a JSON) with the weights `path`; downloads what a tag or
    `hf-hub:` names.

    Raises UserError: an architecture or a tag that is not there, a file that is none, a pickle, no
    network.
    """
    model, preprocess, config = _architecture(name)
    if path == RANDOM:
        return Source(name, model, preprocess, config, None)
    tag = open_clip.get_pretrained_cfg(name, path)
    if path.startswith(HUB) or parse.expand_user(path).is_dir():
        directory = (
            _download(path.removeprefix(HUB)) if path.startswith(HUB) else parse.expand_user(path)
        )
        model, preprocess = _same(name, model, directory / HF_CONFIG_NAME)
        return Source(name, model, preprocess, config, _checked(directory / HF_SAFE_WEIGHTS_NAME))
    if tag:
        repository, _, file = tag.get("hf_hub", "").rpartition("/")
        if not repository or file:  # a file named there is a pickle
            raise UserError(
                f"model.path {path!r}: open_clip has these weights of {name} as a pickle only,"
                f" which is not read. {_convert(name)}"
            )
        model["quick_gelu"] = bool(tag.get("quick_gelu", False))
        preprocess = PreprocessCfg(**merge_preprocess_dict(preprocess, tag))
        return Source(
            name, model, preprocess, config, _checked(_download(repository) / HF_SAFE_WEIGHTS_NAME)
        )
    file = parse.expand_user(path)
    if not file.exists():
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise UserError(
            f"model.path {path!r} does not exist. Give a .safetensors file, a directory with"
            f" {HF_CONFIG_NAME} and {HF_SAFE_WEIGHTS_NAME}, `{HUB}NAME` of such a repository,"
            f" `{RANDOM}`, or a tag of {name}'s published weights: {tags}."
        )
    return Source(name, model, preprocess, config, _checked(file, name))


def _architecture(name: str) -> tuple[Config, PreprocessCfg, Path]:
    if name.endswith(".json"):
        file = parse.expand_user(name)
        return *_read(file), file
    found = open_clip.get_model_config(name) if ":" not in name else None
    if found is None:
        lower = {each.lower(): each for each in open_clip.list_models()}
        near = [lower[each] for each in get_close_matches(name.lower(), lower, 3, cutoff=0.5)] or [
            "RN50x4",
            "ViT-B-32",
        ]
        raise UserError(
            f"model.clip {name!r} is no architecture of open_clip's. Near: {', '.join(near)}. Or"
            " give the path of an open_clip model config, ending in .json."
        )
    return (
        *_checked_model(found, name),
        Path(open_clip.__file__).parent / "model_configs" / f"{name}.json",
    )


def _read(file: Path) -> tuple[Config, PreprocessCfg]:
    """Of a model config, or of a hub repository's `open_clip_config.json`, which has one and a
    `preprocess_cfg`."""
    try:
        content = parse.parse_json(parse.read_text(file))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as an open_clip model config ({error}).") from None
    model, preprocess = _checked_model(content.get("model_cfg", content), str(file))
    return model, PreprocessCfg(
        **merge_preprocess_dict(preprocess, content.get("preprocess_cfg", {}))
    )


def _checked_model(model: Config, name: str) -> tuple[Config, PreprocessCfg]:
    lacks = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in model]
    if lacks:
        raise UserError(f"{name} is no open_clip model config: no {', '.join(lacks)}.")
    try:
        vision, text = (
            open_clip.CLIPVisionCfg(**model["vision_cfg"]),
            open_clip.CLIPTextCfg(**model["text_cfg"]),
        )
    except TypeError as error:
        raise UserError(f"{name} is no model config of this open_clip: {error}.") from None
    if "multimodal_cfg" in model or text.hf_model_name or text.hf_tokenizer_name:
        raise UserError(
            f"{name} has a text tower or a tokenizer that is not CLIP's own. Give a CLIP such as"
            " RN50x4 or ViT-L-14."
        )
    smallest = open_clip.SimpleTokenizer().vocab_size
    if text.vocab_size < smallest:
        raise UserError(
            f"{name}: text_cfg.vocab_size {text.vocab_size}; CLIP's tokenizer needs {smallest}."
        )
    return model, PreprocessCfg(size=vision.image_size)


def _same(name: str, model: Config, file: Path) -> tuple[Config, PreprocessCfg]:
    """The repository's own config, which says which GELU and which mean; its towers must be those
    of `name`."""
    theirs, preprocess = _read(file)
    asked, found = _towers(model), _towers(theirs)
    other = [f"{key} {asked[key]}, not {found[key]}" for key in asked if asked[key] != found[key]]
    if other:
        raise UserError(
            f"model.clip {name} is another architecture than the weights': {', '.join(other)}. Give"
            f" theirs, by open_clip's name or as {file}."
        )
    return theirs, preprocess


def _towers(model: Config) -> Config:
    """What tells architectures apart, with open_clip's defaults."""
    vision, text = (
        open_clip.CLIPVisionCfg(**model["vision_cfg"]),
        open_clip.CLIPTextCfg(**model["text_cfg"]),
    )
    return {"embed_dim": model["embed_dim"]} | {
        f"{tower}.{key}": getattr(config, key)
        for tower, config, keys in (
            (
                "vision_cfg",
                vision,
                ("timm_model_name", "layers", "width", "head_width", "image_size"),
            ),
            ("text_cfg", text, ("layers", "width", "heads", "context_length")),
        )
        for key in keys
    }


def _checked(file: Path, name: str = "") -> Path:
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
    return (
        "Where you trust it, convert it once: safetensors.torch.save_file(open_clip.create_model("
        f"{name!r}, pretrained=FILE_OR_TAG).state_dict(), 'clip.safetensors'); then give that file."
    )


def _fitting(name: str, file: Path, expected: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    state = load_file(file)
    odd = sorted(state.keys() ^ expected.keys())
    odd += [
        f"{k} {list(state[k].shape)}, not {list(v.shape)}"
        for k, v in expected.items()
        if k in state and state[k].shape != v.shape
    ]
    if odd:
        raise UserError(
            f"model.path {file} holds weights of another architecture than {name}: {len(odd)} keys"
            f" or shapes differ, {'; '.join(odd[:3])}. Give the `clip` that they are of."
        )
    return state


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"model.path: the weights {name!r} are neither here nor to be had from the hub"
            f" ({type(error).__name__}). Check the name and the network, or fetch {HF_CONFIG_NAME}"
            f" and {HF_SAFE_WEIGHTS_NAME} of {name} beforehand and give their directory."
        ) from None
