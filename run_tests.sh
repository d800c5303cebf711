#!/usr/bin/env bash
# Everything that must pass: ruff, mypy, pytest. Installs what is missing into .venv first, and says so.
#
#   ./run_tests.sh                     the whole suite except tests marked `gpu`
#   ./run_tests.sh -m "not slow"       any pytest arguments; paths count from the repository's root
#   ./run_tests.sh -m gpu              on a machine with a CUDA device
set -euo pipefail
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
# Two processes of one thread each, a file of tests to one of them: for small models quicker than threads. `-n 0`: one.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$python" -m pytest -n 2 --dist loadfile "$@"  # last, so that pytest's closing line closes the output
