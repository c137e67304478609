# Everything from a bare machine: `make quickstart` and `make test` each make .venv, install and run.
# Needed: make and Python 3.11 or newer. Variables:
#   PYTHON=/path/to/python3    which Python makes the environment
#   TORCH_INDEX=URL            where torch comes from, for example https://download.pytorch.org/whl/cpu
#   ARGS="seed=1"              more words for the command that a target runs

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq install --constraint constraints.txt
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
TORCH_INDEX ?=
TRL := trl==1.16.0

.PHONY: help quickstart test lint web bench bench-sandbox clean

help:  ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1 — /'

quickstart: $(VENV)/.quickstart  ## train a policy to use a tool, on this machine, in minutes
	@$(BIN)/agentrl train configs/quickstart.yaml name=quickstart-$$(date +%Y%m%d-%H%M%S) $(ARGS)

test: lint web  ## lint, type checks and all tests
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

lint: $(VENV)/.test  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Node comes from PyPI with the tests' other packages, so that every machine builds with the same one.
web: $(VENV)/.test  ## the viewer's front end: lint, its tests, and its build compared with what is committed
	@export PATH="$(CURDIR)/$(BIN):$$PATH" && cd agentrl/viewer/web && npm ci --silent --no-audit --no-fund && \
		npm run --silent lint && npm test --silent && npm run --silent check

bench: $(VENV)/.test  ## the benchmarks; their tables go to docs/benchmarks.md
	@$(BIN)/python tests/benchmarks/run.py $(ARGS)

bench-sandbox: $(VENV)/.test  ## sandboxes: latency, throughput, attacks
	@$(BIN)/python tests/benchmarks/bench_sandbox.py $(ARGS)

clean:  ## remove the environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@[ -n "$(PYTHON)" ] || { echo "make: no Python 3.11 or newer is on the PATH; install one, or say make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv $(VENV) >$(VENV).log 2>&1 || { rm -rf $(VENV); tail -n 3 $(VENV).log >&2; rm -f $(VENV).log; \
		echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@rm -f $(VENV).log

# torch comes first and alone, so that a CPU build is taken wherever pip knows of one.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	@echo "installing torch"
	@if [ -n "$(TORCH_INDEX)" ]; then $(PIP) --no-deps --index-url "$(TORCH_INDEX)" torch; fi
	@$(PIP) torch
	@touch $@

$(VENV)/.quickstart: $(VENV)/.torch pyproject.toml
	@echo "installing agentrl"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable ".[plot,viewer]"
	@touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	@echo "installing agentrl and what its tests use"
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable ".[test]"
	@$(PIP) --no-deps $(TRL)
	@touch $@ $(VENV)/.quickstart
