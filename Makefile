SHELL := bash
env := source scripts/setup_env.sh && setup_env --dev

.PHONY: check test format pages lock audit

check:  # ruff check, ruff format --check, mypy, docs/commands
	@scripts/check.sh

test:  # pytest alone; ./run_tests.sh is check and test, ./run_tests.sh --full every test
	@$(env) && OMP_NUM_THREADS=1 "$$python" -m pytest -n 2 --dist worksteal

format:  # repair what can be repaired
	@$(env) && "$$python" -m ruff check --fix --exit-zero . && "$$python" -m ruff format .

pages:  # docs/commands, from the code
	@$(env) && "$$python" scripts/command_pages.py

lock:  # requirements.lock from the environment that the tests passed in
	@$(env) && "$$python" scripts/lock.py

audit:  # known vulnerabilities of what requirements.lock names; needs the network
	@$(env) && "$$python" -m venv build/audit && build/audit/bin/python -m pip install --quiet pip-audit && \
		build/audit/bin/python -m pip_audit --requirement requirements.lock --no-deps --disable-pip --strict
