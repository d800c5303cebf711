#!/usr/bin/env bash
# Everything that must pass: ruff, mypy, pytest. Installs what is missing into .venv first, and says so.
#
#   ./run_tests.sh                      minutes: each kind of test, of the kinds that take long a sample
#   ./run_tests.sh --full               all but `gpu`: every fault, document, model and benchmark; 500 random examples
#                                       of each property instead of 30 fixed ones; where scripts/vllm_env.sh has made
#                                       .venv-vllm, those that need vLLM too
#   ./run_tests.sh -m gpu               on a machine with a CUDA device
#   ./run_tests.sh tests/data -k jsonl  any arguments of pytest; paths count from the repository's root
set -euo pipefail
arguments=()
full=
for argument in "$@"; do
    case "$argument" in
    --full) full=1 arguments+=(-m "not gpu" --hypothesis-profile full) ;;
    *) arguments+=("$argument") ;;
    esac
done
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"
setup_env --dev
cd "$root"
PYTHON="$python" scripts/check.sh
# The report and the search page are looked at in a browser. Without one those tests skip themselves and say so.
if ! command -v chromium chromium-browser google-chrome >/dev/null && [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
    say "installing Debian's chromium for the tests of the report and the search page"
    { apt-get install -y -qq chromium || { apt-get update -qq && apt-get install -y -qq chromium; }; } >&2 </dev/null ||
        say "chromium could not be installed; the tests that need it will be skipped"
fi
if [ -n "$full" ] && [ -e .venv-vllm/bin/python ]; then  # what scripts/vllm_env.sh made
    .venv-vllm/bin/python -m pytest -m vllm -n 0 tests/captioning/test_vllm.py
fi
# Two processes of one thread each: for small models quicker than threads. Each begins with one half of the tests and
# takes from the other's when it is done. `-n 0`: one process.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n 2 --dist worksteal ${arguments[@]+"${arguments[@]}"}  # last, so that pytest's closing line closes the output
