"""`python -m cirloop.search` as a shell runs it: tables, JSON lines, errors and exit codes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cirloop.tools.search.engine import Engine
from cirloop.tools.search.queries import MAX_LINE, SearchQuery, answers, lines_of, parse_line
from cirloop.types import ImageId, UserError
from tests.commands import command

SCRIPT = "cirloop.search"
ONE = "shapes:val:00003"


def test_a_table_and_a_json_line_say_the_same(finished: Path, engine: Engine) -> None:
    asked = [
        "--experiment_dir",
        finished,
        "--reference",
        ONE,
        "--text",
        "make it <b>red</b>",
        "-k",
        "3",
    ]
    best = engine.label("best")
    plain, machine = command(SCRIPT, *asked), command(SCRIPT, *asked, "--json", "--iteration", best)
    assert plain.returncode == machine.returncode == 0
    found = json.loads(machine.stdout)
    hits = engine.search(best, ImageId(ONE), "make it <b>red</b>", 3).hits
    assert [(r["image"], r["rank"]) for r in found["results"]] == [
        (hit.image, hit.rank) for hit in hits
    ]
    assert [r["score"] for r in found["results"]] == pytest.approx(
        [hit.score for hit in hits], abs=1e-6
    )
    assert found["ms"] > 0 and ONE not in [r["image"] for r in found["results"]]
    assert all(f"{hit.score:.4f}" in plain.stdout and hit.image in plain.stdout for hit in hits)
    assert "make it <b>red</b>" in plain.stdout
    assert f"iteration {best} is the best by recall@1 on shapes_val (" in plain.stderr
    assert "is the best by" not in machine.stderr


def test_json_lines_are_answered_in_order_and_wrong_ones_named(
    finished: Path, tmp_path: Path, engine: Engine
) -> None:
    lines = [
        b'{"reference": "%s", "text": "make it red"}' % ONE.encode(),
        b"rubbish",
        b"",
        b'{"text": "a red circle", "k": 1}',
        b'{"reference": 3, "text": [], "k": true, "more": 1}',
        b'{"reference": "/etc/passwd"}',
        b'{"text": "\xff"}',
        b'{"text": "' + b"x" * MAX_LINE + b'"}',
        b"[" * 5000,
        b'{"text": "a", "text": "b"}',
        b"{}",
        b'{"reference": "%s", "k": 2}' % ONE.encode(),
    ]
    path = tmp_path / "queries.jsonl"
    path.write_bytes(b"\n".join(lines))
    done = command(SCRIPT, "--experiment_dir", finished, "--queries", path, "-k", "4")
    assert done.returncode == 1
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["line"] for row in rows] == [1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert [len(row.get("results", ())) for row in rows] == [4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2]
    said = {row["line"]: row["error"] for row in rows if "error" in row}
    assert all(name in said[5] for name in ("'reference'", "'text'", "'k'", "'more'"))
    assert "known kind" in said[6] and "UTF-8" in said[7] and "bytes" in said[8]
    assert "nested" in said[9]
    assert "more than once" in said[10] and "nothing to search for" in said[11]
    best = engine.search("1", ImageId(ONE), "make it red", 4).hits
    assert [r["image"] for r in rows[0]["results"]] == [hit.image for hit in best]


def test_an_answer_comes_before_the_next_line_is_read(engine: Engine) -> None:
    read: list[int] = []

    def lines() -> Any:
        for number in range(2):
            read.append(number)
            yield b'{"text": "red"}'

    first = next(answers(engine, "1", lines(), 1, False))
    assert first["line"] == 1 and read == [0]


def test_standard_input(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "red"}\n')))
    done = command(SCRIPT, "--experiment_dir", finished, "--queries", "-", "-k", "1")
    assert done.returncode == 0 and len(json.loads(done.stdout)["results"]) == 1


def test_without_a_query_the_index_is_made_and_nothing_printed(finished: Path) -> None:
    done = command(SCRIPT, "--experiment_dir", finished, "--iteration", "base")
    assert (done.returncode, done.stdout) == (0, "")
    assert "66 images" in done.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--iteration", "9"], "There are: base, 0, 1"),
        (["--queries", "x.jsonl", "--text", "red"], "give the one or the others"),
        (["--queries", "no.jsonl"], "No such file"),
        (["--queries", "/dev/null"], "is no file"),
        (["--text", " "], "empty"),
        (["--reference", "no.png"], "no image of the gallery"),
        (["--gallry", "x"], "--gallery"),
    ],
)
def test_errors_are_one_message(finished: Path, flags: list[str], said: str) -> None:
    done = command(SCRIPT, "--experiment_dir", finished, *flags)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_a_directory_that_is_no_run(tmp_path: Path) -> None:
    done = command(SCRIPT, "--experiment_dir", tmp_path, "--text", "red")
    assert done.returncode == 2 and "is no run directory" in done.stderr


def test_lines_end_at_line_feeds_only(tmp_path: Path) -> None:
    (tmp_path / "q").write_bytes('{"text": "a\u2028b"}\r\n{"text": "c"}'.encode())
    assert [parse_line(line) for line in lines_of(tmp_path / "q")] == [
        SearchQuery(text="a\u2028b"),
        SearchQuery(text="c"),
    ]
    with pytest.raises(UserError, match="must be an object"):
        parse_line(b"3")
