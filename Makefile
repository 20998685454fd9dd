# make demo | make test are the two commands of the README; each makes its environment by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The version known to work; `pip install -e .` itself takes any torch from 2.10 on.
TORCH ?= torch==2.13.0
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench gpu-static lint format clean

demo: $(VENV)/built
	$(BIN)/gptkernels demo

test: $(VENV)/built
	$(BIN)/python -m pytest

bench: $(VENV)/built
	$(BIN)/gptkernels bench ops
	$(BIN)/gptkernels bench train

# Every Triton kernel in every tile choice, compiled for sm_80 to sm_120; no GPU is needed, but half an hour is.
gpu-static: $(VENV)/built
	$(BIN)/gptkernels kernels --all

lint: $(VENV)/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(NATIVE)
	$(BIN)/mypy

format: $(VENV)/built
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

# An editable install: Python files are used from here, native ones are built again when they change.
$(VENV)/built: $(VENV)/torch setup.py pyproject.toml $(NATIVE)
	$(BIN)/python -m pip install --quiet -e '.[dev,triton]'
	touch $@

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info gptkernels/*.so gptkernels/_build.json
