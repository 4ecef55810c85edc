# Everything that a fresh machine needs: `make demo` and `make test` set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test fast-test check setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	HF_HUB_OFFLINE= $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Compress the checkpoint that ships with the project from 12 to 9 layers, offline, and print the cost, also in tasks.
demo: $(READY)
	$(BIN)/layer-surgery compress experiments/demo/checkpoint --target-layers 9 --tasks bundled --output experiments/demo/output --overwrite

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Without the tests that work on the demo checkpoint.
fast-test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python calibration_data/build_tasks.py --check
	$(BIN)/python calibration_data/build_retrieval.py --check
	$(BIN)/python calibration_data/build_manifest.py --check

clean:
	rm -rf $(VENV) experiments/demo/output .pytest_cache .mypy_cache .ruff_cache
