# make demo | make test are the two commands of the README; each makes its environment by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The version known to work; `pip install -e .` itself takes any torch from 2.10 on.
TORCH ?= torch==2.13.0
NATIVE := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-install test-cuda-build bench gpu-static lint format clean

demo: $(VENV)/built
	$(BIN)/gptkernels demo

test: $(VENV)/built
	$(BIN)/python -m pytest

# A wheel in two new environments, with torch there before and without; kernels of one instruction set are enough.
test-install:
	GPTKERNELS_BUILD_ISAS=$${GPTKERNELS_BUILD_ISAS-baseline} PYTHON=$(PYTHON) tests/install.sh build/install '$(TORCH)'

# A CUDA build of torch (5 GB) in an environment of its own, and a copy of the source, which keeps the libraries here as
# they are. Needs nvcc of the same CUDA version, no GPU.
CUDA_TORCH ?= torch==2.14.1
CUDA_VENV := .venv-cuda
test-cuda-build: $(CUDA_VENV)/torch
	rm -rf $(CUDA_VENV)/source && mkdir $(CUDA_VENV)/source
	tar -cf - --exclude='*.so' --exclude=_build.json csrc gptkernels model benchmarks tests setup.py pyproject.toml \
	    README.md | tar -xf - -C $(CUDA_VENV)/source
	cd $(CUDA_VENV)/source && ../bin/python -m pip install -e . && ../bin/python -m pytest -v tests/test_cuda_build.py tests/test_cublaslt.py

$(CUDA_VENV)/torch:
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet '$(CUDA_TORCH)' pytest
	touch $@

bench: $(VENV)/built
	$(BIN)/gptkernels bench ops
	$(BIN)/gptkernels bench train

# Every Triton kernel in every tile choice, compiled for sm_80 to sm_120, and every CUDA kernel for sm_75 to sm_120 where
# nvcc is; no GPU is needed, but most of an hour is.
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
	rm -rf $(VENV) $(CUDA_VENV) build *.egg-info gptkernels/*.so gptkernels/_build.json
