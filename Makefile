# Targets of a few lines; `make help` lists them. Everything happens in .venv, made from pyproject.toml and constraints.txt.
PYTHON ?= python3
VENV ?= .venv
# Two processes: most tests wait for other processes now and then. A file stays in one, so that it starts its pool once.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder
DEMO_ARGS ?=
# A package index to ask besides pip's own, for instance PyTorch's index of CPU builds.
TORCH_INDEX ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
INSTALL := $(PIP) install --quiet -c constraints.txt $(INDEX)

.DEFAULT_GOAL := help
.PHONY: help demo install develop test check format docs site clean

help: ## List the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: $(VENV)/.installed ## Train a small GPT over four worker processes on this machine
	$(BIN)/fusion up $(DEMO_ARGS)

install: $(VENV)/.installed ## Install Fusion into .venv

develop: $(VENV)/.installed-dev ## Install Fusion and what its checks and tests need into .venv

test: $(VENV)/.installed-dev ## Run the tests
	$(BIN)/python -m pytest $(PYTEST_ARGS)

check: $(VENV)/.installed-dev ## Lint, check types, import layers and generated pages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate_reference.py --check
	$(BIN)/python benchmarks/publish.py --check

format: $(VENV)/.installed-dev ## Format the code and mend what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.installed-dev ## Write the generated pages of docs/ again
	$(BIN)/python docs/generate_reference.py
	$(BIN)/python benchmarks/publish.py

site: $(VENV)/.installed-site ## Build the documentation as a site into build/site
	$(BIN)/mkdocs build --quiet

clean: ## Remove the virtual environment and every cache
	rm -f compress/_kernels*.so
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Fusion needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps are newer than what they were installed from, so nothing is installed twice.
$(VENV)/.installed: pyproject.toml constraints.txt compress/kernels.c | $(BIN)/python
	@$(BIN)/python deploy/check_torch.py $(INDEX)
	$(INSTALL) -e .
	@touch $@

$(VENV)/.installed-site: $(VENV)/.installed
	$(INSTALL) -e '.[site]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(INSTALL) -e '.[dev]'
	@touch $@
