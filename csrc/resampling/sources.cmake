list(APPEND WINNOW_CPU_SOURCES
  csrc/resampling/effective_sample_size.cpp
)
list(APPEND WINNOW_SIMD_SOURCES
  csrc/resampling/effective_sample_size_simd.cc
)
list(APPEND WINNOW_CUDA_SOURCES
  csrc/resampling/effective_sample_size.cu
)
