"""A directory for `SentenceTransformer(...)`: the merged model, last-token pooling, unit norm.

sentence-transformers turns whatever it is given (an image, an image with a text, a text) into a
message of the user, and puts that through the model's chat template, which holds our prompts. So no
code of ours is needed.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from cirloop.artifacts.atomic import write_json
from cirloop.tools.export import merged
from cirloop.tools.export.prompt_spec import PromptSpec
from cirloop.tools.export.source import ExportSource

HIDDEN = {"method": "forward", "method_output_name": "last_hidden_state"}
MODULES = (
    "sentence_transformers.base.modules.transformer.Transformer",
    "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
    "sentence_transformers.base.modules.normalize.Normalize",
)


def write(model: ExportSource, reading: PromptSpec, directory: Path) -> None:
    """Write the merged model and the four files that sentence-transformers looks for beside it."""
    merged.write(model, directory)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": MODULES[0]},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": MODULES[1]},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": MODULES[2]},
    ]
    write_json(directory / "modules.json", modules)
    about: dict[str, Any] = {"model_type": "SentenceTransformer", "similarity_fn_name": "cosine"}
    about["__version__"] = {
        name.replace("-", "_"): version(name) for name in ("sentence-transformers", "transformers")
    }
    write_json(directory / "config_sentence_transformers.json", about)
    write_json(directory / "sentence_bert_config.json", _transformer(reading))
    width = int(
        AutoConfig.from_pretrained(directory, trust_remote_code=False).get_text_config().hidden_size
    )
    write_json(
        directory / "1_Pooling" / "config.json",
        {"embedding_dimension": width, "pooling_mode": "lasttoken"},
    )
    write_json(directory / "2_Normalize" / "config.json", {})


def _transformer(reading: PromptSpec) -> dict[str, Any]:
    """`message` among the modalities sends every input through the chat template. Nothing is cut:
    the run cuts nothing, and a cut image has fewer places than tokens."""
    made: dict[str, Any] = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            "text": HIDDEN,
            "image": HIDDEN,
            "message": {**HIDDEN, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"text": {"truncation": False, "padding_side": "right"}},
        "unpad_inputs": False,
    }
    if reading.pillow:
        # `backend: pil` would say it better, but AutoVideoProcessor, which is given the same words,
        # refuses it.
        made["processor_kwargs"] = {"use_fast": False}
    return made
