# slicer: `make demo` shows the main job; `make test` and `make lint` are what CI runs.
#
#   make demo    core install, then slice the embedded model, check it, let both write a line of text
#   make test    full CPU install, then the test suite in two processes (ARGS="-k plan" goes to pytest, "-n 0": in one)
#   make lint    ruff check, ruff format --check, mypy --strict, generated docs up to date
#   make docs    write docs/reference/ from the code
#   make bench   the benchmarks (ARGS goes to each)
#   make clean   remove .venv, caches and outputs
#
# PYTHON=...  the interpreter that .venv is made with (3.11 or newer)
# TORCH=...   what is installed as torch before anything else, e.g. TORCH=torch==2.13.0+cpu

CANDIDATES := python3 python3.13 python3.12 python3.11 python3.14 python
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
INSTALL = $(PYTHON) .ci/install.py --venv $(VENV) --torch "$(TORCH)"
PACKAGING := pyproject.toml .ci/install.py

.PHONY: help demo test lint format docs bench clean python
.DEFAULT_GOAL := help

help:
	@awk '/^#/ {sub(/^# ?/, ""); print; next} {exit}' Makefile

python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "slicer needs Python 3.11 or newer and found none; install one, or name it: make PYTHON=/path/to/python3.12" >&2; \
		exit 1; fi

# Two stamps: the core is enough for the demo, tests and checks need everything.
# `python` is an order-only check: it must not make the stamps look old.
$(VENV)/.core: $(PACKAGING) | python
	$(INSTALL)
	@touch $@

$(VENV)/.full: $(PACKAGING) | python
	$(INSTALL) --extras all-cpu,dev
	@touch $(VENV)/.core $@

demo: $(VENV)/.core
	$(BIN)/slicer demo $(ARGS)

test: $(VENV)/.full
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(ARGS)

# Runs all four; fails if one of them did.
lint: $(VENV)/.full
	@status=0; \
	for check in "ruff check ." "ruff format --check ." "mypy" "python docs/generate.py --check"; do \
		echo "$$check"; $(BIN)/$$check || status=1; \
	done; exit $$status

format: $(VENV)/.full
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.core
	$(BIN)/python docs/generate.py

bench: $(VENV)/.core
	$(BIN)/python -m slicer.benchmarks.rivals.export $(ARGS)
	$(BIN)/python -m slicer.benchmarks.rivals.analysis $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find slicer serve benchmarks tests docs -name __pycache__ -type d -exec rm -rf {} +
