# The commands of the house; `make` alone lists them. Everything runs in a .venv inside the checkout.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slurm lint bench

TORCH ?= 2.13.0
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-$(TORCH)

# One thread a process: on few cores torch and BLAS otherwise fight each other, and results depend on the split.
export OMP_NUM_THREADS := 1
export MKL_NUM_THREADS := 1

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(STAMP)  ## make the .venv (TORCH=2.11.0 for another torch, PYTHON=python3.12 for another Python)

$(STAMP): pyproject.toml Makefile .ci/setup.sh
	@bash .ci/setup.sh "$(PYTHON)" "$(TORCH)" "$(VENV)" "$@"

demo: setup  ## train, evaluate, write runs/demo/report/index.html (SEEDS=3: three trainings)
	$(PY) -m launch.demo --seeds $(or $(SEEDS),1)

test: setup  ## run the tests, but those on SLURM that wait for time limits, preemption and dead nodes
	@$(PY) -m pytest --ignore=tests/benchmarks -m "not slurm_long"

test-slurm: setup  ## run every test on a private SLURM cluster, started here; without its programs it fails
	@SLURM_REQUIRED=1 $(PY) -m pytest -m slurm

lint: setup  ## ruff check, ruff format --check, pyright
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(VENV)/bin/pyright

bench: setup  ## run the measurements of tests/benchmarks that the READMEs quote (about 3 minutes)
	$(PY) -m tests.benchmarks.mask_truncation
	$(PY) -m tests.benchmarks.kill_and_resume --kills 10
