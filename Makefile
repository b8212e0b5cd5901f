# Every target works on a fresh clone: it makes .venv, installs what it needs with constraints.txt, and runs.
# PYTHON picks the interpreter (3.11 or newer); TORCH_FLAGS are added when torch is installed, for instance to choose a
# build without CUDA.
PYTHON ?= python3
TORCH_FLAGS ?=
PYTEST_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help quickstart lab specialist browser test lint format-check format types checks docs clean

help:
	@echo "make quickstart   train a small model on this machine and show what its experts can do"
	@echo "make specialist   grow a tool-calling specialist on the quickstart model"
	@echo "make lab          train the 10M-parameter lab model (about an hour)"
	@echo "make test         run the tests"
	@echo "make checks       lint, format, types and tests"
	@echo "make docs         build the documentation into site/"
	@echo "make clean        remove the environment, runs and caches"

# torch first and on its own, so that the choice of build is this one line's
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "stagewise needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing $(TORCH)"
	@$(INSTALL) $(TORCH_FLAGS) $(TORCH)
	@touch $@

$(RUN_STAMP): $(VENV)/.torch pyproject.toml constraints.txt
	@echo "installing stagewise"
	@$(INSTALL) -c constraints.txt -e '.[tools]'
	@touch $@

$(DEV_STAMP): $(VENV)/.torch pyproject.toml constraints.txt
	@echo "installing stagewise with its development tools"
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@ $(RUN_STAMP)

quickstart: $(RUN_STAMP)
	$(BIN)/stagewise quickstart

specialist: $(RUN_STAMP)
	$(BIN)/stagewise quickstart
	$(BIN)/stagewise specialise quickstart-tools

lab: $(RUN_STAMP)
	$(BIN)/stagewise train lab

# the report's page is tested in a real browser; as root on Debian it is installed when it is missing
browser:
	@command -v chromium >/dev/null || test -n "$$STAGEWISE_CHROMIUM" || { test "$$(id -u)" = 0 && \
		apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || \
		echo "chromium is missing: install it, or name one with STAGEWISE_CHROMIUM; the page tests will fail"

test: $(DEV_STAMP) browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto $(PYTEST_FLAGS)

lint: $(DEV_STAMP)
	$(BIN)/ruff check .

format-check: $(DEV_STAMP)
	$(BIN)/ruff format --check .

format: $(DEV_STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(DEV_STAMP)
	$(BIN)/mypy

checks: lint format-check types test

docs: $(DEV_STAMP)
	@$(INSTALL) -c constraints.txt -e '.[docs]'
	$(BIN)/zensical build --clean --strict

clean:
	rm -rf $(VENV) runs build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis
