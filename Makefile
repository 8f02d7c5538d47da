# Everything from nothing: `make demo` trains the demonstration, `make test` runs what CI runs.
# All of it stays in this folder: the environment is .venv, the package is installed from here.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint types clean

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "chiasm needs Python 3.11 or newer; saw $$($(PYTHON) --version). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing chiasm and its dev extra into $(VENV) (about 6 GB with the CUDA wheels; README has the light way; a .venv with PyTorch in it is kept)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

demo: setup
	@$(BIN)/chiasm demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

test: lint types
	$(BIN)/pytest -n 2 --dist worksteal --durations 10

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo-run
