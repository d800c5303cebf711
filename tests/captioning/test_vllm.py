"""The real vLLM: its offline engine and its server write what the same model writes in this
process.

These tests need vLLM, which `scripts/vllm_env.sh --dev` puts into .venv-vllm. On a CPU an engine
takes one or two minutes to start.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from cirloop.backbones.weights import resolve
from cirloop.captioning.foundation import VllmFoundation
from cirloop.stages.caption import caption
from cirloop.types import UserError
from tests.stages.copies import CHECKPOINT, NEGATIVES, context, copied

HERE = find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(
    not HERE, reason="needs vLLM: scripts/vllm_env.sh --dev, then .venv-vllm/bin/python -m pytest"
)
STARTS = 400
"""Seconds in which a server must be there."""
GREEDY = {"num_candidates": 1, "min_verify_probability": 0.3, "max_round_trip_rank": 66}
ENGINE = {
    "path": "tiny",
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "gpu_memory_utilization": 0.3,
}


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


@pytest.mark.skipif(HERE, reason="vLLM is here")
def test_without_vllm_the_way_out_is_said() -> None:
    with pytest.raises(UserError, match=r"vLLM is not installed here.*scripts/vllm_env.sh"):
        VllmFoundation(path="tiny").resolve_dir()


def captions(small: Any, finished: Path, directory: Path, foundation: dict[str, Any]) -> Any:
    """The texts of a round, written and verified by a foundation model."""
    run = context(small(directory, foundation=foundation, captioning=GREEDY))
    checkpoint, negatives = copied(run, finished, CHECKPOINT, NEGATIVES)
    samples = caption(run, 1, negatives, checkpoint, [])
    assert samples is not None
    run.models.release()
    return samples.read()


@pytest.fixture(scope="module")
def here(small: Any, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The round by the captioner of this process."""
    foundation = {"type": "qwen2_vl", "path": "tiny", "dtype": "float32"}
    return captions(small, finished, tmp_path_factory.mktemp("here"), foundation)


def assert_same_round(rows: Any, expected: Any) -> None:
    """Equal texts, the same rows accepted and rejected, probabilities of yes within 1e-3."""
    assert expected["accepted"] and expected["rejected"]

    def texts(round_: Any) -> list[tuple[str, ...]]:
        accepted = [
            (row["source"], row["triplet"]["target"], row["triplet"]["query"]["text"])
            for row in round_["accepted"]
        ]
        rejected = [
            (row["source"], row["image"], row["text"], row["reason"]) for row in round_["rejected"]
        ]
        return accepted + rejected

    assert texts(rows) == texts(expected)
    for kind in ("accepted", "rejected"):
        for row, other in zip(rows[kind], expected[kind], strict=True):
            assert row["checks"] == pytest.approx(other["checks"], abs=1e-3)


@pytest.mark.vllm
@needs_vllm
def test_the_engine_writes_and_verifies_a_round_as_this_process_does(
    here: Any, small: Any, finished: Path, tmp_path: Path
) -> None:
    rows = captions(small, finished, tmp_path, {"type": "vllm", **ENGINE})
    assert_same_round(rows, here)


@pytest.mark.vllm
@needs_vllm
def test_settings_reach_the_engine() -> None:
    captioner: Any = VllmFoundation(**ENGINE).build()
    config = captioner._llm.llm_engine.vllm_config
    assert config.model_config.enforce_eager and config.model_config.max_model_len == 1024
    assert config.scheduler_config.max_num_seqs == 16
    assert config.parallel_config.tensor_parallel_size == 1
    assert config.model_config.quantization is None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of vLLM's own server of the embedded model."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", resolve("tiny"),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024",
    ]  # fmt: skip
    log = tmp_path / "server.txt"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        )
    try:
        deadline = time.monotonic() + STARTS
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


@pytest.mark.vllm
@needs_vllm
def test_its_server_writes_and_verifies_a_round_as_this_process_does(
    here: Any, server: str, small: Any, finished: Path, tmp_path: Path
) -> None:
    foundation = {"type": "server", "path": "tiny", "url": [server], "max_in_flight": 16}
    rows = captions(small, finished, tmp_path / "run", foundation)
    assert_same_round(rows, here)
