# `make` alone lists the targets. PYTHON, SEED and TORCH can be set: make smoke SEED=2
PYTHON ?= python3
SEED ?= 1
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
SGLANG := .venv-sglang
# Unit tests wait for little but a core; the others have processes enough of their own.
UNIT_TESTS := -n 2 --dist loadfile tests/unit
PROCESS_TESTS := $(wildcard tests/distributed tests/cluster)

# One thread per process: many processes share the cores, and two threads each are slower than one.
export OMP_NUM_THREADS ?= 1
export TORCHDYNAMO_DISABLE ?= 1

.DEFAULT_GOAL := help
.PHONY: help smoke test check bench soak sglang-env test-sglang

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

smoke: $(READY)  ## pretrain a tiny base, then R1-Zero (tp2 pp2 ep2) on this machine's CPUs; report.html
	rm -rf runs/smoke runs/smoke_base
	$(BIN)/r1mega sft configs/smoke/base.yaml seed=$(SEED)
	$(BIN)/r1mega rl configs/smoke/r1_zero.yaml seed=$(SEED)  # evaluates before, during and after

test: $(READY)  ## every test that needs no GPU
	$(BIN)/python -m pytest -m "not gpu and not soak" $(UNIT_TESTS)
	$(BIN)/python -m pytest -m "not gpu and not soak" $(PROCESS_TESTS)

check: $(READY)  ## lint, format, types, floors and unit tests; under two minutes
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -m "not gpu and not slow and not soak" $(UNIT_TESTS)

bench: $(PEERS)  ## every benchmark, one JSON line each
	@set -e; for file in $(wildcard benchmarks/*.py); do $(BIN)/python $$file; done

soak: $(READY)  ## sweeps of random layouts, then the smoke on three seeds in runs/soak/seed_N
	$(BIN)/python -m pytest -m soak tests
	set -e; for seed in 1 2 3; do \
	  $(MAKE) smoke SEED=$$seed; \
	  mkdir -p runs/soak; rm -rf runs/soak/seed_$$seed; mv runs/smoke runs/soak/seed_$$seed; \
	done

sglang-env: $(SGLANG)/.ready  ## SGLang 0.5.23 for CPUs in .venv-sglang (2.6 GB), where test-sglang finds it

test-sglang: $(READY) $(SGLANG)/.ready  ## train with real SGLang servers on this machine's CPUs
	$(BIN)/python -m pytest -m "not soak" tests/sglang

# Made again whenever pyproject.toml changes. torch goes first and alone, so that the build of it that
# pip finds here (CPU or CUDA) is the one that everything else is resolved against.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "r1mega needs Python 3.11 or newer, and $(PYTHON) is older or missing:" \
	    "apt-get install python3.11 python3.11-venv (as root), then make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  test "$$(id -u)" = 0 && apt-get install --yes --quiet python3-venv; } || { \
	  echo "$(PYTHON) has no venv module: apt-get install python3-venv (as root), then make again"; \
	  exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable .[dev]
	$(BIN)/python tests/fetch_sglang_schema.py
	@touch $@

# What benchmarks compare with: over a gigabyte, most of it triton, that nothing else needs.
$(PEERS): $(READY)
	$(BIN)/pip install --quiet --editable .[bench]
	@touch $@

$(SGLANG)/.ready: requirements/sglang_cpu.txt
	@test ! -e $(SGLANG) -o -e $(SGLANG)/.cpu || { \
	  echo "$(SGLANG) was not made here, it may be the one for GPUs: move it away first"; exit 1; }
	test -x $(SGLANG)/bin/python || $(PYTHON) -m venv $(SGLANG)
	@touch $(SGLANG)/.cpu
	$(SGLANG)/bin/pip install --quiet $(TORCH)
	$(SGLANG)/bin/pip install --quiet --no-deps --requirement $<
	@touch $@
