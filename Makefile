# Everything runs in a virtual environment that the first command makes from constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODELS ?= $(HOME)/.cache/rrsq-models

.PHONY: help install demo test test-real test-gpu lint clean

help:
	@echo "make demo       quantize a small real model, evaluate it before and after, and let it write"
	@echo "make test       run the tests (no network, no GPU)"
	@echo "make test-real  run the tests on real models in MODELS=... with text under RRSQ_DATA_ROOT"
	@echo "make test-gpu   run the tests that need a CUDA device, with the python that PYTHON names"
	@echo "make lint       ruff and mypy"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/python -m pytest -q -m "not real and not gpu"

test-real: install
	RRSQ_TEST_MODELS="$(MODELS)" $(BIN)/python -m pytest -q -m real

test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -q -m gpu

lint: install
	$(BIN)/ruff check src tests examples
	$(BIN)/ruff format --check src tests examples
	$(BIN)/mypy --config-file pyproject.toml

clean:
	rm -rf $(VENV) build dist demo-out
