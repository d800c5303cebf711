"""Every program of benchmarks/ and scripts/ runs to its end, at its smallest size, on a
processor."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from cirloop.data.shapes.splits import build_splits
from tests.backbones.tiny_models import write_towers
from tests.commands import ROOT, command
from tests.docs.documented_commands import ROWS
from tests.docs.shell import Shell
from tests.fake_datasets import write_grocery
from tests.faults.harness import Ended

LIMIT = 600
"""Seconds for a program; most take a few."""


@dataclass(frozen=True, slots=True)
class Case:
    """A program, flags that make its work small, and what it says last. IMAGES is a directory of
    images, RUN that of a finished run, OUT an empty one."""

    program: str
    flags: str = ""
    says: str = ""


TOY = (
    "--output OUT --seeds 1 --rounds 1 --families 4 --triplets 24 --eval_families 4 --warm_up 2"
    " --steps 2 --batch_size 8 --threads 1"
)
SHORT = (
    "--steps 6 --see 4 --see_steps 1 --align 4 --align_steps 1 --compare_steps 1 --rewrite 4"
    " --rewrite_steps 1 --verify 4 --describe 2 --families 2 --per_family 4 --eval_every 6"
    " --eval_examples 4"
)
CASES = (
    Case(
        "benchmarks/adapter_dtype.py",
        "--output OUT --seeds 1 --families 4 --triplets 24 --eval_families 4 --warm_up 4"
        " --batch_size 8",
        "difference",
    ),
    Case("benchmarks/band.py", "--queries 20 --images 40 --dimensions 8 --repeats 2", "±"),
    Case("benchmarks/band_on_curves.py", "--queries 4 --images 80", "linear"),
    Case(
        "benchmarks/kill_and_resume.py",
        "--kills 3 --each 3 --full_disk 0.5 --workers 1",
        "3 of 3",
    ),
    Case(
        "benchmarks/kill_and_resume.py",
        "--processes 2 --strategy zero2 --kills 1",
        "1 of 1 resumed to an equal loss curve",
    ),
    Case("benchmarks/known_right_negatives.py", says="top_k"),
    Case("benchmarks/knn_text.py", "--samples 200 --dimensions 16 --repeats 2", "clustered: "),
    Case(
        "benchmarks/image_check.py",
        "--images IMAGES --num 6 --workers 1 --repeats 1",
        "6 files, 1 workers",
    ),
    Case(
        "benchmarks/mining_vs_st.py",
        "--queries 30 --images 60 --dimensions 16 --repeats 2",
        "margin: FAISS path / ours",
    ),
    Case("benchmarks/plan_against_measured.py", "--size small", "weights"),
    Case("benchmarks/plan_against_measured.py", "--runs 1 --families 6 --steps 2", "1 runs"),
    Case("benchmarks/large_report.py", "--queries 20 --images 12 --iterations 1 --k 2", "again: "),
    Case(
        "benchmarks/score_cirr.py",
        "--queries 10 --images 70 --dimensions 8 --repeats 2",
        "s to score and write",
    ),
    Case(
        "benchmarks/search_latency.py",
        "--experiment_dir RUN --images 12 --queries 3 --k 2",
        "page, by POST",
    ),
    Case(
        "benchmarks/server_throughput.py",
        "--questions 8 --in_flight 1,4 --repeats 2 --delay_ms 5 --in_process tiny --new_tokens 4",
        "in this process",
    ),
    Case(
        "benchmarks/shared_base_memory.py",
        "--size small",
        "a round with texts on the embedder's weights",
    ),
    Case("benchmarks/soak.py", "--rounds 5", "growth of"),
    Case(
        "benchmarks/study_negatives.py",
        f"{TOY} --part table --strategies band,attribute_mismatch",
        "attribute_mismatch",
    ),
    Case(
        "benchmarks/study_negatives.py",
        f"{TOY} --part recall --arms control,band,top_k_all+score_margin",
        "band",
    ),
    Case("scripts/check_environment.py", "--lists"),
    Case("scripts/command_pages.py", "--check"),
    Case("scripts/pretrain_tiny.py", f"--output OUT {SHORT}", "parameters"),
)
HERE = {
    *("benchmarks/study_photographs.py", "benchmarks/study_rounds.py"),
    *("scripts/check.sh", "scripts/lock.py", "scripts/setup_env.sh"),
}
"""Programs with a test of their own below."""
ELSEWHERE = {
    # it is a part of those that measure models
    "benchmarks/_model.py": "tests/docs/documented_commands.py",
    "benchmarks/_study.py": "tests/benchmarks/test_scripts.py",
    "benchmarks/_killed_processes.py": "tests/benchmarks/test_scripts.py",
    "scripts/slurm.sbatch": "tests/monitoring/test_stopping.py",
    "scripts/convert_towers.py": "tests/scripts/test_convert_towers.py",
    "scripts/_gpu_round.py": "tests/scripts/test_gpu_check.py",
    "scripts/gpu_check.py": "tests/scripts/test_gpu_check.py",
    "scripts/gpu_check.sh": "tests/scripts/test_gpu_check.py",
    # it installs gigabytes; what it makes is what these tests need
    "scripts/vllm_env.sh": "tests/captioning/test_vllm.py",
}
"""Programs that another file runs."""


def programs() -> set[str]:
    folders = [ROOT / "benchmarks", ROOT / "scripts"]
    return {
        str(path.relative_to(ROOT))
        for folder in folders
        for path in folder.iterdir()
        if path.is_file()
    }


def test_every_program_is_run_by_a_test() -> None:
    documented = {word for row in ROWS if not row.not_here for word in row.command.split()}
    run = {case.program for case in CASES} | HERE | {*ELSEWHERE} | documented
    assert programs() - run == set(), "give them a case"
    assert {case.program for case in CASES} | HERE <= programs(), "no such program any more"
    for program in programs() & {*ELSEWHERE}:
        assert (ROOT / ELSEWHERE[program]).is_file(), f"{ELSEWHERE[program]} is to run {program}"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    made = Shell(tmp_path_factory.mktemp("shell") / "log.txt")
    yield made
    made.close()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("images")
    for row in range(4):
        Image.fromarray(build_splits()["train"].pixels(row)).save(directory / f"{row}.png")
    return directory


@pytest.mark.full
@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.program} {case.flags}".replace("/", "|")[:60].strip()
)
def test_it_ends_well(
    case: Case, shell: Shell, images: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    places = {"IMAGES": images, "OUT": tmp_path / "out"}
    if "RUN" in case.flags:
        places["RUN"] = request.getfixturevalue("finished")
    flags = [str(places.get(word, word)) for word in shlex.split(case.flags)]
    code, said = shell.run([case.program, *flags], tmp_path, LIMIT)
    assert code == 0, said[-4000:]
    assert case.says in said, said[-4000:]


@pytest.mark.full
def test_a_program_that_fails_is_told(shell: Shell, tmp_path: Path) -> None:
    code, said = shell.run(["benchmarks/soak.py", "--rounds", "many"], tmp_path, LIMIT)
    assert code == 2 and "invalid int value: 'many'" in said


@pytest.mark.full
def test_an_interrupted_run_may_refuse_a_full_disk_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    wrong_end = importlib.import_module("kill_and_resume").wrong_end
    said = f"error: {tmp_path}: No space left. Free some, then --auto_resume goes on."
    assert wrong_end(Ended(2, said, True, (), {}), tmp_path, True) == ""
    assert wrong_end(Ended(-9, "", True, (), {}), tmp_path, False) == ""
    for ended, full in (((2, said), False), ((2, "error: no"), True), ((1, said), True)):
        assert wrong_end(Ended(*ended, True, (), {}), tmp_path, full)


def test_a_study_refuses_arms_that_it_has_not(shell: Shell, tmp_path: Path) -> None:
    words = ["benchmarks/study_rounds.py", "--output", str(tmp_path / "study"), "--arms", "other"]
    code, said = shell.run(words, tmp_path, LIMIT)
    assert code == 2 and "--arms: no other in this study. There are: control, " in said
    assert not (tmp_path / "study").exists()


@pytest.mark.full
def test_the_study_compares_arms_from_one_warm_up(tmp_path: Path) -> None:
    """Arms whose settings differ from the warm-up's, which they are copied from."""
    flags = shlex.split(TOY.replace("OUT", str(tmp_path / "study")))
    done = command(
        "benchmarks/study_rounds.py", *flags, "--arms", "control,negatives", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"negatives +│ +1 │", done.stdout)  # of one seed
    warm, *arms = (tmp_path / "study" / name for name in ("warm_1", "control_1", "negatives_1"))
    first = "checkpoint_iter_0/adapter_model.safetensors"
    assert {(arm / first).read_bytes() for arm in arms} == {(warm / first).read_bytes()}
    assert all((arm / "checkpoint_iter_1" / "adapter_model.safetensors").is_file() for arm in arms)
    figure = tmp_path / "rounds.png"
    again = command("benchmarks/study_rounds.py", *flags, "--report_only", "--figure", str(figure))
    assert again.returncode == 0 and "negatives" in again.stdout
    assert Image.open(figure).size == (960, 440)
    other = command("benchmarks/study_rounds.py", *flags, "--report_only", "--variant", "2")
    assert other.returncode == 2 and "variant 1" in other.stderr


@pytest.mark.full
def test_the_study_of_photographs_prints_a_table(tmp_path: Path) -> None:
    data = write_grocery(tmp_path / "data", photographs=6)
    towers = write_towers(tmp_path / "towers")
    flags = f"--data_dir {data} --towers {towers} --output {tmp_path / 'study'} --seeds 1"
    small = "--triplets 20 --steps 1 --rounds 1 --eval_queries 20 --arms control,relabel"
    rows = f"--rows {tmp_path / 'rows'}"
    done = command("benchmarks/study_photographs.py", *shlex.split(f"{flags} {small} {rows}"))
    assert done.returncode == 0, done.stderr
    assert "R@1, text alone: gain over control" in done.stdout
    written = {path.name for path in (tmp_path / "rows").iterdir()}
    assert written == {"row_control_1.json", "row_relabel_1.json"}
    small = "--triplets 20 --steps 1 --eval_queries 20 --split val --strategies near_reference"
    done = command(
        "benchmarks/study_negatives.py", "--part", "table", *shlex.split(f"{flags} {small}")
    )
    assert done.returncode == 0, done.stderr
    assert "False negatives among mined images, 1 seeds" in done.stdout


def checkout(directory: Path) -> Path:
    """A copy of what the scripts read and write."""
    for name in ("pyproject.toml", "requirements.txt", "requirements.lock"):
        shutil.copy(ROOT / name, directory / name)
    shutil.copytree(
        ROOT / "scripts", directory / "scripts", ignore=shutil.ignore_patterns("__pycache__")
    )
    return directory


@pytest.mark.full
def test_the_lock_that_is_written_passes_its_own_check(shell: Shell, tmp_path: Path) -> None:
    lock = [str(checkout(tmp_path) / "scripts" / "lock.py")]
    (tmp_path / "requirements.lock").write_text("nothing==1\n")
    code, said = shell.run([*lock, "--check"], tmp_path, LIMIT)
    assert code == 1 and "only in requirements.lock: nothing==1" in said
    code, said = shell.run(lock, tmp_path, LIMIT)
    assert code == 0, said
    assert "torch==" in (tmp_path / "requirements.lock").read_text()
    code, said = shell.run([*lock, "--check"], tmp_path, LIMIT)
    assert (code, said) == (0, "")


@pytest.mark.full
def test_the_check_passes_here() -> None:
    """It sources setup_env.sh, which takes this interpreter and installs nothing."""
    words = ["env", f"PYTHON={sys.executable}", "bash", str(ROOT / "scripts" / "check.sh")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "All checks passed!" in done.stdout and "installing" not in done.stderr


@pytest.mark.full
def test_an_interpreter_that_does_not_run_is_named(tmp_path: Path) -> None:
    words = ["env", "PYTHON=/no/python", "bash", str(checkout(tmp_path) / "scripts" / "check.sh")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert done.returncode == 1
    assert "cirloop: error: '/no/python' is not there. Set PYTHON" in done.stderr
