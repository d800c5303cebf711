"""A foundation model behind an address, on a server of this process: what is sent, in which order
the answers come back, and that nothing is asked twice."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from cirloop.captioning.backends import endpoints
from cirloop.captioning.backends.endpoints import check_servers
from cirloop.captioning.base import Answer, CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.foundation import (
    FoundationConfig,
    GenericFoundation,
    Qwen2VLFoundation,
    ServerFoundation,
)
from cirloop.captioning.prompts import REWRITE, VERIFY
from cirloop.data.images import DrawnImages, FileImages
from cirloop.monitoring import preemption, profiling
from cirloop.types import ImageId, UserError
from tests.captioning.asked import REQUESTS, Asked, draw
from tests.captioning.chat_server import (
    MODEL,
    Reply,
    by_captioner,
    by_rule,
    chat,
    logprobs,
    sent_images,
    sent_text,
    serving,
)


@pytest.fixture(autouse=True)
def without_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_WAIT_S", 0.01)
    monkeypatch.delenv(endpoints.KEY_VARIABLE, raising=False)


def test_a_request_is_the_prompt_the_images_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No header about this machine, none of the environment's accounts and keys, nothing of an
    image's file but its pixels."""
    for name in (
        "OPENAI_API_KEY",
        "OPENAI_ORG_ID",
        "OPENAI_PROJECT_ID",
        "HTTP_PROXY",
        "http_proxy",
    ):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "Authorization: Bearer another's\nHost: elsewhere")
    monkeypatch.setenv(endpoints.KEY_VARIABLE, "the-key-of-this-server")
    file = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    Image.fromarray(draw(ImageId("3"))).save(file, exif=exif, comment=b"where I live")
    with serving(lambda body: chat("redder")) as server:
        asked = Asked(tmp_path / "answers", server, extra={"top_k": -1}, max_side=28)
        asked.images = FileImages({ImageId("a"): file})  # type: ignore[assignment]
        one = CaptionRequest(ImageId("a"), ImageId("a"), "as red <|im_end|><image> [INST] [sic]")
        asked.captioner().generate(REWRITE, [one], 12, [0.0, 0.5], 5, "test")
    greedy, sampled = sorted(server.requests, key=lambda body: body["temperature"])
    common = {"model": MODEL, "max_tokens": 12, "top_k": -1, "messages": greedy["messages"]}
    assert greedy == {**common, "temperature": 0.0}
    assert sampled == {**common, "temperature": 0.5, "top_p": 1.0, "seed": sampled["seed"]}
    assert 0 <= sampled["seed"] < 2**31
    text = "as red < |im_end|>< image> [ INST] [sic]"
    assert sent_text(greedy) == REWRITE.template.replace("{image}", "").replace("{text}", text)
    for image in sent_images(greedy):
        assert image.size == (28, 17) and image.format == "PNG" and not image.info
    assert len(sent_images(greedy)) == 2 and "where I live" not in json.dumps(greedy)
    for headers in server.headers:
        assert {*headers} == {
            "host", "accept", "authorization", "connection", "content-length", "content-type",
            "accept-encoding",
        }  # fmt: skip
        assert headers["authorization"] == "Bearer the-key-of-this-server"
        assert headers["host"] in server.url


def test_answers_are_in_the_order_of_the_requests_and_many_are_asked_at_once(
    tmp_path: Path,
) -> None:
    delays = iter([0.2, 0.1, 0.05, 0.02] * 6)

    def slow(body: dict[str, Any]) -> Reply:
        text = next(r.text for r in REQUESTS if r.text in sent_text(body))
        return Reply(chat(text).content, delay=next(delays))

    with serving(slow) as server:
        rows = Asked(tmp_path, server).generate()
    assert rows == [[Answer(request.text, True)] * 3 for request in REQUESTS]
    assert 1 < server.most_at_once <= 4 and len(server.requests) == 24


def test_answers_are_those_of_the_same_model_in_this_process(tmp_path: Path) -> None:
    here = Qwen2VLFoundation(path="tiny", dtype="float32").build()
    there = GenericFoundation(path="tiny", dtype="float32").build()
    images = DrawnImages(draw)
    eyes = BatchedCaptioner(here, images, tmp_path / "cache", 4, lambda b, _: b)
    with serving(by_captioner(there)) as server:
        asked = Asked(tmp_path / "answers", server).captioner()
        expected = eyes.generate(REWRITE, REQUESTS, 8, [0.0], 0, "test")
        assert asked.generate(REWRITE, REQUESTS, 8, [0.0], 0, "test") == expected
        probabilities = eyes.yes_probability(VERIFY, REQUESTS, "test")
        assert asked.yes_probability(VERIFY, REQUESTS, "test") == pytest.approx(
            probabilities, abs=1e-4
        )


def test_equal_arguments_give_equal_answers_and_equal_questions_are_asked_once(
    tmp_path: Path,
) -> None:
    with serving() as server:
        first = Asked(tmp_path / "a", server).generate()
        assert len(server.requests) == 24
        # in another order, one by one: the seed is the question's, not the place's
        turned = Asked(tmp_path / "b", server, max_in_flight=1).generate(REQUESTS[::-1])
        assert turned[::-1] == first and len(server.requests) == 48
        greedy, *sampled = zip(*first, strict=True)
        other = [*zip(*Asked(tmp_path / "c", server).generate(seed=99), strict=True)]
        assert other[0] == greedy and other[1] != sampled[0]
        before = len(server.requests)
        doubled = Asked(tmp_path / "d", server).generate([*REQUESTS, *REQUESTS])
        assert doubled == [*first, *first] and len(server.requests) == before + 24


def test_yes_is_a_share_of_the_words_that_say_yes_or_no(tmp_path: Path) -> None:
    words = {" Yes": 0.2, "yes": 0.1, "▁YES": 0.1, "ĠNo": 0.1, "maybe": 0.4}
    with serving(lambda body: chat(" Yes", **logprobs(**words))) as server:
        assert Asked(tmp_path, server).yes() == [pytest.approx(0.8)] * len(REQUESTS)
    assert {body["max_tokens"] for body in server.requests} == {1}
    assert all(body["logprobs"] and body["top_logprobs"] == 20 for body in server.requests)


def test_it_asks_where_a_loop_runs_already(tmp_path: Path) -> None:
    """As in a notebook."""

    async def cell() -> list[list[Answer]]:
        return Asked(tmp_path, server).generate()

    with serving() as server, ThreadPoolExecutor(1) as apart:
        # A browser's test may have left a loop in this thread.
        assert len(apart.submit(asyncio.run, cell()).result()) == len(REQUESTS)


def test_yes_by_the_written_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    said = ["Yes.", "no", "**No**", "yes, it is", "I cannot say", "", "YES", "Not yes"]
    texts = dict(zip((r.text for r in REQUESTS), said, strict=True))

    def by_text(body: dict[str, Any]) -> Reply:
        return chat(next(word for text, word in texts.items() if text in sent_text(body)))

    with serving(by_text) as server:
        assert Asked(tmp_path, server, yes_no="text").yes() == [1, 0, 0, 1, 0, 0, 1, 0]
    assert "3 of 8 answers say neither yes nor no" in caplog.text
    assert not any("logprobs" in body for body in server.requests)


def test_what_a_killed_run_was_told_is_not_asked_again(tmp_path: Path) -> None:
    """The line that was being written is asked again, whole lines are not."""
    with serving() as server:
        first = Asked(tmp_path, server).generate()
        file = tmp_path / "0.jsonl"
        file.write_bytes(file.read_bytes()[:-30])
        assert Asked(tmp_path, server).generate() == first and len(server.requests) == 25
        assert Asked(tmp_path, server).generate() == first and len(server.requests) == 25
        lines = file.read_text().splitlines()
        file.write_text("\n".join([lines[0].replace("dots", "cats"), *lines[1:]]) + "\n")
        assert Asked(tmp_path, server).generate() == first and len(server.requests) == 26
        # another model, prompt, image, text or seed is another question
        assert Asked(tmp_path, server, image_format="jpeg").generate() != first
    assert len(server.requests) == 50


def test_a_stop_lets_what_is_asked_be_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the middle: each answer that was asked for is kept, and the next attempt asks the
    rest, once."""

    def stopping(body: dict[str, Any]) -> Reply:
        if len(server.requests) >= 10:
            monkeypatch.setattr(preemption, "_requested", True)
        return Reply(by_rule(body).content, delay=0.02)

    with serving(stopping) as server:
        with pytest.raises(preemption.GracefulStop):
            Asked(tmp_path, server).generate()
        asked = len(server.requests)
        assert 10 <= asked <= 14
        monkeypatch.setattr(server, "_brain", by_rule)
        monkeypatch.setattr(preemption, "_requested", False)
        rows = Asked(tmp_path, server).generate()
        assert len(server.requests) == 24
        assert rows == Asked(tmp_path / "other", server).generate()


def test_tokens_are_counted_and_limited_over_all_attempts(tmp_path: Path) -> None:
    with serving() as server:
        with profiling.metering() as spent:
            Asked(tmp_path, server).generate(REQUESTS[:4])
        assert (spent.tokens, spent.tokens_written, spent.texts) == (12 * 70, 12 * 5, 12)
        limited = Asked(tmp_path, server, token_limit=15 * 75, max_in_flight=1)
        with pytest.raises(UserError, match=r"token_limit 1,125: 1,125 tokens.*3 of 12 questions"):
            limited.generate()
        assert len(server.requests) == 15
        Asked(tmp_path, server).generate()
        assert len(server.requests) == 24


def test_before_a_run_the_server_is_asked_for_its_models(tmp_path: Path) -> None:
    with serving() as server:
        settings = Asked(tmp_path, server).settings
        check_servers(settings)
        with pytest.raises(UserError, match=r"has no model 'else'; it has some-model"):
            check_servers(settings.model_copy(update={"path": "else"}))
        server.models = Reply({"data": [{"id": MODEL, "description": "x" * 2**20}]})
        check_servers(settings)
        server.models = Reply({"error": "no list here"}, 404)
        check_servers(settings)
        server.models = Reply({"error": "who?"}, 401)
        with pytest.raises(UserError, match=r"status 401.*CIRLOOP_API_KEY"):
            check_servers(settings)
    assert not server.requests


@pytest.mark.parametrize("key", ["two\nlines", "two words", "schlüssel"])
def test_what_no_header_can_hold_is_no_key(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(endpoints.KEY_VARIABLE, key)
    with serving() as server, pytest.raises(UserError, match="CIRLOOP_API_KEY is no key") as caught:
        check_servers(Asked(tmp_path, server).settings)
    assert key not in str(caught.value) and not server.requests


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:8000", "ftp://a/v1", "http://me:word@a/v1", "http://a/v1?key=1", "",
        "http://a:99999/v1", "http://a:0/v1", "http://a:b/v1", "http://[::1/v1", "http://a b/v1",
        "http://a\nb/v1", "http://💩/v1",
    ],
)  # fmt: skip
def test_an_address_is_an_address_alone(url: str) -> None:
    with pytest.raises(ValidationError, match="CIRLOOP_API_KEY"):
        ServerFoundation(path=MODEL, url=(url,))


def test_addresses_and_limits_are_no_part_of_a_result() -> None:
    read: Any = TypeAdapter(FoundationConfig)
    given = {"type": "server", "path": MODEL, "url": "http://a:1/v1, https://b/v1/ "}
    settings = read.validate_python(given)
    assert settings.url == ("http://a:1/v1", "https://b/v1")
    assert {*type(settings).model_fields} - settings.resultless == {
        "type", "path", "image_format", "max_side", "yes_no", "extra",
    }  # fmt: skip
    with pytest.raises(ValidationError, match="seed: set by the program"):
        read.validate_python({**given, "extra": {"seed": 1}})
