# Finds torch by asking Python where it lies (TORCH_ROOT overrides). find_package(Torch) is not used:
# on a CUDA torch it demands a whole CUDA toolkit, which a CPU library does not need.
find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)

if(NOT DEFINED TORCH_ROOT)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u, os; s = u.find_spec('torch'); print(os.path.dirname(s.origin) if s else '')"
    OUTPUT_VARIABLE TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT TORCH_ROOT OR NOT EXISTS "${TORCH_ROOT}/include")
  message(FATAL_ERROR
    "torch-winnow: torch is not importable from ${Python_EXECUTABLE}, and the kernels are built "
    "against the torch that they will run with.\n"
    "  pip install 'torch>=2.11'\n"
    "  pip install --no-build-isolation torch-winnow\n"
    "(An isolated build hides the installed torch: keep --no-build-isolation.)")
endif()

file(READ "${TORCH_ROOT}/version.py" _torch_version_py)
string(REGEX MATCH "__version__ = '([^']+)'" _ "${_torch_version_py}")
set(TORCH_VERSION "${CMAKE_MATCH_1}")
string(REGEX MATCH "cuda[^=\n]*= '[0-9]" TORCH_HAS_CUDA "${_torch_version_py}")
string(REGEX MATCH "^[0-9]+\\.[0-9]+" _torch_release "${TORCH_VERSION}")
if(_torch_release VERSION_LESS 2.11)
  message(FATAL_ERROR
    "torch-winnow: torch ${TORCH_VERSION} at ${TORCH_ROOT} is too old; 2.11 or newer is needed "
    "(the stable ABI that the operators use).\n  pip install --upgrade 'torch>=2.11'")
endif()
message(STATUS "torch ${TORCH_VERSION} at ${TORCH_ROOT}")

set(TORCH_INCLUDE_DIRS "${TORCH_ROOT}/include" "${TORCH_ROOT}/include/torch/csrc/api/include")
find_library(TORCH_CPU_LIBRARY torch_cpu PATHS "${TORCH_ROOT}/lib" NO_DEFAULT_PATH REQUIRED)
# torch 2.11 exports copies of some functions of libstdc++, which the linker must not find first.
set(TORCH_LIBRARIES $<$<PLATFORM_ID:Linux>:stdc++> "${TORCH_CPU_LIBRARY}")

if(NOT pybind11_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import pybind11; print(pybind11.get_cmake_dir())"
    OUTPUT_VARIABLE pybind11_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
