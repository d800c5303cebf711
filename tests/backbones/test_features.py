"""The cache of vision features: its limit, other processes on the same files, threads ahead of the
tower."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError

from cirloop.backbones import BackboneConfig, Qwen2VLSettings, tensor_cache
from cirloop.backbones.features import VisionCache
from cirloop.backbones.prefetch import PREFETCH_BATCHES, prefetch_images
from cirloop.backbones.tensor_cache import TensorCache
from cirloop.config.runtime import Runtime
from cirloop.data import ShapesSettings
from cirloop.monitoring import profiling
from cirloop.types import ImageId, UserError
from tests.backbones.test_paths import MODELS
from tests.commands import environment
from tests.test_models_loop import model_of

OLD = 1e6
"""A time of use long before any run of today, in seconds."""
BATCH = 4


@pytest.fixture(scope="module")
def images() -> Any:
    return ShapesSettings(train_families=4, train_triplets=10, eval_families=2).build().train


@pytest.fixture(scope="module")
def backbone() -> Any:
    return Qwen2VLSettings(dtype="float32").build()


class Counted:
    """Images that count how often each is loaded."""

    def __init__(self, images: Any) -> None:
        self._images, self.loads, self._lock = images, Counter[ImageId](), threading.Lock()

    def load(self, image: ImageId) -> Any:
        with self._lock:
            self.loads[image] += 1
        return self._images.load(image)

    def digest(self, image: ImageId) -> str:
        digest: str = self._images.digest(image)
        return digest


def features_of(backbone: Any, images: Any, directory: Path, **keeping: Any) -> VisionCache:
    return VisionCache(backbone, images, directory, Runtime(vision_batch_size=BATCH, **keeping))


def same(one: list[Any], other: list[Any], tolerance: float = 0.0) -> bool:
    return all(
        a.grid == b.grid and (a.tokens - b.tokens).abs().max() <= tolerance
        for a, b in zip(one, other, strict=True)
    )


def age(directory: Path, first: int = 0) -> list[Path]:
    """Make every shard look unused for long, in the order of their names."""
    found = sorted(directory.rglob("*.safetensors"))
    for place, path in enumerate(found):
        os.utime(path, (OLD + first + place,) * 2)
    return found


def tensors(name: str, size: int = 1000) -> dict[str, torch.Tensor]:
    return {f"{name}@1x2x2": torch.full((size,), float(ord(name[0])))}


def test_a_limit_deletes_the_oldest(tmp_path: Path) -> None:
    """Three shards of 4 kB; a fourth needs the room of two of them, and the youngest stays."""
    cache = TensorCache(tmp_path, "tower")
    for name in "abc":
        cache.write(tensors(name))
    paths = {key: cache._index[key][0] for key in "abc"}
    for place, name in enumerate("bca"):
        os.utime(paths[name], (OLD + place,) * 2)
    limited = TensorCache(tmp_path, "tower", max_bytes=9000)
    limited.write(tensors("d"))
    assert [name for name in "abc" if paths[name].exists()] == ["a"]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors")) <= 9000


def test_the_limit_counts_other_towers_and_what_killed_processes_left(tmp_path: Path) -> None:
    TensorCache(tmp_path, "other").write(tensors("a"))
    (tmp_path / "other" / ".b.1.tmp").write_bytes(bytes(4000))
    for path in (tmp_path / "other").iterdir():
        os.utime(path, (OLD, OLD))
    TensorCache(tmp_path, "tower", max_bytes=5000).write(tensors("c"))
    assert [*(tmp_path / "other").iterdir()] == []


def test_what_this_run_has_used_stays_beyond_the_limit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    TensorCache(tmp_path, "tower").write(tensors("a"))
    (path,) = age(tmp_path)
    limited = TensorCache(tmp_path, "tower", max_bytes=5000)
    assert path.stat().st_mtime == OLD, "to list a shard is not to use it"
    assert limited.missing(["a"]) == []
    with caplog.at_level("WARNING"):
        limited.write(tensors("b"))
        limited.write(tensors("c"))
    assert path.exists() and limited.missing(["a", "b", "c"]) == []
    [said] = caplog.records
    assert said.message.count("runtime.feature_cache_max_gb") == 1


def test_a_shard_is_compared_once_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TensorCache(tmp_path, "tower").write(tensors("a"))
    compared: list[Path] = []
    digest = tensor_cache.file_digest
    monkeypatch.setattr(
        tensor_cache, "file_digest", lambda path: compared.append(path) or digest(path)
    )
    assert TensorCache(tmp_path, "tower").missing(["a"]) == []
    assert compared == [], "written in this run"
    paths = age(tmp_path)
    for _ in range(2):
        assert TensorCache(tmp_path, "tower").missing(["a"]) == [] and compared == paths


def test_an_open_shard_is_read_after_its_file_is_deleted(tmp_path: Path) -> None:
    TensorCache(tmp_path, "tower").write(tensors("a"))
    reader = TensorCache(tmp_path, "tower")
    assert reader.missing(["a", "b"]) == ["b"]
    age(tmp_path)[0].unlink()
    assert torch.equal(reader.read("a"), tensors("a")["a@1x2x2"])
    assert TensorCache(tmp_path, "tower").missing(["a"]) == ["a"]


def test_a_shard_that_is_gone_and_made_again_is_found(tmp_path: Path) -> None:
    TensorCache(tmp_path, "tower").write(tensors("a"))
    reader = TensorCache(tmp_path, "tower")
    age(tmp_path)[0].unlink()
    assert reader.missing(["a"]) == ["a"]
    TensorCache(tmp_path, "tower").write(tensors("a"))
    assert reader.missing(["a"]) == []


def test_a_listed_shard_that_is_deleted_is_computed_again(
    backbone: Any, images: Any, tmp_path: Path
) -> None:
    ids = images.gallery.ids[: 2 * BATCH]
    first = features_of(backbone, images.images, tmp_path).get(ids)
    reader = features_of(backbone, images.images, tmp_path)
    age(tmp_path)[0].unlink()
    assert same(first, reader.get(ids))
    assert same(first, features_of(backbone, images.images, tmp_path).get(ids))


def test_of_two_shards_with_an_image_the_whole_one_is_read(tmp_path: Path) -> None:
    for more in "bc":  # as two processes make them at once
        TensorCache(tmp_path, more).write(tensors("a") | tensors(more))
        (tmp_path / "tower").mkdir(exist_ok=True)
        for path in (tmp_path / more).iterdir():
            path.rename(tmp_path / "tower" / path.name)
    reader = TensorCache(tmp_path, "tower")
    used = reader._index["a"][0]
    used.write_bytes(used.read_bytes()[:-4] + b"damn")
    assert reader.missing(["a"]) == [] and reader._index["a"][0] != used
    assert torch.equal(reader.read("a"), tensors("a")["a@1x2x2"])


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    shards = TensorCache(tmp_path, "tower")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # as on a full disk
    try:
        with pytest.raises((OSError, SafetensorError)):
            shards.write(tensors("a"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [*tmp_path.rglob("*.*")] == [] and shards.missing(["a"]) == ["a"]


def child(work: str, directory: Path, *more: str) -> subprocess.Popen[str]:
    """This file as a process of its own; `work` is a function of it."""
    command = [sys.executable, __file__, work, str(directory), *more]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, env=environment(), text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def fill(directory: Path, part: str) -> None:
    """Half of the images and a few of the other half, in many small shards, from both ends at
    once."""
    train = ShapesSettings(train_families=4, train_triplets=10, eval_families=2).build().train
    encoder: Any = Qwen2VLSettings(dtype="float32").build()
    ids = list(train.gallery.ids[:24])
    runtime = Runtime(vision_batch_size=BATCH)
    features = VisionCache(encoder, train.images, directory, runtime, shard_bytes=1)
    print("ready", flush=True)
    sys.stdin.readline()
    features.precompute(ids if part == "0" else ids[::-1])
    made = [each.tokens.double().sum().item() for each in features.get(ids)]
    print(" ".join(f"{value:.9e}" for value in made), flush=True)


@pytest.mark.full
def test_two_processes_fill_one_cache(backbone: Any, images: Any, tmp_path: Path) -> None:
    """At once, over the same images: both read what they would alone, every shard is whole, nothing
    is left aside."""
    children = [child("fill", tmp_path, part) for part in "01"]
    for each in children:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    sums = []
    for each in children:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    for each in children:
        out, _ = each.communicate(timeout=120)
        assert each.returncode == 0
        sums.append([float(value) for value in out.split()])
    ids = images.gallery.ids[:24]
    alone = features_of(backbone, images.images, tmp_path / "alone").get(ids)
    expected = [each.tokens.double().sum().item() for each in alone]
    for found in sums:
        assert found == pytest.approx(expected, abs=1e-3)
    assert not [*tmp_path.rglob("*.tmp")]
    assert same(features_of(backbone, images.images, tmp_path).get(ids), alone, 1e-5)


def delete(directory: Path) -> None:
    """Another run whose limit leaves no room: deletes what is not used, and writes of its own."""
    TensorCache(directory, "tower of another", max_bytes=1).write(tensors("z"))
    print("deleted", flush=True)


@pytest.mark.full
def test_a_process_survives_that_another_deletes_its_shards(
    backbone: Any, images: Any, tmp_path: Path
) -> None:
    counted = Counted(images.images)
    ids = list(images.gallery.ids[: 2 * BATCH])
    first = features_of(backbone, counted, tmp_path).get(ids)
    reading = features_of(backbone, counted, tmp_path)
    kept = reading.get(ids[:1])  # mapped
    listed = features_of(backbone, counted, tmp_path)
    shards = age(tmp_path)
    out, _ = child("delete", tmp_path).communicate(timeout=120)
    assert out == "deleted\n" and not any(path.exists() for path in shards)
    assert same(reading.get(ids), first) and same(reading.get(ids[:1]), kept)
    assert set(counted.loads.values()) == {1}, "nothing is computed again where it is mapped"
    late = features_of(backbone, counted, tmp_path)
    assert same(late.get(ids), first) and same(listed.get(ids), first)
    assert set(counted.loads.values()) == {2}, "computed again once, for all"


@pytest.mark.parametrize("num_workers", [1, 3])
def test_threads_change_nothing(
    backbone: Any, images: Any, tmp_path: Path, num_workers: int
) -> None:
    ids = [*images.gallery.ids[:30], *images.gallery.ids[:3]]
    alone = features_of(backbone, images.images, tmp_path / "alone")
    alone.precompute(ids)
    counted = Counted(images.images)
    threaded = features_of(backbone, counted, tmp_path / "threads", num_workers=num_workers)
    threaded.precompute(ids)

    def written(name: str) -> dict[str, bytes]:
        paths = (tmp_path / name).rglob("*.safetensors")
        return {path.name: path.read_bytes() for path in paths}

    assert written("alone") == written("threads") and len(written("alone")) == 1
    assert counted.loads == Counter(dict.fromkeys(ids[:30], 1)), "each image once"


@pytest.mark.skipif(
    "MKL_CBWR" not in os.environ,
    reason="not an Intel processor: bits of a product depend on its size",
)
@pytest.mark.parametrize("vision_batch_size", [1, 3, 30])
def test_no_number_of_images_at_once_changes_a_bit(
    backbone: Any, images: Any, tmp_path: Path, vision_batch_size: int
) -> None:
    ids = images.gallery.ids[:30]

    def seen(size: int) -> list[Any]:
        runtime = Runtime(vision_batch_size=size)
        return VisionCache(backbone, images.images, tmp_path / str(size), runtime).get(ids)

    assert same(seen(8), seen(vision_batch_size))


def test_images_that_memory_does_not_hold_at_once_are_seen_in_halves(
    backbone: Any, images: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids, calls, encode = images.gallery.ids[:12], [], backbone.encode_images
    first = features_of(backbone, images.images, tmp_path / "first").get(ids)

    def scarce(pictures: Any, prepared: Any = None) -> Any:
        calls.append(len(pictures))
        if len(pictures) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return encode(pictures, prepared)

    monkeypatch.setattr(backbone, "encode_images", scarce)
    with profiling.metering() as spent:
        runtime = Runtime(vision_batch_size=12)
        halved = VisionCache(backbone, images.images, tmp_path / "halved", runtime).get(ids)
    assert calls == [12, 6, 3, 3, 6, 3, 3] and spent.splits == 3 and spent.images_encoded == 12
    for a, b in zip(first, halved, strict=True):
        assert torch.allclose(a.tokens, b.tokens, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_prepares_in_threads_what_it_prepares_alone(
    name: str, images: Any, tmp_path: Path
) -> None:
    """Eight batches in four threads at once, encoded in the order asked for."""
    encoder: Any = TypeAdapter(BackboneConfig).validate_python(model_of(name, tmp_path)).build()
    pictures = [images.images.load(image) for image in images.gallery.ids[:24]]
    batches = [pictures[i : i + 3] for i in range(0, 24, 3)]
    with ThreadPoolExecutor(4) as pool:
        prepared = list(pool.map(encoder.prepare_images, batches))
    for batch, ready in zip(batches, prepared, strict=True):
        assert same(encoder.encode_images(batch, ready), encoder.encode_images(batch))


def test_no_more_than_so_many_batches_are_loaded_ahead(images: Any) -> None:
    """Threads that are faster than the tower wait for it."""
    counted = Counted(images.images)
    ids = images.gallery.ids[:40]
    batches = [ids[i : i + BATCH] for i in range(0, len(ids), BATCH)]
    for taken, (pictures, number) in enumerate(prefetch_images(batches, counted, len, 3)):
        assert number == len(pictures) == BATCH
        time.sleep(0.02)
        loaded = counted.loads.total() / BATCH
        assert taken + 1 <= loaded <= taken + 1 + PREFETCH_BATCHES


def test_a_image_that_cannot_be_loaded_stops_the_threads(images: Any) -> None:
    class Bad(Counted):
        def load(self, image: ImageId) -> Any:
            if image == ids[BATCH]:
                raise UserError(f"image {image!r} is damaged")
            return super().load(image)

    ids = images.gallery.ids[:40]
    batches = [ids[i : i + BATCH] for i in range(0, 40, BATCH)]
    bad, taken = Bad(images.images), []
    with pytest.raises(UserError, match="damaged"):
        for pictures, _ in prefetch_images(batches, bad, len, 2):
            taken.append(len(pictures))
    assert taken == [BATCH], "the batch before it came through"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("images")]
    assert bad.loads.total() <= BATCH * (PREFETCH_BATCHES + 2)


if __name__ == "__main__":
    {"fill": fill, "delete": delete}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
