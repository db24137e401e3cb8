# make quickstart   set up, then everything, small, on this machine
# make test         set up, then the tests
# make venv         set up alone; TORCH_INDEX=url takes torch from another index (such as a CUDA or CPU build of it)
# make chaos        every fault of tests/cluster, as root, an hour and a half; writes tests/cluster/RESULTS.md
# make lint         style, types, import order

PYTHON ?= python3
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
DIGITS := runs/data/digits

.DEFAULT_GOAL := help
.PHONY: help venv digits quickstart test chaos lint format clean

help:
	@sed -n 's/^# //p' Makefile

venv: $(VENV)/installed

# Made last, so that an installation that was interrupted is made again.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Tessera needs Python 3.11 or newer, make PYTHON=/path/to/python3.11 names one")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --no-deps --constraint constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

digits: venv
	$(BIN)/python -m pipeline.shards.digits $(DIGITS)

quickstart: digits
	$(BIN)/python launch/submit.py configs/quickstart.yaml configs/quickstart-igpt.yaml configs/quickstart-clip.yaml

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=60 --durations-min=5

chaos: venv
	$(BIN)/python -m pytest -m "chaos or slow" tests/cluster tests/integration/test_resume.py --results tests/cluster/RESULTS.md
	$(BIN)/python -m tests.cluster.trace --minutes 4 --seed 1 --results tests/cluster/RESULTS.md

lint: venv
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:
	rm -rf $(VENV) build *.egg-info
