# Every *_simd.cc is compiled once per instruction set, in a namespace of its own (CPU_CAPABILITY),
# and picked at run time. These units see raw pointers and at::vec only, never the stable headers.
include(CheckCXXCompilerFlag)

set(WINNOW_CAPABILITIES "DEFAULT")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(WINNOW_FLAGS_AVX2 -mavx2 -mfma -mf16c)
  set(WINNOW_FLAGS_AVX512 ${WINNOW_FLAGS_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
    -mprefer-vector-width=512)
  set(WINNOW_FLAGS_AVX512_BF16 ${WINNOW_FLAGS_AVX512} -mavx512bf16)
  list(APPEND WINNOW_CAPABILITIES AVX2 AVX512 AVX512_BF16)
  set(WINNOW_X86 ON)
endif()

function(winnow_add_simd target)
  foreach(capability IN LISTS WINNOW_CAPABILITIES)
    set(objects ${target}_${capability})
    add_library(${objects} OBJECT ${ARGN})
    target_include_directories(${objects} PRIVATE ${CMAKE_SOURCE_DIR}/csrc)
    target_include_directories(${objects} SYSTEM PRIVATE ${TORCH_INCLUDE_DIRS})
    # at::vec knows three macros; the bf16 variant is AVX-512 with one more instruction.
    string(REPLACE "_BF16" "" vec_capability ${capability})
    target_compile_definitions(${objects} PRIVATE
      CPU_CAPABILITY=${capability} CPU_CAPABILITY_${vec_capability} WINNOW_SIMD_UNIT)
    # Vectors are loaded from plain arrays all over these units: GCC 12 at -O3 was seen to reorder
    # such stores and loads wrongly under strict aliasing.
    target_compile_options(${objects} PRIVATE -fno-strict-aliasing ${WINNOW_FLAGS_${capability}})
    target_link_libraries(${objects} PRIVATE winnow_flags)
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:${objects}>)
  endforeach()
  if(WINNOW_X86)
    target_compile_definitions(${target} PRIVATE WINNOW_X86)
  endif()
endfunction()
