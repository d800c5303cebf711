"""Rounds of a run whose texts a server writes: in two processes, and killed in the middle."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from cirloop.artifacts.store import file_digests
from cirloop.cli import runner
from cirloop.stages.caption import caption
from cirloop.types import UserError
from tests.captioning.chat_server import MODEL, ChatServer, Reply, by_rule, serving
from tests.commands import ROOT, command, environment
from tests.stages.copies import CHECKPOINT, NEGATIVES, SAMPLES, context, copied

LAX = {"num_candidates": 2, "min_verify_probability": 0.2, "max_round_trip_rank": 0}
IN_FLIGHT = 8


def foundation(server: ChatServer) -> dict[str, Any]:
    return {"type": "server", "path": MODEL, "url": [server.url], "max_in_flight": IN_FLIGHT}


def bodies(server: ChatServer) -> Counter[str]:
    return Counter(json.dumps(body, sort_keys=True) for body in server.requests)


@pytest.mark.full
def test_with_two_processes_no_question_is_asked_twice(
    small: Any, finished: Path, tmp_path: Path
) -> None:
    def slow(body: dict[str, Any]) -> Reply:
        return Reply(by_rule(body).content, delay=0.05)

    digests = []
    for num in (1, 2):
        with serving(slow) as server:
            runtime = {"num_processes": num}
            config = small(
                tmp_path / str(num), foundation=foundation(server), captioning=LAX, runtime=runtime
            )
            run = context(config)
            checkpoint, negatives = copied(run, finished, CHECKPOINT, NEGATIVES)
            caption(run, 1, negatives, checkpoint, [])
            digests.append(file_digests(tmp_path / str(num) / SAMPLES))
            assert 1 < server.most_at_once <= IN_FLIGHT
            assert len(server.requests) > 100 and {*bodies(server).values()} == {1}
    assert digests[0] == digests[1]


@pytest.mark.parametrize("num_processes", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize("type_", ["server", "qwen2_vl"])
def test_a_second_run_asks_nothing_that_a_first_one_was_told(
    type_: str, num_processes: int, small: Any, finished: Path, tmp_path: Path
) -> None:
    """With a shared directory of answers; without, a server is asked all again."""
    digests, asked = [], []
    with serving() as server:
        of_type = foundation(server) if type_ == "server" else {}
        for name, shared in (("one", "answers"), ("two", "answers"), ("alone", None)):
            answers_dir = shared and str(tmp_path / shared)
            config = small(
                tmp_path / name,
                foundation=of_type,
                captioning=LAX,
                runtime={"num_processes": num_processes, "answers_dir": answers_dir},
            )
            run = context(config)
            checkpoint, negatives = copied(run, finished, CHECKPOINT, NEGATIVES)
            caption(run, 1, negatives, checkpoint, [])
            digests.append(file_digests(tmp_path / name / SAMPLES))
            asked.append(len(server.requests))
            server.requests.clear()
    assert digests[0] == digests[1] == digests[2]
    if type_ == "server":
        assert asked[0] == asked[2] > 100 and not asked[1]
    sizes = {path.parent.name: path.stat().st_size for path in tmp_path.glob("answers/*/*.jsonl")}
    assert len(sizes) == 1, "the second run had nothing to add"


def test_a_server_that_is_away_is_told_before_anything_is_made(small: Any, tmp_path: Path) -> None:
    with serving() as server:
        config = small(tmp_path / "run", foundation=foundation(server))
    with pytest.raises(
        UserError, match=r"foundation.url http://127.*no connection \(.*(refused|failed)"
    ):
        runner.run(config)
    assert not list((tmp_path / "run").glob("*.json"))


@pytest.mark.full
def test_a_run_killed_twice_asks_what_is_missing_to_the_files_of_an_unbroken_one(
    small: Any, tmp_path: Path
) -> None:
    """A question that was at the server when its run was killed is asked once more, no other."""
    children: list[subprocess.Popen[str]] = []
    kills = [40, 90]

    def killing(body: dict[str, Any]) -> Reply:
        if kills and len(server.requests) >= kills[0]:
            kills.pop(0)
            children[-1].send_signal(signal.SIGKILL)
        return Reply(by_rule(body).content, delay=0.02)

    with serving(killing) as server:
        own = {"foundation": foundation(server), "captioning": LAX}
        config = small(tmp_path / "killed", **own, training={"iteration_0_steps": 2})
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(config.to_json()))
        flags = ["train_iterative.py", "--config", str(file), "--experiment_dir"]
        codes = []
        while kills or not codes or codes[-1] == -signal.SIGKILL:
            words = [sys.executable, *flags, str(tmp_path / "killed"), "--auto_resume"]
            child = subprocess.Popen(
                words, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
            )
            children.append(child)
            _, said = children[-1].communicate(timeout=300)
            codes.append(children[-1].returncode)
            assert codes[-1] in (0, -signal.SIGKILL), said
        assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
        asked = bodies(server)
        assert max(asked.values()) <= 3 and asked.total() - len(asked) <= 2 * IN_FLIGHT
        server.requests.clear()
        done = command(*flags, str(tmp_path / "unbroken"))
        assert done.returncode == 0, done.stderr
        assert bodies(server) == Counter(asked.keys())
    samples = [(tmp_path / name / SAMPLES).read_bytes() for name in ("killed", "unbroken")]
    assert samples[0] == samples[1]
    assert not (tmp_path / "killed" / ".work").exists()
