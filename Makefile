# Everything a fresh machine needs is made on the way: `make demo`, `make test`.
# VENV=DIR puts the virtual environment elsewhere, PYTHON=PROGRAM chooses the Python it is made with (3.11 or newer),
# PIP_ARGS="..." goes to pip, TESTS="tests/test_cli.py -k help" runs a part of the tests.

VENV ?= .venv
PIP_ARGS ?=
TESTS ?= tests
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11 python
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo $$p; break; fi; done)

CLIP := examples/clips/red-circle.mp4
QUESTION := When does the red circle appear?

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)
RUNTIME := $(VENV)/.keye-runtime
DEV := $(VENV)/.keye-dev

.PHONY: help demo test lint format bench kernels docs clean

help:
	@echo "make demo    set up, then ask the embedded model about a clip"
	@echo "make test    set up, then run all tests"
	@echo "make lint    ruff and mypy"
	@echo "make format  let ruff put the code in order"
	@echo "make bench   measure start-up, scaling, batches and frames on this machine"
	@echo "make kernels compile the Triton kernels for every kind of GPU, without one"
	@echo "make docs    write docs/cli.md from the commands' own help"
	@echo "make clean   remove $(VENV) and caches"

demo: $(RUNTIME)
	$(BIN)/keye ask $(CLIP) "$(QUESTION)"

test: $(DEV)
	$(BIN)/python -m pytest -n auto --dist loadgroup $(TESTS)

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What needs several GPUs is run by hand.
bench: $(RUNTIME)
	@for script in $(filter-out benchmarks/finetune_gpus.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done
	$(BIN)/keye bench video

kernels: $(DEV)
	$(BIN)/python -m keyecli.kernels.compile

docs: $(RUNTIME)
	$(BIN)/python docs/generate_cli.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "keyecli needs Python 3.11 or newer: install one, or pass PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps say that an install went through; a change of what is to be installed makes them old.
$(RUNTIME): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(DEV): pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[dev]'
	@touch $(RUNTIME) $@
