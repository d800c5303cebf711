"""The journal: what a captioner answered is not asked again, and no result depends on it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cirloop.captioning.base import Answer, CaptionRequest
from cirloop.captioning.batched_captioner import BatchedCaptioner
from cirloop.captioning.foundation import Qwen2VLFoundation
from cirloop.captioning.journal import Journal
from cirloop.captioning.prompts import REWRITE, VERIFY
from cirloop.data.images import DrawnImages
from cirloop.types import ImageId
from tests.captioning.asked import draw

ANSWERS = {f"key {n}": [["a text", True], n / 3] for n in range(4)}


def test_whole_lines_are_answers_wherever_a_write_was_cut(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "whole")
    for name, answer in ANSWERS.items():
        journal.add(name, answer, tokens=5)
    assert journal.tokens == 20
    written = (tmp_path / "whole" / "0.jsonl").read_bytes()
    ends = [i + 1 for i, byte in enumerate(written) if byte == 10]
    directory = tmp_path / "cut"
    directory.mkdir()
    for length in range(len(written) + 1):
        (directory / "0.jsonl").write_bytes(written[:length])
        cut = Journal(directory)
        whole = sum(end <= length for end in ends)
        assert [name in cut for name in ANSWERS] == [n < whole for n in range(len(ANSWERS))]
        assert cut.tokens == 5 * whole
        for name in [*ANSWERS][whole:]:
            cut.add(name, ANSWERS[name], tokens=5)
        again = Journal(directory)
        assert {name: again[name] for name in ANSWERS} == ANSWERS and again.tokens == 20


def test_a_damaged_line_is_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path)
    for name, answer in ANSWERS.items():
        journal.add(name, answer)
    file = tmp_path / "0.jsonl"
    lines = file.read_text().splitlines()
    for damaged in (lines[1].replace("a text", "b text"), "{}", "[1, 2]", "nonsense", "[" * 99_999):
        file.write_text("\n".join([lines[0], damaged, *lines[2:]]) + "\n")
        caplog.clear()
        assert [name in Journal(tmp_path) for name in ANSWERS] == [True, False, True, True]
        assert "0.jsonl: 1 damaged lines" in caplog.text


def test_runs_that_share_a_directory_find_each_other_s_answers(tmp_path: Path) -> None:
    first, second = (Journal(tmp_path / run, shared=tmp_path) for run in ("one", "two"))
    for name, answer in ANSWERS.items():
        first.add(name, answer, tokens=5)
    second.add("another", [["b", True]], tokens=7)
    for run, tokens in (("one", 20), ("two", 7)):
        found = Journal(tmp_path / run, shared=tmp_path)
        assert {name: found[name] for name in ANSWERS} == ANSWERS and "another" in found
        assert found.tokens == tokens
    assert "another" not in Journal(tmp_path / "one")


class Stop(Exception):
    pass


class InProcess:
    """The embedded model as a captioner, which notes what it is asked."""

    def __init__(self, directory: Path) -> None:
        self.captioner: Any = Qwen2VLFoundation(path="tiny", dtype="float32").build()
        self.images, self.directory = DrawnImages(draw), directory
        self.asked: list[list[CaptionRequest]] = []
        for kind in ("generate", "yes_probability"):
            setattr(self.captioner, kind, self._noted(getattr(self.captioner, kind)))

    def _noted(self, method: Any) -> Any:
        def noted(prompt: Any, requests: Any, *rest: Any) -> Any:
            self.asked.append([*requests])
            return method(prompt, requests, *rest)

        return noted

    def eyes(
        self, answers: Path | None, stop: int = 99, share: tuple[int, int] = (0, 1)
    ) -> BatchedCaptioner:
        """With a journal in `answers`; a stop after `stop` batches."""

        def until(batches: Any, title: str) -> Iterator[Any]:
            for number, batch in enumerate(batches):
                if number == stop:
                    raise Stop
                yield batch

        journal = None if answers is None else Journal(answers, share[0])
        cache = self.directory / "cache"
        return BatchedCaptioner(
            self.captioner, self.images, cache, 3, until, share=share, journal=journal
        )


REQUESTS = [CaptionRequest(ImageId("0"), ImageId(str(n)), f"with {n} dots") for n in range(1, 9)]


def write(eyes: BatchedCaptioner) -> list[list[Answer]]:
    return eyes.generate(REWRITE, REQUESTS, 5, [0.0, 1.5], 7, "test")


def judge(eyes: BatchedCaptioner) -> list[float]:
    return eyes.yes_probability(VERIFY, REQUESTS, "test")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    return InProcess(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("ask", [write, judge])
def test_a_stopped_captioner_asks_what_is_missing_to_the_answers_of_an_unbroken_one(
    ask: Any, model: InProcess, tmp_path: Path
) -> None:
    """Sampled texts depend on their batch, so a batch of which a line was cut is asked whole."""
    unbroken = ask(model.eyes(None))
    with pytest.raises(Stop):
        ask(model.eyes(tmp_path, stop=2))
    model.asked.clear()
    assert ask(model.eyes(tmp_path)) == unbroken
    assert [len(batch) for batch in model.asked] == [2]
    assert ask(model.eyes(tmp_path)) == unbroken and len(model.asked) == 1
    file = tmp_path / "0.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    assert ask(model.eyes(tmp_path)) == unbroken and len(model.asked) == 2


def test_what_several_processes_were_told_any_number_of_them_finds(
    model: InProcess, tmp_path: Path
) -> None:
    unbroken = write(model.eyes(None))
    for process in range(2):
        write(model.eyes(tmp_path, share=(process, 2)))
    assert {path.name for path in tmp_path.iterdir()} == {"0.jsonl", "1.jsonl"}
    model.asked.clear()
    assert write(model.eyes(tmp_path)) == unbroken and not model.asked


def test_other_questions_are_not_answered_by_the_journal(model: InProcess, tmp_path: Path) -> None:
    write(model.eyes(tmp_path))
    num = len((tmp_path / "0.jsonl").read_text().splitlines())
    asked = {
        "seed": (REWRITE, REQUESTS, 5, [0.0, 1.5], 8, "test"),
        "tokens": (REWRITE, REQUESTS, 6, [0.0, 1.5], 7, "test"),
        "temperature": (REWRITE, REQUESTS, 5, [0.0, 1.4], 7, "test"),
        "prompt": (VERIFY, REQUESTS, 5, [0.0, 1.5], 7, "test"),
        "another in the batch": (REWRITE, REQUESTS[1:4], 5, [0.0, 1.5], 7, "test"),
    }
    for which, arguments in asked.items():
        model.asked.clear()
        assert model.eyes(tmp_path).generate(*arguments) and model.asked, which
    lines = [json.loads(line)[0] for line in (tmp_path / "0.jsonl").read_text().splitlines()]
    assert len(lines) == len({*lines}) > num
