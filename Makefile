# Everything from nothing, on a machine with Python 3.11 or newer and a package index.
# PYTHON=python3.12 make serve picks the interpreter; `make help` lists the rest.

VENV ?= .venv
BIN := $(VENV)/bin
export VENV
# Processes that share the tests; each works on one thread.
WORKERS ?= 2
# Where setup.sh puts the OpenMP library that PyTorch and Numba share.
export LD_LIBRARY_PATH := $(abspath $(VENV))/lib$(if $(LD_LIBRARY_PATH),:$(LD_LIBRARY_PATH))

.DEFAULT_GOAL := help
.PHONY: help serve test lint format setup clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' Makefile

serve: ## the server with the embedded models; every flag is a variable: ELASTI_PORT=8123 make serve
	@./setup.sh service
	@exec $(BIN)/python -m service

test: ## lint, types and all tests; ARGS="-k capacity" goes to pytest
	@./setup.sh all
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: ## ruff and mypy
	@./setup.sh all
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

format: ## let ruff repair what it can
	@./setup.sh all
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

setup: ## only the environment, training and test packages included
	@./setup.sh all

clean: ## remove the environment and all caches of tools
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find elastiformer service training tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
