"""`report.html`: what stands in it is what the artifacts say, and it is whole whatever is missing
or planted."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.large_report import Made, make_data, settings
from cirloop.artifacts import run_lock
from cirloop.artifacts.atomic import write_json
from cirloop.artifacts.store import file_digests
from cirloop.config.run import RunConfig
from cirloop.config.run_dir import run_directory
from cirloop.data.known_positives import SAID_RIGHT
from cirloop.monitoring.stage_names import stage_words
from cirloop.report import legend, query_changes, report_data
from cirloop.report.builder import rebuild, write_report
from cirloop.report.charts import Table, draw, name_ticks
from cirloop.report.metrics_section import plot_metrics
from cirloop.types import ImageId, Query, QueryId, UserError
from tests.commands import command
from tests.report.pages import Page, read

EVIL = (
    "<script>window.planted = 1</script>",
    "<img src=x onerror='window.planted = 1'>",
    "</figcaption><h1>no</h1>",
    "{{ 7 * 7 }} \x1b[31m \u202e red",
    '"><svg onload=window.planted=1>',
)


def content(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def made(
    home: Path,
    iterations: int = 2,
    parts: int | None = None,
    queries: int = 12,
    images: int = 9,
    **changes: Any,
) -> RunConfig:
    """A made-up run of a model that is nowhere, and its data."""
    make_data(home / "data", queries, images, EVIL)
    config = settings(home, iterations, **changes)
    Made(config, queries, images, 3).run(parts)
    return config


def page_of(config: RunConfig) -> Page:
    return read(rebuild(config).read_text("utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Read only."""
    return made(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def copied(whole: RunConfig, tmp_path: Path) -> RunConfig:
    shutil.copytree(
        whole.directory.parent,
        tmp_path / "copy",
        ignore=shutil.ignore_patterns("report.html", "figures"),
    )
    place = {"data_dir": tmp_path / "copy" / "data", "experiment_dir": tmp_path / "copy" / "run"}
    return whole.model_copy(update=place)


def test_a_run_leaves_a_report_with_the_numbers_of_its_results(finished: Path) -> None:
    page = read((finished / "report.html").read_text("utf-8"))
    results = content(finished / "evaluation_results.json")
    heads, *rows = page.tables["Fractions ± standard errors"]
    assert heads == ["iteration", "recall@1", "recall@5", "recall@10", "recall@50"]
    assert rows == [
        [r["iteration"], *(f"{r['metrics'][m]} ± {r['standard_errors'][m]}" for m in heads[1:])]
        for r in results["results"]
    ]
    captions = [name for name in page.tables if name.startswith("Each iteration against")]
    [compared] = [page.tables[caption] for caption in captions]
    expected = [f"{c['p_corrected']:.4f}" for c in results["compared"]]
    assert [row[2] for row in compared[1:]] == expected
    assert len(compared) == 3
    assert "Finished." in page.text and "Still missing" not in page.text


def test_won_and_lost_are_counted_query_by_query(finished: Path) -> None:
    page = read((finished / "report.html").read_text("utf-8"))
    names = ("base", "iter_0", "iter_1")
    ranks = [content(finished / f"evaluation_{name}.json")["ranks"] for name in names]
    rows = {row[0]: row[1:] for row in page.tables["Queries won and lost by recall@1"][1:]}
    for label, a, b in (("base → 0", 0, 1), ("0 → 1", 1, 2), ("base → 1", 0, 2)):
        pairs = Counter((x[1] > 1) - (y[1] > 1) for x, y in zip(ranks[a], ranks[b], strict=True))
        assert rows[label] == [str(pairs[n]) for n in (1, -1, 0)], label


def test_right_images_beside_the_target_are_marked() -> None:
    query = Query(QueryId("q"), ImageId("r"), "in red")
    images = [ImageId(name) for name in ("a", "target", "b")]
    positives = {query.id: frozenset(images[1:])}
    split = report_data.SplitLookup({query.id: query}, {query.id: images[1]}, [], positives)
    data = SimpleNamespace(eval_split=split)
    evaluated = SimpleNamespace(queries=["q"], ranks_Q=[2], label="0")
    tops = [{0: images}, {}]
    pair = (evaluated, evaluated)
    card = query_changes.card(
        data, pair, 0, True, tops, report_data.Thumbnails(), ("before", "after")
    )
    (_, before), (_, after) = card.rows
    assert after is None and before is not None
    assert [image.caption for image in before] == ["1", "2: the target", "3: right"]
    assert [image.frame for image in before] == ["", "right", "right"]


def test_best_images_agree_with_the_ranks(finished: Path) -> None:
    """The reference is not among them, and a target of rank r is the r-th."""
    config, store = run_directory(finished)
    [part] = _data(config).eval_splits("val")
    assert part.relevance is not None
    evaluation = store.load("evaluation_iter_1.json").read()
    seen = 0
    for query, (name, rank, *_), top in zip(
        part.queries, evaluation["ranks"], evaluation["top"], strict=True
    ):
        assert name == query.id and len({*top}) == 10 and query.reference not in top
        target = part.relevance.targets[query.id]
        assert (top.index(target) + 1 if target in top else None) == (rank if rank <= 10 else None)
        seen += rank <= 10
    assert seen > 5


def test_mining_captions_sets_loss_and_costs_are_those_of_the_artifacts(finished: Path) -> None:
    page = read((finished / "report.html").read_text("utf-8"))
    mined = content(finished / "hard_negatives_iter_0.json")
    texts = content(finished / "augmented_samples_iter_1.json")
    account = content(finished / "accounting_iter_1.json")
    [row] = page.tables["Mined negatives by the model that was wrong"][1:]
    count, wrong = len(mined["negatives"]), account["false_negatives"]
    assert row[1:6] == [f"top_k: {count}", "48", str(mined["summary"]["target_first"]),
                        str(mined["summary"]["queries_mined"]), str(count)]  # fmt: skip
    assert row[7].startswith(f"{wrong} (")
    bins = page.tables["Counts, model 0"][1:]
    assert sum(int(row[2]) for row in bins) == count
    assert sum(int(row[1]) for row in bins) == len({row["query"] for row in mined["negatives"]})
    heads, row = page.tables["Texts by what became of them"]
    assert dict(zip(heads[2:-1], map(int, row[2:-1]), strict=True)) == texts["summary"]["rejected"]
    assert int(row[1]) == len(texts["accepted"]) and int(row[-1]) == texts["summary"]["candidates"]
    accepted = str(len(texts["accepted"]))
    assert page.tables["Set sizes"][1][:5] == ["1", "48", accepted, accepted, str(count)]
    steps = content(finished / "checkpoint_iter_1" / "training_log.json")["rows"]
    log = [row["loss"] for row in steps]
    assert page.tables["Loss of each iteration"][2][3] == f"{log[0]:.6g}" and len(log) == 6
    drawn = content(finished / "checkpoint_iter_1" / "training_log.json")["drawn"]
    rows = [row[:3] for row in page.tables["Triplets that were trained on"] if row[0] == "1"]
    assert rows == [
        ["1", "human triplets", str(drawn["human"]["triplets"])],
        ["1", "texts of iteration 1", str(drawn["1"]["triplets"])],
    ]
    stages = [row[0] for row in page.tables["Cost of each attempt at a stage"][1:]]
    assert stages == [
        stage_words(row["stage"]) for row in content(finished / "costs.json")["stages"]
    ]


def _data(config: RunConfig) -> Any:
    from cirloop.data.paths import DataPaths

    return config.data.build(DataPaths(config.data_dir, config.cache, lambda items, _: items))


def test_false_negatives_are_marked_where_the_data_set_knows_them(finished: Path) -> None:
    """As many as `accounting` counts, where every mined image is shown."""
    config, store = run_directory(finished)
    account = content(finished / "accounting_iter_1.json")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MAX_QUERIES", "MAX_IMAGES"):
            patch.setattr(f"cirloop.report.negatives_section.{name}", 100)
        before = (finished / "report.html").read_bytes()
        try:
            text = write_report(config, store, _data(config)).read_text("utf-8")
        finally:
            (finished / "report.html").write_bytes(before)
    assert text.count("false negative</figcaption>") == account["false_negatives"] > 0


def test_markup_in_texts_and_settings_stands_as_text(whole: RunConfig) -> None:
    text = rebuild(whole).read_text("utf-8")
    page = read(text)
    for evil in EVIL[:3]:
        assert evil in page.text
    assert "{{ 7 * 7 }} \\x1b[31m \\u202e red" in page.text
    assert "script" not in page.tags and page.tags["h1"] == 1
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert not [link for link in links if not link.startswith(("data:", "#"))]


def test_secrets_are_hidden(copied: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_TOKEN", "red</b>and>secret")
    rows = [json.loads(line) for line in (copied.data_dir / "val.jsonl").read_text().splitlines()]  # type: ignore[operator]
    for row in rows:
        row["text"] = "the same, red</b>and>secret and hf_abcdefghijklmnopqrstu"
    (copied.data_dir / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))  # type: ignore[operator]
    monkeypatch.setenv("MODEL_PASSWORD", "nowhere/no-model")
    text = rebuild(copied).read_text("utf-8")
    assert "nowhere/no-model" not in text and "qwen2_vl" in text
    assert "the same, [hidden] and [hidden]" in text and "secret and" not in text
    assert "hf_abc" not in text


@pytest.mark.full
def test_images_that_are_gone_leave_tiles_that_say_so(copied: RunConfig) -> None:
    assert copied.data_dir is not None
    before = page_of(copied)
    (copied.data_dir / "images" / "000001.jpg").unlink()
    some = page_of(copied)
    assert 0 < some.tags["img"] < before.tags["img"]
    assert "Missing images. 1 of" in " ".join(some.text.split())
    shutil.rmtree(copied.data_dir / "images")
    assert "No images." in page_of(copied).text
    shutil.rmtree(copied.data_dir)
    none = page_of(copied)
    assert "img" not in none.tags and "there is no such directory" in none.text
    assert (
        none.tables["Fractions ± standard errors"] == before.tables["Fractions ± standard errors"]
    )


@pytest.mark.parametrize("parts", [0, 1, 3, 4, 5])
def test_a_run_that_is_going_says_what_is_missing(parts: int, tmp_path: Path) -> None:
    config = made(tmp_path, parts=parts)
    page = page_of(config)
    judge = parts < 4  # which is measured before images are mined, or not at all
    assert f"{11 + judge - parts} artifacts are still missing" in " ".join(page.text.split())
    evaluated = len([r for r in page.tables.get("Fractions ± standard errors", [[]])[1:]])
    assert evaluated == {0: 0, 1: 1}.get(parts, 2)
    assert ("Nothing is mined yet." in page.text) == (parts < 4)
    assert ("Nothing is written yet." in page.text) == (parts < 5)


@pytest.mark.full
def test_a_control_is_drawn_where_it_was_evaluated_alike(
    whole: RunConfig, copied: RunConfig
) -> None:
    def beside(control: Path) -> Page:
        runtime = copied.runtime.model_copy(update={"compare_with": control})
        return page_of(copied.model_copy(update={"runtime": runtime}))

    rows = beside(whole.directory).tables["Fractions ± standard errors"][1:]
    names = ["base", "0", "1", "2"]
    assert [row[0] for row in rows] == [*names, *(f"control {name}" for name in names)]
    results = content(copied.directory / "evaluation_results.json")
    for row in results["results"]:
        row["split"] = "jsonl_test"
    other = copied.directory.parent / "other"
    other.mkdir()
    write_json(other / "evaluation_results.json", results)
    page = beside(other)
    assert "The control other is not drawn: it was evaluated with another split." in page.text
    assert len(page.tables["Fractions ± standard errors"]) == 5


@pytest.mark.full
def test_a_report_of_thirty_iterations_is_bounded(tmp_path: Path) -> None:
    small = rebuild(made(tmp_path / "a", iterations=4)).stat().st_size
    large = rebuild(made(tmp_path / "b", iterations=30)).read_text("utf-8")
    page = read(large)
    assert len(large) < 2 * small and page.tags["img"] < 800
    assert "5 of 32 comparisons are shown with images" in " ".join(page.text.split())
    assert len(page.tables["Fractions ± standard errors"]) == 33


def test_images_stop_at_the_limit(whole: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_data, "MAX_BYTES", 30_000)
    page = page_of(whole)
    sizes = sum(len(value) for name, value in page.attributes if name == "src")
    assert 30_000 <= sizes < 30_000 + 20_000 and page.text.count("left out") > 50
    assert f"Images: {page.tags['img']} of " in page.text


def test_more_examples_by_choice(whole: RunConfig) -> None:
    """A number given for a rebuilt report wins over the run's own."""

    def cards(num: int | None) -> int:
        runtime = whole.runtime.model_copy(update={"report_examples": num})
        return page_of(whole.model_copy(update={"runtime": runtime})).tags["article"]

    assert cards(1) < cards(None) < cards(12)


def test_without_a_right_image_in_either_ranks_decide() -> None:
    def evaluation(values: list[float], ranks: list[float]) -> Any:
        return SimpleNamespace(values_Q=np.array(values, np.float32), ranks_Q=np.array(ranks))

    before = evaluation([0, 0, 0], [9, 5, 4])
    assert query_changes._changed((before, evaluation([0, 0, 0], [3, 7, 4]))) == ([0], [1], [2])
    assert query_changes._changed((before, evaluation([0, 1, 0], [3, 1, 9]))) == ([1], [], [0, 2])


def test_every_reason_kind_and_filter_has_its_meaning_in_the_legend() -> None:
    from typing import get_args

    from cirloop.captioning import pipeline
    from cirloop.negatives.filters import FilterConfig
    from cirloop.stages.exclusions import EXCLUSION_KINDS

    source = Path(pipeline.__file__).read_text("utf-8")
    named = [pipeline.UNPARSEABLE, pipeline.CUT_OFF, pipeline.SET_PHRASE, *SAID_RIGHT]
    assert {*named, "declined", "too short", "too long", "not verified", "round trip"} == {
        *legend.REASONS
    }
    written = set(re.findall(r'(?:return|reason =) "([^"]+)"', source))
    assert written and written <= {*legend.REASONS}
    assert {*EXCLUSION_KINDS} == {*legend.LEFT_OUT}
    filters = get_args(get_args(FilterConfig)[0])
    assert {each.model_fields["type"].default for each in filters} == {*legend.FILTERS}


def test_the_page_has_the_words_that_its_run_used(whole: RunConfig) -> None:
    page = page_of(whole)
    assert page.tables["Mined images that filters dropped"][1][1:] == ["near_duplicate", "9", "2"]
    text = " ".join(page.text.split())
    assert legend.FILTERS["near_duplicate"] in text and legend.FILTERS["verify"] not in text
    assert legend.REASONS["declined"] in text and legend.REASONS["duplicate"] not in text


def test_automatic_settings_say_what_was_used(finished: Path) -> None:
    page = read((finished / "report.html").read_text("utf-8"))
    rows = dict(tuple(row[:2]) for row in page.tables["training"][1:])
    assert rows["finetuning"] == "automatic: lora"
    captioning = dict(tuple(row[:2]) for row in page.tables["captioning"][1:])
    assert captioning["rewrite_prompt"] == "automatic: rewrite-2"


def test_long_texts_are_cut() -> None:
    assert report_data.shortened("x" * 1000) == "x" * report_data.MAX_LETTERS + "…"


def test_report_only_reads_beside_a_run_and_changes_nothing_else(copied: RunConfig) -> None:
    """Under a lock that another run holds; the model's path leads nowhere."""
    before = file_digests(copied.directory)
    with run_lock.run_lock(copied.directory):
        run = ("--experiment_dir", copied.directory, "--data_dir", copied.data_dir)
        done = command("train_iterative.py", "--report_only", *run)
    assert done.returncode == 0, done.stderr
    after = file_digests(copied.directory)
    assert "report.html" in after
    names = [name for name in after if name != "report.html" and not name.startswith("figures")]
    assert {name: after[name] for name in names} == before


def test_report_only_refuses_what_is_no_run_and_what_was_altered(
    copied: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        rebuild(copied.model_copy(update={"experiment_dir": tmp_path}))
    path = copied.directory / "hard_negatives_iter_0.json"
    path.write_text(path.read_text().replace("top_k", "top_j"))
    with pytest.raises(UserError, match=r"hard_negatives_iter_0\.json \(altered\)"):
        rebuild(copied)


@pytest.mark.full
def test_the_report_can_be_switched_off_and_decides_nothing(finished: Path, tmp_path: Path) -> None:
    from cirloop.cli import runner

    directory = shutil.copytree(finished, tmp_path / "run")
    config, _ = run_directory(directory)
    page = directory / "report.html"
    for report in (False, True):
        page.unlink(missing_ok=True)
        runtime = config.runtime.model_copy(update={"report": report})
        changed = config.model_copy(update={"runtime": runtime, "auto_resume": True})
        assert changed.result_settings() == config.result_settings()
        runner.run(changed)
        assert page.exists() == report


def test_the_chart_of_metrics_draws_the_results(finished: Path) -> None:
    results = content(finished / "evaluation_results.json")["results"]
    axes = Figure().subplots()
    plot_metrics(axes, ["recall@1", "recall@10"], results, results[:2])
    drawn = {str(each.get_label()): each for each in axes.containers}
    assert [*drawn] == ["recall@1", "recall@1, control", "recall@10", "recall@10, control"]
    for metric in ("recall@1", "recall@10"):
        line, _, [bars] = drawn[metric]
        assert line.get_xydata().tolist() == [
            [i, row["metrics"][metric]] for i, row in enumerate(results)
        ]
        errors = [(high - low) / 2 for (_, low), (_, high) in bars.get_segments()]
        assert errors == pytest.approx([row["standard_errors"][metric] for row in results])
        assert drawn[f"{metric}, control"][0].get_linestyle() == "--"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["base", "0", "1"]


def test_charts_are_files_and_equal_input_gives_equal_bytes(finished: Path) -> None:
    names = {"recalls", "similarity_1", "captions", "loss", "costs"}
    figures = finished / "figures"
    assert {path.name for path in figures.iterdir()} == {
        f"{n}.{kind}" for n in names for kind in ("svg", "png")
    }
    assert (figures / "loss.svg").read_text().count("<svg") == 1
    assert Image.open(figures / "loss.png").size[0] == 720

    def chart(title: str) -> Any:
        return draw(
            "a", title, Table("", (), ()), lambda axes: name_ticks(axes, [*map(str, range(30))])
        )

    evil = "<b>$x^2$\x1b\"'"
    assert chart(evil) == chart(evil)
    inline = str(chart(evil).inline())
    assert "&lt;b&gt;$x^2$\\x1b" in inline and "<b>" not in inline and "#1c1e21" not in inline
    assert inline.count(">27</text>") == 1 and ">28</text>" not in inline


@pytest.mark.parametrize(
    ("data", "best"),
    [
        ("fashioniq", "abcdefghij"),
        ("circo", "abcdefghij"),
        ("cirr", "acdefghijk"),
        ("triplets", "acdefghijk"),
    ],
)
def test_the_reference_is_among_the_best_images_where_the_protocol_keeps_it(
    data: str, best: str
) -> None:
    from cirloop.stages.evaluate import _best_images
    from cirloop.types import EvalSplit, Gallery, ImageId, LabeledQueries, Query, QueryId, Relevance

    query = Query(QueryId("q"), ImageId("b"), "")
    gallery = Gallery("g", tuple(map(ImageId, "abcdefghijkl")))
    protocol = import_module(f"cirloop.data.{data}").PROTOCOL
    labeled = LabeledQueries(
        "val", (query,), Relevance({query.id: ImageId("c")}), gallery, protocol
    )
    images_GD = np.eye(12, dtype=np.float32)
    query_D = np.arange(12, 0, -1, dtype=np.float32)
    no_images: Any = None
    assert _best_images(EvalSplit(labeled, gallery, no_images), query_D[None], images_GD) == [
        list(best)
    ]
