"""Counters of a stage: exact on small known work, at home in their own context, and without effect
on any artifact."""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from cirloop.backbones import EmbedInput, Qwen2VLSettings
from cirloop.backbones.features import VisionCache
from cirloop.captioning.base import CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.foundation import Qwen2VLFoundation
from cirloop.captioning.prompts import REWRITE, VERIFY
from cirloop.cli import runner
from cirloop.config.runtime import Runtime
from cirloop.data import ShapesSettings
from cirloop.data.paths import DataPaths
from cirloop.monitoring import profiling
from cirloop.monitoring.costs import FILE, NONE, PROFILE, Costs, describe, format_cells
from cirloop.monitoring.profiling import StageMetrics
from cirloop.retrieval.embed import embed, query_items
from cirloop.types import UserError
from tests.test_end_to_end import digests


def test_counters_go_to_the_innermost_meter_and_nowhere_without_one() -> None:
    profiling.add(items=99)
    with profiling.metering() as outer:
        profiling.add(items=1, waiting=0.5)
        with profiling.metering() as inner:
            profiling.add(items=10)
        profiling.add(items=2)
    assert (outer.items, outer.waiting) == (3, 0.5)
    assert inner.items == 10
    assert outer.seconds >= inner.seconds > 0 and outer.memory_bytes > 10e6


def test_another_thread_has_a_meter_of_its_own() -> None:
    with profiling.metering() as mine:
        thread = Thread(target=lambda: profiling.add(items=5))
        thread.start()
        thread.join()
    assert mine.items == 0


def test_a_counter_that_is_none_is_an_error() -> None:
    with profiling.metering(), pytest.raises(AttributeError):
        profiling.add(itmes=1)


def test_an_image_counts_once_for_a_tower_and_as_cached_only_where_it_was_there() -> None:
    with profiling.metering() as spent:
        profiling.count_cache_hits("a", {"1", "2", "3"}, ["3"])
        profiling.count_cache_hits("a", {"2", "3", "4"})
        profiling.count_cache_hits("b", {"1"})
        profiling.count_cache_hits("b", {"2"}, {"2"})
    assert spent.images_cached == 2 + 1 + 1


def test_parallel_processes_take_the_longest_time_and_pieces_in_turn_their_sum() -> None:
    one = StageMetrics(seconds=3, waiting=2, items=4, flops=1.0, memory_bytes=7)
    two = StageMetrics(seconds=5, waiting=1, items=6, memory_bytes=6)
    both = StageMetrics.merge_parallel([one.to_json(), two.to_json()])
    assert both == StageMetrics(
        seconds=5, waiting=2, items=10, flops=2.0, memory_bytes=7, processes=2
    )
    stage = StageMetrics(seconds=9, waiting=1, items=1, memory_bytes=8)
    stage.add_sequential(both)
    stage.add_sequential(both)
    assert stage == StageMetrics(
        seconds=9, waiting=5, items=21, flops=4.0, memory_bytes=8, processes=2
    )
    assert StageMetrics(**json.loads(json.dumps(stage.to_json()))) == stage


def test_what_processes_wrote_comes_back_once_and_nothing_of_a_stopped_attempt(
    tmp_path: Path,
) -> None:
    (tmp_path / "cost_7.json").write_text(json.dumps(StageMetrics(items=1000).to_json()))
    with profiling.metering() as spent, profiling.collect_workers(tmp_path):
        for number in range(2):
            with profiling.worker_metrics(tmp_path, number, None):
                profiling.add(items=1 + number)
    assert (spent.items, spent.processes) == (3, 2)


def test_a_trace_is_written_once_and_the_batches_stay_what_they_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(batches: Any) -> list[int]:
        done = []
        for batch in profiling.profile_batches(batches, "work"):
            torch.ones(64, 64) @ torch.ones(64, 64)
            done.append(batch)
        return done

    caplog.set_level(logging.INFO, "cirloop")
    path = tmp_path / "profile" / "work.json.gz"
    with profiling.metering(tmp_path / "profile"):
        assert work(iter(range(2))) == [0, 1]
        assert not path.exists() and "too few batches of work" in caplog.text
        assert work(iter(range(9))) == [*range(9)]
        written = path.stat().st_mtime_ns
        assert work(iter(range(9))) == [*range(9)]
    assert path.stat().st_mtime_ns == written and [*path.parent.iterdir()] == [path]
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("aten::mm") == profiling.TRACE_SCHEDULE["active"]
    assert "aten::mm" in caplog.text


def test_operations_of_the_second_batch_stand_for_all(tmp_path: Path) -> None:
    mm = 2 * 8 * 8 * 8
    with profiling.metering(tmp_path) as spent:
        for number in profiling.profile_batches(range(6), "outer"):
            for _ in profiling.profile_batches(range(3), "inner"):  # what is inside is part of it
                if number != 0:
                    torch.ones(8, 8) @ torch.ones(8, 8)
    assert spent.flops == 6 * 3 * mm
    with profiling.metering() as spent:
        for _ in profiling.profile_batches(range(6), "outer"):
            torch.ones(8, 8) @ torch.ones(8, 8)
    assert spent.flops == 0


def test_no_trace_without_a_directory_and_none_inside_another(tmp_path: Path) -> None:
    with profiling.metering():
        assert [*profiling.profile_batches(range(9), "work")] == [*range(9)]
    with profiling.metering(tmp_path):
        for _ in profiling.profile_batches(range(6), "outer"):
            assert len([*profiling.profile_batches(range(6), "inner")]) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["outer.json.gz"]


def test_a_stage_that_failed_stays_as_an_attempt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cirloop")

    def attempt(fails: bool) -> None:
        with Costs(tmp_path).stage("a.json", False):
            profiling.add(items=3)
            if fails:
                there = json.loads((tmp_path / FILE).read_text())["stages"][-1]
                assert there == {"stage": "a.json", "attempt": 1, "finished": False}
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt(True)
    attempt(False)
    rows = Costs(tmp_path).read()
    attempts = [(row["attempt"], row["finished"], row["items"]) for row in rows]
    assert attempts == [(1, False, 3), (2, True, 3)]
    assert "a.json: done in " in caplog.text and "3 embedded" in caplog.text


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match=r"costs\.json is damaged .* delete it"):
        Costs(tmp_path).read()


def test_a_row_as_people_read_it() -> None:
    spent = StageMetrics(
        seconds=10,
        waiting=1.25,
        images_encoded=30,
        images_cached=90,
        tokens=900,
        padding=100,
        tokens_written=100,
        texts=7,
        flops=5e12,
        processes=2,
        memory_bytes=3 * 10**9,
        gpu_bytes=5 * 10**9,
    )
    row = {"stage": "s", **spent.to_json()}
    assert format_cells(row) == {
        "s": "10.0", "images/s": "12", "tokens/s": "100", "texts/s": "-", "cached": "75%",
        "padding": "10.0%", "waiting s": "1.2",
        "GB": "3.00", "GPU GB": "5.00", "GFLOP": "5,000", "GFLOP/s": "500",
    }  # fmt: skip
    assert "7 texts" in describe(row)


def test_what_is_not_known_is_left_empty() -> None:
    shown = format_cells(StageMetrics(seconds=1).to_json())
    assert {shown[name] for name in ("GFLOP", "GFLOP/s", "images/s", "cached", "padding")} == {NONE}


def test_vision_embedding_and_captioning_are_traced_and_counted(tmp_path: Path) -> None:
    train = ShapesSettings(train_families=2, train_triplets=12, eval_families=2).build().train
    backbone: Any = Qwen2VLSettings(dtype="float32").build()
    captioner = Qwen2VLFoundation(path="tiny", dtype="float32").build(backbone)
    images = [*{train.images.digest(image): image for image in train.gallery.ids}.values()][:8]
    requests = [CaptionRequest(images[i], images[i + 1], "make it red") for i in range(6)]
    with profiling.metering(tmp_path / "profile") as spent:
        runtime, kept = Runtime(vision_batch_size=2), tmp_path / "vision"
        features = VisionCache(backbone, train.images, kept, runtime)
        items = [EmbedInput(image) for image in images]
        embed(backbone, features, items, 2, lambda batches, _: batches, "embed")
        eyes = BatchedCaptioner(captioner, train.images, kept, 2, lambda batches, _: batches)
        eyes.yes_probability(VERIFY, requests, "ask")
        assert spent.tokens_written == 0
        eyes.generate(REWRITE, requests, 4, [0.0, 1.0], 0, "write")
    names = {path.name for path in (tmp_path / "profile").iterdir()}
    assert names == {"vision.json.gz", "embedding.json.gz", "captioning.json.gz"}
    assert (spent.images_encoded, spent.images_cached, spent.items, spent.texts) == (8, 0, 8, 12)
    assert 12 <= spent.tokens_written <= 48 and spent.waiting > 0


@pytest.fixture(scope="module")
def profiled(small: Any, made_once: Any) -> Path:
    """The finished run again, with --profile, and as it was with an empty cache at the start."""

    def fill(home: Path) -> None:
        runner.run(small(home / "run", runtime={"cache_dir": home / "cache", "profile": True}))

    return Path(made_once("profiled", fill) / "run")


@pytest.fixture(scope="module")
def spent(profiled: Path) -> dict[str, dict[str, Any]]:
    """The rows of its stages."""
    rows = Costs(profiled).read()
    assert all(row["finished"] and row["attempt"] == 1 for row in rows)
    return {row["stage"]: row for row in rows}


@pytest.mark.full
@pytest.mark.skipif(
    "MKL_CBWR" not in os.environ,
    reason="not an Intel processor: bits of a product depend on where its numbers lie in memory",
)
def test_a_profile_changes_no_artifact(profiled: Path, finished: Path) -> None:
    assert digests(profiled) == digests(finished)


@pytest.mark.full
def test_a_profile_has_traces_and_operations(
    profiled: Path, spent: dict[str, dict[str, Any]]
) -> None:
    there = {path.name for path in (profiled / PROFILE).iterdir()}
    # of captions, too few batches
    assert there == {f"{name}.json.gz" for name in ("training", "vision", "embedding")}
    for name in ("evaluation_base.json", "checkpoint_iter_1", "augmented_samples_iter_1.json"):
        assert format_cells(spent[name])["GFLOP"] != NONE, name


@pytest.mark.full
def test_the_stages_counters_are_exact(
    spent: dict[str, dict[str, Any]], profiled: Path, small: Any
) -> None:
    config = small(profiled)
    data = config.data.build(DataPaths(None, config.cache, lambda items, _: items))
    (part,) = data.eval_splits("val")
    items = {*query_items(part.queries), *(EmbedInput(image) for image in part.gallery.ids)}
    images = {part.images.digest(item.image) for item in items}
    base, after = spent["evaluation_base.json"], spent["evaluation_iter_0.json"]
    counters = ("images_encoded", "images_cached", "items")
    assert [base[name] for name in counters] == [len(images), 0, len(items)]
    assert [after[name] for name in counters] == [0, len(images), len(items)]
    assert after["tokens"] == base["tokens"] > len(items) and after["padding"] == base["padding"]
    for iteration in (0, 1):
        train = spent[f"checkpoint_iter_{iteration}"]
        steps, batch = config.training.steps_per_iteration, config.training.batch_size
        assert (train["steps"], train["triplets"]) == (steps, steps * batch)
        assert train["items"] > steps * batch and train["padding"] > 0 < train["waiting"]
    captions = spent["augmented_samples_iter_1.json"]
    mined = json.loads((profiled / "hard_negatives_iter_0.json").read_text())["negatives"]
    assert captions["texts"] == len(mined) * config.captioning.num_candidates
    tokens, longest = captions["tokens_written"], config.captioning.max_new_tokens
    assert captions["texts"] <= tokens <= captions["texts"] * longest
    for row in spent.values():
        assert row["processes"] == 1 and row["seconds"] > row["waiting"] >= 0


def test_a_stage_that_was_killed_has_a_row_without_numbers() -> None:
    row = {"stage": "checkpoint_iter_1", "attempt": 1, "finished": False}
    assert {*format_cells(row).values()} == {NONE}
