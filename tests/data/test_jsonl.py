"""Own data as JSON lines: what a line may hold, and each kind of mistake named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cirloop.data.config import JsonlSettings
from cirloop.data.paths import DataPaths
from cirloop.types import ImageId, UserError

LINE = {"reference": "a.png", "text": "in blue", "target": "sub/b.png"}


def folder(directory: Path, lines: list[Any]) -> Path:
    for red, name in enumerate(("a.png", "sub/b.png", "c.JPG")):
        path = directory / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (red, 0, 0)).save(path, "PNG")
    (directory / "images" / "notes.txt").write_text("no image")
    (directory / "val.jsonl").write_text(
        "\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines)
    )
    return directory


def data_paths(directory: Path) -> DataPaths:
    return DataPaths(directory, directory / "cache", lambda items, _: items)


def build(directory: Path, **settings: Any) -> Any:
    return JsonlSettings(**settings).build(data_paths(directory))


def val(directory: Path, **settings: Any) -> Any:
    return build(directory, **settings).eval_splits("val")


def test_a_line_becomes_a_query(tmp_path: Path) -> None:
    lines = [LINE, "", LINE | {"id": "mine", "texts": ["is red", " ", "has dots "]}]
    [part] = val(folder(tmp_path, lines))
    assert [(q.id, q.text) for q in part.queries] == [
        ("val/0", "in blue"),
        ("mine", "is red and has dots"),
    ]
    assert part.gallery.ids == ("a.png", "c.JPG", "sub/b.png")
    assert part.relevance is not None and part.relevance.targets[part.queries[0].id] == "sub/b.png"
    assert part.images.load(ImageId("c.JPG")).size == (8, 8)


def test_categories_groups_and_positives(tmp_path: Path) -> None:
    line = LINE | {"category": "dress", "positives": ["c.JPG"]}
    line |= {"subset": ["a.png", "c.JPG", "sub/b.png"]}
    parts = val(folder(tmp_path, [line, line | {"category": "bag"}]))
    assert [part.labeled.category for part in parts] == ["bag", "dress"]
    assert [query.category for part in parts for query in part.queries] == ["bag", "dress"]
    [query] = parts[1].queries
    assert parts[1].labeled.groups[query.id] == ("c.JPG", "sub/b.png")
    assert parts[1].relevance is not None and parts[1].relevance.positives[query.id] == {
        "c.JPG",
        "sub/b.png",
    }


def test_positives_of_training_lines_come_with_the_train_split(tmp_path: Path) -> None:
    """They are part of the data's digest; the target is none of them, and a validation line's never
    get there."""
    line = LINE | {"positives": ["c.JPG", "sub/b.png"]}
    directory = folder(tmp_path, [LINE | {"positives": ["a.png"]}])
    digests = []
    for lines in ([line, line | {"positives": []}], [LINE, LINE], [line, LINE]):
        (directory / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
        data = build(directory)
        expected = {"train/0": {"c.JPG"}} if "positives" in lines[0] else {}
        assert data.train.positives == expected
        digests.append(data.digest)
    assert digests[0] != digests[1]


def test_a_split_without_targets_is_for_prediction(tmp_path: Path) -> None:
    line = {name: value for name, value in LINE.items() if name != "target"}
    [part] = val(folder(tmp_path, [line]))
    assert part.relevance is None


def test_a_gallery_list_decides_what_is_ranked(tmp_path: Path) -> None:
    (folder(tmp_path, [LINE]) / "gallery.txt").write_text("sub/b.png\na.png\n\n")
    [part] = val(tmp_path, gallery="gallery.txt")
    assert part.gallery.ids == ("a.png", "sub/b.png")


def test_a_image_that_a_line_names_and_the_folder_lacks_is_missing(tmp_path: Path) -> None:
    directory = folder(
        tmp_path,
        [LINE, LINE | {"reference": "gone.png"}, LINE | {"positives": ["gone.png"], "id": "p"}],
    )
    with pytest.raises(UserError) as caught:
        val(directory)
    assert "images/gone.png: is not there" in str(caught.value)
    assert "--allow_missing_images 1" in str(caught.value)
    lines = (directory / "val.jsonl").read_text().splitlines()[:2]
    (directory / "val.jsonl").write_text("\n".join(lines))
    [part] = val(directory, allow_missing_images=1)
    assert (part.missing, part.dropped, [q.id for q in part.queries]) == (1, 1, ["val/0"])
    assert "gone.png" not in part.gallery.ids


def test_in_a_gallery_list_every_image_must_stand(tmp_path: Path) -> None:
    directory = folder(tmp_path, [LINE, LINE | {"reference": "c.JPG"}])
    (directory / "gallery.txt").write_text("a.png\nsub/b.png\n")
    with pytest.raises(UserError, match=r"line 2: reference 'c\.JPG' is not in the gallery"):
        val(directory, gallery="gallery.txt")


def test_a_damaged_record_is_made_again(tmp_path: Path) -> None:
    directory = folder(tmp_path, [LINE])
    (directory / "images" / "a.png").write_text("no image")
    for content in (None, "{", "[]", '{"bad": 3}', "", '{"schema": 1}'):
        for record in (directory / "cache" / "images").glob("*.json"):
            record.write_text(record.read_text() if content is None else content)
        with pytest.raises(UserError, match=r"a\.png: is not an image of a known kind"):
            val(directory)
        [record] = (directory / "cache" / "images").glob("*.json")
        assert json.loads(record.read_text())["bad"] == {"a.png": "is not an image of a known kind"}


def listed(text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / "gallery.txt").write_text(text)


def wrong(**fields: Any) -> list[Any]:
    return [LINE | fields]


NOWHERE = "is not in the gallery"
WRONG: dict[str, tuple[list[Any], str]] = {
    "not JSON": (["{"], "line 1: is not JSON"),
    "a list": (["[1]"], "line 1: must be an object, found a list"),
    "no lines": ([""], "val.jsonl: holds no lines"),
    "unknown field": (wrong(txt="x"), "has an unknown field 'txt'; known: category, id,"),
    "no text": ([{"reference": "a.png", "target": "sub/b.png"}], "line 1: has no 'text'"),
    "text empty": (wrong(text=" "), "'text' is empty"),
    "text a number": (wrong(text=3), "'text' must be text, found a whole number"),
    "texts not a list": (wrong(texts="x"), "'texts' must be a list, found text"),
    "no reference": ([{"text": "x", "target": "a.png"}], "has no 'reference'"),
    "reference outside": (wrong(reference="/x.png"), f"reference '/x.png' {NOWHERE}"),
    "target outside": (wrong(target="../b.png"), f"target '../b.png' {NOWHERE}"),
    "target is reference": (wrong(target="a.png"), "reference and target are the same image"),
    "some without target": (
        [LINE, {"reference": "a.png", "text": "x"}],
        "1 of 2 lines have no targets",
    ),
    "id twice": (wrong(id="x") * 2, "line 2: the id 'x' is there more than once"),
    "some without positives": ([LINE, *wrong(positives=[])], "1 of 2 lines have no positives"),
    "positive outside": (wrong(positives=["../x"]), f"positives '../x' {NOWHERE}"),
    "positive a number": (
        wrong(positives=[3]),
        "'positives' must hold only text, found a whole number",
    ),
    "positives a word": (wrong(positives="a.png"), "'positives' must be a list, found text"),
    "target outside subset": (wrong(subset=["a.png", "c.JPG"]), "the target is not in its subset"),
    "some without category": (
        [LINE, *wrong(category="x")],
        "1 lines have no category and others have one",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_mistake_is_named(name: str, tmp_path: Path) -> None:
    lines, message = WRONG[name]
    _, problems = JsonlSettings().read(folder(tmp_path, lines), "val")
    assert message in "\n".join(f"{row.where}: {row.what}" for row in problems.rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (listed("a.png\na.png\nsub/b.png"), "'a.png' is there more than once"),
        (listed("a.png\n../secret.png"), "'../secret.png' is not inside the image folder"),
        (listed("/etc/x.png"), "'/etc/x.png' is not inside the image folder"),
        (lambda directory: None, "gallery.txt: there is no such file"),
    ],
)
def test_a_wrong_gallery_list_is_named(
    change: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    change(folder(tmp_path, [LINE]))
    with pytest.raises(UserError) as caught:
        val(tmp_path, gallery="gallery.txt")
    assert message in str(caught.value)


def test_all_mistakes_come_together(tmp_path: Path) -> None:
    folder(tmp_path, [line for lines, _ in WRONG.values() for line in lines])
    with pytest.raises(UserError) as caught:
        val(tmp_path)
    said = str(caught.value)
    for name in ("not JSON", "unknown field", "text empty", "reference outside", "id twice"):
        assert WRONG[name][1].split(": ", 1)[-1] in said
