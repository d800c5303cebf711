"""Servers of a foundation model that misbehave, over loopback: what passes is asked again,
what does not is one clear error, and no answer is lost."""

from __future__ import annotations

import socket
import subprocess
import time
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

from cirloop.captioning.backends import endpoints
from cirloop.captioning.backends.endpoints import check_servers
from cirloop.monitoring import preemption
from cirloop.types import UserError
from tests.captioning.asked import REQUESTS, Asked
from tests.captioning.chat_server import (
    Brain,
    Reply,
    by_rule,
    chat,
    sent_text,
    serving,
)


@pytest.fixture(autouse=True)
def without_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "FIRST_WAIT_S", 0.01)
    monkeypatch.delenv(endpoints.KEY_VARIABLE, raising=False)


COUNTED = {"prompt_tokens": 10**4000, "completion_tokens": 5}
PASSING = {
    "429 with Retry-After": Reply({"error": "slow down"}, 429, {"retry-after": "1"}),
    "429 without": Reply({"error": "slow down"}, 429),
    "500": Reply(b"<h1>oops</h1>", 500, {"content-type": "text/html"}),
    "half an answer": Reply(chat("x" * 500).content, cut=120),
    "invalid JSON": Reply(b'{"choices": [{"message": '),
    "HTML": Reply(b"<html>sign in</html>", headers={"content-type": "text/html"}),
    "another form": Reply({"choices": []}),
    "1 MB": chat("x" * 2**20),
    "compressed": Reply(b"\x1f\x8b", headers={"content-encoding": "gzip"}),
    "hanging": Reply(chat("late").content, delay=1.5),
    "a wait until no year": Reply({}, 429, {"retry-after": f"{'9' * 30} Jan 2020 00:00:00 +0000"}),
    "a wait in no zone": Reply({}, 429, {"retry-after": f"Fri, 31 Dec 2020 23:59:59 +{'9' * 30}"}),
    "more tokens than digits": Reply({**chat("x").content, "usage": COUNTED}),
}
"""Bad answers that may be followed by a good one."""
UNREADABLE = (
    "invalid JSON", "HTML", "another form", "1 MB", "compressed", "more tokens than digits",
)  # fmt: skip


def once(bad: Reply) -> Brain:
    """The first request meets the bad answer, the others none."""
    replies = iter([bad])
    return lambda body: next(replies, None) or by_rule(body)


@pytest.mark.parametrize("case", PASSING)
def test_what_passes_is_asked_again_and_nothing_is_lost(case: str, tmp_path: Path) -> None:
    with serving() as good:
        expected = Asked(tmp_path / "good", good).generate(REQUESTS[:2])
    with serving(once(PASSING[case])) as server:
        asked = Asked(tmp_path, server, timeout_s=1.0)
        assert asked.generate(REQUESTS[:2]) == expected
        assert len(server.requests) == 7


@pytest.mark.parametrize("case", [c for c in PASSING if c not in ("429 with Retry-After", "1 MB")])
def test_what_does_not_pass_is_one_error_and_answers_are_kept(case: str, tmp_path: Path) -> None:
    def bad_for_one(body: dict[str, Any]) -> Reply:
        return PASSING[case] if "with 2 dots" in sent_text(body) else by_rule(body)

    with serving(bad_for_one) as server:
        asked = Asked(tmp_path, server, timeout_s=0.2, time_limit_s=0.6, max_in_flight=1)
        with pytest.raises(UserError) as caught:
            asked.generate(REQUESTS[:2])
    message = str(caught.value)
    assert message.count("foundation.url http") == 1 and server.url in message, message
    assert "3 of 6 questions were answered and are kept" in message and "--auto_resume" in message
    assert case in UNREADABLE or "foundation.time_limit_s" in message, message
    with serving() as server:
        Asked(tmp_path, server).generate(REQUESTS[:2])
    assert len(server.requests) == 3


def test_a_server_that_asks_to_wait_is_left_alone_so_long(tmp_path: Path) -> None:
    with serving(once(Reply({}, 429, {"retry-after": "1"}))) as server:
        times: list[float] = []
        brain = server._brain

        def timed(body: dict[str, Any]) -> Reply:
            times.append(time.monotonic())
            return brain(body)

        server._brain = timed
        Asked(tmp_path, server, max_in_flight=1).generate(REQUESTS[:1])
    assert 0.95 < times[1] - times[0] < 3
    far = Reply({}, 429, {"retry-after": "Fri, 31 Dec 2100 23:59:59 GMT"})
    message = r"status 429.*asks to wait for [\d,]+ s.*0 of 24"
    with serving(lambda body: far) as server, pytest.raises(UserError, match=message):
        Asked(tmp_path / "b", server).generate()
    assert len(server.requests) <= 4


REFUSED = {
    "no logprobs": (
        chat("yes"),
        r"no logprobs.*--foundation.yes_no text.*min_verify_probability 0",
    ),
    "no key": (Reply({"error": "who?"}, 401), r"status 401.*CIRLOOP_API_KEY"),
    "no such address": (Reply({"error": "what?"}, 404), r"status 404.*/v1.*'some-model'"),
    "a redirect": (Reply(b"", 307, {"location": "http://127.0.0.1:9/v1"}), r"redirects to http"),
    "no words of logprobs": (
        chat("yes", logprobs={"content": [{"top_logprobs": []}]}),
        "no logprobs",
    ),
    "a codec of Python": (
        Reply(b"no \xff", 400, {"content-type": "text/plain; charset=zlib"}),
        "status 400: no \ufffd",
    ),
    "a bad request": (Reply({"error": "no images, please"}, 400), r"status 400: .*no images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_will_never_pass_ends_at_once(case: str, tmp_path: Path) -> None:
    reply, message = REFUSED[case]
    with serving(lambda body: reply) as server, pytest.raises(UserError, match=message):
        Asked(tmp_path, server).yes()
    assert len(server.requests) <= 4


@pytest.mark.parametrize("logprob", [float("nan"), float("inf"), 1e4, 0.5])
def test_a_probability_that_is_none_is_no_answer(logprob: float, tmp_path: Path) -> None:
    top = [{"token": "yes", "logprob": logprob}, {"token": "no", "logprob": -1.0}]
    reply = chat("yes", logprobs={"content": [{"top_logprobs": top}]})
    with (
        serving(lambda body: reply) as server,
        pytest.raises(UserError, match=r"an answer is none of a chat \(.*logprob: .*0 of 8"),
    ):
        Asked(tmp_path, server).yes()


def test_of_two_addresses_one_may_ask_to_wait_for_a_day(tmp_path: Path) -> None:
    day = Reply({}, 429, {"retry-after": "86400"})
    with serving(lambda body: day) as busy, serving() as good:
        rows = Asked(tmp_path, busy, good).generate()
        assert rows == Asked(tmp_path / "good", good).generate()
    assert len(good.requests) == 48 and len(busy.requests) <= 4


def test_a_stop_does_not_wait_for_as_long_as_a_server_asks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopping(body: dict[str, Any]) -> Reply:
        Timer(0.5, monkeypatch.setattr, (preemption, "_requested", True)).start()
        return Reply({}, 429, {"retry-after": "15"})

    began = time.monotonic()
    with serving(stopping) as server, pytest.raises(preemption.GracefulStop):
        Asked(tmp_path, server, max_in_flight=1).generate()
    assert time.monotonic() - began < 5


def test_an_address_without_an_answer_is_named_where_the_limit_comes_first(tmp_path: Path) -> None:
    with (
        serving(lambda body: PASSING["hanging"]) as server,
        pytest.raises(UserError, match=rf"{server.url}: no answer; for 0.2 s.*time_limit_s"),
    ):
        Asked(tmp_path, server, time_limit_s=0.2).generate(REQUESTS[:1])


def test_no_part_of_the_key_is_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where what a server said is cut, nor where the variable ends in a line break."""
    monkeypatch.setenv(endpoints.KEY_VARIABLE, "correct-horse-battery\n")
    for reply in (
        Reply(b"x" * 290 + b"correct-horse-battery", 401),
        Reply(b"x" * 190 + b"correct-horse-battery"),
    ):
        with serving(lambda body, reply=reply: reply) as server, pytest.raises(UserError) as caught:
            Asked(tmp_path, server).generate(REQUESTS[:1])
        assert "xxx" in str(caught.value) and "corre" not in str(caught.value)
        assert server.headers[0]["authorization"] == "Bearer correct-horse-battery"


def unused_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/v1"


def test_nobody_there_is_one_error(tmp_path: Path) -> None:
    dead = unused_address()
    with pytest.raises(
        UserError, match=rf"{dead}: no connection .*foundation.time_limit_s.*0 of 24"
    ):
        Asked(tmp_path, dead, time_limit_s=0.2).generate()
    with pytest.raises(UserError, match=rf"foundation.url {dead}: no connection"):
        check_servers(Asked(tmp_path, dead).settings)


def test_of_two_addresses_one_may_be_dead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dead = unused_address()
    with serving() as server:
        asked = Asked(tmp_path, dead, server)
        check_servers(asked.settings)
        assert f"{dead}: no connection" in caplog.text
        assert asked.generate() == Asked(tmp_path / "other", server).generate()
        assert len(server.requests) == 48


@pytest.mark.parametrize("status", [429, 500, 503])
def test_of_two_addresses_one_may_fail_each_time(status: int, tmp_path: Path) -> None:
    with serving(lambda body: Reply({}, status)) as bad, serving() as good:
        rows = Asked(tmp_path, bad, good).generate()
        assert rows == Asked(tmp_path / "good", good).generate()
    assert len(good.requests) == 48


def test_questions_are_shared_out_among_addresses(tmp_path: Path) -> None:
    def slow(body: dict[str, Any]) -> Reply:
        return Reply(by_rule(body).content, delay=0.02)

    with serving(slow) as first, serving(slow) as second:
        Asked(tmp_path, first, second).generate()
    assert len(first.requests) + len(second.requests) == 24
    assert min(len(first.requests), len(second.requests)) >= 8


def test_a_certificate_that_is_not_trusted_is_one_error_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=test", "-days", "2",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(certificate=(certificate, key)) as server:
        with pytest.raises(UserError, match=r"certificate is not trusted \(.*SSL_CERT_FILE"):
            Asked(tmp_path / "answers", server).generate()
        assert not server.requests
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert len(Asked(tmp_path / "answers", server).generate()) == len(REQUESTS)
