"""Rankings of any system scored from outside, on the real annotations."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cirloop.cli.score_rankings import score_rankings
from cirloop.data import benchmarks, circo, cirr, fashioniq, splits
from cirloop.types import UserError
from cirloop.validation import ValidationReport
from tests.commands import command

ROOT = Path(__file__).resolve().parents[2]


def real(name: str) -> Path:
    directory = ROOT.parent / "shared" / "data" / name
    if not directory.is_dir():
        pytest.skip(f"the real annotations are not at {directory}")
    return directory


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("name", "queries", "images"),
    [
        ("cirr_val", *cirr.OFFICIAL["val"]),
        ("fashioniq_val:dress", *fashioniq.OFFICIAL["val"]["dress"]),
        ("fashioniq_val:toptee", *fashioniq.OFFICIAL["val"]["toptee"]),
        ("circo_val", circo.OFFICIAL["val"][0], None),
    ],
)
def test_real_annotations_have_the_official_counts(
    name: str, queries: int, images: int | None
) -> None:
    problems = ValidationReport()
    [part] = benchmarks.load_queries(name, real(name.split("_")[0]), "original", problems)
    assert not problems.rows
    assert len(part.queries) == queries
    assert (len(part.gallery.ids) if part.gallery else None) == images
    assert part.relevance is not None and len(part.relevance.targets) == queries
    assert splits.official_size_warning(part) == ""


@pytest.mark.real_data
def test_the_union_gallery_has_the_references_and_targets() -> None:
    for category in ("dress", "toptee"):
        [part] = benchmarks.load_queries(
            f"fashioniq_val:{category}", real("fashioniq"), "union", ValidationReport()
        )
        assert part.gallery is not None and len(part.gallery.ids) == fashioniq.UNION[category]


def test_captions_are_joined_as_in_clip4cir() -> None:
    assert fashioniq.join_captions(["is shiny.", "has, sleeves? "]) == "Is shiny and has, sleeves"
    assert fashioniq.join_captions(["", "is red"]) == "Is red"
    assert fashioniq.join_captions(["..", ""]) == ""


@pytest.mark.real_data
def test_circo_equals_the_papers_formula(tmp_path: Path) -> None:
    """Random lists over right and wrong images, the reference among them; the oracle is written out
    here."""
    directory, draw = real("circo"), random.Random(0)
    entries = read(directory / "annotations" / "val.json")
    rankings = {}
    for entry in entries:
        pool = {*entry["gt_img_ids"], entry["reference_img_id"], *draw.sample(range(10**6), 70)}
        rankings[str(entry["id"])] = draw.sample(sorted(pool), 50)
    (tmp_path / "rankings.json").write_text(json.dumps(rankings))
    out = tmp_path / "out.json"
    score_rankings(tmp_path / "rankings.json", "circo_val", directory, output_file=out)
    found = read(out)
    assert found["num_queries"] == 220 and found["protocol"]

    def ap(entry: dict[str, Any], k: int) -> float:
        right, ranking = set(entry["gt_img_ids"]), rankings[str(entry["id"])]
        precisions = [
            sum(image in right for image in ranking[:n]) / n
            for n in range(1, k + 1)
            if ranking[n - 1] in right
        ]
        return sum(precisions) / min(k, len(right))

    for k in (5, 10, 25, 50):
        oracle = sum(ap(entry, k) for entry in entries) / len(entries)
        assert 0.01 < oracle < 0.5
        assert abs(found["metrics"][f"map@{k}"] - oracle) < 1e-9
        hits = sum(entry["target_img_id"] in rankings[str(entry["id"])][:k] for entry in entries)
        assert abs(found["metrics"][f"recall@{k}"] - hits / len(entries)) < 1e-9
    with_negation = [entry for entry in entries if "negation" in entry["semantic_aspects"]]
    oracle = sum(ap(entry, 10) for entry in with_negation) / len(with_negation)
    assert abs(found["metrics"]["map@10, negation"] - oracle) < 1e-9


@pytest.mark.real_data
def test_cirr_removes_the_reference_and_ranks_the_group(tmp_path: Path) -> None:
    """Each list is the whole gallery, half of the time with the reference first."""
    directory, draw = real("cirr"), random.Random(0)
    entries = read(directory / "captions" / "cap.rc2.val.json")
    names = sorted(read(directory / "image_splits" / "split.rc2.val.json"))
    rankings = {}
    for entry in entries:
        order = sorted(draw.sample(names, 60) + entry["img_set"]["members"])
        order = draw.sample(sorted(set(order)), len(set(order)))
        if draw.random() < 0.5:
            order.remove(entry["reference"])
            order.insert(0, entry["reference"])
        rankings[str(entry["pairid"])] = order
    path = tmp_path / "rankings.json"
    path.write_text(json.dumps(rankings))
    found = score_rankings(path, "cirr_val", directory)["metrics"]
    for k in (1, 5, 10, 50):
        hits = 0
        for entry in entries:
            order = [n for n in rankings[str(entry["pairid"])] if n != entry["reference"]]
            hits += entry["target_hard"] in order[:k]
        assert found[f"recall@{k}"] == pytest.approx(hits / len(entries), abs=1e-12)
    for k in (1, 2, 3):
        hits = 0
        for entry in entries:
            group = [m for m in entry["img_set"]["members"] if m != entry["reference"]]
            order = [n for n in rankings[str(entry["pairid"])] if n in group]
            hits += entry["target_hard"] in order[:k]
        assert found[f"recall_subset@{k}"] == pytest.approx(hits / len(entries), abs=1e-12)
    assert 0.17 < found["recall_subset@1"] < 0.23  # a random ranker has 20%


@pytest.mark.real_data
def test_the_two_submission_files_of_cirr_are_scored_for_their_own_recall(tmp_path: Path) -> None:
    directory = real("cirr")
    entries = read(directory / "captions" / "cap.rc2.val.json")
    perfect: dict[str, Any] = {"version": "rc2", "metric": "recall_subset"}
    perfect |= {str(e["pairid"]): [e["target_hard"]] for e in entries}
    (tmp_path / "subset.json").write_text(json.dumps(perfect))
    found = score_rankings(tmp_path / "subset.json", "cirr_val", directory)
    assert found["metrics"] == {f"recall_subset@{k}": 1.0 for k in (1, 2, 3)}
    assert "note" not in found
    (tmp_path / "recall.json").write_text(json.dumps(perfect | {"metric": "recall"}))
    found = score_rankings(tmp_path / "recall.json", "cirr_val", directory)
    assert found["metrics"] == {f"recall@{k}": 1.0 for k in (1, 5, 10, 50)}


@pytest.mark.real_data
def test_the_command_writes_fractions(tmp_path: Path) -> None:
    directory = real("fashioniq")
    entries = read(directory / "captions" / "cap.dress.val.json")
    rankings = {str(n): [e["candidate"], e["target"]] for n, e in enumerate(entries)}
    (tmp_path / "rankings.json").write_text(json.dumps(rankings))
    flags = ["--rankings", tmp_path / "rankings.json", "--output_file", tmp_path / "o.json"]
    flags += ["--eval_dataset", "fashioniq_val:dress", "--data_dir", directory]
    done = command("eval_iterative.py", *flags)
    assert done.returncode == 0, done.stderr
    assert "original gallery" in done.stdout
    found = read(tmp_path / "o.json")
    assert found["metrics"]["recall@10"] == 1 and found["num_queries"] == 2017
    assert found["gallery"] == {"dress": 3817} and found["standard_errors"]["recall@10"] == 0


def small_cirr(directory: Path) -> Path:
    """Two queries over one group of six and two more images, in CIRR's layout, with rankings
    beside."""
    names = [f"dev-{n}" for n in range(8)]
    (directory / "captions").mkdir(parents=True)
    (directory / "image_splits").mkdir()
    (directory / "image_splits" / "split.rc2.val.json").write_text(
        json.dumps({n: f"./dev/{n}.png" for n in names})
    )
    entries = [
        {
            "pairid": number,
            "reference": names[number],
            "target_hard": names[number + 1],
            "caption": "with a hat",
            "img_set": {"id": 1, "members": names[:6]},
        }
        for number in range(2)
    ]
    (directory / "captions" / "cap.rc2.val.json").write_text(json.dumps(entries))
    (directory / "rankings.json").write_text(json.dumps({str(n): names for n in range(2)}))
    return directory


def rewritten(name: str, change: Callable[[Any], object]) -> Callable[[Path], object]:
    def apply(directory: Path) -> None:
        content = read(directory / name)
        change(content)
        (directory / name).write_text(json.dumps(content))

    return apply


CAPTIONS, SPLIT = "captions/cap.rc2.val.json", "image_splits/split.rc2.val.json"
RANKINGS = "rankings.json"


def entry(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """The first of the annotations changed."""
    return rewritten(CAPTIONS, lambda entries: change(entries[0]))


def has(**fields: Any) -> Callable[[Path], object]:
    return entry(lambda first: first.update(fields))


def lacks(field: str) -> Callable[[Path], object]:
    return entry(lambda first: first.pop(field))


def ranks(**rows: Any) -> Callable[[Path], object]:
    """Rankings of queries q0 and q1, and other keys."""
    renamed = {name.removeprefix("q"): row for name, row in rows.items()}
    return rewritten(RANKINGS, lambda content: content.update(renamed))


def raw(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes(content)


def gone(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


WHOLE = "'pairid' must be a whole number, found"
NO_LIST = "1 queries have no list of image ids: 0"
RUBBISH: dict[str, tuple[Callable[[Path], object], str]] = {
    "no annotations": (gone(CAPTIONS), "cap.rc2.val.json: there is no such file"),
    "no split file": (gone(SPLIT), "split.rc2.val.json: there is no such file"),
    "annotations not JSON": (raw(CAPTIONS, b"[{"), "is not JSON"),
    "annotations not UTF-8": (raw(CAPTIONS, b"\xff\xfe"), "is not UTF-8 text"),
    "annotations nested": (raw(CAPTIONS, b"[" * 200_000), "is not JSON"),
    "annotations an object": (
        raw(CAPTIONS, b'{"a": 1}'),
        "must be a list of objects, found an object",
    ),
    "annotations empty": (raw(CAPTIONS, b"[]"), "holds no entries"),
    "entry not an object": (
        rewritten(CAPTIONS, lambda entries: entries.append(3)),
        "entry 2: must be an object, found a whole number",
    ),
    "no pairid": (lacks("pairid"), "entry 0: has no 'pairid'"),
    "pairid text": (has(pairid="x"), f"{WHOLE} text"),
    "pairid true": (has(pairid=True), f"{WHOLE} true or"),
    "pairid twice": (
        rewritten(CAPTIONS, lambda entries: entries[1].update(pairid=0)),
        "pairid 0 is there more than once",
    ),
    "caption null": (has(caption=None), "'caption' must be text, found null"),
    "no target": (lacks("target_hard"), "entry 0: has no 'target_hard'"),
    "unknown reference": (has(reference="dev-9"), "reference 'dev-9' is not in split"),
    "unknown target": (has(target_hard="dev-9"), "target_hard 'dev-9' is not in split"),
    "target is reference": (has(target_hard="dev-0"), "are the same image, 'dev-0'"),
    "target outside group": (has(target_hard="dev-7"), "not among img_set's members"),
    "five members": (
        entry(lambda first: first["img_set"]["members"].pop()),
        "six different members, found 5",
    ),
    "members not text": (
        entry(lambda first: first["img_set"].update(members=[1])),
        "must hold only text",
    ),
    "no group": (lacks("img_set"), "entry 0: has no 'img_set'"),
    "split file a list": (raw(SPLIT, b"[]"), "must be an object of image name -> path"),
    "split file with a double": (
        raw(SPLIT, b'{"a": "x", "a": "y"}'),
        "the key 'a' is there more than once",
    ),
    "no rankings": (gone(RANKINGS), "rankings.json: there is no such file"),
    "rankings a directory": (lambda d: a_directory(d / RANKINGS), "is a directory, not a file"),
    "rankings a list": (
        raw(RANKINGS, b"[1]"),
        "must be an object {query id: [image ids, best first]}",
    ),
    "query not ranked": (
        rewritten(RANKINGS, lambda rows: rows.pop("1")),
        "1 of 2 queries are not ranked: 1",
    ),
    "unknown query": (ranks(x=["dev-1"]), "1 query is unknown: x"),
    "ranking not a list": (ranks(q0="dev-1"), NO_LIST),
    "ranking empty": (ranks(q0=[]), NO_LIST),
    "ranking with a number": (ranks(q0=[1.5]), NO_LIST),
    "image twice": (
        rewritten(RANKINGS, lambda rows: rows["0"].append("dev-1")),
        "1 queries list an image more than once: 0",
    ),
    "unknown image": (
        rewritten(RANKINGS, lambda rows: rows["1"].append("dev-9")),
        "does not have: 'dev-9' of query 1",
    ),
    "wrong version": (ranks(version="rc1"), "'version' must be 'rc2', found 'rc1'"),
    "wrong metric": (ranks(metric="map"), "'metric' must be 'recall' or 'recall_subset'"),
}


@pytest.mark.parametrize("name", RUBBISH)
def test_each_kind_of_rubbish_is_named(name: str, tmp_path: Path) -> None:
    directory = small_cirr(tmp_path / "cirr")
    spoil, message = RUBBISH[name]
    spoil(directory)
    out = tmp_path / "out.json"
    with pytest.raises(UserError) as caught:
        score_rankings(directory / "rankings.json", "cirr_val", directory, output_file=out)
    assert message in str(caught.value)
    assert not out.exists()


def test_what_is_not_spoiled_is_scored(tmp_path: Path) -> None:
    directory = small_cirr(tmp_path)
    found = score_rankings(directory / "rankings.json", "cirr_val", directory)["metrics"]
    assert found["recall@1"] == 0.5  # dev-1 for dev-0; dev-0 comes before dev-2
    assert found["recall@5"] == 1


def test_other_counts_than_the_official_ones_are_told(tmp_path: Path) -> None:
    cirr_at = small_cirr(tmp_path)
    [part] = benchmarks.load_queries("cirr_val", cirr_at, "original", ValidationReport())
    said = "cirr_val has 2 queries and 8 images, officially 4,181 and 2,297"
    assert said in splits.official_size_warning(part)


def test_several_problems_are_reported_together(tmp_path: Path) -> None:
    directory = small_cirr(tmp_path)
    for name in ("caption null", "pairid twice", "unknown target", "split file a list"):
        RUBBISH[name][0](directory)
    with pytest.raises(UserError) as caught:
        score_rankings(directory / "rankings.json", "cirr_val", directory)
    # with the split file unreadable no image can be called unknown; the target is outside its group
    # all the same. Of the entry without a text no query is made, so the next one's pairid is no
    # double.
    said = str(caught.value)
    assert "3 problems" in said and "'caption' must be text" in said
    assert "not among img_set's members" in said and "must be an object of image name" in said


CIRR = "--rankings y --eval_dataset cirr_val --data_dir ."


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "give one of the two"),
        ("--experiment_dir x --rankings y", "give one of the two"),
        ("--rankings y", "--data_dir: is needed with --rankings"),
        ("--experiment_dir x --data_dir y", "x is no run directory"),
        ("--rankings y --eval_dataset circo_val --data_dir no", "there is no such directory"),
        (CIRR.replace("cirr", "cirrr"), "There are: cirr_val, cirr_test,"),
        (f"{CIRR} --iterations 1", "--iterations"),
        (f"{CIRR} --output_file no/o", "its directory"),
    ],
)
def test_wrong_flags_end_with_one_error(flags: str, message: str) -> None:
    done = command("eval_iterative.py", *flags.split())
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.real_data
def test_cirr_submission_files_have_the_servers_form_and_the_same_scores(tmp_path: Path) -> None:
    directory, draw = real("cirr"), random.Random(0)
    entries = read(directory / "captions" / "cap.rc2.val.json")
    names = sorted(read(directory / "image_splits" / "split.rc2.val.json"))
    rankings = {}
    for entry in entries:
        order = sorted({*draw.sample(names, 60), *entry["img_set"]["members"]})
        rankings[str(entry["pairid"])] = draw.sample(order, len(order))
    path = tmp_path / "rankings.json"
    path.write_text(json.dumps(rankings))
    whole = score_rankings(path, "cirr_val", directory, submission_dir=tmp_path / "server")
    assert whole["submission"] == ["cirr_val_recall.json", "cirr_val_recall_subset.json"]
    for metric, count in (("recall", 50), ("recall_subset", 3)):
        file = tmp_path / "server" / f"cirr_val_{metric}.json"
        rows = read(file)
        assert (rows.pop("version"), rows.pop("metric")) == ("rc2", metric)
        assert set(rows) == {str(entry["pairid"]) for entry in entries}
        for entry in entries:
            row = rows[str(entry["pairid"])]
            assert len(row) == len(set(row)) == count and entry["reference"] not in row
            assert set(row) <= set(names if metric == "recall" else entry["img_set"]["members"])
        assert file.stat().st_size <= 5_000_000
        again = score_rankings(file, "cirr_val", directory)["metrics"]
        assert again == {
            name: v for name, v in whole["metrics"].items() if name.startswith(f"{metric}@")
        }


@pytest.mark.real_data
def test_circo_submission_scores_the_same(tmp_path: Path) -> None:
    directory, draw = real("circo"), random.Random(1)
    rankings = {}
    for entry in read(directory / "annotations" / "val.json"):
        pool = sorted({*entry["gt_img_ids"], *draw.sample(range(10**6), 70)})
        rankings[str(entry["id"])] = draw.sample(pool, len(pool))
    (tmp_path / "rankings.json").write_text(json.dumps(rankings))
    file, server = tmp_path / "rankings.json", tmp_path / "circo_val.json"
    whole = score_rankings(file, "circo_val", directory, submission_dir=tmp_path)
    for row in read(server).values():
        assert len(row) == 50 and all(isinstance(image, int) for image in row)
    assert score_rankings(server, "circo_val", directory)["metrics"] == whole["metrics"]


def unlabelled(directory: Path) -> Path:
    """`small_cirr` with its entries as test1, without targets, and 60 more images."""
    small_cirr(directory)
    names = read(directory / SPLIT) | {f"test1-{n}": f"./test1/{n}.png" for n in range(60)}
    (directory / "image_splits" / "split.rc2.test1.json").write_text(json.dumps(names))
    entries = read(directory / CAPTIONS)
    for entry in entries:
        del entry["target_hard"]
    (directory / "captions" / "cap.rc2.test1.json").write_text(json.dumps(entries))
    (directory / "rankings.json").write_text(json.dumps({str(n): sorted(names) for n in range(2)}))
    return directory


def test_a_split_without_targets_gives_files_and_no_scores(tmp_path: Path) -> None:
    directory = unlabelled(tmp_path / "cirr")
    file, server = directory / "rankings.json", tmp_path / "s"
    found = score_rankings(file, "cirr_test", directory, submission_dir=server)
    assert "metrics" not in found and "no scores" in found["note"]
    assert score_rankings(file, "cirr_test", directory) == found
    for name in found["submission"]:
        beside = directory / "rankings_submission" / name
        assert beside.read_bytes() == (server / name).read_bytes()
    assert len(read(server / "cirr_test_recall.json")["0"]) == 50
    assert read(server / "cirr_test_recall_subset.json")["0"] == ["dev-1", "dev-2", "dev-3"]


def test_what_the_server_would_refuse_is_not_written(tmp_path: Path) -> None:
    directory = unlabelled(tmp_path / "cirr")
    short = {"0": [f"test1-{n}" for n in range(60)], "1": [f"test1-{n}" for n in range(49)]}
    (directory / "rankings.json").write_text(json.dumps(short))
    with pytest.raises(UserError) as caught:
        score_rankings(
            directory / "rankings.json", "cirr_test", directory, submission_dir=tmp_path / "s"
        )
    assert "recall: 1 queries rank fewer than 50 images: 1 (49)" in str(caught.value)
    few = "recall_subset: 2 queries rank fewer than 3 images of their group: 0 (0), 1 (0)"
    assert few in str(caught.value)
    assert not (tmp_path / "s").exists()


def test_fashioniq_has_no_server(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fashioniq has no server; cirr and circo have"):
        score_rankings(tmp_path / "r.json", "fashioniq_val", tmp_path, submission_dir=tmp_path)
