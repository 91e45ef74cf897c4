# Everything runs in a virtual environment that the first command makes from constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
MODELS ?= $(HOME)/.cache/rrsq-models
# The oldest transformers that pyproject.toml admits, in an environment that has all else from the first.
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' pyproject.toml)
OLDEST_VENV := $(VENV)-oldest
VLLM_VENV ?= $(VENV)-vllm

# What depends on transformers: its models, its caches, its way of loading.
VERSIONED_TESTS := tests/models tests/runtime tests/quantizer/production tests/quantizer/calibration

# Recipes whose checkpoints the oldest transformers need not load for every family.
PEERS := quarot or rtn or paper or rrs1

.PHONY: help install demo test test-oldest test-vllm test-real test-gpu lint docs clean

help:
	@echo "make demo       quantize a small real model, evaluate it before and after, and let it write"
	@echo "make test       run the tests (no network, no GPU)"
	@echo "make test-oldest  run those on models, checkpoints and caches with transformers $(OLDEST)"
	@echo "make test-vllm  run those on serving with vLLM, of which 300 MB are downloaded first (no GPU)"
	@echo "make test-real  run the tests on real models in MODELS=... with text under RRSQ_DATA_ROOT"
	@echo "make test-gpu   run the tests that need a CUDA device, with the python that PYTHON names"
	@echo "make lint       ruff and mypy"
	@echo "make docs       the documentation as a site, in build/site"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python examples/demo.py

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m "not real and not gpu"

test-oldest: $(OLDEST_VENV)/.installed
	PYTHONPATH=src $(OLDEST_VENV)/bin/python -c "import transformers as t; assert t.__version__.startswith('$(OLDEST).')"
	PYTHONPATH=src OMP_NUM_THREADS=1 $(OLDEST_VENV)/bin/python -m pytest -q -n auto -m "not real and not gpu" \
	  -k "not (test_every_recipe and ($(PEERS)))" $(VERSIONED_TESTS)

$(OLDEST_VENV)/.installed: $(VENV)/.installed
	rm -rf $(OLDEST_VENV)
	$(PYTHON) -m venv $(OLDEST_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(OLDEST_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/newest.pth"
	$(OLDEST_VENV)/bin/python -m pip install --quiet --disable-pip-version-check "transformers==$(OLDEST).*"
	touch $@

test-vllm: $(VLLM_VENV)/.installed
	PYTHONPATH=src OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest -q tests/vllm

$(VLLM_VENV)/.installed: $(VENV)/.installed tests/vllm/environment.py
	rm -rf $(VLLM_VENV)
	$(PYTHON) -m venv $(VLLM_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
	  > "$$($(VLLM_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/newest.pth"
	$(BIN)/python tests/vllm/environment.py $(VLLM_VENV)/bin/python
	touch $@

test-real: install
	RRSQ_TEST_MODELS="$(MODELS)" $(BIN)/python -m pytest -q -m real

test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -q -m gpu

lint: install
	$(BIN)/ruff check src tests examples docs/site
	$(BIN)/ruff format --check src tests examples docs/site
	$(BIN)/mypy --config-file pyproject.toml

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) $(OLDEST_VENV) $(VLLM_VENV) build dist demo-out
