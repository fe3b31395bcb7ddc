# `make demo` and `make test` work on a fresh machine: they make .venv and install Kvik into it first.
# PYTHON chooses the interpreter, VENV the folder of the environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

.PHONY: demo install check format test test-gpu bench wheel clean

demo: install
	$(BIN)/kvik generate demo "Once upon a time there was a little fox" --max-tokens 110 --seed 13 --stats

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt setup.py $(wildcard src/kvik/kernels/cpu/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/style

test: install
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-gpu:
	PYTHONPATH=src $(PYTHON) -m pytest -m gpu

bench: install
	$(BIN)/kvik bench throughput demo --workload decode_bs8
	$(BIN)/kvik bench latency demo

wheel: install
	$(BIN)/python -m build --wheel

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache
