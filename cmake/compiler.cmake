# A C++17 compiler and the flags that every target shares.
include(CheckLanguage)
check_language(CXX)
if(NOT CMAKE_CXX_COMPILER)
  message(FATAL_ERROR
    "torch-winnow: no C++ compiler was found, and a build from source needs one (GCC 11 or newer, or "
    "Clang 14 or newer).\n"
    "  Debian, Ubuntu: apt-get install g++     Fedora: dnf install gcc-c++     "
    "conda: conda install cxx-compiler\n"
    "If it lies off the PATH, set the environment variable CXX to it.")
endif()
enable_language(CXX)

if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()

set(WINNOW_SANITIZE "" CACHE STRING
  "Build with sanitizers: address (with undefined), thread, or empty for none")
set_property(CACHE WINNOW_SANITIZE PROPERTY STRINGS "" address thread)

add_library(winnow_flags INTERFACE)
target_compile_features(winnow_flags INTERFACE cxx_std_17)
target_compile_options(winnow_flags INTERFACE
  -Wall -Wextra
  -Wno-psabi                  # 64-byte vectors never cross a library boundary
  $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>   # false alarms inside GCC's AVX-512 headers
  -fvisibility=hidden
  -ffp-contract=off           # a*b+c rounds the same on every instruction set; FMA is explicit
  -fno-math-errno -fno-trapping-math
  "-fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=")   # no build path in error texts
if(WINNOW_SANITIZE)
  target_compile_options(winnow_flags INTERFACE -O1 -g1 -fno-omit-frame-pointer)
endif()
if(WINNOW_SANITIZE STREQUAL "address")
  # Checks of accesses that are calls compile in half the time of inlined ones. object-size, which
  # takes most of the rest, guesses what AddressSanitizer knows.
  target_compile_options(winnow_flags INTERFACE
    -fsanitize=address,undefined -fno-sanitize=object-size -fno-sanitize-recover=undefined
    $<$<CXX_COMPILER_ID:GNU>:--param=asan-instrumentation-with-call-threshold=0>
    "$<$<CXX_COMPILER_ID:Clang>:SHELL:-mllvm -asan-instrumentation-with-call-threshold=0>")
  target_link_options(winnow_flags INTERFACE -fsanitize=address,undefined)
elseif(WINNOW_SANITIZE STREQUAL "thread")
  target_compile_options(winnow_flags INTERFACE -fsanitize=thread)  # see csrc/common/parallel.h
  target_link_options(winnow_flags INTERFACE -fsanitize=thread)
elseif(WINNOW_SANITIZE)
  message(FATAL_ERROR "torch-winnow: WINNOW_SANITIZE: expected address, thread or nothing, "
    "got ${WINNOW_SANITIZE}")
endif()
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
