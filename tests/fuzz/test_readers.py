"""Files that people wrote, malformed: each is read, or refused by a UserError that names it.
Nothing hangs."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from cirloop.captioning.prompts import load as load_prompt
from cirloop.cli.mine_embeddings import main as mine_vectors
from cirloop.cli.score_rankings import score_rankings
from cirloop.config.run import load
from cirloop.config.runtime import Runtime
from cirloop.data import circo, cirr, fashioniq, hp_fashioniq
from cirloop.data.catalogue import read_items, read_phrases
from cirloop.data.huggingface import Columns, HuggingFaceSettings
from cirloop.data.jsonl import JsonlSettings
from cirloop.data.paths import DataPaths
from cirloop.distributed.launcher import num_processes
from cirloop.negatives.attributes.images import captions_file, metadata
from cirloop.negatives.attributes.lexicon import load as lexicon
from cirloop.retrieval.vectors import open_vectors
from cirloop.tools.add_negatives.config import AddNegativesConfig
from cirloop.tools.add_negatives.samples import read as read_samples
from cirloop.types import ImageId, UserError
from cirloop.validation import ValidationReport
from tests.fake_datasets import write_circo, write_cirr, write_fashioniq, write_hp_fashioniq
from tests.tiers import one_in

SECONDS = 15.0
GROWTH = 600 << 20
"""Bytes of memory that reading one small file may add to the most this process has had."""
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 10**30)
    | st.floats()
    | st.text(max_size=8)
    | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=8,
)


@contextmanager
def bounded() -> Iterator[None]:
    began, most = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.monotonic() - began < SECONDS
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) << 10 < GROWTH


def refused_or_read(read: Callable[[], object], named: str | None = None) -> str | None:
    """The message of the UserError, None where the file was accepted. Anything else that is raised
    is a failure."""
    with bounded():
        try:
            read()
        except UserError as error:
            said = str(error)
            assert named is None or named in said, said
            return said
    return None


def stopped(read: Callable[[ValidationReport], object]) -> None:
    problems = ValidationReport()
    read(problems)
    problems.raise_if_any()


def laughs(levels: int = 12) -> str:
    """A YAML file of a few bytes that stands for 9 to the `levels` values."""
    lines = ["a0: &a0 [x]"] + [
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)
    ]
    return "\n".join(lines)


BYTES: dict[str, bytes] = {
    "empty": b"",
    "a blank": b" \n",
    "NUL": b"\0",
    "not UTF-8": b"\xff\xfe\x80",
    "UTF-16": '[{"a": 1}]'.encode("utf-16"),
    "nothing but a mark": b"\xef\xbb\xbf",
    "null": b"null",
    "a number": b"3",
    "text": b'"x"',
    "a list": b"[]",
    "an object": b"{}",
    "a list of lists": b"[[]]",
    "a list of nulls": b"[null, null]",
    "an object of null": b'{"a": null}',
    "cut": b'[{"a": 1}, {"b"',
    "two values": b"[] []",
    "a comma too many": b"[1,]",
    "quotes of Python": b"[{'a': 1}]",
    "deep lists": b"[" * 100_000,
    "deep lists that end": b"[" * 50_000 + b"]" * 50_000,
    "deep objects": b'{"a":' * 60_000,
    "a long number": b"[" + b"9" * 100_000 + b"]",
    "a long exponent": b"[1e999999]",
    "NaN": b"[NaN]",
    "Infinity": b'{"a": Infinity}',
    "a key twice": b'{"a": 1, "a": 2}',
    "half a pair": b'[{"a": "\\ud800"}]',
    "half a pair as key": b'{"\\udfff": [1]}',
    "a megabyte of text": b'["' + b"a" * (1 << 20) + b'"]',
    "many keys twice": b"{" + b'"a":1,' * 5_000 + b'"b":2}',
    "control characters": b'["\x01\x02"]',
    "escaped ones": b'["\\u0000\\u001b[2J"]',
    "right to left": '["\u202eabc"]'.encode(),
    "HTML": b"<!doctype html><script>alert(1)</script>",
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(50),
    "a zip": b"PK\x03\x04" + bytes(50),
    "a pickle": b"\x80\x04\x95\x06\x00\x00\x00\x00\x00\x00\x00]\x94K\x01a.",
    "YAML that unfolds": laughs().encode(),
    "an anchor in itself": b"a: &a [*a]\n",
    "a tag of Python": b"!!python/object/apply:os.system [ls]",
    "a date that is none": b"a: 2024-99-99\n",
    "a time that is none": b"!!timestamp x\n",
    "an integer of nothing": b"a: !!int ''\n",
    "a list as key": b"? [a]\n: b\n",
    "a tab": b"\ta: b\n",
    "deep YAML": b"[" * 3000,
    "YAML twice": b"--- a\n--- b\n",
}
OTHERS = ("a directory", "a pipe", "a dangling link", "a link to itself", "no file")


def put(path: Path, content: bytes | str) -> Path:
    """At `path` what `content` says, instead of what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content == "a directory":
        path.mkdir()
    elif content == "a pipe":
        os.mkfifo(path)
    elif content == "a dangling link":
        path.symlink_to("nowhere")
    elif content == "a link to itself":
        path.symlink_to(path.name)
    return path


def own(directory: Path) -> Path:
    for red, name in enumerate(("a.png", "b.png")):
        (directory / "images").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (red, 0, 0)).save(directory / "images" / name)
    (directory / "gallery.txt").write_text("a.png\nb.png\n")
    (directory / "val.jsonl").write_text(
        '{"reference": "a.png", "text": "in blue", "target": "b.png"}\n'
    )
    (directory / "items.json").write_text('{"a.png": {"color": "red"}}\n')
    (directory / "items.yaml").write_text("a.png:\n  color: red\n")
    (directory / "phrases.yaml").write_text("color: ['{color} instead of {old color}']\n")
    return directory


def data_paths_of(directory: Path) -> DataPaths:
    return DataPaths(directory, directory / "cache", lambda items, _: items)


def of_own(directory: Path) -> Callable[[], object]:
    given = JsonlSettings(gallery="gallery.txt")
    return lambda: given.build(data_paths_of(directory)).eval_splits("val")


def of_vectors(directory: Path) -> Callable[[], object]:
    flags = "query-embeddings gallery-embeddings targets positives groups categories".split()
    words = [
        w
        for f in flags
        for w in (f"--{f}", str(directory / f"{f}.{'npy' if flags.index(f) < 3 else 'json'}"))
    ]
    return lambda: mine_vectors([*words, "--output", str(directory / "out.json")])


def vectors_at(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    np.save(directory / "query-embeddings.npy", np.eye(3, dtype=np.float32))
    np.save(directory / "gallery-embeddings.npy", np.eye(3, dtype=np.float32))
    np.save(directory / "targets.npy", np.arange(3))
    for name, content in (
        ("positives", [[], [], []]),
        ("groups", [[], [], []]),
        ("categories", ["a", "b", "c"]),
    ):
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def scored(directory: Path) -> Callable[[], object]:
    return lambda: score_rankings(directory / "rankings.json", "cirr_val", directory)


def cirr_at(directory: Path) -> Path:
    return write_cirr(directory, 1)


Read = Callable[[Path], Callable[[], object]]


def reader(load: Callable[[Path, ValidationReport], object]) -> Read:
    """What loads a directory, and raises the problems that it reported."""
    return lambda directory: lambda: stopped(lambda problems: load(directory, problems))


def directly(load: Callable[[Path], object]) -> Read:
    return lambda directory: lambda: load(directory)


OF_CIRR = reader(lambda d, p: cirr.load_queries(d, "val", p))
OF_FASHIONIQ = reader(lambda d, p: fashioniq.load_queries(d, "val", p, ("dress",)))
OF_CIRCO = reader(lambda d, p: circo.load_queries(d, "val", p))
OF_EMBEDDER = directly(
    lambda d: (
        AddNegativesConfig(
            image_dir=d, annotations=d / "a", output=d / "o", run_config=d / "model.yaml"
        ).model
    )
)


def fashioniq_at(directory: Path) -> Path:
    return write_fashioniq(directory, 1)


def circo_at(directory: Path) -> Path:
    return write_circo(directory, 1)


FILES: dict[str, tuple[Callable[[Path], object], str, Read]] = {
    "cirr captions": (cirr_at, "captions/cap.rc2.val.json", OF_CIRR),
    "cirr images": (cirr_at, "image_splits/split.rc2.val.json", OF_CIRR),
    "fashioniq captions": (fashioniq_at, "captions/cap.dress.val.json", OF_FASHIONIQ),
    "fashioniq images": (fashioniq_at, "image_splits/split.dress.val.json", OF_FASHIONIQ),
    "circo annotations": (circo_at, "annotations/val.json", OF_CIRCO),
    "circo images": (circo_at, str(circo.LIST), OF_CIRCO),
    "hp_fashioniq": (
        write_hp_fashioniq,
        "hpfiq.json",
        reader(lambda d, p: hp_fashioniq.load_queries(d, "hpfiq.json", p)),
    ),
    "own lines": (own, "val.jsonl", of_own),
    "own gallery": (own, "gallery.txt", of_own),
    "rankings": (cirr_at, "rankings.json", scored),
    "samples": (
        own,
        "samples.json",
        reader(lambda d, p: read_samples(d / "samples.json", None, None, p)),
    ),
    "lines of samples": (
        own,
        "s.jsonl",
        reader(lambda d, p: read_samples(d / "s.jsonl", None, None, p)),
    ),
    "attributes": (
        own,
        "attributes.json",
        directly(lambda d: metadata(d / "attributes.json", lexicon("fashion"), [ImageId("a.png")])),
    ),
    "captions": (
        own,
        "captions.json",
        directly(lambda d: captions_file(d / "captions.json", [ImageId("a.png")])),
    ),
    "items": (own, "items.json", directly(lambda d: read_items(d / "items.json"))),
    "items in YAML": (own, "items.yaml", directly(lambda d: read_items(d / "items.yaml"))),
    "phrases": (own, "phrases.yaml", directly(lambda d: read_phrases(d / "phrases.yaml"))),
    "settings": (
        own,
        "run.yaml",
        directly(lambda d: load(["--config", str(d / "run.yaml")], d / "run.yaml")),
    ),
    "a prompt": (
        own,
        "prompt.yaml",
        directly(lambda d: load_prompt.__wrapped__(str(d / "prompt.yaml"))),
    ),
    "accelerate": (
        own,
        "accelerate.yaml",
        directly(lambda d: num_processes(Runtime(accelerate_config=d / "accelerate.yaml"))),
    ),
    "settings of an embedder": (own, "model.yaml", OF_EMBEDDER),
    "vectors": (vectors_at, "gallery-embeddings.npy", of_vectors),
    "targets": (vectors_at, "targets.npy", of_vectors),
    "positives": (vectors_at, "positives.json", of_vectors),
    "categories": (vectors_at, "categories.json", of_vectors),
}
HARMLESS = {
    ("settings", "an object"),
    ("accelerate", "an object"),
    ("accelerate", "an object of null"),
    ("accelerate", "Infinity"),
    ("accelerate", "half a pair as key"),
    ("circo images", "a dangling link"),
    ("circo images", "a link to itself"),
    ("circo images", "no file"),
    ("positives", "an object"),
}
"""What may stand in a file, or be missing: rankings of CIRCO can be scored without COCO's list of
images."""
NAMED_BY_OTHERS = {"own gallery", "settings"}
"""Whose content is wrong in view of another file, or named by the setting."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole data set of each kind."""
    made = {}
    for name, (write, _, _) in FILES.items():
        made[name] = tmp_path_factory.mktemp("set") / "data"
        write(made[name])
    return made


@pytest.mark.parametrize(("name", "content"), one_in(5, FILES, [*BYTES, *OTHERS]))
def test_a_malformed_file_is_refused(name: str, content: str, places: dict[str, Path]) -> None:
    _, file, read = FILES[name]
    path = places[name] / file
    before = path.read_bytes() if path.is_file() else b""
    put(path, BYTES.get(content, content))
    try:
        said = refused_or_read(read(places[name]), None if name in NAMED_BY_OTHERS else path.stem)
    finally:
        put(path, before)
    assert said is not None or (name, content) in HARMLESS, "accepted"


@pytest.mark.parametrize("name", FILES)
def test_the_same_file_unharmed_is_read_with_a_mark_and_windows_lines(
    name: str, tmp_path: Path
) -> None:
    write, file, read = FILES[name]
    write(tmp_path)
    path = tmp_path / file
    if not path.exists():
        pytest.skip("the data set has none of itself")
    assert refused_or_read(read(tmp_path)) is None
    if path.suffix != ".npy":
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert refused_or_read(read(tmp_path)) is None


BOUNDS = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
SHAPED = st.fixed_dictionaries(
    {},
    optional={
        name: JSON | st.just("a.png") | st.lists(st.just("a.png"), max_size=3)
        for name in (
            "reference",
            "text",
            "texts",
            "target",
            "id",
            "category",
            "subset",
            "positives",
            "pairid",
            "caption",
            "target_hard",
            "img_set",
            "candidate",
            "captions",
            "image",
            "answer",
            "group",
        )
    },
)
"""Objects with the fields of annotations, and anything in them."""


@pytest.mark.parametrize(
    "name",
    one_in(
        3, [name for name, (_, file, _) in FILES.items() if not file.endswith((".npy", ".txt"))]
    ),
)
@given(
    value=st.lists(SHAPED, max_size=3)
    | JSON
    | st.dictionaries(st.text(max_size=6), JSON, max_size=4)
)
@BOUNDS
def test_any_json_is_read_or_refused(name: str, value: Any, places: dict[str, Path]) -> None:
    _, file, read = FILES[name]
    path = places[name] / file
    before = path.read_bytes() if path.is_file() else b""
    lines = file.endswith(".jsonl") and isinstance(value, list)
    text = "\n".join(map(json.dumps, value)) if lines else json.dumps(value)
    try:
        path.write_text(text)
        refused_or_read(read(places[name]))
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("name", one_in(3, FILES))
@given(place=st.floats(0, 0.999), change=st.binary(min_size=1, max_size=4))
@BOUNDS
def test_any_bytes_in_a_file_are_read_or_refused(
    name: str, place: float, change: bytes, places: dict[str, Path]
) -> None:
    _, file, read = FILES[name]
    path = places[name] / file
    if not path.is_file() or not path.read_bytes():
        return
    before = path.read_bytes()
    at = int(place * len(before))
    try:
        path.write_bytes(before[:at] + change + before[at + len(change) :])
        refused_or_read(read(places[name]))
    finally:
        path.write_bytes(before)


@given(content=st.binary(max_size=200), headed=st.booleans())
@BOUNDS
def test_any_vectors_file_is_read_or_refused(content: bytes, headed: bool, tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes((b"\x93NUMPY\x01\x00" if headed else b"") + content)
    refused_or_read(lambda: open_vectors(tmp_path / "a.npy"))


HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 9), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3), }",
    "{'descr': 'O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': 3, }",
    "{'descr': 3, 'fortran_order': 0, 'shape': ()}",
    "[]",
    "__import__('os').system('touch x')",
    "(" * 5000,
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1e400,)}",
    "{'descr': [('a', '<f4', (99999, 99999))], 'fortran_order': False, 'shape': (3,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (18446744073709551616, 0), }",
)


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_lies_is_refused(header: str, tmp_path: Path) -> None:
    text = header.encode() + b"\n"
    (tmp_path / "a.npy").write_bytes(
        b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(100)
    )
    assert refused_or_read(lambda: open_vectors(tmp_path / "a.npy"))


SETTINGS_FLAGS = st.sampled_from(
    (
        "seed num_iterations model_path data_dir hard_negative_k batch_size learning_rate "
        "loss negative_strategy dataset_name training.lr_overrides mining.filters "
        "experiment_dir config nothing runtime.feature_cache_max_gb "
        "training.lora.target_modules allow_missing_images data.categories"
    ).split()
)
VALUES = st.text(max_size=12) | st.sampled_from(
    [
        "nan",
        "inf",
        "-1",
        "1e400",
        "9" * 5000,
        "[[[[",
        "{}",
        '{"a": 1}',
        "null",
        "true",
        "\0",
        "\ud800",
        "--seed",
        "~nobody/x",
    ]
)


@given(flags=st.lists(st.tuples(SETTINGS_FLAGS, VALUES), min_size=1, max_size=3))
@BOUNDS
def test_any_flags_are_read_or_refused(flags: list[tuple[str, str]], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    refused_or_read(
        lambda: load([f"--{name}={value}" for name, value in flags], tmp_path / "run.yaml")
    )


@pytest.mark.parametrize("content", one_in(5, BYTES))
def test_a_table_of_malformed_rows_is_refused(content: str, tmp_path: Path) -> None:
    """Some would end the process inside of Arrow; what `datasets` cannot read is told in its
    words."""
    Image.new("RGB", (8, 8)).save(put(tmp_path / "images" / "a.png", b""))
    put(tmp_path / "validation.json", BYTES[content])
    chosen = HuggingFaceSettings(
        columns=Columns(reference="a", text="a", target=None), images="images"
    )
    assert refused_or_read(
        lambda: chosen.build(data_paths_of(tmp_path)).eval_splits("val"), str(tmp_path)
    )
