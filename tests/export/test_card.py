"""The card says what the run's artifacts say, its metadata are the Hub's, and what strangers wrote
stays text."""

from __future__ import annotations

import ast
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from cirloop.captioning.foundation import CatalogueFoundation
from cirloop.data.config import JsonlSettings
from cirloop.tools.export.card import UNKNOWN, card, code_of, license_of
from cirloop.tools.export.config import ExportConfig
from cirloop.tools.export.prompt_spec import PromptSpec
from cirloop.tools.export.roundtrip import Difference
from cirloop.tools.export.source import ExportSource, load_source
from cirloop.tools.export.templates import code
from tests.export.conftest import source_of

PAGE = Path(__file__).parents[2] / "docs" / "export.md"
LIBRARIES = {
    "adapter": "peft",
    "merged": "transformers",
    "sentence-transformers": "sentence-transformers",
}
EVIL = (
    "</code> ```\n# evil | <script>alert(1)</script> **b** [x](http://x) `` ` --- {text} {{ 1"
    " }}\n\n---\n\u202e"
)


def read(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


PROMPT_SPEC = PromptSpec("a", ("b", "c"), (), 1, 2, None)


def card_of(run: Path, export_format: str) -> str:
    """As an export has it."""
    return card(source_of(run, export_format), PROMPT_SPEC, Difference(0, 1, 1))


@pytest.mark.parametrize("export_format", LIBRARIES)
def test_metadata(export_format: str, run: Path) -> None:
    data: Any = ModelCard(card_of(run, export_format)).data
    assert (
        data.library_name == LIBRARIES[export_format] and data.pipeline_tag == "feature-extraction"
    )
    assert data.license == "apache-2.0", "the embedded model's own card says so"
    assert data.base_model is None and data.datasets is None, "neither has a name on the Hub"
    assert ("sentence-transformers" in data.tags) == (export_format == "sentence-transformers")
    stated, found = (
        {r.metric_type: r for r in data.eval_results},
        read(run / "evaluation_iter_1.json"),
    )
    assert {name: r.metric_value for name, r in stated.items()} == found["metrics"]
    assert {name: r.metric_args["standard_error"] for name, r in stated.items()} == found[
        "standard_errors"
    ]
    assert {r.metric_args["protocol"] for r in stated.values()} == {found["protocol"]}


def test_the_best_iteration_is_said_to_be_that(run: Path) -> None:
    best = read(run / "evaluation_results.json")["best"]
    for iteration in (0, 1):
        options = ExportConfig(experiment_dir=run, iteration=str(iteration), format="adapter")
        text = card(load_source(options), PROMPT_SPEC, None)
        words = f"iteration {iteration} is the best by {best['metric']} on shapes_val"
        assert (f"Of the run's iterations, {words}" in text) == (iteration == best["iteration"])


def test_text(run: Path) -> None:
    text = card_of(run, "adapter")
    for label in ("base", "iter_0", "iter_1"):
        found = read(run / f"evaluation_{label}.json")
        name = found["iteration"] + (" (this model)" if label == "iter_1" else "")
        cells = [
            f"{100 * found['metrics'][m]:.1f} ± {100 * found['standard_errors'][m]:.1f}"
            for m in found["metrics"]
        ]
        assert f"| {name} | {' | '.join(cells)} |" in text
    said, mined = (
        read(run / "accounting_iter_1.json"),
        read(run / "hard_negatives_iter_0.json")["summary"],
    )
    written = read(run / "augmented_samples_iter_1.json")["summary"]
    row = next(
        line for line in text.splitlines() if line.startswith(f"| 1 | {mined['negatives']} |")
    )
    numbers = [cell.split()[0] for cell in row.strip("| ").split(" | ")]
    counts = [
        1,
        mined["negatives"],
        said["false_negatives"],
        written["candidates"],
        said["accepted"],
        said["true_captions"],
        sum(written["rejected"].values()),
    ]
    assert [int(number) for number in numbers] == counts
    assert (
        f"{mined['queries']} training triplets" in text
        and f"| the training data | `{UNKNOWN}` |" in text
    )
    recipe = text.split("```json\n")[1].split("\n```")[0]
    config = read(run / "config.json")
    assert (
        json.loads(recipe)["model"] == config["model"]
        and json.loads(recipe)["training"]["steps_per_iteration"] == 6
    )


def parsed(text: str) -> list[Any]:
    """Below the metadata, by the Hub's own reading of where those end."""
    return MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)


def headings(text: str) -> list[str]:
    tokens = parsed(text)
    return [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]


@pytest.mark.parametrize("export_format", LIBRARIES)
def test_what_strangers_wrote_is_text(export_format: str, run: Path) -> None:
    source = source_of(run, export_format, push_to_hub="evil/`<b>", data_license=EVIL)
    prompt_spec = PromptSpec(EVIL, (EVIL, EVIL), (EVIL,), 1, 2, None)
    settings = source.settings.model_copy(update={"path": EVIL, "query_prompt": EVIL})
    foundation = source.config.foundation.model_copy(update={"path": EVIL})
    config = source.config.model_copy(update={"foundation": foundation, "model": settings})
    hub: dict[str, Any] = {"hub": EVIL} if export_format == "adapter" else {}
    hostile = replace(source, config=config, settings=settings, **hub)
    made = card(hostile, prompt_spec, Difference(0, 1, 1))
    plain = card_of(run, export_format)
    assert headings(made)[1:] == headings(plain)[1:]
    inline = [child for token in parsed(made) for child in token.children or []]
    assert {child.type for child in inline} <= {
        "text",
        "code_inline",
        "em_open",
        "em_close",
        "softbreak",
    }
    assert [token.type for token in parsed(made)] == [token.type for token in parsed(plain)]
    blocks = [token.content for token in parsed(made) if token.info == "python"]
    for block in blocks:
        compile(block, "README.md", "exec")
    if export_format == "adapter":
        assert f"from_pretrained({EVIL!r}," in blocks[0]


@pytest.mark.parametrize("text", ["a", "`", "``a`", "a`b``c", " ", "", EVIL, "a|b"])
def test_code_in_a_line_holds_what_it_is_given(text: str) -> None:
    tokens = MarkdownIt("commonmark").parseInline(f"before {code(text)} after")[0].children or []
    held = [token.content for token in tokens if token.type == "code_inline"]
    assert len(tokens) == 3 and [token.type for token in tokens][1] == "code_inline"
    shown = text.replace("\n", "\\n").replace("\u202e", "\\u202e")
    assert held[0].strip() == shown.strip()


def with_base(run: Path, base: Path, text: str | None, **options: Any) -> ExportSource:
    base.mkdir()
    if text is not None:
        (base / "README.md").write_text(text, "utf-8")
    return replace(source_of(run, "merged", **options), base=base)


@pytest.mark.parametrize(
    ("text", "stated"),
    [
        ("---\nlicense: mit\n---\n# A", {"license": "mit"}),
        ("---\nlicense: other\nlicense_name: own\nlicense_link: L\n---\n",
         {"license": "other", "license_name": "own", "license_link": "L"}),
        ("# No metadata", {}),
        ("---\ntags: [a]\nlicense_name: own\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("---\n- a\n---\n", {}),
        (None, {}),
    ],
)  # fmt: skip
def test_a_licence_is_what_the_card_of_the_base_states(
    text: str | None, stated: dict[str, str], run: Path, tmp_path: Path
) -> None:
    assert license_of(with_base(run, tmp_path / "base", text)) == stated


def test_a_licence_that_nobody_states_is_left_open(run: Path, tmp_path: Path) -> None:
    source = with_base(run, tmp_path / "base", None, data_license="cc-by-4.0")
    made = card(source, PROMPT_SPEC, Difference(0, 1, 1))
    assert ModelCard(made).data.to_dict().get("license") is None
    assert (
        f"| the base model, by its own card | `{UNKNOWN}` |" in made
        and f"| this model | `{UNKNOWN}` |" in made
    )
    assert "| the training data | `cc-by-4.0` |" in made


def test_the_page_shows_the_code_of_the_cards(run: Path) -> None:
    *blocks, evaluated = [
        token.content
        for token in MarkdownIt().parse(PAGE.read_text("utf-8"))
        if token.info == "python"
    ]
    assert "mteb.evaluate(" in evaluated
    shown = []
    for export_format in ("sentence-transformers", "adapter"):
        source = source_of(run, export_format, push_to_hub="me/my-embedder")
        settings = source.settings.model_copy(update={"dtype": "bfloat16"})
        source = replace(source, hub="Qwen/Qwen2-VL-2B-Instruct", settings=settings)
        shown.append(code_of(source, PROMPT_SPEC))
    search = [
        t.content
        for t in parsed(card(source_of(run, "merged"), PROMPT_SPEC, None))
        if t.info == "python"
    ][1]
    for block, wanted in zip(blocks, [*shown, search], strict=True):  # ruff sets the page's quotes
        assert ast.dump(ast.parse(block)) == ast.dump(ast.parse(wanted))


def test_a_base_without_a_name_is_fetched_with_its_adapter(run: Path) -> None:
    prompt_spec = PromptSpec("a", ("b", "c"), (), None, None, None)
    made = code_of(source_of(run, "adapter", push_to_hub="me/model"), prompt_spec)
    compile(made, "README.md", "exec")
    assert (
        "where = snapshot_download('me/model')" in made
        and 'from_pretrained(f"{where}/base"' in made
    )


def test_a_card_says_first_that_the_embedded_model_knows_drawn_shapes_only(run: Path) -> None:
    source = source_of(run, "adapter")
    line = "**`tiny` is the embedder and the foundation model, and knows drawn shapes only"
    data = {"data": JsonlSettings()}
    photographs = replace(source, config=source.config.model_copy(update=data))
    for model, says in ((source, False), (photographs, True)):
        text = card(model, PROMPT_SPEC, None)
        assert (line in text.partition("## How to use")[0]) is says


def test_a_card_says_what_wrote_the_texts(run: Path) -> None:
    source = source_of(run, "adapter")
    foundations = {
        "a vision-language model (`tiny`)": source.config.foundation,
        "`catalogue`, without a model,": CatalogueFoundation(),
    }
    for writer, foundation in foundations.items():
        config = source.config.model_copy(update={"foundation": foundation})
        text = " ".join(card(replace(source, config=config), PROMPT_SPEC, None).split())
        assert f"ranked high, and {writer} wrote texts that would make them right" in text
