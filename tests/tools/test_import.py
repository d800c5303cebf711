"""`cirloop import`: tables as people have them, their images, the split, and what is refused."""

from __future__ import annotations

import csv
import io
import json
import logging
import unicodedata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from cirloop.data import splits
from cirloop.data.jsonl import JsonlSettings
from cirloop.data.paths import DataPaths
from cirloop.tools.import_table import columns
from cirloop.tools.import_table.command import main
from cirloop.tools.import_table.images import EXACT, ImageFinder
from cirloop.tools.import_table.split import Triple, split
from cirloop.tools.import_table.tables import Table
from cirloop.types import ImageId, UserError
from cirloop.validation import ValidationReport

Rows = list[dict[str, str]]
NAMES = [f"hat/{n}.jpg" for n in range(6)] + ["shoes/Über 1.JPG"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `photos` of seven images, and nothing else."""
    for number, name in enumerate(NAMES):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (30 * number, 0, 0)).save(tmp_path / "photos" / name)
    monkeypatch.chdir(tmp_path)
    splits.warn_once.cache_clear()
    return tmp_path


def rows() -> Rows:
    pairs = zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True)
    made = [{"reference": a, "text": "in grün, größer", "target": b} for a, b in pairs]
    return [row | {"text": f"{row['text']} {n}"} for row in made for n in (1, 2)]


def text_of(content: Rows, **dialect: Any) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(content[0]), **dialect)
    writer.writeheader()
    writer.writerows(content)
    return file.getvalue()


def imported(*flags: str, table: str = "t.csv") -> dict[str, Rows]:
    main([table, "--images", "photos", "--output", "shop", *flags])
    texts = {name: Path(f"shop/{name}.jsonl").read_text("utf-8") for name in ("train", "val")}
    return {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items()}


def together(parts: dict[str, Rows]) -> Rows:
    return sorted(parts["train"] + parts["val"], key=lambda row: (row["reference"], row["text"]))


EXPECTED = sorted(rows(), key=lambda row: (row["reference"], row["text"]))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv_of_any_separator_and_encoding(home: Path, encoding: str, separator: str) -> None:
    Path("t.csv").write_bytes(text_of(rows(), delimiter=separator).encode(encoding))
    assert together(imported()) == EXPECTED


def test_other_tables(home: Path) -> None:
    """The content decides what a file is, not its name."""
    contents = {
        "JSON": json.dumps(rows()).encode(),
        "JSON in an object": json.dumps({"made": "by me", "rows": rows()}, indent=1).encode(),
        "JSON in an object, on one line": json.dumps({"rows": rows()}).encode(),
        "lines of an old Mac": text_of(rows(), lineterminator="\r").encode(),
        "JSON lines": "\n\n".join(map(json.dumps, rows())).encode(),
        "a line for Excel": b"sep=;\n" + text_of(rows(), delimiter=";").encode(),
    }
    for number, content in enumerate(contents.values()):
        Path("t.csv").write_bytes(content)
        assert together(imported()) == EXPECTED
        Path("shop").rename(f"shop{number}")
    pq.write_table(pa.Table.from_pylist(rows()), "t.csv")
    assert together(imported()) == EXPECTED


def test_a_workbook_is_read_or_the_message_says_how(home: Path) -> None:
    if find_spec("openpyxl") is None:
        Path("t.xlsx").write_bytes(b"PK\x03\x04" + bytes(40))
        with pytest.raises(UserError, match=r"cirloop\[xlsx\]"):
            imported(table="t.xlsx")
        return
    import openpyxl

    book = openpyxl.Workbook()
    for line in csv.reader(io.StringIO(text_of(rows()))):
        book.active.append(line)
    book.save("t.xlsx")
    assert together(imported(table="t.xlsx")) == EXPECTED


@pytest.mark.parametrize(
    "head",
    [
        ("ref", "caption", "target image"),
        ("Source_Image", "Modification Text", "positive"),
        ("candidate", "captions", "target"),
        ("referenceImagePath", "instruction", "TARGET_HARD"),
        ("image", "edit", "answer file"),
        ("query image", "text", "target"),
    ],
)
def test_columns_by_usual_names(head: tuple[str, str, str]) -> None:
    problems = ValidationReport()
    table = Table(Path("t.csv"), "CSV", ("sku", *head, "price"), ())
    given = dict.fromkeys(columns.ROLES)
    assert columns.roles_of(table, given, problems) == dict(zip(columns.ROLES, head, strict=True))
    assert problems.rows == []


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("query,caption,target", "no column has a usual name for reference; columns"),
        ("ref,source,caption,target", "'ref' and 'source' may both be it"),
        ("hat/0.jpg,in red,hat/1.jpg", "Put a line before it, such as: reference,text,target"),
    ],
)
def test_columns_that_are_not_clear_are_asked_for(home: Path, head: str, message: str) -> None:
    Path("t.csv").write_text(f"{head}\nhat/0.jpg,in red,hat/1.jpg,x\n")
    with pytest.raises(UserError) as caught:
        imported()
    assert message in str(caught.value) and not Path("shop").exists()


def test_columns_by_flags(home: Path) -> None:
    names = {"reference": "query", "text": "caption", "target": "answer"}
    content = [{names[role]: value for role, value in row.items()} for row in rows()]
    Path("t.csv").write_text(text_of(content), "utf-8")
    assert together(imported("--reference", "query")) == EXPECTED
    with pytest.raises(UserError, match="--reference qury: is no column"):
        main(["t.csv", "--images", "photos", "--output", "x", "--reference", "qury"])


FILES = [*NAMES, "a.png", "a.webp", "deep/hat/0.jpg"]


@pytest.mark.parametrize(
    ("name", "image", "how"),
    [
        ("hat/1.jpg", "hat/1.jpg", EXACT),
        ("photos/hat/1.jpg", "hat/1.jpg", "folder"),
        ("/mnt/old/photos/hat/1.jpg", "hat/1.jpg", "folder"),
        (r"C:\shop\hat\1.jpg", "hat/1.jpg", "slashes and folder"),
        ("1.jpg", "hat/1.jpg", "folder"),
        ("hat/1", "hat/1.jpg", "ending"),
        ("hat/1.jpeg", "hat/1.jpg", "ending"),
        ("HAT/1.JPG", "hat/1.jpg", "case"),
        ("shoes/über 1.jpg", "shoes/Über 1.JPG", "case"),
        (unicodedata.normalize("NFD", "shoes/Über 1.JPG"), "shoes/Über 1.JPG", "Unicode form"),
        ("shoes/%C3%9Cber%201.JPG", "shoes/Über 1.JPG", "blanks or escapes"),
        ("a.png", "a.png", EXACT),
        ("x/a.webp", "a.webp", "folder"),
        ("b/deep/hat/0.jpg", "deep/hat/0.jpg", "folder"),
    ],
)
def test_images_under_other_spellings(name: str, image: str, how: str) -> None:
    finder = ImageFinder({ImageId(file): Path(file) for file in FILES}, Path("photos"))
    match = finder.find(name)
    assert (match.image, match.how) == (image, how)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("a", "may be each of 2 images: 'a.png', 'a.webp'"),
        ("hat/11.jpg", "is no image of 'photos'"),
        ("shirt/1.jpg", "is no image of 'photos'; did you mean 'hat/1.jpg'?"),
        ("shoes/Übrr 1.JPG", "did you mean 'shoes/Über 1.JPG'?"),
    ],
)
def test_images_are_not_guessed(name: str, why: str) -> None:
    finder = ImageFinder({ImageId(file): Path(file) for file in FILES}, Path("photos"))
    match = finder.find(name)
    assert match.image is None and why in match.how


def test_what_is_written_is_what_a_run_reads(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = [row | {"reference": row["reference"].upper()} for row in rows()]
    Path("t.csv").write_text(text_of(content), "utf-8")
    with caplog.at_level(logging.INFO, "cirloop"):
        parts = imported()
    assert "7 images stay in" in caplog.text and "val has 1 reference:" in caplog.text
    assert Path("shop/images").is_symlink()
    paths = DataPaths(Path("shop"), home / "cache", lambda items, _: items)
    data = JsonlSettings().build(paths)
    [val] = data.eval_splits("val")
    assert len(data.train.triplets) == len(parts["train"]) == 12
    assert len(val.queries) == 2 and val.gallery.ids == tuple(sorted(NAMES))
    references = {triplet.query.reference for triplet in data.train.triplets}
    assert references.isdisjoint(query.reference for query in val.queries)


def test_copies_in_place_of_a_link(home: Path) -> None:
    Path("t.csv").write_text(text_of(rows()), "utf-8")
    imported("--copy_images")
    assert not Path("shop/images").is_symlink()
    assert Path("shop/images/hat/0.jpg").read_bytes() == Path("photos/hat/0.jpg").read_bytes()
    assert sorted(path.name for path in home.iterdir()) == ["photos", "shop", "t.csv"]


def test_ids_categories_and_lists(home: Path) -> None:
    content: list[dict[str, Any]] = [
        row | {"sku": n, "kind": "hat", "positives": ["4.jpg"]} for n, row in enumerate(rows())
    ]
    Path("t.csv").write_text(json.dumps(content), "utf-8")
    made = together(imported("--id", "sku", "--category", "kind"))
    assert {row["id"] for row in made} == {str(n) for n in range(len(content))}
    assert all(row["category"] == "hat" and row["positives"] == ["hat/4.jpg"] for row in made)
    content[1] |= {"sku": 0, "kind": ""}
    Path("t.csv").write_text(json.dumps(content), "utf-8")
    with pytest.raises(UserError) as caught:
        main(["t.csv", "--images", "photos", "--output", "x", "--id=sku", "--category=kind"])
    assert "the id '0' is there more than once" in str(caught.value)
    assert "entry 1: category is empty" in str(caught.value)


def test_val_of_its_own(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("t.csv").write_text(text_of(rows()[:8]), "utf-8")
    Path("v.csv").write_text(text_of(rows()[6:]), "utf-8")
    parts = imported("--val", "v.csv")
    assert (len(parts["train"]), len(parts["val"])) == (8, 8)
    assert "1 reference of val are references of train too, such as 'hat/3.jpg'" in caplog.text


def test_all_that_is_wrong_is_one_message(home: Path) -> None:
    Path("photos/hat/5.jpg").write_text("<html>")
    content = rows()
    content[0]["target"] = ""
    content[2]["text"] = " "
    content[4]["target"] = content[4]["reference"]
    content[6]["target"] = "hat/44.jpg"
    Path("t.csv").write_text(text_of(content), "utf-8")
    with pytest.raises(UserError) as caught:
        imported()
    said = str(caught.value)
    for message in (
        "t.csv line 2: target is empty",
        "line 4: text is empty",
        "line 6: reference and target are the same image, 'hat/2.jpg'",
        "line 8: target 'hat/44.jpg' is no image of 'photos'",
        "reference 'hat/5.jpg' is not an image but a web page",
        "--skip_rows N",
    ):
        assert message in said, said
    assert not Path("shop").exists()
    parts = imported("--skip_rows", "8")
    assert len(together(parts)) == len(content) - 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "photos/shop"], "lies in the folder of images"),
        (["--output", "used"], "is a directory that holds something"),
        (["--images", "fotos"], "--images fotos: there is no such directory"),
        (["--val", "1.5"], "is between 0 and 1"),
        (["--val", "v.csv"], "v.csv: there is no such file; there is"),
    ],
)
def test_what_is_refused(home: Path, flags: list[str], message: str) -> None:
    Path("t.csv").write_text(text_of(rows()), "utf-8")
    Path("used").mkdir()
    Path("used/a").touch()
    before = sorted(home.rglob("*"))
    with pytest.raises(UserError, match=message):
        main(["t.csv", "--images", "photos", "--output", "shop", *flags])
    assert sorted(home.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"\x89PNG123", "is no table but an image"),
        (b"\xd0\xcf\x11\xe0123", "workbook of Excel before 2007"),
        (b"PAR1123", "is a damaged Parquet file"),
        (b'{"a": [1], "b": [2]}\n{', "is not JSON"),
        (b'{"a": [{"x": 1}], "b": [{}]}', "an object with several lists of rows: 'a', 'b'"),
        (b'{"ref": "a.jpg", "text": "x", "target": "b.jpg"}', "'a.jpg' is no image of 'photos'"),
        (b'reference,text,target\na,"b', "cannot be read as CSV"),
        (b"reference,text,target\na,b,c,d\n", "has 4 cells, and there are 3 columns"),
        (b"reference,text,target,positives\na,b,c,d\n", "positives is no list: 'd'"),
        (b"reference,text,text,target\na,b,c,d\n", "the column 'text' is there 2 times"),
        (b'[{"reference": {}, "text": 1.5, "target": null}]', "is no name of an image"),
    ],
)
def test_files_that_are_no_table(home: Path, content: bytes, message: str) -> None:
    Path("t.csv").write_bytes(content)
    with pytest.raises(UserError) as caught:
        imported()
    assert message in str(caught.value)


def test_a_disk_that_refuses_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("t.csv").write_text(text_of(rows()), "utf-8")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", refuse)
    with pytest.raises(OSError, match="No space"):
        imported("--copy_images")
    assert sorted(path.name for path in home.iterdir()) == ["photos", "t.csv"]


GROUPS = st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda each: len({*each}) > 1)


@given(GROUPS, st.floats(0.01, 0.99), st.integers(0, 5))
def test_no_reference_is_in_both(groups: list[int], share: float, seed: int) -> None:
    made = [Triple(str(n), ImageId(str(group)), {"n": n}) for n, group in enumerate(groups)]
    train, val = split(made, share, seed)
    assert train and val and {row.where for row in train + val} == {row.where for row in made}
    assert {row.group for row in train}.isdisjoint(row.group for row in val)
    largest = max(groups.count(group) for group in groups)
    bounded = min(max(share * len(made), 1), len(made) - 1)
    assert abs(len(val) - bounded) <= largest
