# Everything a person or a machine does with this project, by name.
# `make lint types test` checks types, which takes one core a minute, beside the first tests.
MAKEFLAGS += --jobs=2
.DELETE_ON_ERROR:
.PHONY: help setup repro paper test test-fast soak lint types services clean

PROFILE ?= sample
MINUTES ?= 30
PYTHON ?= $(firstword $(shell command -v python3.11) python3)
VENV := .venv
# An environment holds absolute paths: its mark names the folder that it was made in.
NOTHING :=
READY := $(VENV)/.ready$(subst $(NOTHING) $(NOTHING),-,$(subst /,-,$(CURDIR)))
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Waiting threads spin for a moment, then sleep: benchmarks/waiting.py.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 10000
endif

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## make the virtual environment with pinned dependencies

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found " + sys.version)'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: $(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)"; exit 1; }
	@test ! -L $(VENV) || { echo "error: $(VENV) is a link, and what it leads to would be emptied: remove the link"; exit 1; }
	$(PYTHON) -m venv $(if $(wildcard $(READY)),,--clear) $(VENV)
	pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,dask,auth,onnx,postgres,s3]'
	touch $@

repro: setup  ## reproduce the published result: sample scans, whole pipeline, verdict
	dvc pull --quiet data.dvc
	dvc repro
	fullscale verdict --compare

paper: setup  ## the rows of the paper's tables on the cohort in data/; PROFILE=paper for its settings
	test -d data || dvc pull --quiet data.dvc
	dvc repro paper/dvc.yaml:paper_table-$(PROFILE)

test: setup  ## run every test
	pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --quiet --durations 30

test-fast: setup  ## run the tests that start no server and train nothing
	pytest --numprocesses auto --dist loadfile --quiet -m "not slow"

soak: setup  ## let scans land and kill processes for MINUTES, then check that all is in its place
	PYTHONPATH=.:tests/shared python tests/shared/soak.py --minutes $(MINUTES)

lint: setup  ## check style and who may import whom
	ruff check
	ruff format --check
	lint-imports

types: setup  ## check types
	mypy

services: setup  ## start MLflow, Prefect and a worker until Ctrl-C
	exec python -m flows.services

clean:  ## remove the environment and everything that can be made again
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
