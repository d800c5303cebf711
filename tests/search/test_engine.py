"""What is found agrees with vectors computed apart, and with how the run itself ranks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cirloop.backbones import EmbedInput
from cirloop.backbones.features import VisionCache
from cirloop.config.cli import parse_flags
from cirloop.data.images import GreyImages
from cirloop.data.paths import DataPaths
from cirloop.monitoring.console import progress
from cirloop.retrieval.embed import query_items
from cirloop.retrieval.topk import topk
from cirloop.stages.context import RunContext, adapter_path, run_directory
from cirloop.tools.search.config import SearchOptions
from cirloop.tools.search.engine import MAX_TEXT, Engine, decode_upload
from cirloop.types import ImageId, UserError

ONE = ImageId("shapes:val:00003")
TEXT = "the red square is now blue"


@pytest.fixture(scope="module")
def apart(finished: Path, engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`vector(item)` of the run's model, one item at a time, with features of its own."""
    config, store = run_directory(finished)
    backbone = config.model.build(adapter_path(store.load("checkpoint_iter_1")))
    kept = tmp_path_factory.mktemp("vision")

    def vector(item: EmbedInput, images: Any = None) -> Any:
        features = VisionCache(backbone, images or engine.gallery.images, kept)
        backbone.module.eval()
        with torch.inference_mode():
            return backbone.module(backbone.inputs([item], features.get([item.image]))).numpy()[0]

    return vector


@pytest.fixture(scope="module")
def gallery_ND(engine: Engine, apart: Any) -> Any:
    return np.stack([apart(EmbedInput(image)) for image in engine.gallery.ids])


def order(scores: Any, ids: tuple[ImageId, ...], leave: set[ImageId]) -> list[tuple[str, float]]:
    rows = sorted(range(len(ids)), key=lambda row: (-scores[row], ids[row]))
    return [(ids[row], float(scores[row])) for row in rows if ids[row] not in leave]


@pytest.mark.parametrize("text", [TEXT, None])
@pytest.mark.parametrize("keep", [False, True])
def test_order_and_scores_are_those_of_vectors_computed_apart(
    engine: Engine, apart: Any, gallery_ND: Any, text: str | None, keep: bool
) -> None:
    ids = engine.gallery.ids
    wanted = order(gallery_ND @ apart(EmbedInput(ONE, text)), ids, set() if keep else {ONE})
    found = engine.search("1", ONE, text, len(ids), keep).hits
    assert len(found) == len(ids) - (not keep)
    assert [hit.rank for hit in found] == list(range(1, len(found) + 1))
    assert np.allclose([hit.score for hit in found], [score for _, score in wanted], atol=1e-5)
    assert [hit.image for hit in found[:5]] == [image for image, _ in wanted[:5]]


def test_a_text_alone_is_asked_about_a_grey_image(
    engine: Engine, apart: Any, gallery_ND: Any
) -> None:
    first = engine.gallery.ids[0]
    query = apart(EmbedInput(first, TEXT), GreyImages(engine.gallery.images))
    best = engine.search("1", None, TEXT, 1).hits[0]
    assert best.score == pytest.approx(float((gallery_ND @ query).max()), abs=1e-5)


def test_a_query_is_answered_as_the_run_ranks_it(finished: Path, engine: Engine) -> None:
    config, store = run_directory(finished)
    data = config.data.build(DataPaths(None, config.cache, progress))
    run, (part,) = RunContext(config, store, data), data.eval_splits("val")
    queries = list(part.queries)[:12]
    targets = [part.relevance.targets[query.id] for query in queries]
    backbone, rows = run.embedder(store.load("checkpoint_iter_1")), part.gallery.rows()
    vectors = run.embed_cached(backbone, query_items(queries), part, "queries")
    gallery = run.gallery_embeddings(backbone, part)
    references = np.array([[rows[query.reference]] for query in queries])
    best = topk(vectors, gallery, 5, excluded=references)
    for query, images, scores in zip(queries, *best, strict=True):
        found = engine.search("1", query.reference, query.text, 5).hits
        assert [hit.image for hit in found] == [part.gallery.ids[row] for row in images]
        assert np.allclose([hit.score for hit in found], scores, atol=1e-5)
    assert engine.gallery.right[queries[0].reference, queries[0].text] >= {targets[0]}


def test_a_image_from_outside_is_searched_as_if_it_were_inside(
    engine: Engine, tmp_path: Path
) -> None:
    engine.gallery.images.load(ONE).save(tmp_path / "one.png")
    reference = engine.reference(str(tmp_path / "one.png"))
    found = engine.search("1", reference, TEXT, 5, keep=True).hits
    inside = engine.search("1", ONE, TEXT, 5, keep=True).hits
    assert [hit.image for hit in found] == [hit.image for hit in inside]
    assert np.allclose([hit.score for hit in found], [hit.score for hit in inside], atol=1e-5)


def test_the_best_iteration_answers_by_default(finished: Path, engine: Engine) -> None:
    results = json.loads((finished / "evaluation_results.json").read_text())["results"]
    recalls = [row["metrics"]["recall@1"] for row in results[1:]]
    assert engine.label(None) == engine.label("best") == str(recalls.index(max(recalls)))
    best = engine.best()
    assert best is not None and best.value == max(recalls)


def test_iterations_answer_apart_and_two_stay_in_memory(engine: Engine) -> None:
    assert engine.labels() == ["base", "0", "1"] and engine.label("last") == "1"
    labels = ("base", "0", "1")
    scores = {label: engine.search(label, ONE, TEXT, 1).hits[0].score for label in labels}
    assert len({*scores.values()}) == 3
    assert len(engine._searchers) == 2
    assert engine.search("base", ONE, TEXT, 1).hits[0].score == scores["base"]


@pytest.mark.parametrize(
    ("reference", "text", "k", "said"),
    [
        (None, None, 1, "nothing to search for"),
        (ONE, "  ", 1, "empty"),
        (ONE, "x" * (MAX_TEXT + 1), 1, "more than"),
        (ONE, "\udcff", 1, "Unicode"),
        (ONE, "x", 0, "from 1 to"),
        (ONE, "x", 1001, "from 1 to"),
    ],
)
def test_what_cannot_be_asked_is_said(
    engine: Engine, reference: Any, text: Any, k: int, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        engine.search("1", reference, text, k)


def test_references_that_are_none(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "rubbish.jpg").write_bytes(b"rubbish")
    paths = (f"{tmp_path}/no.jpg", f"{tmp_path}/folder", "/dev/zero")
    for given in (*paths, "a\0b", "x" * 5000):
        with pytest.raises(UserError, match=r"no file|cannot be read|no image"):
            engine.reference(given)
    with pytest.raises(UserError, match="not an image of a known kind"):
        engine.reference(str(tmp_path / "rubbish.jpg"))
    with pytest.raises(UserError, match="is no image of"):
        engine.known(str(tmp_path / "rubbish.jpg"))
    broken = io.BytesIO()
    engine.gallery.images.load(ONE).save(broken, "PNG")
    with pytest.raises(UserError, match="cannot be decoded"):
        decode_upload(broken.getvalue()[:200], "it")
    with pytest.raises(UserError, match="--iteration 7"):
        engine.label("7")


def test_flags_come_from_the_command_line_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ITERATION", "7")
    options = parse_flags(SearchOptions, ["--experiment_dir", "E", "--top_k", "3"], "x")
    assert options.iteration == "best"
    assert parse_flags(SearchOptions, ["--experiment_dir", "E", "-k", "3"], "x").k == 3
    with pytest.raises(UserError, match=r"(?s)k: .*experiment_dir|experiment_dir.*k: "):
        parse_flags(SearchOptions, ["-k", "0"], "x")
