# The task runner for people and CI. `make help` lists the targets.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/sailvl
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
UV := $(CACHE)/uv-$(shell sha256sum hack/uv.txt | cut -c1-8)/bin/uv
# One thread per process: the tests start several processes on few cores.
export OMP_NUM_THREADS ?= 1
export DS_ACCELERATOR ?= cpu
export HF_HUB_OFFLINE ?= 1
# Keep compiled modules even if the shell disables them: compiling would take half of the fast tests' time.
unexport PYTHONDONTWRITEBYTECODE
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1

.PHONY: help setup check test fuzz demo data cluster cluster-down images e2e faults chaos bench bench-operator bench-tenants bench-plot report generate lock format clean

help:  ## print this list
	@grep -hE '^[a-z0-9][a-z0-9-]*:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: $(STAMP)  ## create the virtual environment from the locked requirements

# uv links packages from its cache. Compiling them once halves the start-up time of every test process.
$(STAMP): requirements.txt pyproject.toml $(UV)
	@hack/require.sh git
	$(UV) venv -q --allow-existing --python $(PYTHON) $(VENV)
	$(UV) pip sync -q --compile-bytecode --python $(BIN)/python --require-hashes requirements.txt
	$(UV) pip install -q --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

$(UV):
	@hack/require.sh $(PYTHON)
	$(PYTHON) -m venv $(@D)/..
	$(@D)/python -m pip install -q --require-hashes -r hack/uv.txt

check: setup  ## fast checks: format, lint, types, layers, generated files, unit and contract tests
	@mkdir -p build
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache >build/lint-imports.log 2>&1 || { cat build/lint-imports.log; exit 1; }
	$(BIN)/sailvl generate crd | diff -u crds/sailvlruns.yaml - || { echo "crds/ is stale: make generate"; exit 1; }
	$(BIN)/pytest -q -n auto --maxprocesses 8 --dist loadfile -m "not slow and not cluster and not e2e" tests/unit tests/contract

test: check  ## run every test that this machine can run, and say which were skipped and why
	hack/test.sh "slow or cluster or e2e"

fuzz: setup  ## feed random input to every reader of untrusted bytes, each for SAILVL_FUZZ_SECONDS (60)
	SAILVL_FUZZ_SECONDS=$${SAILVL_FUZZ_SECONDS:-60} $(BIN)/pytest -q -n auto --maxprocesses 8 -m fuzz tests/unit

demo: data  ## run the whole recipe at preset tiny on this machine, from raw images to an evaluated model
	$(BIN)/sailvl run --local examples/01-demo/run.yaml --root build/demo

data: setup  ## build the demo's raw data in build/demo
	@mkdir -p build
	hack/demo_data.sh $(BIN)/python build/demo

cluster:  ## start a Kubernetes cluster of two nodes on this machine, and print how to reach it
	@hack/cluster/cluster.sh up
	@hack/cluster/cluster.sh env

cluster-down:  ## stop the cluster
	hack/cluster/cluster.sh down

images: cluster  ## build both images into the cluster's registry, tagged by content
	@mkdir -p build
	hack/images/build.sh | tee build/images.env

e2e: setup  ## test whole runs on the cluster with the built images
	hack/test.sh e2e

faults: setup  ## inject every fault into every kind of stage on the cluster: build/faults/faults.md; about eighty minutes
	hack/test.sh faults

chaos: setup  ## inject random faults for SAILVL_CHAOS_MINUTES (30) from SAILVL_CHAOS_SEED (1); weights must not change
	hack/test.sh chaos

bench: setup  ## run the trainer's benchmarks, and append the results to bench/history.jsonl
	@for file in bench/bench_*.py; do echo "== $$file"; $(BIN)/python -m bench.$$(basename $$file .py); done

bench-operator: setup  ## benchmark the operator with 1,000 runs against a naive one; fails if a target is missed; at least ten minutes
	@hack/require.sh openssl
	$(BIN)/python -m bench.operator

bench-tenants: setup  ## measure an honest tenant and both replicas beside a hostile tenant; fails if a target is missed; eight minutes
	@hack/require.sh openssl
	$(BIN)/python -m bench.operator.tenants

bench-plot: setup  ## plot all recorded results over time: build/bench/history.png
	$(BIN)/python -m bench.history

report: setup  ## print sizes of the sources and uses of refused words as a table and a line of JSON
	$(BIN)/python -m hack.source_report

generate: setup  ## generate crds/, the chart's copy and the reference from the types
	@mkdir -p build
	$(BIN)/sailvl generate crd >build/sailvlruns.yaml && mv build/sailvlruns.yaml crds/sailvlruns.yaml
	cp crds/sailvlruns.yaml helm/sailvl-operator/crds/
	$(BIN)/sailvl generate reference >build/sailvlrun.md && mv build/sailvlrun.md docs/reference/sailvlrun.md

LOCK = $(UV) pip compile -q --python-version 3.11 --generate-hashes --no-header --no-annotate --no-emit-index-url --no-emit-find-links
lock: $(UV)  ## lock the requirements of pyproject.toml with hashes, without the address of the index
	$(LOCK) --all-extras pyproject.toml -o requirements.txt
	echo 'setuptools>=77' | $(LOCK) -c requirements.txt - -o hack/build.txt
	echo 'setuptools>=77' | $(LOCK) -c requirements.txt --extra operator pyproject.toml - -o images/operator/requirements.txt
	echo 'setuptools>=77' | $(LOCK) -c requirements.txt --extra trainer --extra curate pyproject.toml - -o images/trainer/requirements.txt

format:  ## format, and fix what the linter can fix
	$(BIN)/ruff format -q . && $(BIN)/ruff check -q --fix .

clean:  ## stop the cluster, and remove build/ and the virtual environment; caches stay
	hack/cluster/cluster.sh down
	rm -rf --one-file-system build $(VENV)
