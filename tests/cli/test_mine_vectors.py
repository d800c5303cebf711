"""Mining from vectors alone: the files it reads and writes, every strategy by name, and what is
wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cirloop.cli.mine_embeddings import main, parse
from cirloop.negatives import STRATEGIES, Band, MiningSettings
from cirloop.negatives.base import MiningContext
from cirloop.negatives.miner import MiningInputs, mine
from cirloop.types import UserError
from tests.commands import command

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """40 queries over 60 images of 16 dimensions, and all that any strategy asks for."""
    random = np.random.default_rng(0)
    gallery = random.standard_normal((60, 16)).astype(np.float32)
    gallery /= np.linalg.norm(gallery, axis=1, keepdims=True)
    targets = random.integers(0, 60, 40)
    np.save(tmp_path / "g.npy", gallery.astype(np.float16))
    noise = random.standard_normal((40, 16)).astype(np.float32)
    np.save(tmp_path / "q.npy", gallery[targets] + 0.4 * noise)
    np.save(tmp_path / "x.npy", random.standard_normal((40, 16)).astype(np.float32))
    np.save(tmp_path / "t.npy", targets)
    np.save(tmp_path / "r.npy", (targets + 1) % 60)
    (tmp_path / "p.json").write_text(json.dumps({"3": [5, 6], "0": []}))
    groups = [[(t + 2) % 60, (t + 3) % 60] for t in targets.tolist()]
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    (tmp_path / "c.json").write_text(json.dumps(["shoe", "hat"] * 30))
    return tmp_path


NEEDED = "--query-embeddings q.npy --gallery-embeddings g.npy --targets t.npy --output out.json"


def words(files: Path, flags: str) -> list[str]:
    """Names of files with their directory."""
    ends = (".npy", ".json")
    return [str(files / word) if word.endswith(ends) else word for word in flags.split()]


def flags(files: Path, *more: str) -> list[str]:
    return [*words(files, NEEDED), *more]


def mined(files: Path, *more: str) -> list[dict[str, Any]]:
    main(flags(files, *more))
    rows: list[dict[str, Any]] = json.loads((files / "out.json").read_text())
    return rows


def scores(files: Path) -> Any:
    return np.load(files / "q.npy") @ np.load(files / "g.npy").astype(np.float32).T


def test_top_k_gives_the_images_above_the_target(files: Path) -> None:
    rows = mined(files, "--negatives-per-query", "4")
    every, targets = scores(files), np.load(files / "t.npy")
    assert [row["query"] for row in rows] == list(range(40))
    for i, row in enumerate(rows):
        order = np.argsort(-every[i], kind="stable").tolist()
        assert row["target_rank"] == order.index(targets[i]) + 1
        assert [n["image"] for n in row["negatives"]] == order[: min(4, row["target_rank"] - 1)]
        assert [n["rank"] for n in row["negatives"]] == list(range(1, len(row["negatives"]) + 1))
        for n in row["negatives"]:
            assert n["score"] == pytest.approx(every[i, n["image"]], abs=2e-6)


def test_references_and_positives_are_left_out(files: Path) -> None:
    options = "--extra-ranks all --negatives-per-query 60 --references r.npy"
    rows = mined(files, *words(files, f"{options} --positives p.json"))
    targets, references = np.load(files / "t.npy"), np.load(files / "r.npy")
    for i, row in enumerate(rows):
        out = {int(targets[i]), int(references[i]), *([5, 6] if i == 3 else [])}
        assert {n["image"] for n in row["negatives"]} == set(range(60)) - out
    kept = mined(files, *words(files, f"{options} --rank-reference"))
    assert references[0] in {n["image"] for n in kept[0]["negatives"]}


def test_band_saves_its_sets(files: Path) -> None:
    rows = mined(files, "--strategy", "band", "--save-sets", "--negatives-per-query", "2")
    for row in rows:
        assert row["set"] and {n["image"] for n in row["negatives"]} <= set(row["set"])
        assert len(row["negatives"]) == min(2, len(row["set"]))
    assert "set" not in mined(files, "--strategy", "band")[0]


def test_band_counts_queries_without_two_cliffs() -> None:
    """Two images below the target are too few for two drops; ten are not."""
    queries = np.float32([[3, 2, 1], [1, 3, 2]])
    vectors = MiningInputs(queries, np.eye(3, dtype=np.float32), np.array([0, 0]))
    stats: dict[str, Any] = {}
    settings = MiningSettings(strategy=Band())
    found = list(mine(settings, vectors, MiningContext(0), sets=True, stats=stats))
    assert stats == {"whole_tail": 1}
    sets = [f.candidate_set.tolist() for f in found if f.candidate_set is not None]
    assert sets == [[1, 2], []]


@pytest.mark.parametrize("strategy", sorted(set(STRATEGIES) - {"mixture", "curriculum"}))
def test_every_strategy_runs_or_says_what_it_lacks(strategy: str, files: Path) -> None:
    more = words(files, "--text-embeddings x.npy --groups groups.json --categories c.json")
    if strategy == "near_reference":
        with pytest.raises(UserError, match=r"needs references_Q \(--references"):
            main(flags(files, "--strategy", strategy))
        more += words(files, "--references r.npy")
    if strategy in ("category_discrepant", "attribute_mismatch", "soft"):
        with pytest.raises(UserError, match=r"needs .*attributes"):
            main(flags(files, "--strategy", strategy, *more))
        assert not (files / "out.json").exists()
        return
    first = mined(files, "--strategy", strategy, *more)
    assert len(first) == 40 and (any(row["negatives"] for row in first) or strategy == "none")
    assert mined(files, "--strategy", strategy, *more) == first, "two runs of one seed differ"


@pytest.mark.parametrize("strategy", ["top_k", "band", "semantic"])
def test_a_gallery_in_many_files(strategy: str, files: Path) -> None:
    """Cut into files it gives the same, by directory and by pattern."""
    more = ["--strategy", strategy, "--text-embeddings", str(files / "x.npy")]
    whole, gallery = mined(files, *more), np.load(files / "g.npy")
    (files / "g").mkdir()
    for number, part in enumerate(np.array_split(gallery, 12)):
        np.save(files / "g" / f"{number}.npy", part)
    for path in ("g", "g/*.npy"):
        assert mined(files, *more, "--gallery-embeddings", str(files / path)) == whole
    with pytest.raises(UserError, match=r"no\*\.npy: has no \.npy files"):
        mined(files, "--gallery-embeddings", str(files / "no*.npy"))


def test_an_index_has_settings(files: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    search = "--search ivf_pq --index.nlist 3 --index.nprobe 3 --index.m 8 --index.nbits 4".split()
    rows = mined(files, "--extra-ranks", "all", "--negatives-per-query", "3", *search)
    assert all(len(row["negatives"]) == 3 for row in rows) and "of the exact best" in caplog.text
    with pytest.raises(UserError, match="nlist does nothing with search: exact"):
        mined(files, "--index.nlist", "3")


def test_a_fallback_is_counted(files: Path) -> None:
    rows = mined(files, "--fallback", "random", "--negatives-per-query", "3")
    assert all(len(row["negatives"]) == 3 for row in rows)
    assert all(row.get("filled", 0) == max(0, 4 - row["target_rank"]) for row in rows)


def save(name: str, made: Any) -> Callable[[Path], object]:
    return lambda files: np.save(files / name, made)


def text(name: str, content: str) -> Callable[[Path], object]:
    return lambda files: (files / name).write_text(content)


def nothing(files: Path) -> None:
    pass


NAN = np.full((40, 16), np.nan, np.float32)
ONES = np.ones((40, 16), np.float32)
OUTSIDE = "40 rows are outside 0 .. 59, the first:"
WRONG: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no queries": (
        lambda f: (f / "q.npy").unlink(),
        "",
        "--query-embeddings .*q.npy: there is no such file",
    ),
    "no array": (text("g.npy", "hello"), "", "--gallery-embeddings .*g.npy: is not a .npy array"),
    "objects": (save("q.npy", np.array([{}], object)), "", "is not a .npy array .*Python objects"),
    "NaN": (save("q.npy", NAN), "", "--query-embeddings: row 0 is not finite"),
    "doubles": (
        save("q.npy", NAN.astype(float)),
        "",
        "--query-embeddings: must be a float16 or float32 array .* found float64.*astype",
    ),
    "other width": (save("q.npy", ONES[:, :3]), "", "has 3 dimensions, --gallery-embeddings 16"),
    "no rows": (save("q.npy", ONES[:0]), "", "must have at least one row each"),
    "too few targets": (
        save("t.npy", np.arange(3)),
        "",
        "--targets: must be 40 whole numbers in one dimension",
    ),
    "targets no numbers": (
        save("t.npy", np.ones(40)),
        "",
        "--targets: must be 40 whole numbers .* found float64",
    ),
    "target outside": (save("t.npy", np.full(40, 60)), "", f"{OUTSIDE} 60 of query 0"),
    "target negative": (save("t.npy", np.full(40, -1)), "", f"{OUTSIDE} -1 of query 0"),
    "positives no list": (
        text("p.json", "3"),
        "--positives p.json",
        "--positives: must hold a list of gallery",
    ),
    "positives unknown": (
        text("p.json", '{"99": []}'),
        "--positives p.json",
        "1 query is unknown, the first: '99'",
    ),
    "positives outside": (
        text("p.json", '{"0": [60]}'),
        "--positives p.json",
        "query 0: must be gallery rows",
    ),
    "categories short": (
        text("c.json", "[]"),
        "--categories c.json",
        "--categories: must be a list of 60 names",
    ),
    "texts short": (save("x.npy", NAN[:2]), "--text-embeddings x.npy", "row 0 is not finite"),
    "no such strategy": (
        nothing,
        "--strategy best",
        "--strategy must be one of attribute_mismatch, band,",
    ),
    "no such setting": (nothing, "--marginn 3", "unrecognized arguments"),
    "k of 0": (
        nothing,
        "--negatives-per-query 0",
        "--negatives-per-query: Input should be greater",
    ),
    "index without search": (
        nothing,
        "--index.nprobe 3",
        "settings: index: nprobe does nothing with search: exact\nAll flags: .*top_k --help",
    ),
    "no such part": (nothing, """--index {"foo":1}""", r"--index\.foo: unknown setting"),
    "no directory": (
        nothing,
        "--output none/out.json",
        "--output .*: its directory does not exist",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_each_mistake_is_named_and_nothing_written(name: str, files: Path) -> None:
    spoil, more, message = WRONG[name]
    spoil(files)
    with pytest.raises(UserError, match=message):
        main(flags(files, *words(files, more)))
    assert not (files / "out.json").exists()


def test_mistakes_come_together_with_one_exit_code(files: Path) -> None:
    np.save(files / "t.npy", np.full(40, 60))
    np.save(files / "q.npy", np.ones((40, 3), np.float32))
    done = command("add_hard_negatives.py", *flags(files))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "2 problems" in done.stderr and "has 3 dimensions" in done.stderr
    assert "outside 0 .. 59" in done.stderr


def test_a_flag_that_is_needed_is_named_with_what_it_is() -> None:
    with pytest.raises(UserError) as caught:
        parse(["--query_embeddings", "q.npy", "--negatives-per-query", "0"])
    said = str(caught.value)
    assert "--gallery-embeddings: is needed: Gallery" in said
    assert "--targets: is needed: The gallery row" in said and "--output: is" in said
    assert "--negatives-per-query: " in said and "Field required" not in said
