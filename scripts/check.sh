#!/usr/bin/env bash
# What must hold before a commit: `make check`, and the first half of run_tests.sh.
set -euo pipefail
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
setup_env --dev
cd "$root"
"$python" scripts/check_environment.py --lists
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy
"$python" scripts/command_pages.py --check
"$python" -m pytest -q -n 0 tests/test_imports.py  # layers, sizes of files; two seconds
