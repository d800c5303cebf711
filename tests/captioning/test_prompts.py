"""Prompts as files, answers read strictly, and the rule that stands for a model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cirloop.captioning.base import Answer, CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import LlavaFoundation, Qwen2VLFoundation, TemplateFoundation
from cirloop.captioning.parsing import parse_answer
from cirloop.captioning.pipeline import check_format, generate_candidates, select
from cirloop.captioning.prompts import DESCRIBE, REWRITE, VERIFY, Prompt, load, packaged
from cirloop.data import ShapesSettings
from cirloop.types import ImageId, MinedNegative, UserError

IMAGE = {"type": "image"}


def said(prompt: Prompt, text: str) -> Any:
    (_, role), (_, content) = sorted(prompt.messages(text)[0].items(), reverse=True)
    assert role == "user"
    return [part if part == IMAGE else part["text"] for part in content]


def test_the_prompts_that_the_embedded_model_was_trained_on_say_what_they_always_did() -> None:
    pictures = ["Picture 1: ", IMAGE, "Picture 2: ", IMAGE]
    change = (
        "Another change of picture 1: A {b}\nDescribe the change from picture 1 to picture 2 in one"
        ' short sentence. Answer "none" if they show the same or have little in common.'
    )
    whole = "Is this the whole change from picture 1 to picture 2: A\nAnswer yes or no."
    same = (
        "Both pictures are the same. Describe what it shows in one sentence: the kind of thing, its"
        " colours, pattern, shape and details."
    )
    assert said(REWRITE, "A {b}") == [*pictures, change]
    assert said(VERIFY, "A") == [*pictures, whole]
    assert said(DESCRIBE, "") == [*pictures, same]


@pytest.mark.parametrize("name", packaged())
def test_every_packaged_prompt_is_named_versioned_and_loads(name: str) -> None:
    prompt = load(name)
    assert name.rpartition("-")[2].isdigit() and prompt.name == name
    assert prompt.num_images == (1 if "-side" in name else 2)
    assert prompt.answer == (
        "yes_no" if "verify" in name else "json" if "json" in name else "plain"
    )


def test_a_text_that_looks_like_a_place_is_a_text() -> None:
    assert said(Prompt("p-1", "{image} {text}"), "{image} {text}") == [IMAGE, " {image} {text}"]


def test_a_prompt_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine-3.yaml"
    file.write_text('answer: json\nturn: "{image}{image} From {text} to {\\"text\\": ...}"\n')
    assert load(str(file)) == Prompt(
        "mine-3", '{image}{image} From {text} to {"text": ...}', "json"
    )
    settings = CaptioningSettings(rewrite_prompt=str(file))
    assert settings.prompts(Qwen2VLFoundation()).rewrite.name == "mine-3"
    with pytest.raises(UserError, match=r"rewrite_prompt 'mine-3' has 2 places .* llava needs 1"):
        settings.prompts(LlavaFoundation())


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "not YAML"),
        ("just words", "`answer` and `turn`"),
        ("answer: plain", "`answer` and `turn`"),
        ("answer: plain\nturn: '{text}'\nmore: 1", "nothing else"),
        ("answer: xml\nturn: '{text}'", "'xml' is none of plain, json, yes_no"),
        ("answer: plain\nturn: 'no place'", "must hold {text} once"),
    ],
)
def test_what_is_wrong_with_a_prompt_is_said(tmp_path: Path, content: str, problem: str) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=problem):
        load(str(file))


def test_an_unknown_prompt_names_those_there_are() -> None:
    with pytest.raises(UserError, match=r"'rewrite-9' is none of describe-1, .*rewrite-2"):
        CaptioningSettings(rewrite_prompt="rewrite-9").prompts(Qwen2VLFoundation())
    with pytest.raises(UserError, match="verify_prompt 'rewrite-2'"):
        CaptioningSettings(verify_prompt="rewrite-2").prompts(Qwen2VLFoundation())


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ('{"text": "make it red"}', "make it red"),
        (' \n{ "text" : " make it \\"red\\" " }\n', 'make it "red"'),
        ('```json\n{"text": "red"}\n```', "red"),
        ('```\n{"text": "red"}\n```\n', "red"),
        ("red", None),
        ("", None),
        ('"red"', None),
        ('["red"]', None),
        ("{}", None),
        ('{"text": 1}', None),
        ('{"text": null}', None),
        ('{"Text": "red"}', None),
        ('{"text": "red", "sure": true}', None),
        ('{"text": "red", "text": "blue"}', None),
        ('{"text": "red"} {"text": "red"}', None),
        ('Sure: {"text": "red"}', None),
        ('{"text": "red"}.', None),
        ('{"text": "re', None),
        ("{'text': 'red'}", None),
        ('```json\n{"text": "red"}', None),
        ('```json {"text": "red"}```', None),
        ("[" * 100_000, None),
    ],
)
def test_a_json_answer_is_one_object_with_one_text(answer: str, text: str | None) -> None:
    assert parse_answer(answer, "json") == text
    assert parse_answer(answer, "plain") == answer


@given(text=st.text().map(str.strip))
def test_every_text_survives_json(text: str) -> None:
    assert parse_answer(json.dumps({"text": text}), "json") == text


class Scripted:
    """A captioner with the property that it says what it is told, whatever is asked."""

    name, input_kind, fingerprint = "scripted", "none", ""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)

    def generate(
        self, prompt: Prompt, requests: Any, vision: Any, tokens: int, temperatures: Any, seed: int
    ) -> Any:
        return [[Answer(self.answers.pop(0), ended=True) for _ in temperatures] for _ in requests]


def candidates(
    captioner: Any, prompt: Prompt, settings: CaptioningSettings, directory: Path
) -> Any:
    """Candidates for one mined image of the embedded data, after the check of their form."""
    train = ShapesSettings(train_families=2, train_triplets=2, eval_families=2).build().train
    query = train.triplets[0].query
    mined = [MinedNegative(query.id, train.gallery.ids[3], 1, 0.5, 2, 0.4, "top_k")]
    eyes = BatchedCaptioner(captioner, train.images, directory, 4, lambda b, _: b)
    made = generate_candidates(eyes, mined, {query.id: query}, settings, 1, prompt)
    return query, [check_format(c, settings) for c in made]


def test_an_answer_of_another_kind_is_unparseable_and_kept_as_it_is(tmp_path: Path) -> None:
    red = '{"text": "make it red"}'
    told = Scripted(red, "make it blue", '{"text": "none"}', red)
    settings = CaptioningSettings(num_candidates=4)
    _, made = candidates(told, load("rewrite-json-1"), settings, tmp_path)
    assert [(c.text, c.reason) for c in made] == [
        ("make it red", ""), ("make it blue", "unparseable"), ("none", "declined"),
    ]  # fmt: skip
    (row,), _ = select(made, set(), CaptioningSettings(), 1, "scripted")
    assert row.prompt == "rewrite-json-1"


@pytest.mark.parametrize("prompt", ["rewrite-2", "rewrite-json-1"])
def test_texts_of_the_template_say_so(
    prompt: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        captioner = TemplateFoundation().build()
    assert [r.message for r in caplog.records if "sees no image" in r.message]
    settings = CaptioningSettings(num_candidates=4, min_verify_probability=0)
    query, made = candidates(captioner, load(prompt), settings, tmp_path)
    assert len(made) > 1 and all(query.text in c.text and not c.reason for c in made)
    accepted, _ = select(made, set(), settings, 1, captioner.name)
    assert [a.captioner for a in accepted] == ["template (no model)"]
    request = CaptionRequest(ImageId("a"), ImageId("b"), "red and blue and green")
    rewrite = load("rewrite-2")
    cut, whole = (captioner.generate(rewrite, [request], [], num, [0.0], 0) for num in (4, 8))
    assert cut == [[Answer("not quite this: red", ended=False)]]
    assert whole == [[Answer("not quite this: red and blue and green", ended=True)]]


def test_the_template_cannot_judge_and_that_is_said_beforehand() -> None:
    CaptioningSettings(min_verify_probability=0).check(TemplateFoundation())
    setting = r"captioning.min_verify_probability"
    with pytest.raises(UserError, match=rf"{setting} 0.5: .*'template'.* Set {setting} to 0"):
        CaptioningSettings().check(TemplateFoundation())
