# Every *_simd.cc is compiled once per instruction set, in a namespace of its own (CPU_CAPABILITY),
# and picked at run time. These units see raw pointers and at::vec only, never the stable headers.
include(CheckCXXCompilerFlag)

set(WINNOW_CAPABILITIES "DEFAULT")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(WINNOW_FLAGS_AVX2 -mavx2 -mfma -mf16c)
  set(WINNOW_FLAGS_AVX512 ${WINNOW_FLAGS_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mprefer-vector-width=512)
  set(WINNOW_FLAGS_AVX512_BF16 ${WINNOW_FLAGS_AVX512} -mavx512bf16 -mavx512vbmi
    -mavx512vnni)
  list(APPEND WINNOW_CAPABILITIES AVX2 AVX512 AVX512_BF16)
endif()

# For sanitizers and coverage, whose builds are slow: one instruction set in a quarter of the time. The
# library then runs on machines that have it, and nowhere else.
set(WINNOW_ONLY_CAPABILITY "" CACHE STRING "The one instruction set to compile, such as AVX2")
if(WINNOW_ONLY_CAPABILITY)
  if(NOT WINNOW_ONLY_CAPABILITY IN_LIST WINNOW_CAPABILITIES)
    message(FATAL_ERROR "torch-winnow: WINNOW_ONLY_CAPABILITY: expected one of "
      "${WINNOW_CAPABILITIES}, got ${WINNOW_ONLY_CAPABILITY}")
  endif()
  set(WINNOW_CAPABILITIES ${WINNOW_ONLY_CAPABILITY})
endif()
list(LENGTH WINNOW_CAPABILITIES _capabilities)
if(_capabilities EQUAL 1)
  target_compile_definitions(winnow_flags INTERFACE WINNOW_ONLY_CAPABILITY=${WINNOW_CAPABILITIES})
endif()

# GCC 12.2 at -O3 was seen to compile a loop over slots wrongly (csrc/resampling/small_populations.h,
# AVX-512, 16 particles: every slot got the last one's ancestor) where the sanitizers find nothing;
# either of the first two flags makes it right. Loop distribution also turns loops of a few stores into
# `rep stos`, which costs more than the stores.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(WINNOW_SIMD_FLAGS
    -fno-strict-aliasing -fno-tree-loop-distribution -fno-tree-loop-distribute-patterns)
endif()

function(winnow_add_simd target)
  foreach(capability IN LISTS WINNOW_CAPABILITIES)
    set(objects ${target}_${capability})
    add_library(${objects} OBJECT ${ARGN})
    target_include_directories(${objects} PRIVATE ${CMAKE_SOURCE_DIR}/csrc)
    target_include_directories(${objects} SYSTEM PRIVATE ${TORCH_INCLUDE_DIRS})
    # at::vec knows three macros; to it the bf16 variant is AVX-512.
    string(REPLACE "_BF16" "" vec_capability ${capability})
    target_compile_definitions(${objects} PRIVATE
      CPU_CAPABILITY=${capability} CPU_CAPABILITY_${vec_capability})
    target_compile_options(${objects} PRIVATE
      ${WINNOW_SIMD_FLAGS} ${WINNOW_FLAGS_${capability}})
    target_link_libraries(${objects} PRIVATE winnow_flags)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
  endforeach()
endfunction()
