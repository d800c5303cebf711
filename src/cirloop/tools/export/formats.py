"""The files of each format. PEFT, transformers and sentence-transformers write their own; what they
cannot know is written here."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.fs import translate_safetensors_error, with_filename
from cirloop.backbones.weights import LORA_CONFIG, LORA_WEIGHTS, PARTS_WEIGHTS
from cirloop.io import parse
from cirloop.tools.export.config import SENTENCE_TRANSFORMERS
from cirloop.tools.export.prompt_spec import PromptSpec
from cirloop.tools.export.source import ADAPTER, ExportSource

BASE = "base"
MODEL_SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".model"}
NOTICES = {"README.md", "LICENSE", "LICENSE.txt", "NOTICE"}
SHARD = "5GB"
TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"
_HIDDEN = {"method": "forward", "method_output_name": "last_hidden_state"}
TRANSFORMER_SETTINGS = {
    "transformer_task": "feature-extraction",
    "modality_config": {
        "text": _HIDDEN,
        "image": _HIDDEN,
        "message": {**_HIDDEN, "format": "structured"},
    },
    "module_output_name": "token_embeddings",
    "processing_kwargs": {"text": {"truncation": False, "padding_side": "right"}},
    "unpad_inputs": False,
}
"""`message` among the modalities sends every input through the chat template. Nothing is cut: the
run cuts nothing, and a cut image has fewer places than tokens."""


def write_files(source: ExportSource, prompt_spec: PromptSpec, directory: Path) -> None:
    """Write weights, configuration and processor, as the library of the format reads them."""
    if source.options.format == ADAPTER:
        write_adapter(source, directory)
    else:
        with translate_safetensors_error(directory):
            merged(source).save_pretrained(directory, max_shard_size=SHARD)
    prompt_spec.save(directory)
    if source.options.format == SENTENCE_TRANSFORMERS:
        write_modules(source, prompt_spec, directory)


def write_adapter(source: ExportSource, directory: Path) -> None:
    """Write the LoRA as PEFT reads it and, where the base has no name that others can load it by,
    the base in `base/`. PEFT saves no adapter without loading its base, so files are copied."""
    with with_filename(directory / LORA_WEIGHTS):
        shutil.copyfile(source.checkpoint.path / LORA_WEIGHTS, directory / LORA_WEIGHTS)
    settings = parse.parse_json(parse.read_text(source.checkpoint.path / LORA_CONFIG))
    write_json(directory / LORA_CONFIG, {**settings, "base_model_name_or_path": source.hub or BASE})
    if source.hub is None:
        (directory / BASE).mkdir()
        for file in sorted(source.base.iterdir()):
            if file.suffix in MODEL_SUFFIXES or file.name in NOTICES:
                with with_filename(directory / BASE / file.name):
                    shutil.copyfile(file, directory / BASE / file.name)


def merged(source: ExportSource) -> PreTrainedModel:
    """Return the base with what was trained in it, in the run's dtype, on the CPU."""
    base: Any = AutoModelForImageTextToText.from_pretrained(
        source.base,
        dtype=getattr(torch, source.settings.dtype),
        trust_remote_code=False,
        use_safetensors=True,
    )
    if source.lora:
        from peft import PeftModel

        adapted: Any = PeftModel.from_pretrained(base, str(source.checkpoint.path))
        base = adapted.merge_and_unload(safe_merge=True)
    else:
        parts = load_file(source.checkpoint.path / PARTS_WEIGHTS)
        unexpected = base.load_state_dict(parts, strict=False).unexpected_keys
        assert not unexpected, f"no place for {unexpected[:3]}"
    return base.eval()


def write_modules(source: ExportSource, prompt_spec: PromptSpec, directory: Path) -> None:
    """Write what `SentenceTransformer(...)` looks for beside a merged model: last-token pooling,
    unit norm. `SentenceTransformer.save_pretrained` would load the model once more, save it without
    its head, and drop `processor_kwargs`; so its own settings are written here.
    """
    from sentence_transformers.base.modules.normalize import Normalize
    from sentence_transformers.sentence_transformer.modules.pooling import Pooling

    width = int(
        AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config().hidden_size
    )
    paths = {TRANSFORMER: ""}
    for module in (Pooling(width, "lasttoken"), Normalize()):
        kind = type(module)
        path = f"{len(paths)}_{kind.__name__}"
        paths[f"{kind.__module__}.{kind.__name__}"] = path
        (directory / path).mkdir()
        with with_filename(directory / path):
            module.save(str(directory / path))
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": kind}
        for number, (kind, path) in enumerate(paths.items())
    ]
    write_json(directory / "modules.json", modules)
    versions = {
        name.replace("-", "_"): version(name) for name in ("sentence-transformers", "transformers")
    }
    about = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    write_json(directory / "config_sentence_transformers.json", {**about, "__version__": versions})
    # `backend: pil` would say it better, but AutoVideoProcessor, which is given the same words,
    # refuses it.
    as_sized = {"processor_kwargs": {"use_fast": False}} if prompt_spec.pillow else {}
    write_json(directory / "sentence_bert_config.json", {**TRANSFORMER_SETTINGS, **as_sized})
