"""`cirloop init`: which recipe is taken, and that the file is one a run reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cirloop.config import recipes
from cirloop.config.run import RunConfig, load
from cirloop.tools import init_config
from cirloop.types import UserError

DEFAULT = recipes.CONFIGS / "shapes.yaml"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my shop").mkdir()
    monkeypatch.chdir(tmp_path)


def made(*flags: str) -> RunConfig:
    init_config.main(["--data_dir", "my shop", "--output", "out.yaml", *flags])
    return load(["--config", "out.yaml"], DEFAULT)


@pytest.mark.parametrize(
    ("data_set", "gpu_memory", "recipe"),
    [
        ("jsonl", 24, "jsonl_qwen2_vl"),
        ("jsonl", 0, "jsonl_clip"),
        ("jsonl", 12, "jsonl_clip"),
        ("cirr", 24, "cirr_qwen2_vl"),  # the usual one, though another is as large
        ("cirr", 18, "recall_cirr_2b"),
        ("cirr", 8.5, "qure_cirr"),
        ("grocery", 0, "grocery_clip"),
    ],
)
def test_the_recipe_that_fits(data_set: str, gpu_memory: float, recipe: str) -> None:
    config = made("--dataset_name", data_set, "--gpu_memory", str(gpu_memory))
    settings = yaml.safe_load((recipes.CONFIGS / f"{recipe}.yaml").read_text("utf-8"))
    content = yaml.safe_load(Path("out.yaml").read_text("utf-8"))
    assert {name: content[name] for name in settings} == settings
    assert config.data_dir == Path("my shop").absolute() and config.data.type == data_set
    assert config.directory == Path("experiments/out")
    assert f"# made this from the recipe {recipe}.yaml" in Path("out.yaml").read_text("utf-8")


def test_weights_in_place_of_the_recipes() -> None:
    config = made("--gpu_memory", "24", "--model_path", "/a b/Qwen: 2")
    assert config.model.path == config.foundation.path == "/a b/Qwen: 2"


def test_each_recipe_says_what_memory_it_needs() -> None:
    """Else init passes over it."""
    named = {
        recipe.name for name in ("cirr", "jsonl") for recipe in init_config.recipes_of(name, None)
    }
    files = {path.stem for path in recipes.CONFIGS.glob("*.yaml") if "cirr" in path.stem}
    assert named == files | {"jsonl_clip", "jsonl_qwen2_vl", "jsonl_tiny"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu_memory", "1"], "no recipe for jsonl fits --gpu_memory 1.*jsonl_qwen2_vl .19 GB"),
        (["--gpu_memory", "24", "--dataset_name", "shapes"], "shapes: is none of cirr"),
        (["--gpu_memory", "24", "--data_dir", "nowhere"], "nowhere: there is no such directory"),
        (["--gpu_memory", "24", "--output", "my shop"], "is there already"),
        ([], "--gpu_memory: is needed"),
    ],
)
def test_what_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(*flags)
    assert not Path("out.yaml").exists()
