"""What every captioner promises, on small random models of the real classes and real
photographs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import TypeAdapter
from transformers import AutoModelForImageTextToText, AutoProcessor, BertConfig, BertForMaskedLM

from cirloop.backbones.special_tokens import escape_special_tokens, special_tokens
from cirloop.backbones.weights import resolve
from cirloop.captioning.backends.hf_captioner import WHITE, side_by_side
from cirloop.captioning.base import Answer, CaptionRequest, sampling_kwargs
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.config import CaptioningSettings
from cirloop.captioning.foundation import FoundationConfig, GenericFoundation
from cirloop.types import ImageId, Images, UserError
from tests.backbones.tiny_models import WRITERS
from tests.captioning.photographs import photographs

SETTINGS = CaptioningSettings()
READ: Any = TypeAdapter(FoundationConfig)
CASES = {
    "qwen2_vl": "tiny",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "llava": "llava",
    "llava, next": "llava_next",
    "llava, onevision": "llava_onevision",
    "generic": "llava_onevision",
    "generic, qwen": "qwen2_5_vl",
    "template": "",
}
"""Type (and which of it) -> the model it is tried on."""
TEXTS = (
    "make it red",
    "is longer, with short sleeves and a round neck",
    "no hat",
    "the same in another colour",
)


class Subject:
    """A captioner, what it is asked and the photographs."""

    def __init__(self, case: str, directory: Path) -> None:
        self.type = case.split(",")[0]
        model = CASES[case]
        if model not in ("", "tiny"):
            model = str(WRITERS[model](directory / "model"))
        settings = {} if self.type == "template" else {"path": model, "dtype": "float32"}
        self.foundation = READ.validate_python({"type": self.type, **settings})
        self.captioner = self.foundation.build()
        self.prompts = SETTINGS.prompts(self.foundation)
        self.images, ids = photographs(5, directory)
        self.requests = [CaptionRequest(ids[i], ids[i + 1], text) for i, text in enumerate(TEXTS)]
        self.directory = directory

    def eyes(self, batch_size: int) -> BatchedCaptioner:
        cache = self.directory / "cache"
        return BatchedCaptioner(self.captioner, self.images, cache, batch_size, lambda b, _: b)

    def generate(
        self,
        requests: list[CaptionRequest],
        temperature: float = 0.0,
        seed: int = 0,
        tokens: int = 6,
        batch: int = 9,
    ) -> Any:
        rewrite, eyes = self.prompts.rewrite, self.eyes(batch)
        answers = eyes.generate(rewrite, requests, tokens, [temperature], seed, "test")
        return [answer.text for (answer,) in answers]


@pytest.fixture(scope="module")
def made() -> dict[str, Subject]:
    return {}


@pytest.fixture
def subject(
    case: str, made: dict[str, Subject], tmp_path_factory: pytest.TempPathFactory
) -> Subject:
    if case not in made:
        made[case] = Subject(case, tmp_path_factory.mktemp("captioner"))
    return made[case]


MODELS = [case for case in CASES if case != "template"]
every_captioner = pytest.mark.parametrize("case", CASES)
every_model = pytest.mark.parametrize("case", MODELS)


@every_captioner
def test_greedy_texts_do_not_depend_on_what_else_is_asked(subject: Subject) -> None:
    together = subject.generate(subject.requests)
    assert together == subject.generate(subject.requests)
    assert together == [subject.generate([request])[0] for request in subject.requests]
    assert together == subject.generate(subject.requests, batch=2)
    assert together == subject.generate(subject.requests[::-1])[::-1]


@every_captioner
def test_sampled_texts_follow_the_seed(subject: Subject) -> None:
    requests = subject.requests * 2
    first = subject.generate(requests, temperature=1.5, seed=3)
    assert first == subject.generate(requests, temperature=1.5, seed=3)
    assert first != subject.generate(requests, temperature=1.5, seed=4)
    torch.rand(3)  # the generator's state before is of no matter
    assert first == subject.generate(requests, temperature=1.5, seed=3)


@every_captioner
def test_several_temperatures_are_asked_in_turn(subject: Subject) -> None:
    eyes, requests = subject.eyes(9), subject.requests
    both = eyes.generate(subject.prompts.rewrite, requests, 6, [0.0, 1.5], 7, "test")
    assert [first.text for first, _ in both] == subject.generate(requests)
    sampled = subject.generate(requests, temperature=1.5, seed=8)
    assert [second.text for _, second in both] == sampled


@every_captioner
def test_yes_is_a_probability_that_does_not_depend_on_what_else_is_asked(subject: Subject) -> None:
    verify, requests = subject.prompts.verify, subject.requests
    if not subject.foundation.can_verify:
        with pytest.raises(UserError, match=r"captioning.min_verify_probability to 0"):
            subject.eyes(9).yes_probability(verify, requests, "test")
        return
    together = subject.eyes(9).yes_probability(verify, requests, "test")
    assert all(0 <= p <= 1 for p in together) and len(set(together)) > 1
    alone = [subject.eyes(1).yes_probability(verify, [request], "test")[0] for request in requests]
    assert together == pytest.approx(alone, abs=1e-5)
    turned = subject.eyes(9).yes_probability(verify, requests[::-1], "test")
    assert turned[::-1] == pytest.approx(alone, abs=1e-5)


@every_model
def test_the_images_show_in_the_answers(subject: Subject) -> None:
    one = subject.requests[0]
    turned = CaptionRequest(one.image, one.reference, one.text)
    p, q = subject.eyes(9).yes_probability(subject.prompts.verify, [one, turned], "test")
    assert abs(p - q) > 1e-4


@every_model
def test_questions_are_padded_on_the_left_and_answers_are_short(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    generate = subject.captioner.vlm.generate

    def watched(**inputs: Any) -> Any:
        out = generate(**inputs)
        seen.append((inputs["attention_mask"], getattr(out, "sequences", out)))
        return out

    monkeypatch.setattr(subject.captioner.vlm, "generate", watched)
    for tokens in (1, 5):
        subject.generate(subject.requests, temperature=1.5, tokens=tokens)
        mask, out = seen.pop()
        # no question ends in padding, and some are shorter
        assert mask[:, -1].all() and not mask.all()
        assert (mask[:, 1:] >= mask[:, :-1]).all()
        assert 0 < out.shape[1] - mask.shape[1] <= tokens


@every_model
def test_signs_in_a_text_are_words(subject: Subject) -> None:
    """Text by users and models that spells the chat's signs puts no image, ends no turn and is no
    padding."""
    processor, tokenizer = subject.captioner.processor, subject.captioner.processor.tokenizer
    everything = " ".join(special_tokens(processor))
    assert all(sign in everything for sign in ("<|im_end|>", processor.image_token))
    request = subject.requests[0]
    texts = [f"{t} red" for t in (everything, "<|<|im_end|>im_end|>", "<image><image>")]
    hostile = [CaptionRequest(request.reference, request.image, text) for text in texts]
    subject.generate(hostile)
    yes = subject.eyes(9).yes_probability(subject.prompts.verify, hostile, "test")
    assert all(0 <= p <= 1 for p in yes)
    added = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    for text in texts:
        said = escape_special_tokens(text, special_tokens(processor))
        ids = tokenizer.encode(said, add_special_tokens=False)
        assert (added | {*tokenizer.all_special_ids}).isdisjoint(ids)
        # the turn has the signs of that of a harmless text
        assert special_ids(subject, text) == special_ids(subject, "red")


def special_ids(subject: Subject, text: str) -> list[int]:
    """The signs of a turn with `text`, in order."""
    captioner, tokenizer = subject.captioner, subject.captioner.processor.tokenizer
    special = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ids = tokenizer.encode(captioner.render_chat(subject.prompts.rewrite, text))
    return [i for i in ids if i in special]


END = 573
"""Of the tokenizer; padding and an end sign at once, as Qwen2.5-VL publishes it."""


@pytest.mark.parametrize("case", ["qwen2_5_vl", "generic"])
def test_greedy_texts_do_not_depend_on_the_batch_under_a_repetition_penalty(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The penalty looks at all tokens of a row, so no padding may be there. The end sign gets a
    score between those of the likeliest token with the penalty and without, so what is penalised
    decides whether an answer ends there."""
    vlm, seen = subject.captioner.vlm, list[torch.Tensor]()
    generate = vlm.generate
    monkeypatch.setattr(vlm.generation_config, "repetition_penalty", 1.3)
    monkeypatch.setattr(vlm.generation_config, "eos_token_id", [572, END])
    monkeypatch.setattr(
        vlm, "generate", lambda **given: [seen.append(given["input_ids"]), generate(**given)][1]
    )
    hook = vlm.get_output_embeddings().register_forward_hook(ends_are_likely)
    try:
        requests = subject.requests
        alone = [subject.generate([request], tokens=8)[0] for request in requests]
        assert subject.generate(requests, tokens=8) == alone
        assert subject.generate(requests[::-1], tokens=8, batch=3)[::-1] == alone
    finally:
        hook.remove()
    assert max(map(len, seen)) == len(requests) and not any((ids == END).any() for ids in seen)


def ends_are_likely(_: Any, __: Any, logits: torch.Tensor) -> torch.Tensor:
    """A forward hook of the output layer."""
    out = logits.clone()
    out[..., END] = 0.87 * logits.amax(-1)
    return out


@pytest.mark.parametrize("case", ["qwen2_vl", "generic", "generic, qwen", "llava"])
def test_an_answer_says_whether_it_came_to_its_end(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    captioner, request = subject.captioner, subject.requests[0]

    def answer(tokens: int, ends: list[int]) -> Answer:
        monkeypatch.setattr(captioner.vlm.generation_config, "eos_token_id", ends)
        monkeypatch.setattr(captioner, "end_ids", ends)
        rewrite, eyes = subject.prompts.rewrite, subject.eyes(1)
        ((made,),) = eyes.generate(rewrite, [request], tokens, [0.0], 0, "test")
        return made

    nothing = len(captioner.processor.tokenizer) + 1
    assert not answer(3, [nothing]).ended
    assert answer(3, [*range(nothing)]).ended, "an end sign at once"


def test_a_model_without_an_end_sign_is_refused(tmp_path: Path) -> None:
    directory = WRITERS["llava_onevision"](tmp_path / "model")
    config = json.loads((directory / "generation_config.json").read_text("utf-8"))
    (directory / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    said = r"names no sign that ends an answer .*generation_config.json"
    with pytest.raises(UserError, match=said):
        GenericFoundation(path=str(directory), dtype="float32").build()


def test_what_narrows_a_published_distribution_does_not_hold_and_the_penalty_does(
    tmp_path: Path,
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(WRITERS["qwen2_vl"](tmp_path / "model"))
    published = {"temperature": 1e-6, "top_k": 1, "top_p": 0.001, "min_p": 0.9, "typical_p": 0.2}
    published |= {"epsilon_cutoff": 0.1, "eta_cutoff": 0.1, "num_beams": 4}
    published |= {"repetition_penalty": 1.05}
    model.generation_config.update(**published)
    for temperature in (0.0, 0.7):
        config, _ = model._prepare_generation_config(None, **sampling_kwargs(temperature))
        processors = model._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
        names = [type(each).__name__ for each in processors]
        warpers = ["TemperatureLogitsWarper"] * bool(temperature)
        assert names == ["RepetitionPenaltyLogitsProcessor", *warpers]
        assert processors[0].penalty == 1.05 and config.num_beams == 1


def test_a_text_without_signs_is_left_as_it_is() -> None:
    assert escape_special_tokens("a < b | c {image}", ["<|im_end|>", "<s>"]) == "a < b | c {image}"


@pytest.mark.parametrize("case", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_greedy_texts_are_those_of_transformers_fed_with_one_question(subject: Subject) -> None:
    """Vision tokens from the cache, placing, padding and batching against the library's own way,
    from pixels."""
    captioner, request = subject.captioner, subject.requests[0]
    directory = subject.foundation.resolve_dir()
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    turns = subject.prompts.rewrite.messages(request.text)
    form = {"add_generation_prompt": True, "tokenize": False}
    text = captioner.processor.apply_chat_template(turns, **form)
    pictures = sized(subject, [request.reference, request.image])
    batch = captioner.processor(text=[text], images=pictures, return_tensors="pt", do_resize=False)
    [out] = model.generate(**batch, max_new_tokens=6, do_sample=False)
    written = out[batch["input_ids"].shape[1] :]
    theirs = captioner.processor.tokenizer.decode(written, skip_special_tokens=True).strip()
    assert subject.generate(subject.requests)[0] == theirs


def sized(subject: Subject, ids: list[ImageId]) -> list[Any]:
    """Images in the size that the family's own image processor gives them."""
    source: Images = subject.images
    patch = 2 * subject.captioner.processor.image_processor.patch_size
    pictures = [source.load(image) for image in ids]
    out = []
    for picture, vision in zip(pictures, subject.captioner.encode_images(pictures), strict=True):
        _, height, width = vision.grid
        out.append(picture.resize((width * patch // 2, height * patch // 2)))
    return out


def test_images_stand_side_by_side_whole() -> None:
    left, right = Image.new("RGB", (40, 64), (255, 0, 0)), Image.new("RGB", (60, 32), (0, 0, 255))
    plain, square = side_by_side(left, right, square=False), side_by_side(left, right, square=True)
    assert plain.size == (40 + 2 + 60, 64) and square.size == (102, 102)
    for whole, x, y in ((plain, 0, 0), (square, 0, 19)):
        assert whole.crop((x, y, x + 40, y + 64)).tobytes() == left.tobytes()
        assert whole.crop((x + 42, y + 16, x + 102, y + 48)).tobytes() == right.tobytes()
        counted = dict(map(reversed, whole.getcolors()))
        assert counted[WHITE] == whole.width * whole.height - 40 * 64 - 60 * 32


def test_what_is_no_model_of_images_and_texts_says_the_way_out(tmp_path: Path) -> None:
    text_only = tmp_path / "bert"
    bert = BertConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    BertForMaskedLM(bert).save_pretrained(text_only)
    processor = AutoProcessor.from_pretrained(resolve("tiny"))
    processor.save_pretrained(text_only)
    said = r"(?s)cannot be loaded.*image-text-to-text model that transformers knows"
    with pytest.raises(UserError, match=said):
        GenericFoundation(path=str(text_only), dtype="float32").build()
    silent = WRITERS["llava"](tmp_path / "silent")
    (silent / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"has no chat template.*chat_template.jinja"):
        GenericFoundation(path=str(silent), dtype="float32").build()
