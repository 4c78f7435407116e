# The one task runner, for people and for CI. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sailvl
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# One thread a process: the tests start several on few cores.
export OMP_NUM_THREADS ?= 1
export DS_ACCELERATOR ?= cpu
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup check test lock format clean

help:  ## this list
	@grep -hE '^[a-z][a-z-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## the virtual environment, from the locked requirements

# uv links packages from its cache, so that a second clone takes seconds.
$(STAMP): requirements.txt pyproject.toml
	@hack/require.sh $(PYTHON) git c++
	@[ -x $(CACHE)/uv/bin/uv ] || { $(PYTHON) -m venv $(CACHE)/uv && $(CACHE)/uv/bin/python -m pip install -q 'uv>=0.9'; }
	$(CACHE)/uv/bin/uv venv -q --allow-existing --python $(PYTHON) $(VENV)
	$(CACHE)/uv/bin/uv pip sync -q --python $(BIN)/python --require-hashes requirements.txt
	$(CACHE)/uv/bin/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

check: setup  ## format, lint, types, layers, unit and contract tests: the fast part
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	PYTHONPATH=operator:trainer $(BIN)/lint-imports --no-cache >build/lint-imports.log 2>&1 || { cat build/lint-imports.log; exit 1; }
	$(BIN)/pytest -q -m "not slow and not cluster and not e2e" tests

test: check  ## everything this machine can; says what it skipped and why
	$(BIN)/pytest -q -m "slow" tests

lock:  ## requirements.txt from pyproject.toml, with hashes and without the index's address
	$(CACHE)/uv/bin/uv pip compile -q --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url \
	  --no-emit-find-links --all-extras pyproject.toml -o requirements.txt

format:  ## format and mend what the linter can
	$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

clean:  ## what was built here; the caches stay
	rm -rf build $(VENV)
