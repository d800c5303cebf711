"""What questions have in common is read once, and that changes no answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter
from transformers import AutoModelForImageTextToText
from transformers.cache_utils import DynamicLayer

from cirloop.captioning import decoding
from cirloop.captioning.base import Answer, CaptionRequest, sampling_kwargs
from cirloop.captioning.batched_captioner import BatchedCaptioner, _groups, _packed
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.decoding import PreallocatedCacheLayer, decode
from cirloop.captioning.foundation import FoundationConfig
from cirloop.captioning.prompts import Prompt, load, packaged
from cirloop.captioning.weight_sharing import adapter_disabled
from cirloop.types import ImageId
from tests.backbones.tiny_models import WRITERS
from tests.captioning.photographs import photographs
from tests.captioning.test_captioners import END, ends_are_likely, sized

FAMILIES = ("tiny", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEXTS = (
    "make it red",
    "is longer, with short sleeves and a round neck",
    "no hat",
    "the same in another colour",
)
READ: Any = TypeAdapter(FoundationConfig)


class Case:
    """A captioner, and questions about two references of different size; pairs come back with other
    texts."""

    def __init__(self, family: str, directory: Path) -> None:
        path = "tiny" if family == "tiny" else str(WRITERS[family](directory / "model"))
        kind = "qwen2_vl" if family == "tiny" else family
        self.foundation = READ.validate_python({"type": kind, "path": path, "dtype": "float32"})
        self.captioner = self.foundation.build()
        self.prompts = CaptioningSettings().prompts(self.foundation)
        self.images, ids = photographs(5, directory)
        places = [(0, 1), (4, 2), (0, 1), (0, 3), (4, 1), (0, 4), (2, 3), (4, 2)]
        pairs = enumerate(places)
        self.requests = [CaptionRequest(ids[a], ids[b], TEXTS[n % 4]) for n, (a, b) in pairs]
        self.directory = directory

    def eyes(self, batch_size: int = 9) -> BatchedCaptioner:
        cache = self.directory / "cache"
        return BatchedCaptioner(self.captioner, self.images, cache, batch_size, lambda b, _: b)

    def vision(self, requests: list[CaptionRequest]) -> Any:
        pairs = [(request.reference, request.image) for request in requests]
        return self.eyes()._source.get([image for pair in pairs for image in pair])

    def reading(self, prompt: Prompt) -> Any:
        with adapter_disabled(None):
            return self.captioner.prefill(prompt, self.requests, self.vision(self.requests))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("reading"))


@pytest.fixture
def called(case: Case) -> Iterator[list[tuple[int, int]]]:
    """Rows and columns of each call of the language model."""
    seen: list[tuple[int, int]] = []

    def note(_: Any, args: Any, given: dict[str, Any]) -> None:
        seen.append(tuple(given["inputs_embeds"].shape[:2]))

    hook = case.captioner.vlm.model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    yield seen
    hook.remove()


@pytest.mark.parametrize("kind", ["rewrite", "verify"])
def test_rows_read_in_parts_are_those_read_whole(
    case: Case, kind: str, called: list[tuple[int, int]]
) -> None:
    """Tokens, M-RoPE positions and logits of the first word, with three references and six pairs in
    eight questions."""
    prompt = getattr(case.prompts, kind)
    parts = case.reading(prompt)
    assert [rows for rows, _ in called] == [3, 6, 8]
    case.captioner.shares_prefixes = False
    try:
        whole = case.reading(prompt)
    finally:
        case.captioner.shares_prefixes = True
    assert [rows for rows, _ in called[3:]] == [8]
    assert sum(rows * columns for rows, columns in called[:3]) < 0.9 * called[3][0] * called[3][1]
    for row in range(len(case.requests)):
        left, right = parts.mask_BT[row].bool(), whole.mask_BT[row].bool()
        assert torch.equal(parts.ids_BT[row, left], whole.ids_BT[row, right])
        assert torch.equal(parts.positions_3BT[:, row, left], whole.positions_3BT[:, row, right])
    logits, theirs = (case.captioner.vlm.lm_head(reading.last_BD) for reading in (parts, whole))
    assert float((logits - theirs).abs().max()) < 1e-4
    # else equal logits would say nothing
    assert float((logits[1:] - logits[:-1]).abs().max()) > 1e-2


def test_texts_are_those_of_transformers_asked_one_by_one(case: Case) -> None:
    """Against the library's own way, from pixels: logits and greedy texts of a batch that shares
    images, and sampled texts, which random models vary more, of one that shares nothing but the
    question."""
    captioner, rewrite = case.captioner, case.prompts.rewrite
    greedy = case.eyes().generate(rewrite, case.requests, 8, [0.0], 0, "test")
    with adapter_disabled(None):
        logits = captioner.vlm.lm_head(case.reading(rewrite).last_BD)
    directory = case.foundation.resolve_dir()
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    sampled = []
    for row, request in enumerate(case.requests):
        batch = captioner.processor(
            text=[captioner.render_chat(rewrite, request.text)],
            images=sized(case, [request.reference, request.image]),
            return_tensors="pt",
            do_resize=False,
        )
        with torch.no_grad():
            assert float((model(**batch).logits[0, -1] - logits[row]).abs().max()) < 1e-4
        theirs = []
        for turn, temperature in enumerate((0.0, 1.5)):
            torch.manual_seed(row + turn)
            [out] = model.generate(**batch, max_new_tokens=8, **sampling_kwargs(temperature))
            ids = out[batch["input_ids"].shape[1] :]
            text = captioner.processor.tokenizer.decode(ids, skip_special_tokens=True)
            theirs.append(text.strip())
        assert [answer.text for answer in greedy[row]] == theirs[:1]
        (ours,) = captioner.generate(rewrite, [request], case.vision([request]), 8, [0.0, 1.5], row)
        assert [answer.text for answer in ours] == theirs
        sampled.append(theirs[1])
    assert len({*sampled}) > 4, "else equal texts would say little"


def test_batches_decide_no_greedy_text_and_no_judgement(case: Case) -> None:
    requests, (rewrite, verify) = case.requests, (case.prompts.rewrite, case.prompts.verify)
    texts = case.eyes().generate(rewrite, requests, 8, [0.0], 0, "test")
    sure = pytest.approx(case.eyes().yes_probability(verify, requests, "test"), abs=1e-5)
    for size in (1, 3):
        assert case.eyes(size).generate(rewrite, requests, 8, [0.0], 0, "test") == texts
        assert case.eyes(size).yes_probability(verify, requests, "test") == sure


def test_a_repetition_penalty_does_not_look_at_padding_inside_a_row(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that share images are padded where what they share ends, too."""
    rewrite, vlm = case.prompts.rewrite, case.captioner.vlm
    monkeypatch.setattr(vlm.generation_config, "repetition_penalty", 1.3)
    monkeypatch.setattr(vlm.generation_config, "eos_token_id", [572, END])
    hook = vlm.get_output_embeddings().register_forward_hook(ends_are_likely)
    try:

        def texts(size: int) -> Any:
            return case.eyes(size).generate(rewrite, case.requests, 8, [0.0], 0, "test")

        alone = texts(1)
        assert texts(9) == alone and texts(3) == alone
        monkeypatch.setattr(decoding, "without_padding", lambda ids, mask: ids)
        assert texts(9) != alone, "padding matters here"
    finally:
        hook.remove()


def test_a_question_is_read_once_for_all_its_answers(
    case: Case, called: list[tuple[int, int]]
) -> None:
    for temperatures in ([0.0], [0.0, 1.5, 1.5]):
        case.eyes().generate(case.prompts.rewrite, case.requests, 3, temperatures, 0, "test")
        assert [rows for rows, columns in called if columns > 1] == [3, 6, 8]
        assert len(called) <= 3 + 3 * len(temperatures)
        called.clear()


def test_a_text_before_the_images_leaves_nothing_to_share(
    case: Case, called: list[tuple[int, int]]
) -> None:
    prompt = Prompt("before-1", "{text}: {image}{image}")
    case.reading(prompt)
    assert [rows for rows, _ in called] == [8]
    assert not prompt.images_before_text
    assert all(load(name).images_before_text for name in packaged())


def test_rows_that_have_ended_leave_and_change_no_other(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, vlm = case.captioner.vlm.generation_config, case.captioner.vlm
    monkeypatch.setattr(config, "eos_token_id", None)
    monkeypatch.setattr(config, "pad_token_id", 573)
    reading = case.reading(case.prompts.rewrite)
    # else random models say one word again and again
    how = {"do_sample": False, "repetition_penalty": 1.5}

    def stops(ends: set[int]) -> list[int]:
        places = [[at + 1 for at, token in enumerate(row) if token in ends] for row in endless]
        return [min(row, default=12) for row in places]

    with adapter_disabled(None):
        endless = [row.tolist() for row in decode(vlm, reading, 12, **how)]
        assert {len(row) for row in endless} == {12}
        several = [{row[at] for row in endless[::2]} for at in range(1, 12)]
        ends = next(each for each in several if sorted(stops(each))[3] < min(11, max(stops(each))))
        monkeypatch.setattr(config, "eos_token_id", sorted(ends))
        sizes: list[int] = []
        hook = vlm.register_forward_pre_hook(
            lambda _, a, given: sizes.append(len(given["input_ids"])), with_kwargs=True
        )
        ended = [row.tolist() for row in decode(vlm, reading, 12, **how)]
        hook.remove()
    for row, whole, stop in zip(ended, endless, stops(ends), strict=True):
        assert row[:stop] == whole[:stop] and set(row[stop:]) <= {573}
    assert sizes[0] == 8 and sizes[-1] < 8 and sizes == sorted(sizes, reverse=True)


def test_shares_of_the_batches_make_the_whole(case: Case) -> None:
    """Sampled texts too, whoever requests them."""

    def request(share: tuple[int, int]) -> tuple[list[int], list[list[Answer]]]:
        eyes = BatchedCaptioner(
            case.captioner, case.images, case.directory / "cache", 3, lambda b, _: b, share=share
        )
        answers = eyes.generate(case.prompts.rewrite, case.requests, 4, [0.0, 1.5], 5, "test")
        return eyes.completed_indices, [answers[row] for row in eyes.completed_indices]

    rows = dict(zip(*request((0, 1)), strict=True))
    parts = [request((number, 2)) for number in range(2)]
    together = {}
    for done, texts in parts:
        together |= dict(zip(done, texts, strict=True))
    assert together == rows


def test_a_model_with_a_sliding_window_reads_rows_whole(tmp_path: Path) -> None:
    """Its window counts columns, and padding inside a row would be among them."""
    directory = WRITERS["qwen2_vl"](tmp_path / "model")
    config = json.loads((directory / "config.json").read_text("utf-8"))
    config["text_config"] |= {
        "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    foundation = READ.validate_python({"path": str(directory), "dtype": "float32"})
    assert not foundation.build().shares_prefixes


words = st.sampled_from(("", "x", "xyz"))
asked = st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("abcd"), words), max_size=20)


@given(rows=asked, together=st.booleans())
def test_groups_hold_every_row_once_and_a_reference_stands_together(
    rows: list[Any], together: bool
) -> None:
    requests = [CaptionRequest(ImageId(a), ImageId(b), text) for a, b, text in rows]
    patches = {"a": 8, "b": 4, "c": 8, "d": 4}
    sizes = [(patches[request.reference], patches[request.image]) for request in requests]
    groups = _groups(requests, sizes, together)
    order = [row for group in groups for row in group]
    assert sorted(order) == [*range(len(requests))]
    if together:
        for group in groups:
            assert len({requests[row].reference for row in group}) == 1
        assert len(groups) == len({request.reference for request in requests})
        pairs = [(requests[row].reference, requests[row].image) for row in order]
        changes = sum(one != other for one, other in pairwise(pairs))
        assert changes == max(len({*pairs}) - 1, 0), "a pair stands apart"
    else:
        pairs = zip(sizes, requests, strict=True)
        lengths = [sum(size) + len(request.text) for size, request in pairs]
        assert order == sorted(range(len(requests)), key=lambda i: (lengths[i], i))


@given(sizes=st.lists(st.integers(1, 7), max_size=8), size=st.integers(1, 5))
def test_batches_are_full_of_whole_groups(sizes: list[int], size: int) -> None:
    """A group is cut only where it is larger than a batch."""
    ends = [*accumulate(sizes)]
    groups = [[*range(end - num, end)] for num, end in zip(sizes, ends, strict=True)]
    batches = _packed(groups, size)
    assert [row for batch in batches for row in batch] == [*range(sum(sizes))]
    assert all(0 < len(batch) <= size for batch in batches)
    for group in groups:
        if len(group) <= size:
            assert any({*group} <= {*batch} for batch in batches)


def test_keys_and_values_with_room_are_those_that_are_copied() -> None:
    states = [(torch.randn(4, 2, num, 8), torch.randn(4, 2, num, 8)) for num in (7, 1, 1, 1)]
    ours, theirs = PreallocatedCacheLayer(states[0], 10), DynamicLayer()
    theirs.update(*states[0])
    for each in states[1:]:
        left, right = ours.update(*each), theirs.update(*each)
        assert torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert left[0].data_ptr() == ours.keys.data_ptr(), "written, not copied"
    for layer in (ours, theirs):
        layer.batch_select_indices(torch.tensor([2, 0]))
    assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
