#!/usr/bin/env bash
# Mine, caption, train, evaluate; round by round.
#
#   ./run_iterative_training.sh --fast_mode      minutes on a laptop: the embedded `shapes` data, the `tiny` model
#   ./run_iterative_training.sh                  the same at full size
#   ./run_iterative_training.sh --auto_resume    go on where a run stopped or was killed
#   ./run_iterative_training.sh --dry_run        check everything and print the plan; train nothing
#   ./run_iterative_training.sh --help           the flags; all of them are train_iterative.py's
set -euo pipefail

# 1. A Python with the packages. Reuses what is there: $PYTHON, the active virtual environment, .venv, python3.
#    Where packages are missing, makes .venv and installs requirements.txt into it.
# shellcheck source=scripts/setup_env.sh
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup_env.sh"
setup_env

# 2. The run. This does not change directory: paths you give, and experiments/, count from where you are.
#    Settings are a recipe of this checkout's configs/, wherever that is: shapes.yaml, or that of the --dataset_name and
#    the --model_backbone. A --config of yours takes its place.
exec "$python" "$root/train_iterative.py" "$@"
