"""Searching without a run: which models are read, and what is said of those that are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cirloop.backbones.config import ClipCombinerSettings, Qwen2VLSettings
from cirloop.config.cli import parse_flags
from cirloop.tools.search.config import SearchOptions
from cirloop.tools.search.engine import Engine
from cirloop.tools.search.models import settings_of
from cirloop.types import UserError
from tests.commands import ROOT, command

SCRIPT = "cirloop.search"


@pytest.fixture
def photos(engine: Any, tmp_path: Path) -> Path:
    """A folder of five images."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(engine.gallery.ids[:5]):
        engine.gallery.images.load(image).save(folder / f"{number}.png")
    return folder


def test_a_named_model_searches_as_the_base_model_of_a_run(
    finished: Path, photos: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    named = Engine(SearchOptions(model="tiny", gallery=photos, cache_dir=cache))
    of_run = Engine(SearchOptions(experiment_dir=finished, gallery=photos))
    for reference, text in ((None, "a red circle"), ("1.png", "make it red")):
        found, expected = (
            each.search("base", each.reference(reference) if reference else None, text, 3).hits
            for each in (named, of_run)
        )
        assert [hit.image for hit in found] == [hit.image for hit in expected]
        scores = [hit.score for hit in expected]
        assert [hit.score for hit in found] == pytest.approx(scores, abs=1e-5)
    assert named.labels() == ["base"] and not named.has_iterations
    assert "drawn shapes only" in named.notices[0] and "zero-shot" in named.name
    assert list(cache.glob("search/*.safetensors"))


def test_the_command(photos: Path, tmp_path: Path) -> None:
    flags = ["--model", "tiny", "--images", photos, "--cache_dir", tmp_path / "cache"]
    done = command(SCRIPT, *flags, "--text", "a red circle", "-k", "1", "--json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["results"]) == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("-k 0", ["--experiment_dir RUN or --model NAME", "top_k"]),
        ("--model tiny --experiment_dir x", ["and not both"]),
        ("--model tiny --iteration 1", ["--images FOLDER", "has no iterations"]),
    ],
)
def test_flags_that_do_not_go_together(flags: str, said: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_flags(SearchOptions, flags.split(), "search")
    assert all(words in str(error.value) for words in said)


def test_a_model_without_a_run_needs_no_iteration() -> None:
    options = parse_flags(SearchOptions, ["--model", "tiny", "--images", "photos"], "search")
    assert options.model == "tiny" and options.gallery == Path("photos")


def test_kinds_of_models(tmp_path: Path) -> None:
    tiny = settings_of(str(ROOT / "src/cirloop/tiny"))
    assert isinstance(tiny, Qwen2VLSettings)
    clip = settings_of("RN50:openai")
    assert isinstance(clip, ClipCombinerSettings)
    assert (clip.clip, clip.path, clip.combiner) == ("RN50", "openai", "sum")
    (tmp_path / "recipe.yaml").write_text("model: {type: qwen2_vl, path: tiny, max_pixels: 3136}\n")
    assert settings_of(str(tmp_path / "recipe.yaml")).model_dump()["max_pixels"] == 3136


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("data: {type: cirr}", "has no `model`"),
        ("model: {type: clip_combiner, clip: RN50}", "Set combiner: sum"),
        ("model: {type: simulated}", "no model to search with"),
    ],
)
def test_recipes_without_a_model_that_can_be_used(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "recipe.yaml").write_text(content + "\n")
    with pytest.raises(UserError, match=said):
        settings_of(str(tmp_path / "recipe.yaml"))


def test_directories_that_are_no_model(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"Give it by --experiment_dir {finished}"):
        settings_of(str(finished))
    for file in (ROOT / "src/cirloop/tiny").iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="model_type 'bert'; the families read are qwen2_vl"):
        settings_of(str(tmp_path))
    with pytest.raises(UserError, match="no config"):
        (tmp_path / "config.json").unlink()
        settings_of(str(tmp_path))
