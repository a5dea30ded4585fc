# Everything here works from a clean clone with Python 3.11+, pip, make and a C++ compiler.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Test processes.
JOBS ?= 2
export OMP_NUM_THREADS ?= 1

.NOTPARALLEL:  # speeds are measured while nothing else runs
.PHONY: install demo test check format lint types imports docs fast slow bench mutation clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

demo: install  ## train PPO on CartPole to solved; a report and a film to look at
	rm -rf runs/demo
	$(BIN)/upslope train ppo --env CartPole-v1 --run-dir runs/demo
	$(BIN)/upslope watch runs/demo --out runs/demo/episode.gif
	$(BIN)/upslope report runs/demo

test: fast slow  ## all tests

check: format lint types imports docs fast  ## what CI checks before the whole test suite

format: install
	$(BIN)/ruff format --check .

lint: install
	$(BIN)/ruff check .

types: install
	$(BIN)/mypy

imports: install
	$(BIN)/lint-imports

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

fast: install
	$(BIN)/pytest -n $(JOBS) -m "not slow and not alone"
	$(BIN)/pytest -n 0 -m alone tests

slow: install
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "slow and not alone" tests

bench: install  ## speed, one pinned core; prints ratios
	taskset -c 0 $(BIN)/python -m bench.theta
	taskset -c 0 $(BIN)/python -m bench.scan
	taskset -c 0 $(BIN)/python -m bench.tabular
	taskset -c 0 $(BIN)/python -m bench.replay

mutation: install  ## mutants of the formulas that the tests let live (about 15 minutes); see docs/mutation.md
	rm -rf build/mutation && git clone --quiet . build/mutation
	cd build/mutation && JAXTYPING_DISABLE=1 $(CURDIR)/$(BIN)/mutmut run --max-children 1
	cd build/mutation && $(CURDIR)/$(BIN)/mutmut results

clean:
	rm -rf $(VENV) site .mypy_cache .ruff_cache .pytest_cache
