SHELL := bash
env := source scripts/setup_env.sh && setup_env --dev

.PHONY: check test format

check:  # ruff check, ruff format --check, mypy
	@scripts/check.sh

test:  # pytest alone; ./run_tests.sh is check and test
	@$(env) && OMP_NUM_THREADS=1 "$$python" -m pytest -n 2 --dist loadfile

format:  # repair what can be repaired
	@$(env) && "$$python" -m ruff check --fix --exit-zero . && "$$python" -m ruff format .
