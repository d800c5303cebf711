"""Tokenizers of open_clip configs, and text towers of transformers, from a directory alone.

open_clip reads `text_cfg.hf_model_name` and `hf_tokenizer_name` as names on the hub. Here they are
directories beside the config, with the tower's config.json and the tokenizer's files; a tokenizer
may also lie beside the config itself, as open_clip's `local-dir:` has it. The hub is not asked, and
the tower's weights are those of the checkpoint.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeAlias

import open_clip
import torch
from open_clip.hf_configs import arch_dict
from open_clip.hf_model import _POOLERS as POOLERS
from open_clip.tokenizer import HFTokenizer
from transformers import AutoConfig

from cirloop.artifacts.store import file_digest
from cirloop.backbones.special_tokens import escape_special_tokens, special_tokens
from cirloop.types import UserError

Config: TypeAlias = dict[str, Any]
"""A config of open_clip: a model's, or a text tower's."""
Tokenizer: TypeAlias = Any
"""A tokenizer of open_clip, `SimpleTokenizer` or `HFTokenizer`, or of transformers."""
TOWER = "hf_model_name"
TOKENIZER = "hf_tokenizer_name"
PROJECTIONS = (None, "linear", "mlp")
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")
FILE_TYPES = {".json", ".txt", ".model"}
"""Files of tokenizers and configs; weights that lie beside them are not read."""
LAYOUT = (
    "Put the text tower's config.json and its tokenizer's files into a directory beside the model's"
    f" config, such as text/, and name it in text_cfg.{TOWER} and {TOKENIZER}; the weights are"
    " those of the model. Names on the hub are not followed."
)


def has_text_files(text: Config) -> bool:
    """Return whether a text config has a tower or a tokenizer that is not CLIP's own."""
    return bool(text.get(TOWER) or text.get(TOKENIZER))


def resolve_text(text: Config, directory: Path) -> Config:
    """Return a text config with the paths of directories in place of names, and nothing to fetch.

    `directory` is that of the model's config.
    """
    resolved = {**text, "hf_model_pretrained": False} if text.get(TOWER) else {**text}
    resolved |= {key: str(directory / text[key]) for key in (TOWER, TOKENIZER) if text.get(key)}
    if text.get(TOKENIZER) and not Path(resolved[TOKENIZER]).is_dir():
        resolved[TOKENIZER] = str(directory)
    return resolved


def digest_text_files(text: Config) -> dict[str, str]:
    """Return the digests of a resolved text config's files, by the role and name of each."""
    files = [
        (key, file)
        for key in (TOWER, TOKENIZER)
        for file in sorted(Path(text[key]).iterdir() if text.get(key) else ())
        if file.suffix in FILE_TYPES and not file.name.startswith("open_clip")
    ]
    return {f"{key} {file.name}": file_digest(file) for key, file in files}


def require_text_files(name: str, text: Config, embed_dim: int) -> None:
    """Raise UserError where a resolved text config's files do not give a tower with its tokenizer.

    `name` is the model's, for the message, and `embed_dim` the width of its embedding.
    """
    if text.get(TOWER) and not text.get(TOKENIZER):
        raise UserError(f"{name} has text_cfg.{TOWER} without {TOKENIZER}. {LAYOUT}")
    directory = Path(text.get(TOKENIZER) or ".")
    if text.get(TOKENIZER) and not any(
        True for pattern in TOKENIZER_FILES for _ in directory.glob(pattern)
    ):
        raise UserError(
            f"{name}: no tokenizer in {directory} ({', '.join(TOKENIZER_FILES)}). {LAYOUT}"
        )
    if text.get(TOWER):
        _require_tower(name, text, embed_dim)


def _require_tower(name: str, text: Config, embed_dim: int) -> None:
    """Raise UserError with all that is wrong with a text tower's config.json or its settings."""
    file = Path(text[TOWER]) / "config.json"
    if not file.is_file():
        raise UserError(f"{name}: there is no {file}. {LAYOUT}")
    try:
        tower: Any = AutoConfig.from_pretrained(file.parent, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{name}: {file} cannot be read ({error}). Restore it.") from None
    if tower.model_type not in arch_dict:
        raise UserError(
            f"{name}: {file} is of a {tower.model_type}; open_clip has text towers of"
            f" {', '.join(sorted(arch_dict))}."
        )
    names: dict[str, str] = arch_dict[tower.model_type]["config_names"]
    width = getattr(tower, names["width"])
    wrong = []
    projection = text.get("hf_proj_type", "mlp")
    if projection not in PROJECTIONS:
        wrong.append(f"hf_proj_type is {projection!r}; give null, linear or mlp")
    if projection is None and width != embed_dim:
        wrong.append(
            f"hf_proj_type null needs the tower's width {width} as embed_dim, which is {embed_dim}"
        )
    pooler = text.get("hf_pooler_type", "mean_pooler")
    if pooler is not None and pooler not in POOLERS:
        wrong.append(f"hf_pooler_type is {pooler!r}; give one of {', '.join(POOLERS)}")
    length = text.get("context_length", 77)
    positions = getattr(tower, "max_position_embeddings", length)
    if "roberta" in tower.model_type:  # positions begin behind that of padding
        positions -= tower.pad_token_id + 1
    if length > positions:
        wrong.append(f"context_length is {length}; the tower has {positions} positions")
    if wrong:
        raise UserError(f"{name}: text_cfg of the tower {file.parent}: {'; '.join(wrong)}.")


def build_tokenizer(text: Config) -> Tokenizer:
    """Return the tokenizer of a resolved text config; it reads special tokens in a text as words.

    Raises UserError where its files are damaged or are another tower's.
    """
    length = text.get("context_length", 77)
    options = text.get("tokenizer_kwargs") or {}
    if not text.get(TOKENIZER):
        tokenizer = open_clip.SimpleTokenizer(context_length=length, **options)
        clean = tokenizer.clean_fn
        tokenizer.clean_fn = lambda text: re.sub(
            "<(?=(start|end)_of_text>)", "< ", clean(text), flags=re.IGNORECASE
        )
        return tokenizer
    directory = text[TOKENIZER]
    try:
        tokenizer = HFTokenizer(
            directory,
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            trust_remote_code=False,
            local_files_only=True,
            **options,
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise UserError(f"the tokenizer in {directory} cannot be loaded: {error}") from None
    _require_same_vocabulary(text, tokenizer.tokenizer)
    names = special_tokens(tokenizer)
    clean_words = tokenizer.clean_fn
    tokenizer.clean_fn = lambda text: escape_special_tokens(clean_words(text), names)
    return tokenizer


def _require_same_vocabulary(text: Config, tokenizer: Tokenizer) -> None:
    """Raise UserError where a tokenizer is not that of the text tower."""
    padding = tokenizer.pad_token_id
    size = text.get("vocab_size", 49408)
    if text.get(TOWER):
        tower: Any = AutoConfig.from_pretrained(text[TOWER], trust_remote_code=False)
        padding = tower.pad_token_id
        size = tower.vocab_size
    if len(tokenizer) > size or tokenizer.pad_token_id is None or tokenizer.pad_token_id != padding:
        raise UserError(
            f"the tokenizer in {text[TOKENIZER]} has {len(tokenizer)} tokens and pads with"
            f" {tokenizer.pad_token_id}; its text tower has {size} and pads with {padding}. Give"
            " the tower's own tokenizer."
        )


def padding_id(tokenizer: Tokenizer) -> int:
    """Return the id that fills up a text to the context's length."""
    return int(tokenizer.tokenizer.pad_token_id) if isinstance(tokenizer, HFTokenizer) else 0


def count_tokens(tokenizer: Tokenizer, text: str) -> int:
    """Count the tokens of a text that is not cut, with those around it."""
    if isinstance(tokenizer, HFTokenizer):
        return len(tokenizer.tokenizer(tokenizer.clean_fn(text), truncation=False).input_ids)
    return len(tokenizer.encode(text)) + 2


def cut_padding(ids_BT: torch.Tensor, padding: int) -> torch.Tensor:
    """Return ids without the columns in which every text has padding.

    A text tower of transformers masks padding, so its features stay the same to rounding.
    """
    return ids_BT[:, (ids_BT != padding).any(dim=0)]
