"""The LoRA as PEFT saves it. A base that has no name on the Hub lies beside it in `base/`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.fs import with_filename
from cirloop.backbones.weights import LORA_CONFIG, LORA_WEIGHTS
from cirloop.io import parse
from cirloop.tools.export.source import ExportSource

BASE = "base"
PARTS_OF_A_MODEL = {".safetensors", ".json", ".jinja", ".txt", ".model"}
ABOUT = ("README.md", "LICENSE", "LICENSE.txt", "NOTICE")


def write(model: ExportSource, directory: Path) -> None:
    """Write the adapter's files and, where the base has no name that others can load it by, the
    base's."""
    with with_filename(directory / LORA_WEIGHTS):
        shutil.copyfile(model.checkpoint.path / LORA_WEIGHTS, directory / LORA_WEIGHTS)
    settings = parse.parse_json(parse.read_text(model.checkpoint.path / LORA_CONFIG))
    write_json(
        directory / LORA_CONFIG,
        json.loads(json.dumps(settings | {"base_model_name_or_path": model.hub or BASE})),
    )
    if model.hub is None:
        (directory / BASE).mkdir()
        for file in sorted(model.base.iterdir()):
            if file.suffix in PARTS_OF_A_MODEL or file.name in ABOUT:
                with with_filename(directory / BASE / file.name):
                    shutil.copyfile(file, directory / BASE / file.name)
