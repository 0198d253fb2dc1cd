list(APPEND WINNOW_CPU_SOURCES
  csrc/resampling/effective_sample_size.cpp
  csrc/resampling/gather_particles.cpp
  csrc/resampling/resample.cpp
)
set(WINNOW_RESAMPLING_SIMD_SOURCES
  csrc/resampling/effective_sample_size_simd.cc
  csrc/resampling/resample_simd.cc
)
list(APPEND WINNOW_SIMD_SOURCES ${WINNOW_RESAMPLING_SIMD_SOURCES})

# GCC 12.2 at -O3 splits the loop over slots in small_populations.h and then stores the last
# slot's ancestors in all of them (AVX-512, 16 particles). The sanitizers find nothing wrong; without
# strict aliasing, or without loop distribution, the code is right. That pass also turns loops of a
# few stores into `rep stos`, which costs more than the stores.
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set_source_files_properties(${WINNOW_RESAMPLING_SIMD_SOURCES} PROPERTIES COMPILE_OPTIONS
    "-fno-strict-aliasing;-fno-tree-loop-distribution;-fno-tree-loop-distribute-patterns")
endif()
list(APPEND WINNOW_CUDA_SOURCES
  csrc/resampling/effective_sample_size.cu
  csrc/resampling/gather_particles.cu
)
