# The CUDA operators, a library of their own, loaded only where torch has CUDA. AUTO builds them for
# such a torch if there is a CUDA compiler; ON builds them against any torch, a CPU one too, as for a
# wheel.
set(WINNOW_CUDA AUTO CACHE STRING "Build the CUDA operators: AUTO (torch has CUDA, nvcc works), ON, OFF")
set_property(CACHE WINNOW_CUDA PROPERTY STRINGS AUTO ON OFF)
if(NOT WINNOW_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "torch-winnow: WINNOW_CUDA: expected AUTO, ON or OFF, got ${WINNOW_CUDA}")
endif()
if(WINNOW_CUDA STREQUAL "OFF")
  return()
endif()
if(WINNOW_CUDA STREQUAL "AUTO" AND NOT TORCH_HAS_CUDA)
  message(STATUS "CUDA operators: not built, torch ${TORCH_VERSION} has no CUDA")
  return()
endif()

# sm_80 code runs on every Ampere and Ada GPU, sm_90a on Hopper, the PTX on what comes after. Both
# are made from that one PTX: no kernel says anything that only Hopper's own PTX could, and most of
# the time goes into translating C++.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  set(WINNOW_CUDA_CODE --generate-code=arch=compute_80,code=[compute_80,sm_80,sm_90a])
endif()
if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(_winnow_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda
    PATH_SUFFIXES bin NO_CACHE)
  if(_winnow_nvcc)
    set(ENV{CUDACXX} "${_winnow_nvcc}")
  endif()
endif()
# Tried in a project of its own, so that a compiler that does not work never stops a CPU build.
if(DEFINED ENV{CUDACXX})
  check_language(CUDA)
endif()
if(NOT CMAKE_CUDA_COMPILER)
  if(WINNOW_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "torch-winnow: WINNOW_CUDA=ON, but no working CUDA compiler was found. Install the CUDA toolkit "
      "(13.0 is what we test; nvcc and cudart suffice), and put nvcc on the PATH or set CUDACXX to "
      "it. nvcc refuses host compilers newer than itself: CUDAHOSTCXX names another one.\n"
      "Without CUDA: WINNOW_CUDA=OFF.")
  endif()
  message(STATUS "CUDA operators: not built, no working nvcc")
  return()
endif()
enable_language(CUDA)
message(STATUS "CUDA operators: nvcc ${CMAKE_CUDA_COMPILER_VERSION}")

# What the library calls of libtorch_cuda. Where torch is a CPU build there is none to link with, so
# an empty one of the same SONAME takes its place for the linker; it is never installed, and in a
# process that imported a CUDA torch the real one is loaded already.
set(_stub_source "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub/torch_cuda_stub.cpp")
file(WRITE "${_stub_source}.new" "extern \"C\" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }\n")
configure_file("${_stub_source}.new" "${_stub_source}" COPYONLY)
add_library(torch_cuda_stub SHARED "${_stub_source}")
set_target_properties(torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda
  LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub")

add_library(_cuda MODULE ${WINNOW_CUDA_SOURCES})
target_include_directories(_cuda PRIVATE csrc)
target_include_directories(_cuda SYSTEM PRIVATE ${TORCH_INCLUDE_DIRS})
target_compile_features(_cuda PRIVATE cuda_std_17)
target_compile_definitions(_cuda PRIVATE TORCH_TARGET_VERSION=0x020b000000000000 TORCH_STABLE_ONLY)
target_compile_options(_cuda PRIVATE
  ${WINNOW_CUDA_CODE}
  --expt-relaxed-constexpr   # constexpr functions of the standard library and of philox.h
  --fmad=false               # a*b+c rounds as on the CPU; fma() is explicit
  -Xcompiler=-Wall,-Wextra,-fvisibility=hidden,-O1  # what runs on the host only launches
  "-Xcompiler=-fmacro-prefix-map=${CMAKE_SOURCE_DIR}/=,-fmacro-prefix-map=${TORCH_ROOT}/include/=")
target_link_libraries(_cuda PRIVATE torch_cuda_stub ${TORCH_LIBRARIES})
set_target_properties(_cuda PROPERTIES
  PREFIX "" SUFFIX ".so" SKIP_BUILD_RPATH ON CUDA_RUNTIME_LIBRARY Static)
# The static runtime's symbols stay inside: torch has a runtime of its own in the process.
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
install(TARGETS _cuda LIBRARY DESTINATION torch_winnow)
