# Everything a fresh machine needs, from nothing but Python 3.10+ and pip.
#   make demo    install, quantize and prove the embedded model into build/demo
#   make test    install with the development tools, then every check that CI runs

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# mypy must see the repository root under the package's name, whatever the clone is called
# (docs/adr/0001): a link to it inside mypy's own cache folder, which walkers skip.
TYPING := .mypy_cache/source

# Installed once; again only when the dependencies may have changed.
RUNTIME := $(VENV)/.installed
DEV     := $(VENV)/.installed-dev

.PHONY: demo test lint format imports types pytest clean help
.DELETE_ON_ERROR:

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

demo: $(RUNTIME)
	$(BIN)/qdit-export --bits w4a8 --output build/demo

test: lint imports types pytest

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

imports: $(DEV)
	$(BIN)/lint-imports --no-logo

types: $(DEV)
	@mkdir -p $(TYPING) && ln -sfn ../.. $(TYPING)/qdit
	$(BIN)/mypy

pytest: $(DEV)
	$(BIN)/python -m pytest

clean:
	rm -rf build dist qdit.egg-info $(VENV) .mypy_cache .ruff_cache .pytest_cache \
		.import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "qdit needs Python 3.10 or newer; run: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(RUNTIME): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e .
	@touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e '.[dev]'
	@touch $@ $(RUNTIME)
