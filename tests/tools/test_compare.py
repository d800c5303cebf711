"""`cirloop compare`: its numbers against plain sums over the evaluations, what it refuses, and its
page."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.large_report import Made, make_data, settings
from cirloop.artifacts.atomic import write_json
from cirloop.evaluation.significance import holm, over_runs, paired
from cirloop.tools.compare.command import main
from cirloop.types import UserError
from tests.commands import python
from tests.report.pages import read

EVIL = "<img src=x onerror='window.planted = 1'>"
NAME = "<script>planted()</script>"
Change = Callable[[dict[str, Any]], None]


def as_it_is(content: dict[str, Any]) -> None:
    """Leave a made-up evaluation as it is."""


class MadeUp(Made):
    """A run whose evaluations are made up from a seed, then changed."""

    change: Change = staticmethod(as_it_is)

    def evaluation(self, label: str) -> Any:
        build = super().evaluation(label)

        def changed(path: Path) -> None:
            build(path)
            content = json.loads(path.read_text())
            self.change(content)
            write_json(path, content)

        return changed


def made_up(
    home: Path,
    name: str,
    seed: int,
    change: Change = as_it_is,
    queries: int = 40,
    parts: int | None = None,
    **more: Any,
) -> Path:
    """The directory of a run of two iterations on the data set of `home`."""
    if not (home / "data").exists():
        make_data(home / "data", 40, 9, (EVIL, "in red"))
    config = settings(home, 2, seed=seed, **more)
    config = config.model_copy(update={"experiment_dir": home / name})
    run = MadeUp(config, queries, 9, 3)
    run.draw = random.Random(seed)
    run.change = change  # type: ignore[method-assign]
    run.run(parts)
    return config.directory


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: a_1, a_2, b_1, b_2. Read only."""
    directory = tmp_path_factory.mktemp("compared")
    for number, name in enumerate(("a_1", "a_2", "b_1", "b_2")):
        more = {"training": {"learning_rate": 1e-6}} if name.startswith("b") else {}
        made_up(directory, name, 1 + number % 2, **more)
    return directory


def compared(output: Path, *words: object) -> dict[str, Any]:
    main([*map(str, words), "--output_file", str(output)])
    return json.loads(output.read_text())  # type: ignore[no-any-return]


def values(directory: Path, label: str) -> dict[str, float]:
    """The value of each query, by its id."""
    content = json.loads((directory / f"evaluation_{label}.json").read_text())
    return {row[0]: row[2] for row in content["ranks"]}


def references(directory: Path) -> list[str]:
    content = json.loads((directory / "evaluation_iter_0.json").read_text())
    return [row[3] for row in content["ranks"]]


def other(content: dict[str, Any]) -> None:
    """Turn ranks around, so that runs of one seed differ."""
    draw = random.Random(len(content["iteration"]) + int(content["metrics"]["recall@5"] * 1e6))
    for row in content["ranks"]:
        row[1] = draw.choice([1, 1, 2, 7])
        row[2] = float(row[1] == 1)
    rows = content["ranks"]
    content["metrics"]["recall@1"] = sum(row[2] for row in rows) / len(rows)


def test_differences_are_those_of_the_queries(home: Path, tmp_path: Path) -> None:
    paths = [home / "a_1", home / "a_2", made_up(tmp_path, "c", 5)]
    content = compared(tmp_path / "out.json", *paths, "--iterations", "1,2")
    assert [(row["name"], row["iteration"]) for row in content["rows"]] == [
        (str(path), label) for label in "12" for path in paths
    ]
    tests = []
    for label, start in (("1", 0), ("2", 3)):
        first, *others = content["rows"][start : start + 3]
        assert first["difference"] is None
        before = values(paths[0], f"iter_{label}")
        for path, row in zip(paths[1:], others, strict=True):
            after = values(path, f"iter_{label}")
            said = row["difference"]
            gains = {query: after[query] - before[query] for query in before}
            assert said["value"] == pytest.approx(sum(gains.values()) / len(gains))
            assert said["won"] == [query for query, gain in gains.items() if gain > 0]
            assert said["lost"] == [query for query, gain in gains.items() if gain < 0]
            test = paired([*before.values()], [*after.values()], references(path))
            assert (said["se"], said["p"], said["se_over_runs"]) == (test.se, test.p, None)
            tests.append(said)
    assert [row["p_corrected"] for row in tests] == holm([row["p"] for row in tests])


def test_the_best_iteration_of_each_run_is_taken_and_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = compared(tmp_path / "out.json", home / "a_1", home / "a_2")
    for row, name in zip(content["rows"], ("a_1", "a_2"), strict=True):
        [run] = row["runs"]
        recalls = [sum(values(home / name, f"iter_{t}").values()) for t in range(3)]
        assert int(run["iteration"]) == recalls.index(max(recalls))
    assert f"{content['rows'][0]['runs'][0]['iteration']} (best)" in capsys.readouterr().out


def test_groups_are_means_over_runs(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        made_up(tmp_path, f"a_{number}", number)
        made_up(tmp_path, f"b_{number}", number, other)
    words = [f"a={tmp_path}/a_1,{tmp_path}/a_2,{tmp_path}/a_3", f"b={tmp_path}/b_*"]
    content = compared(tmp_path / "out.json", *words, "--iterations", "last")
    a, b = content["rows"]
    recalls = {
        name: [
            sum(of.values()) / len(of)
            for of in (values(tmp_path / f"{name}_{n}", "iter_2") for n in (1, 2, 3))
        ]
        for name in "ab"
    }
    for row, name in ((a, "a"), (b, "b")):
        mean = over_runs(recalls[name])
        assert [run["seed"] for run in row["runs"]] == [1, 2, 3]
        assert row["metrics"]["recall@1"] == pytest.approx(mean.value, abs=1e-6)
        assert row["standard_errors"]["recall@1"] == pytest.approx(mean.se, abs=1e-6)
    gains = [y - x for x, y in zip(recalls["a"], recalls["b"], strict=True)]
    assert b["difference"]["value"] == pytest.approx(sum(gains) / 3)
    assert b["difference"]["se_over_runs"] == pytest.approx(over_runs(gains).se, abs=1e-6)


def test_groups_of_other_seeds_are_independent(tmp_path: Path) -> None:
    for number in (1, 2):
        made_up(tmp_path, f"a_{number}", number)
        made_up(tmp_path, f"b_{number}", 10 + number)
    words = [f"a={tmp_path}/a_1", f"b={tmp_path}/b_1", f"a={tmp_path}/a_2", f"b={tmp_path}/b_2"]
    a, b = compared(tmp_path / "out.json", *words)["rows"]
    errors = [row["standard_errors"]["recall@1"] for row in (a, b)]
    assert b["difference"]["se_over_runs"] == pytest.approx(math.hypot(*errors), abs=1e-5)
    single = compared(tmp_path / "out.json", tmp_path / "a_1", *words[1::2])["rows"][1]
    assert single["difference"]["se_over_runs"] is None


def test_a_group_of_other_settings_is_named(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", "cirloop"):
        compared(tmp_path / "out.json", f"x={home}/a_1,{home}/b_2", f"y={home}/a_2")
    assert "the runs of x differ in more than the seed: training.learning_rate: " in caplog.text
    assert "the runs of y" not in caplog.text and " seed: 1" not in caplog.text


def test_only_shared_queries_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole = made_up(tmp_path, "whole", 1)
    part = made_up(tmp_path, "part", 2, queries=25)
    with caplog.at_level("INFO", "cirloop"):
        content = compared(tmp_path / "out.json", whole, part, "--iterations", "1")
    assert content["shared_queries"] == 25
    before, after = (values(path, "iter_1") for path in (whole, part))
    gains = [after[query] - before[query] for query in after]
    assert content["rows"][1]["difference"]["value"] == pytest.approx(sum(gains) / 25)
    assert "paired over the 25 queries that all share" in caplog.text
    assert f"{whole} 40, {part} 25" in caplog.text


def test_counts_are_told_of_runs_of_one_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = made_up(tmp_path / "a", "run", 1)
    part = made_up(tmp_path / "b", "run", 2, queries=25)
    with caplog.at_level("INFO", "cirloop"):
        compared(tmp_path / "out.json", whole, part, "--iterations", "1")
    assert f"{whole} 40, {part} 25" in caplog.text


def test_names_hold_commas_and_flags_stand_anywhere(home: Path, tmp_path: Path) -> None:
    copies = [tmp_path / name for name in ("rate=1,size=2", "[b],c")]
    for copy in copies:
        shutil.copytree(home / "b_1", copy)
    words = [home / "a_1", "--iterations=0,last", *copies, "--examples", "2"]
    content = compared(tmp_path / "k=1,2.json", *words, f"[x]={home}/b_2,{home}/b_1")
    names = [row["name"] for row in content["rows"]]
    assert names[:4] == names[4:] == [str(home / "a_1"), *map(str, copies), "[x]"]


def rename(content: dict[str, Any]) -> None:
    content["ranks"] = [[f"new/{row[0]}", *row[1:]] for row in content["ranks"]]


def exchange(content: dict[str, Any]) -> None:
    content["ranks"] = [[*row[:3], "000000.jpg"] for row in content["ranks"]]


def test_what_cannot_be_compared_is_one_error(home: Path, tmp_path: Path) -> None:
    small = made_up(tmp_path, "small", 1, lambda content: content.update(gallery=7))
    scored = made_up(
        tmp_path, "scored", 1, lambda content: content.update(split="x_val", compared_on="map@10")
    )
    none = made_up(tmp_path, "none", 1, rename)
    others = made_up(tmp_path, "others", 1, exchange)
    words = [str(path) for path in (home / "a_1", small, scored, none, others)]
    with pytest.raises(UserError, match="4 problems") as error:
        main([*words, "--iterations", "1"])
    message = str(error.value)
    start = f"cannot be compared with {home / 'a_1'}: it"
    assert f"{small}, iteration 1: {start} was evaluated with another number of images" in message
    assert "another split ('x_val', not 'jsonl_val'), another metric that" in message
    assert f"{none}, iteration 1: {start} has no query in common" in message
    assert f"{others}, iteration 1: {start} has other references" in message
    assert "Give --eval_dataset, such as cirr_val, to evaluate all runs on one benchmark" in message


def test_runs_that_are_not_there(home: Path, tmp_path: Path) -> None:
    a = str(home / "a_1")
    with pytest.raises(UserError, match="5 problems") as error:
        main([a, f"{a}/", str(tmp_path / "nowhere"), f"x={tmp_path}/no_*", "=y"])
    message = str(error.value)
    assert "=y: has no name before the =" in message
    assert f"{home}/a_1: is given twice" in message and "there is no such directory" in message
    assert f"{tmp_path}/nowhere: is no run directory (no config.json)" in message
    with pytest.raises(UserError, match="nothing to compare: give two runs"):
        main([a])
    begun = made_up(tmp_path, "begun", 1, parts=2)
    with pytest.raises(UserError, match="2 problems") as error:
        main([a, str(begun), "--iterations", "best,2"])
    assert "no iteration is evaluated yet" in str(error.value)
    assert "--iterations 2: no 2 here" in str(error.value)


@pytest.mark.parametrize("flag", ["--html", "--output_file"])
def test_outputs_are_checked_before_anything_is_read(tmp_path: Path, flag: str) -> None:
    for name, problem in (("no/a", "its directory does not exist"), (".", "is a directory")):
        with pytest.raises(UserError, match=problem):
            main(["nowhere", "else", flag, str(tmp_path / name)])


def test_the_page_has_the_numbers_and_the_images(home: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = [str(home / "a_1"), f"{NAME}={home}/b_1,{home}/b_2"]
    content = compared(tmp_path / "out.json", *words, "--html", page, "--examples", 2)
    seen = read(page.read_text("utf-8"))
    [caption] = [name for name in seen.tables if name.startswith("jsonl_val, percent")]
    heads, first, second = seen.tables[caption]
    difference = content["rows"][1]["difference"]
    assert heads[-3:] == ["p", "won", "lost"] and first[-3:] == ["", "", ""]
    counts = [str(len(difference[name])) for name in ("won", "lost")]
    assert second[0] == f"{NAME} (2 runs)" and second[-2:] == counts
    assert second[-3] == f"{difference['p_corrected']:.4f}"
    assert f"{counts[0]} won, {counts[1]} lost" in seen.text
    assert seen.tags["article"] == sum(min(2, int(count)) for count in counts)
    assert seen.tags["img"] > 20 and "script" not in seen.tags
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    sources = [value for name, value in seen.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:", "#")) for value in sources)
    rows = {row[0]: row[1:] for row in seen.tables["Settings by run"][1:]}
    assert rows["training.learning_rate"][1] == "1e-06" and "seed" not in rows


def test_a_page_without_data_or_examples(tmp_path: Path) -> None:
    runs = [made_up(tmp_path, name, seed) for name, seed in (("a", 1), ("b", 2))]
    (tmp_path / "data").rename(tmp_path / "moved")
    page = tmp_path / "page.html"
    main([*map(str, runs), "--html", str(page)])
    assert "No images. The data set cannot be read" in read(page.read_text("utf-8")).text
    main([*map(str, runs), "--html", str(page), "--data_dir", str(tmp_path / "moved")])
    assert "No images." not in read(page.read_text("utf-8")).text
    main([*map(str, runs), "--html", str(page), "--examples", "0"])
    assert "article" not in read(page.read_text("utf-8")).tags


def test_a_simulated_run_is_marked(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = made_up(tmp_path, "drawn", 1, retrieval="simulated", model={"type": "simulated"})
    content = compared(tmp_path / "out.json", home / "a_1", drawn)
    assert content["simulated"] is True
    assert capsys.readouterr().out.startswith("SIMULATED: ")


def test_it_loads_no_torch() -> None:
    code = "import sys, cirloop.tools.compare.command, cirloop.tools.compare.page as p;"
    done = python("-c", f"{code} print('torch' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
