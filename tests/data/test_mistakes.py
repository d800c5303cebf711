"""Own data as people have it: each mistake gets one message with the way out, and what is harmless
is read."""

from __future__ import annotations

import json
import logging
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cirloop.captioning.foundation import TemplateFoundation
from cirloop.config.run import RunConfig
from cirloop.data import splits
from cirloop.data.cirr import CirrSettings
from cirloop.data.huggingface import Columns, HuggingFaceSettings
from cirloop.data.jsonl import JsonlSettings
from cirloop.data.paths import DataPaths
from cirloop.data.triplets import MAX_TEXT
from cirloop.stages import estimate, preflight
from cirloop.types import EvalSplit, TrainSplit, UserError
from tests.fake_datasets import write_cirr

ROWS = [
    {"reference": f"p{n}.png", "text": f"make it {n}", "target": f"p{(n + 1) % 6}.png"}
    for n in range(6)
]


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Six images and as many triplets, for training and for evaluation."""
    splits.warn_once.cache_clear()
    (tmp_path / "data" / "images").mkdir(parents=True)
    for number in range(6):
        picture = Image.new("RGB", (32, 32), (40 * number, 0, 0))
        picture.save(tmp_path / "data" / "images" / f"p{number}.png")
    write(tmp_path / "data", ROWS)
    return tmp_path / "data"


def write(directory: Path, rows: list[Any]) -> None:
    for split in ("train", "val"):
        (directory / f"{split}.jsonl").write_text(lines(rows))


def of(directory: Path) -> DataPaths:
    return DataPaths(directory, directory.parent / "cache", lambda items, _: items)


def train(directory: Path, **settings: Any) -> TrainSplit:
    return JsonlSettings(**settings).build(of(directory)).train


def raw(content: str | bytes, name: str = "train.jsonl") -> Callable[[Path], object]:
    made = content.encode() if isinstance(content, str) else content
    return lambda d: (d / name).write_bytes(made)


def instead(name: str, content: str) -> Callable[[Path], object]:
    """Another file than train.jsonl."""
    return lambda d: ((d / "train.jsonl").unlink(), (d / name).write_text(content))


def each(change: Callable[[dict[str, str]], dict[str, str]]) -> Callable[[Path], object]:
    return lambda d: write(d, [change(dict(row)) for row in ROWS])


def named(change: Callable[[str], str]) -> Callable[[Path], object]:
    return each(lambda row: row | {role: change(row[role]) for role in ("reference", "target")})


def texts(text: str) -> Callable[[Path], object]:
    return each(lambda row: row | {"text": text})


def targets(target: str) -> Callable[[Path], object]:
    """`{}` in it is the reference."""
    return each(lambda row: row | {"target": target.format(row["reference"])})


def captioned(row: dict[str, str]) -> dict[str, str]:
    return {"caption" if name == "text" else name: value for name, value in row.items()}


def copied(directory: Path) -> None:
    (directory / "images" / "p1.png").write_bytes((directory / "images" / "p0.png").read_bytes())


def broken(directory: Path) -> None:
    (directory / "images" / "p0.png").write_text("<html>")
    (directory / "images" / "p1.png").unlink()


def emptied(directory: Path) -> None:
    for path in (directory / "images").iterdir():
        path.unlink()


CSV = "reference,text,target\np0.png,in red,p1.png\n"
INDENTED = "\n".join(json.dumps(row, indent=1) for row in ROWS)
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\n"
UMLAUTS = lines(ROWS).replace("make", "grün").encode("latin-1")
INSTEAD_OF_P0 = "did you mean 'p0.png'?"
SAME = "reference and target are the same image"
MISTAKES: dict[str, tuple[Callable[[Path], object], *tuple[str, ...]]] = {
    "CSV in the folder": (
        instead("train.csv", CSV), "there is 'train.csv', a table of", "cirloop import FILE",
    ),
    "CSV in train.jsonl": (
        raw(CSV), "is a table of columns 'reference', 'text', 'target' separated by commas",
    ),
    "a Git LFS pointer": (raw(LFS), "is a pointer of Git LFS. Fetch", "git lfs pull"),
    "a bad sign": (
        raw(lines(ROWS) + '{"reference": "p0.png",}'), "line 7: is not JSON (", "column 24)",
    ),
    "a long number": (
        raw('{"reference": ' + "9" * 6000 + "}"),
        "line 1: holds a whole number of more than 4,300 digits",
    ),
    "semicolons in train.jsonl": (raw(CSV.replace(",", ";")), "separated by semicolons"),
    "a list in train.jsonl": (
        raw(json.dumps(ROWS, indent=1)), "is one JSON list of 6 objects, not JSON lines",
    ),
    "a list on one line": (raw(json.dumps(ROWS)), "is one JSON list of 6 objects"),
    "indented objects": (raw(INDENTED), "go over several lines"),
    "train.json": (
        instead("train.json", json.dumps(ROWS)), "there is 'train.json', one JSON list",
        "cirloop import FILE",
    ),
    "another split name": (
        instead("training.jsonl", lines(ROWS)), "'training.jsonl'", "--data.train FILE",
    ),
    "an empty file": (raw(b""), "train.jsonl: holds no lines"),
    "UTF-16": (
        raw(lines(ROWS).encode("utf-16")), "is not UTF-8 text but UTF-16", "Save it as UTF-8",
    ),
    "UTF-16 without a mark": (raw(lines(ROWS).encode("utf-16-le")), "is not UTF-8 text but UTF-16"),
    "Latin-1": (raw(UMLAUTS), "may be Latin-1", "grün it"),
    "a workbook": (raw(b"PK\x03\x04" + bytes(40)), "an Excel workbook"),
    "other field names": (
        each(captioned), "'caption'; known: ", "did you mean 'text'?", "(5 more like it, such as",
    ),
    "a prefix": (named(lambda n: f"photos/{n}"), f"photos/p0.png: is not there; {INSTEAD_OF_P0}"),
    "a folder called photos": (
        lambda d: (d / "images").rename(d / "photos"), "images are in 'photos'", "--data.images",
    ),
    "backslashes": (named(lambda n: f"images\\{n}"), f"is not in the gallery; {INSTEAD_OF_P0}"),
    "a path of Windows": (named(lambda n: f"C:\\shop\\images\\{n}"), INSTEAD_OF_P0),
    "an absolute path elsewhere": (named(lambda n: f"/elsewhere/{n}"), INSTEAD_OF_P0),
    "no ending": (
        named(lambda n: n.removesuffix(".png")), f"images/p0: is not there; {INSTEAD_OF_P0}",
    ),
    "another ending": (
        named(lambda n: n.replace("png", "jpg")), f"p0.jpg: is not there; {INSTEAD_OF_P0}",
    ),
    "another case": (named(str.upper), f"P0.PNG: is not there; {INSTEAD_OF_P0}"),
    "a line without target": (
        lambda d: write(d, [{"reference": "p0.png", "text": "x"}, *ROWS]),
        "line 1: has no 'target'",
    ),
    "an empty text": (texts(" "), "'text' is empty (5 more like it"),
    "a pasted document": (texts("long " * 12_800), f"64,000 characters, more than {MAX_TEXT:,}"),
    "target is reference": (targets("{}"), SAME),
    "target is reference in another spelling": (targets("./{}"), SAME),
    "target has the reference's bytes": (
        copied, "same image, 'p1.png'; 'p0.png' has the same bytes",
    ),
    "broken and missing": (
        broken, "p0.png: is not an image but a web page", "p1.png: is not there",
        "--allow_missing_images 2",
    ),
    "no images": (emptied, "holds no images (", ".avif"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_short_message(name: str, data: Path) -> None:
    change, *messages = MISTAKES[name]
    change(data)
    with pytest.raises(UserError) as caught:
        train(data)
    said = str(caught.value)
    assert [message for message in messages if message not in said] == [], said
    assert len(said.splitlines()) < 15, said


def accented(file: str, annotations: str) -> Callable[[Path], object]:
    """An image of an accented name, in these two forms of Unicode."""

    def apply(directory: Path) -> None:
        image = directory / "images" / "p0.png"
        image.rename(image.with_name(unicodedata.normalize(file, "été.png")))
        named(lambda n: unicodedata.normalize(annotations, n.replace("p0", "été")))(directory)

    return apply


def nested(directory: Path) -> None:
    (directory / "images" / "Über" / "b" / "c").mkdir(parents=True)
    (directory / "images" / "p0.png").rename(directory / "images" / "Über" / "b" / "c" / "p 0.PNG")
    named(lambda n: n.replace("p0.png", "Über/b/c/p 0.PNG"))(directory)


def linked(directory: Path) -> None:
    (directory / "images").rename(directory.parent / "disk")
    (directory / "images").symlink_to(directory.parent / "disk")


def hidden(directory: Path) -> None:
    raw(b"Mac OS X", "images/._p0.png")(directory)
    (directory / "images" / ".thumbs").mkdir()
    raw(b"", "images/.thumbs/p0.png")(directory)


GOOD: dict[str, Callable[[Path], object]] = {
    "as it is": lambda d: None,
    "a mark and CRLF": raw(b"\xef\xbb\xbf" + lines(ROWS).replace("\n", "\r\n").encode()),
    "blank lines": raw("\n\n" + lines(ROWS).replace("\n", "\n\n")),
    "umlauts, capitals, three levels": nested,
    "a linked folder of images": linked,
    "hidden files": hidden,
    "names in NFD": accented("NFD", "NFC"),
    "annotations in NFD": accented("NFC", "NFD"),
    "absolute paths": lambda d: named(lambda n: str(d / "images" / n))(d),
    "dotted paths": named(lambda n: f".//{n}"),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_harmless_is_read(name: str, data: Path) -> None:
    GOOD[name](data)
    split = train(data)
    assert (len(split.triplets), len(split.gallery.ids)) == (6, 6)
    for t in split.triplets:
        assert t.target in split.gallery.ids and t.query.reference in split.gallery.ids
    assert all(split.images.load(image).size == (32, 32) for image in split.gallery.ids)


def test_equal_bytes_are_one_image_said_once(data: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2):
        (data / "images" / f"copy{number}.png").write_bytes(
            (data / "images" / f"p{number}.png").read_bytes()
        )
    last = {"reference": "copy1.png", "text": "again", "target": "copy2.png"}
    write(data, [row | {"positives": ["p2.png"]} for row in [*ROWS, last]])
    made = JsonlSettings().build(of(data))
    [part] = made.eval_splits("val")
    assert part.gallery.ids == ("copy1.png", "copy2.png", "p0.png", "p3.png", "p4.png", "p5.png")
    assert (part.queries[0].reference, made.train.triplets[0].target) == ("p0.png", "copy1.png")
    assert part.relevance is not None
    assert part.relevance.positives[part.queries[-1].id] == {"copy2.png"}
    said = [r.getMessage() for r in caplog.records if "bytes of another" in r.getMessage()]
    assert len(said) == 1 and "2 of 8 images" in said[0]
    assert "'p1.png', which is 'copy1.png'" in said[0]


def test_copies_that_cannot_be_used_are_each_named(data: Path) -> None:
    for name in ("x.png", "y.png"):
        (data / "images" / name).write_text("<html>404</html>")
    with pytest.raises(UserError) as caught:
        train(data)
    assert all(f"{name}.png: is not an image" in str(caught.value) for name in "xy")


def test_images_of_all_kinds_are_in_the_gallery_and_others_named(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kinds = {"avif": "AVIF", "jfif": "JPEG", "jpe": "JPEG", "jp2": "JPEG2000"}
    kinds |= {"ppm": "PPM", "tga": "TGA", "apng": "PNG"}
    for number, (ending, kind) in enumerate(kinds.items()):
        picture = Image.new("RGB", (32, 32), (0, 30 * number, 200))
        picture.save(data / "images" / f"k.{ending}", kind)
    for name in ("a.heic", "b.HEIC", "notes.txt"):
        (data / "images" / name).write_bytes(b"x")
    split = train(data)
    assert {f"k.{ending}" for ending in kinds} <= set(split.gallery.ids)
    assert len(split.gallery.ids) == 6 + len(kinds)
    said = [
        r.getMessage()
        for r in caplog.records
        if r.levelno == logging.WARNING and "passed over" in r.getMessage()
    ]
    assert len(said) == 1 and "2 .heic (a.heic)" in said[0]


def test_a_linked_folder_is_named_and_followed_by_name(data: Path) -> None:
    (data.parent / "more").mkdir()
    Image.new("RGB", (32, 32), "white").save(data.parent / "more" / "s.png")
    (data / "images" / "season").symlink_to(data.parent / "more")
    said = r"season: is a link to a folder: .*more(.|\n)*--allow_symlinks"
    with pytest.raises(UserError, match=said):
        train(data)
    split = train(data, allow_symlinks=True)
    assert "season/s.png" in split.gallery.ids
    assert split.images.load(split.gallery.ids[-1]).size == (32, 32)


def test_the_data_directory_is_a_file_or_misspelt(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"train\.jsonl is a file\. Give the directory"):
        of(data / "train.jsonl").require_dir("jsonl")
    with pytest.raises(UserError, match=r"no such directory; did you mean '.*/data'\?"):
        of(data.parent / "dat").require_dir("jsonl")
    monkeypatch.chdir(data)
    said = rf"--data_dir shop: there is no such directory \({data}/shop\)"
    with pytest.raises(UserError, match=said):
        DataPaths(Path("shop"), data / "cache", lambda items, _: items).require_dir("jsonl")


def test_images_of_a_benchmark_in_another_folder_are_pointed_at(tmp_path: Path) -> None:
    directory = write_cirr(tmp_path / "cirr", 1)
    (directory / "NLVR2").mkdir()
    (directory / "dev").rename(directory / "NLVR2" / "dev")
    with pytest.raises(UserError) as caught:
        CirrSettings().build(of(directory)).eval_splits("val")
    said = str(caught.value)
    assert "A file 'dev-0-img0.png' is not at" in said and f"but in {directory}/NLVR2/dev." in said
    assert "(10 more like it, such as" in said and len(said.splitlines()) == 4


def hugging(directory: Path, **settings: Any) -> tuple[EvalSplit, ...]:
    return (
        HuggingFaceSettings(train="train", val="train", **settings)
        .build(of(directory))
        .eval_splits("val")
    )


HEAD = "reference,text,target"


def table(directory: Path, head: str = HEAD, sign: str = ",") -> None:
    for split in ("train", "val"):
        (directory / f"{split}.jsonl").unlink()
    rows = [[row["reference"], row["text"], row["target"]] for row in ROWS]
    content = "\n".join([head.replace(",", sign), *(sign.join(row) for row in rows)])
    (directory / "train.csv").write_text(content + "\n")


@pytest.mark.parametrize(
    ("head", "sign", "settings", "messages"),
    [
        (
            HEAD, ";", {"images": "images"},
            ("train.csv is separated by semicolons", "Save it with commas"),
        ),
        (HEAD, "\t", {"images": "images"}, ("is separated by tabs",)),
        (
            "a,caption,b", ",", {"images": "images"},
            ("has no column 'text'; there are: a, caption, b", "--data.columns.text"),
        ),
        (HEAD, ",", {}, ("names its images, so say where they are", "--data.images images")),
        (HEAD, ",", {"images": "photos"}, ("images are in 'images'", "--data.images")),
    ],
)  # fmt: skip
def test_each_mistake_with_a_table_is_one_short_message(
    head: str, sign: str, settings: dict[str, Any], messages: tuple[str, ...], data: Path
) -> None:
    table(data, head, sign)
    with pytest.raises(UserError) as caught:
        hugging(data, **settings)
    said = str(caught.value)
    assert [message for message in messages if message not in said] == [], said
    assert len(said.splitlines()) < 12, said


def test_a_table_with_other_columns_is_read_where_they_are_named(data: Path) -> None:
    table(data, "query,caption,answer")
    columns = Columns(reference="query", text="caption", target="answer")
    [part] = hugging(data, images="images", columns=columns)
    assert len(part.queries) == 6 and len(part.gallery.ids) == 6


def test_a_training_split_of_another_name_is_a_message(data: Path) -> None:
    table(data)
    said = r"has no split 'training'; there are: train(?s:.*)--data\.train"
    with pytest.raises(UserError, match=said):
        _ = HuggingFaceSettings(train="training", images="images").build(of(data)).train


def checked(small: Any, directory: Path, run: Path) -> None:
    from cirloop.stages.preflight import check

    config: RunConfig = small(run, data={"type": "jsonl"}, data_dir=directory)
    check(config)


def test_one_target_is_refused_before_the_run(small: Any, data: Path, tmp_path: Path) -> None:
    for rows in (ROWS[:1], [row | {"target": "p0.png"} for row in ROWS[1:]]):
        (data / "train.jsonl").write_text(lines(rows))
        with pytest.raises(UserError, match=rf"{len(rows)} training triplets have one target"):
            checked(small, data, tmp_path / "run")


def test_few_triplets_and_those_of_val_are_warned_of(
    small: Any, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (data / "train.jsonl").write_text(lines(ROWS[:3]))
    checked(small, data, tmp_path / "run")
    assert "jsonl_val: 3 of 6 queries are training triplets too" in caplog.text
    assert "3 training triplets have 3 different targets" in caplog.text


def test_dots_that_stay_in_the_folder_are_one_spelling(data: Path) -> None:
    dotted = {"target": "x/../{}", "reference": "../images/{}"}
    each(lambda row: row | {role: dots.format(row[role]) for role, dots in dotted.items()})(data)
    assert {t.target for t in train(data).triplets} == {row["target"] for row in ROWS}


def test_folder_and_file_names_are_compared_in_nfc(data: Path) -> None:
    (data / "images").rename(data / unicodedata.normalize("NFD", "bébé"))
    (data / "train.jsonl").rename(data / unicodedata.normalize("NFD", "é.jsonl"))
    assert len(train(data, images="bébé", train="é.jsonl").triplets) == 6


@pytest.mark.parametrize(
    ("name", "meant"), [("my%20p0.png", "my p0.png"), ("P0.PNG", "P0.png"), ("p1 .png", "p1.png")]
)
def test_escapes_case_and_blanks_have_a_hint(data: Path, name: str, meant: str) -> None:
    for side, extra in enumerate(("my p0.png", "P0.png"), 8):
        Image.new("RGB", (side, side)).save(data / "images" / extra)
    write(data, [ROWS[1] | {"reference": name}, *ROWS])
    with pytest.raises(UserError, match=f"is not there; did you mean '{meant}'"):
        train(data)


def test_a_link_to_nothing_is_not_a_file_elsewhere(data: Path) -> None:
    (data / "images" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"gone\.png: is not there") as error:
        train(data)
    assert "A file 'gone.png'" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (LFS.encode() + b"size 12\n", "is a pointer of Git LFS"),
        (b"<!DOCTYPE html>\n<html>404</html>", "is not an image but a web page"),
    ],
)
def test_what_a_download_left_is_named(data: Path, content: bytes, what: str) -> None:
    (data / "images" / "p0.png").write_bytes(content)
    with pytest.raises(UserError, match=what):
        train(data)


def simulated(data: Path, **settings: Any) -> RunConfig:
    return RunConfig(
        retrieval="simulated",
        data=JsonlSettings(),
        data_dir=data,
        experiment_dir=data.parent / "run",
        foundation=TemplateFoundation(),
        captioning={"min_verify_probability": 0.0, "max_round_trip_rank": 0},
        **settings,
    )


def test_evaluating_without_targets_is_refused_before_the_run(data: Path) -> None:
    (data / "val.jsonl").write_text(
        lines([{name: row[name] for name in ("reference", "text")} for row in ROWS])
    )
    said = r"evaluation\.split: jsonl_val has no targets.*\n.*--evaluation\.split"
    with pytest.raises(UserError, match=said):
        preflight.check(simulated(data))


def test_a_plan_without_models_has_no_blanks(data: Path) -> None:
    rows = dict(estimate.plan_rows(simulated(data), preflight.check(simulated(data))))
    assert all(value.strip() for value in rows.values()) and rows["model"] == "simulated"
    assert rows["foundation model"].startswith("template")
    assert "embedder's place" not in rows["captioning"]
    assert rows["tuning"].startswith("none") and rows["device"].endswith("1 process")


def test_a_tilde_is_the_home_directory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(data.parent))
    config = RunConfig(data=JsonlSettings(), data_dir="~/data", experiment_dir="~/run")
    assert (config.data_dir, config.directory) == (data, data.parent / "run")
