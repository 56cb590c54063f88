# `make compare` and `make test` each set up .venv first, once; the tests add the tools that they need.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
TOOLS := .venv/tools
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# One more than the cores of CI: some tests mostly wait, for wandb or for Slurm.
PYTEST := $(BIN)/python -m pytest -n 3
ROUNDED := tests/test_attention.py tests/test_layer.py

# Where there is a GPU, for so many minutes (benchmarks/gpu.py); GPU_CHECK has further options.
MINUTES ?= 25
GPU_PYTHON ?= $(firstword $(wildcard $(BIN)/python) $(PYTHON))

.PHONY: compare test test-all test-fast lint install gpu clean

compare: $(READY)
	$(BIN)/python scripts/compare.py

test: install lint
	$(PYTEST) -m 'not thorough'

# CI's: also what takes long or needs more than Python, and what is rounded on other processors.
test-all: install lint
	$(PYTEST)
	for vectors in default avx2; do \
	  ATEN_CPU_CAPABILITY=$$vectors $(PYTEST) -m 'not thorough' $(ROUNDED) || exit; \
	done

# What a change is tried with while it is made; under two minutes.
test-fast: install
	$(PYTEST) -m 'not slow and not thorough'

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(TOOLS)

$(READY): pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 14))' || \
	  { echo "Python 3.10 to 3.14 is needed, $(PYTHON) is another: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[app]'
	touch $@

$(TOOLS): $(READY)
	$(PIP) -e '.[app,sweep,workspace,dev]'
	touch $@

gpu:
	$(GPU_PYTHON) -m benchmarks.gpu --minutes $(MINUTES) $(GPU_CHECK)

clean:
	rm -rf .venv
