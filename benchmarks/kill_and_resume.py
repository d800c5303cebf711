"""`kill -9` a fast run at random moments, resume each, and compare every artifact with the unbroken run's.

python benchmarks/kill_and_resume.py --kills 10
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cirloop.artifacts import file_digests

ROOT = Path(__file__).resolve().parent.parent


def digests(directory: Path) -> dict[str, dict[str, str]]:
    """Of everything the run made but its configuration, costs and profile (which hold no result)."""
    apart = ("config.json", "costs.json", "profile", ".work")
    return {p.name: file_digests(p) for p in sorted(directory.iterdir()) if p.name not in apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("flags", nargs="*", help="further flags of train_iterative.py, after --")
    args = parser.parse_args()
    moments = random.Random(args.seed)
    place = Path(tempfile.mkdtemp(prefix="cirloop_kill_"))

    def run(name: str) -> list[str]:
        # each run has its own feature cache, so that nothing of another run helps it
        cache = ["--runtime.cache_dir", str(place / f"{name}_cache")]
        script = [
            sys.executable,
            str(ROOT / "train_iterative.py"),
            "--fast_mode",
            "--auto_resume",
            "--runtime.save_every",
            "10",
        ]
        return [*script, "--experiment_dir", str(place / name), *cache, *args.flags]

    began = time.monotonic()
    subprocess.run(run("whole"), check=True, capture_output=True)
    seconds = time.monotonic() - began
    whole, equal = digests(place / "whole"), 0
    print(f"unbroken run: {seconds:.0f} s, {len(whole)} artifacts", flush=True)
    for number in range(args.kills):
        name, moment = f"run_{number}", moments.uniform(0.05, 0.98) * seconds
        process = subprocess.Popen(run(name), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moment)
        ended = process.poll() is not None
        process.send_signal(signal.SIGKILL)
        process.wait()
        there = sorted(p.name for p in (place / name).glob("*")) if (place / name).exists() else []
        done = subprocess.run(run(name), capture_output=True, text=True, check=False)
        same = done.returncode == 0 and digests(place / name) == whole
        equal += same
        state = "had ended" if ended else f"{len(there)} entries there"
        print(
            f"killed at {moment:5.1f} s ({state}): {'equal' if same else 'DIFFERENT ' + done.stderr[-300:]}",
            flush=True,
        )
        shutil.rmtree(place / name, ignore_errors=True)
    print(f"{equal} of {args.kills} equal")
    shutil.rmtree(place)
    sys.exit(equal != args.kills)


if __name__ == "__main__":
    main()
